"""In which order a slice of the loop's time is spent."""

import asyncio

from tallymark_store import folding
from tallymark_store.folding import Folding

MS = 1_000_000


class Clock:
    """Time passes where it is spent."""

    def __init__(self):
        self.now = 0

    def monotonic_ns(self):
        """The time."""
        return self.now


class Pieces:
    """A partition that has so many records to fold, a millisecond each."""

    folds_from_log = False
    error = None

    def __init__(self, name, clock, order, left=30):
        self.name, self.clock, self.order, self.left = name, clock, order, left

    @property
    def fold_behind(self):
        """Whether one is left."""
        return self.left > 0

    def fold_steps(self):
        """Fold one."""
        self.left -= 1
        self.clock.now += MS
        self.order.append(self.name)
        return 1, 0


def folding_of(partitions, clock, awaited=()):
    """The driver's folding, of stand-ins."""
    for number, partition in enumerate(partitions):
        partition.partition = number
    return Folding(
        None,
        dict(enumerate(partitions)),
        clock,
        pause_reading=lambda _: None,
        on_damage=lambda *_: None,
        on_failed=lambda _: None,
        is_awaited=lambda partition: partition.name in awaited,
    )


async def test_what_is_waited_for_comes_first():
    """What somebody waits for is folded before the rest, of which little is done before the loop goes on."""
    clock, order, told = Clock(), [], []
    partitions = [Pieces(name, clock, order) for name in "abc"]
    made = folding_of(partitions, clock, awaited="b")
    made.soon()
    await asyncio.sleep(0)
    told.append("".join(order))
    while any(partition.fold_behind for partition in partitions):  # noqa: ASYNC110 - turns of the loop are what is tested
        await asyncio.sleep(0)
    slice_, others = folding.FOLD_SLICE_NS // MS, folding.OTHERS_SLICE_NS // MS
    assert told == ["b" * slice_ + "a" * others]
    assert "".join(order).startswith(2 * ("b" * slice_ + "a" * others))
    assert sorted(order) == sorted("abc" * 30)


async def test_a_slice_goes_around():
    """Without anybody who waits a slice is as long as it may be, and everything is folded in the end."""
    clock, order = Clock(), []
    partitions = [Pieces(name, clock, order, left=10) for name in "abc"]
    made = folding_of(partitions, clock)
    made.soon()
    await asyncio.sleep(0)
    assert "".join(order) == "a" * 10 + "b" * 5
    while any(partition.fold_behind for partition in partitions):  # noqa: ASYNC110 - turns of the loop are what is tested
        await asyncio.sleep(0)
    assert sorted(order) == sorted("abc" * 10)


async def test_what_nobody_waits_for_is_left_to_its_time():
    """Folding what is awaited leaves the other partitions' records to gather, and its own slices are short, too."""
    clock, order = Clock(), []
    partitions = [Pieces(name, clock, order) for name in "abc"]
    made = folding_of(partitions, clock, awaited="b")
    made.awaited_soon()
    await asyncio.sleep(0)
    assert "".join(order) == "b" * (folding.FOLD_SLICE_NS // MS)
    while partitions[1].fold_behind:  # noqa: ASYNC110 - turns of the loop are what is tested
        await asyncio.sleep(0)
    for _ in range(10):
        await asyncio.sleep(0)
    assert "".join(order) == "b" * 30


async def test_what_is_committed_is_folded_in_the_end():
    """Also of a partition that was waited for at its commit, and is no more when its time has come."""
    clock, order, awaited = Clock(), [], {"b"}
    partitions = [Pieces(name, clock, order, left=2) for name in "ab"]
    made = folding_of(partitions, clock, awaited=awaited)
    made.later(2, is_awaited=True)
    awaited.clear()
    async with asyncio.timeout(30):
        while any(partition.fold_behind for partition in partitions):  # noqa: ASYNC110 - there is nothing else to ask
            await asyncio.sleep(folding.FOLD_DELAY_S / 10)
    assert "".join(order) == "aabb"
    made.later(folding.FOLD_EVENTS)
    partitions[0].left = 1
    for _ in range(2):
        await asyncio.sleep(0)
    assert "".join(order) == "aabba", "so many are not waited with"
    partitions[1].left = 1
    made.later(1, behind=folding.BEHIND_EVENTS)
    for _ in range(2):
        await asyncio.sleep(0)
    assert "".join(order) == "aabbab", "nor so many of one partition"
    made.close()


async def test_one_partition_can_be_asked_for():
    """It is folded with what is waited for until nothing of it is left, though nobody waits for it any more."""
    clock, order = Clock(), []
    partitions = [Pieces(name, clock, order) for name in "ab"]
    made = folding_of(partitions, clock)
    made.awaited_soon(1)
    while partitions[1].fold_behind:  # noqa: ASYNC110 - turns of the loop are what is tested
        await asyncio.sleep(0)
    for _ in range(5):
        await asyncio.sleep(0)
    assert "".join(order) == "b" * 30
    made.close()


async def test_there_is_one_slice_in_a_turn():
    """Where all partitions are due to be folded, those that somebody waits for are not folded twice as long."""
    clock, order = Clock(), []
    partitions = [Pieces("a", clock, order, left=100)]
    made = folding_of(partitions, clock, awaited="a")
    made.soon()
    made.awaited_soon()
    spent = []
    while partitions[0].fold_behind:
        before = len(order)
        await asyncio.sleep(0)
        spent.append(len(order) - before)
    assert max(spent) == folding.FOLD_SLICE_NS // MS
    made.close()

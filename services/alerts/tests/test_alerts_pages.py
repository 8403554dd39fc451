"""Pages that are read for readers that are behind: shared, kept for the next call, in line, within bounds."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from tallymark_alerts.counters import AlertsCounters
from tallymark_alerts.matching import Filter
from tallymark_alerts.pages import KEPT_S, LINE_AGAIN_S, READ_AGAIN_S, READS_MAX, RECORD_WEIGHT, Pages
from tallymark_protocol.errors import ErrorCode, UnavailableError

from .alerts_fakes import FakeStores
from .alerts_virtual import run_virtual

COUNT = 2
ALL = Filter([], [], COUNT)


class Reader:
    """Counts how often it is told to look again."""

    def __init__(self) -> None:
        self.woken = 0

    def wake(self) -> None:
        self.woken += 1


class Scene:
    """Pages, their stores, and partitions that are lost."""

    def __init__(self, **more: Any) -> None:
        self.stores = FakeStores(COUNT)
        self.stores.write(0, 100)
        self.counters = AlertsCounters()
        self.lost: set[int] = set()
        self.pages = Pages(
            self.stores,
            partition_count=COUNT,
            counters=self.counters,
            is_lost=self.lost.__contains__,
            **more,
        )

    def reads(self) -> list[int]:
        """Where the reads so far began."""
        return [call.from_position for call in self.stores.reads]


def scene(body: Callable[[Scene], Coroutine[Any, Any, None]], **config: Any) -> None:
    """Play a scene to its end; nothing is left."""

    async def main() -> None:
        played = Scene(**config)
        await body(played)
        await played.pages.close()
        assert len(played.pages) == 0
        assert played.pages._kept_weight == 0
        assert asyncio.all_tasks() == {asyncio.current_task()}

    run_virtual(main())


def test_those_who_want_the_same_share_it() -> None:
    """One read, all are told, and the last one to take it leaves nothing behind."""

    async def body(s: Scene) -> None:
        readers = [Reader() for _ in range(3)]
        pages = [s.pages.ask(0, 10, ALL, 5, reader) for reader in readers]
        await asyncio.sleep(1)
        assert s.reads() == [10]
        assert [reader.woken for reader in readers] == [1, 1, 1]
        for page, reader in zip(pages, readers, strict=True):
            taken = s.pages.take(page, reader, 5)
            assert [alert.position for alert in taken.alerts] == [10, 11, 12, 13, 14]
            assert taken.next_position == 15
        assert len(s.pages) == 0

    scene(body)


def test_a_page_waits_for_its_reader() -> None:
    """Whether it came before the reader left or after, and for so long only."""

    async def body(s: Scene) -> None:
        reader = Reader()
        s.pages.leave(s.pages.ask(0, 10, ALL, 5, reader), reader)
        await asyncio.sleep(KEPT_S - 1)
        page = s.pages.find(0, 10, ALL)
        assert page is not None
        assert page.answer is not None
        assert s.pages.find(0, 10, Filter([], ["m"], COUNT)) is None
        s.pages.leave(s.pages.ask(0, 10, ALL, 5, reader), reader)
        await asyncio.sleep(KEPT_S - 1)
        assert s.pages.find(0, 10, ALL) is page
        await asyncio.sleep(2)
        assert s.pages.find(0, 10, ALL) is None
        assert s.reads() == [10]
        assert reader.woken == 0

    scene(body)


def test_what_there_is_no_room_for_is_kept() -> None:
    """The next call finds it where it goes on, to the page's end."""

    async def body(s: Scene) -> None:
        reader = Reader()
        page = s.pages.ask(0, 90, ALL, 100, reader)
        await asyncio.sleep(1)
        position, got = 90, []
        for count in (3, 1, 100):
            taken = s.pages.take(page, reader, count)
            got += [alert.position for alert in taken.alerts]
            position = taken.next_position
            found = s.pages.find(0, position, ALL)
            if found is not None:
                page = found
        assert got == list(range(90, 100))
        assert position == 100
        assert s.reads() == [90]
        assert len(s.pages) == 0

    scene(body)


def test_a_place_in_line_is_kept() -> None:
    """Who is answered meanwhile and comes again is not at the end; who doesn't come again is passed over at last."""

    async def body(s: Scene) -> None:
        s.stores.gate.clear()
        reader = Reader()
        pages = [s.pages.ask(0, position, ALL, 1, reader) for position in range(READS_MAX + 4)]
        first, second = pages[READS_MAX], pages[READS_MAX + 1]
        s.pages.leave(first, reader)
        s.pages.leave(second, reader)
        await asyncio.sleep(KEPT_S - 1)
        assert s.pages.ask(0, first.position, ALL, 1, reader) is first
        await asyncio.sleep(2)
        assert second.is_over
        s.stores.gate.set()
        await asyncio.sleep(1)
        assert s.reads() == [page.position for page in pages if page is not second]
        for page in pages:
            s.pages.leave(page, reader)

    scene(body)


def test_what_nobody_waits_for_is_bounded() -> None:
    """What was left longest ago goes first, also a read that is under way; what somebody waits for stays."""

    async def body(s: Scene) -> None:
        reader = Reader()
        held = s.pages.ask(0, 50, ALL, 10, reader)
        for position in range(5):
            s.pages.leave(s.pages.ask(0, position, ALL, 10, reader), reader)
            await asyncio.sleep(0.1)
        kept = [position for position in range(5) if s.pages.find(0, position, ALL) is not None]
        assert kept == [3, 4]
        assert held.answer is not None
        s.stores.gate.clear()
        names = Filter([], [f"n{number}" for number in range(2 * (10 * RECORD_WEIGHT + 1))], COUNT)
        page = s.pages.ask(0, 0, names, 10, reader)
        await asyncio.sleep(0.1)
        s.pages.leave(page, reader)
        await asyncio.sleep(0.1)
        assert page.is_over
        assert page.read is None
        s.pages.leave(held, reader)

    scene(body, kept_weight_max=2 * (10 * RECORD_WEIGHT + 1))


def test_after_a_failure_it_rests() -> None:
    """Also for who comes anew meanwhile; then it can be asked for again."""

    async def body(s: Scene) -> None:
        s.stores.unreadable[0] = UnavailableError("damaged", code=ErrorCode.PARTITION_DAMAGED)
        reader, other = Reader(), Reader()
        page = s.pages.ask(0, 0, ALL, 5, reader)
        await asyncio.sleep(READ_AGAIN_S / 2)
        assert page.error is s.stores.unreadable[0]
        s.pages.leave(page, reader)
        assert s.pages.ask(0, 0, ALL, 5, other) is page
        assert (reader.woken, other.woken) == (1, 0)
        s.stores.unreadable.clear()
        await asyncio.sleep(READ_AGAIN_S)
        assert page.is_over
        assert other.woken == 1
        page = s.pages.ask(0, 0, ALL, 5, other)
        await asyncio.sleep(0.1)
        assert page.answer is not None
        assert s.reads() == [0, 0]
        assert sum(s.counters.catch_up_failures.values()) == 1

    scene(body)


def test_a_defect_is_a_failure() -> None:
    """It rests as well, and the read's place is free for others."""

    async def body(s: Scene) -> None:
        async def defect(*_: Any) -> Any:
            raise ValueError("not expected")

        s.stores.read = defect  # type: ignore[method-assign]
        reader = Reader()
        pages = [s.pages.ask(0, position, ALL, 1, reader) for position in range(READS_MAX + 1)]
        await asyncio.sleep(READ_AGAIN_S / 2)
        for page in pages:
            assert isinstance(page.error, UnavailableError)
            assert "ValueError" in page.error.message

    scene(body)


def test_nobody_stands_in_line_for_a_lost_partition() -> None:
    """Who would is told at once, who stands there when a read fails is told then; reads are tried all the same."""

    async def body(s: Scene) -> None:
        s.stores.gate.clear()
        reader = Reader()
        early = [s.pages.ask(0, position, ALL, 1, reader) for position in range(READS_MAX + 3)]
        s.lost.add(0)
        late = s.pages.ask(0, 50, ALL, 1, reader)
        assert all(page.error is not None for page in (*early[READS_MAX:], late))
        assert all(page.is_under_way for page in early[:READS_MAX])
        other = s.pages.ask(1, 0, ALL, 1, reader)
        assert other.error is None
        s.lost.clear()
        await asyncio.sleep(LINE_AGAIN_S + 0.1)
        assert late.is_over
        late = s.pages.ask(0, 50, ALL, 1, reader)
        s.stores.gate.set()
        await asyncio.sleep(0.1)
        assert late.answer is not None

    scene(body)


@pytest.mark.parametrize("is_begun", [False, True])
def test_the_end_leaves_nothing(is_begun: bool) -> None:
    """Reads that have not begun, that are under way, and those in line."""

    async def body(s: Scene) -> None:
        s.stores.gate.clear()
        reader = Reader()
        pages = [s.pages.ask(0, position, ALL, 1, reader) for position in range(READS_MAX + 3)]
        if is_begun:
            await asyncio.sleep(1)
        await s.pages.close()
        assert all(page.is_over for page in pages)
        assert len(s.stores.reads) == (READS_MAX if is_begun else 0)

    scene(body)

"""Details of leading that no conversation shows: the rate at which a learner is brought up."""

from tallymark_store.replication.effects import Role, Send
from tallymark_store.replication.memory_log import MemoryLog
from tallymark_store.replication.messages import Append, Appended, Mismatch, Promised, Rebuild, Record
from tallymark_store.replication.ports import DurableState, Member, Membership, ReplicaConfig
from tallymark_store.replication.replica import Replica
from tallymark_store.wal import RecordKind, RecordMeta

MS = 1_000_000
START = 1_000_000 * MS


def leader_with(log_bytes, rate):
    """A single member that leads a log of so many bytes, in records of 1,000, and shall get a second copy."""
    log = MemoryLog([])
    config = ReplicaConfig(catch_up_bytes_per_s=rate, message_bytes=10_000)
    replica = Replica(
        0,
        node_id="a",
        instance="a-1",
        log=log,
        state=DurableState(copy_id="a1"),
        config=config,
        history=[Membership((Member("a", "a1"),))],
        new_copy_id=lambda: "new",
        is_damaged=False,
        now_ns=START,
    )
    replica.key_changed("", 1, START)
    replica.key_created(5, START)
    payloads = [b"start", *[bytes(1_000)] * (log_bytes // 1_000)]
    for offset, payload in enumerate(payloads):
        kind = RecordKind.EVENTS if offset else RecordKind.EPOCH_START
        log.append([Record(RecordMeta(0, kind, 5, offset, 1, 0), (payload,))])
    replica.appended(START)
    replica.synced(log.log_end, START)
    return replica


def test_a_learner_is_brought_up_at_a_bounded_rate():
    """Acknowledging at once, it still gets no more than the rate and one burst of a quarter second allow."""
    rate = 200_000
    replica = leader_with(2_000_000, rate)
    effects = replica.set_wish(("a", "b"), START)
    sent = 0
    now = START
    while now < START + 4_000 * MS:
        queue, effects = effects, []
        for effect in queue:
            if not isinstance(effect, Send) or not isinstance(effect.message, Append):
                continue
            message, records = effect.message, effect.records
            sent += sum(len(part) for record in records for part in record.parts)
            if message.base > 0 and not sent:
                answer = Mismatch(0, 5, message.base, 5, "b1", 0, 0, [], True)
            else:
                answer = Appended(0, 5, "b1", records[-1].end if records else message.base)
            effects += replica.step("b", answer, [], now)
        if not effects:
            now += 100 * MS
            effects = replica.tick(now)
    assert 4 * rate * 0.9 < sent < 4 * rate + rate // 4 + 30_000


def test_a_member_is_not_slowed_down():
    """What the quorum needs is sent as fast as the window allows."""
    replica = leader_with(0, 1)
    replica._history.append(Membership((Member("a", "a1"), Member("b", "b1")), 0))
    replica.set_wish(("a", "b"), START)
    replica.step("b", Appended(0, 5, "b1", 1), [], START)
    for offset in range(1, 101):
        replica.log.append([Record(RecordMeta(0, RecordKind.EVENTS, 5, offset, 1, 0), (bytes(1_000),))])
    effects = replica.appended(START)
    sent = [effect for effect in effects if isinstance(effect, Send)]
    assert sum(len(record.parts[0]) for effect in sent for record in effect.records) == 100_000


def leader_of(*followers):
    """The leader "a" of these nodes and itself, whose copies are named after them; its epoch start is committed."""
    log = MemoryLog([])
    replica = Replica(
        0,
        node_id="a",
        instance="a-1",
        log=log,
        state=DurableState(copy_id="a1"),
        config=ReplicaConfig(),
        history=[Membership((Member("a", "a1"), *[Member(node, f"{node}1") for node in followers]))],
        new_copy_id=lambda: "new",
        is_damaged=False,
        now_ns=START,
    )
    replica.key_changed("", 1, START)
    replica.key_created(5, START)
    for node in followers:
        replica.step(node, Promised(0, 5, True, 5, f"{node}1", 0, 0, []), [], START)
    write(replica, RecordKind.EPOCH_START)
    for node in followers:
        replica.step(node, Appended(0, 5, f"{node}1", 1), [], START)
    assert replica.role is Role.LEADER
    return replica


def write(replica, kind=RecordKind.EVENTS):
    """Append a record at the leader, and have it on its disk."""
    log = replica.log
    log.append([Record(RecordMeta(0, kind, 5, log.log_end, 1, 0), (b"x",))])
    return replica.appended(START) + replica.synced(log.log_end, START)


def damaged(node, end):
    """What a damaged copy answers."""
    return Mismatch(0, 5, end, 5, f"{node}1", end, 0, [], is_obeyed=False, is_damaged=True)


def test_copies_that_commit_nothing_are_no_majority():
    """Damaged copies, and other copies than the members, are heard of; but who hears no others must let go."""
    replica = leader_of("b", "c", "d", "e")
    now = START
    while replica.role is Role.LEADER and now < START + 10_000 * MS:
        now += 100 * MS
        replica.step("b", Appended(0, 5, "b1", 1), [], now)
        replica.step("c", damaged("c", 1), [], now)
        replica.step("d", Appended(0, 5, "d2", 0), [], now)
        replica.tick(now)
    assert replica.role is Role.FOLLOWER
    assert now <= START + 2_300 * MS


def test_a_damaged_copy_is_kept_until_others_have_what_is_committed():
    """Its bytes may be the only other ones: it begins anew once a majority without it holds all of them."""
    replica = leader_of("b", "c")
    write(replica)
    replica.step("c", Appended(0, 5, "c1", 2), [], START)
    assert replica.high_watermark == 2, "committed by the leader and c"
    replica.step("b", Appended(0, 5, "b1", 1), [], START)
    effects = replica.step("c", damaged("c", 2), [], START)
    assert not [e for e in effects if isinstance(e, Send) and isinstance(e.message, Rebuild)]
    replica.step("b", Appended(0, 5, "b1", 2), [], START)
    effects = replica.step("c", damaged("c", 2), [], START)
    assert [e.message for e in effects if isinstance(e, Send)] == [Rebuild(0, 5, "c1")]

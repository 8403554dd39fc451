"""The replication core alone under random fault schedules: nothing acknowledged is lost, nothing parts."""

import pytest

from tallymark_store.replication.effects import Role

from .replication_world import MS, World


def pick(world):
    """A node to be hit: the leader more often than not."""
    leader = world.leader()
    if leader is not None and world.rng.random() < 0.6:
        return leader
    return world.nodes[world.rng.choice(sorted(world.nodes))]


def cut_off(world, node, share):
    """Cut links of a node, each direction for itself."""
    for other in sorted(world.nodes):
        if other != node.name:
            if world.rng.random() < share:
                world.cut.add((node.name, other))
            if world.rng.random() < share:
                world.cut.add((other, node.name))


def inject(world):
    """One random fault, or the end of one."""
    rng = world.rng
    node = pick(world)
    match rng.randrange(14):
        case 0 | 1:
            node.crash()
        case 2 | 3:
            for other in world.nodes.values():
                if not other.alive() and rng.random() < 0.7:
                    other.start()
        case 4:
            node.paused_until = world.now + rng.choice((50, 500, 5_000)) * MS
            world.trace(f"{node.name} is paused until {node.paused_until // MS - 1_000_000}")
        case 5:
            cut_off(world, node, 0.5)
        case 6:
            cut_off(world, node, 1.0)
            world.trace(f"{node.name} is cut off")
        case 7:
            world.cut.clear()
        case 8:
            world.coordinator_away = rng.random() < 0.4
        case 9:
            world.loss = rng.choice((0.0, 0.0, 0.05, 0.3))
            world.duplication = rng.choice((0.0, 0.1))
            world.lateness = rng.choice((0.0, 0.05, 0.3))
            world.sync_ms = rng.choice((1, 1, 20, 400))
            world.spite = rng.choice((0.0, 0.1, 0.3))
        case 10:
            if not world.lost_copy:
                world.lost_copy = True  # with one copy lost for good, a majority still has everything
                node.lose(wiped=rng.random() < 0.5)
        case 11:
            for other in world.nodes.values():
                other.crash()
            for other in world.nodes.values():
                if rng.random() < 0.7:
                    other.start()
        case 12 | 13:
            # The key goes to somebody else while its holder does not know yet.
            node.lease_until = -1
            if world.key[0] == node.name and not world.coordinator_away:
                world.trace(f"{node.name} loses its lease")
                if rng.random() < 0.5:
                    cut_off(world, node, 1.0)
                world.revision += 1
                world.set_key("", world.revision)


def run(seed, *, does_recycle=False):
    """A schedule: faults under writes, then healing: writes must succeed again and all copies agree."""
    spare = ("d",) if seed % 3 == 0 else ()
    world = World(seed, spare=spare)
    try:
        for _ in range(world.rng.randint(5, 60)):
            pace = world.rng.choice((2, 20, 200))
            for _ in range(world.rng.randint(1, 12)):
                world.run_for(world.rng.randint(1, pace) * MS)
                world.write()
            inject(world)
            if does_recycle:
                for node in world.nodes.values():
                    if node.alive() and node.paused_until <= world.now and world.rng.random() < 0.5:
                        node.recycle()
            if spare and world.rng.random() < 0.1:
                world.wish = tuple(world.rng.sample(sorted(world.nodes), 3))
                world.trace(f"wish {world.wish}")
                for node in world.nodes.values():
                    if node.alive():
                        node.do(node.replica.set_wish(world.wish, world.now))
        world.trace("heals")
        world.heal()
        for node in world.nodes.values():
            node.do(node.replica.set_wish(world.wish, world.now))
        world.run_for(20_000 * MS)
        before = len(world.acknowledged)
        world.write()
        world.run_for(2_000 * MS)
        assert len(world.acknowledged) > before, "LIVE-1: a write is acknowledged after healing"
        leader = world.leader()
        assert {m.node_id for m in leader.replica.membership.members} == set(world.wish), (
            "the fact becomes the wish"
        )
        for member in leader.replica.membership.members:
            node = world.nodes[member.node_id]
            assert node.replica.role is not Role.DAMAGED
            both = max(node.log.log_start, leader.log.log_start)
            own, others = (
                [record for record in log.records if record.meta.base_offset >= both]
                for log in (node.log, leader.log)
            )
            assert own == others
            assert node.log.epoch_before(both) == leader.log.epoch_before(both)
            assert node.replica.high_watermark == leader.log.log_end
        found = {record.meta.base_offset: record.parts for record in leader.log.records}
        found |= {
            offset: parts for offset, (_, parts) in world.committed.items() if offset < leader.log.log_start
        }
        assert world.acknowledged.items() <= found.items(), "LOG-1"
    except BaseException:
        print(f"seed {seed}", *world.lines[-80:], sep="\n")
        raise
    return world


@pytest.mark.parametrize("block", range(8))
def test_random_schedules(block):
    """Crashes, pauses, cuts, loss, lease loss and changed wishes; a failing seed prints its trace."""
    acknowledged = served = 0
    for seed in range(block * 25, block * 25 + 25):
        world = run(seed)
        acknowledged += len(world.acknowledged)
        served += world.served
    assert acknowledged > 200
    assert served > 25


@pytest.mark.parametrize("block", range(8))
def test_random_schedules_with_logs_that_are_dropped(block):
    """The same where every copy drops its log below its checkpoints: who is behind begins with one of them."""
    installed = recycled = 0
    for seed in range(block * 25, block * 25 + 25):
        world = run(seed, does_recycle=True)
        installed += world.installed
        recycled += world.recycled
    assert recycled > 100
    assert installed > 3

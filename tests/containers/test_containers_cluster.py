"""A cluster of containers: the quickstart, a leader that is killed, a store that is stopped."""

from collections import Counter

import pytest
from engine import PARTITIONS, Container, cluster, wait_until
from smoke import Ledger, accounts_of_partitions, alerts_arrive, smoke

FAILOVER_SECONDS_MAX = 60.0


@pytest.mark.timeout(600)
async def test_quickstart_and_failover() -> None:
    """A leader's container is killed: writes to its partitions succeed again, and nothing is lost or doubled."""
    async with cluster() as made:
        await smoke(made.addresses)
        ledger = Ledger(made.addresses, accounts_of_partitions(PARTITIONS))
        async with ledger.writing():
            await wait_until(lambda: ledger.all_beyond(Counter()), "every partition takes events")
            leaders = made.leaders()
            assert sorted(leaders) == list(range(PARTITIONS))
            victim = made.stores[leaders[0]]
            victim.kill()
            marks = ledger.marks()
            await wait_until(
                lambda: ledger.all_beyond(marks), "events again, everywhere", seconds=FAILOVER_SECONDS_MAX
            )
            assert victim.alias not in made.leaders().values()
            victim.restart()
            await victim.wait_healthy()
            marks = ledger.marks()
            await wait_until(lambda: ledger.all_beyond(marks), "events with the store back")
        await ledger.check()

        # What the others acknowledged while it was down is with the one that was killed, too: without one of them
        # it is needed for a majority.
        other = next(name for name in made.stores if name != victim.alias)
        made.stores[other].kill()
        await ledger.check()


@pytest.mark.timeout(600)
async def test_leader_that_is_paused_or_cut_off() -> None:
    """A leader that stands still, or reaches nobody, for longer than its lease: others take over, and it follows."""
    async with cluster() as made:
        ledger = Ledger(made.addresses, accounts_of_partitions(PARTITIONS))
        async with ledger.writing():
            await wait_until(lambda: ledger.all_beyond(Counter()), "every partition takes events")
            for begin, end in (
                (Container.pause, Container.resume),
                (Container.cut_off, Container.connect_again),
            ):
                victim = made.stores[made.leaders()[0]]
                begin(victim)
                marks = ledger.marks()
                await wait_until(
                    lambda marks=marks: ledger.all_beyond(marks), "events without it, everywhere"
                )
                assert victim.alias not in made.leaders().values()
                end(victim)
                await wait_until(lambda victim=victim: victim.health == "healthy", "it follows, and says so")
                marks = ledger.marks()
                await wait_until(lambda marks=marks: ledger.all_beyond(marks), "events with it back")
        await ledger.check()


@pytest.mark.timeout(600)
async def test_graceful_stop() -> None:
    """Every role ends with status 0 at SIGTERM, under load; a stopped leader has handed its partitions over."""
    async with cluster() as made:
        ledger = Ledger(made.addresses, accounts_of_partitions(PARTITIONS))
        async with ledger.writing():
            await wait_until(lambda: ledger.all_beyond(Counter()), "every partition takes events")
            stopped = made.stores[made.leaders()[0]]
            assert stopped.stop_gracefully() == 0
            assert stopped.alias not in made.leaders().values()
            marks = ledger.marks()
            await wait_until(lambda: ledger.all_beyond(marks), "events without the stopped store")
            assert made.gateways["gateway1"].stop_gracefully() == 0
            assert made.queries["query1"].stop_gracefully() == 0
            assert made.alerts["alerts1"].stop_gracefully() == 0
            marks = ledger.marks()
            await wait_until(lambda: ledger.all_beyond(marks), "events through the other gateway")
        await ledger.check()
        await alerts_arrive(made.addresses[1:])
        for container in made.roles:
            if container.health:
                assert container.stop_gracefully() == 0, container.alias

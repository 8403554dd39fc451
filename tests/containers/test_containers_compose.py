"""The compose file of deploy/ comes up healthy and serves; its configuration is what the documentation says."""

import subprocess

import pytest
from engine import IMAGE, compose, wait_until
from smoke import Ledger, accounts_of_partitions, alerts_arrive, smoke

SERVICES = [
    "alerts1",
    "alerts2",
    "etcd1",
    "etcd2",
    "etcd3",
    "gateway1",
    "gateway2",
    "query1",
    "query2",
    "store1",
    "store2",
    "store3",
]
PARTITIONS = 12


@pytest.mark.timeout(600)
async def test_compose_comes_up_and_survives_members() -> None:
    """The smoke test; then an etcd member, a store, a query node and an alerts instance go while events flow, and come back."""
    async with compose() as project:
        assert sorted(project.states()) == SERVICES
        await smoke(project.addresses)
        ledger = Ledger(project.addresses, accounts_of_partitions(PARTITIONS))
        async with ledger.writing():
            for service in ("etcd1", "store1", "query1", "alerts1"):
                await project.run("kill", service)
                marks = ledger.marks()
                await wait_until(lambda marks=marks: ledger.all_beyond(marks), f"events without {service}")
                await project.run("up", "-d")
                await project.wait_healthy()
        await ledger.check()
        await alerts_arrive(project.addresses)

        # All of it stops and comes back with what it had.
        await project.run("stop")
        assert set(project.states().values()) == {"exited"}
        await project.run("up", "-d")
        await project.wait_healthy()
        await ledger.check()


def test_the_image_runs_as_an_ordinary_user_with_its_kernels() -> None:
    """Nothing runs as root, and a role's kernels are there: a start doesn't compile."""
    script = (
        "import os; from tallymark_node.cli.serve import _kernels_cached; "
        "print(os.getuid() != 0, _kernels_cached(), os.access('/var/lib/tallymark', os.W_OK))"
    )
    command = ["docker", "run", "--rm", "--network", "none", "--entrypoint", "python", IMAGE, "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True", "True", "True"]

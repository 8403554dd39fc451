"""`tallymark cluster` against a gateway that answers from a script."""

from __future__ import annotations

import asyncio
import json
import threading

import msgspec
import pytest
from click.testing import CliRunner

from tallymark_node.cli import cluster as commands
from tallymark_node.main import cli
from tallymark_protocol.errors import InvalidRequestError, NotFoundError, UnavailableError
from tallymark_protocol.messages import (
    PROTOCOL_VERSION,
    ClusterChange,
    ClusterDrain,
    ClusterInfo,
    ClusterRebalance,
    ClusterRecover,
    ClusterReplace,
    ClusterStatus,
    PartitionInfo,
    StoreInfo,
    Welcome,
)
from tallymark_runtime.transport import FrameServer, HandlerBase


def store(name, **more):
    """A store that is up and holds two copies."""
    facts = {"wished": 2, "held": 2, "led": 1, "is_up": True, "is_draining": False, "zone": "z1"}
    return StoreInfo(node_id=name, address=f"{name}:1", **{**facts, **more})


def partition(number, wished="a b", members="a b", leader="a", **more):
    """A partition; everything in its place unless said otherwise."""
    return PartitionInfo(number, wished.split(), members.split(), leader, **more)


def info(*partitions, stores=None):
    """A cluster."""
    return ClusterInfo(list(stores or map(store, "abc")), list(partitions), 2)


SETTLED = info(partition(0), partition(1))


class FakeGateway(HandlerBase):
    """Answers status calls one after the other from a list, the last again and again; changes from another."""

    def __init__(self):
        self.server = FrameServer(self, lambda: Welcome(PROTOCOL_VERSION, "g", "ingest", 0))
        self.statuses = [SETTLED]
        self.answers = []
        self.calls = []

    async def on_call(self, connection, call):
        self.calls.append(call)
        queue = self.statuses if isinstance(call, ClusterStatus) else self.answers
        answer = queue.pop(0) if len(queue) > 1 else queue[0]
        if isinstance(answer, Exception):
            raise answer
        return answer


@pytest.fixture
def gateway(monkeypatch):
    """A gateway on a thread of its own."""
    monkeypatch.setattr(commands, "POLL_SECONDS", 0.01)
    started = threading.Event()
    found = {}

    async def serve():
        made = found["gateway"] = FakeGateway()
        stop = found["stop"] = asyncio.Event()
        found["loop"] = asyncio.get_running_loop()
        found["address"] = await made.server.start()
        started.set()
        await stop.wait()
        await made.server.close(deadline_s=0.0)

    thread = threading.Thread(target=lambda: asyncio.run(serve()))
    thread.start()
    started.wait()
    found["gateway"].address = found["address"]
    yield found["gateway"]
    found["loop"].call_soon_threadsafe(found["stop"].set)
    thread.join()


@pytest.fixture
def tally(gateway):
    """Run the command; returns its result."""

    def run(*arguments, status=0, stdin=None, address=gateway.address):
        result = CliRunner().invoke(
            cli, ["--timeout", "5", *map(str, arguments), "--server", address], input=stdin
        )
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        assert result.exit_code == status, result.output
        return result

    return run


def test_status_shows_stores_and_partitions(tally, gateway):
    """One line for each, with what is not as it shall be."""
    gateway.statuses = [
        info(
            partition(0, epoch=7, log_end=1_234, high_watermark=1_230, lags={"b": 4}),
            partition(1, wished="c b"),
            partition(2, members="a b", leader="", error="b: damaged"),
            partition(3, leader="b"),
            stores=(
                store("a"),
                store("b", is_draining=True),
                store("c", is_draining=True, wished=0, held=0),
                store("d", is_up=False),
                store("e", error="can't connect"),
                store("f", is_full=True),
            ),
        )
    ]
    shown = tally("cluster", "status").stdout
    lines = {line.split()[0]: " ".join(line.split()) for line in shown.splitlines() if line.strip()}
    assert "2 copies of each partition" in shown
    assert "b z1 up, draining b:1" in lines["b"]
    assert "up, drained" in lines["c"]
    assert "down" in lines["d"]
    assert "silent" in lines["e"]
    assert "can't connect" in lines["e"]
    assert "full" in lines["f"]
    assert lines["0"] == "0 a a b 7 1,234 1,230 4 ok"
    assert lines["1"].endswith("+c, -a")
    assert lines["2"].endswith("no leader, b: damaged")
    assert lines["3"].endswith("leader moves to a")


def test_status_checks(tally, gateway):
    """With --check the exit status says whether everything is in its place; JSON says what remains."""
    tally("cluster", "status", "--check")
    gateway.statuses = [info(partition(0, wished="c b"), partition(1, leader=""))]
    tally("cluster", "status")
    found = json.loads(tally("cluster", "status", "--check", "--json", status=1).stdout)
    assert found["is_settled"] is False
    assert found["copies_to_move"] == 1
    assert found["leaderships_to_move"] == 2
    assert found["stores"][0]["state"] == "up"
    assert [item["state"] for item in found["partitions"]] == ["+c, -a", "no leader"]


def test_drain_looks_on_until_the_store_is_empty(tally, gateway):
    """What moves, how much remains each time it changes, and the end."""
    gateway.answers = [ClusterChange([(0, "a", "c"), (1, "a", "c")], [(0, "a", "b")])]
    half = info(partition(0, wished="b c", members="b c", leader="b"), partition(1, wished="c b"))
    gateway.statuses = [
        info(partition(0, wished="b c"), partition(1, wished="c b")),
        half,
        half,
        info(partition(0, wished="b c", members="b c", leader="b"), partition(1, "c b", "b c", "c")),
    ]
    result = tally("cluster", "drain", "a")
    assert result.stdout.splitlines() == [
        "2 copies move from a to c; 1 partitions get another preferred leader",
        "a is empty",
    ]
    assert result.stderr.splitlines() == [
        "2 copies and 2 leaderships to move",
        "1 copies and 1 leaderships to move",
        "0 copies and 0 leaderships to move",
    ]
    assert gateway.calls[0] == ClusterDrain("a")


def test_each_change_is_sent_as_it_was_said(tally, gateway):
    """Arguments and options become the call's fields."""
    gateway.answers = [ClusterChange([])]
    assert "nothing needs to move" in tally("cluster", "rebalance").stdout
    tally("cluster", "rebalance", "--copies", 3, "--no-wait")
    tally("cluster", "replace", "a", "--with", "c")
    tally("cluster", "replace", "a")
    assert "may be given copies" in tally("cluster", "undrain", "a").stdout
    assert [call for call in gateway.calls if not isinstance(call, ClusterStatus)] == [
        ClusterRebalance(),
        ClusterRebalance(3),
        ClusterReplace("a", "c"),
        ClusterReplace("a"),
        ClusterDrain("a", undo=True),
    ]


def test_without_waiting_it_only_asks(tally, gateway):
    """--no-wait returns at once and says where to look."""
    gateway.answers = [ClusterChange([(0, "a", "c")])]
    result = tally("cluster", "drain", "a", "--no-wait")
    assert "cluster status" in result.stdout
    assert len(gateway.calls) == 1


def test_json_is_one_document_at_the_end(tally, gateway):
    """A script gets the moves, and the cluster as it is afterwards."""
    gateway.answers = [ClusterChange([(0, "a", "c"), (1, "", "c")], [(0, "a", "b")])]
    gateway.statuses = [info(partition(0, wished="c b")), SETTLED]
    found = json.loads(tally("cluster", "rebalance", "--json").stdout)
    assert found["moves"] == [
        {"partition": 0, "from": "a", "to": "c"},
        {"partition": 1, "from": None, "to": "c"},
    ]
    assert found["preferred_leaders"] == [{"partition": 0, "from": "a", "to": "b"}]
    assert (found["waited"], found["unfinished"], found["is_settled"]) == (True, "", True)


def test_a_time_limit_ends_the_looking_on(tally, gateway):
    """Exit status 1, and the partitions that are not there yet."""
    gateway.answers = [ClusterChange([(0, "a", "c")])]
    gateway.statuses = [info(partition(0, wished="c b"), partition(1))]
    result = tally("cluster", "drain", "a", "--within", "0.05", status=1)
    assert "not finished: partition 0\n" in result.stderr
    assert "empty" not in result.stdout


def test_what_waits_for_a_store_that_is_down_is_not_waited_for(tally, gateway):
    """When nothing but stores that are down is missing, the command says which, and ends."""
    down = (store("a"), store("b"), store("c", is_up=False))
    gateway.answers = [ClusterChange([])]
    gateway.statuses = [info(*(partition(p, wished="a c") for p in range(7)), stores=down)]
    result = tally("cluster", "rebalance", status=1)
    assert "partitions 0, 1, 2, 3, 4 and 2 more: c must be up first" in result.stderr
    gateway.statuses = [info(partition(0, wished="c b", members="b c", leader="b"), stores=down)]
    assert "partition 0: c must be up first" in tally("cluster", "rebalance", status=1).stderr


def test_what_can_go_on_is_waited_for_beside_what_cannot():
    """As long as one partition can get on, the command looks on."""
    down = (store("a"), store("b"), store("c", is_up=False))
    stuck = partition(0, wished="a c")
    assert commands.blockers(info(stuck, stores=down)) == ["c"]
    assert commands.blockers(info(stuck, partition(1, leader="b"), stores=down)) == []
    assert commands.blockers(info(stuck, partition(1, members="a b d"), stores=down)) == []
    assert commands.blockers(SETTLED) == []
    lost = partition(1, wished="b c", members="b c", leader="")
    assert commands.blockers(info(lost, stores=down)) == ["c"]


def test_a_gateway_that_stutters_is_asked_again(tally, gateway):
    """An error that may pass doesn't end the looking on; neither does one at the change itself."""
    gateway.answers = [UnavailableError("etcd is away"), ClusterChange([])]
    gateway.statuses = [UnavailableError("etcd is away"), SETTLED]
    assert "balanced" in tally("cluster", "rebalance").stdout


def test_refusals_are_one_line_and_an_exit_status(tally, gateway):
    """Unknown stores, too few stores, a coordinator that stays away, no gateway."""
    gateway.answers = [NotFoundError("there is no store 'x'; did you mean 'a'?")]
    assert "did you mean 'a'" in tally("cluster", "drain", "x", status=1).stderr
    gateway.answers = [InvalidRequestError("add stores first")]
    assert tally("cluster", "drain", "a", status=1).stderr == "error: add stores first\n"
    gateway.statuses = [UnavailableError("etcd is away")]
    assert "etcd is away" in tally("--timeout", "0.2", "cluster", "status", status=3).stderr
    assert "no Tallymark server" in tally("cluster", "status", status=3, address="127.0.0.1:1").stderr


def test_the_first_gateway_that_answers_is_used(tally, gateway):
    """One of several addresses is dead: the others are asked."""
    gateway.answers = [ClusterChange([])]
    assert "balanced" in tally("cluster", "rebalance", address=f"127.0.0.1:1,{gateway.address}").stdout


def test_recover_says_what_to_do_next(tally, gateway):
    """The new base, for people and for scripts."""
    gateway.answers = [ClusterChange([], epoch_base=1_800_000_000_000_000)]
    assert "1800000000000000" in tally("cluster", "recover").stdout
    assert json.loads(tally("cluster", "recover", "--json", "--yes").stdout) == {
        "epoch_base": 1_800_000_000_000_000
    }
    assert isinstance(gateway.calls[0], ClusterRecover)


def test_status_of_a_peer_of_an_earlier_version_is_read():
    """A shorter answer has the defaults: fields were only added."""
    short = msgspec.msgpack.encode([[], [[0, ["a"], ["a"], "a"]], 1])
    found = msgspec.msgpack.decode(short, type=ClusterInfo)
    assert found.partitions[0].is_settled
    assert found.epoch_base == 0


def test_what_is_down_is_said_at_its_partitions(tally, gateway):
    """Copies that are there, of those that shall be; no leader is said to move to a store that is down."""
    gateway.statuses = [
        info(
            partition(0, wished="d a b", members="d a b", leader="a"),
            partition(1, wished="a b d", members="a b d"),
            partition(
                2, wished="a d e", members="a d e", leader="", error="2 of 3 copies needed; down: d, e"
            ),
            partition(3, wished="a b d", members="a b d", leader=""),
            partition(4, wished="b a", leader="a"),
            stores=(*map(store, "abc"), store("d", is_up=False), store("e", error="no answer")),
        )
    ]
    found = json.loads(tally("cluster", "status", "--json").stdout)
    assert [item["state"] for item in found["partitions"]] == [
        "2 of 3 copies; down: d",
        "2 of 3 copies; down: d",
        "no leader, 2 of 3 copies needed; down: d, e",
        "no leader, 2 of 3 copies; down: d",
        "leader moves to b",
    ]
    assert "2 of 3 copies; down: d" in tally("cluster", "status").stdout


def test_what_a_gateway_said_is_told_rather_than_its_last_silence(tally, gateway, monkeypatch):
    """The time is up in the middle of a further try: what was answered before is the reason."""
    answers = iter([UnavailableError("the coordinator can't be reached")])

    async def on_call(connection, call):
        for error in answers:
            raise error
        await asyncio.Event().wait()

    monkeypatch.setattr(gateway, "on_call", on_call)
    result = tally("--timeout", "0.6", "cluster", "status", status=3)
    assert result.stderr == "error: the coordinator can't be reached\n"

"""Containers of the locally built images: a cluster made one by one, and a compose project.

Everything carries a label, so that what a killed run left behind is found and removed; and ports are published on
127.0.0.1 alone.
"""

import asyncio
import base64
import contextlib
import json
import os
import shutil
import socket
import subprocess
from pathlib import Path

import docker
from msgspec import msgpack
from testcontainers.core.container import DockerContainer
from testcontainers.core.network import Network

from tallymark_runtime.catalog import LEADERS, Leader
from tallymark_runtime.coordinator.etcd import PREFIX

ROOT = Path(__file__).resolve().parents[2]
COMPOSE_FILE = ROOT / "deploy" / "compose" / "compose.yaml"
IMAGE = "tallymark-test:latest"
ETCD_IMAGE = "tallymark-test-etcd:bookworm"
BASE_IMAGE = "tallymark-test-base:bookworm"
PROJECT = "tallymark-test"  # of compose, which labels what it makes
LABEL = "tallymark.test"
LABELS = (f"{LABEL}=1", f"com.docker.compose.project={PROJECT}")

STORE_PORT = 7021
PARTITIONS = 6
HEALTHY_SECONDS_MAX = 120.0
STOP_SECONDS_MAX = 30
POLL_SECONDS = 0.1
LOG_CHARACTERS = 4_000


def free_ports(count: int) -> list[int]:
    """Ports of 127.0.0.1 that are free now; all different."""
    with contextlib.ExitStack() as stack:
        ports = []
        for _ in range(count):
            listener = stack.enter_context(socket.socket())
            listener.bind(("127.0.0.1", 0))
            ports.append(listener.getsockname()[1])
        return ports


@contextlib.contextmanager
def connected():
    """The engine's API."""
    client = docker.from_env()
    try:
        yield client
    finally:
        client.close()


def _all(client):
    """Containers of ours, running or not."""
    for label in LABELS:
        yield from client.containers.list(all=True, filters={"label": label})


def remove_leftovers() -> None:
    """Remove containers, networks and volumes that carry our labels."""
    with connected() as client:
        for container in _all(client):
            container.remove(force=True, v=True)
        for label in LABELS:
            for network in client.networks.list(filters={"label": label}):
                network.remove()
            for volume in client.volumes.list(filters={"label": label}):
                volume.remove(force=True)


def logs_of_all() -> list[tuple[str, str]]:
    """The end of every container's log, with its state."""
    with connected() as client:
        found = []
        for container in _all(client):
            state = container.attrs["State"]
            checks = [check["Output"].strip() for check in state.get("Health", {}).get("Log", [])[-2:]]
            text = container.logs().decode("utf-8", "replace")[-LOG_CHARACTERS:]
            status = state.get("Health", {}).get("Status", state["Status"])
            found.append((f"{container.name} is {status}, checks said {checks}", text))
        return found


async def wait_until(condition, what: str, *, seconds: float = HEALTHY_SECONDS_MAX) -> None:
    """Wait until `condition()` holds; of containers there are no events that tests could wait for."""
    try:
        async with asyncio.timeout(seconds):
            while not condition():  # noqa: ASYNC110
                await asyncio.sleep(POLL_SECONDS)
    except TimeoutError:
        raise AssertionError(f"not within {seconds} s: {what}") from None


class Container(DockerContainer):
    """A container that can be killed and started again."""

    def __init__(self, image: str, name: str, network: Network, *, command=None, environment=None) -> None:
        super().__init__(image, command=command, env=environment, network=network, network_aliases=[name])
        self.alias = name
        self.with_kwargs(labels={LABEL: "1"}, init=True, detach=True)

    def publish(self, port: int) -> None:
        """Publish a port under its own number, on loopback."""
        self.ports[f"{port}/tcp"] = ("127.0.0.1", port)

    @property
    def health(self) -> str:
        """What its health check says: "healthy", "unhealthy", "starting"; "" for a container that isn't running."""
        container = self.get_wrapped_container()
        container.reload()
        state = container.attrs["State"]
        return state["Health"]["Status"] if state["Running"] else ""

    async def wait_healthy(self) -> None:
        """Wait until its health check passes."""
        await wait_until(lambda: self.health == "healthy", f"{self.alias} healthy")

    def kill(self) -> None:
        """End it as a power cut would."""
        self.get_wrapped_container().kill("SIGKILL")

    def restart(self) -> None:
        """Start it again, with the files that it had."""
        self.get_wrapped_container().start()

    def cut_off(self) -> None:
        """Take it off the network: it reaches nobody, and nobody reaches it."""
        self._network._unwrap_network.disconnect(self.get_container_id())

    def connect_again(self) -> None:
        """Put it back, under its name; its address may be another one."""
        self._network.connect(self.get_container_id(), network_aliases=[self.alias])

    def pause(self) -> None:
        """Stop its processes where they are, as an overloaded machine would."""
        self.get_wrapped_container().pause()

    def resume(self) -> None:
        """Let them go on, as if nothing had been."""
        self.get_wrapped_container().unpause()

    def stop_gracefully(self) -> int:
        """Ask it to stop; return its exit status."""
        container = self.get_wrapped_container()
        container.stop(timeout=STOP_SECONDS_MAX)
        return container.wait()["StatusCode"]


class Cluster:
    """etcd, three stores, two gateways, two query nodes and two instances of the alerts role.

    Attributes:
        stores, gateways, queries, alerts: by name.
        addresses: of the gateways, for clients on this machine.
    """

    def __init__(self, network: Network) -> None:
        self.network = network
        self.etcd = Container(
            ETCD_IMAGE,
            "etcd",
            network,
            environment={
                "ETCD_LISTEN_CLIENT_URLS": "http://0.0.0.0:2379",
                "ETCD_ADVERTISE_CLIENT_URLS": "http://etcd:2379",
                "ETCD_DATA_DIR": "/var/lib/etcd",
            },
        )
        stores = [self._role("store", f"store{i}", f"store{i}:{STORE_PORT}", STORE_PORT) for i in (1, 2, 3)]
        ports = free_ports(6)
        gateways = [self._public("ingest", f"gateway{i}", ports.pop()) for i in (1, 2)]
        queries = [self._public("query", f"query{i}", ports.pop()) for i in (1, 2)]
        alerts = [self._public("alerts", f"alerts{i}", ports.pop()) for i in (1, 2)]
        self.stores = {container.alias: container for container in stores}
        self.gateways = {container.alias: container for container in gateways}
        self.queries = {container.alias: container for container in queries}
        self.alerts = {container.alias: container for container in alerts}
        self.addresses = [container.env["TALLYMARK_ADVERTISE"] for container in gateways]

    def _role(self, role: str, name: str, address: str, port: int) -> Container:
        environment = {
            "TALLYMARK_NODE_ID": name,
            "TALLYMARK_PORT": str(port),
            "TALLYMARK_ADVERTISE": address,
            "TALLYMARK_COORDINATOR": "etcd://etcd:2379",
            "TALLYMARK_PARTITION_COUNT": str(PARTITIONS),
            "TALLYMARK_REPLICATION_FACTOR": "3",
        }
        return Container(IMAGE, name, self.network, command=["run", "--role", role], environment=environment)

    def _public(self, role: str, name: str, port: int) -> Container:
        container = self._role(role, name, f"127.0.0.1:{port}", port)
        container.publish(port)
        return container

    @property
    def roles(self) -> list[Container]:
        """All containers but etcd's, in the order in which they are started."""
        return [
            *self.stores.values(),
            *self.gateways.values(),
            *self.queries.values(),
            *self.alerts.values(),
        ]

    def leaders(self) -> dict[int, str]:
        """Which store leads which partition, as etcd has it."""
        prefix = (PREFIX + LEADERS).decode()
        command = ["etcdctl", "get", prefix, "--prefix", "--write-out=json"]
        status, output = self.etcd.get_wrapped_container().exec_run(command)
        assert status == 0, output
        found = {}
        for item in json.loads(output).get("kvs", []):
            key = base64.b64decode(item["key"]).decode()
            leader = msgpack.decode(base64.b64decode(item["value"]), type=Leader)
            found[int(key.removeprefix(prefix))] = leader.node_id
        return found


@contextlib.asynccontextmanager
async def cluster():
    """A cluster that is up and healthy; removed in the end."""
    with contextlib.ExitStack() as stack:
        network = stack.enter_context(Network(docker_network_kw={"labels": {LABEL: "1"}}))
        made = Cluster(network)
        for container in [made.etcd, *made.roles]:
            stack.enter_context(container)
        for container in made.roles:
            await container.wait_healthy()
        yield made


class Compose:
    """The project of deploy/compose, under a name, an image and ports of this test's own.

    Attributes:
        addresses: of the gateways.
        queries: of the query nodes.
    """

    def __init__(self) -> None:
        ports = free_ports(6)
        self.addresses = [f"127.0.0.1:{port}" for port in ports[:2]]
        self.queries = [f"127.0.0.1:{port}" for port in ports[2:4]]
        self._environment = os.environ | {
            "TALLYMARK_IMAGE": IMAGE,
            "ETCD_IMAGE": ETCD_IMAGE,
            "BASE_IMAGE": BASE_IMAGE,
            "GATEWAY1_PORT": str(ports[0]),
            "GATEWAY2_PORT": str(ports[1]),
            "QUERY1_PORT": str(ports[2]),
            "QUERY2_PORT": str(ports[3]),
            "ALERTS1_PORT": str(ports[4]),
            "ALERTS2_PORT": str(ports[5]),
        }

    async def run(self, *arguments: str) -> str:
        """Run a compose command, beside whatever else goes on; return what it printed."""
        return await asyncio.to_thread(self._run, arguments)

    def _run(self, arguments: tuple[str, ...]) -> str:
        plugin = subprocess.run(["docker", "compose", "version"], capture_output=True, check=False)
        program = ["docker", "compose"] if plugin.returncode == 0 else [shutil.which("docker-compose")]
        command = [*program, "-f", str(COMPOSE_FILE), "-p", PROJECT, *arguments]
        done = subprocess.run(command, env=self._environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
        return done.stdout

    def states(self) -> dict[str, str]:
        """The health of every service: as its check says, or the container's state where it isn't running."""
        with connected() as client:
            found = {}
            for container in client.containers.list(all=True, filters={"label": LABELS[1]}):
                state = container.attrs["State"]
                name = container.labels["com.docker.compose.service"]
                found[name] = state["Health"]["Status"] if state["Running"] else state["Status"]
            return found

    async def wait_healthy(self) -> None:
        """Wait until every service's check passes."""
        await wait_until(lambda: set(self.states().values()) == {"healthy"}, "every service healthy")


@contextlib.asynccontextmanager
async def compose():
    """The compose project, up and healthy; removed with its volumes in the end."""
    project = Compose()
    try:
        await project.run("up", "-d")
        await project.wait_healthy()
        yield project
    finally:
        await project.run("down", "-v", "--timeout", str(STOP_SECONDS_MAX))

"""A network of this test's own, in which parts of a cluster can be cut off from one another, also one way only.

Each part lives in a network namespace with one address; a bridge in a further namespace joins them, where no rules
of the machine's own firewall reach. This process takes part through one interface, beside which it keeps all its
own. The addresses are of the range that is set aside for such tests and are routed nowhere.
"""

import os
import subprocess
from collections.abc import Sequence

from cluster import Place

_ME = "me"  # this process's own place


class Network:
    """Namespaces on a bridge; `close` it when the processes in them are dead.

    Needs the rights to make namespaces, and iptables.

    Attributes:
        places: of the parts by name, and of this process under the empty name.
    """

    def __init__(self, names: Sequence[str]) -> None:
        pid = os.getpid()
        self._prefix = f"tallymark-{pid}"
        self._bridge = f"{self._prefix}-bridge"
        self._interface = f"tm{pid}"
        subnet = f"198.{18 + (pid >> 8) % 2}.{pid % 256}"
        self.places = {
            name: Place(f"{subnet}.{10 + n}", f"{self._prefix}-{name}") for n, name in enumerate(names)
        }
        self.places[""] = Place(f"{subnet}.1")
        try:
            self._build()
        except BaseException:
            self.close()
            raise

    def _build(self) -> None:
        _ip("netns", "add", self._bridge)
        _ip("-n", self._bridge, "link", "add", "bridge", "type", "bridge")
        _ip("-n", self._bridge, "link", "set", "bridge", "up")
        for name, place in self.places.items():
            port = f"to-{name or _ME}"
            if place.namespace:
                _ip("netns", "add", place.namespace)
                _ip(
                    "-n",
                    self._bridge,
                    "link",
                    "add",
                    port,
                    "type",
                    "veth",
                    "peer",
                    "eth0",
                    "netns",
                    place.namespace,
                )
                where, interface = ["-n", place.namespace], "eth0"
                _ip(*where, "link", "set", "lo", "up")
            else:
                pid = str(os.getpid())
                _ip(
                    "-n",
                    self._bridge,
                    "link",
                    "add",
                    port,
                    "type",
                    "veth",
                    "peer",
                    self._interface,
                    "netns",
                    pid,
                )
                where, interface = [], self._interface
            _ip("-n", self._bridge, "link", "set", port, "master", "bridge", "up")
            _ip(*where, "address", "add", f"{place.host}/24", "dev", interface)
            _ip(*where, "link", "set", interface, "up")

    def cut(self, source: str, target: str) -> None:
        """Let nothing that `source` sends reach `target`; the other way stays open."""
        rule = ["-A", "INPUT", "-s", self.places[source].host, "-j", "DROP"]
        _run(["ip", "netns", "exec", self.places[target].namespace, "iptables", "-w", *rule])

    def separate(self, one: str, other: str) -> None:
        """Cut both ways."""
        self.cut(one, other)
        self.cut(other, one)

    def heal(self) -> None:
        """Let everything through again."""
        for place in self.places.values():
            if place.namespace:
                _run(["ip", "netns", "exec", place.namespace, "iptables", "-w", "-F", "INPUT"])

    def close(self) -> None:
        """Remove it all."""
        # Namespaces go in their own time; what is in sight is to be gone now.
        subprocess.run(["ip", "link", "delete", self._interface], capture_output=True)
        for namespace in [*(place.namespace for place in self.places.values()), self._bridge]:
            if namespace:
                # With it go its interfaces, and the other ends of these.
                subprocess.run(["ip", "netns", "delete", namespace], capture_output=True)


def _ip(*arguments: str) -> None:
    _run(["ip", *arguments])


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(command)}: {done.stderr}"

"""The performance table: `tallymark bench`.

Every figure is measured through the SDK against a server in a process of its own, started as a user would, with
every write synced to the disk before it is answered; client and server share the machine. Kernels are measured
beside that, alone. What is printed is what was measured: nothing here passes or fails.
"""

from tallymark_node.bench.run import main

__all__ = ["main"]

"""The `tallymark` command: one entry for the server's roles, the demo, and a client for people and scripts.

Puts the command tree together and nothing else; each family of commands is a module of `tallymark_node.cli`.
"""

from __future__ import annotations

import sys

import click

from tallymark_node.cli.alerts import alerts
from tallymark_node.cli.backup import backup, restore
from tallymark_node.cli.cluster import cluster
from tallymark_node.cli.common import DEFAULT_TIMEOUT, Options, global_options
from tallymark_node.cli.events import events
from tallymark_node.cli.ingest import ingest
from tallymark_node.cli.metrics import metrics
from tallymark_node.cli.recount import recount
from tallymark_node.cli.serve import bench, demo, dev, run
from tallymark_node.cli.usage import top, usage
from tallymark_node.cli.verify import verify
from tallymark_node.cli.webhooks import webhooks


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@global_options(at_group=True)
@click.version_option(package_name="tallymark", prog_name="tallymark")
@click.pass_context
def cli(context: click.Context, server: str, as_json: bool, timeout: float | None) -> None:
    """Tallymark counts what customers use, exactly, and says so fast.

    Start a server with `tallymark dev`, or look around with `tallymark demo`. --server, --json and --timeout may
    stand before or after a command's name.

    Exit status: 0 done; 1 done in part, or refused by the server; 2 wrong command line; 3 no server answers.
    """
    context.obj = Options(
        server=server, as_json=as_json, timeout=DEFAULT_TIMEOUT if timeout is None else timeout
    )


for command in (
    dev,
    run,
    demo,
    bench,
    metrics,
    ingest,
    usage,
    top,
    events,
    alerts,
    webhooks,
    cluster,
    verify,
    recount,
    backup,
    restore,
):
    cli.add_command(command)


def main() -> None:
    """Run the command line and exit with its status."""
    # A name or a property of any script must not fail on a terminal of a poorer encoding.
    for stream in (sys.stdout, sys.stderr):
        reconfigure = getattr(stream, "reconfigure", None)
        if reconfigure is not None:
            reconfigure(errors="backslashreplace")
    cli.main(prog_name="tallymark")


if __name__ == "__main__":
    main()

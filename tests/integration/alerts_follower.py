"""Follow all alerts and note them in a file, until killed: `alerts_follower.py ADDRESSES NOTES OFFSETS`.

Each alert is noted before the next one is asked for; the offsets are saved after some of them.
"""

import asyncio
import json
import os
import sys
from pathlib import Path

from tallymark import AsyncClient

SAVE_EVERY = 7


async def main(addresses: list[str], note: int, offsets: Path, since: dict[str, int]) -> None:
    """Go on from the saved offsets."""
    count = 0
    async with AsyncClient(addresses) as client, client.alerts.subscribe(since=since) as sub:
        async for alert in sub:
            if count % SAVE_EVERY == 0:
                save(offsets, sub.offsets())
            # One write: whoever is killed has noted it, or has not.
            os.write(note, json.dumps([alert.partition, alert.position, alert.id]).encode() + b"\n")
            count += 1


def save(path: Path, offsets: dict[str, int]) -> None:
    """Replace the file as a whole."""
    new = path.with_suffix(".new")
    new.write_text(json.dumps(offsets))
    new.replace(path)


saved = Path(sys.argv[3])
begin = json.loads(saved.read_text()) if saved.exists() else {}
notes = os.open(sys.argv[2], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
os.write(notes, json.dumps(begin).encode() + b"\n")
asyncio.run(main(sys.argv[1].split(","), notes, saved, begin))

"""A leader for the gateway's tests: remembers chunks by identity, gives offsets, judges nothing else."""

from __future__ import annotations

import google_crc32c

from tallymark_protocol.codec import decode
from tallymark_protocol.errors import ErrorCode, Reason, WireError
from tallymark_protocol.messages import Appended, AppendHeader, ChunkOutcome

from .ingest_helpers import Decoded, Ev, decode_payload


class Leader:
    """The log of one partition. Account 666 is rejected, account 13's second event on is a duplicate."""

    def __init__(self, partition: int) -> None:
        self.partition = partition
        self.log: list[Ev] = []
        self.chunks: dict[tuple[int, int], tuple[int, ChunkOutcome]] = {}  # identity -> (checksum, outcome)
        self.first_of_13 = -1
        self.appends: list[tuple[AppendHeader, Decoded]] = []

    def append(self, body: bytes) -> Appended:
        """Take the body of an APPEND frame."""
        length = int.from_bytes(body[:2], "little")
        header = decode(AppendHeader, body[2 : 2 + length])
        payload = body[2 + length :]
        assert header.partition == self.partition
        assert google_crc32c.value(payload) == header.checksum
        decoded = decode_payload(payload)
        self.appends.append((header, decoded))
        assert all((entry.flags & 1 == 1) == header.is_async for entry in decoded.entries)
        outcomes = []
        plain = True
        base = len(self.log)
        at = 0
        for entry in decoded.entries:
            events = decoded.events[at : at + entry.count]
            at += entry.count
            known = self.chunks.get((entry.producer, entry.sequence))
            if known is not None:
                plain = False
                if known[0] == entry.checksum:
                    outcomes.append(known[1])
                else:
                    error = WireError(int(ErrorCode.SEQUENCE_REUSED), False, "other content")
                    outcomes.append(ChunkOutcome(-1, [], error))
                continue
            exceptions = []
            first = len(self.log)
            for index, event in enumerate(events):
                if event.account == 666:
                    exceptions.append((index, int(Reason.UNKNOWN_METRIC), -1))
                elif event.account == 13 and self.first_of_13 >= 0:
                    exceptions.append((index, int(Reason.DUPLICATE), self.first_of_13))
                elif event.account == 13:
                    self.first_of_13 = first + index
                self.log.append(event)
            plain = plain and not exceptions
            outcome = ChunkOutcome(first, exceptions)
            self.chunks[entry.producer, entry.sequence] = (entry.checksum, outcome)
            outcomes.append(outcome)
        return Appended(None, base) if plain else Appended(outcomes)

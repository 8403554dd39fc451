"""Plays a transcript: commands to replicas of one partition, and what they do, as readable lines.

A transcript is a text file: commands, `----`, what they print, an empty line, and so on. Lines with `#` are
comments. Commands:

    nodes a b c          replicas of a founded partition; later nodes are spares that are no members
    key a 5              a has created the leader key at revision 5; the others hear of it
    cut-key a b 9        the same for b, but a does not hear of it
    absent 7             everyone hears that the key is absent since revision 7
    append a x y         a's driver appends events with these payloads
    sync a               what a's log holds is on its disk
    deliver [a->b]       deliver what is on its way (on that link), and what follows from it, until nothing is
    drop a->b            lose what is on its way on that link
    tick a 250           let 250 ms pass, and a's timer run
    crash a / start a    lose what isn't synced / recover from the disk
    damage a             a read finds damage in a's log
    wish a b d           the nodes that shall hold the partition
    hand-over a b        a gives the leadership to b
    recycle a            a takes a checkpoint of what is committed, and drops the log below it
    install a            the snapshot that a was told to install is there: it takes the place of log and state
    log [a]              print logs
    why a                print why a is in its role
"""

import re

import msgspec

from tallymark_store.replication import effects as fx
from tallymark_store.replication.core import members_of
from tallymark_store.replication.membership import encode_members
from tallymark_store.replication.memory_log import MemoryLog
from tallymark_store.replication.messages import Offer, Record
from tallymark_store.replication.ports import DurableState, Member, Membership, ReplicaConfig
from tallymark_store.replication.replica import Replica
from tallymark_store.wal import RecordKind, RecordMeta

MS = 1_000_000
NAMES = {
    RecordKind.EVENTS: "",
    RecordKind.EPOCH_START: "start",
    RecordKind.MEMBERSHIP: "members",
}


def show(record):
    """A record in a few characters: epoch:payload."""
    payload = b"".join(record.parts).decode(errors="replace")
    if record.meta.kind == RecordKind.MEMBERSHIP:
        payload = "{" + " ".join(member.copy_id for member in members_of(record)) + "}"
    return f"{record.meta.epoch}:{payload}"


def show_message(message):
    """A message's fields, without those that are always the same."""
    fields = msgspec.structs.asdict(message)
    shown = [
        f"{name}={value}"
        for name, value in fields.items()
        if name not in ("partition", "instance", "record_count", "snapshot", "append_ns", "files")
        and not (name in ("is_damaged", "log_start") and not value)
    ]
    return f"{type(message).__name__} {' '.join(shown)}"


class Player:
    """The replicas of a transcript and the messages between them."""

    def __init__(self):
        self.now = 1_000_000 * MS
        self.lines = []
        self.replicas = {}
        self.logs = {}
        self.disks = {}  # records, and where they begin: (offset, epoch)
        self.offers = {}  # what a node was told to install
        self.states = {}
        self.damaged = set()
        self.lives = {}
        self.wire = []  # (sender, to, message, records), in order
        self.founding = Membership(())
        self.wished = ()
        self.copies = 0

    def play(self, commands):
        """Run some commands; returns what they print."""
        self.lines = []
        for command in commands:
            name, *words = command.split()
            getattr(self, "on_" + name.replace("-", "_"))(*words)
        return self.lines

    def say(self, line):
        self.lines.append(line)

    # ---- commands

    def on_nodes(self, *names):
        self.founding = Membership(tuple(Member(name, f"{name}1") for name in names[:3]))
        self.wished = names[:3]
        for name in names:
            self.states[name] = DurableState(copy_id=f"{name}1")
            self.disks[name] = [], 0, 0
            self.on_start(name)

    def on_start(self, name):
        self.lives[name] = self.lives.get(name, 0) + 1
        records, start, start_epoch = self.disks[name]
        log = self.logs[name] = MemoryLog(records, start=start, start_epoch=start_epoch)
        log.is_damaged = name in self.damaged
        history = [self.founding]
        history += [
            Membership(members_of(record), record.meta.base_offset)
            for record in log.records
            if record.meta.kind == RecordKind.MEMBERSHIP
        ]
        self.replicas[name] = Replica(
            0,
            node_id=name,
            instance=f"{name}-{self.lives[name]}",
            log=log,
            state=self.states[name],
            config=ReplicaConfig(message_bytes=8, window_bytes=32),
            history=history,
            new_copy_id=self.new_copy_id,
            is_damaged=name in self.damaged,
            now_ns=self.now,
        )
        self.do(name, self.replicas[name].set_wish(self.wished, self.now))

    def new_copy_id(self):
        self.copies += 1
        return f"new{self.copies}"

    def on_crash(self, name):
        del self.replicas[name]
        self.wire = [entry for entry in self.wire if entry[0] != name and entry[1] != name]

    def on_damage(self, name):
        self.damaged.add(name)
        self.logs[name].is_damaged = True
        if name in self.replicas:
            self.do(name, self.replicas[name].damaged("a record can't be read", self.now))

    def on_key(self, name, epoch):
        for other, replica in self.replicas.items():
            if other != name:
                self.do(other, replica.key_changed(name, int(epoch), self.now))
        self.do(name, self.replicas[name].key_created(int(epoch), self.now))

    def on_cut_key(self, deaf, name, epoch):
        for other, replica in self.replicas.items():
            if other not in (name, deaf):
                self.do(other, replica.key_changed(name, int(epoch), self.now))
        self.do(name, self.replicas[name].key_created(int(epoch), self.now))

    def on_absent(self, revision):
        for name, replica in self.replicas.items():
            self.do(name, replica.key_changed("", int(revision), self.now))

    def on_append(self, name, *payloads):
        for payload in payloads:
            self.write(name, RecordKind.EVENTS, payload.encode())
        self.do(name, self.replicas[name].appended(self.now))

    def on_sync(self, *names):
        for name in names:
            log = self.logs[name]
            self.disks[name] = list(log.records), log.log_start, log.start_epoch
            self.do(name, self.replicas[name].synced(self.logs[name].log_end, self.now))

    def on_deliver(self, *links):
        for _ in range(1_000):
            index = next(
                (i for i, e in enumerate(self.wire) if not links or f"{e[0]}->{e[1]}" in links), None
            )
            if index is None:
                return
            sender, to, message, records = self.wire.pop(index)
            if to in self.replicas:
                self.do(to, self.replicas[to].step(sender, message, records, self.now))
        raise AssertionError("messages without end")

    def on_drop(self, *links):
        self.wire = [entry for entry in self.wire if f"{entry[0]}->{entry[1]}" not in links]

    def on_tick(self, name, milliseconds):
        self.now += int(milliseconds) * MS
        self.do(name, self.replicas[name].tick(self.now))

    def on_wish(self, *names):
        self.wished = names
        for name, replica in self.replicas.items():
            self.do(name, replica.set_wish(names, self.now))

    def on_hand_over(self, name, target):
        self.do(name, self.replicas[name].hand_over(target, self.now))

    def on_recycle(self, name):
        self.logs[name].trim(self.replicas[name].high_watermark)

    def on_install(self, name):
        offer, replica = self.offers.pop(name), self.replicas[name]
        assert replica.lacks(offer.offset, offer.last_epoch)
        self.logs[name].reset(offer.offset, epoch=offer.last_epoch)
        membership = Membership(tuple(Member(*pair) for pair in offer.members), offer.members_offset)
        self.do(name, replica.installed(offer.offset, membership, self.now))

    def offer(self, name, effect):
        """The newest checkpoint is that of the log's start."""
        log, replica = self.logs[name], self.replicas[name]
        membership = replica.memberships_below(log.log_start)[-1]
        members = [(member.node_id, member.copy_id) for member in membership.members]
        return Offer(
            0,
            effect.epoch,
            replica.instance,
            "",
            log.log_start,
            log.start_epoch,
            0,
            members,
            membership.offset,
            [],
        )

    def on_why(self, name):
        self.say(f"{name}: {self.replicas[name].why}")

    def on_log(self, *names):
        for name in names or sorted(self.logs):
            replica = self.replicas.get(name)
            state = "down" if replica is None else f"{replica.role.value}, committed {replica.high_watermark}"
            log = self.logs[name]
            shown = [f"{log.start_epoch}:..{log.log_start}"] if log.log_start else []
            shown += [show(record) for record in log.records]
            self.say(f"{name} [{' '.join(shown)}] {state}")

    # ---- effects

    def write(self, name, kind, payload):
        log = self.logs[name]
        meta = RecordMeta(0, kind, self.replicas[name].epoch, log.log_end, 1, self.now)
        log.append([Record(meta, (payload,))])

    def do(self, name, effects):
        replica = self.replicas[name]
        for effect in effects:
            match effect:
                case fx.Send():
                    records = " ".join(show(record) for record in effect.records)
                    self.say(
                        f"{name} -> {effect.to}: {show_message(effect.message)}"
                        + (f" [{records}]" if records else "")
                    )
                    self.wire.append((name, effect.to, effect.message, effect.records))
                case fx.Persist():
                    self.states[name] = effect.state
                    self.say(f"{name} persists promise {effect.state.promised}, copy {effect.state.copy_id}")
                case fx.BeginEpoch():
                    self.say(f"{name} begins epoch {effect.epoch}")
                    self.write(name, RecordKind.EPOCH_START, b"start")
                    self.do(name, replica.appended(self.now))
                case fx.AppendMembership():
                    self.say(f"{name} appends members {[m.copy_id for m in effect.membership.members]}")
                    self.write(name, RecordKind.MEMBERSHIP, encode_members(effect.membership.members))
                    self.do(name, replica.appended(self.now))
                case fx.Discarded():
                    self.say(f"{name} discards its copy: now {effect.copy_id}")
                    self.logs[name].reset()
                    self.damaged.discard(name)
                    self.disks[name] = [], 0, 0
                case fx.OfferSnapshot():
                    self.do(name, [fx.Send(effect.to, self.offer(name, effect), [])])
                case fx.Install():
                    self.say(f"{name} is to install what lies below {effect.offer.offset}")
                    self.offers[name] = effect.offer
                case _:
                    words = re.sub(r"(?<!^)([A-Z])", r" \1", type(effect).__name__).lower()
                    values = " ".join(str(value) for value in effect)
                    self.say(f"{name} {words} {values}".rstrip())


def run(text):
    """Play a whole transcript; returns it with what was printed in the place of what is expected."""
    player = Player()
    out = []
    for block in text.strip().split("\n\n"):
        lines = block.split("\n")
        end = lines.index("----") if "----" in lines else len(lines)
        out.extend(lines[:end])
        commands = [line for line in lines[:end] if line and not line.startswith("#")]
        if commands:
            out.append("----")
            out.extend(player.play(commands) or ["ok"])
        out.append("")
    return "\n".join(out)

"""A small world around the pure replicas of one partition: network, disks, coordinator and clients in memory.

Only the replication core is real here; the full simulator has the real log, judge and fold. Everything follows from
the seed. A node's disk holds what its log was when its last sync began; a crash loses what came after.
"""

import heapq
import random

from tallymark_store.replication import effects as fx
from tallymark_store.replication.core import members_of
from tallymark_store.replication.effects import Role
from tallymark_store.replication.membership import encode_members
from tallymark_store.replication.memory_log import MemoryLog
from tallymark_store.replication.messages import Offer, Record
from tallymark_store.replication.ports import DurableState, Member, Membership, ReplicaConfig
from tallymark_store.replication.replica import Replica
from tallymark_store.wal import RecordKind, RecordMeta

MS = 1_000_000
CONFIG = ReplicaConfig(preference_ns=3_000 * MS, message_bytes=64, window_bytes=256)


# A crash right behind one of these is worth more than one at any other moment.
_DELICATE = (fx.Persist, fx.Truncated, fx.BeginEpoch, fx.AppendMembership, fx.Serve, fx.Discarded)


def memberships(records):
    """The memberships that a log holds."""
    return [
        Membership(members_of(record), record.meta.base_offset)
        for record in records
        if record.meta.kind == RecordKind.MEMBERSHIP
    ]


class Node:
    """A process life and the disk that outlives it."""

    def __init__(self, world, name):
        self.world = world
        self.name = name
        self.state = DurableState(copy_id=f"{name}-copy0")
        self.disk = (
            [],
            0,
            0,
        )  # records as of the last sync, where they begin, and the epoch of what ended there
        self.checkpoint = (
            None  # (offset, epoch, membership): durable, and not above what is committed and durable
        )
        self.incoming = None  # an offer whose snapshot will be there in a moment
        self.is_damaged = False
        self.replica = None
        self.log = None
        self.life = 0
        self.paused_until = 0
        self.lease_until = -1
        self.copies = 1

    def start(self):
        """Recover from the disk."""
        self.life += 1
        records, start, start_epoch = self.disk
        self.log = MemoryLog(records, start=start, start_epoch=start_epoch)
        self.incoming = None
        self.generation = 0
        self.syncing = False
        self.acks = []
        history = list(self.world.founding)
        if start:
            assert self.checkpoint[0] >= start, "LOG-6: a log begins nowhere above the checkpoint"
            history += [m for m in [self.checkpoint[2]] if 0 <= m.offset < start]
        history += memberships(self.log.records)
        self.replica = Replica(
            0,
            node_id=self.name,
            instance=f"{self.name}-life{self.life}",
            log=self.log,
            state=self.state,
            config=CONFIG,
            history=history,
            new_copy_id=self.new_copy_id,
            is_damaged=self.is_damaged,
            now_ns=self.world.now,
        )
        self.seen_high_watermark = self.replica.high_watermark
        world, life = self.world, self.life
        self.do(self.replica.set_wish(world.wish, world.now))
        world.after(world.delay(), lambda: self.alive(life) and self.learn_key())
        self.tick()
        if self.alive(life):
            self.renew()

    def new_copy_id(self):
        self.copies += 1
        return f"{self.name}-copy{self.copies}"

    def alive(self, life=None):
        return self.replica is not None and (life is None or life == self.life)

    def learn_key(self):
        holder, revision = self.world.key
        self.do(self.replica.key_changed(holder, revision, self.world.now))

    def tick(self):
        life = self.life
        self.do(self.replica.tick(self.world.now))
        if not self.alive(life):
            return
        wait = max(min(self.replica.next_deadline() - self.world.now, 200 * MS), MS)
        self.world.at_node(self, wait, life, self.tick)

    def renew(self):
        """The node's lease: renewed in time unless it is paused or the coordinator is away."""
        world = self.world
        if not world.coordinator_away:
            if self.lease_until < world.now:
                self.do(self.replica.lease_lost(world.now))
                if not self.alive():
                    return
            self.lease_until = world.now + 2_000 * MS
        world.at_node(self, 600 * MS, self.life, self.renew)

    def crash(self):
        if self.replica is None:
            return
        self.world.trace(
            f"{self.name} crashes at log end {self.log.log_end}, disk {self.disk[0][-1].end if self.disk[0] else self.disk[1]}"
        )
        self.replica = None

    def lose(self, *, wiped):
        """The disk is lost while the node is down, or its log is found damaged at the next start."""
        self.crash()
        self.world.trace(f"{self.name} is {'wiped' if wiped else 'damaged'}")
        if wiped:
            self.state = DurableState(copy_id=self.new_copy_id())
            self.disk = [], 0, 0
            self.checkpoint = None
            self.is_damaged = False
        else:
            self.is_damaged = True

    def receive(self, sender, message, records):
        self.do(self.replica.step(sender, message, records, self.world.now))

    def do(self, effects):
        """Carry effects out, as the driver does."""
        world = self.world
        pending = list(effects)
        while pending:
            effect = pending.pop(0)
            match effect:
                case fx.Send():
                    world.send(self.name, effect.to, effect.message, effect.records)
                case fx.Persist():
                    self.state = effect.state
                case fx.CreateKey():
                    life = self.life
                    world.call_coordinator(self, lambda life=life: world.create_key(self, life))
                case fx.DeleteKey():
                    world.call_coordinator(self, lambda epoch=effect.epoch: world.delete_key(self, epoch))
                case fx.BeginEpoch():
                    world.trace(f"{self.name} begins epoch {effect.epoch} at {self.log.log_end}")
                    pending = self.append(RecordKind.EPOCH_START, b"epoch") + pending
                case fx.AppendMembership():
                    world.trace(f"{self.name} changes members to {effect.membership.members}")
                    pending = (
                        self.append(RecordKind.MEMBERSHIP, encode_members(effect.membership.members))
                        + pending
                    )
                case fx.Serve():
                    world.on_serve(self)
                case fx.StepDown():
                    world.trace(f"{self.name} steps down from {effect.epoch}: {effect.reason}")
                    self.acks.clear()
                case fx.Truncated():
                    self.generation += 1
                case fx.Committed():
                    world.on_committed(self, effect.high_watermark)
                case fx.Discarded():
                    world.trace(f"{self.name} discards its copy, now {effect.copy_id}")
                    self.log.reset()
                    self.is_damaged = False
                    self.disk = [], 0, 0
                    self.checkpoint = self.incoming = None
                    self.generation += 1
                    self.seen_high_watermark = 0
                case fx.OfferSnapshot():
                    world.send(self.name, effect.to, self.offer(effect.epoch), [])
                case fx.Install():
                    if self.incoming is None:
                        self.incoming = effect.offer
                        wait = world.rng.randint(1, 300) * MS
                        world.at_node(self, wait, self.life, lambda: self.install(self.incoming))
                case fx.Fault():
                    world.trace(f"{self.name} is damaged: {effect.reason}")
                    self.is_damaged = True
        if any(isinstance(e, _DELICATE) for e in effects) and world.rng.random() < world.spite:
            self.crash()
            world.after(world.rng.randint(1, 40) * MS, lambda: self.alive() or self.start())
            return
        self.sync()

    def recycle(self):
        """Take a checkpoint of what is committed and durable, and drop the log below it, or below some of it."""
        replica, log = self.replica, self.log
        end = min(replica.high_watermark, replica.durable_end)
        if replica.role is Role.DAMAGED or end <= log.log_start or log.epoch_before(end) < 0:
            return
        self.checkpoint = end, log.epoch_before(end), replica.memberships_below(end)[-1]
        start = self.world.rng.choice([r.end for r in log.records if r.end <= end])
        # What the disk holds of it is dropped at once, as the files go when all that is durable.
        records, disk_start, disk_epoch = self.disk
        held = MemoryLog(records, start=disk_start, start_epoch=disk_epoch)
        if held.epoch_before(start) == log.epoch_before(start):
            held.trim(start)
            log.trim(start)
            self.disk = held.records, held.log_start, held.start_epoch
            self.world.recycled += 1

    def offer(self, epoch):
        offset, last_epoch, membership = self.checkpoint
        members = [(member.node_id, member.copy_id) for member in membership.members]
        return Offer(
            0,
            epoch,
            self.replica.instance,
            "",
            offset,
            last_epoch,
            0,
            members,
            membership.offset,
            [("", 1, 0)],
        )

    def install(self, offer):
        """The snapshot is here: durable, beside what is in force."""
        self.incoming = None
        if offer is None or not self.replica.lacks(offer.offset, offer.last_epoch):
            return
        membership = Membership(tuple(Member(*pair) for pair in offer.members), offer.members_offset)
        self.world.trace(f"{self.name} begins with a snapshot of {offer.offset}")
        self.world.installed += 1
        self.log.reset(offer.offset, epoch=offer.last_epoch)
        self.generation += 1
        # In force when the emptied log is on disk: see `synced`. Before, the one before is.
        self.snapshot = offer.offset, offer.last_epoch, membership
        self.do(self.replica.installed(offer.offset, membership, self.world.now))

    snapshot = None

    def append(self, kind, payload):
        world = self.world
        meta = RecordMeta(0, kind, self.replica.epoch, self.log.log_end, 1, world.now)
        self.log.append([Record(meta, (payload,))])
        return self.replica.appended(world.now)

    def sync(self):
        """Begin a sync of what is there, if none is under way and there is something new."""
        records = list(self.log.records), self.log.log_start, self.log.start_epoch
        if self.syncing or records == self.disk:
            return
        self.syncing = True
        generation, life = self.generation, self.life
        self.world.at_node(
            self,
            self.world.rng.randint(1, 10 * self.world.sync_ms) * MS // 10,
            life,
            lambda: self.synced(records, generation),
        )

    def synced(self, records, generation):
        self.syncing = False
        found, start, epoch = records
        held = MemoryLog(found, start=start, start_epoch=epoch)
        if self.disk[1] > start and held.epoch_before(self.disk[1]) == self.disk[2]:
            held.trim(self.disk[1])  # dropped while this was on its way
        self.disk = held.records, held.log_start, held.start_epoch
        if self.snapshot is not None and held.log_start == self.snapshot[0]:
            self.checkpoint, self.snapshot = self.snapshot, None
        if generation == self.generation:  # else it says nothing about what was written since the truncation
            end = held.log_end
            self.do(self.replica.synced(min(end, self.log.log_end), self.world.now))
        else:
            self.sync()


class World:
    """Everything around the nodes, and the checks."""

    def __init__(self, seed, names=("a", "b", "c"), spare=()):
        self.rng = random.Random(seed)
        self.now = 1_000_000 * MS
        self.queue = []
        self.sequence = 0
        self.lines = []
        self.revision = 10
        self.key = ("", 1)
        self.coordinator_away = False
        self.loss = self.duplication = self.lateness = 0.0
        self.sync_ms = 1  # how long a sync takes at most
        self.spite = 0.0  # how often a node crashes at a delicate moment
        self.lost_copy = False
        self.recycled = self.installed = 0  # how often
        self.cut = set()  # (from, to)
        self.founding = [Membership(tuple(Member(name, f"{name}-copy0") for name in names))]
        self.wish = tuple(names)
        self.nodes = {name: Node(self, name) for name in (*names, *spare)}
        self.committed = {}  # offset -> (epoch, payload): what was ever committed
        self.committers = {}  # epoch -> node life that committed in it
        self.acknowledged = {}  # offset -> payload
        self.written = 0
        self.served = 0
        for node in self.nodes.values():
            node.start()
        self.after(0, self.expire_key)

    def trace(self, line):
        self.lines.append(f"{self.now // MS - 1_000_000:7d} ms  {line}")

    # ---- time

    def after(self, delay, call):
        self.sequence += 1
        heapq.heappush(self.queue, (self.now + delay, self.sequence, call))

    def at_node(self, node, delay, life, call):
        """Call later, in that life of the node; once it runs again if it is paused."""

        def run():
            if not node.alive(life):
                return
            if node.paused_until > self.now:
                self.after(node.paused_until - self.now, run)
            else:
                call()

        self.after(delay, run)

    def delay(self):
        if self.rng.random() < self.lateness:
            return self.rng.randint(1, 3_000) * MS
        return self.rng.randint(1, 30) * MS // 10

    def run_for(self, duration, step=None):
        end = self.now + duration
        while self.queue and self.queue[0][0] <= end:
            self.now, _, call = heapq.heappop(self.queue)
            call()
            if step is not None:
                step()
        self.now = end

    # ---- network

    def send(self, sender, to, message, records):
        if to not in self.nodes or (sender, to) in self.cut or self.rng.random() < self.loss:
            return
        node = self.nodes[to]

        def arrive():
            if node.alive():
                self.at_node(node, 0, node.life, lambda: node.receive(sender, message, records))

        for _ in range(2 if self.rng.random() < self.duplication else 1):
            self.after(self.delay(), arrive)

    # ---- coordinator

    def call_coordinator(self, node, call):
        self.after(self.delay(), lambda: self.answer(call))

    def answer(self, call):
        if self.coordinator_away:
            self.after(100 * MS, lambda: self.answer(call))
        else:
            call()

    def create_key(self, node, life):
        if not node.alive(life):
            return
        created = self.key[0] == "" and node.lease_until >= self.now
        if created:
            self.revision += 1
            self.set_key(node.name, self.revision)
        revision = self.revision
        self.after(
            self.delay(),
            lambda: self.at_node(
                node,
                0,
                life,
                lambda: node.do(
                    node.replica.key_created(revision, self.now)
                    if created
                    else node.replica.key_refused(self.now)
                ),
            ),
        )

    def delete_key(self, node, epoch):
        if self.key == (node.name, epoch):
            self.revision += 1
            self.set_key("", self.revision)

    def set_key(self, holder, revision):
        self.key = (holder, revision)
        for node in self.nodes.values():
            if node.alive():
                life = node.life
                self.after(
                    self.delay(),
                    lambda node=node, life=life: self.at_node(
                        node, 0, life, lambda: node.do(node.replica.key_changed(holder, revision, self.now))
                    ),
                )

    def expire_key(self):
        holder, _ = self.key
        if holder and self.nodes[holder].lease_until < self.now and not self.coordinator_away:
            self.revision += 1
            self.set_key("", self.revision)
        self.after(50 * MS, self.expire_key)

    # ---- checks

    def on_committed(self, node, end):
        replica = node.replica
        assert end <= node.log.log_end, "LOG-4: the high watermark is within the log"
        assert end >= node.seen_high_watermark, "LOG-4: the high watermark never falls"
        node.seen_high_watermark = end
        if replica.epoch:
            life = (node.name, node.life)
            assert self.committers.setdefault(replica.epoch, life) == life, (
                "LOG-3: one leader commits in an epoch"
            )
        start = node.log.log_start
        if start:
            assert start - 1 in self.committed, "LOG-6: what was dropped was committed"
            assert self.committed[start - 1][0] == node.log.start_epoch, "LOG-6: of this epoch"
        for record in node.log.records:
            if record.end <= end:
                entry = (record.meta.epoch, record.parts)
                known = self.committed.setdefault(record.meta.base_offset, entry)
                assert known == entry, f"LOG-2: two records committed at {record.meta.base_offset}"
        if replica.role is Role.LEADER:
            kept = []
            for offset, payload in node.acks:
                if offset < end:
                    self.acknowledged[offset] = payload
                else:
                    kept.append((offset, payload))
            node.acks = kept

    def on_serve(self, node):
        self.trace(f"{node.name} serves epoch {node.replica.epoch}")
        self.served += 1
        found = {record.meta.base_offset: record.parts for record in node.log.records}
        for offset, payload in self.acknowledged.items():
            if offset < node.log.log_start:
                assert self.committed[offset][1] == payload, (
                    "LOG-1: what was acknowledged is not what was committed"
                )
                continue
            assert found.get(offset) == payload, f"LOG-1: the leader lacks what was acknowledged at {offset}"

    def write(self):
        """A client writes through every node that takes it for leader (there may be a deposed one)."""
        for node in self.nodes.values():
            if node.alive() and node.paused_until <= self.now and node.replica.accepts_appends:
                self.written += 1
                payload = (f"event {self.written}".encode(),)
                offset = node.log.log_end
                meta = RecordMeta(0, RecordKind.EVENTS, node.replica.epoch, offset, 1, self.now)
                node.log.append([Record(meta, payload)])
                node.acks.append((offset, payload))
                node.do(node.replica.appended(self.now))

    def heal(self):
        """No faults any more; every node runs."""
        self.cut.clear()
        self.loss = self.duplication = self.lateness = 0.0
        self.sync_ms = 1
        self.spite = 0.0
        self.coordinator_away = False
        for node in self.nodes.values():
            node.paused_until = 0
            if not node.alive():
                node.start()

    def leader(self):
        leaders = [n for n in self.nodes.values() if n.alive() and n.replica.role is Role.LEADER]
        return max(leaders, key=lambda n: n.replica.epoch) if leaders else None

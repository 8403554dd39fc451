"""The pure parts: schedule, outbox, records, message, addresses."""

from __future__ import annotations

import base64
import datetime as dt
import hashlib
import hmac
import ipaddress
import itertools
import json
import random

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from tallymark_alerts.webhooks import records
from tallymark_alerts.webhooks.addresses import check_url, is_public
from tallymark_alerts.webhooks.message import Signer, body_of, utc_text
from tallymark_alerts.webhooks.outbox import SAVE_LETTERS_MAX, Delivery, Outbox
from tallymark_alerts.webhooks.records import Letter, Pending, Place, Progress
from tallymark_alerts.webhooks.schedule import (
    ERROR_CHARACTERS_MAX,
    Outcome,
    OutcomeKind,
    Schedule,
    failure,
    outcome_of_status,
)
from tallymark_protocol import int128, limits
from tallymark_protocol.errors import InvalidRequestError
from tallymark_protocol.messages import AlertsBatch

from .alerts_webhook_fakes import DELIVERED, SECOND, SECRET, alert_at

HOUR = 3_600 * SECOND
FAILED = outcome_of_status(500)
NOW = 1_700_000_000 * SECOND

# ------------------------------------------------------------ schedule


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (200, OutcomeKind.DELIVERED),
        (299, OutcomeKind.DELIVERED),
        (199, OutcomeKind.STATUS),
        (300, OutcomeKind.STATUS),
        (304, OutcomeKind.STATUS),
        (404, OutcomeKind.STATUS),
        (409, OutcomeKind.STATUS),
        (410, OutcomeKind.GONE),
        (500, OutcomeKind.STATUS),
    ],
)
def test_what_a_status_means(status: int, kind: OutcomeKind) -> None:
    """2xx is delivered, 410 is gone, everything else is tried again."""
    outcome = outcome_of_status(status)
    assert outcome.kind is kind
    assert outcome.is_delivered == (outcome.error == "")


def test_what_is_kept_of_an_error_is_bounded() -> None:
    """An endpoint can't fill the coordinator with what it says."""
    assert len(failure(OutcomeKind.CONNECTION, "x" * 10_000).error) == ERROR_CHARACTERS_MAX


@given(st.integers(0, 2**32), st.integers(0, 20 * SECOND))
def test_attempts_get_rarer_and_end_after_72_hours(seed: int, takes_ns: int) -> None:
    """Doubling up to 4 hours, a fifth more at most; the last attempt is exactly at the end of the time."""
    schedule, rng = Schedule(), random.Random(seed)
    now = NOW
    for attempts in itertools.count(1):
        failed = now + takes_ns
        later = schedule.next_attempt_ns(attempts=attempts, first_ns=NOW, now_ns=failed, rng=rng)
        if later is None:
            assert failed >= NOW + limits.WEBHOOK_RETRY_NS_MAX
            assert now <= NOW + limits.WEBHOOK_RETRY_NS_MAX
            assert 20 <= attempts <= 40
            break
        wanted = min(5 * SECOND * 2 ** (attempts - 1), 4 * HOUR)
        assert later <= NOW + limits.WEBHOOK_RETRY_NS_MAX
        assert later - failed <= wanted * 1.2
        assert later - failed >= wanted or later == NOW + limits.WEBHOOK_RETRY_NS_MAX
        assert later <= schedule.latest_ns(failed)
        now = later


# ------------------------------------------------------------ outbox


class OutboxMachine(RuleBasedStateMachine):
    """An outbox, what is written of it, and an endpoint; crashes at any moment lose what isn't written."""

    def __init__(self) -> None:
        super().__init__()
        self.rng = random.Random(7)
        self.now = NOW
        self.schedule = Schedule(first_ns=5 * SECOND, most_ns=40 * SECOND, total_ns=100 * SECOND)
        self.logs: list[int] = [0, 0]  # alerts raised, by partition
        self.delivered: set[Place] = set()
        self.written = Progress({})
        self.letters: dict[Place, Letter] = {}
        self.requests: set[Place] = set()
        self.under_way: list[tuple[Delivery, int]] = []

    @initialize()
    def begin(self) -> None:
        """The first owner."""
        self.outbox = Outbox(self.written, self.schedule, self.now)

    @rule(partition=st.integers(0, 1), count=st.integers(1, 40))
    def raise_alerts(self, partition: int, count: int) -> None:
        """Alerts come into the store."""
        self.logs[partition] += count

    @rule(limit=st.integers(1, 64))
    def read(self, limit: int) -> None:
        """The owner reads on."""
        alerts, positions = [], {}
        for partition, end in enumerate(self.logs):
            position = self.outbox.positions.get(partition, 0)
            while position < end and len(alerts) < limit:
                alerts.append(alert_at(partition, position))
                position += 1
            positions[partition] = position
        self.outbox.take(AlertsBatch(alerts, positions), self.now)

    @rule(most=st.integers(1, 60))
    def attempt(self, most: int) -> None:
        """What is due is sent."""
        for delivery in self.outbox.due(self.now, most):
            assert delivery.next_ns <= self.now
            self.under_way.append((delivery, self.now))

    @precondition(lambda self: self.under_way)
    @rule(answers=st.lists(st.sampled_from(["ok", "ok", "fail", "gone", "back"]), min_size=1, max_size=60))
    def answer(self, answers: list[str]) -> None:
        """The endpoint answers, to some in any order."""
        for what in answers:
            if not self.under_way:
                return
            delivery, began = self.under_way.pop(self.rng.randrange(len(self.under_way)))
            if what == "back":
                self.outbox.put_back(delivery, self.now + SECOND)
                continue
            outcome = {"ok": DELIVERED, "fail": FAILED, "gone": outcome_of_status(410)}[what]
            if outcome.is_delivered:
                self.delivered.add(delivery.place)
            self.outbox.finish(delivery, outcome, began_ns=began, now_ns=self.now, rng=self.rng)
        assert bool(self.outbox.last_error) or what in ("ok", "back")

    @rule(seconds=st.integers(1, 60))
    def wait(self, seconds: int) -> None:
        """Time goes by."""
        self.now += seconds * SECOND

    @rule(crash=st.sampled_from(["no", "before", "after"]))
    def save(self, crash: str) -> None:
        """The owner writes: in one transaction the progress, letters, and the requests that it grants."""
        self.outbox.redeliver(sorted(self.requests), len(self.letters), self.now)
        if self.requests:
            self.outbox.resume(self.now)
        unsaved = self.outbox.unsaved()
        assert len(unsaved.letters) <= SAVE_LETTERS_MAX
        if crash != "before":
            self.written = msgspec.msgpack.decode(msgspec.msgpack.encode(unsaved.progress), type=Progress)
            self.letters |= unsaved.letters
            self.requests.clear()
            assert self.written.dead == len(self.letters)
            assert self.outbox.is_unsaved or crash == "after" or not unsaved.letters
        if crash == "no":
            self.outbox.saved(unsaved)
        else:
            self.take_over()

    @rule()
    def take_over(self) -> None:
        """The owner dies; another one goes on from what is written."""
        self.under_way = []
        self.outbox = Outbox(self.written, self.schedule, self.now)

    @precondition(lambda self: self.letters)
    @rule(data=st.data())
    def ask(self, data: st.DataObject) -> None:
        """Somebody asks for letters to be redelivered."""
        for place in data.draw(st.sets(st.sampled_from(sorted(self.letters)))):
            del self.letters[place]
            self.requests.add(place)

    @invariant()
    def nothing_is_missing(self) -> None:
        """Whoever takes over now still knows of every alert below its positions that the endpoint hasn't got."""
        known = {(entry.partition, entry.position) for entry in self.written.pending}
        known |= set(self.letters) | self.requests | self.delivered
        for partition, position in self.written.positions.items():
            missing = {(partition, i) for i in range(position)} - known
            assert missing == set()

    def teardown(self) -> None:
        """At the end the endpoint takes everything: each alert is delivered."""
        for _ in range(200):
            self.requests |= set(self.letters)
            self.letters.clear()
            self.save("no")
            self.read(64)
            for delivery, began in self.under_way:
                self.outbox.finish(delivery, DELIVERED, began_ns=began, now_ns=self.now, rng=self.rng)
                self.delivered.add(delivery.place)
            self.under_way = []
            self.attempt(64)
            self.now += 50 * SECOND
            is_all_read = all(self.outbox.positions.get(p, 0) == end for p, end in enumerate(self.logs))
            if is_all_read and not self.outbox.outstanding and not self.letters and not self.requests:
                break
        assert self.delivered == {(p, i) for p, end in enumerate(self.logs) for i in range(end)}
        assert self.outbox.next_ns() is None
        self.save("no")
        assert self.outbox.letters == 0
        assert not self.outbox.is_unsaved


OutboxMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestOutbox = OutboxMachine.TestCase


def test_times_of_a_clock_that_was_wrong_are_not_waited_for() -> None:
    """What a former owner wrote an age ahead is due within the longest delay, and ends within the usual time."""
    far = NOW + 1_000 * HOUR
    outbox = Outbox(Progress({0: 1}, [Pending(0, 0, 3, far, far)]), Schedule(), NOW)
    due = outbox.next_ns()
    assert due is not None
    assert due <= NOW + 5 * HOUR
    (delivery,) = outbox.due(due, 1)
    assert delivery.first_ns == NOW


def test_what_is_read_twice_is_delivered_once() -> None:
    """A batch from before the position, or again: nothing new."""
    outbox = Outbox(Progress({0: 0}), Schedule(), NOW)
    batch = AlertsBatch([alert_at(0, 0), alert_at(0, 1)], {0: 2})
    outbox.take(batch, NOW)
    outbox.take(batch, NOW)
    assert outbox.outstanding == 2
    for delivery in outbox.due(NOW, 10):
        outbox.finish(delivery, DELIVERED, began_ns=NOW, now_ns=NOW, rng=random.Random(1))
    outbox.take(batch, NOW)
    assert outbox.outstanding == 0


def test_redelivery_of_what_is_under_way_counts_its_attempts_anew() -> None:
    """It isn't sent a second time meanwhile."""
    outbox = Outbox(Progress({}, [Pending(0, 5, 9, NOW - HOUR, NOW)]), Schedule(), NOW)
    (delivery,) = outbox.due(NOW, 5)
    outbox.redeliver([(0, 5)], 0, NOW)
    assert outbox.due(NOW, 5) == []
    outbox.finish(delivery, FAILED, began_ns=NOW, now_ns=NOW, rng=random.Random(1))
    assert (delivery.attempts, delivery.first_ns) == (1, NOW)


# ------------------------------------------------------------ records


@given(st.integers(0, 255), st.integers(0, 2**63))
def test_places_in_keys(partition: int, position: int) -> None:
    """A letter's key tells its place again; other keys tell none."""
    place = partition, position
    assert records.place_of(records.letter_key("wh_x", place)) == place
    assert records.place_of(records.request_key("wh_x", place)) == place
    assert records.place_of(records.request_key("wh_x", None)) is None
    assert records.place_of(records.progress_key("wh_x")) is None


@pytest.mark.parametrize("webhooks", [0, 1, 20, 50, 51, 400, limits.WEBHOOKS_MAX])
def test_shares_keep_the_coordinator_small(webhooks: int) -> None:
    """All webhooks' pending deliveries and letters at their bounds fit into half of an embedded coordinator."""
    pending, letters = records.pending_max(webhooks), records.letters_max(webhooks)
    assert 1 <= pending <= limits.WEBHOOK_PENDING_MAX
    assert 1 <= letters <= limits.WEBHOOK_DEAD_LETTERS_MAX
    entry = Pending(255, 2**40, 40, 2**62, 2**62)
    progress = Progress(dict.fromkeys(range(12), 2**40), [entry] * pending, letters, "x" * 200, "x" * 200)
    letter = Letter("255-1099511627776-7-1099511627776", 40, 2**62, 2**62, "the endpoint answered 500")
    overhead = 64 + 60
    size = len(msgspec.msgpack.encode(progress)) + overhead
    size += letters * (len(msgspec.msgpack.encode(letter)) + overhead)
    total = max(webhooks, 1) * size + records.WEBHOOKS_BYTES_MAX
    assert total <= limits.COORDINATOR_STATE_BYTES_MAX * 3 // 4
    assert len(msgspec.msgpack.encode(progress)) <= limits.COORDINATOR_VALUE_BYTES_MAX // 4
    assert webhooks > 20 or letters == limits.WEBHOOK_DEAD_LETTERS_MAX
    assert webhooks > 50 or pending == limits.WEBHOOK_PENDING_MAX


# ------------------------------------------------------------ message


def test_the_body_of_an_alert() -> None:
    """Exactly this; what can be beyond 2^53 is text."""
    alert = msgspec.structs.replace(
        alert_at(3, 12, account=2**64 - 1),
        threshold_value=2**63 - 1,
        value_at_cross=int128.to_bytes(2**127 - 1),
        last_multiple=int128.to_bytes(2**100),
        period_start_ns=1_761_955_200 * SECOND,
        period_end_ns=1_764_547_200 * SECOND,
        triggered_at_ns=1_763_718_123 * SECOND + 45_600_000,
    )
    assert json.loads(body_of(alert)) == {
        "type": "alert.raised",
        "timestamp": "2025-11-21T09:42:03.0456Z",
        "data": {
            "id": "3-120-0-7",
            "account_id": "18446744073709551615",
            "metric_code": "calls",
            "threshold_code": "cap",
            "threshold_value": "9223372036854775807",
            "value_at_cross": "170141183460469231731687303715884105727",
            "first_multiple": "1",
            "last_multiple": "1267650600228229401496703205376",
            "period_start": "2025-11-01T00:00:00Z",
            "period_end": "2025-12-01T00:00:00Z",
            "triggered_at": "2025-11-21T09:42:03.0456Z",
            "event_offset": 120,
            "partition": 3,
            "position": 12,
        },
    }
    assert body_of(alert) == body_of(alert)


@given(st.integers(-(2**63), 2**63 - 1))
def test_times_are_exact(ns: int) -> None:
    """To the nanosecond, for every time that a record can have; a lifetime's bounds, too."""
    text = utc_text(ns)
    moment, _, decimals = text.removesuffix("Z").partition(".")
    parsed = dt.datetime.strptime(moment + "+0000", "%Y-%m-%dT%H:%M:%S%z")
    seconds = (parsed - dt.datetime(1970, 1, 1, tzinfo=dt.UTC)) // dt.timedelta(seconds=1)
    assert seconds * SECOND + int(decimals.ljust(9, "0") or 0) == ns


@given(st.binary(min_size=24, max_size=64), st.integers(0, 4_000_000_000), st.integers(0, 999_999_999))
def test_signatures_are_those_of_the_specification(key: bytes, seconds: int, rest: int) -> None:
    """HMAC-SHA256 over id, timestamp and body, in base64, whatever the secret."""
    body = body_of(alert_at(1, 2))
    signer = Signer("whsec_" + base64.b64encode(key).decode(), "tallymark/1")
    headers = signer.headers("1-20-0-7", seconds * SECOND + rest, body)
    signed = b"1-20-0-7." + str(seconds).encode() + b"." + body
    wanted = base64.b64encode(hmac.new(key, signed, hashlib.sha256).digest()).decode()
    assert headers == {
        "content-type": "application/json",
        "user-agent": "tallymark/1",
        "webhook-id": "1-20-0-7",
        "webhook-timestamp": str(seconds),
        "webhook-signature": f"v1,{wanted}",
    }


def test_the_example_of_the_specification() -> None:
    """Secret, id, time, body and signature as its reference implementations have them."""
    headers = Signer(SECRET, "x").headers(
        "msg_p5jXN8AQM9LWM0D4loKWxJek", 1_614_265_330 * SECOND, b'{"test": 2432232314}'
    )
    assert headers["webhook-signature"] == "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE="


# ------------------------------------------------------------ addresses


@pytest.mark.parametrize(
    "address",
    ["8.8.8.8", "1.1.1.1", "2606:4700:4700::1111", "::ffff:8.8.8.8", "64:ff9b::808:808", "2002:808:808::1"],
)
def test_public_addresses(address: str) -> None:
    """Global ones, and those that stand for one."""
    assert is_public(address)


@pytest.mark.parametrize(
    "address",
    [
        "0.0.0.0",
        "10.1.2.3",
        "100.64.0.1",
        "127.0.0.1",
        "127.8.8.8",
        "169.254.169.254",
        "172.16.0.1",
        "192.0.0.8",
        "192.0.2.1",
        "192.88.99.1",
        "192.168.1.1",
        "198.18.0.1",
        "198.51.100.1",
        "203.0.113.1",
        "224.0.0.1",
        "239.255.255.250",
        "240.0.0.1",
        "255.255.255.255",
        "::",
        "::1",
        "::7f00:1",
        "::ffff:10.0.0.1",
        "::ffff:127.0.0.1",
        "64:ff9b::7f00:1",
        "64:ff9b:1::1",
        "100::1",
        "2001::1",
        "2001:db8::1",
        "2002:7f00:1::1",
        "2002:a00:1::1",
        "3fff::1",
        "5f00::1",
        "fc00::1",
        "fd12:3456::1",
        "fe80::1",
        "fe80::1%eth0",
        "2606:4700::1%eth0",
        "fec0::1",
        "ff02::1",
        "ff0e::1",
        "localhost",
        "",
        "127.1",
        "8.8.8.8.",
        "٨.٨.٨.٨",
    ],
)
def test_addresses_that_are_not_public(address: str) -> None:
    """Private, loopback, link-local, multicast, reserved, for documentation, disguised; and what is no address."""
    assert not is_public(address)


@given(st.integers(0, 2**32 - 1))
def test_an_ipv4_address_is_judged_the_same_inside_ipv6(number: int) -> None:
    """Mapped and behind NAT64, it reaches the same machine."""
    address = ipaddress.IPv4Address(number)
    plain = is_public(str(address))
    assert is_public(f"::ffff:{address}") == plain
    assert is_public(str(ipaddress.IPv6Address(int(ipaddress.IPv6Address("64:ff9b::")) + number))) == plain


@pytest.mark.parametrize(
    "url",
    [
        "https://example.org",
        "https://example.org/hook?token=1&x=%20",
        "http://example.org:8080/hook",
        "https://xn--bcher-kva.example/",
        "https://8.8.8.8/",
        "https://[2606:4700:4700::1111]:8443/x",
        "HTTPS://Example.ORG/",
    ],
)
def test_urls_that_webhooks_may_have(url: str) -> None:
    """Of the web, with a host."""
    check_url(url, allow_private=False)


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("", "needs a URL"),
        ("https://example.org/" + "x" * limits.WEBHOOK_URL_BYTES_MAX, "at most 2048 bytes"),
        ("example.org/hook", "begins with https"),
        ("/hook", "begins with https"),
        ("ftp://example.org/", "begins with https"),
        ("file:///etc/passwd", "begins with https"),
        ("unix:///run/docker.sock", "begins with https"),
        ("https:///hook", "URL"),
        ("https://:8080/", "URL"),
        ("https://user@example.org/", "user or password"),
        ("https://user:secret@example.org/", "user or password"),
        ("https://@example.org/", "user or password"),
        ("https://example.org/#part", "fragment"),
        ("https://example.org/#", "fragment"),
        ("https://example.org:0/", "port 0"),
        ("https://example.org:99999/", "must be one"),
        ("https://example.org:x/", "must be one"),
        ("https://exa mple.org/", "printable ASCII"),
        ("https://example.org/\r\nx: y", "printable ASCII"),
        ("https://example.org\\@127.0.0.1/", "printable ASCII"),
        ("https://bücher.example/", "printable ASCII"),
        ("https://[::1", "must be one"),
        ("http://127.0.0.1/", "not public.*TALLYMARK_WEBHOOK_ALLOW_PRIVATE=true tallymark dev"),
        ("http://localhost:8000/", "not public"),
        ("http://LOCALHOST./", "not public"),
        ("http://a.localhost/", "not public"),
        ("http://[::1]/", "not public"),
        ("http://[::ffff:10.0.0.1]/", "not public"),
        ("http://169.254.169.254/latest/meta-data", "not public"),
        ("http://127.1/", "not public"),
        ("http://2130706433/", "not public"),
        ("http://0x7f000001/", "not public"),
        ("http://0177.0.0.1/", "not public"),
    ],
)
def test_urls_that_webhooks_may_not_have(url: str, reason: str) -> None:
    """Each with a sentence that says what is wrong."""
    with pytest.raises(InvalidRequestError, match=reason):
        check_url(url, allow_private=False)


def test_private_urls_where_they_are_allowed() -> None:
    """By the setting; everything else stays refused."""
    for url in ("http://127.0.0.1:8000/", "http://localhost/", "http://[::1]/", "http://10.0.0.1/"):
        check_url(url, allow_private=True)
    with pytest.raises(InvalidRequestError):
        check_url("http://user@127.0.0.1/", allow_private=True)


def test_outcomes_say_what_they_are() -> None:
    """What is gone is not delivered, and the other way round."""
    assert Outcome(OutcomeKind.GONE).is_gone
    assert not Outcome(OutcomeKind.GONE).is_delivered
    assert DELIVERED.is_delivered
    assert not DELIVERED.is_gone

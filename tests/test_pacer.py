"""The real Door against stand-in gateways in virtual time: a minute of waiting takes no time at all.

`python -m tests.test_pacer [--tickets N] [--seeds N] [GROUP...]` prints the whole table of worlds. Its figures are
flattered in one way: the first free allowance of a window counts, so that a share can be above 1.
"""

import argparse
import asyncio
import heapq
import math
import random
import selectors
from bisect import bisect
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from statistics import mean

import pytest

from classify import MIN_USUAL_SHARE, Door, Signal
from tests.gateway import Bucket, FixedWindow, SlidingWindow

LIMITERS = {  # the last argument: refused requests count against the limit
    "bucket of 5": lambda per_s, counted: Bucket(per_s, 5, counted),
    "bucket of 50": lambda per_s, counted: Bucket(per_s, 50, counted),
    "sliding 10 s": lambda per_s, counted: SlidingWindow(round(per_s * 10), 10, counted),
    "sliding 60 s": lambda per_s, counted: SlidingWindow(round(per_s * 60), 60, counted),
    "fixed 10 s": lambda per_s, counted: FixedWindow(round(per_s * 10), 10, counted),
    "fixed 60 s": lambda per_s, counted: FixedWindow(round(per_s * 60), 60, counted),
}
KINDS = [name for name in LIMITERS if name != "bucket of 50"]
ADMITTED, REFUSED, FAILED, TIMED_OUT, NOT_SENT = Signal
WORKERS = 40


class VirtualTime(selectors.SelectSelector):
    """Moves the clock to the next timer instead of waiting for it."""

    now = 0.0

    def select(self, timeout: float | None = None) -> list:
        assert timeout is not None, "everybody waits for ever"
        assert timeout < 86_400, "everybody waits for ever"
        self.now += max(timeout, 0)
        return []


class VirtualLoop(asyncio.SelectorEventLoop):
    def __init__(self) -> None:
        self.virtual = VirtualTime()
        super().__init__(self.virtual)

    def time(self) -> float:
        return self.virtual.now


def in_virtual_time(coroutine):
    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        return runner.run(coroutine)


@dataclass
class World:
    """A gateway, and what its clients were told about it."""

    possible: float  # answers a second at best
    told: float = 600  # rpm
    limiter: str = ""
    form: str = "seconds"  # of Retry-After
    counts_refused: bool = False
    noise: float = 0.0  # share of the requests that are refused or fail whatever the pace
    noise_signs: tuple[str | int, ...] = (REFUSED,)
    noise_wait_s: float | None = 1.0
    noise_from_s: float = 0.0
    noisy_s: tuple[float, float] = (1, 1)  # so many seconds in every so many
    hang: float = 0.0
    hanging_tickets: int = 0  # one in 60, so many in all
    latency_s: tuple[float, float] = (0.21, 0.39)
    tail: float = 0.0  # share of the answers that take ten times as long
    slots: int = 0  # works on so many requests at a time,
    slot_s: float = 0.0  # so long on each,
    freed: bool = True  # and drops what a client gave up
    most_in_flight: int = 0  # above that: 429
    outage: tuple[float, float] = (0, 0)
    change: tuple[float, float] = (0, 0)  # when, and the new limit per second
    clients: int = 1
    timeout_s: float = 60.0
    jump_s: float = 0.0  # the machine sleeps for an hour at this time


@dataclass
class Trial:
    """One run of the clients in a world."""

    seconds: float
    share: float
    signs: Counter
    answers: list[float]
    by_client: list[int]  # answers, when the first client had finished
    doors: list[Door]

    @property
    def refused(self) -> float:
        return self.signs[REFUSED] / sum(self.signs.values())

    def rate(self, begin_s: float, end_s: float) -> float:
        return (bisect(self.answers, end_s) - bisect(self.answers, begin_s)) / (end_s - begin_s)

    def reached(self, rate: float, after_s: float) -> float:
        """Seconds from `after_s` until ten seconds at that rate begin."""
        waits = (n / 2 for n in range(1200))
        return next((s for s in waits if self.rate(after_s + s, after_s + s + 10) >= rate), math.inf)


class Server:
    """Behaves as its world says."""

    def __init__(self, world: World, seed: int) -> None:
        self.world, self.random = world, random.Random(seed)
        self.offset_s = self.random.uniform(0, 60)
        self.limiter = None
        if world.limiter:
            self.limiter = LIMITERS[world.limiter](world.possible, world.counts_refused)
        self.outage_at = world.outage[0] + self.random.uniform(0, 5)
        self.busy, self.free_at, self.slots = 0, [0.0] * world.slots, asyncio.Semaphore(world.slots or 1)

    async def answer(self, number: int) -> tuple[object, float | None]:
        """How the request ended, and Retry-After."""
        await asyncio.sleep(self.random.uniform(0.003, 0.007))
        world, now = self.world, asyncio.get_running_loop().time()
        sign, wait_s = self.refusal(now)
        if sign != ADMITTED:
            await asyncio.sleep(0.05)
            return sign, wait_s
        if is_hanging(number, world.hanging_tickets) or self.random.random() < world.hang:
            await asyncio.sleep(world.timeout_s)
            return TIMED_OUT, None
        self.busy += 1
        try:
            return await self.work(now), None
        finally:
            self.busy -= 1

    def refusal(self, now: float) -> tuple[object, float | None]:
        world = self.world
        if self.outage_at <= now < world.outage[1]:
            return FAILED, None
        noisy = self.random.random() < world.noise and self.is_noisy_at(now)
        if self.limiter:
            if world.change[1] and now >= world.change[0]:
                change_limit(self.limiter, world.change[1])
            if wait_s := self.limiter.wait_s(now + self.offset_s):
                return REFUSED, told_wait_s(world.form, wait_s, now + self.offset_s)
        if noisy:
            sign = self.random.choice(world.noise_signs)
            return sign, world.noise_wait_s if sign == REFUSED else None
        if 0 < world.most_in_flight <= self.busy:
            return REFUSED, world.noise_wait_s
        return ADMITTED, None

    def is_noisy_at(self, now: float) -> bool:
        world = self.world
        noisy_s, period_s = world.noisy_s
        return now >= world.noise_from_s and (now + self.offset_s) % period_s < noisy_s

    async def work(self, now: float) -> object:
        world = self.world
        if world.slots and world.freed:
            try:
                async with asyncio.timeout(world.timeout_s), self.slots:
                    await asyncio.sleep(world.slot_s)
                    return ADMITTED
            except TimeoutError:
                return TIMED_OUT
        took_s = self.random.uniform(*world.latency_s)
        if world.tail and self.random.random() < world.tail:
            took_s *= 10
        if world.slots:
            done_at = max(now, heapq.heappop(self.free_at)) + world.slot_s
            heapq.heappush(self.free_at, done_at)
            took_s = done_at - now
        await asyncio.sleep(min(took_s, world.timeout_s))
        return ADMITTED if took_s < world.timeout_s else TIMED_OUT


def is_hanging(ticket: int, tickets: int) -> bool:
    return ticket % 60 == 30 and ticket // 60 < tickets


def change_limit(limiter: Bucket | SlidingWindow | FixedWindow, per_s: float) -> None:
    if isinstance(limiter, Bucket):
        limiter.per_s = per_s
    else:
        limiter.allowed = round(per_s * limiter.window_s)


def told_wait_s(form: str, wait_s: float, now: float) -> float | None:
    """As the client sees it: a date has whole seconds, and so has the Date beside it."""
    forms = {"seconds": math.ceil(wait_s), "float": wait_s, "none": None}
    return math.ceil(now + wait_s) - math.floor(now) if form == "date" else forms[form]


async def label_all(world: World, tickets: int, seed: int) -> Trial:
    """The clients' loop: as many workers as may be in flight, each ticket until it is answered."""
    loop, server = asyncio.get_running_loop(), Server(world, seed)
    doors = [Door(world.told, WORKERS, world.timeout_s) for _ in range(world.clients)]
    trial = Trial(0, 0, Counter(), [], [], doors)
    by_client = Counter()

    async def work(client: int, numbers: Iterator[int], rng: random.Random) -> None:
        door = doors[client]
        for number in numbers:
            for failures in range(9):
                sign = None
                while sign in (None, REFUSED):
                    started = await door.enter()
                    sign, retry_after_s = await server.answer(number)
                    trial.signs[sign] += 1
                    wait_s = door.leave(started, sign, retry_after_s)
                    await asyncio.sleep(wait_s if sign != ADMITTED else 0)
                if sign == ADMITTED:
                    trial.answers.append(loop.time())
                    by_client[client] += 1
                    break
                await asyncio.sleep(rng.uniform(0, min(2.0**failures, 30)))

    async def label(client: int) -> None:
        numbers, rng = iter(range(tickets)), random.Random(seed * 100 + client)
        await asyncio.gather(*(work(client, numbers, rng) for _ in range(WORKERS)))
        trial.by_client = trial.by_client or [by_client[c] for c in range(world.clients)]
        trial.seconds = trial.seconds or loop.time()

    if world.jump_s:
        loop.call_later(world.jump_s, lambda: setattr(loop.virtual, "now", loop.time() + 3600))
    await asyncio.gather(*map(label, range(world.clients)))
    last = trial.answers[-1] if world.hanging_tickets else trial.seconds  # what never answers is waited for
    last -= 3600 if world.jump_s else 0
    trial.share = sum(trial.by_client) / last / world.possible
    return trial


def tried(world: World, tickets: int = 1200, seed: int = 100) -> Trial:
    return in_virtual_time(label_all(world, tickets, seed))


# ---- claims ----


@pytest.mark.parametrize(
    ("limiter", "told", "possible", "share", "refused"),
    [
        ("bucket of 5", 1200, 20, 0.96, 0.005),
        ("bucket of 5", 1200, 10, 0.85, 0.03),
        ("bucket of 5", 3000, 5, 0.85, 0.05),
        ("sliding 10 s", 1200, 10, 0.85, 0.03),
        ("fixed 10 s", 3000, 5, 0.85, 0.05),
    ],
)
def test_the_limit_is_found_and_hardly_ever_met(limiter, told, possible, share, refused):
    trial = tried(World(possible, told, limiter))
    assert trial.share >= share
    assert trial.refused <= refused
    assert trial.doors[0].pace.limit_found == (told > 60 * possible)


@pytest.mark.parametrize(("noise", "wait_s"), [(0.03, 1.0), (0.1, None), (0.3, 1.0)])
def test_refusals_that_come_at_any_pace_do_not_slow_it_down(noise, wait_s):
    trial = tried(World(10 * (1 - noise), noise=noise, noise_wait_s=wait_s), 3000)
    assert trial.share >= 0.8
    assert not trial.doors[0].pace.limit_found


def test_neither_do_failures():
    trial = tried(World(8, noise=0.2, noise_signs=(FAILED, REFUSED)), 3000)
    assert trial.share >= 0.75


def test_a_limit_is_found_under_noise():
    trial = tried(World(5, limiter="bucket of 5", noise=0.03), 3000)
    assert trial.share >= 0.85


def test_a_hung_request_slows_nobody_else_down():
    assert tried(World(10, hang=0.005, timeout_s=10)).share >= 0.9
    assert tried(World(10, hanging_tickets=10), 600).share >= 0.9


@pytest.mark.parametrize("freed", [True, False])
def test_a_slow_server_is_fully_used_with_few_time_outs(freed):
    trial = tried(World(2 / 1.5, slots=2, slot_s=1.5, freed=freed, timeout_s=15), 300)
    assert trial.share >= 0.93
    assert trial.signs[TIMED_OUT] <= 6


def test_without_a_limit_as_many_are_in_flight_as_may_be():
    trial = tried(World(40 / 0.255, told=0, latency_s=(0.1, 0.4)), 10_000)
    assert trial.share >= 0.9
    assert trial.doors[0].window.size == WORKERS
    assert not trial.doors[0].pace.limit_found


@pytest.mark.parametrize(("told", "most"), [(0, 5), (30_000, 10)])
def test_a_limit_of_requests_in_flight_makes_the_window_not_the_pace(told, most):
    trial = tried(World(most / 0.3, told, most_in_flight=most), 5000)
    assert trial.share >= 0.75
    assert trial.refused <= 0.02


async def refuse_the_last_of(door: Door, in_flight: int) -> None:
    """Until the alarm is judged."""
    while door.pace.alarm.raised_at is None:
        door.window.size, door.pace.alarm.usual_share = in_flight, MIN_USUAL_SHARE
        *others, last = [await door.enter() for _ in range(in_flight)]
        for turn in others:
            door.leave(turn, ADMITTED)
        door.leave(last, REFUSED, 1.0)
    door.leave(await door.enter(), ADMITTED)
    assert door.pace.alarm.raised_at is None


def test_where_only_the_last_in_flight_is_refused_the_window_is_smaller_for_a_minute():
    async def run() -> None:
        door = Door(60_000, 40, 60)
        per_s = door.pace.per_s
        for in_flight in (6, 9):
            await refuse_the_last_of(door, in_flight)
            for wait_s, window in ((0, in_flight - 1), (59, in_flight - 1), (2, in_flight)):
                await asyncio.sleep(wait_s)
                door.leave(await door.enter(), ADMITTED)
                assert (door.window.size, door.pace.per_s) == (window, per_s)

    in_virtual_time(run())


def test_where_that_happens_again_at_once_it_was_the_pace():
    async def run() -> None:
        door = Door(60_000, 40, 60)
        await refuse_the_last_of(door, 6)
        per_s = door.pace.per_s
        await refuse_the_last_of(door, 5)
        assert door.window.size == 5
        assert door.pace.per_s < per_s

    in_virtual_time(run())


def test_a_time_out_halves_a_window_that_is_kept():
    async def run() -> None:
        door = Door(60_000, 40, 60)
        await refuse_the_last_of(door, 9)
        turns = [await door.enter() for _ in range(8)]
        await asyncio.sleep(10)
        for turn in turns:
            door.leave(turn, TIMED_OUT)
        assert door.window.size == 4

    in_virtual_time(run())


def test_two_clients_share_a_limit():
    trial = tried(World(10, 600, "bucket of 5", clients=2), 3000)
    one, other = trial.by_client
    assert trial.share >= 0.9
    assert (one + other) ** 2 / (2 * (one * one + other * other)) >= 0.75


@pytest.mark.parametrize("told", [0, 60_000])
def test_a_very_low_limit_is_not_taken_for_noise(told):
    """Its rate is known from a few answers at a time; 300 requests or more were refused when that was believed."""
    trial = tried(World(0.2, told, "bucket of 5"), 300)
    assert trial.share >= 0.9
    assert trial.signs[REFUSED] <= 80


@pytest.mark.parametrize("limiter", ["bucket of 5", "fixed 60 s"])
def test_a_key_of_60_a_minute_of_which_nobody_told_is_found_with_few_refusals(limiter):
    """A pace that rose by seconds alone came back to a low limit after few answers: 9% were refused."""
    trial = tried(World(1, 600, limiter))
    assert trial.share >= 0.95
    assert trial.refused <= 0.045


@pytest.mark.parametrize("limit", [5, 10])
def test_a_limit_that_changes_is_found_again(limit):
    before = 15 - limit
    trial = tried(World(before, 1200, "sliding 10 s", change=(300, limit)), 6000)
    assert trial.rate(390, 450) >= 0.85 * limit


def test_what_was_let_through_before_an_alarm_is_not_forgotten():
    """A window of 60 s lets through what it forgets: an alarm soon after another would take that for the limit."""
    trials = [tried(World(10, 1200, "sliding 60 s", change=(300, 5)), 3500, seed) for seed in range(100, 104)]
    assert min(trial.rate(360, 420) for trial in trials) > 4


def test_an_outage_costs_few_requests_and_little_time_after_it():
    trial = tried(World(10, outage=(60, 180)), 2400)
    assert trial.signs[FAILED] <= 100
    assert trial.reached(9, after_s=180) <= 10


def test_a_limit_that_was_not_met_for_four_minutes_is_forgotten():
    async def run() -> float:
        door = Door(600, 4, 60)
        # As the refusals of an outage may leave it.
        door.pace.per_s = door.pace.limit_per_s = 0.5

        async def ask() -> None:
            while asyncio.get_running_loop().time() < start + 330:
                entry = await door.enter()
                await asyncio.sleep(0.3)
                door.leave(entry, ADMITTED)

        start = asyncio.get_running_loop().time()
        await asyncio.gather(*(ask() for _ in range(4)))
        return door.pace.per_s

    assert in_virtual_time(run()) > 9


def test_a_machine_that_slept_goes_on():
    assert tried(World(10, jump_s=30)).share >= 0.85


def test_a_lone_refusal_holds_its_own_ticket_only():
    async def run() -> None:
        door = Door(600, 40, 60)
        for _ in range(20):
            door.leave(await door.enter(), ADMITTED)
        assert door.leave(await door.enter(), REFUSED, 30.0) == 30.0
        before = asyncio.get_running_loop().time()
        door.leave(await door.enter(), ADMITTED)
        assert asyncio.get_running_loop().time() - before < 1
        assert (door.refusals, door.pace.limit_found) == (1, False)

    in_virtual_time(run())


def test_a_refused_ticket_without_retry_after_waits_four_fifths_of_a_second():
    async def run() -> tuple[float, float]:
        door = Door(600, 40, 60)
        return door.leave(await door.enter(), REFUSED), door.leave(await door.enter(), ADMITTED)

    assert in_virtual_time(run()) == (0.8, 0)


def test_the_window_starts_at_four_and_answers_to_quick_answers_and_time_outs():
    async def run() -> None:
        door = Door(0, 40, 60)
        in_flight = [await door.enter() for _ in range(4)]
        fifth = asyncio.ensure_future(door.enter())
        await asyncio.sleep(60)
        assert not fifth.done()
        for started in in_flight:
            door.leave(started, TIMED_OUT)
        assert door.window.size == 2, "one round trip halves it once"
        for answered in range(1, 50):
            door.leave(await fifth, ADMITTED)
            assert door.window.size == min(2 + answered, 40)
            fifth = asyncio.ensure_future(door.enter())
        door.leave(await fifth, NOT_SENT)
        assert not door.in_flight

    in_virtual_time(run())


def test_how_long_an_answer_waited_beyond_the_fastest_makes_the_window():
    """TIMEOUT is 60: a quarter of it more is quick, half of it more is slow; half of it in all is not quick."""

    async def window_after(*answers_s: float) -> float:
        door = Door(0, 40, 60)
        for took_s in answers_s:
            started = await door.enter()
            await asyncio.sleep(took_s)
            door.leave(started, ADMITTED)
        return door.window.size

    windows = {(1, 14): 6, (1, 20): 5, (1, 32): 2.5, (31, 31): 4, (31, 46): 4, (31, 62): 2}
    assert {answers_s: in_virtual_time(window_after(*answers_s)) for answers_s in windows} == windows


def test_a_request_that_was_never_sent_tells_nothing():
    async def run() -> None:
        door = Door(600, 40, 60)
        for _ in range(10):
            assert door.leave(await door.enter(), NOT_SENT) == 0.0
        assert (door.pace.per_s, door.window.size, door.in_flight) == (door.pace.max_per_s, 4.0, 0)

    in_virtual_time(run())


def test_a_run_that_ends_wakes_everybody_who_waits():
    async def run() -> None:
        door = Door(1, 40, 60)
        waiting = [asyncio.ensure_future(door.enter()) for _ in range(100)]
        await asyncio.sleep(1)
        door.close()
        await asyncio.gather(*waiting)
        assert asyncio.get_running_loop().time() < 1.1

    in_virtual_time(run())


def test_alone_only_one_request_is_in_flight_until_that_is_over():
    async def run() -> None:
        door = Door(0, 40, 60)
        door.alone = True
        first = await door.enter()
        waiting = [asyncio.ensure_future(door.enter()) for _ in range(3)]
        await asyncio.sleep(60)
        assert not any(one.done() for one in waiting)
        door.leave(first, ADMITTED)
        await asyncio.sleep(1)
        assert [one.done() for one in waiting] == [True, False, False]
        door.alone = False
        door.leave(waiting[0].result(), ADMITTED)
        await asyncio.gather(*waiting)
        assert door.in_flight == 2

    in_virtual_time(run())


@pytest.mark.parametrize("signal", [REFUSED, FAILED])
def test_an_error_with_retry_after_is_a_refusal_and_all_wait_as_long_in_an_alarm(signal):
    async def run() -> None:
        door = Door(600, 40, 60)
        now = asyncio.get_running_loop().time
        while door.pace.alarm.raised_at is None:
            assert door.pace.next_at - now() < 1
            assert door.leave(await door.enter(), signal, 30.0) == 30.0
        assert door.pace.next_at - now() == 30
        assert door.refusals == 3

    in_virtual_time(run())


# ---- the table ----

FAULTS = {
    "429, Retry-After: 1": {},
    "429 without": {"noise_wait_s": None},
    "5xx, half with Retry-After": {"noise_signs": (FAILED, REFUSED)},
    "5xx": {"noise_signs": (FAILED,)},
}


def worlds() -> Iterator[tuple[str, str, World]]:
    """Group, name and world of each line."""
    for per_s in (1, 2, 3):
        for limiter in KINDS:
            for seconds, latency_s in (("0.3 s", (0.21, 0.39)), ("3 s", (2.1, 3.9))):
                yield (
                    "low",
                    f"{60 * per_s} a minute, {limiter}, {seconds}",
                    World(per_s, 600, limiter, latency_s=latency_s),
                )
    told = {"truth": (1200, 20), "twice": (1200, 10), "ten times": (3000, 5), "nothing": (0, 10)}
    for name, (rpm, per_s) in told.items():
        for limiter in KINDS:
            for form in ("seconds", "float", "date", "none"):
                yield "limits", f"{name}, {limiter}, {form}", World(per_s, rpm, limiter, form)
    for name, rpm in (("truth", 600), ("twice", 1200)):
        for limiter in KINDS:
            for form in ("seconds", "none"):
                yield "counted", f"{name}, {limiter}, {form}", World(10, rpm, limiter, form, True)
    for share in (0.03, 0.1, 0.25):
        for name, wait_s in (("Retry-After: 1", 1.0), ("429 without", None)):
            yield "short", f"{share:.0%} {name}", World(10 - 10 * share, noise=share, noise_wait_s=wait_s)
    yield "short", "3%, told twice", World(10, 1200, "bucket of 5", noise=0.03)
    yield "short", "25%, no limit, told none", World(0.75 * 40 / 0.3, 0, noise=0.25)
    for group, latency_s in (("noise", (0.21, 0.39)), ("noise 3 s", (2.1, 3.9))):
        for share in (0.01, 0.03, 0.1, 0.2, 0.3):
            for name, fault in FAULTS.items():
                yield group, f"{share:.0%} {name}", World(10 - 10 * share, noise=share, latency_s=latency_s, **fault)
    for limiter in KINDS:
        yield "both", f"3% and half of told, {limiter}", World(5, limiter=limiter, noise=0.03)
        for name, begin, end in (("halves", 10, 5), ("doubles", 5, 10)):
            yield "change", f"{name}, {limiter}", World(begin, 1200, limiter, change=(300, end))
        for rpm in (600, 1200):
            yield "two", f"two clients told {rpm}, {limiter}", World(10, rpm, limiter, clients=2)
    yield "hang", "0.3%", World(10, hang=0.003, timeout_s=10)
    yield "hang", "ten tickets always", World(10, hanging_tickets=10)
    for slots, slot_s in ((1, 2), (2, 1.5), (4, 5), (1, 8)):
        for timeout_s in (15, 60):
            for freed in (True, False):
                server = World(slots / slot_s, slots=slots, slot_s=slot_s, freed=freed, timeout_s=timeout_s)
                yield "slow", f"{slots} x {slot_s} s, TIMEOUT {timeout_s}, {'freed' if freed else 'kept'}", server
    yield "slow answers", "always 5 to 20 s", World(40 / 12.5, latency_s=(5, 20))
    for rpm in (0, 30_000):
        yield "no limit", f"told {rpm}", World(40 / 0.255, rpm, latency_s=(0.1, 0.4))
    for most in (5, 10):
        for wait_s in (1.0, None):
            yield (
                "in flight",
                f"{most}, Retry-After {wait_s}",
                World(most / 0.3, 0, most_in_flight=most, noise_wait_s=wait_s),
            )
    for length in (12, 120):
        yield "outage", f"{length} s", World(10, outage=(60, 60 + length))
    for name, world in INVENTED.items():
        yield "invented", name, world


# No constant was chosen by these.
INVENTED = {
    "60% noise for 5 s in 30": World(9, noise=0.6, noisy_s=(5, 30)),
    "20% noise from 60 s on": World(8.9, noise=0.2, noise_from_s=60),
    "a limit of 0.9 of told": World(9, 600, "bucket of 5"),
    "a limit of 0.95 of told, window": World(9.5, 600, "sliding 60 s"),
    "10% noise and a second client": World(10, 600, "bucket of 5", noise=0.1, clients=2),
    "bucket of 50, told twice": World(10, 1200, "bucket of 50"),
    "a tail: 5% take ten times": World(10, 1200, "sliding 10 s", tail=0.05),
    "a tail and 10% noise, 3 s": World(9, noise=0.1, tail=0.05, latency_s=(2.1, 3.9)),
    "counted, 3% noise, told twice": World(10, 1200, "sliding 10 s", counts_refused=True, noise=0.03),
    "15% noise, no limit, told 30000": World(0.85 * 40 / 0.3, 30_000, noise=0.15),
}


def line(job: tuple[str, World, int, range]) -> str:
    """One line of the table."""
    name, world, tickets, seeds = job
    trials = [tried(world, tickets, seed) for seed in seeds]
    shares, refused = [t.share for t in trials], [t.refused for t in trials]
    text = f"{name:44}{mean(shares):8.3f}{min(shares):8.3f}{mean(refused):8.2%}{max(refused):8.2%}"
    text += f"{mean(t.signs[TIMED_OUT] for t in trials):8.1f}"
    if world.outage[1]:
        back = [t.reached(0.9 * world.possible, world.outage[1]) for t in trials]
        text += (
            f"  failed {mean(t.signs[FAILED] for t in trials):.0f}, back in {mean(back):.1f} s, at most {max(back):.1f}"
        )
    if world.change[1]:
        at, rate = world.change
        rates = [t.rate(at + 60, at + 120) / rate for t in trials]
        text += f"  a minute later {mean(rates):.2f} of the new, at least {min(rates):.2f}"
    if world.clients > 1:
        jain = [sum(t.by_client) ** 2 / (2 * sum(n * n for n in t.by_client)) for t in trials]
        text += f"  Jain {mean(jain):.2f}, at least {min(jain):.2f}"
    return text


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("groups", nargs="*")
    parser.add_argument("--tickets", type=int, default=0, help="otherwise what the goal of each group says")
    parser.add_argument("--seeds", type=int, default=10, help="so many, from --first on")
    parser.add_argument("--first", type=int, default=200)
    parser.add_argument("--workers", type=int, help="processes; otherwise one for each core")
    options = parser.parse_args()
    usual = {
        "short": 600,
        "in flight": 10_000,
        "noise": 10_000,
        "noise 3 s": 10_000,
        "both": 10_000,
        "no limit": 10_000,
        "change": 5000,
        "slow": 300,
    }
    seeds = range(options.first, options.first + options.seeds)
    jobs = [
        (f"{group}: {name}", world, options.tickets or usual.get(group, 1200), seeds)
        for group, name, world in worlds()
        if not options.groups or group in options.groups
    ]
    print(f"{'world':44}{'share':>8}{'least':>8}{'refused':>8}{'most':>8}{'hung':>8}")
    with ProcessPoolExecutor(options.workers) as pool:
        for text in pool.map(line, jobs):
            print(text, flush=True)


if __name__ == "__main__":
    main()

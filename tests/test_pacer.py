"""The real Pacer against the stand-in's own limiters, in virtual time: a minute of waiting takes no time at all.

`python -m tests.test_pacer [TICKETS]` prints the whole table, over more seeds.
"""

import asyncio
import itertools
import math
import random
import selectors
import sys
from statistics import mean

import pytest

from classify import MAX_HOLD_S, MAX_REFUSED_S, Gateway, MayPass, NotSent, Pacer, RunStopped
from tests.gateway import Bucket, FixedWindow, SlidingWindow

# what the client was told: its rpm, the true one, the least share of the limit to be reached, the most refused
TOLD = {
    "the truth": (1200, 1200, 0.97, 0.005),
    "twice the truth": (1200, 600, 0.95, 0.015),
    "ten times the truth": (3000, 300, 0.88, 0.06),
    "no limit": (0, 600, 0.90, 0.05),
}
LIMITERS = {
    "bucket of 5": lambda per_s: Bucket(per_s, 5),
    "sliding 10 s": lambda per_s: SlidingWindow(round(per_s * 10), 10),
    "sliding 60 s": lambda per_s: SlidingWindow(round(per_s * 60), 60),
    "fixed 10 s": lambda per_s: FixedWindow(round(per_s * 10), 10),
    "fixed 60 s": lambda per_s: FixedWindow(round(per_s * 60), 60),
}
FORMS = ("seconds", "float", "date", "none")


class VirtualTime(selectors.SelectSelector):
    """Moves the clock to the next timer instead of waiting for it."""

    now = 0.0

    def select(self, timeout: float | None = None) -> list:
        assert timeout is not None, "everybody waits for ever"
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


def told_to_wait(form: str, wait_s: float, wall_s: float) -> float | None:
    """What the client makes of a Retry-After in this form; a date has whole seconds only."""
    date = max(0.0, math.floor(wall_s) + math.ceil(wait_s) - wall_s)
    return {"seconds": math.ceil(wait_s), "float": wait_s, "date": date, "none": None}[form]


async def job(pacer: Pacer, tickets: int, request, workers: int = 40) -> float:
    """Runs so many tickets through `request`, which gives None or the wait that it was told; returns the seconds."""
    left = iter(range(tickets))

    async def worker() -> None:
        for _ in left:
            while True:
                started = await pacer.turn()
                answered, wait_s = await request()
                if answered:
                    break
                pacer.refused(started, wait_s)
            pacer.accepted(started)

    await asyncio.gather(*(worker() for _ in range(workers)))
    return asyncio.get_running_loop().time()


def cell(told: str, limiter: str, form: str, seed: int, tickets: int = 1200) -> tuple[float, float]:
    """Share of the true limit reached, and share of the requests refused."""
    rpm, true_rpm, *_ = TOLD[told]
    random_ = random.Random(seed)
    gate, offset_s = LIMITERS[limiter](true_rpm / 60), random_.uniform(0, 60)

    async def request() -> tuple[bool, float | None]:
        await asyncio.sleep(random_.uniform(0.003, 0.007))
        now = asyncio.get_running_loop().time() + offset_s
        if wait_s := gate.wait_s(now):
            await asyncio.sleep(0.05)
            return False, told_to_wait(form, wait_s, now)
        await asyncio.sleep(0.3 * random_.uniform(0.7, 1.3))
        return True, None

    async def measured() -> tuple[float, float]:
        pacer = Pacer(rpm)
        seconds = await job(pacer, tickets, request)
        return tickets * 60 / (true_rpm * seconds), pacer.refusals / (tickets + pacer.refusals)

    return in_virtual_time(measured())


@pytest.mark.parametrize("told", TOLD)
@pytest.mark.parametrize("limiter", LIMITERS)
@pytest.mark.parametrize("form", FORMS)
def test_the_pace_finds_the_limit(told, limiter, form):
    _, _, least_share, most_refused = TOLD[told]
    shares, refused = zip(*(cell(told, limiter, form, seed) for seed in (1, 2)), strict=True)
    assert mean(shares) >= least_share
    assert mean(refused) < most_refused


@pytest.mark.parametrize("rpm", [0, 3000])
def test_a_limit_of_requests_in_flight_is_settled_under_too(rpm):
    in_flight, random_ = 0, random.Random(1)

    async def request() -> tuple[bool, float | None]:
        nonlocal in_flight
        if in_flight >= 10:
            await asyncio.sleep(0.05)
            return False, 1.0
        in_flight += 1
        await asyncio.sleep(0.3 * random_.uniform(0.7, 1.3))
        in_flight -= 1
        return True, None

    async def measured() -> tuple[float, int]:
        pacer = Pacer(rpm)
        return await job(pacer, 3000, request), pacer.refusals

    seconds, refusals = in_virtual_time(measured())
    assert refusals < 30
    assert 3000 / seconds > 0.6 * 10 / 0.3


def test_a_server_that_works_on_one_request_at_a_time_is_used_fully():
    free_at = 0.0

    async def request() -> tuple[bool, float | None]:
        nonlocal free_at
        now = asyncio.get_running_loop().time()
        free_at = max(free_at, now) + 0.2
        await asyncio.sleep(min(free_at - now, 60))
        return free_at - now < 60, None

    async def measured() -> tuple[float, int]:
        pacer = Pacer(600)
        return await job(pacer, 600, request), pacer.refusals

    assert in_virtual_time(measured()) == (pytest.approx(120, rel=0.02), 0)


def test_requests_start_evenly_and_in_the_order_in_which_they_asked():
    async def starts() -> list[tuple[float, int]]:
        pacer, started = Pacer(600), []

        async def worker(number: int) -> None:
            started.append((await pacer.turn(), number))

        await asyncio.gather(*(worker(number) for number in range(50)))
        return started

    times, order = zip(*in_virtual_time(starts()), strict=True)
    assert list(order) == sorted(order)
    gaps = [later - earlier for earlier, later in itertools.pairwise(times)]
    assert gaps == pytest.approx([1 / (0.99 * 10)] * 49, abs=0.06)
    assert times[-1] == pytest.approx(49 / 9.9, abs=0.06)


def test_all_whose_time_has_come_while_the_program_was_busy_start_together():
    async def started() -> int:
        loop, pacer = asyncio.get_running_loop(), Pacer(6000)
        for _ in range(10):
            await pacer.turn()
        waiting = [asyncio.create_task(pacer.turn()) for _ in range(20)]
        await asyncio.sleep(0)
        loop.virtual.now += 0.05
        for _ in range(3):  # the timer, the tasks that it wakes, and this one again
            await asyncio.sleep(0)
        done = sum(task.done() for task in waiting)
        await asyncio.gather(*waiting)
        return done

    assert 4 <= in_virtual_time(started()) <= 6


def test_a_refusal_holds_everybody_as_long_as_the_gateway_asks():
    async def after_refusal() -> float:
        pacer = Pacer(6000)
        pacer.refused(await pacer.turn(), 7.0)
        return min(await asyncio.gather(*(pacer.turn() for _ in range(40))))

    assert in_virtual_time(after_refusal()) == pytest.approx(7.0)


def test_one_burst_of_refusals_is_one_cut():
    async def paces() -> tuple[float, float]:
        pacer = Pacer(6000)
        burst = [await pacer.turn() for _ in range(20)]
        pacer.refused(burst[0], 1.0)
        after_one = pacer.pace
        for started in burst[1:]:
            pacer.refused(started, 1.0)
        return after_one, pacer.pace

    after_one, after_all = in_virtual_time(paces())
    assert after_one == after_all < 99


def test_the_pace_never_rises_above_rpm():
    async def highest() -> float:
        pacer, most = Pacer(600), 0.0
        for number in range(2000):
            started = await pacer.turn()
            await asyncio.sleep(0.01)
            if number == 100:
                pacer.refused(started, 1.0)
            else:
                pacer.accepted(started)
            most = max(most, pacer.pace)
        assert pacer.pace == pytest.approx(9.9)  # and it has recovered from the refusal
        return most

    assert in_virtual_time(highest()) == pytest.approx(9.9)


def test_a_wait_of_more_than_ten_minutes_stops_the_run():
    async def refusal() -> None:
        pacer = Pacer(600)
        pacer.refused(await pacer.turn(), MAX_HOLD_S + 1)

    with pytest.raises(RunStopped, match="asks to wait"):
        in_virtual_time(refusal())


def test_five_minutes_of_nothing_but_refusals_stop_the_run():
    async def refusals() -> float:
        pacer = Pacer(600)
        while True:
            started = await pacer.turn()
            try:
                pacer.refused(started, None)
            except RunStopped:
                return asyncio.get_running_loop().time()

    assert MAX_REFUSED_S < in_virtual_time(refusals()) < MAX_REFUSED_S + 20


def test_a_request_that_was_never_sent_tells_nothing_about_the_pace():
    async def paces() -> tuple[float, float, float]:
        pacer = Pacer(0)
        gateway = Gateway(None, None, pacer, 0.0)
        seen = [pacer.pace]
        for failed in (NotSent("no connection"), MayPass("500")):
            for _ in range(10):
                gateway.heed(failed, await pacer.turn())
            seen.append(pacer.pace)
        return tuple(seen)

    before, after_not_sent, after_errors = in_virtual_time(paces())
    assert before == after_not_sent < after_errors


def test_a_run_that_ends_wakes_everybody_who_waits():
    async def woken() -> tuple[list, float]:
        pacer = Pacer(600)
        pacer.hold(500)
        waiting = [asyncio.create_task(pacer.turn()) for _ in range(5)]
        await asyncio.sleep(1)
        pacer.stop("enough")
        return await asyncio.gather(*waiting, return_exceptions=True), asyncio.get_running_loop().time()

    errors, at_s = in_virtual_time(woken())
    assert ([str(error) for error in errors], at_s) == (["enough"] * 5, pytest.approx(1.0))


def test_who_was_let_go_just_before_the_run_ends_does_not_start_any_more():
    async def outcome() -> list:
        loop, pacer = asyncio.get_running_loop(), Pacer(600)
        pacer.hold(1.0)
        waiting = asyncio.create_task(pacer.turn())
        loop.call_at(1.0 + 1e-10, pacer.stop, "enough")  # in the same turn of the loop, right after the timer
        return await asyncio.gather(waiting, return_exceptions=True)

    assert [str(error) for error in in_virtual_time(outcome())] == ["enough"]


if __name__ == "__main__":
    tickets = int(sys.argv[1]) if len(sys.argv) > 1 else 1200
    print("| told | limiter | Retry-After | share of the limit: mean, least | refused: mean, most |")
    print("|---|---|---|---|---|")
    for told in TOLD:
        for limiter in LIMITERS:
            for form in FORMS:
                runs = (cell(told, limiter, form, seed, tickets) for seed in range(100, 110))
                shares, refused = zip(*runs, strict=True)
                figures = f"{mean(shares):.3f}, {min(shares):.3f} | {mean(refused):.2%}, {max(refused):.2%}"
                print(f"| {told} | {limiter} | {form} | {figures} |")

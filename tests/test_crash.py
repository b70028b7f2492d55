"""Killed at any moment, or interrupted: no line is torn, doubled or lost, and only what was in flight is paid twice."""

import asyncio
import itertools
import json
import random
import signal
from collections import Counter

import pytest

from tests.conftest import CAN_FORK, Desk, Done, numbered
from tests.gateway import Fault, Gateway, Script
from tests.helpers import until
from tests.test_faults import SETTINGS

pytestmark = pytest.mark.skipif(not CAN_FORK, reason="kills and cuts need Unix")

KILLS = 50
CONCURRENCY = 8


def whole_lines(desk: Desk, name: str = "labels.jsonl") -> list[dict]:
    """The lines that were written to their end; a torn one may only be the last, or stand in the .bak."""
    path = desk.folder / name
    content = path.read_bytes() if path.exists() else b""
    lines = []
    for line in content.splitlines(keepends=True):
        if line.strip() and line.endswith(b"\n"):
            try:
                lines.append(json.loads(line))
            except ValueError:
                assert name.endswith(".bak"), f"a torn line in the middle: {line}"
    return lines


def idle(gateway: Gateway) -> bool:
    return gateway.in_flight == 0


def check_complete(done: Done, tickets: dict[str, str]) -> None:
    """After the last run the file is as if nothing had happened."""
    assert done.status == 0, done.stderr
    assert set(done.labels) == set(tickets)  # which fails on a doubled line, and on a torn one
    assert set(done.labels.values()) == {"billing"}
    assert done.stdout.startswith(f"Classified {len(tickets)} tickets\n")


# ---- kill -9 -------------------------------------------------------------------------------------------


async def test_fifty_kills_at_random_moments_lose_nothing_and_pay_twice_only_what_was_in_flight(desk: Desk) -> None:
    moments = random.Random(4)
    tickets = numbered(600)
    desk.edit(**SETTINGS)
    desk.write(tickets)
    kills = 0
    billed_before: Counter[str] = Counter()
    async with Gateway(Script(rpm=0, latency_s=0.03, jitter=0.5)) as gateway:
        arguments = ("--rpm", "0", "--concurrency", str(CONCURRENCY))
        while kills < KILLS:
            before = {line["id"] for line in whole_lines(desk)}
            seen = gateway.requests
            process = await desk.start(gateway, *arguments)
            if kills % 4:  # most of them while it works, however long a busy machine takes to start it
                await until(lambda seen=seen: gateway.requests > seen)
                await asyncio.sleep(moments.uniform(0, 0.06))
            else:
                await asyncio.sleep(moments.uniform(0, 0.2))
            process.kill()
            done = await desk.finish(process)
            if done.status == 0:
                break
            assert done.status == -signal.SIGKILL
            kills += 1
            await until(lambda: idle(gateway))  # the gateway goes on with what it has, and bills it
            lines = whole_lines(desk)
            ids = {line["id"] for line in lines}
            assert len(ids) == len(lines), "a doubled line"
            assert before <= ids, "a kill lost a line"
            billed = gateway.billed - billed_before
            assert set(billed.values()) <= {1}, "one run asked twice"
            assert not [id_ for id_ in before if billed[tickets[id_]]], "asked again, with its line written"
            in_flight = [text for id_, text in tickets.items() if billed[text] and id_ not in ids]
            assert len(in_flight) <= CONCURRENCY, "more was paid in vain than was in flight"
            billed_before = gateway.billed.copy()
        assert kills == KILLS, "the job ended before all its kills; make it longer"
        assert billed_before.total() >= KILLS, "the starts got too few answers; make them longer"
        check_complete(await desk.run(gateway, *arguments), tickets)
    again = gateway.billed.total() - len(tickets)
    assert again <= kills * CONCURRENCY
    print(f"{kills} kills: {again} of {gateway.billed.total()} requests paid again, of {kills * CONCURRENCY} allowed")


async def test_a_write_that_death_cuts_at_any_byte_costs_one_line_at_most(desk: Desk) -> None:
    moments = random.Random(5)
    tickets = numbered(60)
    desk.edit(**SETTINGS)
    desk.write(tickets)
    async with Gateway(Script(rpm=0, latency_s=0)) as gateway:
        cuts = 0
        for _ in range(25):
            before = whole_lines(desk)
            size = desk.output.stat().st_size if desk.output.exists() else 0
            limit = size + moments.randrange(1, 900)
            done = await desk.run(gateway, "--rpm", "0", "--concurrency", "4", die_at_byte=limit)
            assert "Traceback" not in done.stderr, done.stderr
            cuts += done.status != 0
            assert whole_lines(desk)[: len(before)] == before, "a cut write harmed other lines"
        assert cuts >= 10
        check_complete(await desk.run(gateway, "--rpm", "0"), tickets)
    assert gateway.billed.total() <= len(tickets) + 4 * cuts


# ---- kill -9 while old lines move to the .bak ----------------------------------------------------------


async def labelled_under_another_prompt(desk: Desk, gateway: Gateway, count: int) -> list[dict]:
    """A finished labels.jsonl, every line of which the next run has to retire."""
    desk.write(numbered(count))
    desk.edit(**SETTINGS, SYSTEM_PROMPT="The old prompt")
    check_complete(await desk.run(gateway, "--rpm", "0"), numbered(count))
    desk.edit(**SETTINGS)
    return whole_lines(desk)


def check_old_lines(desk: Desk, old: list[dict]) -> None:
    """All that was ever paid is on record, and once, or the budget would count it twice."""
    kept = Counter(
        json.dumps(line) for name in ("labels.jsonl", "labels.jsonl.bak") for line in whole_lines(desk, name)
    )
    assert not [line for line in old if not kept[json.dumps(line)]], "an old line is in neither file"
    assert not [line for line, times in kept.items() if times > 1], "a line is on record more than once"


async def test_a_kill_at_any_moment_of_the_rewrite_loses_no_old_line(desk: Desk) -> None:
    moments = random.Random(6)
    async with Gateway(Script(rpm=0, latency_s=0)) as gateway:
        old = await labelled_under_another_prompt(desk, gateway, 400)
        gateway.script = Script(rpm=0, latency_s=30)  # no new line comes: only the rewrite is at stake
        untouched = desk.output.read_bytes()
        for _ in range(25):
            desk.output.write_bytes(untouched)
            for name in ("labels.jsonl.bak", "labels.jsonl.new"):
                (desk.folder / name).unlink(missing_ok=True)
            for _ in range(2):  # the second one starts from what the first one left
                process = await desk.start(gateway, "--rpm", "0")
                await asyncio.sleep(moments.uniform(0.01, 0.08))
                process.kill()
                await desk.finish(process)
                kept = {json.dumps(x) for name in ("labels.jsonl", "labels.jsonl.bak") for x in whole_lines(desk, name)}
                assert {json.dumps(line) for line in old} <= kept, "an old line is in neither file"
        gateway.script = Script(rpm=0, latency_s=0)
        check_complete(await desk.run(gateway, "--rpm", "0"), numbered(400))
        check_old_lines(desk, old)


KILLER = """
    import itertools
    calls, real = itertools.count(1), {call}
    {call} = lambda *a, **k: os.kill(os.getpid(), 9) if next(calls) == {number} else real(*a, **k)
"""


@pytest.mark.parametrize("call", ["os.fsync", "os.replace"])
@pytest.mark.parametrize("number", [1, 2])
async def test_a_kill_between_two_steps_of_the_rewrite_leaves_every_old_line_on_record_once(
    desk: Desk, call: str, number: int
) -> None:
    async with Gateway(Script(rpm=0, latency_s=0)) as gateway:
        old = await labelled_under_another_prompt(desk, gateway, 100)
        program = desk.folder / "classify.py"
        source = program.read_text(encoding="utf-8")
        main = 'if __name__ == "__main__":\n'
        program.write_text(source.replace(main, main + KILLER.format(call=call, number=number)), encoding="utf-8")
        killed = (await desk.run(gateway, "--rpm", "0")).status
        assert killed in (-signal.SIGKILL, 0)  # 0: there is no such step
        assert killed or number > 1
        program.write_text(source, encoding="utf-8")
        check_complete(await desk.run(gateway, "--rpm", "0"), numbered(100))
        check_old_lines(desk, old)


@pytest.mark.parametrize("die_at_byte", [120, 1000, 8192, 20_000])
async def test_a_rewrite_that_death_cuts_at_a_byte_loses_no_old_line(desk: Desk, die_at_byte: int) -> None:
    async with Gateway(Script(rpm=0, latency_s=0)) as gateway:
        old = await labelled_under_another_prompt(desk, gateway, 200)
        assert desk.output.stat().st_size > 20_000
        await desk.run(gateway, "--rpm", "0", die_at_byte=die_at_byte)
        check_complete(await desk.run(gateway, "--rpm", "0"), numbered(200))
        check_old_lines(desk, old)


# ---- power cuts, and sleep -----------------------------------------------------------------------------

WATCHER = """
    import threading, time
    real = os.fsync
    def watched(fd):
        with open("fsyncs", "a") as log:
            print(time.time(), threading.current_thread() is threading.main_thread(), file=log)
        real(fd)
    os.fsync = watched
"""


async def test_lines_are_put_on_the_disk_each_second_and_the_work_does_not_wait_for_it(desk: Desk) -> None:
    desk.edit(**SETTINGS)
    desk.write(numbered(60))
    program = desk.folder / "classify.py"
    main = 'if __name__ == "__main__":\n'
    source = program.read_text(encoding="utf-8")
    program.write_text(source.replace(main, main + WATCHER), encoding="utf-8")
    async with Gateway(Script(rpm=0, latency_s=0.2)) as gateway:
        check_complete(await desk.run(gateway, "--rpm", "0", "--concurrency", "4"), numbered(60))
    *during, last = [line.split() for line in (desk.folder / "fsyncs").read_text().splitlines()]
    assert len(during) >= 2
    assert {main for _, main in during} == {"False"}, "it holds up the event loop"
    times = [float(at) for at, _ in during]
    assert all(b - a < 1.5 for a, b in itertools.pairwise(times))
    assert last[1] == "True", "and all of it once more at the end"


@pytest.mark.parametrize("latency_s", [0.05, 2.0])
async def test_a_laptop_that_slept_goes_on(desk: Desk, latency_s: float) -> None:
    desk.edit(**SETTINGS | {"TIMEOUT": 2.5, "MAX_STUCK_S": 3.0})
    desk.write(numbered(40))
    async with Gateway(Script(rpm=0, latency_s=latency_s)) as gateway:
        process = await desk.start(gateway, "--rpm", "0", "--concurrency", "20")
        await until(lambda: gateway.in_flight)
        process.send_signal(signal.SIGSTOP)
        await asyncio.sleep(4)
        process.send_signal(signal.SIGCONT)
        check_complete(await desk.finish(process), numbered(40))


async def test_the_hours_of_sleep_are_no_hours_of_failures(desk: Desk) -> None:
    desk.edit(**SETTINGS | {"MAX_STUCK_S": 3.0, "MAX_RETRIES": 30})
    desk.write(numbered(10))
    refused = Fault("status_429_retry", last=6)
    async with Gateway(Script(rpm=0, latency_s=0.02, retry_after="0.3", faults=(refused,))) as gateway:
        process = await desk.start(gateway, "--rpm", "0", "--concurrency", "2")
        await until(lambda: gateway.faulted >= 3)
        process.send_signal(signal.SIGSTOP)
        await asyncio.sleep(4)
        process.send_signal(signal.SIGCONT)
        check_complete(await desk.finish(process), numbered(10))


# ---- signals -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
async def test_the_first_signal_lets_what_is_in_flight_finish(desk: Desk, number: int) -> None:
    tickets = numbered(100)
    desk.edit(**SETTINGS)
    desk.write(tickets)
    async with Gateway(Script(rpm=0, latency_s=0.5)) as gateway:
        process = await desk.start(gateway, "--rpm", "0", "--concurrency", str(CONCURRENCY))
        await until(lambda: gateway.answered and gateway.in_flight)
        process.send_signal(number)
        done = await desk.finish(process)
        assert done.status == 130
        assert 0 < len(done.labels) < len(tickets)
        assert {tickets[id_] for id_ in done.labels} == set(gateway.billed), "paid, and not waited for"
        assert f"Not labelled: {100 - len(done.labels)} tickets" in done.stdout
        gateway.script = Script(rpm=0, latency_s=0)
        check_complete(await desk.run(gateway, "--rpm", "0"), tickets)
    assert set(gateway.billed.values()) == {1}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
async def test_a_second_signal_ends_the_run_at_once(desk: Desk, number: int) -> None:
    tickets = numbered(40)
    desk.edit(**SETTINGS)
    desk.write(tickets)
    async with Gateway(Script(rpm=0, latency_s=0, faults=(Fault("hang", first=6),))) as gateway:
        process = await desk.start(gateway, "--rpm", "0", "--concurrency", str(CONCURRENCY))
        await until(lambda: gateway.in_flight and len(whole_lines(desk)) == 5)
        process.send_signal(number)
        assert b"waiting" in await until_it_says(process, b"waiting")
        process.send_signal(number)
        async with asyncio.timeout(1):
            assert await process.wait() == 130
        await desk.finish(process)
        assert len(whole_lines(desk)) == 5
        gateway.script = Script(rpm=0, latency_s=0)
        check_complete(await desk.run(gateway, "--rpm", "0"), tickets)


async def until_it_says(process: asyncio.subprocess.Process, word: bytes) -> bytes:
    """The line of stderr with this word in it."""
    async with asyncio.timeout(20):
        while word not in (line := await process.stderr.readline()):
            assert line, f"it never said {word!r}"
    return line


@pytest.mark.parametrize(
    ("fault", "settings"),
    [("status_429_retry", {}), ("status_503", {"BACKOFF_S": 30.0, "BACKOFF_MAX_S": 30.0}), ("status_401", {})],
)
async def test_a_signal_ends_every_wait(desk: Desk, fault: str, settings: dict[str, object]) -> None:
    desk.edit(**SETTINGS | {"KEY_GRACE_S": 60.0, "MAX_STUCK_S": 60.0} | settings)
    desk.write(numbered(5))
    async with Gateway(Script(rpm=0, refusal_s=0, retry_after="55", faults=(Fault(fault),))) as gateway:
        process = await desk.start(gateway, "--rpm", "0")
        await until(lambda: gateway.faulted)
        await asyncio.sleep(0.2)
        process.send_signal(signal.SIGINT)
        assert (await desk.finish(process, within_s=2)).status == 130


async def test_two_signals_end_a_run_that_was_stopping_already(desk: Desk) -> None:
    desk.edit(**SETTINGS)
    desk.write(numbered(40))
    faults = (Fault("hang", first=1, last=3), Fault("status_402"))
    async with Gateway(Script(rpm=0, latency_s=0, refusal_s=0, faults=faults)) as gateway:
        process = await desk.start(gateway, "--rpm", "0", "--concurrency", "4")
        await until(lambda: gateway.faulted >= 4)
        assert b"402" in await until_it_says(process, b"stopped: ")
        process.send_signal(signal.SIGINT)
        await asyncio.sleep(0.2)
        assert process.returncode is None, "what is in flight is waited for"
        process.send_signal(signal.SIGINT)
        async with asyncio.timeout(5):
            assert await process.wait() == 130
        await desk.finish(process)

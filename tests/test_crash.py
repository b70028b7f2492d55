"""Killed at any moment, or interrupted, or without room: at most what was in flight is lost, and the next run goes on.

That a kill loses no more than what was in flight, and that nothing else is paid twice, is checked by the bill.
"""

import asyncio
import itertools
import random
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from tests.conftest import Desk, Done, Process, numbered, rows_of
from tests.forks import CAN_FORK
from tests.gateway import Fault, Gateway
from tests.helpers import QUICK, brisk, until

pytestmark = pytest.mark.skipif(not CAN_FORK, reason="kills and cuts need Unix")

CONCURRENCY = 8
AT_ONCE = replace(QUICK, latency_s=0.0)


def check_complete(done: Done) -> None:
    """All is as if nothing had happened, and nothing lies about; the bill is checked anyway."""
    assert done.status == 0, done.stderr
    names = {path.name for path in done.output.parent.iterdir() if path.name.startswith("labels")}
    assert names == {"labels.jsonl", "labels.db"}


# ---- kill -9 -------------------------------------------------------------------------------------------


async def test_thirty_kills_at_random_moments_lose_no_more_than_is_in_flight(desk: Desk) -> None:
    moments = random.Random(4)
    brisk(desk, CONCURRENCY=CONCURRENCY)
    desk.write(numbered(400))
    async with Gateway(replace(QUICK, latency_s=0.03, jitter=0.5)) as gateway:
        for kill in range(30):
            seen = gateway.requests
            process = await desk.start(gateway)
            if kill % 4:  # most of them while it works, however long a busy machine takes to start it
                await until(lambda seen=seen: gateway.requests > seen)
                await asyncio.sleep(moments.uniform(0, 0.06))
            else:
                await asyncio.sleep(moments.uniform(0, 0.2))
            process.kill()
            done = await desk.finish(process)
            assert done.status == -signal.SIGKILL, "the job ended before all its kills; make it longer"
            await until(lambda: gateway.in_flight == 0)  # the gateway goes on with what it has, and bills it
        check_complete(await desk.run(gateway))


async def test_death_amid_a_write_to_the_ledger_at_any_byte_loses_no_more_than_is_in_flight(desk: Desk) -> None:
    moments = random.Random(5)
    brisk(desk, CONCURRENCY=4)
    desk.write(numbered(100))
    async with Gateway(AT_ONCE) as gateway:
        cuts = 0
        for _ in range(20):
            done = await desk.run(gateway, die_at_byte=moments.randrange(1, 60_000))
            cuts += done.status == -signal.SIGXFSZ
            if done.status == 0:
                break
        assert cuts >= 5
        check_complete(await desk.run(gateway))


# Dies at so manieth call of a function.
DIES = """
from itertools import count as calls_of
calls, real = calls_of(1), {call}
def dies(*given, **more):
    if next(calls) == {number}:
        os.kill(os.getpid(), 9)
    return real(*given, **more)
{call} = dies
"""
MOMENTS = {
    "before anything is sent": ("os.fsync", 1),
    "before it is synced": ("os.fsync", 2),
    "before its hash is synced": ("os.fsync", 3),
    "before it takes its place": ("os.replace", 1),
    "at the very end": ("Ledger.close", 1),
}


@pytest.mark.parametrize(("call", "number"), MOMENTS.values(), ids=MOMENTS)
async def test_a_kill_at_any_step_of_the_output_leaves_the_old_or_the_new_one_whole(
    desk: Desk, call: str, number: int
) -> None:
    old, tickets = numbered(40), numbered(80)
    brisk(desk)
    desk.write(old)
    async with Gateway(AT_ONCE) as gateway:
        await desk.run(gateway)
        before = desk.output.read_bytes()
        desk.write(tickets)
        desk.insert(DIES.format(call=call, number=number))
        killed = await desk.run(gateway)
        assert killed.status == -signal.SIGKILL
        assert desk.output.read_bytes() == before or list(killed.labels) == list(tickets)
        brisk(desk)
        check_complete(await desk.run(gateway))
        assert gateway.requests == 80, "all answers were in the ledger"


# ---- no room -------------------------------------------------------------------------------------------


async def test_a_ledger_that_cannot_grow_stops_the_run_and_the_next_completes_it(desk: Desk) -> None:
    brisk(desk, CONCURRENCY=4)
    desk.write(numbered(300))
    desk.loses(4)
    async with Gateway(replace(QUICK, latency_s=0.002)) as gateway:
        full = await desk.run(gateway, full_at_byte=200_000)
        assert full.status == 1
        assert 0 < gateway.answered <= len(full.ledger) + 4
        last = full.stdout.splitlines()[-1]
        assert last.startswith("Stopped: ")
        assert "labels.db: " in last
        assert "ree space or mend the disk" in last
        check_complete(await desk.run(gateway))


@pytest.fixture
def small_disk(desk: Desk) -> Iterator[Path]:
    """A disk of 8 MB, in the desk's folder, with room for 300 kB."""
    disk = desk.folder / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", disk]
    if sys.platform != "linux" or subprocess.run(command, check=False, capture_output=True).returncode:
        pytest.skip("only root can mount a small disk, on Linux")
    (disk / "ballast").write_bytes(b"x" * (8 * 2**20 - 300_000))
    yield disk
    subprocess.run(["umount", "-l", disk], check=True)


async def test_on_a_full_disk_no_run_pays_for_anything_before_it_can_write(desk: Desk, small_disk: Path) -> None:
    brisk(desk, CONCURRENCY=4)
    desk.write(numbered(400))
    desk.loses(4)
    options = ("-o", "disk/labels.jsonl")
    async with Gateway(replace(QUICK, latency_s=0.002)) as gateway:
        full = await desk.run(gateway, *options)
        assert (full.status, "full" in full.stdout) == (1, True)
        assert gateway.answered > 0
        for _ in range(2):
            asked = gateway.requests
            again = await desk.run(gateway, *options)
            assert again.status in (1, 2)
            assert gateway.requests <= asked + 4 * (again.status == 1)
            assert "labels.db" in again.stderr + again.stdout
        (small_disk / "ballast").unlink()
        check_complete(await desk.run(gateway, *options))


# ---- power cuts, and sleep -----------------------------------------------------------------------------

SLOW_DISK = """
import threading
def slow_sync(fd, sync=os.fsync):
    with open("syncs", "a") as log:
        print(time.time(), threading.current_thread() is threading.main_thread(), file=log)
    time.sleep(0.6)
    sync(fd)
os.fsync = slow_sync
"""


async def test_rows_are_put_on_the_disk_each_second_and_the_work_does_not_wait_for_it(desk: Desk) -> None:
    brisk(desk, CONCURRENCY=4)
    desk.insert(SLOW_DISK)
    desk.write(numbered(60))
    async with Gateway(replace(QUICK, latency_s=0.2)) as gateway:
        assert (await desk.run(gateway)).status == 0
    times = sorted(item.ended_at for item in gateway.bill)
    gaps = sorted(b - a for a, b in itertools.pairwise(times))
    assert gaps[-2] < 0.5, "an fsync of 0.6 s held up the work, and more than once"
    syncs = [line.split() for line in (desk.folder / "syncs").read_text().splitlines()]
    during = [float(at) for at, is_main in syncs if is_main == "False"]
    assert len(during) >= 2
    assert all(b - a < 2.0 for a, b in itertools.pairwise(during))
    assert (syncs[0][1], syncs[-1][1]) == ("True", "True"), "before anything is sent, and at the end"


# What was answered meanwhile is there, but later than TIMEOUT: it counts as perhaps billed.
@pytest.mark.breaks("answer-kept", "answered-once")
async def test_a_laptop_that_slept_goes_on(desk: Desk) -> None:
    brisk(desk, TIMEOUT=1.5, STUCK_S=2.0, CONCURRENCY=20)
    desk.write(numbered(4))
    async with Gateway(replace(QUICK, latency_s=1.0)) as gateway:
        process = await desk.start(gateway)
        await until(lambda: gateway.in_flight)
        process.send_signal(signal.SIGSTOP)
        await asyncio.sleep(2.5)
        process.send_signal(signal.SIGCONT)
        assert (await desk.finish(process)).status == 0


async def test_the_hours_of_sleep_are_no_hours_of_failures(desk: Desk) -> None:
    brisk(desk, STUCK_S=3, MAX_RETRIES=30, CONCURRENCY=2)
    desk.write(numbered(6))
    script = replace(QUICK, latency_s=0.02, retry_after="0.2", faults=(Fault("status_429_retry", last=6),))
    async with Gateway(script) as gateway:
        process = await desk.start(gateway)
        await until(lambda: gateway.faulted >= 3)
        process.send_signal(signal.SIGSTOP)
        await asyncio.sleep(3.5)
        process.send_signal(signal.SIGCONT)
        assert (await desk.finish(process)).status == 0


# ---- signals -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
async def test_the_first_signal_lets_what_is_in_flight_finish(desk: Desk, number: int) -> None:
    tickets = numbered(60)
    brisk(desk, CONCURRENCY=CONCURRENCY)
    desk.write(tickets)
    async with Gateway(replace(QUICK, latency_s=0.3)) as gateway:
        process = await desk.start(gateway)
        await until(lambda: gateway.answered and gateway.in_flight)
        process.send_signal(number)
        done = await desk.finish(process)
        assert done.status == 130
        assert "interrupted: waiting for what is in flight; Ctrl-C again ends at once" in done.stderr
        assert 0 < len(done.labels) < len(tickets)
        assert {tickets[id_] for id_ in done.labels} == set(gateway.billed), "paid, and not waited for"
        gateway.script = AT_ONCE
        check_complete(await desk.run(gateway))


async def test_under_nohup_a_closed_terminal_does_not_end_the_run(desk: Desk) -> None:
    brisk(desk, CONCURRENCY=4)
    desk.insert("signal.signal(signal.SIGHUP, signal.SIG_IGN)")  # as nohup has it
    desk.write(numbered(30))
    async with Gateway(replace(QUICK, latency_s=0.05)) as gateway:
        process = await desk.start(gateway)
        await until(lambda: gateway.answered)
        process.send_signal(signal.SIGHUP)
        assert (await desk.finish(process)).status == 0


async def test_a_second_signal_ends_the_run_at_once(desk: Desk) -> None:
    brisk(desk, CONCURRENCY=CONCURRENCY)
    desk.write(numbered(40))
    async with Gateway(replace(AT_ONCE, faults=(Fault("hang", first=6),))) as gateway:
        process = await desk.start(gateway)
        await until(lambda: gateway.in_flight and gateway.answered == 5)
        await until(lambda: len(rows_of(desk.ledger)) == 5)
        process.send_signal(signal.SIGINT)
        await until_it_says(process, b"Ctrl-C again ends at once")
        process.send_signal(signal.SIGINT)
        async with asyncio.timeout(1):
            assert await process.wait() == 130
        await desk.finish(process)
        gateway.script = AT_ONCE
        check_complete(await desk.run(gateway))


async def until_it_says(process: Process, word: bytes) -> None:
    """Waits for a line of stderr with this word in it."""
    async with asyncio.timeout(20):
        while word not in (line := await process.stderr.readline()):
            assert line, f"it never said {word!r}"


async def test_a_signal_ends_every_wait(desk: Desk) -> None:
    brisk(desk, STUCK_S=60)
    desk.write(numbered(5))
    async with Gateway(replace(QUICK, retry_after="55", faults=(Fault("status_429_retry"),))) as gateway:
        process = await desk.start(gateway)
        await until(lambda: gateway.faulted)
        await asyncio.sleep(0.2)
        process.send_signal(signal.SIGINT)
        assert (await desk.finish(process, within_s=2)).status == 130

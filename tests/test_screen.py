"""What the screen says while a run is at it: never silent, and always why."""

import asyncio
import itertools
import json
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from unittest import mock

import pytest

import classify
from tests.conftest import Desk, numbered
from tests.gateway import Fault, Gateway
from tests.helpers import QUICK, Drawn, brisk, on_terminal, until
from tests.machine import Machine

WAITING = r"waiting: (.+), tried (\d+) times?, gives up in (\d+):(\d\d)"
NOBODY = "127.0.0.1:9"  # the port "discard", where nobody listens
DOWN = {"TOKENHUB_URL": f"http://{NOBODY}/v1"}


def seconds(minutes: str, seconds: str) -> int:
    return 60 * int(minutes) + int(seconds)


def countdowns(text: str) -> list[int]:
    """Of all that was said, in how many seconds the run gives up."""
    return [seconds(*match[-2:]) for match in re.findall(WAITING, text)]


def times(drawn: Drawn) -> list[int]:
    """The clock of the bar, each time that it was drawn."""
    clocks = [re.match(r"(?:.*\[)?(\d\d):(\d\d)\b", frame) for frame in drawn.frames]
    return [seconds(*clock.groups()) for clock in clocks if clock]


# ---- On a terminal


async def test_a_good_run_draws_how_far_it_is_at_what_pace_and_what_it_cost(desk: Desk):
    brisk(desk)
    desk.write(numbered(40))
    async with Gateway(replace(QUICK, rpm=1200)) as gateway:
        drawn = await on_terminal(desk, gateway, "--rpm", "1200")
    assert drawn.status == 0
    report_at = drawn.screen.index("Classified 40 tickets")
    bar = drawn.screen[report_at - 1]
    assert re.fullmatch(r"100%\|█+\| 40/40 \[00:0\d<00:00, +\d+\.\d+ tickets/s, \$0\.00\d+\]", bar)
    assert "waiting" not in drawn.text


async def test_a_server_that_is_down_is_named_with_the_tries_and_the_time_left_at_any_width(desk: Desk):
    brisk(desk, QUIET_S=1, BACKOFF_MAX_S=0.4)
    desk.write(numbered(60))

    def run(columns: int) -> object:
        at_3_s = r"\b00:03\b"
        return on_terminal(desk, None, "-o", f"{columns}.jsonl", columns=columns, interrupt_at=at_3_s, **DOWN)

    for drawn in await asyncio.gather(*map(run, (120, 80, 24))):
        assert drawn.status == 130
        assert times(drawn) == sorted(times(drawn))
        assert len(set(times(drawn))) > 2, "the clock goes on"
        said = "".join(drawn.screen)
        assert re.search(f"waiting: no connection to {NOBODY}, tried \\d+ times?, gives up in 4:5\\d", said)
        if drawn.columns >= 80:
            left = countdowns(drawn.text)
            assert left == sorted(left, reverse=True)
            assert len(set(left)) > 1, "and so does the time that is left"


async def test_above_the_report_stands_the_bar_and_not_the_last_trouble(desk: Desk):
    brisk(desk, QUIET_S=0)
    desk.write(numbered(60))
    drawn = await on_terminal(desk, None, interrupt_at="00:01 waiting: ", **DOWN)
    report_at = drawn.screen.index("Classified 0 tickets")
    assert re.match(r" *0%\|.*0/60 \[00:0", drawn.screen[report_at - 1])


async def test_a_gateway_that_dies_midway_stops_neither_the_clock_nor_the_word(desk: Desk):
    brisk(desk, QUIET_S=1, BACKOFF_MAX_S=0.4, CONCURRENCY=4)
    desk.write(numbered(400))
    async with Gateway(replace(QUICK, latency_s=0.05)) as gateway:
        run = asyncio.create_task(on_terminal(desk, gateway, columns=120, interrupt_at=r"\b00:03\b"))
        await until(lambda: gateway.answered >= 20)
    drawn = await run
    assert drawn.status == 130
    dead = [frame for frame in drawn.frames if "waiting: " in frame]
    assert len(set(countdowns("\n".join(dead)))) > 1
    assert len(set(times(drawn))) > 2
    words = [frame for frame in drawn.frames if frame.startswith("no connection to ")]
    assert len(words) == 1, "an error is shown when it comes, and then counted"


async def test_no_terminal_is_left_in_a_mess(desk: Desk):
    brisk(desk)
    desk.write(numbered(20) | {"bad": "impossible"})
    faults = (Fault("status_400", matching="impossible"), Fault("status_503", every=9))

    async def run(environment: dict[str, str]) -> Drawn:
        arguments = "--rpm", "1800", "-o", f"{len(environment)}{''.join(environment)}.jsonl"
        async with Gateway(replace(QUICK, rpm=1800, faults=faults)) as gateway:
            return await on_terminal(desk, gateway, *arguments, columns=24, **environment)

    for drawn in await asyncio.gather(*map(run, ({}, {"NO_COLOR": "1"}, {"LC_ALL": "C"}, {"TERM": "dumb"}))):
        assert drawn.status == 1
        assert "\x1b" not in drawn.text
        # Above the report stand the plan, two errors, and once the bar, as it was in the end.
        above = drawn.screen[: drawn.screen.index("Classified 20 tickets")]
        assert [line for line in above if "/21 [" in line] == above[-1:]
        assert "503 service_unavailable" in "".join(above)
        assert "ticket bad failed: 400 invalid_request" in "".join(above)


# ---- In a log file


async def test_the_first_error_of_each_reason_is_shown_and_then_counted(desk: Desk):
    brisk(desk)
    desk.write(numbered(40))
    faults = (Fault("status_503", every=3), Fault("status_500", every=7))
    async with Gateway(replace(QUICK, faults=faults)) as gateway:
        done = await desk.run(gateway)
    statuses = [status for _, status in gateway.events]
    assert not {"\r", "\x1b"} & set(done.stderr)
    assert [line[:3] for line in done.stderr.splitlines()[2:]] == ["503", "500"]
    [line] = [line for line in done.stdout.splitlines() if line.startswith("Errors on the way: ")]
    assert f"503 service_unavailable server_error ({statuses.count(503)})" in line
    assert f"500 internal_error server_error ({statuses.count(500)})" in line


async def test_the_first_ticket_that_fails_for_each_reason_is_shown_and_all_are_counted(desk: Desk):
    brisk(desk)
    desk.write(numbered(30) | {f"f{n}": f"firewall {n}" for n in range(4)} | {f"c{n}": f"filter {n}" for n in range(3)})
    faults = (Fault("firewall_403", matching="firewall"), Fault("content_filter", matching="filter"))
    async with Gateway(replace(QUICK, faults=faults)) as gateway:
        done = await desk.run(gateway)
    [filtered, blocked] = sorted(done.stderr.splitlines()[2:])
    assert re.match("ticket c. failed: .*content_filter", filtered)
    assert re.match("ticket f. failed: 403: Attention Required! You have been blocked", blocked), "words of a page"
    blocked = "403: Attention Required! You have been blocked"
    assert f"Failed: 4 tickets (f0, f1, f2, ...): {blocked}\n" in done.stdout
    assert re.search("^[^:]+: 3 tickets .c0, c1, c2.: .*content_filter$", done.stdout, re.M)


async def test_reading_a_large_file_is_told(desk: Desk):
    desk.edit(SILENCE_S=0)
    desk.write(numbered(3))
    done = await desk.run(None, "--dry-run")
    assert "reading tickets.csv: 1 ticket so far" in done.stderr


# ---- Whole nights, in virtual time: what is said, and when


@dataclass(frozen=True)
class Said:
    """A line on stderr, and at which second of the run."""

    at_s: float
    line: str


class Server:
    """Takes so many seconds for a request, and answers with this status, as `reply` says by second and number."""

    def __init__(self, reply: Callable[[float, int], tuple[float, int]]):
        self.reply = reply
        self.numbers = itertools.count(1)

    def session(self, job: object) -> "Server":
        return self

    async def __aenter__(self) -> "Server":
        return self

    async def __aexit__(self, *_: object) -> None:
        pass

    def post(self, *_: object, **__: object) -> "Response":
        return Response(self)

    def is_booked(self, is_done: bool) -> None:
        pass

    def is_synced(self) -> None:
        pass


class Response:
    """A request, and what comes of it."""

    def __init__(self, server: Server):
        self.server = server
        self.headers: dict[str, str] = {}
        self.content = self

    async def __aenter__(self) -> "Response":
        loop = asyncio.get_running_loop()
        took_s, self.status = self.server.reply(loop.time(), next(self.server.numbers))
        async with asyncio.timeout(classify.TIMEOUT):
            await asyncio.sleep(took_s)
        usage = {"prompt_tokens": 300, "completion_tokens": 2}
        choice = {"message": {"content": "bug"}, "finish_reason": "stop"}
        answer = {"choices": [choice], "usage": usage} if self.status == 200 else {"error": {"code": "busy"}}
        self.raw = json.dumps(answer).encode()
        return self

    async def __aexit__(self, *_: object) -> None:
        pass

    async def readany(self) -> bytes:
        raw, self.raw = self.raw, b""
        return raw


def night(
    folder: Path,
    reply: Callable[[float, int], tuple[float, int]],
    tickets: int,
    *arguments: str,
    interrupt_at_s: float | None = None,
) -> tuple[int, list[Said]]:
    """Runs the program in virtual time with stderr in a file; its exit status, and what it said."""
    (folder / "tickets.csv").write_text("id,body\n" + "".join(f"{n},ticket {n}\n" for n in range(tickets)))
    machine = Machine(folder, Server(reply))
    if interrupt_at_s is not None:
        machine.at_s.append((interrupt_at_s, lambda: machine.send_signal(2)))
    said = []

    def hear(message: str) -> None:
        said.extend(Said(machine.clock.now, line) for line in message.splitlines())

    with mock.patch.object(classify, "say", hear):
        files = str(folder / "tickets.csv"), "-o", str(folder / "labels.jsonl")
        done = machine.run([*files, *arguments])
    assert not done.error
    return done.status, said


def lines(said: list[Said]) -> list[str]:
    return [one.line for one in said]


def test_a_server_that_is_down_is_told_within_ten_seconds_and_then_each_minute(tmp_path: Path):
    status, said = night(tmp_path, lambda now, n: (0.1, 503), 100)
    assert status == 1
    assert said[2].line.startswith("503 busy")
    assert said[2].at_s < 1
    waits = [one for one in said if one.line.startswith("waiting: 503 busy, tried ")]
    assert waits[0].at_s < 10
    assert all(later.at_s - one.at_s <= 61 for one, later in itertools.pairwise(waits))
    assert 5 <= len(waits) <= 7
    for one in waits:
        assert countdowns(one.line)[0] == pytest.approx(300 - one.at_s, abs=2)


def test_a_log_file_gets_a_line_a_minute(tmp_path: Path):
    status, said = night(tmp_path, lambda now, n: (0.5, 200), 2000)
    assert status == 0
    minutes = said[2:]
    assert [round(one.at_s / 60) for one in minutes] == [1, 2, 3]
    for one in minutes:
        [(number, per_s, usd, left)] = re.findall(
            r"^08:0\d ([\d,]+) of 2,000, (\d+\.\d)/s, \$(\d\.\d+), about (.*) left$", one.line
        )
        labelled = int(number.replace(",", ""))
        assert float(per_s) == pytest.approx(9.9, abs=0.2)
        assert float(usd) == pytest.approx(labelled * (300 * 0.27 + 2 * 1.10) / 1e6, abs=0.006)
        minutes, seconds = re.fullmatch(r"(?:(\d) min ?)?(?:(\d+) s)?", left).groups()
        assert 60 * int(minutes or 0) + int(seconds or 0) == pytest.approx((2000 - labelled) / 9.9, abs=31)


def test_trouble_is_told_when_it_begins_and_when_it_ends_and_between_the_minutes_pass(tmp_path: Path):
    status, said = night(tmp_path, lambda now, n: (0.5, 503 if 60.5 < now < 150 else 200), 3000)
    assert status == 0
    [begins] = [one.at_s for one in said if one.line.startswith("waiting: ") and one.at_s < 75]
    [ends] = [one.at_s for one in said if one.line == "going on: answers come again"]
    assert 60 < begins < 71
    assert 150 < ends < 165
    minutes = [one for one in said if re.match(r"\d\d:\d\d [\d,]+ of 3,000, ", one.line)]
    assert len(minutes) >= 3
    assert all(58 <= later.at_s - one.at_s <= 122 for one, later in itertools.pairwise(minutes))


def test_a_slow_server_does_not_fill_a_log_file(tmp_path: Path):
    status, said = night(tmp_path, lambda now, n: (12, 200), 100, "--concurrency", "1")
    assert status == 0
    assert len(said) <= 2 + 2 + 20, "it takes 20 minutes"


def test_a_slow_pace_is_not_taken_for_slow_answers(tmp_path: Path):
    status, said = night(tmp_path, lambda now, n: (0.5, 200), 20, "--rpm", "3")
    assert status == 0
    assert len(said) <= 2 + 2 + 7
    assert not [line for line in lines(said) if "0 answers" in line]


def test_a_stop_says_within_ten_seconds_what_it_still_waits_for(tmp_path: Path):
    status, said = night(tmp_path, lambda now, n: (50, 200) if n == 3 else (0.2, 200 if n < 30 else 402), 100)
    assert status == 1
    [refused] = [one.at_s for one in said if one.line.startswith("402")]
    after = [one for one in said if refused < one.at_s < refused + 10]
    assert [one.line for one in after] == ["stopping: 402, payment is required; waits for 1 answer, at most 1 min"]


def test_ctrl_c_in_an_outage_is_no_news_of_answers(tmp_path: Path):
    status, said = night(tmp_path, lambda now, n: (50, 200) if n == 3 else (0.2, 503), 100, interrupt_at_s=10)
    assert status == 130
    assert any(line.startswith("waiting: 503") for line in lines(said))
    assert any(line.startswith("interrupted: ") for line in lines(said))
    assert any(line.startswith("stopping: interrupted; waits for ") for line in lines(said))
    assert not [line for line in lines(said) if "answers come again" in line]


def test_hung_requests_are_waited_for_in_words(tmp_path: Path):
    status, said = night(tmp_path, lambda now, n: (45, 200), 3, "--concurrency", "1")
    assert status == 0
    assert any(re.match(r"waiting for 1 answer, .* 1[4-6] s", line) for line in lines(said))

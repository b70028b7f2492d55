"""Whole nights of classify.py in virtual time, each drawn from a seed: what must never happen?

`python -m tests.simulate [--nights N] [--seed K]` simulates N nights from seed K on, and says which
promises were broken, each with its seed; `--nights 1 --seed K --show` replays one and shows it.

A night: some runs on one ledger against a server with a limit, faults of all kinds, outages, kills,
power cuts, a full disk, an editor at the output, settings that change. After each run the bill is
checked (tests/bill.py). Then all faults stop, and every ticket must have its label within twice the
time that the limit allows plus a minute.
"""

import argparse
import asyncio
import hashlib
import heapq
import json
import math
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import time
import traceback
import zlib
from collections import Counter, deque
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from functools import lru_cache
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import aiohttp

import classify
from tests.bill import broken_promises, ledger_rows, output_lines
from tests.conftest import forget_settings
from tests.gateway import (
    ANSWERED,
    CUT,
    ERRORS,
    HUNG,
    REFUSED,
    Bucket,
    FixedWindow,
    Item,
    SlidingWindow,
    answer_in,
    text_of,
    tokens_told,
)
from tests.machine import KEY, Clock, Done, Machine

MEMORY = "/dev/shm" if os.path.isdir("/dev/shm") else None  # a folder that costs no disk
LABELS = list(classify.LABELS)
SLACK_S = 60.0  # liveness: twice what the limit allows, and this
# A pace that many refusals made low takes so much longer to rise again.
LEARN_S = 300.0
# With one request at a time 20 tickets in vain take so long, until the run stops.
IDLE_S = 3500.0

# ---- the server ----


@dataclass(frozen=True)
class Fault:
    """Something that goes wrong with some requests of a run."""

    name: str
    share: float = 1.0
    begins_s: float = 0.0
    ends_s: float = math.inf


@dataclass(frozen=True)
class World:
    """What stays the same for a night."""

    limiter: str = ""  # none; else "bucket", "sliding", "fixed"
    per_s: float = math.inf  # the limit
    counts_refused: bool = False
    most_in_flight: int = 0  # above that 429
    slots: int = 0  # requests that it works on at a time, while others queue
    latency_s: float = 0.3
    form: str = "seconds"  # of Retry-After
    told_rpm: float = 600
    concurrency: int = 40
    timeout_s: float = 60.0
    has_cache: bool = False

    def limits(self) -> Iterator[float]:
        """Answers a second at most, by each thing that limits them."""
        yield self.per_s
        yield 0.99 * self.told_rpm / 60 if self.told_rpm else math.inf
        yield min(self.concurrency, self.most_in_flight or math.inf) / (1.5 * self.latency_s)
        yield self.slots / self.latency_s if self.slots else math.inf


@dataclass
class Call:
    """A request at the server."""

    number: int
    at: float
    body: dict
    text: str
    turn: int
    asked: str
    prompt: str
    work: dict | None = None  # its usage, once it is worked on
    ended: str = HUNG


def refusal(status: int, code: str, kind: str = "error", **headers: str) -> tuple:
    """A response without any work."""
    error = {"type": kind, "code": code, "message": f"{code}, key {KEY}"}
    return status, headers, json.dumps({"error": error}).encode()


REFUSALS = {f"{status}": refusal(status, code, kind) for status, (kind, code) in ERRORS.items()}
REFUSALS |= {
    "429 quota": refusal(429, "insufficient_quota"),
    "429, 5 s": refusal(429, "rate_limit_exceeded", **{"retry-after": "5"}),
    "429, 30 s": refusal(429, "rate_limit_exceeded", **{"retry-after": "30"}),
    "429, 500 s": refusal(429, "rate_limit_exceeded", **{"retry-after": "500"}),
    "429, 700 s": refusal(429, "rate_limit_exceeded", **{"retry-after": "700"}),
    "503, 1 s": refusal(503, "overloaded", **{"retry-after": "1"}),
    "503 model": refusal(503, "model_not_found"),
    "400 parameter": refusal(400, "unsupported_parameter"),
    "400 busy": refusal(400, "capacity_exceeded"),
    "403 page": (403, {}, b"<html><title>Forbidden</title>firewall</html>"),
    "524": (524, {}, b"<html>timeout</html>"),
    "302": (302, {"location": "http://elsewhere/"}, b""),
    "200 error": (200, {}, b'{"error": {"code": 503, "message": "upstream"}}'),
    "200 error inside": (200, {}, b'{"choices": [{"error": {"code": 429, "message": "slow"}}]}'),
    "200 error text": (200, {}, b'{"error": "Unexpected endpoint or method."}'),
}
BROKEN = ["no connection", "lost", "lost after work", "hangs", "hangs at work", "not secure"]
ANSWERS = [
    *("slow", "torn", "blank", "page", "shape", "cut off", "cut off empty", "cut at a label"),
    *("empty", "withheld", "broken off", "off list", "never on the list", "no usage", "long words"),
]
FAULTS = [*REFUSALS, *BROKEN, *ANSWERS]
# Those that end a run soon if they are all that comes, so that they are drawn less often.
ENDS_RUNS = {"401", "402", "404", "405", "302", "400 parameter", "503 model", "not secure"}
ENDS_RUNS |= {"429, 700 s", "429, 500 s"}
# What else can happen to a run.
HAPPENINGS = [
    *("nothing", "nothing", "kill", "kill at a call", "kill at the end"),
    *("power", "power at a call", "ctrl-c", "ctrl-c twice"),
    *("disk", "call fails", "all calls fail", "editor", "editor"),
]
DRESSES = ("{}", "{}", "{}.", "**{}**", "Label: {}", '{{"label": "{}"}}', "{} issue")


class Server:
    """Answers as its world says and its faults let it; keeps the bill."""

    def __init__(self, world: World, seed: str, clock: Clock):
        self.world = world
        self.random = random.Random(seed)
        self.clock = clock
        self.limiter = self.new_limiter()
        self.free_at = [0.0] * world.slots
        self.bill: list[Item] = []
        self.open: dict[int, Call] = {}
        self.numbers = count(1)
        self.faults: list[Fault] = []
        self.run_began_at = 0.0
        self.calm_at = math.inf  # from then on nothing goes wrong any more
        self.promised_at = 0.0  # when the last thing is over that began before
        self.wrong: list[str] = []  # that was seen at once
        self.stopped_at: float | None = None  # when the run said that it sends nothing more
        self.starts: deque[float] = deque()  # of the last minute
        self.is_alone = False  # the client is dead
        self.answered_at = 0.0
        self.calm_answers = 0
        self.was_limited = False  # by a fault, in this run
        self.unnamed: set[str] = set()  # replies that let this run stop
        self.unbooked = 0  # from here on in the bill
        self.unsynced = 0
        self.trace: list[str] | None = None

    def new_limiter(self):
        world = self.world
        if world.limiter == "bucket":
            return Bucket(world.per_s, 5, world.counts_refused)
        if world.limiter:
            kind = {"sliding": SlidingWindow, "fixed": FixedWindow}[world.limiter]
            return kind(max(1, round(world.per_s * 20)), 20.0, world.counts_refused)
        return None

    def session(self, job: object) -> "Session":
        return Session(self)

    def note(self, text: str):
        if self.trace is not None:
            self.trace.append(f"{self.clock.now:10.3f} {text}")

    def is_booked(self, is_done: bool):
        """The program has added a row, or could not: then its answer is lost."""
        if not is_done:
            self.loses(self.unbooked)
        self.unbooked = len(self.bill)

    def is_synced(self):
        """What came so far survives a power cut."""
        self.unsynced = len(self.bill)

    def loses(self, first: int):
        """The program cannot know of these any more; nobody asks money for them."""
        for number in range(first, len(self.bill)):
            item = self.bill[number]
            if item.ended == ANSWERED:
                self.note(f"request {item.number} is lost")
                item = replace(item, ended=CUT, tokens_in=0, tokens_out=0)
            # Nor of what it asked because of them.
            self.bill[number] = replace(item, turn=0)

    def client_dies(self, by_power: bool):
        """All that is in flight is of no use to anybody."""
        self.is_alone = True
        self.loses(self.unsynced if by_power else self.unbooked)
        for call in list(self.open.values()):
            call.work = None
            call.turn = 0
            self.close(call, CUT)

    # ---- one request ----

    def arrive(self, data: bytes) -> Call:
        now = self.clock.now
        body = json.loads(data)
        messages = body["messages"]
        call = Call(
            next(self.numbers),
            now,
            body,
            text=messages[1]["content"],
            turn=sum(message["role"] == "user" for message in messages),
            asked=hashlib.blake2b(data, digest_size=12).hexdigest(),
            prompt=f"{body['model']} {zlib.crc32(messages[0]['content'].encode())}",
        )
        self.open[call.number] = call
        self.check_arrival(now)
        return call

    def check_arrival(self, now: float):
        """What a client may not do, whatever the world is."""
        if self.stopped_at is not None:
            self.wrong.append(f"sent at {now:.1f}, but stopped at {self.stopped_at:.1f}")
        if len(self.open) > self.world.concurrency:
            self.wrong.append(f"{len(self.open)} in flight of {self.world.concurrency}")
        self.starts.append(now)
        while self.starts[0] <= now - 60:
            self.starts.popleft()
        told = self.world.told_rpm
        if told and len(self.starts) > told + 2:
            self.wrong.append(f"{len(self.starts)} requests in a minute, told {told:g}")

    def close(self, call: Call, ended: str, **fields: object):
        if self.open.pop(call.number, None) is None:
            return
        if call.work and ended != ANSWERED:
            fields = tokens_told(call.work)
        item = Item(
            call.number,
            ended,
            call.asked,
            call.prompt,
            call.text,
            call.turn,
            call.body["model"],
            asked_at=call.at,
            ended_at=self.clock.now,
            **fields,
        )
        self.bill.append(item)
        self.note(f"request {call.number} {ended}: {call.text[:30]!r} turn {call.turn} {item.reply!r}")

    def taken(self, call: Call, status: int, raw: bytes):
        """The client has read a whole response."""
        read = answer_in(raw) if status == 200 else None
        if read is None:
            self.note(f"request {call.number}: {status} {raw[:60]!r}")
            return self.close(call, CUT if call.work else REFUSED)
        answer, choice = read
        told = tokens_told(answer.get("usage"))
        fields = (told or tokens_told(call.work)) | {"was_told": bool(told)}
        if any(item.ended == ANSWERED for item in self.bill[self.unbooked :]):
            self.wrong.append("an answer was not booked at once")
        self.unbooked = len(self.bill)
        self.answered_at = self.clock.now
        self.calm_answers += self.clock.now >= self.calm_at
        reply, finish = text_of(choice["message"].get("content")), choice.get("finish_reason")
        if finish == "length" and named_label(reply):
            # Whole enough (R3), which an Item does not know.
            finish = "stop"
        self.close(call, ANSWERED, reply=reply, finish_reason=finish, **fields)

    def promise(self, seconds: float):
        """Something that began before the calm lasts so long."""
        if self.clock.now < self.calm_at:
            self.promised_at = max(self.promised_at, self.clock.now + seconds)

    def fault_of(self, call: Call) -> str:
        if self.clock.now >= self.calm_at:
            return ""
        if poison := re.match(r"poison (.*):", call.text):
            return poison[1]
        since_s = self.clock.now - self.run_began_at
        for fault in self.faults:
            if fault.begins_s <= since_s < fault.ends_s and self.random.random() < fault.share:
                return fault.name
        return ""

    async def respond(self, call: Call) -> tuple[int, dict, bytes]:
        """Status, headers and body; or what the client raises."""
        await asyncio.sleep(0.005)
        fault = self.fault_of(call)
        if fault in BROKEN:
            return await self.break_off(call, fault)
        wait_s = self.limiter.wait_s(self.clock.now) if self.limiter else 0.0
        if wait_s or (0 < self.world.most_in_flight < len(self.open)):
            await asyncio.sleep(0.02)
            return self.limited(wait_s)
        if fault in REFUSALS:
            await asyncio.sleep(0.05)
            status, headers, raw = REFUSALS[fault]
            self.was_limited |= status == 429 or bool(headers) or fault == "200 error inside"
            self.promise(float(headers.get("retry-after", 0)))
            return status, headers, raw
        return await self.work(call, fault)

    def limited(self, wait_s: float) -> tuple[int, dict, bytes]:
        """A 429 of the limit itself."""
        status, _, raw = REFUSALS["429"]
        form = self.world.form if wait_s else "none"
        headers = {
            "seconds": {"retry-after": f"{math.ceil(wait_s)}"},
            "float": {"retry-after": f"{wait_s + 0.001:.3f}"},
            "ms": {"retry-after-ms": f"{math.ceil(1000 * wait_s)}"},
            "date": {"retry-after": self.clock.date(wait_s + 1), "date": self.clock.date()},
            "date alone": {"retry-after": self.clock.date(wait_s + 1)},
            "none": {},
        }[form]
        return status, headers, raw

    async def break_off(self, call: Call, fault: str) -> tuple:
        where = SimpleNamespace(host="localhost", port=80, ssl=True, is_ssl=True)
        if fault == "no connection":
            raise aiohttp.ClientConnectorError(where, OSError(111, "Connection refused"))
        if fault == "not secure":
            raise aiohttp.ClientConnectorCertificateError(where, OSError("self-signed"))
        self.promise(self.world.timeout_s)
        if fault == "hangs":
            await asyncio.sleep(1e6)
        self.begin_work(call, "x")
        if fault == "hangs at work":
            await asyncio.sleep(1e6)
        await asyncio.sleep(self.world.latency_s)
        if fault == "lost":
            call.work = None
        raise aiohttp.ServerDisconnectedError

    async def work(self, call: Call, fault: str) -> tuple[int, dict, bytes]:
        world = self.world
        took_s = world.latency_s * self.random.uniform(0.5, 1.5)
        if world.slots:
            begin = max(self.clock.now, heapq.heappop(self.free_at))
            took_s = begin + world.latency_s - self.clock.now
            heapq.heappush(self.free_at, self.clock.now + took_s)
        if fault == "slow":
            took_s *= 20
        if took_s > 1:
            self.promise(min(took_s, world.timeout_s))
        reply, finish = self.reply(call, fault)
        self.begin_work(call, reply)
        await asyncio.sleep(took_s)
        return 200, {}, self.body(call, fault, reply, finish)

    def begin_work(self, call: Call, reply: str):
        """From here on it is paid for; as much as the client is told, and can expect at worst."""
        asked = sum(len(message["content"]) for message in call.body["messages"])
        tokens_in = 5 + asked // 5
        tokens_out = min(max(1, len(reply) // 4), call.body["max_tokens"])
        call.work = {"prompt_tokens": tokens_in, "completion_tokens": tokens_out}
        if self.world.has_cache:
            call.work["prompt_cache_hit_tokens"] = min(tokens_in, 64)

    def reply(self, call: Call, fault: str) -> tuple[str, str]:
        """What the model says, and its finish_reason."""
        label = LABELS[zlib.crc32(call.text.encode()) % len(LABELS)]
        dressed = self.random.choice(DRESSES).format(label)
        if fault == "never on the list" or (fault == "off list" and call.turn == 1):
            return self.random.choice(["I cannot tell.", "thank-you", "Not sure, perhaps two"]), "stop"
        return {
            "cut off": ("The customer says that", "length"),
            "cut off empty": ("", "length"),
            "cut at a label": (label, "length"),
            "empty": ("", "stop"),
            "withheld": (label, "content_filter"),
            "broken off": (label[:1], "error"),
            "long words": (dressed + "\n" * 5000, "stop"),
        }.get(fault, (dressed, self.random.choice(["stop", "stop", "eos", None])))

    def body(self, call: Call, fault: str, reply: str, finish: str | None) -> bytes:
        choice = {"message": {"role": "assistant", "content": reply}, "finish_reason": finish}
        answer = {"choices": [choice], "usage": call.work}
        if fault == "no usage":
            del answer["usage"]
        raw = json.dumps(answer).encode()
        odd = {
            "torn": raw[: len(raw) // 2],
            "blank": b"\n" * 20,
            "page": b"<html>Welcome</html>",
            "shape": json.dumps({"result": reply, "usage": call.work}).encode(),
        }
        return odd.get(fault, raw)


class Session:
    """What the program has of aiohttp."""

    def __init__(self, server: Server):
        self.server = server

    async def __aenter__(self) -> "Session":
        return self

    async def __aexit__(self, *_: object):
        pass

    def post(self, url: object, *, data: bytes, **_: object) -> "Exchange":
        return Exchange(self.server, data)


class Exchange:
    """A request and its response."""

    def __init__(self, server: Server, data: bytes):
        self.server = server
        self.data = data
        self.content = self

    async def __aenter__(self) -> "Exchange":
        if self.server.is_alone:
            await asyncio.sleep(1e6)
        self.call = self.server.arrive(self.data)
        try:
            async with asyncio.timeout(classify.TIMEOUT):
                self.status, self.headers, self.raw = await self.server.respond(self.call)
        except BaseException as error:
            is_hung = isinstance(error, TimeoutError) and not self.call.work
            self.server.note(f"request {self.call.number}: {type(error).__name__}")
            self.server.close(self.call, HUNG if is_hung else CUT)
            raise
        return self

    async def __aexit__(self, *_: object):
        pass

    async def readany(self) -> bytes:
        raw, self.raw = self.raw, b""
        if self.call.number in self.server.open:
            self.server.taken(self.call, self.status, raw)
        return raw


# ---- the night ----


@lru_cache(maxsize=100_000)
def named_label(reply: str) -> str | None:
    return classify.named_label(reply)


def is_unnamed(item: Item) -> bool:
    """Whether it is a last reply, and names no label."""
    return item.turn == 2 and item.is_complete and named_label(item.reply) is None


def counted(tickets: int) -> str:
    return f"{tickets} ticket" + "s" * (tickets != 1)


@dataclass(frozen=True)
class Settings:
    """What a user may change between two runs."""

    prompt: str = classify.SYSTEM_PROMPT
    model: str = "deepseek-chat"
    chinese_model: str | None = None
    fallback: str | None = "other"
    budget_usd: float = 2.0
    sample: int | None = None


@dataclass
class Night:
    """Everything that follows from one seed."""

    seed: int
    folder: Path
    is_shown: bool = False
    broken: list[str] = field(default_factory=list)

    def __post_init__(self):
        self.random = random.Random(f"night {self.seed}")
        self.clock = Clock()
        self.world = self.draw_world()
        self.server = Server(self.world, f"server {self.seed}", self.clock)
        self.server.trace = [] if self.is_shown else None
        self.tickets = self.draw_tickets()
        self.suffix = self.random.choice([".jsonl", ".jsonl", ".csv"])
        self.machine = Machine(self.folder / "0", self.server, self.clock)
        self.machine.folder.mkdir()
        self.settings = Settings(budget_usd=self.draw_budget())
        self.wanted: list[dict[str, str]] = []  # the tickets of each run
        self.budgets: list[float] = []
        self.disregarded: set[str] = set()  # replies of runs that named too few labels
        self.was_limited = False
        self.calm_s = 0.0  # how long the last run went on after all faults had stopped
        self.edited: dict[str, bytes] = {}  # outputs as somebody left them
        self.fallback: str | None = "other"  # of the last output
        self.digest = hashlib.blake2b(digest_size=6)

    def chance(self, share: float) -> bool:
        return self.random.random() < share

    def show(self, text: str):
        if self.is_shown:
            print(*self.server.trace, text, sep="\n")
            self.server.trace.clear()

    # ---- what is drawn ----

    def draw_world(self) -> World:
        pick = self.random.choice
        limiter = pick(["", "", "bucket", "sliding", "fixed"])
        per_s = pick([1.0, 3.0, 10.0, 20.0])
        others = pick(["", "", "", "in flight", "slots"])
        return World(
            limiter,
            per_s if limiter else math.inf,
            counts_refused=limiter != "" and self.chance(0.3),
            most_in_flight=pick([2, 5, 10]) if others == "in flight" else 0,
            slots=pick([1, 2, 4]) if others == "slots" else 0,
            latency_s=pick([0.05, 0.3, 1.0, 3.0]) if others != "slots" else pick([0.2, 1.0, 2.0]),
            form=pick(["seconds", "float", "ms", "date", "date alone", "none"]),
            told_rpm=pick([0, 60 * per_s, 600, 600, 6000]),
            concurrency=pick([1, 4, 40, 40, 40]),
            timeout_s=pick([10.0, 60.0]),
            has_cache=self.chance(0.3),
        )

    def draw_tickets(self) -> dict[str, str]:
        """Id to text as it is sent; some are equal, empty, Chinese, or always go wrong."""
        number = self.random.choice([20, 60, 200, 200])
        poisoned = self.random.choice([0, 0, 0.02, 0.1, 0.3])
        names = self.random.sample(FAULTS, 3)
        texts = {}
        for n in range(1, number + 1):
            text = f"Ticket {n} of {self.seed}: it does not work"
            dice = self.random.random()
            if dice < poisoned:
                text = f"poison {self.random.choice(names)}: ticket {n}"
            elif dice > 0.97:
                text = ""
            elif dice > 0.93:
                text = f"the same {n % 4}"
            elif dice > 0.9:
                text = f"发票 {n} 有问题"
            texts[f"t{n}"] = text
        return texts

    def draw_fault(self) -> Fault:
        """An outage, or noise; for the whole run, or for a while."""
        name = self.random.choice(FAULTS)
        if name in ENDS_RUNS and self.chance(0.6):
            name = self.random.choice(FAULTS)
        share = 1.0 if self.chance(0.3) else self.random.choice([0.01, 0.05, 0.2, 0.5])
        begins_s = self.random.choice([0.0, self.random.uniform(0, 30)])
        lasts_s = self.random.choice([2.0, 10.0, 60.0, 200.0, math.inf])
        return Fault(name, share, begins_s, begins_s + lasts_s)

    def draw_budget(self) -> float:
        """No limit, enough, or too little."""
        usual_usd = 0.00005 * len(self.tickets)
        share = self.random.choice([0, 0.1, 0.5, 0.9, 1.5, 200, 200, 200, 200])
        return round(share * usual_usd, 6)

    def change_settings(self):
        """What a user does between two runs."""
        changes = {}
        if self.chance(0.1):
            changes["prompt"] = self.random.choice([classify.SYSTEM_PROMPT, "Sort it. Labels: ..."])
        if self.chance(0.1):
            changes["model"] = self.random.choice(["deepseek-chat", "qwen2.5-72b-instruct"])
        if self.chance(0.1):
            changes["chinese_model"] = self.random.choice([None, "qwen2.5-72b-instruct"])
        if self.chance(0.1):
            changes["fallback"] = self.random.choice([None, "other", "bug"])
        if self.chance(0.15):
            changes["budget_usd"] = self.draw_budget()
        changes["sample"] = self.random.choice([10, 50]) if self.chance(0.1) else None
        self.settings = replace(self.settings, **changes)
        if self.chance(0.1):
            some = self.random.sample(list(self.tickets), 3)
            self.tickets = self.tickets | {id_: f"anew {self.tickets[id_]}".strip() for id_ in some}
        if self.chance(0.1):
            self.tickets = dict(self.random.sample(list(self.tickets.items()), len(self.tickets)))

    # ---- one run ----

    def run(self) -> Done:
        """The program once, with what happens to it; checks what it left."""
        machine, server, settings = self.machine, self.server, self.settings
        self.write_tickets()
        machine.fsync_s = self.random.choice([0.0, 0.05, 0.5])
        server.run_began_at = self.clock.now
        server.is_alone = False
        server.was_limited = False
        server.unnamed = set()
        server.stopped_at = None
        server.starts.clear()
        before = len(server.bill)
        arguments = [
            str(machine.folder / "tickets.csv"),
            f"-o={machine.folder / 'labels'}{self.suffix}",
            f"--concurrency={self.world.concurrency}",
            f"--rpm={self.world.told_rpm}",
            f"--budget={settings.budget_usd}",
        ]
        if settings.sample:
            arguments.append(f"--sample={settings.sample}")
        # Each run is a process of its own.
        forget_settings()
        self.wanted.append(self.tickets)
        self.budgets.append(settings.budget_usd)
        with (
            mock.patch.multiple(
                classify,
                SYSTEM_PROMPT=settings.prompt,
                MODEL=settings.model,
                CHINESE_MODEL=settings.chinese_model,
                FALLBACK=settings.fallback,
                TIMEOUT=self.world.timeout_s,
            ),
            mock.patch.object(classify.Run, "stop", self.noting(classify.Run.stop)),
        ):
            done = machine.run(arguments)
        self.check_end()
        if self.is_shown:
            self.show(
                f"{self.clock.now:10.3f} run ended: {done.status} after {machine.calls} calls, "
                f"{machine.waits} waits, {len(server.bill) - before} requests {settings}\n"
                f"{done.stderr}{done.stdout}"
            )
        if not machine.is_dead and done.status == 1 and "NOT WRITTEN" not in done.stdout:
            self.disregarded |= server.unnamed
        self.digest.update(f"{done}{server.bill[before:]}".replace(str(self.folder), "").encode())
        self.check(done)
        return done

    def noting(self, stop: object):
        """Run.stop, that tells the server of it."""

        def noted(run: classify.Run, why: classify.Stop):
            if self.server.stopped_at is None:
                self.server.stopped_at = self.clock.now
                self.server.note(f"stops: {why}")
                if " named a label for " in why.why:
                    self.server.unnamed = self.unnamed_replies(run)
            stop(run, why)

        return noted

    def unnamed_replies(self, run: classify.Run) -> set[str]:
        """The replies without a label among the tickets that were judged together."""
        judged = {reply for recent in run.recent.values() for reply in classify.unnamed_replies(recent)}
        last = [item for item in self.server.bill if is_unnamed(item)]
        return {f"{item.prompt} {item.reply}" for item in last if item.reply in judged}

    def write_tickets(self):
        rows = [f'{id_},"{text or " - "}"\n' for id_, text in self.tickets.items()]
        path = self.machine.folder / "tickets.csv"
        path.write_text("id,body\n" + "".join(rows), encoding="utf-8")

    def trouble(self, is_last: bool):
        """A run in which things go wrong."""
        machine, server, rng = self.machine, self.server, self.random
        machine.new_run()
        if self.chance(0.05):
            server.faults = [Fault("never on the list")]
        else:
            server.faults = [self.draw_fault() for _ in range(rng.choice([0, 1, 1, 2, 3, 5]))]
        if is_last:
            server.calm_at = self.clock.now + rng.choice([1.0, 10.0, 60.0, 300.0])
        happens = rng.choice(HAPPENINGS)
        n_call = rng.choice([rng.randint(1, 120), rng.randint(1, 600)])
        n_late = rng.randint(1, 60)
        at_s = rng.choice([rng.uniform(0, 5), rng.uniform(0, 60)])
        n_wait = rng.choice([rng.randint(1, 50), rng.randint(1, 2000)])
        kind = rng.choice(["ENOSPC", "EIO", "EACCES", "locked"])
        if happens.startswith("power"):
            machine.is_power_watched = True
        if happens in ("kill", "power"):
            by_power = happens == "power"
            machine.on_wait = lambda n: n == n_wait and self.kill(by_power)
        elif happens in ("kill at a call", "power at a call"):
            by_power = happens == "power at a call"
            machine.on_call = lambda n, *_: n == n_call and self.kill(by_power)
        elif happens == "kill at the end":
            by_power = rng.random() < 0.5
            machine.is_power_watched = by_power
            machine.on_call = lambda n, *_: n - n_late == machine.calls_in_loop and self.kill(by_power)
        elif happens.startswith("ctrl-c"):
            number = rng.choice([signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
            machine.at_s.append((at_s, lambda: machine.send_signal(number)))
            if happens == "ctrl-c twice":
                machine.at_s.append((at_s + rng.uniform(0, 3), lambda: self.second_signal(number)))
        elif happens == "disk":
            machine.page_limit = rng.randint(0, 30)
        elif happens in ("call fails", "all calls fail"):
            machine.fails_at(n_call, kind, for_ever=happens == "all calls fail")
        elif happens == "editor":
            how = rng.choice(["changed", "deleted", "changed both"])
            machine.at_s.append((at_s, lambda: self.edit(how)))
        if self.is_shown:
            self.show(f"{self.clock.now:10.3f} {happens} {server.faults} {machine.folder}")
        done = self.run()
        self.was_limited = server.was_limited
        self.calm_s = max(0.0, self.clock.now - max(server.calm_at, server.promised_at))
        return done

    def kill(self, by_power: bool):
        """The power fails, or the process is killed."""
        machine = self.machine
        late_s = self.clock.now - machine.synced_at
        is_late = late_s > 1.01 + 2 * machine.fsync_s and machine.waits
        if by_power and is_late and self.server.stopped_at is None:
            self.broken.append(f"nothing was brought to the disk for {late_s:.1f} s")
        machine.die(by_power)

    def second_signal(self, number: int):
        """Ends the run at once."""
        if not self.machine.is_dead:
            self.machine.send_signal(number)

    def edit(self, how: str):
        """Somebody works on the output while a run goes on."""
        self.machine.is_paused = True
        output = self.machine.folder / f"labels{self.suffix}"
        names = [output.name]
        if how == "changed both":
            names.append(f"labels.new{self.suffix}")
        for name in names:
            path = self.machine.folder / name
            if not path.exists():
                continue
            if how == "deleted":
                path.unlink()
                self.edited.pop(name, None)
            else:
                content = path.read_bytes() + b"# mine\n"
                path.write_bytes(content)
                self.edited[name] = content
        self.machine.is_paused = False

    def user_mends(self):
        """Before the last run somebody does what the messages say."""
        for name in list(self.edited):
            if name.startswith("labels.new") or self.chance(0.5):
                (self.machine.folder / name).unlink(missing_ok=True)
                del self.edited[name]
        self.settings = replace(self.settings, budget_usd=2.0, sample=None, fallback="other")

    # ---- what must hold ----

    def check_end(self):
        """Liveness: a run that stops ends, and one that gets nowhere stops."""
        now, server = self.clock.now, self.server
        if server.stopped_at is not None and now - server.stopped_at > self.world.timeout_s + 2:
            self.fail(f"ended {now - server.stopped_at:.0f} s after it had stopped")
        idle_s = now - max(server.answered_at, server.run_began_at)
        if idle_s > IDLE_S:
            self.fail(f"went on for {idle_s:.0f} s without an answer")

    def fail(self, text: str):
        self.broken.append(text)
        if self.is_shown:
            print("BROKEN:", text)

    def check(self, done: Done):
        """Safety."""
        for wrong in dict.fromkeys(self.server.wrong):
            self.fail(wrong)
        self.server.wrong.clear()
        if done.error:
            self.fail(done.error)
        for name, content in self.edited.items():
            path = self.machine.folder / name
            if not path.exists() or path.read_bytes() != content:
                self.fail(f"{name} was changed by somebody, and is lost")
        ledger = self.machine.folder / "labels.db"
        texts = [done.stdout, done.stderr]
        for path in (ledger, self.machine.folder / f"labels{self.suffix}"):
            if path.exists():
                texts.append(path.read_bytes().decode(errors="replace"))
        output = f"labels{self.suffix}"
        if "was changed since it was written" in done.stdout and output not in self.edited:
            self.fail(f"a false alarm: nobody changed {output}")
        if any(KEY in text for text in texts):
            self.fail("the key is shown")
        if "Traceback" in done.stderr:
            self.fail("a traceback")
        if done.status == 2 and not re.search("^classify.py: ", done.stderr, re.M):
            self.fail(f"exit status 2 without a word: {done.stderr!r}")
        self.check_bill(done)

    def check_bill(self, done: Done):
        """The bill against ledger, output and report."""
        written = re.search(r"^Labels: (\S+?)[. ]", done.stdout, re.M)
        name = re.search(rf"labels(\.new)?{self.suffix}(\.part)?", done.stdout)
        is_whole = done.status in (0, 1, 130) and ", as it was." not in done.stdout
        is_written = written and name and is_whole
        # A kill may meet any of them.
        output_name = name[0] if is_written else f"labels{self.suffix}"
        audit = self.folder / "audit"
        shutil.rmtree(audit, ignore_errors=True)
        audit.mkdir()
        for source, target in (
            (output_name, f"labels{self.suffix}"),
            ("labels.db", "labels.db"),
            ("labels.db-wal", "labels.db-wal"),
        ):
            path = self.machine.folder / source
            if path.exists() and source not in self.edited:
                shutil.copyfile(path, audit / target)
        if is_written:
            self.fallback = self.settings.fallback
        status = done.status if is_written else None
        seen = replace(done, output=audit / f"labels{self.suffix}", status=status)
        # The two that the bill must guess are compared by what was asked, below.
        except_for = {"report-true", "answer-used"}
        if status is None and (self.fallback != self.settings.fallback or "no report" in done.stderr):
            # Nobody knows which of the two a killed run has written; without a report it is of a former run.
            except_for |= {"label-true", "fallback-true"}
        broken = broken_promises(
            self.server.bill,
            seen,
            budget_usd=max(self.budgets) if all(self.budgets) else 0.0,
            tickets=self.wanted,
            prices=classify.PRICES,
            fallback=self.fallback,
            named_label=named_label,
            is_sample=self.settings.sample is not None,
            except_for=except_for,
        )
        if is_written and self.settings.sample is None:
            broken += self.differences(seen)
        for how in broken:
            self.fail(how)

    def differences(self, done: Done) -> Iterator[str]:
        """Between the ledger and what was written: by what was asked, which the bill must guess."""
        digests = {id_: self.digest_of(text) for id_, text in self.tickets.items() if text}
        wanted = set(digests.values())
        rows = [row for row in ledger_rows(done.output.with_suffix(".db")) if row.digest in wanted]
        sums = sum(row.tokens_in for row in rows), sum(row.tokens_out for row in rows)
        tokens = f"Tokens: {sums[0]:,} in / {sums[1]:,} out"
        cost = f"Cost  : ${sum(row.cost_usd for row in rows):.4f}"
        lines = output_lines(done.output, "id") if done.output.exists() else []
        head = [f"Classified {counted(len(lines))}", tokens, cost]
        if done.stdout.splitlines()[:3] != head:
            yield f"the report says {done.stdout.splitlines()[:3]}, it should be {head}"
        prompt = zlib.crc32(self.settings.prompt.encode())
        for line in lines:
            if f"{line.get('model')} {prompt} {line.get('reply')}" in self.disregarded:
                yield f"{line['id']} has {line['label']} from {line['reply']!r} of a bad run"
        labels = {row.digest: row.label for row in rows if row.label}
        written = {line["id"]: line["label"] for line in lines}
        for id_, digest in digests.items():
            if digest in labels and written.get(id_) != labels[digest]:
                yield f"{id_} is {written.get(id_)}, and {labels[digest]} in the ledger"

    def digest_of(self, text: str) -> str:
        """What stands for a ticket in the ledger now."""
        settings = self.settings
        chinese = settings.chinese_model if classify.is_chinese(text) else None
        with mock.patch.object(classify, "SYSTEM_PROMPT", settings.prompt):
            forget_settings()
            return classify.digest_of(chinese or settings.model, text)

    def check_calm(self, took_s: float):
        """Liveness: how long it took from the calm on."""
        answers = self.server.calm_answers
        slack_s = SLACK_S + LEARN_S * self.was_limited
        allowed_s = 2 * answers / min(self.world.limits()) + slack_s
        if took_s > allowed_s:
            self.fail(
                f"{answers} answers took {took_s:.0f} s after all faults had stopped, allowed are "
                f"{allowed_s:.0f} s: {self.world}"
            )

    def simulate(self) -> list[str]:
        """The whole night; returns the broken promises."""
        runs = self.random.choice([1, 1, 2, 3, 4])
        for number in range(runs):
            if number:
                self.change_settings()
            self.trouble(is_last=number == runs - 1)
            self.clock.now += self.random.choice([0, 5, 1000])
        self.settle()
        return self.broken

    def settle(self):
        """All faults have stopped: the next run completes."""
        server = self.server
        server.calm_at = min(server.calm_at, self.clock.now)
        server.faults = []
        self.user_mends()
        self.machine.new_run()
        self.show("---- calm ----")
        began_at = self.clock.now
        done = self.run()
        if done.status != 0:
            last = done.stdout.splitlines()[-1:] or done.stderr.splitlines()[-1:]
            self.fail(f"all faults had stopped, but the run ended with {done.status}: {last}")
        self.check_calm(self.calm_s + self.clock.now - began_at)


def night(seed: int, is_shown: bool = False) -> tuple[int, list[str], str]:
    """Seed, broken promises, and a hash of all that happened."""
    # The bill's copies of the ledger, too.
    tempfile.tempdir = MEMORY
    with tempfile.TemporaryDirectory() as folder:
        one = Night(seed, Path(folder), is_shown)
        try:
            broken = one.simulate()
        except Exception:
            broken = [*one.broken, f"the simulation itself: {traceback.format_exc()}"]
        return seed, broken, one.digest.hexdigest()


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--nights", type=int, default=100)
    parser.add_argument("--seed", type=int, default=int(time.strftime("%Y%m%d")) * 1000)
    parser.add_argument("--show", action="store_true", help="all that happens in one night")
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    given = parser.parse_args()
    if given.show:
        _, broken, digest = night(given.seed, is_shown=True)
        print(*broken, digest, sep="\n")
        return bool(broken)
    kinds = Counter()
    total = 0
    with ProcessPoolExecutor(given.workers) as pool:
        seeds = range(given.seed, given.seed + given.nights)
        for seed, broken, _ in pool.map(night, seeds, chunksize=max(1, min(50, given.nights // 8))):
            for how in broken:
                total += 1
                kinds[re.sub(r"\d+", "N", how)[:60]] += 1
                print(f"seed {seed}: {how}", flush=True)
    for kind, number in kinds.most_common():
        print(f"{number:6} x {kind}")
    print(f"{given.nights:,} nights, {total} promises broken")
    return bool(total)


if __name__ == "__main__":
    sys.exit(main())

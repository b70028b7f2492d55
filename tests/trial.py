"""The machinery of the benchmark: one contestant in a process of its own against a stand-in in another."""

from __future__ import annotations

import asyncio
import csv
import json
import math
import multiprocessing
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace

from aiohttp import web

from classify import SYSTEM_PROMPT
from tests.gateway import Gateway, Script
from tests.lean_gateway import LeanGateway

HERE = Path(__file__).parent
OURS, NAIVE, SDK, BARE = "classify.py", "semaphore + gather", "OpenAI SDK", "bare loop"
PROGRAMS = {
    BARE: HERE / "contestants" / "bare_loop.py",
    OURS: HERE.parent / "classify.py",
    NAIVE: HERE / "contestants" / "naive.py",
    SDK: HERE / "contestants" / "openai_sdk.py",
}
RIVALS = (NAIVE, SDK)
PEERS = {  # what pip installs for each, in an environment of its own
    "curator": "bespokelabs-curator==0.1.31",
    "async-batch-llm": "async-batch-llm[openai]==0.28.0",
}
PEER_PROGRAMS = {who: HERE / "contestants" / f"peer_{who.replace('-', '_')}.py" for who in PEERS}
CONCURRENCY, TIMEOUT_S = 40, 60  # of every contestant, unless said

# ---- The tickets -----------------------------------------------------------------------------------------

TOPICS = (  # one for each label of the stand-in
    "there is a charge on my invoice that I do not know",
    "the window freezes and shows an error",
    "how do I add a second administrator",
    "please add a dark mode",
    "thank you for yesterday",
)
WORDS = ("lorem", "ipsum", "dolor", "sit", "amet", "consectetur", "adipiscing", "elit", "sed", "eiusmod", "tempor")
FILLER = " ".join(random.Random(1).choices(WORDS, k=500))


def write_tickets(path: Path, numbers: range) -> None:
    """Tickets of about 1,200 characters, 300 tokens, no two numbers alike."""
    with open(path, "w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file)
        rows.writerow(("id", "body"))
        for n in numbers:
            rows.writerow((f"t{n}", f"Hello, {TOPICS[n % 5]}. See number {n}. {FILLER[n % 997 :][:1150].strip()}"))


# ---- The stand-in, in a process of its own ---------------------------------------------------------------


class Recorder(Gateway):
    """The stand-in, which also notes when the first request came and how long it worked in all."""

    first_s, worked_s = float("inf"), 0.0

    async def _handle(self, request: web.BaseRequest) -> web.StreamResponse:
        self.first_s = min(self.first_s, self.now())
        return await super()._handle(request)

    def _latency(self, script: Script) -> float:
        latency_s = super()._latency(script)
        self.worked_s += latency_s
        return latency_s


SERVED = ("requests", "answered", "refused", "max_in_flight", "events", "billed", "replies", "first_s", "worked_s")


async def serve(script: Script | None, pipe: Connection) -> None:
    """Sends its address, then how many it has answered each time it is asked, and all its counters at the end."""
    async with Recorder(script) if script else LeanGateway() as gateway:
        pipe.send(gateway.url)
        cpu_s = time.process_time()
        while await asyncio.to_thread(pipe.recv) == "how many?":
            pipe.send(gateway.answered)
        counters = {name: getattr(gateway, name) for name in SERVED if hasattr(gateway, name)}
        pipe.send(SimpleNamespace(**counters, cpu_s=time.process_time() - cpu_s))


PROCESSES = multiprocessing.get_context("forkserver")  # which imports once, and has no threads
PROCESSES.set_forkserver_preload(["tests.trial"])


def serve_in_process(script: Script | None, pipe: Connection) -> None:
    asyncio.run(serve(script, pipe))


@contextmanager
def served(script: Script | None) -> Iterator[Connection]:
    """A stand-in, or the lean server where there is no script, at the other end of the pipe."""
    pipe, its_end = PROCESSES.Pipe()
    process = PROCESSES.Process(target=serve_in_process, args=(script, its_end), daemon=True)
    process.start()
    its_end.close()
    try:
        yield pipe
    finally:
        process.terminate()
        process.join()


# ---- One trial -------------------------------------------------------------------------------------------

# A process starts with its parent's peak memory, so a small one stands between.
MEASURE = """
import json, os, sys, time
start = time.perf_counter()
_, status, used = os.wait4(os.posix_spawn(sys.argv[1], sys.argv[1:], os.environ), 0)
wall = time.perf_counter() - start
json.dump([os.waitstatus_to_exitcode(status), wall, used.ru_utime + used.ru_stime, used.ru_maxrss], open("used", "w"))
"""
RSS_PER_MB = 2**20 if sys.platform == "darwin" else 2**10


@dataclass(frozen=True)
class Trial:
    """One contestant, so many tickets, one stand-in."""

    who: str
    tickets: int
    script: Script | None = None  # None: the lean server
    rpm: int = 0  # that is told to all who can be told any; 0: that there is no limit
    in_flight: int = CONCURRENCY  # at most, of the rivals; classify.py and the peers keep their own number
    killed_once: bool = False  # with signal 9, when half of the tickets are answered; then run again
    runs: int = 1  # processes at a time, each with its share of the tickets and its own output
    timeout_s: float = TIMEOUT_S

    @property
    def parts(self) -> list[range]:
        """The numbers of the tickets of each run."""
        size = self.tickets // self.runs
        return [range(n * size, (n + 1) * size) for n in range(self.runs)]

    @property
    def possible_s(self) -> float:
        """Tickets over what the stand-in lets in or works off, and the share of it that it answers in whole."""
        script = self.script
        at_once = min(filter(None, (script.servers, script.max_in_flight, CONCURRENCY * self.runs)))
        per_s = min(script.rpm / 60 or math.inf, at_once / script.latency_s)
        return self.tickets / (per_s * math.prod(1 - fault.share for fault in script.faults))

    @property
    def deadline_s(self) -> float:
        """When a contestant is ended, since none may hold up the benchmark; what it has not written is lost."""
        return 60 + 5 * self.possible_s if self.script else 3600


@dataclass
class Outcome:
    """What a trial showed."""

    trial: Trial
    status: int
    wall_s: float
    cpu_s: float
    peak_mb: float
    served: SimpleNamespace
    labels: dict[str, str] = field(repr=False)  # by text
    right: int = 0  # the label is what the stand-in answered
    wrong: int = 0  # it is not, or the stand-in never answered

    def __post_init__(self) -> None:
        replies = getattr(self.served, "replies", {})
        self.right = sum(replies.get(text) == label for text, label in self.labels.items())
        self.wrong = len(self.labels) - self.right

    @property
    def lost(self) -> int:
        return self.trial.tickets - self.right - self.wrong

    @property
    def twice(self) -> int:
        """Tickets that were billed more than once."""
        return sum(times > 1 for times in self.served.billed.values())

    @property
    def answering_s(self) -> float:
        """From the first request to the last answer."""
        return max((at for at, status in self.served.events if status == 200), default=math.inf) - self.served.first_s


class Bench:
    """The scale of this run, its folder, and the machinery to run trials."""

    def __init__(self, folder: Path, quick: bool, tickets: int | None, jobs: int) -> None:
        self.folder, self.quick, self.given, self.jobs = folder, quick, tickets, jobs
        self.speed = 5 if quick else 1  # of every limit
        self.rivals = RIVALS[:1] if quick else RIVALS  # the SDK takes its time to start
        self.broken: set[str] = set()  # contestants that ended in an error
        self.pythons: dict[str, Path] = {}  # of the peers that are installed
        # Ours is read once, as it may be edited meanwhile; its time-out is the only setting that is no option.
        self.before, self.after = re.split(r"(?<=^TIMEOUT = )\d+", PROGRAMS[OURS].read_text("utf-8"), flags=re.M)

    def count(self, full: int, quick: int) -> int:
        """How many tickets a cell takes."""
        return self.given or (quick if self.quick else full)

    def tickets(self, numbers: range) -> Path:
        """A CSV of these."""
        path = self.folder / f"{numbers.start}-{numbers.stop}.csv"
        if not path.exists():
            write_tickets(path, numbers)
        return path

    def install(self, who: str) -> str:
        """Makes the peer's environment anew, in the temporary folder; returns why that failed, or nothing."""
        folder = self.folder / f"venv-{who}"
        python = folder / "bin" / "python"
        for command in ((sys.executable, "-m", "venv", folder), (python, "-m", "pip", "install", "-q", PEERS[who])):
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                return (done.stderr or done.stdout).strip().splitlines()[-1]
        self.pythons[who] = python
        return ""

    def run(self, trials: Iterable[Trial], jobs: int = 1) -> list[Outcome]:
        """The outcome of each; at most so many at once."""
        trials = list(trials)
        for part in {part for trial in trials for part in trial.parts}:
            self.tickets(part)
        with ThreadPoolExecutor(jobs) as pool:
            return list(pool.map(self.try_one, trials))

    def try_one(self, trial: Trial) -> Outcome:
        """Runs the contestant, each run in a new folder, against a new stand-in."""
        folders = [Path(tempfile.mkdtemp(dir=self.folder)) for _ in trial.parts]
        for folder, part in zip(folders, trial.parts, strict=True):
            (folder / "tickets.csv").symlink_to(self.tickets(part))
        with served(trial.script) as pipe:
            url = pipe.recv()
            if trial.killed_once:
                processes = [self.start(trial, folder, url) for folder in folders]
                while any(process.poll() is None for process in processes) and how_many(pipe) < trial.tickets / 2:
                    time.sleep(0.02)
                end(processes, 0)
            end([self.start(trial, folder, url) for folder in folders], trial.deadline_s)
            pipe.send("enough")
            labels = {text: label for folder in folders for text, label in self.labels(trial, folder).items()}
            statuses, walls, cpus, peaks = zip(*(self.used(trial, folder) for folder in folders), strict=True)
            used = next(filter(None, statuses), 0), max(walls), sum(cpus), max(peaks)
            outcome = Outcome(trial, *used, pipe.recv(), labels)
        print(f"  {trial.who}: exit {outcome.status} after {outcome.wall_s:.1f} s", file=sys.stderr)
        if outcome.status or outcome.served.requests < trial.tickets:
            self.broken.add(trial.who)
            print((folders[0] / "log").read_text()[-2000:], file=sys.stderr)
        for folder in folders:
            shutil.rmtree(folder)
        return outcome

    def start(self, trial: Trial, folder: Path, url: str) -> subprocess.Popen:
        """The contestant in its folder, under MEASURE, both in a process group of their own."""
        clean = {
            k: v for k, v in os.environ.items() if not k.upper().endswith("_PROXY") and not k.startswith("TOKENHUB")
        }
        ours = {"TOKENHUB_URL": url, "TOKENHUB_KEY": "stand-in-key", "SYSTEM_PROMPT": SYSTEM_PROMPT}
        # The others read these; the peers the pace as well.
        ours |= {"TIMEOUT_S": f"{trial.timeout_s:g}", "CONCURRENCY": f"{trial.in_flight}", "RPM": f"{trial.rpm}"}
        python = self.pythons.get(trial.who, sys.executable)
        program = ((PROGRAMS | PEER_PROGRAMS)[trial.who],)
        if trial.who == OURS:
            program = (folder / "classify.py", "--rpm", f"{trial.rpm}", "--budget", "0")
            program[0].write_text(f"{self.before}{trial.timeout_s:g}{self.after}", "utf-8")
        with open(folder / "log", "a") as log:
            return subprocess.Popen(
                (sys.executable, "-ISc", MEASURE, python, *program), cwd=folder, env=clean | ours,
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip

    def used(self, trial: Trial, folder: Path) -> tuple[int, float, float, float]:
        """Exit status, wall time, CPU time and peak memory in MB of the last process, if no deadline ended it."""
        if not (folder / "used").exists():
            return -signal.SIGKILL, trial.deadline_s, 0.0, 0.0
        status, wall_s, cpu_s, peak = json.loads((folder / "used").read_text())
        return status, wall_s, cpu_s, peak / RSS_PER_MB

    def labels(self, trial: Trial, folder: Path) -> dict[str, str]:
        """The label by text, as the contestant wrote it down; empty where nobody will ask."""
        path = folder / "labels.jsonl"
        if trial.script is None or not path.exists():
            return {}
        labels = {line["id"]: line["label"] for line in map(json.loads, path.read_bytes().splitlines())}
        with open(folder / "tickets.csv", newline="", encoding="utf-8") as file:
            return {row["body"]: labels[row["id"]] for row in csv.DictReader(file) if row["id"] in labels}


def how_many(pipe: Connection) -> int:
    pipe.send("how many?")
    return pipe.recv()


def end(processes: list[subprocess.Popen], after_s: float) -> None:
    """Waits for all, so long at most; then those that are left are killed with their children."""
    deadline = time.monotonic() + after_s
    for process in processes:
        try:
            process.wait(max(0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()

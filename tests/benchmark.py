"""classify.py beside the usual ways to do its job: the same tickets, the same stand-in, each in its own process.

    python -m tests.benchmark [--quick] [--tickets N] [--jobs N] [CELL ...]

prints a Markdown table for each cell: a throughput, b slow answers, c a limit, d faults, e kill -9, f memory,
g every kind of limit; "picture" draws tests/pace.svg. The stand-in labels by keywords and is no model, so "right"
means the label that it gave. Unix only.
"""

from __future__ import annotations

import argparse
import asyncio
import csv
import json
import multiprocessing
import os
import platform
import random
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from datetime import date
from importlib.metadata import version
from itertools import product
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from urllib.parse import urlsplit

from aiohttp import web

from classify import SYSTEM_PROMPT
from tests.gateway import Fault, Gateway, Script
from tests.lean_gateway import RESPONSE, LeanGateway

HERE = Path(__file__).parent
OURS, NAIVE, SDK, BARE = "classify.py", "semaphore + gather", "OpenAI SDK", "bare loop"
PROGRAMS = {
    OURS: HERE.parent / "classify.py",
    NAIVE: HERE / "contestants" / "naive.py",
    SDK: HERE / "contestants" / "openai_sdk.py",
    BARE: HERE / "contestants" / "bare_loop.py",
}
RIVALS = (NAIVE, SDK)
NO_LIMIT = ("--rpm", "0", "--budget", "0")
CONCURRENCY = 40  # of every contestant

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


def write_tickets(path: Path, count: int) -> None:
    """Tickets of about 1,200 characters, 300 tokens, no two alike."""
    with open(path, "w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file)
        rows.writerow(("id", "body"))
        for n in range(count):
            rows.writerow((f"t{n}", f"Hello, {TOPICS[n % 5]}. See number {n}. {FILLER[n % 997 :][:1150]}"))


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


SERVED = ("requests", "answered", "refused", "events", "billed", "replies", "first_s", "worked_s")


async def serve(script: Script | None, pipe: Connection) -> None:
    """Sends its address, then how many it has answered each time it is asked, and all its counters at the end."""
    async with Recorder(script) if script else LeanGateway() as gateway:
        pipe.send(gateway.url)
        cpu_s = time.process_time()
        while await asyncio.to_thread(pipe.recv) == "how many?":
            pipe.send(gateway.answered)
        counters = {name: getattr(gateway, name) for name in SERVED if hasattr(gateway, name)}
        pipe.send(SimpleNamespace(**counters, cpu_s=time.process_time() - cpu_s))


def serve_in_process(script: Script | None, pipe: Connection) -> None:
    asyncio.run(serve(script, pipe))


@contextmanager
def served(script: Script | None) -> Iterator[Connection]:
    """A stand-in, or the lean server where there is no script, at the other end of the pipe."""
    context = multiprocessing.get_context("spawn")
    pipe, its_end = context.Pipe()
    process = context.Process(target=serve_in_process, args=(script, its_end), daemon=True)
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
    arguments: tuple[str, ...] = NO_LIMIT  # of classify.py, the only one that has any
    killed_once: bool = False  # with signal 9, when half of the tickets are answered; then run again


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
    def share(self) -> float:
        """Tickets rightly labelled over what the true limit allows from the first request to the last answer."""
        last_s = max((at for at, status in self.served.events if status == 200), default=float("inf"))
        return self.right / (self.trial.script.rpm / 60 * (last_s - self.served.first_s))


class Bench:
    """The scale of this run, its folder, and the machinery to run trials."""

    def __init__(self, folder: Path, quick: bool, tickets: int | None, jobs: int) -> None:
        self.folder, self.quick, self.given, self.jobs = folder, quick, tickets, jobs
        self.speed = 5 if quick else 1  # of every limit
        self.program = Path(shutil.copy(PROGRAMS[OURS], folder))  # which may be edited meanwhile

    def count(self, full: int, quick: int) -> int:
        """How many tickets a cell takes."""
        return self.given or (quick if self.quick else full)

    def tickets(self, count: int) -> Path:
        """A CSV of so many."""
        path = self.folder / f"{count}.csv"
        if not path.exists():
            write_tickets(path, count)
        return path

    def run(self, trials: Iterable[Trial], jobs: int = 1) -> list[Outcome]:
        """The outcome of each; at most so many at once."""
        trials = list(trials)
        for count in {trial.tickets for trial in trials}:
            self.tickets(count)
        with ThreadPoolExecutor(jobs) as pool:
            return list(pool.map(self.try_one, trials))

    def try_one(self, trial: Trial) -> Outcome:
        """Runs the contestant in a new folder against a new stand-in."""
        folder = Path(tempfile.mkdtemp(dir=self.folder))
        (folder / "tickets.csv").symlink_to(self.tickets(trial.tickets))
        with served(trial.script) as pipe:
            url = pipe.recv()
            if trial.killed_once:
                process = self.start(trial, folder, url)
                while process.poll() is None and how_many(pipe) < trial.tickets / 2:
                    time.sleep(0.02)
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
            self.start(trial, folder, url).wait()
            pipe.send("enough")
            outcome = Outcome(trial, *self.used(folder), pipe.recv(), self.labels(trial, folder))
        print(f"  {trial.who}: exit {outcome.status} after {outcome.wall_s:.1f} s", file=sys.stderr)
        shutil.rmtree(folder)
        return outcome

    def start(self, trial: Trial, folder: Path, url: str) -> subprocess.Popen:
        """The contestant in its folder, under MEASURE, both in a process group of their own."""
        clean = {
            k: v for k, v in os.environ.items() if not k.upper().endswith("_PROXY") and not k.startswith("TOKENHUB")
        }
        ours = {"TOKENHUB_URL": url, "TOKENHUB_KEY": "stand-in-key", "SYSTEM_PROMPT": SYSTEM_PROMPT}
        program = (self.program, *trial.arguments) if trial.who == OURS else (PROGRAMS[trial.who],)
        with open(folder / "log", "a") as log:
            return subprocess.Popen(
                (sys.executable, "-ISc", MEASURE, sys.executable, *program), cwd=folder, env=clean | ours,
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip

    def used(self, folder: Path) -> tuple[int, float, float, float]:
        """Exit status, wall time, CPU time and peak memory in MB of the last process."""
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


# ---- The cells -------------------------------------------------------------------------------------------


def table(title: str, header: str, rows: Iterable[Iterable[object]], note: str = "") -> str:
    """A Markdown table; the header's columns stand between bars."""
    columns = header.split("|")
    lines = [columns, ["---", *["--:"] * (len(columns) - 1)], *rows]
    body = "\n".join("| " + " | ".join(str(cell).strip() for cell in line) + " |" for line in lines)
    return f"### {title}\n\n{body}\n" + (f"\n{note}\n" if note else "")


def ceiling_per_s(rounds: int) -> float:
    """How many requests the lean server answers a second to a client that does nothing but send and receive bytes."""
    body = json.dumps({"messages": [{"content": SYSTEM_PROMPT}, {"content": FILLER[:1200]}]}).encode()
    request = b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body)
    with served(None) as pipe, ExitStack() as stack:
        url = urlsplit(pipe.recv())
        connect = socket.create_connection
        sockets = [stack.enter_context(connect((url.hostname, url.port))) for _ in range(CONCURRENCY)]
        start = time.perf_counter()
        for _ in range(rounds):
            for connection in sockets:
                connection.sendall(request)
            for connection in sockets:
                connection.recv(len(RESPONSE), socket.MSG_WAITALL)
        return rounds * CONCURRENCY / (time.perf_counter() - start)


def throughput(bench: Bench) -> str:
    """Cell a: what a ticket costs the CPU."""
    few, many = 10, bench.count(10_000, 300)
    repetitions = 1 if bench.quick else 3
    small, large = (
        {who: bench.run([Trial(who, count)] * repetitions) for who in (BARE, OURS, *RIVALS)} for count in (few, many)
    )
    start_up = {who: median(o.cpu_s for o in outcomes) for who, outcomes in small.items()}
    micro_s = {who: (median(o.cpu_s for o in large[who]) - start_up[who]) / (many - few) * 1e6 for who in large}
    rows = [
        (
            who,
            f"{many / median(o.wall_s for o in outcomes):,.0f}",
            f"{micro_s[who]:,.0f}",
            f"{micro_s[who] / micro_s[BARE]:.2f}",
            f"{start_up[who]:.2f} s",
            f"{median(o.peak_mb for o in outcomes):.0f} MB",
            f"{median(o.served.cpu_s / o.wall_s for o in outcomes):.0%}",
        )
        for who, outcomes in large.items()
    ]
    return table(
        f"(a) {many:,} tickets, no limit, no latency; median of {repetitions}",
        "|tickets/s|CPU µs a ticket|over the bare loop|CPU to start|peak memory|server busy",
        rows,
        f"The server alone answers {ceiling_per_s(50 if bench.quick else 1_000):,.0f} requests/s to a client that only sends and receives bytes.",
    )


def slow_answers(bench: Bench) -> str:
    """Cell b: what is lost while answers are waited for."""
    count = bench.count(10_000, 200)
    script = Script(rpm=0, latency_s=0.1, jitter=0.3, tail=0.03)
    rows = []
    for o in bench.run(Trial(who, count, script) for who in (BARE, OURS, *RIVALS)):
        ideal_s = o.served.worked_s / CONCURRENCY
        rows.append((o.trial.who, f"{o.wall_s:.1f} s", f"{ideal_s:.1f} s", f"{o.wall_s / ideal_s:.3f}"))
    title = (
        f"(b) {count:,} tickets, {CONCURRENCY} in flight, answers after 0.1 s ± 30%, 3% of them after five times that"
    )
    return table(title, "|wall time, with the start|ideal|over the ideal", rows)


def limited(bench: Bench) -> str:
    """Cell c: the gateway's usual limit."""
    count = bench.count(1_000, 100)
    rpm = 600 * bench.speed
    script = Script(rpm=rpm, latency_s=0.3, jitter=0.3)
    told = {f"{told:,}": Trial(OURS, count, script, ("--rpm", f"{told}", "--budget", "0")) for told in (rpm, 2 * rpm)}
    others = [Trial(who, count, script) for who in RIVALS]
    rows = [
        (o.trial.who, who_was_told, f"{o.share:.3f}", o.served.refused, o.right, o.wrong, o.lost, f"{o.wall_s:.0f} s")
        for who_was_told, o in zip([*told, "-", "-"], bench.run([*told.values(), *others], bench.jobs), strict=True)
    ]
    title = f"(c) {count:,} tickets, a limit of {rpm:,} a minute (bucket of 10)"
    return table(title, "|told|share of the limit|refused|right|wrong|lost|wall time", rows)


def faults(bench: Bench) -> str:
    """Cell d: a bad day."""
    count = bench.count(2_000, 100)
    bad = (Fault("cut_before", every=33), Fault("status_500", every=12))
    script = Script(rpm=0, latency_s=0.1, jitter=0.3, faults=bad)
    rows = [
        (o.trial.who, o.served.requests, o.right, o.wrong, o.lost, o.twice)
        for o in bench.run((Trial(who, count, script) for who in (OURS, *RIVALS)), bench.jobs)
    ]
    title = f"(d) {count:,} tickets, 8% of the requests answered 500 and 3% cut off"
    return table(title, "|requests|right|wrong|lost|billed twice", rows)


def killed(bench: Bench) -> str:
    """Cell e: what a crash costs."""
    count = bench.count(2_000, 200)
    script = Script(rpm=0, latency_s=0.2, jitter=0.3)
    rows = [
        (o.trial.who, o.served.requests, o.right, o.wrong, o.lost, o.twice)
        for o in bench.run((Trial(who, count, script, killed_once=True) for who in (OURS, *RIVALS)), bench.jobs)
    ]
    title = f"(e) {count:,} tickets, kill -9 half-way, and run again"
    return table(title, "|requests|right|wrong|lost|billed twice", rows)


def memory(bench: Bench) -> str:
    """Cell f: what a ticket leaves in memory."""
    few, many = bench.count(10_000, 100), 20 * bench.count(10_000, 30)
    rows = []
    for who in (OURS, *RIVALS):
        small, large = bench.run((Trial(who, few), Trial(who, many)), jobs=min(2, bench.jobs))
        growth = (large.peak_mb - small.peak_mb) * 2**20 / (many - few)
        rows.append((who, f"{small.peak_mb:.0f} MB", f"{large.peak_mb:.0f} MB", f"{growth:,.0f} bytes"))
    return table("(f) peak memory", f"|{few:,} tickets|{many:,} tickets|growth a ticket", rows)


LIMITERS = {
    "bucket of 5": {"burst": 5},
    "sliding, 10 s": {"limiter": "sliding", "window_s": 10.0},
    "sliding, 60 s": {"limiter": "sliding", "window_s": 60.0},
    "fixed, 10 s": {"limiter": "fixed", "window_s": 10.0},
    "fixed, 60 s": {"limiter": "fixed", "window_s": 60.0},
}
TOLD = (("the truth", 1200, 1200), ("twice the truth", 1200, 600), ("ten times", 3000, 300), ("no limit", 0, 600))


def limiter_trials(bench: Bench) -> Iterator[tuple[str, str, str, Trial]]:
    """Limiter, Retry-After, what the client was told, and the trial; only classify.py can be told anything."""
    count, speed = bench.count(600, 30), bench.speed
    names, forms, all_told = LIMITERS, ("seconds", "float", "date", "none"), TOLD
    if bench.quick:
        names, forms, all_told = ("bucket of 5",), ("seconds",), TOLD[1:2]
    for name, form in product(names, forms):
        for told, rpm, true in all_told:
            script = Script(rpm=true * speed, latency_s=0.3, jitter=0.3, retry_after=form, **LIMITERS[name])
            yield name, form, told, Trial(OURS, count, script, ("--rpm", f"{rpm * speed}", "--budget", "0"))
            if form == "seconds" and told != "no limit":
                yield from ((name, form, "-", Trial(who, count, script)) for who in RIVALS)
    for name, script in (
        ("10 in flight", Script(rpm=0, max_in_flight=10, latency_s=0.3, jitter=0.3)),
        ("one at a time", Script(rpm=0, servers=1, latency_s=0.2 / speed)),
    ):
        yield name, "-", "600/min", Trial(OURS, count, script, ("--rpm", f"{600 * speed}", "--budget", "0"))
        yield name, "-", "no limit", Trial(OURS, count, script)
        if not bench.quick:
            yield from ((name, "-", "-", Trial(who, count, script)) for who in RIVALS)


def all_limits(bench: Bench) -> str:
    """Cell g: limits of every kind, and what the client believed."""
    named = sorted(limiter_trials(bench), key=lambda it: it[3].script.rpm or 1e9)  # the long ones first
    outcomes = dict(zip(named, bench.run((it[3] for it in named), bench.jobs), strict=True))
    rows = []
    for (name, form, told, trial), o in ((it, outcomes[it]) for it in limiter_trials(bench)):
        limit = f"{trial.script.rpm:,.0f}/min" if trial.script.rpm else "-"
        share = f"{o.share:.3f}" if trial.script.rpm else "-"
        refused = f"{o.served.refused / o.served.requests:.1%}"
        rows.append((name, form, limit, trial.who, told, share, refused, o.right, o.wrong, o.lost, f"{o.wall_s:.0f} s"))
    header = "limiter|Retry-After|true limit||told|share of the limit|refused|right|wrong|lost|wall time"
    return table(f"(g) limits of every kind, {bench.count(600, 30):,} tickets a line", header, rows)


# ---- The picture -----------------------------------------------------------------------------------------


def picture(bench: Bench) -> str:
    """Draws answers and refusals over time, the common pattern above, ours below."""
    from matplotlib import pyplot, rcParams  # slow to import, and wanted here only

    rcParams.update({"svg.hashsalt": "pace", "svg.fonttype": "none", "font.family": "sans-serif"})
    count, rpm = bench.count(1_000, 100), 600 * bench.speed
    script = Script(rpm=rpm, latency_s=0.3, jitter=0.3)
    naive, ours = bench.run(
        (Trial(NAIVE, count, script), Trial(OURS, count, script, ("--rpm", f"{2 * rpm}", "--budget", "0"))), bench.jobs
    )
    end = max(at - o.served.first_s for o in (naive, ours) for at, _ in o.served.events)
    bins = [second / bench.speed for second in range(int(end * bench.speed) + 2)]
    figure, axes = pyplot.subplots(2, sharex=True, sharey=True, figsize=(8, 4.5), layout="constrained")
    for axis, o, told in zip(axes, (naive, ours), ("40 at once, three retries", f"told {2 * rpm:,}/min"), strict=True):
        for statuses, colour, name in (({429}, "#d1495b", "refused"), ({200}, "#2e7d32", "answered")):
            times = [at - o.served.first_s for at, status in o.served.events if status in statuses]
            axis.hist(times, bins, histtype="stepfilled", alpha=0.8, color=colour, label=f"{name}: {len(times):,}")
        axis.axhline(rpm / 60 / bench.speed, color="black", linewidth=0.8, linestyle="--", label=f"limit: {rpm:,}/min")
        verdict = f"{o.right:,} of {count:,} tickets right, {o.wrong:,} wrong, {o.lost:,} without a label"
        axis.set_title(f"{o.trial.who}, {told}: {verdict}", fontsize=10, loc="left")
        axis.set_ylabel("requests a second")
        axis.legend(fontsize=8, loc="upper right")
    axes[-1].set_xlabel("seconds since the first request")
    target = bench.folder / "pace.svg" if bench.quick else HERE / "pace.svg"  # only a full run is worth keeping
    figure.savefig(target, metadata={"Date": None})
    return f"### The picture\n\n{target.name}: {target.stat().st_size / 1000:.0f} kB\n"


# ---- The command line ------------------------------------------------------------------------------------

CELLS: dict[str, Callable[[Bench], str]] = {
    "a": throughput, "b": slow_answers, "c": limited, "d": faults, "e": killed, "f": memory, "g": all_limits,
    "picture": picture,
}  # fmt: skip


def machine() -> str:
    """What the figures depend on."""
    memory_gb = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    size = f"{os.cpu_count()} cores, {memory_gb:.0f} GB, {platform.system()} {platform.machine()}"
    return f"{size}, Python {platform.python_version()}, aiohttp {version('aiohttp')}, openai {version('openai')}"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmark", description=__doc__.split("\n")[0])
    parser.add_argument("cells", nargs="*", metavar="CELL", help=f"of {', '.join(CELLS)} (default: all)")
    parser.add_argument("--quick", action="store_true", help="everything small: does the benchmark still work?")
    parser.add_argument("--tickets", type=int, metavar="N", help="a cell, instead of its own number")
    parser.add_argument("--jobs", type=int, metavar="N", default=4, help="trials at once where they mostly wait (4)")
    options = parser.parse_args()
    if unknown := set(options.cells) - set(CELLS):
        parser.error(f"no cell is named {', '.join(sorted(unknown))}")
    print(f"`{shlex.join(['python', '-m', 'tests.benchmark', *sys.argv[1:]])}`, {date.today()}, {machine()}\n")
    with tempfile.TemporaryDirectory(prefix="benchmark-") as folder:
        bench = Bench(Path(folder), options.quick, options.tickets, options.jobs)
        for name in options.cells or CELLS:
            print(f"cell {name}", file=sys.stderr)
            print(CELLS[name](bench), flush=True)


if __name__ == "__main__":
    main()

"""classify.py beside the usual ways to do its job: the same tickets, the same stand-in, each in its own process.

    python -m tests.benchmark [--quick] [--tickets N] [--jobs N] [CELL ...]

prints a Markdown table for each cell: a throughput, b slow answers, e kill -9, f memory, w the worlds: limits, noise,
faults, slow servers; "picture" draws tests/pace.svg. "peers" runs only where it is named: it installs libraries that do
the same job from PyPI, each into a fresh environment. The stand-in labels by keywords and is no model, so "right" means
the label that it gave. Unix only.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shlex
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from datetime import date
from importlib.metadata import version
from itertools import product
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from classify import SYSTEM_PROMPT
from tests.gateway import Fault, Script
from tests.lean_gateway import RESPONSE
from tests.trial import (
    BARE,
    CONCURRENCY,
    FILLER,
    HERE,
    NAIVE,
    OURS,
    PEERS,
    PROGRAMS,
    RIVALS,
    SDK,
    Bench,
    Outcome,
    Trial,
    served,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

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
    repetitions = 1 if bench.quick else 5
    small, large = {}, {}
    for _ in range(repetitions):  # in turn, so that a busy minute of the machine is nobody's bad luck
        for who, (count, outcomes) in product(PROGRAMS, ((few, small), (many, large))):
            outcomes.setdefault(who, []).extend(bench.run([Trial(who, count)]))
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
        f"The server alone gives {ceiling_per_s(50 if bench.quick else 1_000):,.0f} answers/s.",
    )


def slow_answers(bench: Bench) -> str:
    """Cell b: what is lost while answers are waited for."""
    count = bench.count(10_000, 200)
    script = Script(rpm=0, latency_s=0.1, jitter=0.3, tail=0.03)
    rows = []
    for o in bench.run(Trial(who, count, script) for who in (BARE, OURS, *bench.rivals)):
        ideal_s = o.served.worked_s / CONCURRENCY
        times = (o.wall_s, o.answering_s)
        rows.append((o.trial.who, f"{ideal_s:.1f} s", *(f"{s:.1f} s, {s / (ideal_s or 1):.3f}" for s in times)))
    title = f"(b) {count:,} tickets, {CONCURRENCY} in flight, 0.1 s ± 30% to an answer, to 3% of them five times that"
    return table(title, "|ideal|wall time of the program|first request to last answer", rows)


def killed(bench: Bench) -> str:
    """Cell e: what a crash costs."""
    count = bench.count(2_000, 200)
    script = Script(rpm=0, latency_s=0.2, jitter=0.3)
    rows = [
        (o.trial.who, o.served.requests, o.right, o.wrong, o.lost, o.twice)
        for o in bench.run((Trial(who, count, script, killed_once=True) for who in (OURS, *bench.rivals)), bench.jobs)
    ]
    title = f"(e) {count:,} tickets, kill -9 half-way, and run again"
    return table(title, "|requests|right|wrong|lost|billed twice", rows)


def memory(bench: Bench) -> str:
    """Cell f: what a ticket leaves in memory."""
    few = bench.count(10_000, 30)
    rows = []
    for who in (OURS, *bench.rivals):
        counts = (few, 20 * few, 100 * few) if who == OURS and not bench.quick else (few, 20 * few)
        first, *more = bench.run((Trial(who, count) for count in counts), jobs=min(2, bench.jobs))
        rows.append((who, f"{few:,}", f"{first.peak_mb:.0f} MB", ""))
        for o in more:
            growth = (o.peak_mb - first.peak_mb) * 2**20 / (o.trial.tickets - few)
            rows.append((who, f"{o.trial.tickets:,}", f"{o.peak_mb:.0f} MB", f"{growth:,.0f} bytes"))
    return table("(f) peak memory", "|tickets|peak memory|growth a ticket", rows)


USUAL = Script(rpm=600, latency_s=0.3, jitter=0.3)  # the account's limit, as told


def noise(percent: float, **more: object) -> Script:
    """429s that have nothing to do with the limit, and look like it."""
    return replace(USUAL, faults=(Fault("status_429_retry", share=percent / 100),), **more)


def counting(limiter: str) -> Script:
    """A gateway in which a refused request counts against the limit, as OpenAI documents it."""
    return replace(USUAL, limiter=limiter, window_s=10, counts_refused=True)


HANG, CUT_OFF = (Fault("hang", share=0.005),), (Fault("length_unclear", share=0.01),)
ERRORS = (Fault("status_500", share=0.08), Fault("cut_before", share=0.015), Fault("cut_inside", share=0.015))
SLOW = replace(USUAL, rpm=0, latency_s=1.5, servers=2, frees_aborted=True)
FEW = {"tickets": 100}  # where a minute lets in few
WORLDS: dict[str, tuple[Script, dict]] = {  # the stand-in, and what differs from the usual trial
    "nothing but the limit": (USUAL, {}),
    "the limit, told twice as much": (USUAL, {"rpm": 1200}),
    "60 a minute, told 600": (replace(USUAL, rpm=60), FEW),
    **{f"{share}% random 429s, `Retry-After: 1`": (noise(share), {}) for share in (3, 10, 25)},
    **{f"{share}% random 429s, no `Retry-After`": (noise(share, retry_after="none"), {}) for share in (3, 10, 25)},
    "3% random 429s, told twice the limit": (noise(3), {"rpm": 1200}),
    "25% random 429s, no limit, told none": (noise(25, rpm=0), {"rpm": 0}),
    "two runs on one account": (USUAL, {"runs": 2}),
    "0.5% hang": (replace(USUAL, faults=HANG), {}),
    "1% cut-off answers": (replace(USUAL, faults=CUT_OFF), {}),
    "8% answered 500, 3% cut connections": (replace(USUAL, faults=ERRORS), {}),
    "10 in flight at most, no limit, told none": (replace(USUAL, rpm=0, max_in_flight=10), {"rpm": 0}),
    "a slow server: 2 at once, 1.5 s each": (SLOW, FEW),
    "the same, time-out 60 s": (SLOW, FEW | {"timeout_s": 60}),
    "refused ones count, 10 s window": (counting("sliding"), {}),
    "refused ones count, 10 s window, told twice": (counting("sliding"), {"rpm": 1200}),
    "refused ones count, bucket": (counting("bucket"), {}),
    "refused ones count, bucket, told twice": (counting("bucket"), {"rpm": 1200}),
}
POSSIBLE = """Possible: tickets / (what the stand-in lets in, or works off, x the share that it answers in whole). It
lets in 600 a minute (bucket of 10) and answers in 0.3 s ± 30%, unless said. Who can be told a pace is told 600 a minute
unless said. The others run with 40 in flight, and with as many as the told pace needs: pace x time to an answer, and
one (4: 600 a minute x 0.3 s). Everybody's time-out is 10 s unless said. The wall time is the whole program's, its start
included; tickets given up make it shorter, as does a window, which lets in its first 100 at once. Who is not done
after 60 s + 5 x possible is ended."""


def trial_in(world: str, who: str, bench: Bench) -> Trial:
    """A contestant in a world, at the scale of this run, with 40 in flight."""
    script, changes = WORLDS[world]
    fields = {"tickets": 600, "rpm": 600, "timeout_s": 10} | changes
    fields["tickets"] = bench.count(fields["tickets"], 20)
    fields |= {"rpm": fields["rpm"] * bench.speed, "timeout_s": fields["timeout_s"] / bench.speed}
    times = {"window_s": script.window_s / bench.speed}
    times["latency_s"] = script.latency_s / (bench.speed if script.servers else 1)
    return Trial(who, script=replace(script, rpm=script.rpm * bench.speed, **times), **fields)


def as_told(trial: Trial) -> list[Trial]:
    """The same with no more in flight than the told pace needs; none where no pace is told."""
    needed = int(trial.rpm / 60 * trial.script.latency_s) + 1
    return [replace(trial, in_flight=needed)] if trial.rpm else []


def row_of(world: str, o: Outcome) -> tuple[object, ...]:
    """A line of the tables of worlds."""
    in_flight = o.trial.in_flight if o.trial.who in PROGRAMS else "its own"
    times = (f"{o.wall_s:.0f} s", f"{o.wall_s / o.trial.possible_s:.2f}")
    return (world, o.trial.who, in_flight, o.right, o.wrong, o.lost, o.served.requests, *times)


COLUMNS = "world||in flight|right|wrong|lost|requests|wall time|over what was possible"


def trials_in(world: str, contestants: Iterable[str], bench: Bench) -> Iterator[Trial]:
    """Those of each contestant; a rival has two."""
    for who in contestants:
        trial = trial_in(world, who, bench)
        yield trial
        if who in RIVALS:
            yield from as_told(trial)


def worlds(bench: Bench) -> str:
    """Cell w: what users meet."""
    cases = [(world, trial) for world in WORLDS for trial in trials_in(world, (OURS, *bench.rivals), bench)]
    outcomes = bench.run([trial for _, trial in cases], bench.jobs)
    rows = [row_of(world, o) for (world, _), o in zip(cases, outcomes, strict=True)]
    title = f"(w) {bench.count(600, 20)} tickets a line, {bench.count(100, 20)} for a slow server or 60 a minute"
    return table(title, COLUMNS, rows, POSSIBLE)


PEER_WORLDS = [
    "nothing but the limit",
    "the limit, told twice as much",
    "10% random 429s, `Retry-After: 1`",
    *(world for world in WORLDS if world.startswith("refused ones count")),
]


def peers(bench: Bench) -> str:
    """Cell peers: libraries that do the same job; how each is set, says the first lines of its program."""
    failed = {who: why for who in PEERS if (why := bench.install(who))}
    installed = [who for who in PEERS if who not in failed]
    contestants = (OURS, SDK, *installed)
    cases = [(world, trial) for world in PEER_WORLDS for trial in trials_in(world, contestants, bench)]
    outcomes = bench.run([trial for _, trial in cases], min(4, bench.jobs))  # a peer takes seconds of CPU to start
    rows = [
        (*row_of(world, o), f"{o.answering_s / o.trial.possible_s:.2f}")
        for (world, _), o in zip(cases, outcomes, strict=True)
    ]
    settings = "How each peer is set, and why: tests/contestants/peer_*.py."
    columns = f"{COLUMNS}|to its last answer, without its start"
    missing = [f"{who} is missing, as it could not be installed: {why}" for who, why in failed.items()]
    versions = f"{', '.join(PEERS.values())}, openai {version('openai')}"
    title = f"(peers) {bench.count(600, 20)} tickets a line; {versions}"
    return table(title, columns, rows, "\n".join((POSSIBLE, settings, *missing)))


# ---- The picture -----------------------------------------------------------------------------------------


ANSWERED = {"facecolor": "#2e7d32", "edgecolor": "#1b5e20"}
REFUSED = {"facecolor": "#f9d6d2", "edgecolor": "#b3261e", "hatch": "////"}
WRITTEN_ON = {"boxstyle": "square,pad=0.3", "facecolor": "white", "edgecolor": "none"}


GAVE_UP = """It ends early because {0.wrong:,} tickets
were refused four times each:
they are written as "other",
and no model has read them."""
WENT_ON = """It was told twice the limit. {0.served.refused:,} requests were refused:
it slows down, and sends each again until it is answered."""


def draw(axis: Axes, o: Outcome, bin_s: float) -> None:
    """One panel: what was answered and, on top of it, refused; the limit; what became of the tickets."""
    limit, end_s = o.trial.script.rpm / 60, o.answering_s
    edges = [n * bin_s for n in range(int(end_s / bin_s) + 2)]
    for statuses, look in (((200, 429), REFUSED), ((200,), ANSWERED)):
        times = [at - o.served.first_s for at, status in o.served.events if status in statuses]
        axis.hist(times, edges, weights=[1 / bin_s] * len(times), histtype="stepfilled", linewidth=0.6, **look)
    axis.axhline(limit, color="black", linewidth=1.4, linestyle=(0, (5, 2)))
    name = f"the limit:\n{60 * limit:,.0f} a minute"
    axis.text(1.01, limit, name, transform=axis.get_yaxis_transform(), va="center", weight="bold")
    middle = {"ha": "center", "va": "center", "weight": "bold", "in_layout": False}
    axis.text(end_s / 2, limit / 2, f"answered: {o.right:,}", color="white", **middle)
    if o.wrong:
        refused = f"refused: {o.served.refused:,}"
        axis.text(end_s / 2, 2.7 * limit, refused, color=REFUSED["edgecolor"], bbox=WRITTEN_ON, **middle)
        axis.text(end_s + 2 * bin_s, 3.2 * limit, GAVE_UP.format(o), va="center", in_layout=False)
        fate = f"gives up on {o.wrong:,}: they get a wrong label"
    else:
        axis.text(0, 2.2 * limit, WENT_ON.format(o), va="center", in_layout=False)
        fate = f"{o.right:,} right, {o.lost:,} without a label" if o.lost else f"all {o.right:,} right"
    axis.set_title(f"{o.trial.who}\n{fate}", loc="left", fontsize=13, weight="bold")
    axis.spines[["top", "right"]].set_visible(False)


def picture(bench: Bench) -> str:
    """Draws what one limit makes of 1,000 tickets: the common pattern above, classify.py below."""
    from matplotlib import pyplot, rcParams  # slow to import, and wanted here only

    rcParams.update({"svg.hashsalt": "pace", "svg.fonttype": "none", "font.family": "sans-serif", "font.size": 10})
    count, rpm = bench.count(1_000, 50), 600 * bench.speed
    outcomes = bench.run([Trial(who, count, replace(USUAL, rpm=rpm), 2 * rpm) for who in (NAIVE, OURS)], bench.jobs)
    figure, axes = pyplot.subplots(2, sharex=True, sharey=True, figsize=(8.5, 5.6), layout="constrained")
    for axis, o in zip(axes, outcomes, strict=True):
        draw(axis, o, bin_s=2 / bench.speed)
    axes[1].set_xlabel("seconds since the first request")
    figure.supylabel("requests a second")
    target = bench.folder / "pace.svg" if bench.quick else HERE / "pace.svg"  # only a full run is worth keeping
    figure.savefig(target, metadata={"Date": None})
    target.write_text(re.sub(r"(\.\d)\d+", r"\1", target.read_text("utf-8")), "utf-8")  # tenths of a point will do
    return f"### The picture\n\n{target.name}: {target.stat().st_size / 1000:.0f} kB\n"


# ---- The command line ------------------------------------------------------------------------------------

CELLS: dict[str, Callable[[Bench], str]] = {
    "a": throughput, "b": slow_answers, "e": killed, "f": memory, "w": worlds, "picture": picture, "peers": peers,
}  # fmt: skip
USUAL_CELLS = [name for name in CELLS if name != "peers"]  # which installs what it compares


def machine() -> str:
    """What the figures depend on."""
    memory_gb = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    size = f"{os.cpu_count()} cores, {memory_gb:.0f} GB, {platform.system()} {platform.machine()}"
    return f"{size}, Python {platform.python_version()}, aiohttp {version('aiohttp')}, openai {version('openai')}"


def main() -> int:
    """Prints the tables; the exit status is 1 where a contestant did not come to its end."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmark", description=__doc__.split("\n")[0])
    parser.add_argument("cells", nargs="*", metavar="CELL", help=f"of {', '.join(CELLS)} (default: all but peers)")
    parser.add_argument("--quick", action="store_true", help="everything small: does the benchmark still work?")
    parser.add_argument("--tickets", type=int, metavar="N", help="a cell, instead of its own number")
    parser.add_argument("--jobs", type=int, metavar="N", default=12, help="trials at once where they mostly wait (12)")
    options = parser.parse_args()
    if unknown := set(options.cells) - set(CELLS):
        parser.error(f"no cell is named {', '.join(sorted(unknown))}")
    print(f"`{shlex.join(['python', '-m', 'tests.benchmark', *sys.argv[1:]])}`, {date.today()}, {machine()}\n")
    with tempfile.TemporaryDirectory(prefix="benchmark-") as folder:
        bench = Bench(Path(folder), options.quick, options.tickets, options.jobs)
        for name in options.cells or USUAL_CELLS:
            print(f"cell {name}", file=sys.stderr)
            print(CELLS[name](bench), flush=True)
    return int(bool(bench.broken))


if __name__ == "__main__":
    sys.exit(main())

"""classify.py beside the usual ways to do its job: the same tickets, the same stand-in, each in its own process.

    python -m tests.benchmark [--quick] [--tickets N] [--jobs N] [CELL ...]

prints a Markdown table for each cell: a throughput, b slow answers, c a limit, d faults, e kill -9, f memory,
g every kind of limit; "picture" draws tests/pace.svg. The stand-in labels by keywords and is no model, so "right"
means the label that it gave. Unix only.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from datetime import date
from importlib.metadata import version
from itertools import product
from pathlib import Path
from statistics import median
from urllib.parse import urlsplit

from classify import SYSTEM_PROMPT
from tests.gateway import Fault, Script
from tests.lean_gateway import RESPONSE
from tests.trial import BARE, CONCURRENCY, FILLER, HERE, NAIVE, OURS, PROGRAMS, Bench, Trial, served

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
        rows.append((o.trial.who, f"{ideal_s:.1f} s", *(f"{s:.1f} s, {s / ideal_s:.3f}" for s in times)))
    title = f"(b) {count:,} tickets, {CONCURRENCY} in flight, 0.1 s ± 30% to an answer, to 3% of them five times that"
    return table(title, "|ideal|wall time of the program|first request to last answer", rows)


def limited(bench: Bench) -> str:
    """Cell c: the gateway's usual limit."""
    count = bench.count(1_000, 100)
    rpm = 600 * bench.speed
    script = Script(rpm=rpm, latency_s=0.3, jitter=0.3)
    trials = [Trial(OURS, count, script, told) for told in (rpm, 2 * rpm)]
    trials += [Trial(who, count, script) for who in bench.rivals]
    rows = [
        (o.trial.who, o.trial.told, f"{o.share:.3f}", o.served.refused, o.right, o.wrong, o.lost, f"{o.wall_s:.0f} s")
        for o in bench.run(trials, bench.jobs)
    ]
    title = f"(c) {count:,} tickets, a limit of {rpm:,} a minute (bucket of 10)"
    return table(title, "|told|share of the limit|refused|right|wrong|lost|wall time", rows)


def faults(bench: Bench) -> str:
    """Cell d: a bad day."""
    count = bench.count(2_000, 100)
    bad = (Fault("cut_before", every=66), Fault("cut_inside", every=67), Fault("status_500", every=12))
    script = Script(rpm=0, latency_s=0.1, jitter=0.3, faults=bad)
    rows = [
        (o.trial.who, o.served.requests, o.right, o.wrong, o.lost, o.twice)
        for o in bench.run((Trial(who, count, script) for who in (OURS, *bench.rivals)), bench.jobs)
    ]
    title = f"(d) {count:,} tickets, 8% of the requests answered 500, 3% cut off, half of these in the answer"
    return table(title, "|requests|right|wrong|lost|billed twice", rows)


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


LIMITERS = {
    "bucket of 5": {"burst": 5},
    "sliding, 10 s": {"limiter": "sliding", "window_s": 10.0},
    "sliding, 60 s": {"limiter": "sliding", "window_s": 60.0},
    "fixed, 10 s": {"limiter": "fixed", "window_s": 10.0},
    "fixed, 60 s": {"limiter": "fixed", "window_s": 60.0},
}
BELIEFS = ((1200, 1200), (1200, 600), (3000, 300), (0, 600))  # what the client is told, and what is true


def limiter_trials(bench: Bench) -> Iterator[tuple[str, str, Trial]]:
    """The limiter, its Retry-After, and the trial."""
    count, speed = bench.count(600, 30), bench.speed
    limiters, forms, beliefs = LIMITERS, ("seconds", "float", "date", "none"), BELIEFS
    if bench.quick:
        limiters, forms, beliefs = ("bucket of 5",), forms[:1], beliefs[1:2]
    for limiter, form, (told, true) in product(limiters, forms, beliefs):
        script = Script(rpm=true * speed, latency_s=0.3, jitter=0.3, retry_after=form, **LIMITERS[limiter])
        yield limiter, form, Trial(OURS, count, script, told * speed)
        if form == "seconds" and told:
            yield from ((limiter, form, Trial(who, count, script)) for who in bench.rivals)
    for limiter, script in (
        ("10 in flight", Script(rpm=0, max_in_flight=10, latency_s=0.3, jitter=0.3)),
        ("one at a time", Script(rpm=0, servers=1, latency_s=0.2 / speed)),
    ):
        for told in (600 * speed, 0):
            yield limiter, "-", Trial(OURS, count, script, told)
        yield from ((limiter, "-", Trial(who, count, script)) for who in bench.rivals)


def all_limits(bench: Bench) -> str:
    """Cell g: limits of every kind, and what the client believed."""
    cases = list(limiter_trials(bench))
    rows = []
    for (limiter, form, trial), o in zip(cases, bench.run((trial for *_, trial in cases), bench.jobs), strict=True):
        true, share = (f"{trial.script.rpm:,}/min", f"{o.share:.3f}") if trial.script.rpm else ("-", "-")
        refused = f"{o.served.refused / o.served.requests:.1%}"
        rows.append(
            (limiter, form, true, trial.who, trial.told, share, refused, o.right, o.wrong, o.lost, f"{o.wall_s:.0f} s")
        )
    header = "limiter|Retry-After|true limit||told|share of the limit|refused|right|wrong|lost|wall time"
    return table(f"(g) limits of every kind, {bench.count(600, 30):,} tickets a line", header, rows)


# ---- The picture -----------------------------------------------------------------------------------------


def picture(bench: Bench) -> str:
    """Draws answers and refusals over time, the common pattern above, ours below."""
    from matplotlib import pyplot, rcParams  # slow to import, and wanted here only

    rcParams.update({"svg.hashsalt": "pace", "svg.fonttype": "none", "font.family": "sans-serif"})
    count, rpm = bench.count(1_000, 100), 600 * bench.speed
    script = Script(rpm=rpm, latency_s=0.3, jitter=0.3)
    naive, ours = bench.run((Trial(NAIVE, count, script), Trial(OURS, count, script, 2 * rpm)), bench.jobs)
    end = max(at - o.served.first_s for o in (naive, ours) for at, _ in o.served.events)
    width_s = 1 / bench.speed
    bins = [n * width_s for n in range(int(end / width_s) + 2)]
    figure, axes = pyplot.subplots(2, sharex=True, sharey=True, figsize=(8, 4.5), layout="constrained")
    for axis, o, told in zip(axes, (naive, ours), ("40 at once, three retries", f"told {2 * rpm:,}/min"), strict=True):
        times = [[at - o.served.first_s for at, status in o.served.events if status == wanted] for wanted in (200, 429)]
        names = [f"{name}: {len(part):,}" for name, part in zip(("answered", "refused"), times, strict=True)]
        axis.hist(times, bins, histtype="stepfilled", stacked=True, color=("#2e7d32", "#d1495b"), label=names)
        axis.axhline(rpm / 60 * width_s, color="black", linewidth=0.8, linestyle="--", label=f"limit: {rpm:,}/min")
        verdict = f"{o.right:,} of {count:,} tickets right, {o.wrong:,} wrong, {o.lost:,} without a label"
        axis.set_title(f"{o.trial.who}, {told}: {verdict}", fontsize=10, loc="left")
        axis.set_ylabel(f"requests in {width_s:g} s")
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


def main() -> int:
    """Prints the tables; the exit status is 1 where a contestant did not come to its end."""
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
    return int(bool(bench.broken))


if __name__ == "__main__":
    sys.exit(main())

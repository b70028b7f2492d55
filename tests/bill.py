"""What must never happen, whatever a test was about: compares the stand-in's bill with what the program left.

    broken_promises(gateway.bill, done, tickets=[{"t1": "My invoice is wrong."}], budget_usd=2.0)  # [] if all is well

An Audit does so for everything that a desk ran. Each promise below is a function that tells how it is broken; its name,
with hyphens, is what a test says that breaks it on purpose: except_for={"answer-kept"}.
"""

from __future__ import annotations

import argparse
import csv
import functools
import hashlib
import itertools
import json
import math
import re
import shutil
import sqlite3
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass, field, is_dataclass, replace
from functools import cached_property
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import TYPE_CHECKING

from tests.gateway import ANSWERED, CUT, CUT_SHORT, Gateway, Item

if TYPE_CHECKING:
    from tests.conftest import Done

Row = SimpleNamespace  # of the ledger: an attribute a column
Tickets = Mapping[str, str]  # id to text as it is sent, in the order of the CSV
Prices = Mapping[str, tuple[float, float, float]]  # $ per million tokens in, out and cached

# ---- What the program left ------------------------------------------------------------------------------


def ledger_rows(path: Path) -> list[Row]:
    """The rows of a ledger, read from a copy, as reading it after a kill changes it; sqlite3.Error if it is none."""
    with tempfile.TemporaryDirectory() as folder:
        for name in (path.name, f"{path.name}-wal"):
            if path.with_name(name).exists():
                shutil.copyfile(path.with_name(name), Path(folder, name))
        db = sqlite3.connect(Path(folder, path.name))
        db.row_factory = sqlite3.Row
        try:
            [[verdict]] = db.execute("PRAGMA integrity_check")
            if verdict != "ok":
                raise sqlite3.DatabaseError(verdict)
            rows = [Row(**dict(row)) for row in db.execute("SELECT * FROM requests ORDER BY number")]
            tables = {name for [name] in db.execute("SELECT name FROM sqlite_master")}
            left_out = (
                {reply for (reply,) in db.execute("SELECT reply FROM disregarded")} if "disregarded" in tables else ()
            )
            for row in rows:
                row.is_disregarded = row.reply in left_out
            return rows
        finally:
            db.close()


def output_lines(path: Path, id_column: str | None) -> list[dict]:
    """The lines of the output that have a label; ValueError where it is torn."""
    if path.suffix != ".csv":
        lines = [json.loads(line) for line in path.read_bytes().splitlines() if line.strip()]
        return [line for line in lines if line["label"] is not None]
    rows = csv_rows(path)
    named = {name.strip().casefold(): name for row in rows[:1] for name in row}
    column = named.get((id_column or "").casefold())
    return [
        {"id": row[column] if column else str(number), "label": row["model_label"], "reply": row["reply"]}
        for number, row in enumerate(rows, 1)
        if row["model_label"]
    ]


def csv_rows(path: Path) -> list[dict[str, str]]:
    """The rows of labels.csv, each cell as it was before it was kept from being a formula."""
    with open(path, newline="", encoding="utf-8-sig") as file:
        delimiter = file.readline().partition("model_label")[0][-1:] or ","
        file.seek(0)
        rows = list(csv.DictReader(file, delimiter=delimiter))
    return [{unquoted(name): unquoted(cell or "") for name, cell in row.items() if name} for row in rows]


def unquoted(cell: str) -> str:
    """A cell without the quote that keeps a spreadsheet from reading it as a formula."""
    return cell[1:] if re.match("'[=+@\t-]", cell) else cell


def squeezed(text: str | None) -> str:
    """A reply as it is compared: without differences of whitespace and of what cannot be written."""
    return " ".join((text or "").encode(errors="replace").decode().split())


def is_empty(text: str) -> bool:
    """Whether a ticket has nothing to ask about."""
    return not any(map(str.isalnum, text))


@dataclass(frozen=True)
class Evidence:
    """All that a promise may look at."""

    items: Sequence[Item]
    done: Done
    tickets: Sequence[Tickets]  # of each run on this output, the last one's last
    budget_usd: float = 0.0  # the largest of the runs'; 0: no limit
    prices: Prices = field(default_factory=dict)
    fallback: str | None = "other"
    id_column: str | None = "id"
    named_label: Callable[[str], str | None] = field(default=str)  # rule R3
    lost: int = 0  # answers that a kill may have lost: as many as were in flight
    is_sample: bool = False  # the last run wanted some of the tickets only

    @property
    def ended(self) -> bool:
        """Whether the last run began and came to its end, so that the output is of today."""
        return self.done.status in (0, 1, 130)

    @cached_property
    def rows(self) -> list[Row] | None:
        """Of the ledger; None where there is none that can be read."""
        path = self.done.output.with_suffix(".db")
        try:
            return ledger_rows(path) if path.is_file() else None
        except sqlite3.Error:
            return None

    @cached_property
    def lines(self) -> list[dict] | None:
        """Of the output; None where there is none that can be read."""
        try:
            return output_lines(self.done.output, self.id_column) if self.done.output.exists() else None
        except (ValueError, KeyError):
            return None

    @property
    def now(self) -> Tickets:
        """The tickets of the last run."""
        return self.tickets[-1] if self.tickets else {}

    def texts(self, id_: str) -> list[str]:
        """The texts that a line of the output may be about, each once, in the order of the runs."""
        runs = [self.now] if self.ended else self.tickets
        return list(dict.fromkeys(tickets[id_] for tickets in runs if id_ in tickets))

    @cached_property
    def answers(self) -> list[Item]:
        """The requests that were answered in whole, in the order in which they were."""
        return sorted((item for item in self.items if item.ended == ANSWERED), key=lambda item: item.ended_at)

    @cached_property
    def complete(self) -> dict[str, list[Item]]:
        """Text to the complete answers about it."""
        by_text = defaultdict(list)
        for item in self.answers:
            if item.is_complete:
                by_text[item.text].append(item)
        return by_text

    @cached_property
    def usable(self) -> dict[str, list[Item]]:
        """The same, with the answers that were cut, but not before they had named a label."""
        by_text = defaultdict(list)
        for item in self.answers:
            if item.is_complete or (item.end in CUT_SHORT and self.label_of(item)):
                by_text[item.text].append(item)
        return by_text

    def label_of(self, item: Item) -> str | None:
        """What R3 makes of its reply."""
        return self.named_label(item.reply or "")

    def cost_usd(self, of: Item | Row) -> float:
        """What a request cost, or must be booked at; nothing without a price."""
        in_usd, out_usd, cached_usd = self.prices.get(of.model, (0, 0, 0))
        cached = of.tokens_cached or 0
        return ((of.tokens_in - cached) * in_usd + cached * cached_usd + of.tokens_out * out_usd) / 1e6

    @cached_property
    def by_text(self) -> dict[str | None, list[Row]]:
        """The ledger's rows by the texts that their tickets had in any run; None: of tickets that nobody knows."""
        by_text = defaultdict(list)
        for row in self.rows or ():
            for text in {tickets.get(row.id) for tickets in self.tickets} or {None}:
                by_text[text].append(row)
        return by_text

    @cached_property
    def unmatched(self) -> tuple[list[Item], list[Row]]:
        """The answers that no row tells of, and the rows that no answer stands behind."""
        free, without = {row.number: row for row in self.rows or ()}, []
        for item in self.answers:
            rows = itertools.chain(self.by_text[item.text], self.by_text[None])
            if row := next((row for row in rows if row.number in free and self.tells_of(row, item)), None):
                del free[row.number]
            else:
                without.append(item)
        return without, list(free.values())

    def tells_of(self, row: Row, item: Item) -> bool:
        """Whether a row says of an answer what must be said."""
        return row.model == item.model and has_tokens(row, item) and self.has_reply(row, item)

    def has_reply(self, row: Row, item: Item) -> bool:
        """Whether a row has the label that its answer names, and the reply of one that names none."""
        label = self.label_of(item)
        if not item.is_complete:
            return row.label is None or (item.end in CUT_SHORT and row.label == label)
        if row.label is None and not row.reply:
            return False
        return row.label == label and squeezed(row.reply) in squeezed(item.reply)


def has_tokens(row: Row, item: Item) -> bool:
    """Whether a row has the tokens that the client was told, or else says that it has estimated them."""
    told = (item.tokens_in, item.tokens_out, item.tokens_cached)
    if item.was_told:
        return not row.estimated and (row.tokens_in, row.tokens_out, row.tokens_cached or 0) == told
    return bool(row.estimated)


def shown(item: Item) -> str:
    """One request, for a message."""
    tokens = f"{item.tokens_in} tokens in, {item.tokens_out} out"
    return f"request {item.number} ({item.ended}, turn {item.turn}, {tokens}): {item.text[:60]!r} -> {item.reply!r:.80}"


def shown_row(row: Row) -> str:
    """One row, for a message."""
    tokens = f"{row.tokens_in} tokens in, {row.tokens_out} out"
    return f"row {row.number} ({row.id}, {row.kind}, {tokens}): label {row.label!r}, reply {row.reply!r:.80}"


def all_but(lost: int, broken: list[str]) -> list[str]:
    """What is broken, if that is more than a kill may have lost."""
    return broken if len(broken) > lost else []


# ---- The promises: ledger and money ---------------------------------------------------------------------

Broken = Iterator[str] | list[str]


def ledger_readable(of: Evidence) -> Broken:
    """Where anything was answered in whole, there is a ledger, and it can be read."""
    if of.rows is None and len(of.answers) > of.lost:
        path = of.done.output.with_suffix(".db")
        yield f"{path.name} {'cannot be read' if path.exists() else 'is missing'} after {len(of.answers)} answers"


def answer_kept(of: Evidence) -> Broken:
    """Every answer that was delivered in whole stands in the ledger once, with its tokens, label and reply."""
    if of.rows is None:
        return []
    return all_but(of.lost, [f"in no row: {shown(item)}" for item in of.unmatched[0]])


def row_true(of: Evidence) -> Broken:
    """A row that has told tokens, a label or a reply has an answer behind it, which no other row has."""
    worked_on = [item for item in of.items if item.ended == CUT and item.tokens_in]
    for row in of.unmatched[1]:
        if not (row.label or row.reply or (row.tokens_in and not row.estimated)):
            continue
        if not row.tokens_in and any(is_empty(tickets.get(row.id, "?")) for tickets in of.tickets):
            continue
        told = (row.model, row.tokens_in, row.tokens_out)  # tokens can be told without an answer
        cut = next((item for item in worked_on if (item.model, item.tokens_in, item.tokens_out) == told), None)
        if cut and not row.label:
            worked_on.remove(cut)
        else:
            yield f"no answer stands behind {shown_row(row)}"


def cost_covered(of: Evidence) -> Broken:
    """The ledger's sums are never below the bill of what was delivered with its tokens."""
    if of.rows is None:
        return
    measures = {
        "tokens in": (lambda item: item.tokens_in, lambda row: row.tokens_in),
        "tokens out": (lambda item: item.tokens_out, lambda row: row.tokens_out),
        "$": (of.cost_usd, lambda row: row.cost_usd or 0.0),
    }
    for name, (billed, booked) in measures.items():
        bill = sum(sorted(billed(item) for item in of.answers if item.was_told)[: -of.lost or None])
        ledger = sum(booked(row) for row in of.rows)
        if ledger < bill - 1e-9:
            yield f"{name}: the ledger has {ledger:,.10g}, delivered were {bill:,.10g}"


def cost_true(of: Evidence) -> Broken:
    """A row costs what its tokens do at the model's price, and no more."""
    for row in of.rows or ():
        booked, cost = row.cost_usd or 0.0, of.cost_usd(row)
        if abs(booked - cost) > 1e-9:
            yield f"${booked:.9f} is booked for {shown_row(row)}, its tokens cost ${cost:.9f}"


def within_budget(of: Evidence) -> Broken:
    """All that was worked on, delivered or not, cost no more than the budget."""
    bill = sum(sorted(map(of.cost_usd, of.items))[: -of.lost or None])
    if of.budget_usd and bill > of.budget_usd + 1e-9:
        yield f"the bill is ${bill:.6f}, the budget ${of.budget_usd:.6f}"


# ---- The promises: questions ----------------------------------------------------------------------------


def repeats(of: Evidence, with_label: bool) -> list[str]:
    """The requests that were asked again, word for word, after a complete answer that names a label, or none."""
    answered: dict[str, Item] = {}
    for item in of.answers:
        if not with_label and any(row.is_disregarded for row in of.by_text[item.text]):
            continue
        if item.is_complete and (of.label_of(item) is not None) == with_label:
            answered.setdefault(item.asked, item)
    broken = []
    for item in of.items:
        first = answered.get(item.asked) if item.asked else None
        # Two that were in flight together are one too many, if the client waited for both.
        is_both = first and item.ended == ANSWERED and item.ended_at > first.asked_at
        if first and item is not first and (is_both or item.asked_at > first.ended_at):
            broken.append(f"{shown(item)}: request {first.number} had brought {first.reply!r:.80}")
    return broken


def answered_once(of: Evidence) -> Broken:
    """Nothing is asked again that had been answered in whole with a label."""
    return all_but(of.lost, repeats(of, with_label=True))


def asked_once_more(of: Evidence) -> Broken:
    """A reply without a label is asked about once more, in the same conversation; nothing else is.

    Where the prompt or the model was wrong, such replies count as failures: the ledger says of which it thinks so.
    """
    yield from all_but(of.lost, repeats(of, with_label=False))
    for item in of.items:
        if item.turn > 2:
            yield f"asked a third time: {shown(item)}"
        if item.turn == 2 and not any(
            (earlier.model, earlier.turn) == (item.model, 1)
            and earlier.ended_at <= item.asked_at
            and of.label_of(earlier) is None
            for earlier in of.complete[item.text]
        ):
            yield f"asked once more without need: {shown(item)}"


# ---- The promises: the output ---------------------------------------------------------------------------


def output_whole(of: Evidence) -> Broken:
    """The output is never torn, also where a kill met its writing."""
    if of.lines is None and of.done.output.exists():
        yield f"{of.done.output.name} cannot be read"


def csv_order(of: Evidence) -> Broken:
    """Each id stands in the output once, in the order of the CSV, and no other."""
    ids = [line["id"] for line in of.lines or ()]
    if twice := [id_ for id_, times in Counter(ids).items() if times > 1]:
        yield f"twice in the output: {', '.join(twice[:5])}"
    known = dict.fromkeys(itertools.chain(*([of.now] if of.ended else of.tickets)))
    if unknown := [id_ for id_ in ids if id_ not in known]:
        yield f"in the output, not in the CSV: {', '.join(unknown[:5])}"
    place = {id_: number for number, id_ in enumerate(of.now)}
    places = [place[id_] for id_ in ids if id_ in place]
    if of.ended and places != sorted(places):
        yield "the output is not in the order of the CSV"


def about(of: Evidence, line: dict) -> list[Item]:
    """The answers to the ticket of a line, from its model: complete ones, and cut ones that name their label."""
    items = [item for text in of.texts(line["id"]) for item in of.usable[text]]
    return [item for item in items if line.get("model") in (None, item.model)]


def is_unnamed(of: Evidence, line: dict) -> bool:
    """Whether a line shows FALLBACK for want of a reply that names it."""
    return line["label"] == of.fallback and of.fallback not in map(of.label_of, about(of, line))


def label_true(of: Evidence) -> Broken:
    """Each label in the output is what R3 makes of a complete reply to that ticket, and what the ledger has."""
    kept = defaultdict(set)
    for row in of.rows or ():
        kept[row.digest].add(row.label)
    for line in of.lines or ():
        if is_unnamed(of, line):
            continue
        labels = {of.label_of(item) for item in about(of, line)}
        if line["label"] not in labels:
            yield f"{line['id']} is {line['label']!r} in the output; its replies name {labels}"
        elif of.rows is not None and line.get("digest") and line["label"] not in kept[line["digest"]]:
            yield f"{line['id']} is {line['label']!r} in the output; its rows have {kept[line['digest']]}"


def fallback_true(of: Evidence) -> Broken:
    """FALLBACK stands only beside a last reply that names nothing, or for a ticket without text."""
    for line in of.lines or ():
        if not is_unnamed(of, line) or any(map(is_empty, of.texts(line["id"]))):
            continue
        # A killed run may have left the output of a former one, when the ticket had another text.
        last = {(item.text, item.prompt): item for item in about(of, line)}.values()
        replies = [squeezed(item.reply) for item in last if of.label_of(item) is None]
        reply = squeezed(line.get("reply"))
        if not reply or not any(reply in whole for whole in replies):
            yield f"{line['id']} has FALLBACK and the reply {reply!r:.80}; its last replies: {[i.reply for i in last]}"


def answer_used(of: Evidence) -> Broken:
    """A label that was paid for, under the last prompt and model, stands in the output of a run that ended."""
    if not of.ended or of.is_sample or not of.done.output.exists() or of.lines is None:
        return []
    asked = sorted((item for item in of.items if item.asked), key=lambda item: item.asked_at)
    models = {line.get("model") for line in of.lines} | {item.model for item in asked[-1:]}
    prompts = {item.model: item.prompt for item in asked if item.model in models}.values()
    ids = {line["id"] for line in of.lines}
    lost = {
        id_: item
        for id_, text in of.now.items()
        if id_ not in ids
        for item in of.complete[text]
        if item.prompt in prompts and of.label_of(item)
    }
    return all_but(of.lost, [f"{id_} is not in the output: {shown(item)}" for id_, item in lost.items()])


# ---- The promises: report and exit status ---------------------------------------------------------------

REPORT = re.compile(r"Classified ([\d,]+) tickets?\nTokens: ([\d,]+) in / ([\d,]+) out\nCost  : (.*)\n")


def number(text: str) -> float:
    """Of a text with commas; infinite where it is none, which is equal to nothing."""
    digits = text.replace(",", "")
    return float(digits) if re.fullmatch(r"\d+(\.\d*)?", digits) else math.inf


def wanted_rows(of: Evidence) -> list[list[Row]]:
    """The rows of the tickets of the last run, as one may understand it: by what was asked, or by their ids.

    The two differ where a ticket's text, the prompt or the model was another one in an earlier run.
    """
    lines = {line["id"]: line.get("digest") for line in of.lines or ()}
    by_id = [row for row in of.rows or () if row.id in of.now]
    digests = {*lines.values(), *(row.digest for row in by_id if lines.get(row.id) is None)}
    return [[row for row in of.rows or () if row.digest in digests], by_id]


def agrees(rows: list[Row], tokens_in: str, tokens_out: str, cost: str) -> bool:
    """Whether the second and the third line of the report are the sums of these rows."""
    if (number(tokens_in), number(tokens_out)) != (sum(r.tokens_in for r in rows), sum(r.tokens_out for r in rows)):
        return False
    cost_usd = sum(row.cost_usd or 0.0 for row in rows)
    if not (figure := re.search(r"\$([\d,]+(?:\.(\d+))?)", cost)):
        return not cost_usd
    rounding = 0.51 * 10 ** -len(figure[2] or "")
    return abs(number(figure[1]) - cost_usd) <= rounding


def report_true(of: Evidence) -> Broken:
    """The report's three lines are the sums of the output and the ledger."""
    if not of.ended or of.is_sample:
        return
    lines = REPORT.match(of.done.stdout)
    if lines is None:
        if of.done.status != 130:  # it may have met a run that had not begun
            yield f"the report does not begin with its three lines: {of.done.stdout[:120]!r}"
        return
    classified, *figures = lines.groups()
    if number(classified) != len(of.lines or ()):
        yield f"{lines[0].splitlines()[0]!r}, but {len(of.lines or ())} have a label in the output"
    if not any(agrees(rows, *figures) for rows in wanted_rows(of)):
        sums = [
            f"{sum(r.tokens_in for r in rows):,} in / {sum(r.tokens_out for r in rows):,} out, "
            f"${sum(r.cost_usd or 0 for r in rows):.6f}"
            for rows in wanted_rows(of)
        ]
        yield f"the report has {figures}, the ledger {' or '.join(dict.fromkeys(sums))}"


def exit_true(of: Evidence) -> Broken:
    """The exit status is 0 if every ticket has its label where it was to be written, and else it is not."""
    ids = {line["id"] for line in of.lines or ()}
    without = [id_ for id_ in of.now if id_ not in ids]
    is_written = REPORT.match(of.done.stdout) and not re.search(r"NOT WRITTEN|\.part\b", of.done.stdout)
    if of.done.status == 1 and is_written and of.now and not without:
        yield "exit status 1, but all tickets have a label"
    if of.done.status != 0:
        return
    if without and not (of.is_sample and ids):
        yield f"exit status 0, but {len(without)} tickets have no label, such as {without[0]}"


PROMISES: dict[str, Callable[[Evidence], Broken]] = {
    promise.__name__.replace("_", "-"): promise
    for promise in (
        *(ledger_readable, answer_kept, row_true, cost_covered, cost_true, within_budget),
        *(answered_once, asked_once_more),
        *(output_whole, csv_order, label_true, fallback_true, answer_used),
        *(report_true, exit_true),
    )
}


def broken_promises(
    items: Sequence[Item],
    done: Done,
    *,
    budget_usd: float,
    tickets: Sequence[Tickets],
    killed: bool = False,
    in_flight: int = 0,
    except_for: Collection[str] = (),
    **more: object,
) -> list[str]:
    """What the program did not keep, a line each, named by its promise; `more` is as in Evidence.

    `in_flight`: requests that were in flight when runs were killed, in all; nothing is forgiven unless `killed`.
    """
    if unknown := set(except_for) - PROMISES.keys():
        raise ValueError(f"no promise is named {sorted(unknown)}; there are: {', '.join(PROMISES)}")
    if "named_label" not in more:
        import classify

        more["named_label"] = classify.named_label
    lost = in_flight if killed else 0
    evidence = Evidence(items, done, tickets, budget_usd=budget_usd, lost=lost, **more)
    kept = {name: promise for name, promise in PROMISES.items() if name not in except_for}
    return [f"{name}: {how}" for name, promise in kept.items() for how in first_five(promise(evidence))]


def first_five(broken: Broken) -> list[str]:
    """The first five, and how many more there are."""
    *first, rest = *itertools.islice(hows := iter(broken), 5), sum(1 for _ in hows)
    return [*first, f"and {rest} more"] if rest else first


# ---- The audit of a desk --------------------------------------------------------------------------------


MOST_CHECKED = 5_000_000  # bytes of a CSV that an audit reads again


@functools.lru_cache(maxsize=64)
def program_of(source: str) -> ModuleType:
    """The program with its settings as they stand in a desk's own copy."""
    name = f"audited_{hashlib.blake2b(source.encode(), digest_size=8).hexdigest()}"
    sys.modules[name] = module = ModuleType(name)  # where its dataclasses look for it
    exec(compile(source, "classify.py", "exec"), vars(module))
    return module


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    """What the audit needs to know of a command line; None or False where it does not say."""
    parser = argparse.ArgumentParser(add_help=False, exit_on_error=False)
    parser.add_argument("tickets", nargs="?", default="tickets.csv")
    parser.add_argument("-o", "--output", default="labels.jsonl")
    parser.add_argument("--concurrency", type=int)
    parser.add_argument("--budget", type=float)
    parser.add_argument("--sample")
    parser.add_argument("--dry-run", action="store_true")
    for other in ("--model", "--rpm"):
        parser.add_argument(other)
    return parser.parse_known_args(list(arguments))[0]


@dataclass
class Ran:
    """One run of the program: what it was given, and what it left."""

    folder: Path
    program: str
    csv: bytes
    arguments: argparse.Namespace
    started_at: float
    ended_at: float = math.inf
    process: object = None  # once it has begun
    done: Done | None = None

    @property
    def output(self) -> Path:
        """Where its labels go; the ledger stands beside what a symlink points to."""
        return (self.folder / self.arguments.output).resolve()

    @property
    def ledger(self) -> Path:
        """Where its requests are kept; outputs as .jsonl and as .csv share one."""
        return self.output.with_suffix(".db")

    @property
    def was_killed(self) -> bool:
        """Whether it ended by a signal that leaves no time to write, or nobody knows how it ended."""
        return self.done is None or self.done.status is None or self.done.status < 0

    def last_seen_at(self) -> float:
        """When it ended; a run whose end nobody saw was killed soon after its start."""
        return self.started_at if self.ended_at == math.inf else self.ended_at

    def setting(self, name: str) -> object:
        """A constant of its program."""
        return getattr(program_of(self.program), name)

    def tickets(self) -> Tickets:
        """Its tickets as the program reads them; none where it refuses the file, and so sends nothing."""
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, self.folder.joinpath(self.arguments.tickets).name)
            path.write_bytes(self.csv)
            try:
                return {ticket.id: ticket.text for ticket in program_of(self.program).load_tickets(str(path))}
            except self.setting("InputError"):
                return {}


class Audit:
    """Collects what a desk runs and against which gateways; `broken` compares it, a ledger at a time."""

    def __init__(self) -> None:
        self.runs: list[Ran] = []
        self.gateways: list[Gateway] = []
        self.except_for: set[str] = set()  # the promises that a test breaks on purpose
        self.earlier: list[Item] = []  # the bill behind a ledger that a fixture has copied here
        self.lost = 0  # answers that a test means to be lost, such as by a full disk

    def begins(self, folder: Path, gateway: object, arguments: Sequence[str]) -> Ran:
        """Is told of each start, before it; who starts it sets the process of what is returned."""
        source = (folder / "classify.py").read_text(encoding="utf-8")
        try:
            parsed = parse_arguments(arguments)
        except argparse.ArgumentError:  # such a run sends nothing
            return Ran(folder, source, b"", parse_arguments([]), time.monotonic())
        tickets = folder / parsed.tickets
        is_checked = tickets.is_file() and tickets.stat().st_size <= MOST_CHECKED
        content = tickets.read_bytes() if is_checked else b""
        run = Ran(folder, source, content, parsed, time.monotonic())
        if is_checked and not parsed.dry_run:
            self.runs.append(run)
            if isinstance(gateway, Gateway) and gateway not in self.gateways:
                self.gateways.append(gateway)
        return run

    def ends(self, process: object, done: Done) -> None:
        """Is told what a run left behind."""
        for run in self.runs:
            if run.process is process:
                run.ended_at, run.done = time.monotonic(), done

    def broken(self) -> list[str]:
        """All broken promises. To be called once the gateways are closed, as some work goes on until then."""
        items = [item for gateway in self.gateways for item in gateway.bill]
        ledgers = dict.fromkeys(run.ledger for run in self.runs)
        return [how for ledger in ledgers for how in self.broken_at(ledger, items)]

    def broken_at(self, ledger: Path, items: list[Item]) -> list[str]:
        """The broken promises of the runs on one ledger."""
        runs = sorted((run for run in self.runs if run.ledger == ledger), key=Ran.last_seen_at)
        others = [run for run in self.runs if run.ledger != ledger]
        if any(a.started_at < b.ended_at and b.started_at < a.ended_at for a in runs for b in others):
            return []  # whose request an item is, nobody can say
        ours = [item for item in items if any(run.started_at <= item.asked_at <= run.ended_at for run in runs)]
        return self.compared(runs, [*self.earlier, *ours]) if any(item.turn for item in ours) else []

    def compared(self, runs: list[Ran], items: list[Item]) -> list[str]:
        """The broken promises of runs that sent these requests."""
        from tests.conftest import Done

        last, killed = runs[-1], [run for run in runs if run.was_killed]
        done = last.done or Done(None, "", "", last.output)
        done = replace(done, output=last.output)  # which the harness may not know
        tickets = {(run.program, run.csv): run.tickets() for run in runs}
        budgets = [run.setting("BUDGET_USD") if run.arguments.budget is None else run.arguments.budget for run in runs]
        return broken_promises(
            items,
            done,
            budget_usd=max(budgets) if all(budgets) else 0.0,
            tickets=[tickets[run.program, run.csv] for run in runs],
            killed=bool(killed or self.lost),
            in_flight=self.lost + sum(run.arguments.concurrency or run.setting("CONCURRENCY") for run in killed),
            except_for=self.except_for,
            prices={model: prices_of(price) for model, price in last.setting("PRICES").items()},
            fallback=last.setting("FALLBACK"),
            id_column=last.setting("ID_COLUMN"),
            named_label=last.setting("named_label"),
            is_sample=last.arguments.sample is not None,
        )


def prices_of(price: object) -> tuple[float, float, float]:
    """In, out and cached, however the program has them; cached tokens cost as much as others where it does not say."""
    in_usd, out_usd, *cached = astuple(price) if is_dataclass(price) else price
    return in_usd, out_usd, cached[0] if cached and cached[0] is not None else in_usd

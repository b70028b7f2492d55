# ruff: noqa: E501
"""Breakages of what the rules R1 to R9 mean, by hand: `python -m tests.breakages [NAME ...] [--jobs N]`. Not in CI.

Each takes one line of classify.py back, in a copy of the repository, and runs the tests until one fails. It prints the
rows of the table in tests/README.md: the rule, what was broken, and what noticed it.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent


@dataclass(frozen=True)
class Breakage:
    """One line of the program, and the line that breaks a rule in its place."""

    rule: str
    what: str
    old: str
    new: str
    likely: str  # test files that should notice; the others run after them


BREAKAGES = [
    Breakage("R1", "the model is left out of the digest", '{prompt_key()}\\0{model}\\0{text}', '{prompt_key()}\\0{text}', "ledger"),
    Breakage("R1", "EXTRA_BODY in another order is another request", "json.dumps(EXTRA_BODY, sort_keys=True)\n", "json.dumps(EXTRA_BODY)\n", "ledger"),
    Breakage("R1", "equal tickets are each asked about", "    SELECT min(number) FROM wanted WHERE digest IS NOT NULL GROUP BY digest", "    SELECT number FROM wanted WHERE digest IS NOT NULL", "ledger run"),
    Breakage("R2", "a row is not written", "        self.db.execute(INSERT_REQUEST, row)\n", "        pass\n", "run"),
    Breakage("R2", "a hash is not kept", 'ledger.db.execute("INSERT OR IGNORE INTO outputs (hash) VALUES (?)", [hash_of(part)])', "pass", "output"),
    Breakage("R2", "the hash comes after the file", "    ledger.sync()\n    os.replace(part, target)", "    os.replace(part, target)\n    ledger.sync()", "output"),
    Breakage("R2", "an output that was edited is overwritten", "    return known > 0\n", "    return True\n", "output"),
    Breakage("R2", "no fsync of the -wal", "            os.fsync(self.wal)\n", "            pass\n", "crash ledger"),
    Breakage("R2", "the output in the order of the answers", "    ORDER BY wanted.number\n", "    ORDER BY asked.labelled\n", "output run"),
    Breakage("R2", "another program's database is written to", "        if owner != APPLICATION_ID and tables:", "        if False:", "ledger"),
    Breakage("R3", "prose is searched", "        return {label}\n    # Labels are shorter", "        return {label}\n    if found := [one for one in LABELS if one in text]:\n        return set(found)\n    # Labels are shorter", "labels"),
    Breakage("R3", "pieces need not agree", "    if len(named) == 1:\n        return named.pop()", "    if named:\n        return named.pop()", "labels"),
    Breakage("R3", "a reply without a label is not asked about again", '    "no label",\n    retries=1,', '    "no label",\n    retries=0,', "kinds"),
    Breakage("R3", "a cut reply counts", "    if ENDED_BY_LENGTH.search(ended_by) and not label:", "    if False:", "kinds"),
    Breakage("R4", "failures share one count", "            is_last = tries[kind] > kind.retries", "            is_last = tries.total() > kind.retries", "kinds"),
    Breakage("R4", "a 429 with a quota's code is any other", '    if status == 429 and any(map(QUOTA_CODE.search, codes)):\n        return QUOTA\n', "", "kinds stops"),
    Breakage("R4", "an error in a 200 is an answer", "    if has_content(error):", "    if False:", "kinds"),
    Breakage("R5", "a patience is doubled", "GRACE_S = 5  #", "GRACE_S = 10  #", "readme"),
    Breakage("R5", "no patience before the first answer", "        is_certain = kind.is_certain_at_first and not self.has_answered", "        is_certain = kind.is_certain_at_first", "stops kinds"),
    Breakage("R5", "five in a row stop a run at once", "        was_alone = self.door.alone and entry.in_flight == 1", "        was_alone = True", "stops kinds"),
    Breakage("R5", "what led to a stop keeps its FALLBACK", "            self.ledger.disregard(unnamed_replies(recent))", "            pass", "ledger kinds"),
    Breakage("R5", "what failed is sent first", "    ORDER BY coalesce(failures, 0), wanted.number", "    ORDER BY -coalesce(failures, 0), wanted.number", "run ledger"),
    Breakage("R6", "a reservation is dropped", "        self.reserved_usd += worst_usd", "        pass", "budget"),
    Breakage("R6", "what was perhaps billed is booked at an average", "    return worst_usage(question.asked())", "    return estimated_usage(length_of(question.asked()))", "budget"),
    Breakage("R7", "the window never shrinks", "            self.size = max(1, self.size / 2)", "            pass", "pacer"),
    Breakage("R7", "a refusal tells the pace nothing", "        self.pace.count(is_refused, now)", "        self.pace.count(False, now)", "pacer"),
    Breakage("R7", "a limit is never forgotten", "        if now - self.refused_at > FORGET_S:", "        if False:", "pacer"),
    Breakage("R7", "the pace rises above RPM", "        self.per_s = min(self.per_s, self.max_per_s)", "        pass", "pacer"),
    Breakage("R8", "a notice is left out", "            say(f\"ticket {safe_to_show(question.id)} failed: {why}{advice}\")", "            pass", "kinds run"),
    Breakage("R8", "nothing is said while nothing comes", "        if has_changed:\n", "        if False:\n", "screen"),
    Breakage("R8", "the key is not redacted", '        text = key_pattern(key).sub("***", text)\n', "        pass\n", "trust"),
    Breakage("R8", "the ticket's words are shown", "    return any(said[start : start + size]", "    return False and any(said[start : start + size]", "trust"),
    Breakage("R8", "the key goes to a proxy", '            headers={"Authorization": f"Bearer {job.key}", "Content-Type": "application/json"},\n            allow_redirects=False,\n', "            headers={\"Authorization\": f\"Bearer {job.key}\"},\n            proxy_headers={\"Authorization\": f\"Bearer {job.key}\"},\n            allow_redirects=False,\n", "trust"),
    Breakage("R9", "a second header is a ticket", "    if row == layout.header or", "    if False and", "exports tickets"),
    Breakage("R9", "only the first problem is told", "        del self.first[5:]", "        del self.first[1:]", "exports tickets"),
    Breakage("R9", "CSS is sent", '    if "<" in cell:', "    if False:", "exports tickets"),
]  # fmt: skip


def noticed_by(breakage: Breakage) -> str:
    """The first test that fails with it; empty where none does."""
    source = (ROOT / "classify.py").read_text(encoding="utf-8")
    count = source.count(breakage.old)
    # The order of the output stands in two views.
    if count < 1 or (count > 1 and breakage.what != "the output in the order of the answers"):
        return f"STALE: its line stands {count} times in classify.py"
    with tempfile.TemporaryDirectory() as folder:
        ignored = shutil.ignore_patterns(".git", ".venv")
        tree = Path(shutil.copytree(ROOT, Path(folder, "tree"), ignore=ignored))
        (tree / "classify.py").write_text(source.replace(breakage.old, breakage.new, 1), encoding="utf-8")
        likely = [f"tests/test_{name}.py" for name in breakage.likely.split()]
        for files in (likely, ["tests", *(f"--ignore={name}" for name in likely)]):
            command = [sys.executable, "-m", "pytest", "-xq", "-p", "no:cacheprovider", "-n", "2", *files]
            told = subprocess.run(command, cwd=tree, capture_output=True, text=True, timeout=900).stdout
            if failed := re.search(r"^(?:FAILED|ERROR) (\S+?)(?:\[.*)?(?: - .*)?$", told, re.M):
                return failed[1].removeprefix("tests/")
    return ""


def main() -> int:
    """Prints a row for each; the exit status is 1 where one was not noticed."""
    parser = argparse.ArgumentParser(prog="python -m tests.breakages", description=__doc__.split("\n")[0])
    parser.add_argument("names", nargs="*", help="parts of rules or of what is broken")
    parser.add_argument("--jobs", type=int, default=1)
    options = parser.parse_args()
    chosen = [
        one for one in BREAKAGES if not options.names or any(n in f"{one.rule} {one.what}" for n in options.names)
    ]
    missed = 0
    with ThreadPoolExecutor(options.jobs) as pool:
        for breakage, test in zip(chosen, pool.map(noticed_by, chosen), strict=True):
            missed += not test or test.startswith("STALE")
            print(f"| {breakage.rule} | {breakage.what} | {f'`{test}`' if test else 'NOT NOTICED'} |", flush=True)
    return int(missed > 0)


if __name__ == "__main__":
    sys.exit(main())

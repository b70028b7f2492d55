"""Breaks classify.py in one small place at a time, at random, and tells which breakages no test notices. Not in CI.

    python -m tests.mutate [HOW_MANY] [--seed N] [--only N,N,...] [--jobs N]

A comparison turns round, a number moves by one, `and` becomes `or`, a condition becomes its opposite, a statement is
dropped. Each breakage gets a copy of the repository and the tests, which end at the first failure.
"""

from __future__ import annotations

import argparse
import ast
import copy
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).parent.parent
TURNED = {
    ast.Eq: ast.NotEq, ast.NotEq: ast.Eq, ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt,
    ast.In: ast.NotIn, ast.NotIn: ast.In, ast.Is: ast.IsNot, ast.IsNot: ast.Is,
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.And: ast.Or, ast.Or: ast.And,
}  # fmt: skip
# which tests are likely to notice a breakage in a section; then all the others run
LIKELY = {
    "settings": "settings recipes run", "what is shown": "trust screen report", "the job": "tickets run",
    "tickets": "tickets exports spreadsheet", "labels": "labels", "money": "budget report",
    "one call": "kinds trust",
    "one call: errors": "kinds faults", "one call: answers": "kinds", "pacing": "pacer",
    "ledger": "ledger failing_calls",
    "output": "output spreadsheet", "progress": "screen run", "run": "stops kinds run simulate", "plan": "report",
    "report": "report run", "main": "settings run trust",
}  # fmt: skip
OTHERS = (
    "labels", "tickets", "pacer", "exports", "report", "settings", "spreadsheet", "budget", "recipes", "run", "trust",
    "kinds", "stops", "ledger", "output", "screen", "failing_calls", "simulate", "faults", "crash", "readme",
)  # fmt: skip
# Of the README: how long lines and functions may be, and quotes, which an unparsed program does not keep to.
LEFT_OUT = "not readable_file_is and not sections_stand and not option_that_it_names"
PYTEST = ("-n", "4", "-k", LEFT_OUT)  # most tests wait for the clock
DROPPED = (ast.Expr, ast.Assign, ast.AugAssign, ast.Return, ast.Raise, ast.Continue)


def breakages(node: ast.AST) -> Iterator[Callable[[], None]]:
    """The ways to break one node of the tree, in place."""
    if isinstance(node, ast.Compare):
        yield lambda: node.ops.__setitem__(0, TURNED[type(node.ops[0])]())
    if isinstance(node, ast.BinOp | ast.BoolOp | ast.AugAssign) and type(node.op) in TURNED:
        yield lambda: setattr(node, "op", TURNED[type(node.op)]())
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        yield lambda: setattr(node, "value", node.value + 1)
    if isinstance(node, ast.If | ast.While | ast.IfExp):
        yield lambda: setattr(node, "test", ast.UnaryOp(ast.Not(), node.test))
    for body in ("body", "orelse"):
        for place, line in enumerate(getattr(node, body, None) or [] if isinstance(node, ast.stmt) else []):
            if isinstance(line, DROPPED) and not is_docstring(line):
                yield lambda body=body, place=place: getattr(node, body).__setitem__(place, ast.Pass())


def is_docstring(line: ast.stmt) -> bool:
    return isinstance(line, ast.Expr) and isinstance(line.value, ast.Constant)


def mutants(source: str) -> list[tuple[int, int]]:
    """Number of the node and of its breakage, for all that can break."""
    nodes = list(ast.walk(ast.parse(source)))
    return [(n, b) for n, node in enumerate(nodes) for b, _ in enumerate(breakages(node))]


def broken(source: str, place: tuple[int, int]) -> tuple[int, str, str]:
    """The line, what stood there, and the whole broken source."""
    tree = ast.parse(source)
    node = list(ast.walk(tree))[place[0]]
    before = copy.deepcopy(tree)
    list(breakages(node))[place[1]]()
    ast.fix_missing_locations(tree)
    changed = zip(ast.unparse(before).splitlines(), ast.unparse(tree).splitlines(), strict=False)
    old, new = next(((old, new) for old, new in changed if old != new), ("", ""))
    return getattr(node, "lineno", 0), f"{old.strip()}  ->  {new.strip()}", unparsed(source, tree)


def unparsed(source: str, tree: ast.AST) -> str:
    """The tree as text, behind the comments that packagers read, and with the last lines that tests look for."""
    text = ast.unparse(tree).replace("__name__ == '__main__'", '__name__ == "__main__"')
    return source[: source.index('"""')] + text


def is_noticed(source: str, likely: str = "") -> bool:
    """Whether some test fails with this classify.py."""
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(shutil.copytree(ROOT, Path(folder, "tree"), ignore=shutil.ignore_patterns(".git", ".venv")))
        (tree / "classify.py").write_text(source, encoding="utf-8")
        first = likely.split()
        return any(fails(tree, names) for names in (first, [name for name in OTHERS if name not in first]) if names)


def fails(tree: Path, names: list[str]) -> bool:
    command = [sys.executable, "-m", "pytest", "-xq", "-p", "no:cacheprovider", *PYTEST]
    command += [f"tests/test_{name}.py" for name in names]
    try:
        return subprocess.run(command, cwd=tree, capture_output=True, timeout=600).returncode != 0
    except subprocess.TimeoutExpired:
        return True


def section(source: str, line: int) -> str:
    """The title of the section in which a line stands."""
    titles = re.findall(r"^# ---- (.*) ----$", "\n".join(source.splitlines()[:line]), re.M)
    return titles[-1] if titles else "settings"


def main() -> None:
    """Tries so many breakages, and prints those that nobody noticed."""
    parser = argparse.ArgumentParser(prog="python -m tests.mutate", description=__doc__.split("\n")[0])
    parser.add_argument("how_many", nargs="?", type=int, default=150)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", help="the numbers of breakages, as a former run printed them")
    parser.add_argument("--jobs", type=int, default=2, help="at a time, as most tests wait for the clock")
    options = parser.parse_args()
    source = (ROOT / "classify.py").read_text(encoding="utf-8")
    assert not is_noticed(unparsed(source, ast.parse(source))), "the tests fail without any breakage"
    places = mutants(source)
    numbers = random.Random(options.seed).sample(range(len(places)), min(options.how_many, len(places)))
    numbers = [int(n) for n in options.only.split(",")] if options.only else numbers

    def tried(number: int) -> bool:
        line, what, text = broken(source, places[number])
        start = time.perf_counter()
        noticed = is_noticed(text, LIKELY[section(source, line)])
        took = f"{time.perf_counter() - start:.0f} s"
        print(f"#{number} {'noticed' if noticed else 'UNNOTICED'} {took:>6} line {line}: {what}", flush=True)
        return noticed

    with ThreadPoolExecutor(options.jobs) as pool:
        unnoticed = list(pool.map(tried, numbers)).count(False)
    print(f"{len(numbers)} of {len(places)} breakages tried, {unnoticed} unnoticed")


if __name__ == "__main__":
    main()

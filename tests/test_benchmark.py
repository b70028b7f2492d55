"""The benchmark still works; how fast anything is, is no matter for a test."""

import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests import trial
from tests.benchmark import CELLS, main
from tests.trial import Bench, Outcome, Trial

ROOT = Path(__file__).parent.parent


def test_the_quick_benchmark_runs_every_contestant_and_its_kill_and_prints_the_tables():
    command = (sys.executable, "-m", "tests.benchmark", "--quick", "--tickets", "20", "a", "e")
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("`python -m tests.benchmark --quick --tickets 20 a e`, 20")
    titles = [line.split()[1] for line in done.stdout.splitlines() if line.startswith("###")]
    assert titles == ["(a)", "(e)"]
    for contestant in ("classify.py", "semaphore + gather", "OpenAI SDK", "bare loop"):
        assert f"| {contestant} |" in done.stdout


def test_a_contestant_that_breaks_gives_the_benchmark_its_exit_status(tmp_path: Path, monkeypatch):
    broken = tmp_path / "broken.py"
    broken.write_text("raise SystemExit(3)")
    monkeypatch.setitem(trial.PROGRAMS, trial.NAIVE, broken)
    monkeypatch.setattr(sys, "argv", ["benchmark", "--quick", "--tickets", "20", "b"])
    assert main() == 1


class Untried(Bench):
    """Makes the outcomes up, and takes note of the trials."""

    def run(self, trials: Iterable[Trial], jobs: int = 1) -> list[Outcome]:
        self.trials = list(trials)
        events = [(0.1 * n, 200) for n in range(20)] + [(0.05, 429)]
        served = SimpleNamespace(
            requests=21, answered=20, refused=1, events=events, billed={}, first_s=0.0, worked_s=2.0, cpu_s=0.1
        )  # fmt: skip
        return [Outcome(trial, 0, 2.0, 0.5 + trial.tickets / 1e4, 40.0, served, {}) for trial in self.trials]


@pytest.mark.parametrize("quick", [True, False])
@pytest.mark.parametrize("cell", CELLS)
def test_a_cell_makes_a_table_of_the_outcomes_of_its_trials(cell: str, quick: bool, tmp_path: Path):
    if cell == "picture" and not quick:
        pytest.skip("would draw tests/pace.svg, which is for a true run")
    bench = Untried(tmp_path, quick, None, jobs=1)
    title, _, *lines = CELLS[cell](bench).splitlines()
    assert title.startswith("### The picture" if cell == "picture" else f"### ({cell}) ")
    if cell == "picture":
        assert (tmp_path / "pace.svg").stat().st_size > 1000
    else:
        header, _, *rows = [line for line in lines if line.startswith("|")]
        assert len(rows) >= 2
        assert {row.count("|") for row in rows} == {header.count("|")}

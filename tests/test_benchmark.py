"""The benchmark still works; how fast anything is, is no matter for a test."""

import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests import benchmark, trial
from tests.benchmark import CELLS, as_told, main, trial_in
from tests.trial import NAIVE, OURS, PEERS, SDK, Bench, Outcome, Trial

ROOT = Path(__file__).parent.parent


def test_the_quick_benchmark_runs_every_contestant_and_ours_keeps_all_answers_over_a_kill():
    command = (sys.executable, "-m", "tests.benchmark", "--quick", "--tickets", "20", "a", "e")
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("`python -m tests.benchmark --quick --tickets 20 a e`, 20")
    titles = [line.split()[1] for line in done.stdout.splitlines() if line.startswith("###")]
    assert titles == ["(a)", "(e)"]
    for contestant in ("classify.py", "semaphore + gather", "OpenAI SDK", "bare loop"):
        assert f"| {contestant} |" in done.stdout
    killed = [line for line in done.stdout.splitlines() if line.startswith("| classify.py |")][-1]
    right, wrong, lost, _ = map(int, killed.strip("| ").split(" | ")[2:])
    assert (right, wrong, lost) == (20, 0, 0)


def test_a_contestant_that_breaks_gives_the_benchmark_its_exit_status(tmp_path: Path, monkeypatch):
    broken = tmp_path / "broken.py"
    broken.write_text("raise SystemExit(3)")
    monkeypatch.setitem(trial.PROGRAMS, trial.NAIVE, broken)
    monkeypatch.setattr(sys, "argv", ["benchmark", "--quick", "--tickets", "20", "b"])
    assert main() == 1


def test_a_rival_has_so_many_in_flight_as_its_trial_says(tmp_path: Path):
    script = trial.Script(rpm=0, latency_s=0.1)
    [outcome] = Bench(tmp_path, True, None, jobs=1).run([Trial(NAIVE, 20, script, in_flight=4)])
    assert (outcome.served.max_in_flight, outcome.right) == (4, 20)


def test_the_told_pace_says_how_many_in_flight_a_rival_needs(tmp_path: Path):
    needed = {
        "nothing but the limit": [4],  # 600 a minute x 0.3 s, and one
        "the limit, told twice as much": [7],
        "25% random 429s, no limit, told none": [],
        "a slow server: 2 at once, 1.5 s each": [16],
    }
    full = Bench(tmp_path, False, None, jobs=1)
    assert {world: [few.in_flight for few in as_told(trial_in(world, SDK, full))] for world in needed} == needed


class Untried(Bench):
    """Makes the outcomes up, and takes note of the trials; everything can be installed."""

    def install(self, who: str) -> str:
        return ""

    def run(self, trials: Iterable[Trial], jobs: int = 1) -> list[Outcome]:
        self.trials = list(trials)
        events = [(0.1 * n, 200) for n in range(20)] + [(0.05, 429)]
        served = SimpleNamespace(
            requests=21, answered=20, refused=1, events=events, billed={}, first_s=0.0, worked_s=2.0, cpu_s=0.1
        )  # fmt: skip
        unread = {NAIVE: {"Hello": "other"}}
        return [
            Outcome(trial, 0, 2.0, 0.5 + trial.tickets / 1e4, 40.0, served, unread.get(trial.who, {}))
            for trial in self.trials
        ]


@pytest.mark.parametrize("cell", [cell for cell in CELLS if cell != "picture"])
def test_a_cell_makes_a_table_of_the_outcomes_of_its_trials(cell: str, tmp_path: Path):
    for quick in (True, False):
        title, _, *lines = CELLS[cell](Untried(tmp_path, quick, None, jobs=1)).splitlines()
        assert title.startswith(f"### ({cell}) ")
        header, _, *rows = [line for line in lines if line.startswith("|")]
        assert len(rows) >= 2
        assert {row.count("|") for row in rows} == {header.count("|")}


def test_the_picture_names_the_limit_and_says_why_labels_are_wrong(tmp_path: Path):
    CELLS["picture"](Untried(tmp_path, True, None, jobs=1))
    drawn = (tmp_path / "pace.svg").read_text("utf-8")
    assert len(drawn) < 60_000
    for words in ("the limit:", "gives up on 1: they get a wrong label", "were refused four times each", "classify.py"):
        assert f">{words}" in drawn


def test_the_picture_that_the_readme_shows_is_small_and_its_text_is_text():
    drawn = (ROOT / "tests" / "pace.svg").read_text("utf-8")
    assert len(drawn) < 60_000
    assert ">all 1,000 right</text>" in drawn


def test_peers_stand_in_a_table_and_one_that_cannot_be_installed_in_its_note(tmp_path: Path):
    class Broken(Untried):
        def install(self, who: str) -> str:
            return "ERROR: no such version" if who == "curator" else ""

    tried = CELLS["peers"](Broken(tmp_path, True, None, jobs=1))
    assert "\ncurator is missing, as it could not be installed: ERROR: no such version\n" in tried
    contestants = {line.split(" | ")[1] for line in tried.splitlines() if line.startswith("| ")}
    assert contestants - {"", "--:"} == {OURS, SDK, "async-batch-llm"}
    assert set(PEERS) == {"curator", "async-batch-llm"}


def test_no_peer_is_installed_unless_it_is_asked_for(monkeypatch, capsys):
    monkeypatch.setattr(benchmark, "CELLS", {name: lambda bench, name=name: f"cell {name} ran" for name in CELLS})
    monkeypatch.setattr(sys, "argv", ["benchmark", "--quick"])
    assert main() == 0
    ran = capsys.readouterr().out
    assert "cell w ran" in ran
    assert "cell peers ran" not in ran

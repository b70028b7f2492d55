"""The benchmark still works; how fast anything is, is no matter for a test."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_the_quick_benchmark_prints_every_table():
    command = (sys.executable, "-m", "tests.benchmark", "--quick")
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("`python -m tests.benchmark --quick`, 20")
    titles = [line.split()[1] for line in done.stdout.splitlines() if line.startswith("###")]
    assert titles == ["(a)", "(b)", "(c)", "(d)", "(e)", "(f)", "(g)", "The"]
    for contestant in ("classify.py", "semaphore + gather", "OpenAI SDK", "bare loop"):
        assert f"| {contestant} |" in done.stdout

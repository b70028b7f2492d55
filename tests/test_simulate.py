"""Simulated nights: some of them, and that they are what they seem."""

import os
import subprocess
import sys
from unittest import mock

import classify
from tests.simulate import night


def test_in_simulated_nights_no_promise_is_broken():
    assert {seed: broken for seed in range(40) if (broken := night(seed)[1])} == {}


def test_a_seed_alone_replays_its_night():
    """In another process, where strings have other hashes, after no other night."""
    code = "from tests.simulate import night; print(night(7)[2])"
    environment = os.environ | {"PYTHONHASHSEED": "1"}
    command = [sys.executable, "-c", code]
    other = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert other.stdout.strip() == night(7)[2]


def test_a_broken_program_is_noticed():
    """Such as one that reserves no money."""
    with mock.patch.object(classify.Budget, "reserve", return_value=True):
        broken = [how for seed in range(20) for how in night(seed)[1]]
    assert any(how.startswith("within-budget") for how in broken)

"""The demo as a newcomer runs it: the whole system on this machine, and what it says about itself afterwards."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.demo, pytest.mark.timeout(180)]

ROOT = Path(__file__).parents[2]
LONGEST_SECONDS = 60


@pytest.fixture(scope="module")
def summary(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    path = tmp_path_factory.mktemp("demo") / "summary.json"
    demo = subprocess.run([sys.executable, "-m", "examples.media.demo", "--json", str(path)], cwd=ROOT, check=False)
    assert demo.returncode == 0
    parsed: dict[str, Any] = json.loads(path.read_text())
    return parsed


def test_every_job_finishes_exactly_once(summary: dict[str, Any]) -> None:
    jobs = summary["jobs"]
    assert jobs["submitted"] > 0
    assert jobs == {
        "submitted": jobs["submitted"],
        "succeeded": jobs["submitted"],
        "failed": 0,
        "lost": 0,
        "ran_twice_on_one_tier": 0,
    }
    assert sum(tier["jobs"] for tier in summary["tiers"].values()) == jobs["submitted"]


def test_a_full_gpu_tier_spills_and_a_killed_gpu_worker_falls_back(summary: dict[str, Any]) -> None:
    assert summary["spilled"] >= 1
    assert summary["fell_back"] >= 1


def test_the_gpu_tier_comes_up_from_zero_and_goes_back(summary: dict[str, Any]) -> None:
    gpu = summary["tiers"]["gpu"]
    assert gpu["jobs"] >= 1
    assert gpu["peak_replicas"] >= 1
    assert gpu["final_replicas"] == 0


def test_decisions_and_the_whole_run_are_quick(summary: dict[str, Any]) -> None:
    assert 0 < summary["decision_ms_p50"] < 100
    assert summary["seconds"] <= LONGEST_SECONDS

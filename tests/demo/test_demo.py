"""The demo as a newcomer runs it: the whole system on this machine, and what it says about itself afterwards."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from examples.media.demo import LONGEST_SECONDS

ROOT = Path(__file__).parents[2]

pytestmark = [pytest.mark.demo, pytest.mark.timeout(LONGEST_SECONDS + 120)]


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


def test_workers_drain_and_no_job_is_cut_off_by_it(summary: dict[str, Any]) -> None:
    # Whoever leaves has said before that it takes nothing new: at the latest those of the GPU tier at the end.
    assert summary["drained"]["gpu"] >= 1
    assert summary["fell_back"] >= 1, "the one that was killed at work"
    assert summary["jobs"]["ran_twice_on_one_tier"] == 0


def test_in_an_outage_of_the_gpu_tier_jobs_go_to_cpus_and_afterwards_to_gpus_again(summary: dict[str, Any]) -> None:
    outage = summary["outage"]
    assert outage["seconds"] > 0
    assert outage["spilled"] >= 1
    assert outage["moved"] >= 0, "none, where nothing waited for a GPU when it began"
    assert outage["back_after"] >= 0


def test_the_gpu_tier_comes_up_from_zero_and_goes_back(summary: dict[str, Any]) -> None:
    gpu = summary["tiers"]["gpu"]
    assert gpu["jobs"] >= 1
    assert gpu["peak_replicas"] >= 1
    assert gpu["final_replicas"] == 0


def test_decisions_are_quick(summary: dict[str, Any]) -> None:
    assert 0 < summary["decision_ms_p50"] < 100

"""All accelerated workers are taken away while jobs come, and given back: nothing waits for them, nothing is lost."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from benchmarks.outage import Scenario, live, rows
from tests.chaos.parts import ROOT

from workerpool_operator.simulation.compare import quantile

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(600)]

PART_OF_THE_OUTAGE = 0.75
"""For how much of it the last hundredth of the jobs may wait: a third of it in the simulator, all of it where nothing moves."""


def test_no_job_waits_for_the_end_of_an_outage_of_all_accelerators_and_each_is_done_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    scenario = Scenario((2, 2), begins=6.0, ends=26.0, last=32.0, jobs_a_second=3.5)
    lived = asyncio.run(live(scenario, tmp_path, seed=3))
    with capsys.disabled():
        print("", *rows(scenario, lived), sep="\n")
    assert (lived.lost, lived.twice) == (0, 0)
    away = lived.back - lived.outage.start
    assert quantile(sorted(lived.waits), 0.99) < PART_OF_THE_OUTAGE * away

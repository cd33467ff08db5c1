"""The short round of chaos: nothing lost, nothing done twice, no more starts than promised, and taken over in time."""

from __future__ import annotations

import time

import pytest
from tests.chaos.suite import run

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(240)]


def test_whatever_dies_every_job_has_one_outcome(capsys: pytest.CaptureFixture[str]) -> None:
    seed = str(int(time.time()))
    with capsys.disabled():
        print(f"\nCHAOS_SEED={seed}")
        rows = run("short", seed)
    assert [row.fault for row in rows if not row.kept and "plain" not in row.fault] == []
    assert sum(row.jobs for row in rows) > 4_000

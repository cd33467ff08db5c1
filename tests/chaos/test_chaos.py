"""The short round of chaos: nothing lost, nothing done twice, no more starts than promised."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from uuid import uuid4

import pytest
from tests.chaos.parts import ROOT
from tests.chaos.suite import run
from tests.watching import processes, until

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(600)]


def test_whatever_dies_every_job_has_one_outcome(capsys: pytest.CaptureFixture[str]) -> None:
    seed = str(int(time.time()))
    with capsys.disabled():
        print(f"\nCHAOS_SEED={seed}")
        rows = run("short", seed)
    assert [row.fault for row in rows if not row.kept and "plain" not in row.fault] == []
    assert sum(row.jobs for row in rows) > 4_000


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_round_that_is_interrupted_leaves_no_process_behind(number: signal.Signals) -> None:
    mark = f"chaos-{uuid4().hex}"
    command, environ = [sys.executable, "-m", "tests.chaos.suite", "short"], {**os.environ, "CHAOS_MARK": mark}
    interrupted = subprocess.Popen(command, cwd=ROOT, env=environ, stdout=subprocess.DEVNULL, start_new_session=True)
    try:
        until(lambda: sum("celery" in command for command in processes(mark).values()) > 1, "its workers run", 120)
        os.killpg(interrupted.pid, number)
        assert interrupted.wait(60) != 0
        until(lambda: not processes(mark), "nothing is left")
    finally:
        interrupted.kill()

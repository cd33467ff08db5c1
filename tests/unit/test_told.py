"""What ``workerpool job`` says of a job."""

from __future__ import annotations

import pytest

from workerpool_operator.cli import told
from workerpool_operator.dev import shown
from workerpool_routing.decide import Reason
from workerpool_routing.ledger import Job, Run, State
from workerpool_routing.wire import Milliseconds

pytestmark = pytest.mark.unit


def ms(seconds: float) -> Milliseconds:
    return Milliseconds(int(seconds * 1000))


def test_the_life_of_a_job_is_told_line_by_line() -> None:
    runs = (
        Run(1, "gpu", "g.1", ms(1), ms(2), "failed", "RuntimeError('out of memory')"),
        Run(2, "cpu", "c.1", ms(3), ms(4.5), "done"),
    )
    times = {State.ADMITTED: ms(0.5), State.DONE: ms(4.6)}
    job = Job("t1", "media.t", State.DONE, 2, "cpu", "gpu", False, Reason.ATTEMPT_FAILED, times=times, runs=runs)
    assert told(job) == [
        "t1  media.t  done, attempt 2, on cpu because AttemptFailed",
        "1970-01-01 00:00:00.500  admitted, wanted gpu",
        "1970-01-01 00:00:01.000  attempt 1 starts on gpu, g.1",
        "1970-01-01 00:00:02.000  attempt 1 ends: failed, RuntimeError('out of memory')",
        "1970-01-01 00:00:03.000  attempt 2 starts on cpu, c.1",
        "1970-01-01 00:00:04.500  attempt 2 ends: done",
        "1970-01-01 00:00:04.600  the job is done",
    ]


def test_a_job_that_waits_has_only_been_admitted() -> None:
    times = {State.ADMITTED: ms(0.5)}
    job = Job("t1", "media.t", State.ADMITTED, 1, "gpu", "gpu", True, Reason.FREE_SLOT, times=times)
    assert told(job)[1:] == ["1970-01-01 00:00:00.500  admitted, wanted gpu, required"]


def test_no_password_of_any_sentinel_is_shown() -> None:
    said = shown("sentinel://:s3cret@one:26379/0;sentinel://api:s3cret@two:26379/0#main")
    assert "s3cret" not in said
    assert all(host in said for host in ("one:26379", "two:26379"))

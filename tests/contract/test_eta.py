"""Messages with an ETA that is further away than the visibility time-out, or than the life of a ledger entry."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import ExitStack
from types import ModuleType

import pytest
from tests.contract.api_and_operator import claimed, submit
from tests.contract.workers import parked, worker
from tests.watching import until

from workerpool_routing.ledger import State

pytestmark = pytest.mark.contract

FAR_OFF = 100
TEN_TIMES_SECONDS = 80
"""The visibility time-out of these workers is a tenth: the shortest that they accept."""


@pytest.fixture(scope="module")
def far_off(url: str, jobs: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ModuleType]:
    """A long job, and jobs that are to start late, under a short visibility time-out; they have the time of the other tests."""
    log = tmp_path_factory.mktemp("far-off")
    env = {"JOBS_TRANSPORT": json.dumps({"visibility_timeout": TEN_TIMES_SECONDS / 10})}
    with ExitStack() as stack:
        for name in ("eta-a", "eta-b"):
            stack.enter_context(worker(url, "eta", "eta-jobs", name, log, env=env))
        jobs.count.apply_async(("eta-long", TEN_TIMES_SECONDS), queue="eta-jobs")
        for _ in range(FAR_OFF):
            jobs.count.apply_async(("eta-count",), queue="eta-jobs", countdown=TEN_TIMES_SECONDS)
        yield jobs


@pytest.mark.long
def test_messages_with_a_future_eta_are_held_and_are_neither_in_flight_nor_busy(far_off: ModuleType) -> None:
    """What it begins takes as long as the rest of this file."""
    client, keys = far_off.pool.connection.client, far_off.pool.keys
    until(lambda: client.hlen(keys.unacked("eta")) == FAR_OFF + 1, "all are held, and the long job")
    until(lambda: int(client.get(keys.scheduled("eta")) or 0) == FAR_OFF, "all are counted as scheduled")
    until(lambda: sum(json.loads(raw)["busy"] for raw in client.hvals(keys.presence("eta"))) == 1, "only the long job is busy")


def test_what_takes_ten_times_the_visibility_timeout_or_starts_after_it_runs_once(far_off: ModuleType) -> None:
    client, keys = far_off.pool.connection.client, far_off.pool.keys
    until(lambda: int(client.get("eta-count") or 0) >= FAR_OFF, "all have run", 2 * TEN_TIMES_SECONDS)
    until(lambda: client.hlen(keys.unacked("eta")) == 0, "all are acknowledged", TEN_TIMES_SECONDS)
    time.sleep(1.5)
    assert int(client.get("eta-count")) == FAR_OFF
    assert int(client.get("eta-long")) == 1
    assert int(client.get(keys.scheduled("eta"))) == 0


def test_a_retry_that_is_due_in_days_is_on_the_ledger_until_a_day_later_and_not_looked_for_before(two_tiers: ModuleType) -> None:
    client, keys, days = two_tiers.pool.connection.client, two_tiers.pool.keys, 3 * 86_400
    decision = submit(two_tiers, two_tiers.retried_late, days)
    claimed(two_tiers, decision.task_id)
    with parked(two_tiers):
        client.set("gate", "open")
        until(lambda: client.rpop("gpu-jobs"), "the retry is in the queue")
        until(lambda: two_tiers.pool.job(decision.task_id).state is State.ADMITTED, "its author waits for it")
        now = client.time()[0]
        assert client.ttl(keys.job(decision.task_id)) > days + 3_600
        assert client.zscore(keys.waiting("gpu"), decision.task_id) / 1000 > now + days - 3_600

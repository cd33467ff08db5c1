"""Celery's pools of children or threads, whichever a worker has."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from tests.contract.api_and_operator import admit, outcome, submit
from tests.contract.workers import parked, worker
from tests.watching import until

from workerpool_routing.ledger import State

pytestmark = pytest.mark.contract


@pytest.mark.parametrize("pool", ["solo", "threads"])
def test_the_fence_holds_in_other_pools(url: str, two_tiers: ModuleType, tmp_path: Path, pool: str) -> None:
    with parked(two_tiers), worker(url, "gpu", "gpu-jobs", f"gpu-{pool}", tmp_path, "-P", pool, "-c", "1"):
        for ending in ("return", "raise", "exit"):
            decision = submit(two_tiers, two_tiers.work, {"gpu": ending})
            tier = "gpu" if ending == "return" else "cpu"
            assert two_tiers.app.AsyncResult(decision.task_id).get(timeout=60) == tier
            assert two_tiers.pool.job(decision.task_id).runs[0].owner.startswith(f"gpu-{pool}.")
            assert outcome(two_tiers, decision.task_id)[1] == ({"gpu": 1} if tier == "gpu" else {"gpu": 1, "cpu": 1})


@pytest.mark.parametrize("pool", ["prefork", "solo", "threads"])
def test_a_slot_that_is_free_takes_the_next_job_at_once(url: str, two_tiers: ModuleType, tmp_path: Path, pool: str) -> None:
    with parked(two_tiers), worker(url, "gpu", "gpu-jobs", f"gpu-{pool}", tmp_path, "-P", pool, "-c", "1"):
        options: dict[str, Any] = {"args": ({}, 0.1), "accelerated": "required"}
        jobs = [two_tiers.pool.submit(two_tiers.work, **options).task_id for _ in range(12)]
        until(lambda: all(two_tiers.pool.job(task_id).state.ended for task_id in jobs), "all have ended")
        runs = sorted((two_tiers.pool.job(task_id).runs[0] for task_id in jobs), key=lambda run: run.began)
    pauses = sorted(after.began - before.ended for before, after in pairwise(runs))
    assert pauses[len(pauses) // 4] < 500, f"milliseconds; a loop that is not told of a free slot looks once a second: {pauses}"


def test_the_fence_holds_over_many_children_that_are_replaced(url: str, two_tiers: ModuleType, tmp_path: Path) -> None:
    options = ("-P", "prefork", "-c", "2", "--max-tasks-per-child", "2")
    with parked(two_tiers), worker(url, "gpu", "gpu-jobs", "gpu-many", tmp_path, *options):
        endings = ["return", "raise", "kill", "return", "raise", "return"]
        signatures = [admit(two_tiers, two_tiers.work.s({"gpu": how})) for how in endings]
        ids = [signature.apply_async().id for signature in signatures]
        expected = [(State.DONE, {"gpu": 1} if how == "return" else {"gpu": 1, "cpu": 1}) for how in endings]
        assert [outcome(two_tiers, task_id) for task_id in ids] == expected

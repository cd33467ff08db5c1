"""A worker that fails among good ones takes no jobs for a while, and its siblings go on."""

from __future__ import annotations

from itertools import count
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from redis import Redis
from tests import seeds
from tests.contract.api_and_operator import outcome
from tests.contract.broker import ROOM, ask, open_for_jobs, read, submit
from tests.contract.workers import parked, takes_jobs, worker
from tests.outlier import Outlier
from tests.seeds import claim, consumer, fall_back, make_pool, now_of, settle
from tests.watching import until

from workerpool_operator.ports import Pool
from workerpool_routing import ledger
from workerpool_routing.ledger import State
from workerpool_routing.wire import ENDED_JOB_LIFE_SECONDS

pytestmark = pytest.mark.contract


@pytest.fixture
def pool(redis_url: str) -> Pool:
    return make_pool(redis_url)


def test_a_worker_whose_attempts_fail_while_those_of_another_succeed_takes_no_jobs_until_a_pause_is_over(
    redis_url: str, pool: Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("workerpool_operator.broker.CAPACITY_LIFE_MS", 3_600_000)
    open_for_jobs(redis_url, pool)

    def one_job(owner: str, *, works: bool, cpu_works: bool = True) -> None:
        submit(pool)
        held = claim(redis_url, pool, gpu, "gpu", owner)
        if works:
            settle(pool, held, "gpu", 1, State.DONE, "done", owner)
            return
        fall_back(redis_url, pool, held)
        after = State.DONE if cpu_works else State.FAILED
        settle(pool, claim(redis_url, pool, cpu, "cpu", "w.1"), "cpu", 2, after, "done" if cpu_works else "failed")

    def ejected() -> list[str]:
        for owner in ("bad.1", "good.1"):
            seeds.report(redis_url, pool, "gpu", owner)
        seen = read(redis_url, pool).tiers["gpu"].workers
        assert all(worker.slots == (0 if worker.ejected else 1) for worker in seen)
        assert client.zcard(pool.keys.slots("gpu")) == sum(worker.slots for worker in seen), (
            "admission counts on the others alone"
        )
        return [worker.worker for worker in seen if worker.ejected]

    def pause_of_bad() -> float:
        return float(client.hget(pool.keys.outlier("bad.1"), "till") or 0) - now_of(client)

    with consumer(pool, "gpu") as gpu, consumer(pool, "cpu") as cpu, Redis.from_url(redis_url) as client:
        for _ in range(2 * ledger.EJECTED_AFTER):
            one_job("bad.1", works=False, cpu_works=False)
            one_job("good.1", works=True)
        assert ejected() == [], "these jobs fail by their own fault"
        for _ in range(ledger.EJECTED_AFTER - 1):
            one_job("bad.1", works=False)
        assert ejected() == []
        one_job("bad.1", works=True)
        for _ in range(ledger.EJECTED_AFTER):
            one_job("bad.1", works=False)
        assert ejected() == [], "nobody else has shown meanwhile that the tier works"
        for _ in range(ledger.EJECTED_AFTER):
            one_job("good.1", works=True)
        assert ejected() == ["bad"]
        assert 0 < pause_of_bad() <= ledger.EJECTION_MS
        one_job("bad.1", works=False)
        assert ejected() == ["bad"]
        assert pause_of_bad() <= ledger.EJECTION_MS, "what it still held makes the pause no longer"

        client.hset(pool.keys.outlier("bad.1"), "till", 1)
        assert ejected() == [], "the pause is over: it is tried again"
        one_job("bad.1", works=False)
        assert ejected() == ["bad"]
        assert ledger.EJECTION_MS < pause_of_bad() <= 2 * ledger.EJECTION_MS
        client.hset(pool.keys.outlier("bad.1"), mapping={"till": 1, "times": 1_000})
        one_job("bad.1", works=False)
        assert ejected() == ["bad"]
        assert pause_of_bad() <= ledger.LONGEST_EJECTION_MS

        client.hset(pool.keys.outlier("bad.1"), "till", 1)
        one_job("bad.1", works=True)
        one_job("bad.1", works=False)
        assert ejected() == [], "one that went well clears it of all"
        assert client.ttl(pool.keys.outlier("bad.1")) > ENDED_JOB_LIFE_SECONDS
        submit(pool)
        fall_back(redis_url, pool, claim(redis_url, pool, gpu, "gpu", "bad.1"))
        ask(lambda broker: broker.take_over(redis_url, pool, "gpu", "bad.1"))
        settle(pool, claim(redis_url, pool, cpu, "cpu", "w.1"), "cpu", 2, State.DONE, "done")
        assert not client.exists(pool.keys.outlier("bad.1")), "nothing is kept of a worker that is gone"


BY_ITSELF, BY_ITS_JOB, WELL, ANOTHER, PAUSE = (
    "fails",
    "fails by its job's fault",
    "succeeds",
    "another succeeds",
    "its pause ends",
)
TWICE_EJECTED_AND_CLEARED = [
    (BY_ITSELF, 3), (ANOTHER, 3), (BY_ITSELF, 1), (PAUSE, 1), (BY_ITSELF, 1), (PAUSE, 1), (WELL, 1), (BY_ITSELF, 1),
]  # fmt: skip
steps = st.tuples(st.sampled_from([BY_ITSELF, BY_ITS_JOB, WELL, ANOTHER, PAUSE]), st.integers(1, ledger.EJECTED_AFTER))


@settings(max_examples=8, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(runs=st.lists(steps, max_size=8))
@example(runs=TWICE_EJECTED_AND_CLEARED)
def test_the_rule_as_the_simulation_has_it_is_that_of_the_scripts(redis_url: str, runs: list[tuple[str, int]]) -> None:
    pool, rule, succeeded = make_pool(redis_url), Outlier(), 0
    key = pool.keys.outlier("bad.1")
    with consumer(pool, "gpu") as gpu, consumer(pool, "cpu") as cpu, Redis.from_url(redis_url) as client:
        client.flushall()
        open_for_jobs(redis_url, pool, ROOM)
        for step in (step for step, times in runs for _ in range(times)):
            if step == PAUSE:
                if rule.till is None:
                    continue
                client.hset(key, "till", 1)
                rule.till = 1
            else:
                submit(pool)
                owner = "good.1" if step == ANOTHER else "bad.1"
                held = claim(redis_url, pool, gpu, "gpu", owner)
                if step in (WELL, ANOTHER):
                    settle(pool, held, "gpu", 1, State.DONE, "done", owner)
                    succeeded += 1
                    rule = Outlier() if owner == "bad.1" else rule
                else:
                    fall_back(redis_url, pool, held)
                    rule.fails(succeeded, now_of(client))
                    there = claim(redis_url, pool, cpu, "cpu", "w.1")
                    if step == BY_ITSELF:
                        settle(pool, there, "cpu", 2, State.DONE, "done")
                        rule.is_at_fault()
                    else:
                        settle(pool, there, "cpu", 2, State.FAILED, "failed")
            seeds.report(redis_url, pool, "gpu", "bad.1")
            (seen,) = read(redis_url, pool).tiers["gpu"].workers
            assert seen.ejected == rule.ejected(succeeded, now_of(client))
            row, times, till = (int(client.hget(key, field) or 0) for field in ("row", "times", "till"))
            assert (row, times) == (rule.row, rule.times)
            assert till == pytest.approx(rule.till or 0, abs=ledger.EJECTION_MS / 4)


def test_one_broken_worker_beside_a_good_one_is_ejected_and_the_others_jobs_keep_their_accelerator(
    url: str, two_tiers: ModuleType, tmp_path: Path
) -> None:
    library, client = two_tiers.pool, two_tiers.pool.connection.client

    def run() -> dict[str, int]:
        until(lambda: not client.hlen(library.keys.unacked("gpu")), "the GPUs are idle")
        until(lambda: takes_jobs(two_tiers, "gpu-a"), "the good one reports")
        decision = library.submit(two_tiers.work, ({"gpu": "driver"},), accelerated=True)
        state, starts = outcome(two_tiers, decision.task_id)
        assert state is State.DONE
        return starts

    def seen() -> Any:
        reports = library.workers
        return until(lambda: next((one for one in reports().values() if one.worker == "gpu-b"), None), "it reports")

    with worker(url, "gpu", "gpu-jobs", "gpu-b", tmp_path):
        until(lambda: takes_jobs(two_tiers, "gpu-b"), "it reports")
        client.set("gpu-b is broken", 1)
        for jobs in count():
            if seen().ejected:
                break
            assert jobs < 60, "whoever has waited longest gets the next job: they take turns"
            run()
        until(lambda: "takes nothing new" in (tmp_path / "gpu-b.log").read_text(), "it has stopped consuming")
        assert not takes_jobs(two_tiers, "gpu-b")
        assert [run() for _ in range(5)] == [{"gpu": 1}] * 5

        client.delete("gpu-b is broken")
        client.hset(library.keys.outlier(seen().owner), "till", 1)
        until(lambda: takes_jobs(two_tiers, "gpu-b"), "it is tried again")
        with parked(two_tiers):
            decision = library.submit(two_tiers.work, ({"gpu": "driver"},), accelerated=True)
            assert outcome(two_tiers, decision.task_id) == (State.DONE, {"gpu": 1})
        assert not client.exists(library.keys.outlier(seen().owner))

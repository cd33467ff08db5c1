"""Scale-downs under load with real workers: the operator's own pass, real processes, and no job that is cut off."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from redis import Redis
from tests.chaos.drains import scale_down, small_pool, staged
from tests.seeds import report

from workerpool_operator.ports import Pool
from workerpool_routing.ledger import State
from workerpool_routing.wire import MARK_LIFE_MS

pytestmark = [pytest.mark.contract, pytest.mark.timeout(540)]

SCALE_DOWNS = 30


@pytest.fixture
def pool(redis_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Pool:
    monkeypatch.chdir(tmp_path)
    return small_pool(redis_url, tmp_path)


@pytest.mark.long
def test_thirty_scale_downs_under_load_cut_off_no_job(tmp_path: Path) -> None:
    jobs = asyncio.run(scale_down(tmp_path, SCALE_DOWNS))
    assert len(jobs) > 2 * SCALE_DOWNS
    assert {job.state for job in jobs} == {State.DONE}
    assert [job for job in jobs if len(job.runs) != 1 or job.runs[0].how != "done"] == []


def test_a_drain_that_is_not_needed_any_more_ends_before_anything_is_ordered(pool: Pool, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with staged(pool, tmp_path / "logs") as stage:
            stage.bound(2, 2)
            await stage.until(lambda: stage.ready() == 2, "both are ready")
            names = {worker.worker for worker in stage.pool.workers().values()}
            for _ in names:
                stage.submit(8)
            await stage.until(lambda: sum(w.busy for w in stage.pool.workers().values()) == 2, "both are busy")
            stage.bound(1, 1)
            # What drains is not there for admission, and its place is not ordered anew.
            await stage.until(lambda: stage.ready() == 1, "one drains")
            assert stage.redis.scard(pool.keys.drain) == 1
            assert await stage.running() == 2
            stage.bound(2, 2)
            await stage.until(lambda: stage.ready() == 2, "it consumes again")
            assert {worker.worker for worker in stage.pool.workers().values()} == names
            assert not stage.redis.exists(pool.keys.drain)
            await stage.until(lambda: all(job.state.ended for job in stage.entries()), "every job has ended")
            assert [len(job.runs) for job in stage.entries()] == [1, 1]

    asyncio.run(scenario())


def test_marks_run_out_unless_an_operator_renews_them_and_those_of_the_gone_are_removed(pool: Pool, tmp_path: Path) -> None:
    async def scenario() -> None:
        with Redis.from_url(str(pool.spec.broker.url), decode_responses=True) as client:
            client.sadd(pool.keys.drain, "gone")
            report(str(pool.spec.broker.url), pool, "cpu", "gone.1")
            async with staged(pool, tmp_path / "logs") as stage:
                await stage.until(lambda: not client.exists(pool.keys.drain), "the mark of the gone is removed")
                await stage.until(lambda: any(w.worker != "gone" for w in stage.pool.workers().values()), "the worker is ready")
                stage.bound(0, 0)
                await stage.until(lambda: 0 < client.pttl(pool.keys.drain) <= MARK_LIFE_MS, "it is marked, for a while")

    asyncio.run(scenario())

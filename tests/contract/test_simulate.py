"""`workerpool simulate --from-redis`: the jobs that a running pool's ledger still has, replayed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from redis import Redis
from tests import seeds
from tests.seeds import claim, consumer, make_pool

from workerpool_operator import planning
from workerpool_operator.cli import main
from workerpool_operator.model import API_VERSION, KIND
from workerpool_operator.ports import Pool
from workerpool_routing import WorkerPool, ledger
from workerpool_routing.ledger import State

pytestmark = pytest.mark.contract


@pytest.fixture
def pool(redis_url: str) -> Pool:
    """One whose keys hold what SCAN takes for a pattern; its policy is published."""
    pool = make_pool(redis_url, broker={"url": redis_url, "global_key_prefix": "a[b]*?:"})
    with Redis.from_url(redis_url) as client:
        client.set(pool.keys.policy, planning.policy(pool.spec).dump())
    return pool


def serve(url: str, pool: Pool) -> str:
    """Admit a job that has to have an accelerator, and carry it to its end there."""
    with seeds.celery_app(pool) as app:
        task_id = WorkerPool(pool.id, app).submit(app.tasks["tasks.work"], accelerated="required").task_id
    assert task_id
    with consumer(pool, "gpu") as connection, Redis.from_url(url) as client:
        held = claim(url, pool, connection, "gpu", "w.1")
        settle = client.register_script(ledger.script("settle"))
        for before, after in ((State.CLAIMED, State.FINISHING), (State.FINISHING, State.DONE)):
            call = ledger.settle(
                pool.keys, planning.policy(pool.spec), task_id, attempt=1, tag=held.message.delivery_tag, owner="w.1",
                tier="gpu", before=before, after=after, how="done",
            )  # fmt: skip
            assert settle(keys=call.keys, args=call.args) == 1
    return task_id


def replay(pool: Pool, directory: Path, *options: str) -> Result:
    file = directory / "pool.json"
    spec = pool.spec.model_dump(mode="json", by_alias=True, exclude_none=True)
    metadata = {"name": pool.name, "namespace": pool.namespace}
    file.write_text(json.dumps({"apiVersion": API_VERSION, "kind": KIND, "metadata": metadata, "spec": spec}))
    return CliRunner().invoke(main, ["simulate", "--from-redis", "--pool", str(file), "--policy", "workerpool", *options])


def test_the_ended_jobs_of_a_pool_are_replayed(redis_url: str, pool: Pool, tmp_path: Path) -> None:
    serve(redis_url, pool)
    serve(redis_url, pool)
    broken = serve(redis_url, pool)
    with Redis.from_url(redis_url) as client, seeds.celery_app(pool) as app:
        client.hset(pool.keys.job(broken), "attempt", "one")
        WorkerPool(pool.id, app).submit(app.tasks["tasks.work"], accelerated="required")
    result = replay(pool, tmp_path, "--json", str(tmp_path / "out.json"))
    assert result.exit_code == 0, result.output
    assert "test/media: 2 jobs of the last 0 min that wanted tier gpu\n" in result.output
    assert json.loads((tmp_path / "out.json").read_text())["policies"]["workerpool"]["jobs"] == 2


def test_a_ledger_without_such_a_job_is_said(pool: Pool, tmp_path: Path) -> None:
    result = replay(pool, tmp_path)
    assert (result.exit_code, result.output) == (
        2,
        "the ledger of test/media has no job (any more) that was done on tier gpu: there is nothing to replay\n",
    )


def test_a_redis_that_is_not_there_is_said(pool: Pool, tmp_path: Path) -> None:
    result = replay(pool, tmp_path, "--broker-url", "redis://127.0.0.1:1")
    assert (result.exit_code, "Redis at 127.0.0.1:1 cannot be reached" in result.output) == (2, True), result.output

"""`workerpool explain` on a real Redis: admission's own answer, and nothing changed by asking."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from redis import Redis
from tests import seeds
from tests.contract.broker import ask
from tests.contract.dev import dev, until, write_pool
from tests.seeds import make_pool, publish, report

from workerpool_operator import cli, planning
from workerpool_operator.dry_run import Answer, DryRun
from workerpool_operator.observation import Unavailable
from workerpool_operator.ports import Pool
from workerpool_routing import Overloaded, Reason, WorkerPool
from workerpool_routing.wire import Capacity, TierCapacity, wake_channel

pytestmark = [pytest.mark.contract, pytest.mark.timeout(540)]

ROOM = Capacity({"gpu": TierCapacity(startable=4)})


def dry_run(pool: Pool) -> DryRun | Unavailable:
    return ask(lambda broker: broker.dry_run(str(pool.spec.broker.url), pool))


def tell(pool: Pool, capacity: Capacity | None = ROOM) -> None:
    """What an operator publishes."""
    url = str(pool.spec.broker.url)
    ask(lambda broker: broker.publish(url, pool, planning.policy(pool.spec), capacity))
    with Redis.from_url(url) as client:
        client.persist(pool.keys.capacity)  # however slow the test


def answers(pool: Pool) -> tuple[Answer, ...]:
    found = dry_run(pool)
    assert isinstance(found, DryRun), found
    return found.answers


def knows_times(client: Any, pool: Pool, gpu: float, cpu: float) -> None:
    client.hset(pool.keys.service("gpu"), "tasks.work", gpu)
    client.hset(pool.keys.service("cpu"), "tasks.work", cpu)


def lives(client: Any, pool: Pool, tier: str) -> None:
    """A worker with a free slot, which goes on living however slow the test."""
    report(str(pool.spec.broker.url), pool, tier, f"{tier}-a.1")
    for slot, at in client.zrange(pool.keys.slots(tier), 0, -1, withscores=True):
        client.zadd(pool.keys.slots(tier), {slot: at + 3_600_000})


def world_of_nothing(_: Any, __: Pool) -> None:
    pass


def world_with_a_free_accelerator(client: Any, pool: Pool) -> None:
    lives(client, pool, "gpu")
    knows_times(client, pool, 1, 9)


def world_with_a_long_queue(client: Any, pool: Pool) -> None:
    for tier in ("gpu", "cpu"):
        lives(client, pool, tier)
    publish(pool, "gpu-tasks", *[0] * 9)
    knows_times(client, pool, 1, 2)


@pytest.mark.parametrize(
    ("world", "reasons"),
    [
        (world_of_nothing, [Reason.SLOT_STARTING, Reason.NOT_REQUESTED]),
        (world_with_a_free_accelerator, [Reason.FREE_SLOT, Reason.NOT_REQUESTED]),
        (world_with_a_long_queue, [Reason.WAIT_TOO_LONG, Reason.NOT_REQUESTED]),
    ],
)
def test_the_answer_is_the_one_that_the_library_gives_and_nothing_changes(
    redis_url: str, world: Callable[[Any, Pool], None], reasons: list[Reason]
) -> None:
    pool = make_pool(redis_url)
    tell(pool)
    with Redis.from_url(redis_url) as client, seeds.celery_app(pool) as app:
        world(client, pool)
        library, task = WorkerPool(pool.id, app), app.tasks["tasks.work"]
        before = {key: client.dump(key) for key in client.keys("*")}
        with client.pubsub(ignore_subscribe_messages=True) as heard:
            heard.subscribe(wake_channel())
            heard.get_message(timeout=1)
            found = answers(pool)
            assert heard.get_message(timeout=0.2) is None, "nobody is woken"
        assert {key: client.dump(key) for key in client.keys("*")} == before
        assert [answer.reason for answer in found] == reasons
        assert [answer.accelerated for answer in found] == [True, False]
        for answer in found:
            said = library.should_accelerate(task, accelerated=answer.accelerated)
            assert (answer.tier, answer.reason, answer.message, answer.wait) == (
                said.tier, said.reason, said.message, said.expected_wait,
            )  # fmt: skip


def test_a_task_that_has_run_is_asked_for_by_its_name(redis_url: str) -> None:
    pool = make_pool(redis_url)
    tell(pool)
    assert [answer.task for answer in answers(pool)] == ["", ""]
    with Redis.from_url(redis_url) as client:
        client.hset(pool.keys.service("cpu"), mapping={"b": 1, "a": 2})
        client.hset(pool.keys.service("gpu"), "c", 3)
    assert [(answer.task, answer.accelerated) for answer in answers(pool)] == [
        *((task, True) for task in "abc"),
        *((task, False) for task in "abc"),
    ]


def test_a_pool_without_accelerators_is_asked_once(redis_url: str) -> None:
    pool = make_pool(redis_url, tiers=[{"name": "cpu", "queue": "celery", "template": seeds.TEMPLATE}])
    tell(pool)
    assert [(answer.accelerated, answer.reason) for answer in answers(pool)] == [(False, Reason.ONLY_TIER)]


def test_a_job_that_would_be_refused_is_told_so(redis_url: str) -> None:
    pool = make_pool(redis_url, routing={"maxWaitSeconds": 5})
    tell(pool, Capacity())
    (gpu, cpu) = answers(pool)
    assert (gpu.tier, gpu.reason, gpu.wait) == ("", Reason.OVERLOADED, None)
    assert (cpu.tier, cpu.reason) == ("", Reason.OVERLOADED)
    with seeds.celery_app(pool) as app, pytest.raises(Overloaded) as refused:
        WorkerPool(pool.id, app).should_accelerate(app.tasks["tasks.work"])
    assert str(refused.value) == gpu.message


@pytest.mark.parametrize(("capacity", "told"), [(ROOM, True), (None, False)], ids=["alive", "silent"])
def test_whether_a_capacity_is_published_is_known(redis_url: str, capacity: Capacity | None, told: bool) -> None:
    pool = make_pool(redis_url)
    tell(pool, capacity)
    found = dry_run(pool)
    assert isinstance(found, DryRun)
    assert found.has_capacity is told


def test_without_a_policy_or_with_one_of_another_release_the_answer_says_so(redis_url: str) -> None:
    pool = make_pool(redis_url)
    unknown = dry_run(pool)
    assert isinstance(unknown, Unavailable)
    assert unknown.why == "test/media: nothing is known of the pool, the app's own routing holds"
    with Redis.from_url(redis_url) as client:
        client.set(pool.keys.policy, '{"version": 99}')
    newer = dry_run(pool)
    assert isinstance(newer, Unavailable)
    assert "policy has schema version 99" in newer.why


def test_without_redis_the_answer_says_so() -> None:
    found = dry_run(make_pool("redis://127.0.0.1:1/0"))
    assert isinstance(found, Unavailable)
    assert found.why.startswith("Redis at 127.0.0.1:1 cannot be reached")


def explain(*arguments: str) -> Result:
    return CliRunner().invoke(cli.main, ["explain", *arguments], env={"COLUMNS": "400"})


def line(text: str, words: str) -> str:
    (found,) = [" ".join(one.split()) for one in text.splitlines() if words in " ".join(one.split())]
    return found


def test_in_dev_mode_it_explains_what_the_file_with_the_status_says(tmp_path: Path) -> None:
    write_pool(tmp_path, gpu={"replicas": {"min": 1, "max": 1}})
    with dev(tmp_path) as running:
        command = running.until_it_prints(r"^status +workerpool explain -f (\S+)$")[1]
        running.until_it_prints(r"gpu 1/1 ready")
        decided = running.until_it_prints(r"tiny  AtMinimum: gpu: 0 → 1: (.*)$")[1]
        file = str(tmp_path / command)

        def told() -> str:
            result = explain("-f", file)
            assert result.exit_code == 0, result.output
            known = "ready of 1 wanted" in result.stdout and "no operator" not in result.stdout
            return result.stdout if known and "gpu, starts at once" in result.stdout else ""

        said = until(told, lambda: explain("-f", file).output)
        assert said.splitlines()[0].split() == ["default/tiny", "Active"]
        assert line(said, "gpu AtMinimum").startswith("gpu AtMinimum 0 waiting + 0 in flight need 0 workers to start")
        assert decided.startswith("0 waiting + 0 in flight need 0 workers to start"), "the Event has said the same"
        assert line(said, "gpu, starts").startswith("gpu, starts at once asks for an accelerator")
        assert "FreeSlot" in said
        assert "no status" not in explain("-f", file, "--broker-url", running.broker_url).stdout
        # Another Redis knows nothing, which is told as such.
        astray = explain("-f", file, "--broker-url", "redis://127.0.0.1:1/0").stdout
        assert "Redis at 127.0.0.1:1 cannot be reached" in astray
        assert "gpu AtMinimum" in " ".join(astray.split()), "the status stands"


def test_advisory_mode_says_what_it_would_do_and_writes_nothing(tmp_path: Path) -> None:
    write_pool(tmp_path, gpu={"replicas": {"min": 1, "max": 1}}, mode="Advisory")
    with dev(tmp_path) as running:
        running.until_it_prints(r"gpu 0/1 ready")
        said = explain("-f", str(tmp_path / "logs" / "workerpool.json")).stdout
        assert line(said, "Paused mode").endswith("Paused mode: Advisory: decides and reports, touches nothing")
        assert line(said, "gpu AtMinimum").endswith("wanted: 1; replicas.min holds it")
        assert "unknown: default/tiny: nothing is known of the pool, the app's own routing holds" in said
        with Redis.from_url(running.broker_url) as client:
            assert client.keys("*") == []


def test_a_file_without_a_status_says_where_there_is_one(tmp_path: Path) -> None:
    write_pool(tmp_path)
    result = explain("-f", str(tmp_path / "pool.yaml"), "--broker-url", "redis://127.0.0.1:1/0")
    assert result.exit_code == 0
    assert "give the one that `workerpool dev` names" in result.stdout


@pytest.mark.parametrize("status", [{"observedGeneration": 1, "tiers": 3}, {"observedGeneration": 1, "conditions": ["Ready"]}])
def test_a_status_that_no_operator_wrote_is_refused_in_one_line(tmp_path: Path, status: dict[str, Any]) -> None:
    pool = make_pool("redis://127.0.0.1:1/0")
    spec = pool.spec.model_dump(mode="json", by_alias=True, exclude_none=True)
    head = {"apiVersion": "workerpool.dev/v1alpha1", "kind": "WorkerPool", "metadata": {"name": "media"}}
    (tmp_path / "pool.json").write_text(json.dumps({**head, "spec": spec, "status": status}))
    result = explain("-f", str(tmp_path / "pool.json"))
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.startswith("the status of default/media was not written by an operator: ")


@pytest.mark.parametrize("arguments", [[], ["ml/media", "-f", "pool.yaml"]], ids=["neither", "both"])
def test_a_pool_is_named_in_one_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str]) -> None:
    monkeypatch.chdir(tmp_path)
    write_pool(tmp_path)
    result = explain(*arguments)
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr == "give POOL, as namespace/name, or -f FILE with a WorkerPool and its status\n"


def test_without_a_cluster_it_says_what_to_give(tmp_path: Path) -> None:
    command = [str(Path(sys.executable).with_name("workerpool")), "explain", "ml/media"]
    answer = subprocess.run(
        command, env={"KUBECONFIG": str(tmp_path / "none")}, capture_output=True, text=True, timeout=120, check=False
    )
    assert answer.returncode == 2
    assert "Traceback" not in answer.stderr
    last = answer.stderr.splitlines()[-1]
    assert last.startswith("no cluster to connect to: ")
    assert last.endswith("; set KUBECONFIG, or give -f FILE with a WorkerPool and its status")

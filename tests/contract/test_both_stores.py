"""What a pool promises, on a real Redis and on the double that the library's users test with."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from celery import Celery
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from redis import Redis

from workerpool_routing import Overloaded, PoolUnavailable, Reason, Tier, WorkerPool
from workerpool_routing.decide import START_SECONDS
from workerpool_routing.ledger import State
from workerpool_routing.store import RedisStore
from workerpool_routing.testing import Double, in_memory, workerpool_in_memory
from workerpool_routing.wire import Capacity, TierCapacity

pytestmark = pytest.mark.contract

__all__ = ["workerpool_in_memory"]

TIERS = (Tier("gpu", "gpu-jobs", accelerated=True), Tier("cpu", "cpu-jobs", accelerated=False))
TASK = "media.transcribe"


class RedisSeeds:
    """How a test says what a tier has: as :class:`Double` does, in a real Redis, as workers and operator write it."""

    def __init__(self, client: Any, pool: WorkerPool) -> None:
        self.client, self.keys, self.capacity = client, pool.keys, dict[str, TierCapacity]()

    def set_capacity(
        self,
        tier: str,
        *,
        ready: int = 0,
        starting: int = 0,
        ready_in: float = START_SECONDS,
        busy: int = 0,
        waiting: int = 0,
        service: Mapping[str, float] | None = None,
        limit: int | None = None,
    ) -> None:
        keys, client, queue = self.keys, self.client, f"{tier}-jobs"
        client.delete(keys.slots(tier), keys.unacked(tier), keys.service(tier), *keys.queue_lists(queue))
        seconds, _ = client.time()
        for n in range(ready):
            client.zadd(keys.slots(tier), {f"{tier}.1/{n}": seconds * 1000})
        for n in range(busy):
            client.hset(keys.unacked(tier), f"tag-{n}", "[]")
        for _ in range(waiting):
            client.lpush(keys.queue_list(queue, 0), "{}")
        if service:
            client.hset(keys.service(tier), mapping=service)
        # Slots that may be ordered are so many seconds away at any time, those that are on their way only now.
        self.capacity[tier] = TierCapacity(startable=starting, start_seconds=ready_in, limit=limit)
        client.set(keys.capacity, Capacity(self.capacity).dump())


Seeds = RedisSeeds | Double


def app_of(url: str) -> Celery:
    app = Celery("api", broker=url, set_as_current=False)

    @app.task(name=TASK, shared=False)  # type: ignore[untyped-decorator]
    def transcribe(path: str) -> str:
        return path

    return app


@pytest.fixture(params=["redis", "memory"])
def pool_and_seeds(request: pytest.FixtureRequest) -> Iterator[tuple[WorkerPool, Seeds]]:
    if request.param == "redis":
        url = request.getfixturevalue("redis_url")
        pool = WorkerPool("ml/media", app_of(url), tiers=TIERS, timeout=5)
        with Redis.from_url(url, decode_responses=True) as client:
            yield pool, RedisSeeds(client, pool)
    else:
        pool = WorkerPool("ml/media", app_of("memory://"), tiers=TIERS)
        with in_memory(pool) as double:
            yield pool, double


@pytest.fixture
def pool(pool_and_seeds: tuple[WorkerPool, Seeds]) -> WorkerPool:
    return pool_and_seeds[0]


@pytest.fixture
def seeds(pool_and_seeds: tuple[WorkerPool, Seeds]) -> Seeds:
    return pool_and_seeds[1]


def submit(pool: WorkerPool, **options: Any) -> Any:
    return pool.submit(pool._app.tasks[TASK], ("a.wav",), **options)


def test_the_slots_of_a_tier_are_given_out_once_each(pool: WorkerPool, seeds: Seeds) -> None:
    seeds.set_capacity("gpu", ready=2)
    decisions = [submit(pool, accelerated=True) for _ in range(3)]
    assert [decision.reason for decision in decisions] == [Reason.FREE_SLOT, Reason.FREE_SLOT, Reason.NO_CAPACITY]
    assert (pool.queue_length("gpu-jobs"), pool.queue_length("cpu-jobs")) == (2, 1)


def test_a_job_is_on_the_ledger_with_what_it_wanted(pool: WorkerPool) -> None:
    job = pool.job(submit(pool, accelerated=True).task_id)
    assert job is not None
    assert (job.state, job.task, job.attempt, job.tier, job.wanted, job.required) == (
        State.ADMITTED, TASK, 1, "cpu", "gpu", False,
    )  # fmt: skip


def test_deciding_alone_takes_nothing(pool: WorkerPool, seeds: Seeds) -> None:
    seeds.set_capacity("gpu", ready=1)
    decisions = [pool.should_accelerate(pool._app.tasks[TASK]) for _ in range(3)]
    assert {(decision.tier, decision.reason, decision.task_id) for decision in decisions} == {("gpu", Reason.FREE_SLOT, None)}


def test_a_second_call_with_the_same_key_gets_the_first_decision_and_queues_nothing(pool: WorkerPool, seeds: Seeds) -> None:
    seeds.set_capacity("gpu", ready=1)
    first, second = (submit(pool, accelerated=True, idempotency_key="upload-7") for _ in range(2))
    other = submit(pool, accelerated=True, idempotency_key="upload-8")
    assert (second.task_id, second.tier, second.queue, second.reason, second.expected_wait) == (
        first.task_id, "gpu", "gpu-jobs", Reason.FREE_SLOT, 0.0,
    )  # fmt: skip
    assert other.task_id != first.task_id
    assert (pool.queue_length("gpu-jobs"), pool.queue_length("cpu-jobs")) == (1, 1)


def test_an_empty_key_is_none(pool: WorkerPool) -> None:
    assert submit(pool, idempotency_key="").task_id != submit(pool, idempotency_key="").task_id
    assert pool.queue_length("cpu-jobs") == 2


def test_a_hundred_callers_with_one_key_are_one_job(pool: WorkerPool) -> None:
    with ThreadPoolExecutor(16) as threads:
        decisions = list(threads.map(lambda _: submit(pool, idempotency_key="upload-7"), range(100)))
    assert len({decision.task_id for decision in decisions}) == 1
    assert pool.queue_length("cpu-jobs") == 1


@pytest.mark.parametrize("options", [{"deadline": 4}, {"max_wait": 4}, {"deadline": 4, "max_wait": 99}])
def test_a_job_that_no_tier_can_start_in_time_is_refused_with_when_to_come_back(
    pool: WorkerPool, seeds: Seeds, options: Any
) -> None:
    seeds.set_capacity("cpu", ready=1, busy=1, waiting=2, service={TASK: 3.0})
    with pytest.raises(Overloaded) as refused:
        submit(pool, **options)
    assert (refused.value.retry_after, refused.value.reason) == (5, Reason.OVERLOADED)
    assert pool.queue_length("cpu-jobs") == 2
    assert submit(pool, deadline=9).expected_wait == 9.0


def test_a_job_waits_for_an_accelerator_that_is_5_s_away_and_spills_when_it_is_5_min_away(pool: WorkerPool, seeds: Seeds) -> None:
    seeds.set_capacity("cpu", ready=4)
    seeds.set_capacity("gpu", starting=1, ready_in=5)
    near = submit(pool, accelerated=True)
    assert (near.tier, near.reason, near.expected_wait) == ("gpu", Reason.SLOT_STARTING, 5.0)
    seeds.set_capacity("gpu", starting=1, ready_in=300)
    far = submit(pool, accelerated=True)
    assert (far.tier, far.reason, far.expected_wait) == ("cpu", Reason.SLOT_TOO_FAR, 0.0)
    assert "1 may still start, the first in 300 s" in far.message


def test_a_deadline_is_held_against_when_the_slots_are_ready(pool: WorkerPool, seeds: Seeds) -> None:
    seeds.set_capacity("gpu", starting=1, ready_in=300)
    with pytest.raises(Overloaded) as refused:
        submit(pool, accelerated="required", deadline=299)
    assert refused.value.retry_after == 1
    assert submit(pool, accelerated="required", deadline=300).expected_wait == 300.0


def test_a_tier_that_is_out_of_routing_gets_no_job_whatever_slots_it_has(pool: WorkerPool, seeds: Seeds) -> None:
    seeds.set_capacity("cpu", ready=1)
    seeds.set_capacity("gpu", ready=4, limit=0)
    decision = submit(pool, accelerated=True)
    assert (decision.tier, decision.reason) == ("cpu", Reason.TIER_BROKEN)
    assert decision.message.startswith("cpu: attempts on the accelerated tier fail")
    with pytest.raises(Overloaded) as refused:
        submit(pool, accelerated="required")
    assert (refused.value.retry_after, pool.queue_length("gpu-jobs")) == (10, 0)


@pytest.mark.parametrize("gpu", [{"ready": 4}, {"starting": 4}], ids=str)
def test_a_tier_on_trial_gets_one_job_at_a_time(pool: WorkerPool, seeds: Seeds, gpu: Any) -> None:
    seeds.set_capacity("cpu", ready=1)
    seeds.set_capacity("gpu", **gpu, limit=1)
    assert [submit(pool, accelerated=True).tier for _ in range(3)] == ["gpu", "cpu", "cpu"]
    seeds.set_capacity("gpu", **gpu, busy=1, limit=1)
    assert submit(pool, accelerated=True).reason is Reason.TIER_BROKEN
    seeds.set_capacity("gpu", **gpu, limit=1)
    assert submit(pool, accelerated="required").tier == "gpu"
    with pytest.raises(Overloaded):
        submit(pool, accelerated="required")


def test_a_refused_key_is_free_again(pool: WorkerPool, seeds: Seeds) -> None:
    with pytest.raises(Overloaded) as refused:
        submit(pool, max_wait=1, idempotency_key="upload-7")
    assert refused.value.retry_after == 10, "nobody is there or on its way"
    seeds.set_capacity("cpu", ready=1)
    assert submit(pool, max_wait=1, idempotency_key="upload-7").reason is Reason.NOT_REQUESTED


def test_a_task_that_spills_goes_on_to_spill_until_the_wait_is_well_below_the_threshold(pool: WorkerPool, seeds: Seeds) -> None:
    def reason(waiting: int) -> Reason:
        seeds.set_capacity("gpu", ready=1, busy=1, waiting=waiting, service={TASK: 1.0})
        seeds.set_capacity("cpu", ready=50, service={TASK: 25.0})
        return submit(pool, accelerated=True).reason  # type: ignore[no-any-return]

    # The threshold is 4 seconds, the wait one more than those that wait.
    assert [reason(waiting) for waiting in (3, 4, 3, 2, 1, 2, 3)] == [
        Reason.WORTH_THE_WAIT, Reason.WAIT_TOO_LONG, Reason.WAIT_TOO_LONG, Reason.WAIT_TOO_LONG, Reason.WORTH_THE_WAIT,
        Reason.WORTH_THE_WAIT, Reason.WORTH_THE_WAIT,
    ]  # fmt: skip


steps = st.tuples(
    st.sampled_from([True, True, False, "required"]),
    st.none() | st.sampled_from([0.0, 2.0, 40.0]),
    st.none() | st.sampled_from(["a", "b"]),
)
tiers = st.fixed_dictionaries(
    {"ready": st.integers(0, 4), "starting": st.integers(0, 2), "busy": st.integers(0, 4), "waiting": st.integers(0, 3)},
    optional={
        "ready_in": st.sampled_from([0.0, 5.0, 300.0]),
        "service": st.floats(0.1, 20).map(lambda seconds: {TASK: seconds}),
        "limit": st.integers(0, 4),
    },
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(gpu=tiers, cpu=tiers, steps=st.lists(steps, min_size=1, max_size=12))
def test_the_double_answers_every_history_of_calls_as_redis_does(redis_url: str, gpu: Any, cpu: Any, steps: Any) -> None:
    with Redis.from_url(redis_url, decode_responses=True) as client:
        client.flushall()
        real = WorkerPool("ml/media", app_of(redis_url), tiers=TIERS)
        double = WorkerPool("ml/media", app_of("memory://"), tiers=TIERS)
        with in_memory(double) as memory:
            for seeds in (RedisSeeds(client, real), memory):
                seeds.set_capacity("gpu", **gpu)
                seeds.set_capacity("cpu", **cpu)
            assert [answer(real, step) for step in steps] == [answer(double, step) for step in steps]
        real.connection.client.close()


def answer(pool: WorkerPool, step: Any) -> Any:
    wish, max_wait, key = step
    try:
        decision = submit(pool, accelerated=wish, max_wait=max_wait, idempotency_key=key)
    except Overloaded as refused:
        return refused.retry_after, str(refused)
    return decision.tier, decision.queue, decision.reason, decision.message, decision.expected_wait


def test_the_async_form_is_the_same_call(pool: WorkerPool, seeds: Seeds) -> None:
    seeds.set_capacity("gpu", ready=1)
    decision = asyncio.run(pool.submit_async(pool._app.tasks[TASK], ("a",), accelerated=True, content_type="a.wav"))
    assert (decision.tier, decision.reason) == ("gpu", Reason.FREE_SLOT)
    assert pool.queue_length("gpu-jobs") == 1


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"deadline": -1}, ValueError, "deadline is -1"),
        ({"deadline": float("nan")}, ValueError, "deadline is nan"),
        ({"deadline": float("inf")}, ValueError, "deadline is inf"),
        ({"deadline": 1e300}, ValueError, "deadline is 1e"),
        ({"max_wait": -0.5}, ValueError, "max_wait is -0.5"),
        ({"max_wait": float("nan")}, ValueError, "max_wait is nan"),
        ({"idempotency_key": "\ud800"}, ValueError, "idempotency_key is .*not text"),
        ({"accelerated": "yes"}, ValueError, 'True, False or "required"'),
        ({"queue": "q"}, TypeError, "queue"),
        ({"acelerated": True}, TypeError, "no option 'acelerated'"),
    ],
)
def test_a_bad_argument_is_named_and_nothing_is_queued(pool: WorkerPool, options: Any, error: Any, words: str) -> None:
    with pytest.raises(error, match=words):
        submit(pool, **options)
    assert pool.queue_length("cpu-jobs") == pool.queue_length("gpu-jobs") == 0


def test_arguments_that_cannot_be_serialised_are_refused_before_anything_is_admitted(pool: WorkerPool) -> None:
    with pytest.raises(Exception, match="not JSON serializable"):
        pool.submit(pool._app.tasks[TASK], (object(),))
    assert pool.queue_length("cpu-jobs") == 0


def test_the_name_of_a_task_is_no_task(pool: WorkerPool) -> None:
    with pytest.raises(TypeError, match=r"'media\.transcribe'"):
        pool.submit(TASK)


def test_the_double_shows_what_the_worker_would_get_and_says_what_went_elsewhere(workerpool_in_memory: Any) -> None:
    pool = WorkerPool("ml/media", app_of("memory://"))
    double: Double = workerpool_in_memory(pool, tiers=TIERS)
    double.set_capacity("gpu", ready=1)
    submit(pool, accelerated=True, content_type="audio/wav", headers={"trace": "7"})
    job = double.assert_routed(TASK, tier="gpu", reason=Reason.FREE_SLOT)
    assert (job.args, job.kwargs, job.headers["trace"]) == (["a.wav"], {}, "7")
    with pytest.raises(AssertionError, match=r"went to gpu \(FreeSlot\), not to cpu"):
        double.assert_routed(TASK, tier="cpu")
    with pytest.raises(AssertionError, match="no job of other"):
        double.assert_routed("other", tier="cpu")
    double.unavailable = True
    with pytest.raises(PoolUnavailable):
        submit(pool)


@pytest.mark.parametrize("encoding", [{"compression": "gzip"}, {"serializer": "pickle"}, {"serializer": "yaml"}])
def test_the_double_reads_what_a_worker_of_the_app_would(workerpool_in_memory: Any, encoding: dict[str, str]) -> None:
    pool = WorkerPool("ml/media", app_of("memory://"))
    double: Double = workerpool_in_memory(pool, tiers=TIERS)
    submit(pool, **encoding)
    assert list(double.submitted[0].args) == ["a.wav"]


def test_a_tier_that_the_double_has_not_is_named(workerpool_in_memory: Any) -> None:
    double: Double = workerpool_in_memory(WorkerPool("ml/media", app_of("memory://")), tiers=TIERS)
    with pytest.raises(AssertionError, match="no tier 'tpu'; it has"):
        double.set_capacity("tpu", ready=1)


def test_a_plain_delay_is_routed_by_the_double_too(workerpool_in_memory: Any) -> None:
    pool = WorkerPool("ml/media", app_of("memory://"))
    double: Double = workerpool_in_memory(pool, tiers=TIERS)
    task = pool._app.tasks[TASK]
    result = task.apply_async(("a",), headers={"workerpool": {"accelerated": "required"}})
    assert double.assert_routed(TASK, tier="gpu").task_id == result.id
    assert double.queue_length("gpu-jobs") == 1


def let_pass(pool: WorkerPool, seconds: int) -> None:
    """Take so much from the life of everything that is kept; the double keeps all of it for ever."""
    if isinstance(pool.store, RedisStore):
        client = pool.connection.client
        for key in client.scan_iter():
            if (left := client.ttl(key)) > 0:
                client.expire(key, max(0, left - seconds))


A_DAY = 86_400


@pytest.mark.parametrize(
    "ahead", [{"countdown": 3 * A_DAY}, {"eta": datetime.now(UTC) + timedelta(days=3)}], ids=["countdown", "eta"]
)
def test_a_job_that_is_to_start_in_days_is_on_the_ledger_until_a_day_later(pool: WorkerPool, ahead: dict[str, Any]) -> None:
    first = submit(pool, idempotency_key="upload-7", **ahead)
    routed = pool._app.tasks[TASK].apply_async(("a.wav",), headers={"workerpool": {"accelerated": True}}, **ahead).id
    let_pass(pool, 3 * A_DAY + A_DAY // 2)
    assert [getattr(pool.job(task_id), "state", None) for task_id in (first.task_id, routed)] == [State.ADMITTED] * 2
    assert submit(pool, idempotency_key="upload-7", **ahead).task_id == first.task_id


def test_a_job_without_an_eta_is_forgotten_a_day_after_it_was_heard_of_last(redis_url: str) -> None:
    pool = WorkerPool("ml/media", app_of(redis_url), tiers=TIERS, timeout=5)
    jobs = [submit(pool, **ahead).task_id for ahead in ({}, {"countdown": -3 * A_DAY})]
    let_pass(pool, A_DAY + A_DAY // 2)
    assert [pool.job(task_id) for task_id in jobs] == [None, None]

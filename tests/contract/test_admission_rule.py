"""The routing rule in its two forms, Python and Lua: seeded with the same loads, they decide the same."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
from celery import Celery
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from redis import Redis
from tests.seeds import load, now_of

from workerpool_routing import Reason, Tier, WorkerPool
from workerpool_routing.admission import Question
from workerpool_routing.decide import Load, Request, assumed_seconds, place, preselect
from workerpool_routing.wire import Capacity, Milliseconds, Policy, StartingSlots, TierCapacity

pytestmark = pytest.mark.contract


GPU, GPU2 = Tier("gpu", "gpu-jobs", accelerated=True), Tier("gpu2", "gpu2-jobs", accelerated=True)
CPU, CPU2 = Tier("cpu", "cpu-jobs", accelerated=False), Tier("cpu2", "cpu2-jobs", accelerated=False)
TIERS = (GPU, CPU, GPU2, CPU2)
TASK = "media.transcribe"


@pytest.fixture
def pool(redis_url: str) -> WorkerPool:
    app = Celery("api", broker=redis_url)
    app.conf.broker_transport_options = {"global_keyprefix": "test-"}
    return WorkerPool("ml/media", app, tiers=TIERS)


@pytest.fixture
def client(redis_url: str) -> Iterator[Any]:
    with Redis.from_url(redis_url, decode_responses=True) as client:
        yield client


counts = st.integers(0, 12)
services = st.none() | st.floats(0.001, 1000)
groups = st.lists(st.tuples(st.integers(1, 12), st.floats(0, 120)), max_size=4).map(
    lambda found: tuple(sorted(found, key=lambda group: group[1]))
)
rest = {"startable": counts, "start_seconds": st.floats(120, 200), "target_seconds": st.floats(0, 300), "mean": services}
limits = st.none() | st.integers(0, 12)
loads = st.builds(Load, counts, counts, counts, groups, st.integers(0, 3), services, limit=limits, **rest)
full = st.builds(Load, counts, st.integers(4, 12), st.integers(0, 4), groups, st.just(0), services, **rest)
known = st.builds(Load, counts, st.integers(4, 12), st.integers(1, 4), groups, st.just(0), st.floats(0.5, 8), **rest)


def capacity_of(seen: Load, now: Milliseconds) -> TierCapacity:
    """What the operator says of the slots that come and that may be ordered."""
    starting = tuple(StartingSlots(slots, Milliseconds(now + round(1000 * ready_in))) for slots, ready_in in seen.coming)
    return TierCapacity(starting, seen.startable, seen.start_seconds, seen.target_seconds, limit=seen.limit)


def check_against_the_rule(
    client: Any, pool: WorkerPool, seen: dict[str, Load], wish: Any, limit: float | None, spilling: bool
) -> Reason:
    """Seed Redis with the loads and hold the script's answer to that of the Python rule; return the reason."""
    client.flushall()
    for tier in TIERS:
        load(client, pool.keys, tier, seen[tier.name], TASK)
    now = Milliseconds(now_of(client))
    capacity = {name: capacity_of(one, now) for name, one in seen.items()}
    client.set(pool.keys.capacity, Capacity(capacity).dump())
    if spilling:
        client.hset(pool.keys.sides, TASK, 1)
    before = {key: client.dump(key) for key in client.scan_iter()}
    request = Request(TASK, wish, limit=limit)
    candidates = preselect(Policy(TIERS), request)
    admission = pool.store.admit(Question(candidates, request))
    at_that_time = [
        replace(
            seen[tier.name].having(capacity[tier.name], admission.time), assumed=assumed_seconds(accelerated=tier.accelerated)
        )
        for tier in candidates.tiers
    ]
    expected = place(candidates, at_that_time, limit=limit, spilling=spilling)
    assert (admission.tier, admission.reason) == (candidates.tiers[expected.index].name, expected.reason)
    assert admission.wait == expected.wait
    assert admission.load
    assert admission.load.slots == at_that_time[0].slots
    assert admission.load.next_slot == pytest.approx(at_that_time[0].next_slot, abs=0.001)
    assert {key: client.dump(key) for key in client.scan_iter()} == before, "deciding changes nothing"
    return expected.reason


@settings(max_examples=250, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(
    loads=st.tuples(*[st.one_of(loads, full, known)] * 4),
    wish=st.sampled_from([True, True, False, "required"]),
    limit=st.none() | st.floats(0, 100),
    spilling=st.booleans(),
)
def test_the_script_measures_what_is_there_and_decides_as_the_python_rule_does(
    pool: WorkerPool, client: Any, loads: tuple[Load, ...], wish: Any, limit: float | None, spilling: bool
) -> None:
    seen = dict(zip(("gpu", "gpu2", "cpu", "cpu2"), loads, strict=True))
    check_against_the_rule(client, pool, seen, wish, limit, spilling)


def starts(slots: int, seconds: float, service: float | None = None) -> Load:
    """A tier at zero that may start so many."""
    return Load(0, 0, 0, service=service, startable=slots, start_seconds=seconds)


IDLE, BUSY = Load(0, 0, 1), Load(0, 1, 1, service=1.0)


@pytest.mark.parametrize(
    ("gpu", "gpu2", "cpu", "limit", "spilling", "reason"),
    [
        (IDLE, IDLE, IDLE, None, False, Reason.FREE_SLOT),
        (BUSY, IDLE, IDLE, None, False, Reason.FREE_SLOT),
        (Load(5, 1, 1, startable=1), BUSY, Load(0, 9, 1), None, False, Reason.SLOT_STARTING),
        (Load(6, 1, 1, startable=1), Load(6, 1, 1, startable=1), Load(0, 9, 1), None, False, Reason.QUEUE_TOO_LONG),
        (Load(0, 1, 1), Load(0, 1, 1), IDLE, None, False, Reason.NO_CAPACITY),
        (starts(1, 30.0), BUSY, IDLE, None, False, Reason.SLOT_STARTING),
        (starts(1, 30.1), BUSY, IDLE, None, False, Reason.SLOT_TOO_FAR),
        (starts(1, 33.0), BUSY, Load(2, 1, 1), None, False, Reason.SLOT_STARTING),
        (starts(1, 33.1), BUSY, Load(2, 1, 1), None, False, Reason.SLOT_TOO_FAR),
        # sqrt(9 * 36) - 9 = 9 seconds: a slot that is ready by then is worth the wait.
        (starts(1, 9.0, 9.0), Load(9, 1, 1), Load(0, 0, 1, (), 0, 36.0), None, False, Reason.WORTH_THE_WAIT),
        (starts(1, 9.1, 9.0), Load(9, 1, 1), Load(0, 0, 1, (), 0, 36.0), None, False, Reason.WAIT_TOO_LONG),
        # sqrt(1 * 9) - 1 = 2 seconds: two jobs of one second each are just as long as that, three are longer.
        (Load(1, 1, 1, (), 0, 1.0), Load(9, 1, 1, (), 0, 1.0), Load(0, 0, 1, (), 0, 9.0), None, False, Reason.WORTH_THE_WAIT),
        (Load(2, 1, 1, (), 0, 1.0), Load(9, 1, 1, (), 0, 1.0), Load(0, 0, 1, (), 0, 9.0), None, False, Reason.WAIT_TOO_LONG),
        (Load(1, 1, 1, (), 0, 1.0), Load(9, 1, 1, (), 0, 1.0), Load(0, 0, 1, (), 0, 9.0), None, True, Reason.WAIT_TOO_LONG),
        (Load(0, 1, 1, (), 0, 1.0), Load(9, 1, 1, (), 0, 1.0), Load(0, 0, 1, (), 0, 9.0), None, True, Reason.WORTH_THE_WAIT),
        (Load(1, 1, 1, (), 0, 1.0), Load(9, 1, 1, (), 0, 1.0), Load(0, 0, 1, (), 0, 9.0), 1.0, False, Reason.STARTS_SOONER),
        (Load(1, 1, 1, (), 0, 1.0), Load(9, 1, 1, (), 0, 1.0), Load(0, 1, 1, (), 0, 9.0), 1.0, False, Reason.OVERLOADED),
        (Load(1, 1, 1, (), 0, 1.0), Load(9, 1, 1, (), 0, 1.0), Load(0, 1, 1, (), 0, 9.0), 2.0, False, Reason.WORTH_THE_WAIT),
    ],
)
def test_both_forms_of_the_rule_agree_on_every_boundary(
    pool: WorkerPool, client: Any, gpu: Load, gpu2: Load, cpu: Load, limit: float | None, spilling: bool, reason: Reason
) -> None:
    seen = {"gpu": gpu, "gpu2": gpu2, "cpu": cpu, "cpu2": Load(99, 9, 1, (), 0, 9.0)}
    assert check_against_the_rule(client, pool, seen, True, limit, spilling) is reason

"""The wire contract: Kombu's own keys as Kombu has them, and values that survive the way through Redis."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kombu.transport.redis import Channel

from workerpool_routing import wire
from workerpool_routing.wire import (
    Capacity,
    Keyspace,
    Milliseconds,
    Policy,
    Presence,
    StartingSlots,
    TaskPolicy,
    TierCapacity,
    TierPolicy,
    VersionMismatch,
    priority_of,
    rewrite,
    unacked_keys,
    wake_channel,
)

pytestmark = pytest.mark.unit

KEYS = Keyspace("ml/media")
STEPS = [(0, 3, 6, 9), (0,), (0, 5), (0, 1, 2, 3, 4, 5, 6, 7, 8, 9), (3, 6)]


def channel(steps: tuple[int, ...] = wire.PRIORITY_STEPS) -> Any:
    """Kombu's own channel, without a connection."""
    bare: Any = Channel.__new__(Channel)
    bare.priority_steps = list(steps)
    return bare


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("priority", range(10))
def test_a_message_is_in_the_list_that_kombu_puts_it_in(steps: tuple[int, ...], priority: int) -> None:
    kombu = channel(steps)._q_for_pri("gpu-tasks", priority)
    assert Keyspace("ml/media", "", steps).queue_list("gpu-tasks", priority) == kombu
    assert Keyspace("ml/media", "prod-", steps).queue_list("gpu-tasks", priority) == f"prod-{kombu}"


@pytest.mark.parametrize("steps", STEPS)
def test_a_queue_is_every_list_that_kombu_reads_in_kombus_order(steps: tuple[int, ...]) -> None:
    kombu = channel(steps)
    assert Keyspace("ml/media", "", steps).queue_lists("q") == [kombu._q_for_pri("q", step) for step in steps]


def test_the_default_steps_are_kombus() -> None:
    assert tuple(Channel.priority_steps) == wire.PRIORITY_STEPS


PRIORITIES: list[Any] = [*range(-2, 12), None, "4", "high", 2.7, [], True]


@pytest.mark.parametrize("priority", PRIORITIES, ids=repr)
def test_the_priority_of_a_message_is_what_kombu_reads_in_it(priority: Any) -> None:
    message = {"properties": {"priority": priority}}
    assert priority_of(message) == channel()._get_message_priority(message)


def test_a_message_without_a_priority_has_kombus_default() -> None:
    assert priority_of({"properties": {}}) == channel()._get_message_priority({"properties": {}}) == 0


def test_in_flight_keys_are_options_that_kombu_knows_and_one_set_a_tier() -> None:
    options = unacked_keys("ml/media", "gpu")
    assert set(options) == {"unacked_key", "unacked_index_key", "unacked_mutex_key"}
    assert set(options) <= set(Channel.from_transport_options)
    names = [*options.values(), *unacked_keys("ml/media", "cpu").values(), *unacked_keys("ml/other", "gpu").values()]
    assert len(set(names)) == 9


def test_in_flight_keys_read_what_kombu_writes_under_its_prefix() -> None:
    prefixed = Keyspace("ml/media", "prod-")
    assert prefixed.unacked("gpu") == "prod-" + unacked_keys("ml/media", "gpu")["unacked_key"]
    assert prefixed.unacked_index("gpu") == "prod-" + unacked_keys("ml/media", "gpu")["unacked_index_key"]


def own_keys(keys: Keyspace) -> list[str]:
    named: list[Callable[[str], str]] = [
        keys.presence,
        keys.slots,
        keys.spilled,
        keys.served,
        keys.attempts,
        keys.checkpoint,
        keys.outlier,
        keys.held,
        keys.job,
        keys.unacked,
        keys.unacked_index,
        keys.waiting,
        keys.scheduled,
        keys.leases,
        keys.idempotent,
        keys.service,
    ]
    own = [keys.policy, keys.capacity, keys.routes, keys.sides, keys.drain, keys.aside, keys.aside_at, keys.aside_count]
    return [*own, *(name(what) for name in named for what in ("gpu", "cpu"))]


def test_no_two_keys_of_any_two_pools_are_the_same() -> None:
    spaces = [Keyspace("ml/media"), Keyspace("ml/other"), Keyspace("prod/media"), Keyspace("ml/media", "prod-")]
    names = [name for keys in spaces for name in own_keys(keys)]
    assert len(set(names)) == len(names)


def test_every_key_starts_with_the_prefix_and_the_pool() -> None:
    assert [name for name in own_keys(Keyspace("ml/media", "prod-")) if not name.startswith("prod-workerpool:ml/media:")] == []


def test_every_name_of_schema_version_1_stays_as_other_releases_know_it() -> None:
    assert wire.SCHEMA_VERSION == 1
    assert [name.removeprefix("workerpool:ml/media:") for name in own_keys(KEYS)] == [
        "policy", "capacity", "routes", "sides", "drain", "aside", "aside:at", "aside:count",
        "presence:gpu", "presence:cpu", "slots:gpu", "slots:cpu", "spilled:gpu", "spilled:cpu", "served:gpu", "served:cpu",
        "attempts:gpu", "attempts:cpu", "checkpoint:gpu", "checkpoint:cpu", "outlier:gpu", "outlier:cpu",
        "held:gpu", "held:cpu", "job:gpu", "job:cpu", "unacked:gpu", "unacked:cpu", "unacked:gpu:index", "unacked:cpu:index",
        "waiting:gpu", "waiting:cpu", "scheduled:gpu", "scheduled:cpu",
        "leases:gpu", "leases:cpu", "idempotent:gpu", "idempotent:cpu", "service:gpu", "service:cpu",
    ]  # fmt: skip
    assert wire.HEADER == "workerpool"


CAPACITY = Capacity({"gpu": TierCapacity((StartingSlots(1, Milliseconds(9)),), 2, 4.5, 60.0, 3, 1)})


def test_a_policy_and_a_capacity_of_schema_version_1_stay_as_other_releases_write_them() -> None:
    policy = Policy(
        (TierPolicy("gpu", "gpu-tasks", True, 2),), ("audio",), (TaskPolicy("media.*", "required"),), False, True, 600
    )
    written = (
        '{"version":1,"tiers":[{"name":"gpu","queue":"gpu-tasks","accelerated":true,"concurrency":2}],'
        '"accelerated_content_types":["audio"],"tasks":[{"name":"media.*","accelerated":"required"}],'
        '"fallback_on_failure":false,"fallback_on_loss":true,"max_wait_seconds":600'
    )
    assert policy.dump() == f'{written},"removed":[]}}'
    assert Policy.load(f"{written}}}") == policy, "as releases have written it that knew of no removed tiers"
    assert CAPACITY.dump() == (
        '{"version":1,"tiers":{"gpu":{"starting":[{"slots":1,"ready_at":9}],"startable":2,"start_seconds":4.5,'
        '"target_seconds":60.0,"unschedulable":3,"limit":1}}}'
    )


def test_a_worker_finds_its_place_in_the_environment_under_the_promised_names() -> None:
    assert (wire.ENV_POOL, wire.ENV_TIER, wire.ENV_WORKER) == ("WORKERPOOL_POOL", "WORKERPOOL_TIER", "WORKERPOOL_WORKER")
    assert (wire.ENV_QUEUE, wire.ENV_CONCURRENCY) == ("WORKERPOOL_QUEUE", "WORKERPOOL_CONCURRENCY")
    assert wire.ENV_BROKER_URL == "CELERY_BROKER_URL"


def test_the_wake_channel_is_one_for_all_pools_under_a_prefix() -> None:
    assert (wake_channel(), wake_channel("prod-")) == ("workerpool:wake", "prod-workerpool:wake")


starting = st.lists(st.builds(StartingSlots, st.integers(1, 1000), st.integers(0, 2**45)), max_size=3).map(tuple)
names = st.text('aZ-/*"\\ é\n\u2028', min_size=1, max_size=8)
slots = st.integers(0, 1000)
wishes = st.sampled_from([True, False, "required"])
policies = st.builds(
    Policy,
    tiers=st.lists(st.builds(TierPolicy, st.text("az09", min_size=1, max_size=8), names, st.booleans(), slots), max_size=4).map(
        tuple
    ),
    accelerated_content_types=st.lists(names, max_size=3).map(tuple),
    tasks=st.lists(st.builds(TaskPolicy, names, wishes), max_size=3).map(tuple),
    fallback_on_failure=st.booleans(),
    fallback_on_loss=st.booleans(),
    max_wait_seconds=st.none() | st.integers(1),
)
capacities = st.builds(
    Capacity,
    st.dictionaries(
        names,
        st.builds(TierCapacity, starting, slots, st.floats(0, 1e6), st.floats(0, 1e6), slots, st.none() | slots),
        max_size=3,
    ),
)


@settings(max_examples=50)
@given(policies)
def test_a_policy_survives_the_way_through_redis(policy: Policy) -> None:
    loaded = Policy.load(policy.dump())
    assert loaded == Policy.load(policy.dump().encode()) == policy
    assert [type(task.accelerated) for task in loaded.tasks] == [type(task.accelerated) for task in policy.tasks]


@settings(max_examples=50)
@given(capacities)
def test_capacity_survives_the_way_through_redis(capacity: Capacity) -> None:
    assert Capacity.load(capacity.dump()) == Capacity.load(capacity.dump().encode()) == capacity


REPORT = {"version": 1, "owner": "w.1", "worker": "w", "tier": "gpu", "queue": "q", "slots": 2, "busy": 1, "since": 5, "at": 9}


def test_presence_is_read_as_the_worker_wrote_it() -> None:
    assert Presence.load(json.dumps(REPORT)) == Presence("w.1", "w", "gpu", "q", 2, 1, Milliseconds(5), Milliseconds(9))


LOADERS: dict[str, tuple[Callable[[str], object], dict[str, Any]]] = {
    "policy": (Policy.load, json.loads(Policy((TierPolicy("gpu", "q", True),), tasks=(TaskPolicy("t"),)).dump())),
    "capacity": (Capacity.load, json.loads(CAPACITY.dump())),
    "presence": (Presence.load, REPORT),
}


@pytest.mark.parametrize("version", [0, 2, "1", None])
@pytest.mark.parametrize("what", LOADERS)
def test_a_version_that_this_side_does_not_know_is_refused_by_name(what: str, version: Any) -> None:
    load, good = LOADERS[what]
    with pytest.raises(VersionMismatch, match=f"{what} has schema version {version!r}, this side knows 1: use one release"):
        load(json.dumps(good | {"version": version}))


@pytest.mark.parametrize("what", LOADERS)
def test_a_value_without_a_version_is_refused(what: str) -> None:
    load, good = LOADERS[what]
    load(json.dumps(good))
    with pytest.raises(VersionMismatch, match="schema version None"):
        load(json.dumps({key: value for key, value in good.items() if key != "version"}))


@pytest.mark.parametrize("what", LOADERS)
@pytest.mark.parametrize("garbage", ["", "{", "null", "[]", "3", '"x"', '{"version": 1}', '{"version": 1, "tiers": 5, "x": 1}'])
def test_garbage_is_a_value_error(what: str, garbage: str) -> None:
    with pytest.raises(ValueError):
        LOADERS[what][0](garbage)


@pytest.mark.parametrize("what", ["policy", "capacity", "presence"])
def test_a_field_that_does_not_belong_is_named(what: str) -> None:
    load, good = LOADERS[what]
    changed = copy.deepcopy(good)
    inner = changed["tiers"][0] if what == "policy" else changed["tiers"]["gpu"] if what == "capacity" else changed
    inner["novel"] = 1
    with pytest.raises(ValueError, match=f"{what} is not as schema version 1 has it: .*novel"):
        load(json.dumps(changed))


@pytest.mark.parametrize("starting", [None, 3, [3], [{"slots": 3}], [{"slots": 3, "ready_at": 9, "novel": 1}]])
def test_slots_that_start_without_a_time_are_a_value_error(starting: Any) -> None:
    changed = json.loads(CAPACITY.dump())
    changed["tiers"]["gpu"]["starting"] = starting
    with pytest.raises(ValueError, match="capacity is not as schema version 1 has it"):
        Capacity.load(json.dumps(changed))


@pytest.mark.parametrize(("age", "alive"), [(0, True), (wire.PRESENCE_LIFE_MS - 1, True), (wire.PRESENCE_LIFE_MS, False)])
def test_a_worker_is_alive_for_one_presence_life_after_its_last_report(age: int, alive: bool) -> None:
    report = Presence.load(json.dumps(REPORT | {"at": 1_000_000}))
    assert report.alive(Milliseconds(1_000_000 + age)) is alive


def test_kombu_restores_only_what_nobody_took_over() -> None:
    takeover_ms = 15_000
    assert wire.PRESENCE_LIFE_MS + takeover_ms < wire.VISIBILITY_TIMEOUT_SECONDS * 1000
    assert wire.PRESENCE_PERIOD_SECONDS * 1000 * 4 <= wire.PRESENCE_LIFE_MS, (
        "a few reports may be late before a worker counts as lost"
    )


def test_the_preferred_tier_of_each_kind_is_the_first() -> None:
    gpus, cpus = (
        [TierPolicy(f"gpu{n}", f"g{n}", True) for n in range(2)],
        [TierPolicy(f"cpu{n}", f"c{n}", False) for n in range(2)],
    )
    policy = Policy((cpus[0], gpus[0], gpus[1], cpus[1]))
    assert (policy.accelerated_tier(), policy.plain_tier()) == (gpus[0], cpus[0])
    assert (policy.tier("gpu1"), policy.tier("none")) == (gpus[1], None)
    assert (Policy((cpus[0],)).accelerated_tier(), Policy((gpus[0],)).plain_tier()) == (None, None)


MESSAGE: dict[str, Any] = {
    "body": "W1siYSJdLCB7fSwge31d",
    "content-encoding": "utf-8",
    "content-type": "application/json",
    "headers": {"id": "t1", "root_id": "t0", "retries": 2, "expires": None, wire.HEADER: {"attempt": 1, "accelerated": True}},
    "properties": {
        "correlation_id": "t1",
        "reply_to": "r",
        "delivery_tag": "old",
        "delivery_info": {"exchange": "", "routing_key": "gpu-tasks", "redelivered": True},
        "priority": 6,
        "body_encoding": "base64",
    },
}


def test_a_rewritten_message_differs_in_queue_attempt_and_delivery_tag_alone() -> None:
    expected = copy.deepcopy(MESSAGE)
    expected["headers"][wire.HEADER]["attempt"] = 2
    expected["properties"]["delivery_tag"] = "new"
    expected["properties"]["delivery_info"]["routing_key"] = "celery"
    assert rewrite(MESSAGE, queue="celery", attempt=2, delivery_tag="new") == expected


def test_a_rewritten_message_leaves_the_original_as_it_was() -> None:
    before = copy.deepcopy(MESSAGE)
    rewrite(MESSAGE, queue="celery", attempt=2, delivery_tag="new")
    assert before == MESSAGE


def test_a_message_of_a_named_exchange_goes_straight_to_its_new_queue() -> None:
    message = copy.deepcopy(MESSAGE)
    message["properties"]["delivery_info"]["exchange"] = "media"
    info = rewrite(message, queue="celery", attempt=2, delivery_tag="new")["properties"]["delivery_info"]
    assert (info["exchange"], info["routing_key"]) == ("", "celery")


@pytest.mark.parametrize("headers", [None, {}, {wire.HEADER: None}])
def test_a_message_without_the_header_gets_one(headers: Any) -> None:
    renewed = rewrite({"headers": headers, "properties": {}}, queue="celery", attempt=2, delivery_tag="new")
    assert renewed["headers"] == {wire.HEADER: {"attempt": 2}}
    assert renewed["properties"] == {"delivery_tag": "new", "delivery_info": {"exchange": "", "routing_key": "celery"}}


@pytest.mark.parametrize("name", ["", "gpu:a", "GPU", "-gpu", "gpu-", "gpu\n", "g" * 31])
def test_a_name_that_no_tier_of_a_resource_could_have_is_refused_in_code_too(name: str) -> None:
    with pytest.raises(ValueError, match=r"the name of a tier is .* at most 30"):
        TierPolicy(name, "jobs", accelerated=False)

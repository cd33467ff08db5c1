"""What the scaling rule promises, whatever it is shown."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from workerpool_operator.observation import Unavailable
from workerpool_operator.scaling import (
    MIN_LINGER_SECONDS,
    START_SECONDS_UNTIL_KNOWN,
    Decision,
    Demand,
    Memory,
    Policy,
    Reason,
    Unread,
    decide,
)

pytestmark = pytest.mark.unit

History = list[tuple[float, Demand | Unread]]

OUTAGE = Unavailable("connection refused by 127.0.0.1:6379")

counts = st.integers(0, 40)
bounds = st.tuples(st.integers(0, 12), st.integers(0, 12)).map(sorted)
policies = st.builds(lambda ends, slots: Policy(ends[0], ends[1], slots), bounds, st.integers(1, 4))
demands = st.builds(Demand, counts, counts, counts, st.integers(0, 20), st.none() | st.floats(0, 60))
observations = st.one_of(demands, demands, demands, st.builds(Unread, st.integers(0, 20), st.just(OUTAGE)))
histories = st.lists(st.tuples(st.floats(0.1, 20), observations), min_size=1, max_size=12)


def need(policy: Policy, seen: Demand) -> int:
    return math.ceil(seen.total / policy.concurrency)


def clamp(policy: Policy, replicas: int) -> int:
    return min(max(replicas, policy.minimum), policy.maximum)


def replay(policy: Policy, history: History) -> list[tuple[float, Demand | Unread, Decision]]:
    """Each pass of a history of ``(seconds since the pass before, reading)`` with its time and its decision."""
    passes, now, memory = [], 1_000.0, Memory()
    for pause, seen in history:
        now += pause
        decision = decide(policy, seen, memory, now)
        memory = decision.memory
        passes.append((now, seen, decision))
    return passes


def follow(policy: Policy, *needs: tuple[float, int], replicas: int = 0) -> list[int]:
    """The replicas that a tier has when its queue is as long as ``(time, waiting)`` says and every decision is obeyed."""
    memory, ordered = Memory(), []
    for now, waiting in needs:
        decision = decide(policy, Demand(waiting, 0, 0, replicas), memory, now)
        memory, replicas = decision.memory, decision.replicas
        ordered.append(replicas)
    return ordered


@settings(max_examples=100)
@given(policies, histories)
def test_a_reading_never_orders_more_than_the_maximum_or_less_than_the_minimum(policy: Policy, history: History) -> None:
    for _, seen, decision in replay(policy, history):
        if isinstance(seen, Demand):
            assert policy.minimum <= decision.replicas <= policy.maximum


@settings(max_examples=100)
@given(policies, histories)
def test_every_job_that_wants_a_slot_gets_one_at_once_within_the_maximum(policy: Policy, history: History) -> None:
    for _, seen, decision in replay(policy, history):
        if isinstance(seen, Demand):
            assert decision.replicas >= clamp(policy, need(policy, seen))
            assert decision.needed == need(policy, seen)


@settings(max_examples=200)
@given(policies, histories, st.floats(0, 60))
def test_what_is_ordered_is_the_highest_need_since_the_linger_began(
    policy: Policy, history: History, start_seconds: float
) -> None:
    linger = max(MIN_LINGER_SECONDS, start_seconds)
    steady = [
        (
            pause,
            seen
            if isinstance(seen, Unread)
            else Demand(seen.waiting, seen.in_flight, seen.spilled, seen.replicas, start_seconds),
        )
        for pause, seen in history
    ]
    needs: list[tuple[float, int]] = []
    for now, seen, decision in replay(policy, steady):
        if isinstance(seen, Unread):
            needs = []
            continue
        if not needs:
            needs = [(now, seen.replicas)]
        needs.append((now, need(policy, seen)))
        assert decision.replicas == clamp(policy, max(n for at, n in needs if now - at <= linger))


@settings(max_examples=100)
@given(policies, histories)
def test_memory_stays_bounded_and_in_order(policy: Policy, history: History) -> None:
    for _, _, decision in replay(policy, history):
        needs = decision.memory.needs
        assert len(needs) <= policy.maximum + 2
        assert [n for _, n in needs] == sorted({n for _, n in needs}, reverse=True)
        assert [at for at, _ in needs] == sorted(at for at, _ in needs)


def test_a_backlog_of_thousands_that_drains_slowly_is_remembered_in_a_few_entries() -> None:
    policy = Policy(0, 4)
    history: History = [(0.01, Demand(5_000 - n, 0, 0, 4)) for n in range(1_000)]
    assert len(replay(policy, history)[-1][2].memory.needs) <= 6


@settings(max_examples=50)
@given(policies, histories)
def test_the_same_history_gives_the_same_decisions(policy: Policy, history: History) -> None:
    assert replay(policy, history) == replay(policy, history)


@settings(max_examples=50)
@given(policies, st.integers(0, 50), histories)
def test_without_a_reading_the_count_stays_exactly_where_it_is_even_outside_the_bounds(
    policy: Policy, replicas: int, history: History
) -> None:
    memory = replay(policy, history)[-1][2].memory
    decision = decide(policy, Unread(replicas, OUTAGE), memory, 2_000.0)
    assert (decision.replicas, decision.reason) == (replicas, Reason.BROKER_UNREADABLE)
    assert decision.message == f"held at {replicas}: connection refused by 127.0.0.1:6379"
    assert decision.needed <= decision.replicas, "an outage is no sign that the maximum limits the pool"


@pytest.mark.parametrize(
    ("demand", "concurrency", "replicas"),
    [
        (Demand(waiting=5, in_flight=0, spilled=0, replicas=0), 1, 5),
        (Demand(waiting=0, in_flight=5, spilled=0, replicas=0), 1, 5),
        (Demand(waiting=0, in_flight=0, spilled=5, replicas=0), 1, 5),
        (Demand(waiting=1, in_flight=2, spilled=3, replicas=0), 1, 6),
        (Demand(waiting=1, in_flight=2, spilled=3, replicas=0), 4, 2),
        (Demand(waiting=8, in_flight=0, spilled=0, replicas=0), 4, 2),
        (Demand(waiting=9, in_flight=0, spilled=0, replicas=0), 4, 3),
        (Demand(waiting=1, in_flight=0, spilled=0, replicas=0), 256, 1),
        (Demand(waiting=0, in_flight=0, spilled=0, replicas=0), 1, 0),
    ],
)
def test_from_zero_it_goes_straight_to_need(demand: Demand, concurrency: int, replicas: int) -> None:
    assert decide(Policy(0, 10, concurrency), demand, Memory(), 0.0).replicas == replicas


@pytest.mark.parametrize(
    ("start_seconds", "linger"),
    [
        (None, START_SECONDS_UNTIL_KNOWN),
        (0.5, MIN_LINGER_SECONDS),
        (MIN_LINGER_SECONDS + 1, MIN_LINGER_SECONDS + 1),
        (90.0, 90.0),
    ],
)
def test_it_lowers_only_after_the_need_stayed_lower_for_as_long_as_a_worker_takes_to_start(
    start_seconds: float | None, linger: float
) -> None:
    policy = Policy(0, 10)
    busy = decide(policy, Demand(4, 0, 0, 4, start_seconds), Memory(), 100.0)
    idle = Demand(0, 0, 0, 4, start_seconds)
    kept = decide(policy, idle, busy.memory, 100.0 + linger)
    assert (kept.replicas, kept.reason) == (4, Reason.WAITING_TO_LOWER)
    assert f"{linger:.0f} s" in kept.message
    assert decide(policy, idle, kept.memory, 100.1 + linger).replicas == 0


def test_a_need_that_comes_back_starts_the_linger_again() -> None:
    assert follow(Policy(0, 10), (0, 3), (20, 0), (25, 3), (40, 0), (55, 0), (56, 0)) == [3, 3, 3, 3, 3, 0]


def test_it_lowers_in_steps_when_the_need_fell_in_steps() -> None:
    assert follow(Policy(0, 10), (0, 9), (10, 4), (20, 1), (31, 1), (41, 1)) == [9, 9, 9, 4, 1]


def test_an_operator_that_just_started_lowers_no_sooner_than_one_that_knows_the_past() -> None:
    assert follow(Policy(0, 10), (0, 2), (30, 2), (31, 2), replicas=6) == [6, 6, 2]


def test_an_outage_counts_for_nothing_when_the_need_looks_low_after_it() -> None:
    policy, idle = Policy(0, 10), Demand(0, 0, 0, 6)
    passes: History = [(1, Demand(6, 0, 0, 6)), (60, Unread(6, OUTAGE)), (1, idle), (30, idle), (1, idle)]
    assert [decision.replicas for _, _, decision in replay(policy, passes)] == [6, 6, 6, 6, 0]


@pytest.mark.parametrize(
    ("policy", "waiting", "replicas", "remembered", "reason"),
    [
        pytest.param(Policy(0, 4), 3, 1, 0, Reason.BACKLOG_EXCEEDS_CAPACITY, id="more is needed"),
        pytest.param(Policy(0, 4), 4, 1, 0, Reason.BACKLOG_EXCEEDS_CAPACITY, id="the need is the maximum"),
        pytest.param(Policy(0, 4), 5, 1, 0, Reason.AT_MAXIMUM, id="the need is above the maximum"),
        pytest.param(Policy(0, 4), 5, 4, 0, Reason.AT_MAXIMUM, id="the maximum is reached and more is needed"),
        pytest.param(Policy(0, 4), 0, 4, 9, Reason.WAITING_TO_LOWER, id="the maximum is kept but not needed any more"),
        pytest.param(Policy(0, 4), 0, 2, 4, Reason.WAITING_TO_LOWER, id="someone removed what is still kept"),
        pytest.param(Policy(0, 4), 2, 3, 3, Reason.WAITING_TO_LOWER, id="one more is kept"),
        pytest.param(Policy(1, 4), 0, 3, 3, Reason.WAITING_TO_LOWER, id="more than the minimum is kept"),
        pytest.param(Policy(1, 4), 0, 1, 0, Reason.AT_MINIMUM, id="the minimum is there without need"),
        pytest.param(Policy(2, 4), 1, 0, 0, Reason.AT_MINIMUM, id="the minimum is ordered without need"),
        pytest.param(Policy(2, 4), 2, 0, 0, Reason.BACKLOG_EXCEEDS_CAPACITY, id="the need is the minimum"),
        pytest.param(Policy(2, 4), 2, 2, 0, Reason.AS_NEEDED, id="the need is there"),
        pytest.param(Policy(0, 4), 0, 0, 0, Reason.AS_NEEDED, id="nothing is needed"),
        pytest.param(Policy(0, 4), 1, 3, 0, Reason.DEMAND_FELL, id="less is needed"),
        pytest.param(Policy(1, 4), 0, 3, 0, Reason.DEMAND_FELL, id="it goes to the minimum"),
    ],
)
def test_the_reason_names_what_decided(policy: Policy, waiting: int, replicas: int, remembered: int, reason: Reason) -> None:
    decision = decide(policy, Demand(waiting, 0, 0, replicas), Memory(((99.0, remembered),)), 100.0)
    assert decision.reason is reason
    assert ("the maximum limits" in decision.message) == (reason is Reason.AT_MAXIMUM)
    assert ("the minimum holds" in decision.message) == (reason is Reason.AT_MINIMUM)
    assert ("lowers when" in decision.message) == (reason is Reason.WAITING_TO_LOWER)


def test_the_message_holds_the_numbers_it_stands_on() -> None:
    decision = decide(Policy(0, 8, concurrency=2), Demand(waiting=11, in_flight=7, spilled=3, replicas=1), Memory(), 0.0)
    assert decision.message == "11 waiting + 7 in flight + 3 spilled need 11, ordered 8; the maximum limits it"


def test_every_reason_is_spelt_as_its_name() -> None:
    assert [reason.value for reason in Reason] == [reason.name.title().replace("_", "") for reason in Reason]


def test_the_message_leaves_out_spills_that_do_not_exist() -> None:
    decision = decide(Policy(0, 8), Demand(waiting=2, in_flight=1, spilled=0, replicas=1), Memory(), 0.0)
    assert decision.message == "2 waiting + 1 in flight need 3, ordered 3"

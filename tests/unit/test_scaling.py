"""What the scaling rule promises, whatever it is shown."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from workerpool_operator.observation import NOTHING_SERVED, Served, Unavailable
from workerpool_operator.scaling import (
    HANG_FACTOR,
    MIN_STABILIZATION_SECONDS,
    SERVICE_SECONDS_UNTIL_KNOWN,
    START_SECONDS_UNTIL_KNOWN,
    Decision,
    Demand,
    Memory,
    Policy,
    Reason,
    Service,
    Unread,
    decide,
    start_seconds,
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


def replay(policy: Policy, history: History) -> list[tuple[float, Demand | Unread, Decision]]:
    """Each pass of a history of ``(seconds since the pass before, reading)`` with its time and its decision."""
    passes, now, memory = [], 1_000.0, Memory()
    for pause, seen in history:
        now += pause
        decision = decide(policy, seen, memory, now)
        memory = decision.memory
        passes.append((now, seen, decision))
    return passes


@settings(max_examples=100)
@given(policies, histories)
def test_a_reading_never_orders_more_than_the_maximum_or_less_than_the_minimum(policy: Policy, history: History) -> None:
    for _, seen, decision in replay(policy, history):
        if isinstance(seen, Demand):
            assert policy.minimum <= decision.replicas <= policy.maximum


@settings(max_examples=100)
@given(policies, histories)
def test_it_never_goes_below_what_is_in_flight(policy: Policy, history: History) -> None:
    for _, seen, decision in replay(policy, history):
        if isinstance(seen, Demand):
            assert decision.replicas >= min(policy.maximum, math.ceil(seen.in_flight / policy.concurrency))


@settings(max_examples=100)
@given(policies, histories)
def test_memory_stays_bounded_and_in_order(policy: Policy, history: History) -> None:
    for _, _, decision in replay(policy, history):
        memory = decision.memory
        assert len(memory.fell) <= policy.maximum + 20
        assert len(memory.arrivals) <= 67
        assert len(memory.bursts) <= len(history) + 1
        assert list(memory.fell) == sorted(memory.fell)
        assert list(memory.arrivals) == sorted(memory.arrivals)
        assert [n for _, n in memory.bursts] == sorted({n for _, n in memory.bursts}, reverse=True)


def test_a_backlog_of_thousands_that_drains_slowly_is_remembered_in_a_few_entries() -> None:
    history: History = [(0.01, Demand(5_000 - n, 0, 0, 4, 30.0, 4, arrived=5_000 + n)) for n in range(1_000)]
    memory = replay(Policy(0, 4), history)[-1][2].memory
    assert len(memory.arrivals) + len(memory.fell) + len(memory.bursts) <= 80


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


def known(start_seconds: float, **rest: Any) -> Memory:
    """What a rule knows that has seen workers start and a thousand jobs of 30 s end, and nothing waiting yet."""
    service = Service(1_000.0, 30_000.0, 1_350_000.0)
    return Memory(total=0, service=service, start_seconds=start_seconds, newest_start=start_seconds, level=0, **rest)


@pytest.mark.parametrize(
    ("waiting", "target", "concurrency", "replicas"),
    [
        pytest.param(1, 60.0, 1, 1, id="one for one"),
        pytest.param(10, 47.0, 1, 10, id="one for each where none has time for a second"),
        pytest.param(10, 75.0, 1, 5, id="half where each has time for two"),
        pytest.param(10, 47.0, 4, 3, id="by slots"),
        pytest.param(0, 60.0, 1, 0, id="none for none"),
    ],
)
def test_from_zero_it_goes_straight_to_what_starts_all_in_time(
    waiting: int, target: float, concurrency: int, replicas: int
) -> None:
    policy = Policy(0, 20, concurrency, target)
    assert decide(policy, Demand(waiting, 0, 0, 0, 45.0), known(45.0), 100.0).replicas == replicas


def test_a_job_elsewhere_that_wanted_this_tier_calls_for_it_as_one_that_waits() -> None:
    spilled = decide(Policy(0, 10), Demand(0, 0, 3, 0), Memory(), 0.0)
    waiting = decide(Policy(0, 10), Demand(3, 0, 0, 0), Memory(), 0.0)
    assert spilled.replicas == waiting.replicas == 3


def test_nothing_is_ordered_twice_for_the_same_jobs() -> None:
    policy = Policy(0, 20)
    memory, now, replicas = known(45.0), 100.0, 0
    starting: tuple[float, ...] = ()
    for _ in range(40):
        decision = decide(policy, Demand(6, 0, 0, replicas, 45.0, 0, starting, arrived=6), memory, now)
        starting += (now,) * (decision.replicas - replicas)
        memory, replicas, now = decision.memory, decision.replicas, now + 1
    assert replicas <= 6


def test_workers_that_cannot_be_placed_are_not_ordered_again() -> None:
    policy = Policy(0, 20)
    first = decide(policy, Demand(4, 0, 0, 0, 45.0), known(45.0), 100.0)
    again = decide(policy, Demand(4, 0, 0, first.replicas, 45.0, stuck=first.replicas), first.memory, 101.0)
    assert again.replicas == first.replicas


def test_it_waits_for_the_last_moment_while_the_workers_that_are_there_may_do() -> None:
    policy, memory = Policy(0, 20), known(45.0)
    quiet = Demand(0, 4, 0, 4, 45.0, 4)
    memory = decide(policy, quiet, memory, 100.0).memory
    early = decide(policy, Demand(6, 4, 0, 4, 45.0, 4, arrived=6), memory, 101.0)
    assert (early.replicas, early.reason) == (4, Reason.AS_NEEDED)
    assert early.again_at == pytest.approx(101.0 + 60 - 45 - 1.5)
    late = decide(policy, Demand(6, 4, 0, 4, 45.0, 4, arrived=6), early.memory, early.again_at + 0.1)
    assert late.replicas > 4
    assert late.reason is Reason.BACKLOG_EXCEEDS_CAPACITY


def test_where_a_start_takes_longer_than_the_target_some_stand_ready_for_what_came_of_late() -> None:
    policy, memory, now = Policy(0, 40, target_wait=30.0), known(240.0), 0.0
    for second in range(600):
        now = float(second)
        memory = decide(policy, Demand(0, 3, 0, 10, 240.0, 10, arrived=second // 10), memory, now).memory
    decision = decide(policy, Demand(0, 3, 0, 10, 240.0, 10, arrived=60), memory, now)
    assert (decision.reason, decision.replicas > 3) == (Reason.DEMAND_FELL if decision.replicas < 10 else Reason.HEADROOM, True)
    quiet = decide(policy, Demand(0, 0, 0, decision.replicas, 240.0, 10, arrived=60), decision.memory, now + 2_000)
    later = decide(policy, Demand(0, 0, 0, decision.replicas, 240.0, 10, arrived=60), quiet.memory, now + 4_000)
    assert later.replicas == 0


@pytest.mark.parametrize(
    ("start_seconds", "target", "window"),
    [(80.0, 100.0, 20.0), (8.0, 60.0, MIN_STABILIZATION_SECONDS), (240.0, 60.0, 180.0)],
)
def test_it_lowers_only_after_the_need_stayed_lower_for_a_while(start_seconds: float, target: float, window: float) -> None:
    policy = Policy(0, 10, target_wait=target)
    at_work = dataclasses.replace(known(start_seconds), total=4, level=4)
    busy = decide(policy, Demand(0, 4, 0, 4, start_seconds, 4), at_work, 99.0)
    idle = Demand(0, 0, 0, 4, start_seconds, 4)
    fell = decide(policy, idle, busy.memory, 100.0)
    assert (fell.replicas, fell.reason) == (4, Reason.WAITING_TO_LOWER)
    assert f"{window:.0f} s" in fell.message
    assert fell.again_at == 100.0 + window
    kept = decide(policy, idle, fell.memory, 99.9 + window)
    assert kept.replicas == 4
    assert decide(policy, idle, kept.memory, 100.1 + window).replicas == 0


def test_it_lowers_in_steps_when_the_need_fell_in_steps() -> None:
    policy, memory, replicas, seen = Policy(0, 10, target_wait=100.0), known(80.0), 9, []
    for now, in_flight in ((0, 9), (10, 4), (20, 1), (29, 1), (31, 1), (39, 1), (41, 1)):
        decision = decide(policy, Demand(0, in_flight, 0, replicas, 80.0, replicas), memory, float(now))
        memory, replicas = decision.memory, decision.replicas
        seen.append(replicas)
    assert seen == [9, 9, 9, 9, 4, 4, 1]


def test_an_operator_that_just_started_lowers_no_sooner_than_one_that_knows_the_past() -> None:
    policy, idle = Policy(0, 10, target_wait=100.0), Demand(0, 2, 0, 6, 80.0, 6)
    first = decide(policy, idle, Memory(), 0.0)
    assert first.replicas == 6
    assert decide(policy, idle, first.memory, 21.0).replicas == 2


def test_an_outage_counts_for_nothing_when_the_need_looks_low_after_it() -> None:
    policy, idle = Policy(0, 10, target_wait=100.0), Demand(0, 0, 0, 6, 80.0, 6)
    passes: History = [(1, Demand(0, 6, 0, 6, 80.0, 6)), (60, Unread(6, OUTAGE)), (1, idle), (19, idle), (2, idle)]
    assert [decision.replicas for _, _, decision in replay(policy, passes)] == [6, 6, 6, 6, 0]


def test_what_was_learnt_outlives_an_outage() -> None:
    memory = decide(Policy(0, 10), Unread(3, OUTAGE), known(45.0), 1.0).memory
    assert (memory.start_seconds, memory.service, memory.arrivals) == (45.0, known(45.0).service, ())


def served(*seconds: float) -> Service:
    service = Service()
    for length in seconds:
        service = service.after(1, length, length**2)
    return service


@pytest.mark.parametrize("length", [2.0, 30.0, 120.0])
@pytest.mark.parametrize("ended", [4, 5_000])
def test_a_new_operator_orders_what_the_one_before_it_would_have(length: float, ended: int) -> None:
    spread = length * math.sqrt(0.5)
    learnt = served(*[length - spread, length + spread] * (ended // 2))
    counters = Served(ended, ended * length, 1.5 * ended * length**2, mean=length)
    before = Memory(total=41, arrived=41, served=counters, service=learnt, start_seconds=5.0)
    backlog = Demand(40, 1, 0, 1, ready=1, arrived=41, served=counters)
    old, new = (decide(Policy(0, 100), backlog, memory, 0.0) for memory in (before, Memory(start_seconds=5.0)))
    assert new.replicas == pytest.approx(old.replicas, rel=0.1)
    assert new.memory.service.mean == pytest.approx(learnt.mean, rel=0.1)


def test_what_a_new_operator_recalls_is_the_latest_mean_and_it_learns_on() -> None:
    changed = Service.recalled(Served(1_000_000, 1_000_000 * 100.0, 1_000_000 * 2 * 100.0**2, mean=10.0))
    assert changed.mean == pytest.approx(10.0, rel=0.1)
    assert changed.variation == pytest.approx(1.0, rel=0.5)
    assert changed.after(256, 256 * 30.0, 256 * 900.0).mean > 20, "it is no heavier than the jobs that it would have seen"
    assert Service.recalled(Served(5, 0.0, 0.0, mean=0.0)).mean < SERVICE_SECONDS_UNTIL_KNOWN, "jobs that took no time at all"
    assert Service.recalled(NOTHING_SERVED) == Service()


def test_an_operator_that_has_learnt_recalls_nothing_after_an_outage() -> None:
    learnt = decide(Policy(0, 10), Unread(1, OUTAGE), known(45.0), 1.0).memory
    seen = Demand(0, 0, 0, 1, ready=1, served=Served(1_000, 1_000.0, 1_000.0, mean=1.0))
    assert decide(Policy(0, 10), seen, learnt, 2.0).memory.service == known(45.0).service


@pytest.mark.parametrize("wrong", [0.5, 1.5])
def test_the_length_of_jobs_is_learnt_however_wrong_the_first_guess_was(wrong: float) -> None:
    truth = SERVICE_SECONDS_UNTIL_KNOWN / wrong
    assert served(*[truth] * 60).mean == pytest.approx(truth, rel=0.1)
    assert served(*[truth] * 60).variation < 0.3


def test_one_job_that_hung_for_a_day_does_not_become_the_measure_of_all() -> None:
    assert served(*[30.0] * 100, 86_400.0).mean < 40


def test_a_mix_of_fast_and_slow_tasks_is_known_by_its_mean_and_spread() -> None:
    mixed = served(*[2.0, 58.0] * 200)
    assert mixed.mean == pytest.approx(30, rel=0.1)
    assert mixed.variation == pytest.approx(0.87, abs=0.1)


def test_a_slow_start_is_believed_sooner_than_a_fast_one_and_one_that_hung_not_wholly() -> None:
    def after(newest: float) -> float | None:
        return decide(Policy(0, 9), Demand(0, 0, 0, 0, newest), known(40.0), 0.0).memory.start_seconds

    assert after(80.0) == 60.0
    assert after(20.0) == 37.5
    assert after(7_200.0) == 100.0
    assert after(40.0) == 40.0


@pytest.mark.parametrize("target", [0.0, 1.0])
@pytest.mark.parametrize("took", [0.0, -2.0])
def test_a_worker_that_was_ready_before_it_was_ordered_by_another_clock_took_a_second(took: float, target: float) -> None:
    memory = Memory()
    for second in range(3):
        seen = Demand(0, 1, 0, 1, took, 1, arrived=second, served=Served(second, 5.0 * second, 25.0 * second))
        memory = decide(Policy(0, 8, 1, target), seen, memory, 1e6 + second).memory
    assert memory.start_seconds == 1.0


def test_a_start_that_lasts_longer_than_any_before_counts_while_it_lasts() -> None:
    seen = Demand(0, 0, 0, 1, 40.0, starting=(0.0,))
    memory = decide(Policy(0, 9), seen, known(40.0), 90.0).memory
    assert (start_seconds(memory), memory.start_seconds) == (90.0, 40.0)


def outage(lasts: float, workers: int, gap: float, *, stuck: bool) -> list[Memory]:
    """What is known pass by pass while that many workers, where starts took 45 s, hang for so long, then come up one by one."""
    memory, memories, policy = known(45.0), [], Policy(0, 9)
    for second in (lasts * look / 40 for look in range(40)):
        on_their_way = () if stuck else (0.0,) * workers
        seen = Demand(0, 0, 0, workers, 45.0, 0, on_their_way, stuck=workers if stuck else 0)
        memories.append(memory := decide(policy, seen, memory, second).memory)
    since = lasts if stuck else 0.0
    for up in range(1, workers + 1):
        now = lasts + 45.0 + up * gap
        rest = (since,) * (workers - up)
        seen = Demand(0, 0, 0, workers, now, up, rest, held_up=since, ready_at=now)
        memories.append(memory := decide(policy, seen, memory, now).memory)
    return memories


@settings(max_examples=50, deadline=None)
@given(st.floats(0, 20_000), st.integers(1, 9), st.floats(0, 5))
def test_however_long_however_many_starts_hang_no_start_is_expected_to_take_over_four_times_what_it_took_before(
    lasts: float, workers: int, gap: float
) -> None:
    memories = outage(lasts, workers, gap, stuck=False)
    assert max(start_seconds(memory) for memory in memories) <= HANG_FACTOR * 45.0
    assert memories[-1].start_seconds is not None, "what was learnt stays"
    assert 45.0 <= memories[-1].start_seconds <= HANG_FACTOR * 45.0


@settings(max_examples=50, deadline=None)
@given(st.floats(0, 20_000), st.integers(1, 9))
def test_workers_that_could_not_come_up_say_nothing_against_the_start_time_that_is_known(lasts: float, workers: int) -> None:
    memories = outage(lasts, workers, 0.0, stuck=True)
    assert [start_seconds(memory) for memory in memories] == pytest.approx([45.0] * len(memories))
    assert not any(memory.outlasts for memory in memories)


def test_a_worker_that_was_held_up_and_then_took_longer_than_others_counts_for_what_it_took_then() -> None:
    seen = Demand(0, 0, 0, 1, 685.0, 1, held_up=600.0, ready_at=700.0)
    assert decide(Policy(0, 9), seen, known(45.0), 700.0).memory.start_seconds == 65.0


@pytest.mark.parametrize("memory", [Memory(), Memory(first_start=3.0)], ids=["the rule's guess", "what the place says"])
def test_the_first_starts_of_a_pool_are_learnt_however_far_above_the_first_guess_they_are(memory: Memory) -> None:
    policy = Policy(0, 9)
    for second in range(0, 721, 5):
        memory = decide(policy, Demand(2, 0, 0, 2, starting=(0.0, 0.0)), memory, float(second)).memory
    assert (start_seconds(memory), memory.start_seconds, memory.outlasts) == (720.0, None, True)
    memory = decide(policy, Demand(0, 2, 0, 2, 722.0, 2, ready_at=722.0), memory, 723.0).memory
    assert memory.start_seconds == 722.0


def test_before_any_start_has_ended_one_that_was_held_up_leaves_the_first_guess_as_it_is() -> None:
    seen = Demand(0, 0, 0, 1, 7_240.0, 1, held_up=7_200.0, ready_at=7_240.0)
    memory = decide(Policy(0, 9), seen, Memory(), 7_240.0).memory
    assert (memory.start_seconds, start_seconds(memory)) == (None, START_SECONDS_UNTIL_KNOWN)


@pytest.mark.parametrize("truth", [10.0, 240.0, 3_600.0])
def test_where_starts_have_come_to_take_another_time_it_is_learnt_although_each_takes_exactly_as_long(truth: float) -> None:
    memory, now = known(45.0), 0.0
    for _ in range(20):
        now += truth + 60.0
        memory = decide(Policy(0, 9), Demand(0, 0, 0, 1, truth, 1, ready_at=now), memory, now).memory
    assert memory.start_seconds == pytest.approx(truth, rel=0.3)


@pytest.mark.parametrize(
    ("policy", "in_flight", "queued", "replicas", "level", "reason"),
    [
        pytest.param(Policy(0, 4), 0, 3, 1, 0, Reason.BACKLOG_EXCEEDS_CAPACITY, id="more is needed"),
        pytest.param(Policy(0, 4), 4, 9, 4, 4, Reason.AT_MAXIMUM, id="the maximum is reached and more is needed"),
        pytest.param(Policy(0, 4), 1, 0, 4, 4, Reason.WAITING_TO_LOWER, id="more is kept"),
        pytest.param(Policy(1, 4), 0, 0, 1, 0, Reason.AT_MINIMUM, id="the minimum is there without need"),
        pytest.param(Policy(2, 4), 1, 0, 0, 0, Reason.AT_MINIMUM, id="the minimum is ordered without need"),
        pytest.param(Policy(2, 4), 2, 0, 2, 2, Reason.AS_NEEDED, id="the need is there"),
        pytest.param(Policy(0, 4), 0, 0, 0, 0, Reason.AS_NEEDED, id="nothing is needed"),
        pytest.param(Policy(0, 4), 1, 0, 3, 1, Reason.DEMAND_FELL, id="less is needed"),
        pytest.param(Policy(1, 4), 0, 0, 3, 0, Reason.DEMAND_FELL, id="it goes to the minimum"),
    ],
)
def test_the_reason_names_what_decided(
    policy: Policy, in_flight: int, queued: int, replicas: int, level: int, reason: Reason
) -> None:
    memory = dataclasses.replace(known(45.0), level=level)
    decision = decide(policy, Demand(queued, in_flight, 0, replicas, 45.0, in_flight), memory, 100.0)
    assert decision.reason is reason
    assert ("replicas.max limits" in decision.message) == (reason is Reason.AT_MAXIMUM)
    assert ("replicas.min holds" in decision.message) == (reason is Reason.AT_MINIMUM)
    assert ("lowers when" in decision.message) == (reason is Reason.WAITING_TO_LOWER)


def test_the_message_holds_the_numbers_it_stands_on() -> None:
    seen = Demand(waiting=11, in_flight=7, spilled=3, replicas=4)
    assert decide(Policy(0, 8, concurrency=2), seen, Memory(), 0.0).message == (
        "11 waiting + 7 in flight + 3 spilled need 11 workers to start within 60 s (a job takes 30 s, a worker's start 240 s); "
        "wanted: 8; replicas.max limits it"
    )


def test_every_reason_is_spelt_as_its_name() -> None:
    assert [reason.value for reason in Reason] == [reason.name.title().replace("_", "") for reason in Reason]


def test_the_message_leaves_out_spills_that_do_not_exist() -> None:
    assert "spilled" not in decide(Policy(0, 8), Demand(waiting=2, in_flight=1, spilled=0, replicas=1), Memory(), 0.0).message


@pytest.mark.parametrize("back", [60.0, 3_600.0])
def test_a_clock_that_is_set_back_hides_nobody_who_comes_then(back: float) -> None:
    policy, memory = Policy(0, 40), known(20.0)
    for n in range(12):
        memory = decide(policy, Demand(1, 2, 0, 3, ready=3, arrived=n), memory, 10_000.0 + 10 * n).memory
    then = 10_120.0 - back
    decision = decide(policy, Demand(1, 3, 0, 3, ready=3, arrived=12), memory, then)
    for seconds in range(1, 61):
        decision = decide(policy, Demand(101, 3, 0, 3, ready=3, arrived=112), decision.memory, then + seconds)
    assert decision.replicas == 40

"""The rules of other autoscalers, each against an example that was worked by hand from its source."""

from __future__ import annotations

from collections.abc import Iterable

import pytest
from benchmarks import scaling
from benchmarks.rules import BacklogPerInstance, DelayedOff, Judoscale, Knative, Rule, Static, backlog_target, knative_clamp

from workerpool_operator.model import Replicas
from workerpool_operator.simulation.compare import Setting, pool_of, tier_of
from workerpool_operator.simulation.engine import Controller, Outage, Pod, Tier, TierSetup
from workerpool_operator.simulation.policies import Keda, hpa, hpa_up
from workerpool_operator.simulation.trace import Trace

pytestmark = pytest.mark.unit


def tier(*, waiting: int = 0, in_flight: int = 0, desired: int = 0, ready: int = 0, oldest_arrival: float = 0.0) -> Tier:
    seen = Tier(TierSetup("workers", lambda _: 45.0), [oldest_arrival] * max(1, waiting))
    seen.waiting.extend(range(waiting))
    seen.in_flight, seen.desired = in_flight, desired
    for n in range(ready):
        pod = Pod(seen, f"w{n}", 0.0)
        pod.ready_at = 0.0
        seen.pods.append(pod)
    return seen


def obeyed(rule: Controller, passes: Iterable[tuple[float, int, int]], desired: int = 0) -> list[int]:
    """The count after each ``(time, waiting, in flight)`` when all that is ordered is ready at once."""
    counts = []
    for now, waiting, in_flight in passes:
        seen = tier(waiting=waiting, in_flight=in_flight, desired=desired, ready=desired)
        desired = rule.look({"workers": seen}, now).replicas["workers"]
        counts.append(desired)
    return counts


def keda(**options: float | bool) -> Keda:
    return Keda(pool_of(tier_of(Replicas(max=100)), Setting(45.0, 60)), **options)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("metric", "replicas", "wanted"),
    [(54, 10, 10), (55, 10, 10), (56, 10, 12), (45, 10, 10), (44, 10, 9), (0, 3, 0), (3, 0, 1), (0, 0, 0), (1, 1, 1)],
)
def test_the_hpa_changes_nothing_within_a_tenth_of_its_target_of_five(metric: int, replicas: int, wanted: int) -> None:
    assert hpa(metric, 5.0, replicas) == wanted


@pytest.mark.parametrize(("replicas", "after"), [(1, 5), (3, 7), (4, 8), (5, 10), (40, 80), (60, 100)])
def test_the_hpa_adds_four_or_doubles_in_fifteen_seconds(replicas: int, after: int) -> None:
    assert hpa_up(replicas, 100) == after


def test_keda_goes_from_zero_to_one_whatever_waits_and_the_hpa_on_from_there() -> None:
    assert obeyed(keda(), [(0, 100, 0), (15, 100, 0), (30, 100, 0), (45, 100, 0)]) == [5, 10, 20, 20]


def test_the_hpa_lowers_after_five_minutes_and_keda_to_zero_after_its_cool_down() -> None:
    passes = [(0.0, 20, 0), *((15.0 * n, 0, 9) for n in range(1, 24))]
    counts = obeyed(keda(), passes)
    assert counts[:2] == [4, 4]
    assert counts[20:] == [4, 1, 0, 0], "the jobs in flight are not seen"


def test_keda_that_sees_what_is_in_flight_keeps_a_worker_for_each() -> None:
    assert obeyed(keda(target=1.0, in_flight=True), [(0, 0, 3), (15, 0, 3), (600, 0, 3)], desired=3) == [3, 3, 3]


def test_knative_wants_what_seventy_percent_of_the_concurrency_takes() -> None:
    assert obeyed(Knative(), [(0, 7, 0)], desired=10) == [10]
    assert obeyed(Knative(), [(0, 0, 14)], desired=10) == [20], "twice the capacity: panic, at once"


def test_knative_does_not_lower_while_it_panics_and_halves_at_most_afterwards() -> None:
    rule = Knative()
    assert obeyed(rule, [(0, 20, 0), (2, 0, 0), (58, 0, 0)], desired=10) == [29, 29, 29]
    assert (knative_clamp(1, 30), knative_clamp(50_000, 30), knative_clamp(20, 30)) == (15, 30_000, 20)


def test_knative_goes_to_zero_half_a_minute_after_the_last_minute_with_work() -> None:
    counts = obeyed(Knative(), [(0, 0, 1), (62, 0, 0), (64, 0, 0), (93, 0, 0), (95, 0, 0)], desired=2)
    assert counts == [2, 1, 1, 1, 0]


def test_aws_lets_an_instance_have_what_it_works_off_in_the_acceptable_time() -> None:
    assert backlog_target(acceptable_wait=10.0, mean_service=0.1) == 100.0
    rule = BacklogPerInstance(acceptable_wait=10.0, mean_service=0.1, maximum=100)
    assert obeyed(rule, [(0, 1_500, 0), (60, 2_500, 0)], desired=10) == [15, 25]


def test_aws_lowers_after_a_quarter_of_an_hour() -> None:
    rule = BacklogPerInstance(acceptable_wait=10.0, mean_service=0.1)
    assert obeyed(rule, [(60.0 * n, 100, 0) for n in range(16)], desired=8) == [8] * 14 + [1, 1]


def test_judoscale_adds_one_in_a_start_time_and_takes_one_after_ten_calm_minutes() -> None:
    rule = Judoscale(upper=30.0, lower=5.0, start_seconds=45.0)
    late = [rule.replicas(tier(waiting=1, desired=3, oldest_arrival=now - 31.0), now)[0] for now in (0.0, 10.0, 40.0, 50.0)]
    assert late == [4, 3, 3, 4]
    calm = [rule.replicas(tier(desired=4), now)[0] for now in (60.0, 640.0, 650.0, 660.0, 1_250.0)]
    assert calm == [4, 4, 3, 4, 3]


def test_delayed_off_has_one_for_each_job_and_switches_off_after_the_start_time() -> None:
    assert obeyed(DelayedOff(45.0), [(0, 3, 2), (10, 0, 1), (45, 0, 1), (46, 0, 1)]) == [5, 5, 5, 1]


def test_a_static_count_stays() -> None:
    assert obeyed(Static(7), [(0, 100, 0), (10, 0, 0)]) == [7, 7]


def test_no_rule_leaves_its_bounds() -> None:
    rules: list[Rule] = [
        DelayedOff(45.0, maximum=3),
        Knative(maximum=3),
        BacklogPerInstance(acceptable_wait=1, mean_service=1, maximum=3),
    ]
    assert [obeyed(rule, [(0, 50, 0)], desired=1) for rule in rules] == [[3], [3], [3]]


def test_one_queue_for_all_serves_the_oldest_first_and_counts_a_wait_to_the_first_start() -> None:
    outage = Outage("gpu", 12.0, 32.0)
    # The first is on the fast one until 10, the second on the slow one until 61; the third starts fast at 10 and is cut off at
    # 12, so that the fourth starts after it, when it is done at 32 + 5.
    assert scaling.one_queue(Trace("by hand", [0, 1, 2, 13], [10, 10, 5, 1]), outage, 1, 1) == [0, 0, 8, 24]

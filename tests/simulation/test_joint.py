"""What scaler and router reach on one view of capacity, held against an autoscaler for each tier and a router written by hand."""

from __future__ import annotations

import pytest
from benchmarks.joint import RULES, SCENARIOS, TARGET_SECONDS, play
from benchmarks.scaling import OUTAGE

from workerpool_operator.simulation.compare import quantile
from workerpool_operator.simulation.engine import Outcome

pytestmark = [pytest.mark.simulation, pytest.mark.timeout(600)]

OURS, *OTHERS = RULES
BURSTS, GONE, *_ = SCENARIOS


def outcomes(scenario: str) -> dict[str, Outcome]:
    """Every rule on the jobs of one seed."""
    found = next(one for one in SCENARIOS if one.name == scenario)
    return {rule: play(found, rule, 1) for rule in RULES}


def in_time(outcome: Outcome) -> float:
    return sum(wait <= TARGET_SECONDS for wait in outcome.waits) / len(outcome.waits)


def test_an_outage_of_all_accelerators_leaves_no_job_waiting_for_its_end() -> None:
    found = outcomes("no accelerator for 10 minutes")
    for rule in OTHERS:
        assert quantile(sorted(found[OURS].waits), 0.99) < quantile(sorted(found[rule].waits), 0.99) / 2
    assert max(found[OURS].waits) < 300 < 600 < max(max(found[rule].waits) for rule in OTHERS)


def ordered_seconds(outcome: Outcome, since: float, until: float) -> float:
    """What was ordered of the accelerated tier in that time, in seconds of workers."""
    looks = [(at, ordered) for at, _, _, ordered in outcome.series]
    spans = zip(looks, [*looks[1:], (until, 0)], strict=True)
    return sum(ordered * max(0.0, min(end, until) - max(at, since)) for (at, ordered), (end, _) in spans)


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_a_few_minutes_after_an_outage_the_accelerated_tier_costs_what_it_would_have_cost_without_one(seed: int) -> None:
    calm, gone = (play(one, OURS, seed) for one in (BURSTS, GONE))
    times = OUTAGE.end + 300.0, 3_600.0
    assert ordered_seconds(gone, *times) <= 1.1 * ordered_seconds(calm, *times)
    assert gone.replica_seconds["gpu"] <= 1.1 * calm.replica_seconds["gpu"], "nor are workers kept when no more jobs come"


def test_on_bursts_nearly_every_job_is_in_time_with_fewer_workers_than_two_autoscalers_need_for_it() -> None:
    found = outcomes("bursts")
    assert in_time(found[OURS]) > 0.98
    for rule in OTHERS:
        late = in_time(found[rule]) < in_time(found[OURS]) - 0.02
        assert late or sum(found[rule].replica_seconds.values()) > sum(found[OURS].replica_seconds.values())


@pytest.mark.parametrize("scenario", [scenario.name for scenario in SCENARIOS])
def test_no_job_is_killed_by_a_worker_that_leaves_and_under_the_other_rules_some_are(scenario: str) -> None:
    found = outcomes(scenario)
    assert found[OURS].killed == 0
    assert min(found[rule].killed for rule in OTHERS) > 0

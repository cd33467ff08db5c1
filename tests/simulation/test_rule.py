"""What the scaling rule promises on whole days: the operator's own pass drives a simulated world."""

from __future__ import annotations

import random
import time
from collections.abc import Mapping
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from workerpool_operator import planning, scaling
from workerpool_operator.model import Replicas, WorkerPoolSpec
from workerpool_operator.observation import Unavailable
from workerpool_operator.ports import Pool
from workerpool_operator.simulation import engine, trace
from workerpool_operator.simulation.compare import Setting, lower_bound, play, pool_of, score, tier_of
from workerpool_operator.simulation.engine import Orders, Outcome, Tier, TierSetup, World
from workerpool_operator.simulation.policies import Operator
from workerpool_operator.simulation.trace import Trace
from workerpool_routing.ledger import AS_EXPECTED_PART, AS_EXPECTED_SECONDS

pytestmark = pytest.mark.simulation


class Watched(Operator):
    """The operator, held to what no decision may ever do."""

    def __init__(self, pool: Pool) -> None:
        super().__init__(pool)
        self.seen: list[tuple[float, int]] = []

    def look(self, tiers: Mapping[str, Tier], now: float) -> Orders:
        orders = super().look(tiers, now)
        (tier,), (replicas,) = tiers.values(), orders.replicas.values()
        bounds = self._pool.spec.tiers[0].replicas
        assert bounds.min <= replicas <= bounds.max
        assert replicas * tier.concurrency >= min(tier.in_flight, bounds.max * tier.concurrency), "below what is in flight"
        self.seen.append((now, replicas))
        return orders


def run(jobs: Trace, setting: Setting, *, least: int = 0, most: int = 80) -> tuple[Outcome, Watched]:
    controller = Watched(pool_of(tier_of(Replicas(min=least, max=most)), setting))
    return play(jobs, setting, controller), controller


def constant(rate: float, length: float, hours: float = 2.0) -> Trace:
    count = int(rate * hours * 3600)
    return Trace("constant", [n / rate for n in range(count)], [length] * count)


def poisson(rate: float, length: float, hours: float, seed: int) -> Trace:
    rng = random.Random(seed)
    arrivals, at = [], 0.0
    while at < hours * 3600:
        at += rng.expovariate(rate)
        arrivals.append(at)
    return Trace("poisson", arrivals, [rng.expovariate(1 / length) for _ in arrivals])


loads = st.tuples(st.floats(0.01, 1.0), st.floats(1.0, 60.0))
settings_ = st.builds(Setting, st.sampled_from([1.0, 20.0, 45.0, 120.0]), st.sampled_from([5, 30, 60, 300]), st.integers(1, 4))


@settings(max_examples=10, deadline=None)
@given(loads, settings_)
def test_on_a_constant_load_the_count_settles(load: tuple[float, float], setting: Setting) -> None:
    rate, length = load
    _, controller = run(constant(rate, length), setting)
    settled = [replicas for now, replicas in controller.seen if 5_400 < now < 7_000]
    assert not settled or max(settled) - min(settled) <= max(1, round(0.34 * max(settled)))


@settings(max_examples=10, deadline=None)
@given(settings_, st.integers(0, 3), st.integers(4, 30), st.integers(0, 10_000))
def test_no_busy_worker_is_removed_no_bound_is_broken_and_every_job_starts(
    setting: Setting, least: int, most: int, seed: int
) -> None:
    outcome, _ = run(poisson(0.2, 20.0, 1.0, seed), setting, least=least, most=most)
    assert outcome.killed == 0
    assert min(outcome.waits) >= 0


@settings(max_examples=20, deadline=None)
@given(st.floats(20, 1_800), st.floats(0.1, 0.9), st.integers(1, 12), st.sampled_from([2.0, 45.0, 240.0]))
def test_on_no_periodic_load_does_it_flap(period: float, duty: float, height: int, start_seconds: float) -> None:
    periods = int(7_200 / period)
    burst = [n * period + k * period * duty / height for n in range(periods) for k in range(height)]
    jobs = Trace("periodic", burst, [5.0] * len(burst))
    _, controller = run(jobs, Setting(start_seconds, 60))
    changes = [(b[0], b[1] > a[1]) for a, b in pairwise(controller.seen) if a[1] != b[1]]
    turns = [(a, b) for a, b in pairwise(changes) if a[1] != b[1]]
    assert len(turns) <= 2 * len(jobs), "at most up and down again for each job"
    regretted = [b[0] - a[0] for a, b in turns if a[1] and b[0] - a[0] < scaling.MIN_STABILIZATION_SECONDS]
    assert not regretted, "what was ordered is kept for a while"


def test_it_scales_to_zero_when_nothing_wants_it_and_only_then() -> None:
    jobs = Trace("two visits", [0.0, 7_200.0], [60.0, 60.0])
    _, controller = run(jobs, Setting(45.0, 60))
    at_work = [replicas for now, replicas in controller.seen if 1 <= now < 100 or 7_201 <= now < 7_300]
    assert min(at_work) == 1
    assert [replicas for now, replicas in controller.seen if 1_000 < now < 7_199] == []
    assert controller.seen[-1][1] == 0


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 30), st.integers(0, 30), st.integers(0, 20), st.sampled_from([10.0, 45.0, 240.0]))
def test_a_longer_backlog_never_orders_less(waiting: int, more: int, in_flight: int, start_seconds: float) -> None:
    policy = scaling.Policy(0, 200)
    memory = scaling.Memory(start_seconds=start_seconds, newest_start=start_seconds)
    orders = [
        scaling.decide(policy, scaling.Demand(n, in_flight, 0, in_flight, start_seconds, in_flight), memory, 10.0).replicas
        for n in (waiting, waiting + more)
    ]
    assert orders[0] <= orders[1]


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 30), st.integers(0, 20), st.integers(0, 10), st.integers(1, 4), st.sampled_from([10.0, 45.0, 60.0]))
def test_where_orders_come_in_time_it_never_orders_more_than_the_jobs_could_use(
    waiting: int, in_flight: int, spilled: int, slots: int, start_seconds: float
) -> None:
    policy = scaling.Policy(0, 200, slots, target_wait=90.0)
    memory = scaling.Memory(start_seconds=start_seconds, newest_start=start_seconds, level=0)
    there = -(-in_flight // slots)
    seen = scaling.Demand(waiting, in_flight, spilled, there, start_seconds, there)
    assert scaling.decide(policy, seen, memory, 10.0).replicas <= there + -(-(waiting + spilled) // slots)


def test_a_reading_that_fails_now_and_then_never_lowers_and_breaks_no_job() -> None:
    class Blind(Watched):
        def look(self, tiers: Mapping[str, Tier], now: float) -> Orders:
            if int(now) % 60 >= 40:
                (tier,) = tiers.values()
                unread = scaling.Unread(tier.desired, Unavailable("Redis is down"))
                decision = scaling.decide(
                    scaling.Policy(0, 80), unread, self._memory.get("workers", planning.Memory()).scaling, now
                )
                assert decision.replicas == tier.desired
                self._memory = {"workers": planning.Memory(decision.memory)}
                return Orders({tier.name: decision.replicas}, now + 1)
            return super().look(tiers, now)

    setting = Setting(45.0, 60)
    outcome = play(poisson(0.2, 20.0, 1.0, 7), setting, Blind(pool_of(tier_of(Replicas(max=80)), setting)))
    assert outcome.killed == 0
    assert min(outcome.waits) >= 0


@pytest.mark.parametrize(
    ("setting", "in_time", "cost"),
    [
        pytest.param(Setting(45.0, 60), 99.5, 1.35, id="a start is shorter than the target"),
        pytest.param(Setting(240.0, 300), 99.5, 1.40, id="a start is long, and so is the target"),
        pytest.param(Setting(240.0, 60), 96.5, 2.10, id="a start is longer than the target"),
    ],
)
@pytest.mark.parametrize("seed", [1, 2])
def test_a_made_up_day_is_served_in_time_at_little_more_than_the_bound(
    setting: Setting, in_time: float, cost: float, seed: int
) -> None:
    jobs = trace.images(seed)
    outcome, _ = run(jobs, setting)
    result = score(outcome, setting, lower_bound(jobs, setting))
    assert result.cost_ratio is not None
    assert (result.killed, result.slo_percent >= in_time, result.cost_ratio <= cost) == (0, True, True), result


def test_starts_that_vary_and_readings_that_lag_cost_some_deadlines_and_no_job() -> None:
    setting = Setting(45.0, 60)
    jobs = trace.images(4, jobs=4_000)
    world = World([TierSetup("workers", lambda rng: rng.uniform(20.0, 60.0))], lag_seconds=2.0, seed=3)
    outcome = engine.run(jobs, world, Operator(pool_of(tier_of(Replicas(max=80)), setting)))
    result = score(outcome, setting, None)
    assert (result.killed, result.slo_percent > 98.0) == (0, True), result


def bursts(
    length: float, start: float, slots: tuple[int, int], *, slowdown: float, every: float, known: float | None = None
) -> list[bool]:
    """Which jobs of twelve bursts of 32 waited as told; ``known`` is what the place says of starts before one was seen."""
    rng, gap = random.Random(7), 1200 * every
    arrivals = [burst * gap + n * every for burst in range(12) for n in range(32)]
    lengths = [rng.gammavariate(4, length / 4) for _ in arrivals]
    common = {"template": {"spec": {"containers": [{"name": "worker"}]}}}
    tiers = [
        {**common, "name": "gpu", "queue": "g", "accelerator": {"resource": "nvidia.com/gpu"}, "replicas": {"max": slots[0]}},
        {**common, "name": "cpu", "queue": "c", "concurrency": 2, "replicas": {"min": 1, "max": slots[1]}},
    ]
    spec = WorkerPoolSpec.model_validate({"app": "simulated", "broker": {"url": "redis://simulated"}, "tiers": tiers})

    def takes(chance: random.Random) -> float:
        return start * chance.uniform(0.9, 1.1)

    world = World(
        (
            TierSetup("gpu", takes, first_start=known),
            TierSetup("cpu", takes, slowdown=slowdown, concurrency=2, initial=1, first_start=known),
        )
    )
    came = engine.run(Trace("bursts", arrivals, lengths), world, Operator(Pool("s", "s", "s", 1, 0.0, spec)))
    return [
        abs(expected - real) <= max(AS_EXPECTED_SECONDS, AS_EXPECTED_PART * real)
        for expected, real in zip(came.expected, came.waits, strict=True)
    ]


@pytest.mark.parametrize(
    ("length", "start", "slots"),
    [(1.5, 4.0, (2, 2)), (20.0, 40.0, (4, 8))],
    ids=["short jobs, as the sample's", "long jobs and starts"],
)
def test_most_jobs_of_a_burst_wait_about_as_long_as_they_were_told(length: float, start: float, slots: tuple[int, int]) -> None:
    """From the third burst on, when starts and lengths are known; what moves home waits for less."""
    right = bursts(length, start, slots, slowdown=4.0, every=length / 15)[64:]
    assert sum(right) >= 0.6 * len(right), f"{sum(right)} of {len(right)}"


def test_nearly_all_jobs_of_the_very_first_burst_wait_as_told_where_starts_are_known_to_be_quick() -> None:
    """The sample's jobs and starts, of which none has been seen. They would be 72 % if a start were taken for one of a new node,
    81 % if a job were taken to be no shorter on an accelerator.
    """
    right = bursts(0.1, 1.5, (2, 2), slowdown=9.0, every=0.1, known=1.5)[:32]
    assert sum(right) >= 0.9 * len(right), f"{sum(right)} of {len(right)}"


def test_the_same_seed_gives_the_same_run() -> None:
    setting = Setting(45.0, 60)
    outcomes = [run(trace.bursts(5), setting)[0] for _ in range(2)]
    assert outcomes[0] == outcomes[1]


@pytest.mark.timeout(600)
def test_what_a_day_takes_grows_with_its_jobs_and_not_faster() -> None:
    """Four times the jobs take four times as long, give or take a busy machine; sixteen times, were it by their square."""

    def took(hours: float) -> float:
        jobs = trace.steady(1, hours=hours)
        began = time.process_time()
        run(jobs, Setting(45.0, 60))
        return time.process_time() - began

    assert took(24.0) < 10 * took(6.0)

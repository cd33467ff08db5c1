"""Scaler and router on one view of capacity, next to an autoscaler for each tier and a router that is written by hand.

``make bench-joint`` prints the table of docs/benchmarks.md, with the same jobs and the same starts for all, means of five seeds.
"""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from benchmarks.scaling import OUTAGE, SLOWDOWN, outage_jobs, two_tiers
from workerpool_operator.model import Replicas
from workerpool_operator.ports import Pool
from workerpool_operator.simulation import engine
from workerpool_operator.simulation.compare import quantile
from workerpool_operator.simulation.engine import Controller, Orders, Outage, Outcome, Tier, TierSetup, World
from workerpool_operator.simulation.policies import Keda, Operator
from workerpool_operator.simulation.trace import Trace

TARGET_SECONDS = 60.0
FAST, SLOW = Replicas(max=8), Replicas(max=40)
MARGIN = 5
"""By how many jobs the accelerated queue may be longer, in the router that is written by hand."""


class KedaForEach:
    """A ScaledObject for each tier, each on its own queue: what one tier does the other does not know."""

    reacts = False
    spares_busy = False

    def __init__(self, pool: Pool, *, target: float, poll_seconds: float) -> None:
        self._each = {
            tier.name: Keda(
                replace(pool, spec=pool.spec.model_copy(update={"tiers": (tier,)})), target=target, poll_seconds=poll_seconds
            )
            for tier in pool.spec.tiers
        }

    def look(self, tiers: Mapping[str, Tier], now: float) -> Orders:
        """Ask each for its tier."""
        orders = [keda.look({name: tiers[name]}, now) for name, keda in self._each.items()]
        return Orders({name: n for order in orders for name, n in order.replicas.items()}, min(o.again_at for o in orders))


def by_hand(fast: Tier, slow: Tier) -> bool:
    """The accelerated tier, unless its queue is longer by more than the margin."""
    return len(fast.waiting) <= len(slow.waiting) + MARGIN


@dataclass(frozen=True, slots=True)
class Scenario:
    """Jobs, how long workers of both tiers take to start, and outages."""

    name: str
    jobs: Callable[[int], Trace]
    start_seconds: tuple[float, float] = (45.0, 45.0)
    outages: Sequence[Outage] = ()


def bursts(seed: int) -> Trace:
    """An hour of short jobs, half of what 8 accelerated workers and 16 others can take."""
    return outage_jobs(seed, 1)


def waves(seed: int) -> Trace:
    """Two hours, ten busy minutes in each half hour, so that workers leave while others are at work.

    No job is longer than 50 s, five minutes without an accelerator: one that outlasts cool-down and grace period would be cut off
    by a rule that does not see it, begin again, and never end.
    """
    rng = random.Random(seed)
    arrivals, at = list[float](), 0.0
    while at < 7_200:
        at += rng.expovariate(0.36 if at % 1_800 < 600 else 0.09)
        arrivals.append(at)
    return Trace(f"waves, seed {seed}", arrivals, [min(rng.expovariate(1 / 20), 50.0) for _ in arrivals])


SCENARIOS = (
    Scenario("bursts", bursts),
    Scenario("no accelerator for 10 minutes", bursts, outages=(OUTAGE,)),
    Scenario("accelerated nodes of 4 minutes", bursts, (240.0, 45.0)),
    Scenario("waves of jobs of up to 50 s", waves),
)

RULES: Mapping[str, tuple[Callable[[Pool], Controller], Callable[[Tier, Tier], bool] | None]] = {
    "workerpool": (Operator, None),
    "KEDA, defaults, and a router by hand": (lambda pool: KedaForEach(pool, target=5.0, poll_seconds=30.0), by_hand),
    "KEDA, target 1, poll 5 s, and a router by hand": (lambda pool: KedaForEach(pool, target=1.0, poll_seconds=5.0), by_hand),
}


def play(scenario: Scenario, rule: str, seed: int) -> Outcome:
    """One rule on the jobs of one seed."""
    controller, takes = RULES[rule]
    starts = [lambda _, seconds=seconds: seconds for seconds in scenario.start_seconds]
    tiers = (TierSetup("gpu", starts[0]), TierSetup("cpu", starts[1], slowdown=SLOWDOWN))
    world = World(tiers, outages=scenario.outages, seed=seed, takes=takes)
    return engine.run(scenario.jobs(seed), world, controller(two_tiers(FAST, SLOW, rebalance=True)))


def row(scenario: Scenario, rule: str) -> str:
    """One line of the table."""
    found = [play(scenario, rule, seed) for seed in range(1, 6)]
    waits = [sorted(outcome.waits) for outcome in found]
    tail = [statistics.fmean(quantile(one, part) for one in waits) for part in (0.5, 0.95, 0.99)]
    in_time = statistics.fmean(100 * sum(wait <= TARGET_SECONDS for wait in one) / len(one) for one in waits)
    hours = [statistics.fmean(outcome.replica_seconds[tier] / 3600 for outcome in found) for tier in ("gpu", "cpu")]
    killed = sum(outcome.killed for outcome in found)
    shown = " | ".join(f"{value:.0f}" for value in tail)
    return f"| {scenario.name} | {rule} | {shown} | {in_time:.1f} | {hours[0]:.1f} | {hours[1]:.1f} | {killed} |"


def main() -> None:
    """Print the table."""
    print("| scenario | rule | p50 s | p95 s | p99 s | in time % | GPU-h | CPU-h | killed |")
    print("|---|---|---|---|---|---|---|---|---|")
    for scenario in SCENARIOS:
        for rule in RULES:
            print(row(scenario, rule), flush=True)


if __name__ == "__main__":
    main()

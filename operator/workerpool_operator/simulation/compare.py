"""Runs policies over one trace and sums up what came of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from workerpool_operator.model import Replicas, Tier, WorkerPoolSpec
from workerpool_operator.ports import Pool
from workerpool_operator.simulation import bound, engine
from workerpool_operator.simulation.engine import Controller, Outcome, TierSetup, World
from workerpool_operator.simulation.trace import Trace

TIER = "workers"
"""The name of the one tier, whatever the pool calls it."""


@dataclass(frozen=True, slots=True)
class Setting:
    """What all policies are given alike; seconds."""

    start_seconds: float
    target_wait: int
    slots: int = 1


@dataclass(frozen=True, slots=True)
class Score:
    """One policy on one trace.

    Attributes:
        slo_percent: jobs that started within the target.
        wait_p50, wait_p95, wait_p99: seconds from arrival to the first start.
        replica_hours: paid from the order of a replica to its end.
        cost_ratio: replica-hours over the lower bound; None where that is unknown.
        killed: jobs whose worker was removed under them.
        changes: how often the count was changed.
    """

    jobs: int
    slo_percent: float
    wait_p50: float
    wait_p95: float
    wait_p99: float
    replica_hours: float
    cost_ratio: float | None
    killed: int
    changes: int


def pool_of(tier: Tier, setting: Setting) -> Pool:
    """A pool of that tier alone, with the setting's slots and target."""
    spec = WorkerPoolSpec.model_validate(
        {
            "app": "simulated",
            "broker": {"url": "redis://simulated"},
            "routing": {"fallback": {"onFailure": False, "onLoss": False}},
            "scaling": {"targetWaitSeconds": setting.target_wait},
            "tiers": [tier.model_copy(update={"name": TIER, "accelerator": None, "concurrency": setting.slots})],
        }
    )
    return Pool("simulation", "pool", "simulation/pool", 1, 0.0, spec)


def tier_of(replicas: Replicas) -> Tier:
    """A tier where no file says what it is."""
    template = {"spec": {"containers": [{"name": "worker"}]}}
    return Tier.model_validate({"name": TIER, "queue": "celery", "replicas": replicas, "template": template})


def lower_bound(trace: Trace, setting: Setting) -> float:
    """Replica-seconds that no rule can go below; raises ImportError where SciPy is missing."""
    return bound.replica_seconds(
        trace,
        start_seconds=setting.start_seconds,
        target_wait=setting.target_wait,
        slots=setting.slots,
        bin_seconds=min(20.0, max(1.0, setting.target_wait / 6)),
    )


def play(
    trace: Trace, setting: Setting, controller: Controller, on_progress: Callable[[int], None] | None = None, initial: int = 0
) -> Outcome:
    """One policy over the trace, with a constant start time."""
    tier = TierSetup(TIER, lambda _: setting.start_seconds, setting.slots, initial=initial)
    return engine.run(trace, World([tier]), controller, on_progress)


def score(outcome: Outcome, setting: Setting, least: float | None) -> Score:
    """Sum up a run; all zeros for a trace without jobs."""
    waits = sorted(outcome.waits)
    seconds = sum(outcome.replica_seconds.values())
    in_time = sum(wait <= setting.target_wait for wait in waits)
    return Score(
        jobs=len(waits),
        slo_percent=100 * in_time / len(waits) if waits else 100.0,
        wait_p50=quantile(waits, 0.5),
        wait_p95=quantile(waits, 0.95),
        wait_p99=quantile(waits, 0.99),
        replica_hours=seconds / 3600,
        cost_ratio=seconds / least if least else None,
        killed=outcome.killed,
        changes=outcome.changes,
    )


def quantile(ordered: Sequence[float], part: float) -> float:
    """The smallest value that at least that part of all values does not exceed."""
    return ordered[min(len(ordered) - 1, int(part * len(ordered)))] if ordered else 0.0

"""What ``/metrics`` shows: the last report of every pool, and how the operator itself does.

The collector reads what is there when it is asked, so a pool that is gone leaves no series behind. A number that nobody knows
is left out, never shown as zero.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, SummaryMetricFamily
from prometheus_client.registry import Collector

from workerpool_operator.observation import BrokerReading, Unavailable
from workerpool_operator.ports import Pool, Report
from workerpool_operator.reconcile import Passes
from workerpool_operator.status import ConditionType

Family: TypeAlias = GaugeMetricFamily | CounterMetricFamily | SummaryMetricFamily


@dataclass(frozen=True, slots=True)
class Metric:
    """One metric: its name and kind as Prometheus knows them, its labels, and what it means in one line."""

    name: str
    kind: type[Family]
    labels: tuple[str, ...]
    meaning: str

    def family(self) -> Family:
        """An empty family of it."""
        return self.kind(self.name, self.meaning, labels=self.labels)


_TIER = ("pool", "tier")

LEADER = Metric("workerpool_leader", GaugeMetricFamily, (), "1 in the operator that acts, 0 in one that stands by")
PASSES = Metric("workerpool_pass_seconds", SummaryMetricFamily, (), "Passes over all pools, and how long they took")
FAILURES = Metric(
    "workerpool_pass_errors_total", CounterMetricFamily, (), "Passes, and parts of a pass for one pool, that ended in an error"
)
REACHABLE = Metric("workerpool_broker_reachable", GaugeMetricFamily, ("pool",), "1 while the pool's queues can be read")
CONDITION = Metric(
    "workerpool_condition", GaugeMetricFamily, ("pool", "type", "status"), "1 for the status that each condition of the pool has"
)
DESIRED = Metric("workerpool_tier_replicas_desired", GaugeMetricFamily, _TIER, "Workers that the tier should have")
REPLICAS = Metric(
    "workerpool_tier_replicas",
    GaugeMetricFamily,
    (*_TIER, "state"),
    "Workers that there are: ready, starting, unschedulable, draining",
)
REASON = Metric("workerpool_tier_reason", GaugeMetricFamily, (*_TIER, "reason"), "1 for the reason of the last decision")
WAITING = Metric("workerpool_tier_jobs_waiting", GaugeMetricFamily, _TIER, "Messages in the tier's queue, all priorities")
IN_FLIGHT = Metric("workerpool_tier_jobs_in_flight", GaugeMetricFamily, _TIER, "Messages that the tier's workers hold")
SPILLED = Metric("workerpool_tier_jobs_spilled", GaugeMetricFamily, _TIER, "Jobs that wanted this tier and wait or run elsewhere")
JOBS = Metric("workerpool_tier_job_seconds", SummaryMetricFamily, _TIER, "Jobs that the tier has ended, and their time on a slot")
WAITS = Metric(
    "workerpool_tier_job_wait_seconds",
    SummaryMetricFamily,
    _TIER,
    "Jobs that the tier has started for the first time, and their wait since admission; without those of an ETA",
)
EXPECTED = Metric(
    "workerpool_tier_job_wait_expected_seconds_total", CounterMetricFamily, _TIER, "What admission expected these waits to be"
)
AS_EXPECTED = Metric(
    "workerpool_tier_job_waits_as_expected_total",
    CounterMetricFamily,
    _TIER,
    "Those of them that were as expected, within 25 % or 2 s",
)
BREAKER = Metric(
    "workerpool_tier_breaker",
    GaugeMetricFamily,
    (*_TIER, "state"),
    "1 for the state of an accelerated tier's circuit breaker: closed, open, half-open",
)
ROUTED = Metric(
    "workerpool_jobs_routed_total", CounterMetricFamily, (*_TIER, "reason"), "Jobs by where admission sent them and why"
)

ALL = (
    LEADER, PASSES, FAILURES, REACHABLE, CONDITION, DESIRED, REPLICAS, REASON, WAITING, IN_FLIGHT, SPILLED, JOBS, WAITS, EXPECTED,
    AS_EXPECTED, BREAKER, ROUTED,
)  # fmt: skip


class Metrics(Collector):
    """Keeps the last report of each pool.

    Args:
        leads: whether this process acts now.
        passes: what the passes took so far.
        pools: the pools that there are now, by id.
        unserved: the ids of those that no pass takes up: they are not valid, or are being deleted.
    """

    def __init__(
        self,
        leads: Callable[[], bool],
        passes: Callable[[], Passes],
        pools: Callable[[], Mapping[str, Pool]],
        unserved: Callable[[], Collection[str]],
    ) -> None:
        self._leads, self._passes, self._pools, self._unserved = leads, passes, pools, unserved
        self._reports: dict[str, Report] = {}

    def saw(self, report: Report) -> None:
        """Take in what a pass saw of one pool."""
        self._reports[report.pool.id] = report

    def collect(self) -> Iterator[Family]:
        """Every metric, with a line for each pool, tier and so on that it is known of."""
        shown = self._pools().keys() - set(self._unserved())
        self._reports = {name: report for name, report in self._reports.items() if name in shown}
        families: dict[str, Any] = {metric.name: metric.family() for metric in ALL}
        for metric, labels, *numbers in self._samples():
            families[metric.name].add_metric(labels, *numbers)
        yield from families.values()

    def _samples(self) -> Iterator[tuple[Metric, list[str], *tuple[float, ...]]]:
        passes = self._passes()
        yield LEADER, [], float(self._leads())
        yield PASSES, [], passes.ended, passes.seconds
        yield FAILURES, [], passes.errors
        for name in self._unserved():
            yield CONDITION, [name, ConditionType.READY, "False"], 1.0
        for name, report in self._reports.items():
            reading = report.reading
            yield REACHABLE, [name], float(not isinstance(reading, Unavailable))
            for condition in report.status.conditions:
                yield CONDITION, [name, condition.type, condition.status], 1.0
            yield from _tiers(name, report)
            if isinstance(reading, BrokerReading):
                for route, count in reading.routes.items():
                    tier, _, reason = route.partition(":")
                    yield ROUTED, [name, tier, reason], count


def _tiers(pool: str, report: Report) -> Iterator[tuple[Metric, list[str], *tuple[float, ...]]]:
    accelerated = {tier.name for tier in report.pool.tiers if tier.accelerated}
    for tier in report.status.tiers:
        labels = [pool, tier.name]
        yield DESIRED, labels, tier.desired
        for state in ("ready", "starting", "unschedulable", "draining"):
            yield REPLICAS, [*labels, state], getattr(tier, state)
        yield REASON, [*labels, tier.reason], 1.0
        for metric, number in ((WAITING, tier.waiting), (IN_FLIGHT, tier.in_flight), (SPILLED, tier.spilled)):
            if number is not None:
                yield metric, labels, number
        if isinstance(report.reading, BrokerReading):
            queue = report.reading.tiers[tier.name]
            yield JOBS, labels, queue.served.jobs, queue.served.seconds
            yield WAITS, labels, queue.waits.jobs, queue.waits.seconds
            yield EXPECTED, labels, queue.waits.expected
            yield AS_EXPECTED, labels, queue.waits.right
            if tier.name in accelerated:
                yield BREAKER, [*labels, queue.kept.breaker.state], 1.0

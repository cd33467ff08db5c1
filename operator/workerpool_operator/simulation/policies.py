"""The rules that a simulation compares: the operator's own, and KEDA with the HPA."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Mapping

from workerpool_operator import planning, rebalancing
from workerpool_operator.observation import BrokerReading, QueueReading, Served
from workerpool_operator.ports import Pool
from workerpool_operator.simulation.engine import Orders, Tier
from workerpool_routing.wire import Milliseconds


class Operator:
    """The operator's own pass, from a reading to its plan and the capacity that it publishes."""

    reacts = True
    spares_busy = True

    def __init__(self, pool: Pool) -> None:
        self._pool = pool
        self._memory: dict[str, planning.Memory] = {}

    def look(self, tiers: Mapping[str, Tier], now: float) -> Orders:
        """Plan as :meth:`workerpool_operator.reconcile.Reconciler.reconcile_once` does."""
        readings = {name: _reading(tier, routed=len(tiers) > 1) for name, tier in tiers.items()}
        routes = {f"{name}:": tier.arrived for name, tier in tiers.items()}
        reading = BrokerReading(readings, "", Milliseconds(int(now * 1000)), routes)
        workers = {name: tier.replicas() for name, tier in tiers.items()}
        plans = planning.plan(self._pool, reading, workers, self._memory, now)
        self._memory = {plan.tier.name: plan.memory for plan in plans}
        replicas = {plan.tier.name: plan.decision.replicas for plan in plans}
        again_at = min(plan.decision.again_at for plan in plans)
        if len(plans) == 1:
            return Orders(replicas, again_at)
        capacity = planning.capacity(self._pool.spec, plans, reading.time, now)
        if not self._pool.spec.routing.rebalance:
            return Orders(replicas, again_at, capacity.tiers)
        loads = planning.loads(plans, capacity, reading.time)
        spilled = {name: tier.spilled for name, tier in tiers.items()}
        return Orders(replicas, again_at, capacity.tiers, rebalancing.transfers(planning.policy(self._pool.spec), loads, spilled))


def _reading(tier: Tier, *, routed: bool) -> QueueReading:
    served = Served(tier.finished, tier.served_seconds, tier.served_squares)
    # Who is there matters to the routers alone.
    return QueueReading(len(tier.waiting), tier.in_flight, tier.spilled, workers=tier.workers() if routed else (), served=served)


HPA_SYNC_SECONDS = 15.0
HPA_TOLERANCE = 0.1
HPA_DOWN_WINDOW_SECONDS = 300.0


def hpa(metric: float, target: float, replicas: int) -> int:
    """What the HPA wants of an AverageValue metric, before its limits.

    Source: kubernetes, ``pkg/controller/podautoscaler/replica_calculator.go``: no change within a tenth of the target.
    """
    if replicas and 1 - HPA_TOLERANCE <= metric / (target * replicas) <= 1 + HPA_TOLERANCE:
        return replicas
    return math.ceil(metric / target)


def hpa_up(replicas: int, wanted: int) -> int:
    """The default limit on the way up: four more or twice as many in 15 s (``autoscaling/v2/defaults.go``)."""
    return min(wanted, max(replicas + 4, 2 * replicas))


class Keda:
    """A KEDA ScaledObject on a Redis list, and the HPA that it makes.

    Source: KEDA ``pkg/scaling/executor/scale_scaledobjects.go`` (0 to 1, cool-down) and the HPA above. Defaults are KEDA's own:
    the length of the list alone, five jobs a replica, polled every 30 s.

    Args:
        pool: for the bounds and slots of its first tier.
        target: jobs for each slot.
        poll_seconds: KEDA's ``pollingInterval``, for the step from zero and back.
        in_flight: whether the metric counts jobs at work too, which the Redis scaler cannot.
    """

    reacts = False
    spares_busy = False
    cooldown_seconds = 300.0

    def __init__(self, pool: Pool, *, target: float = 5.0, poll_seconds: float = 30.0, in_flight: bool = False) -> None:
        tier = pool.spec.tiers[0]
        self._minimum, self._maximum = tier.replicas.min, tier.replicas.max
        self._target, self._poll, self._in_flight = target * (tier.concurrency if in_flight else 1), poll_seconds, in_flight
        self._active_at = -math.inf
        self._recent: deque[tuple[float, int]] = deque()
        self._next_poll = self._next_sync = 0.0

    def look(self, tiers: Mapping[str, Tier], now: float) -> Orders:
        """Poll, synchronise, or both."""
        (tier,) = tiers.values()
        metric = len(tier.waiting) + (tier.in_flight if self._in_flight else 0)
        replicas = tier.desired
        if now >= self._next_poll:
            self._next_poll = now + self._poll
            replicas = self._activate(metric, replicas, now)
        if now >= self._next_sync:
            self._next_sync = now + HPA_SYNC_SECONDS
            if replicas:
                replicas = self._synchronise(metric, replicas, now)
        return Orders({tier.name: replicas}, min(self._next_poll, self._next_sync))

    def _activate(self, metric: int, replicas: int, now: float) -> int:
        if metric > 0:
            self._active_at = now
            return replicas or min(max(self._minimum, 1), self._maximum)
        if now - self._active_at > self.cooldown_seconds:
            return self._minimum
        return replicas

    def _synchronise(self, metric: int, replicas: int, now: float) -> int:
        wanted = min(max(hpa(metric, self._target, replicas), self._minimum, 1), self._maximum)
        while self._recent and now - self._recent[0][0] > HPA_DOWN_WINDOW_SECONDS:
            self._recent.popleft()
        self._recent.append((now, wanted))
        if wanted > replicas:
            return hpa_up(replicas, wanted)
        return min(replicas, max(n for _, n in self._recent))


POLICIES: Mapping[str, Callable[[Pool], Operator | Keda]] = {
    "workerpool": Operator,
    "keda": Keda,
    "keda-inflight": lambda pool: Keda(pool, target=1.0, poll_seconds=5.0, in_flight=True),
}
"""The rules that ``workerpool simulate`` knows by name."""

"""The rules that a simulation compares: the operator's own, and KEDA with the HPA."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Mapping

from workerpool_operator import planning, scaling
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
        self._memory: dict[str, scaling.Memory] = {}

    def look(self, tiers: Mapping[str, Tier], now: float) -> Orders:
        """Plan as :meth:`workerpool_operator.reconcile.Reconciler.reconcile_once` does."""
        readings = {name: _reading(tier) for name, tier in tiers.items()}
        routes = {f"{name}:": tier.arrived for name, tier in tiers.items()}
        reading = BrokerReading(readings, "", Milliseconds(int(now * 1000)), routes)
        workers = {name: tier.replicas() for name, tier in tiers.items()}
        plans = planning.plan(self._pool, reading, workers, self._memory, now)
        self._memory = {plan.tier.name: plan.decision.memory for plan in plans}
        coming = {}
        if len(plans) > 1:
            capacity = planning.capacity(plans).tiers
            coming = {name: tier.starting + tier.startable for name, tier in capacity.items()}
        return Orders(
            {plan.tier.name: plan.decision.replicas for plan in plans}, min(plan.decision.again_at for plan in plans), coming
        )


def _reading(tier: Tier) -> QueueReading:
    served = Served(tier.finished, tier.served_seconds, tier.served_squares)
    return QueueReading(len(tier.waiting), tier.in_flight, tier.spilled, served=served)

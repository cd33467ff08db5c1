"""The rules of other autoscalers for one tier, as their sources have them, to be compared on the same traces.

Each is a pure step (tested against an example worked by hand) and a thin controller around it.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping

from workerpool_operator.simulation.engine import Orders, Tier


class Rule:
    """What all of them share: bounds, and one tier to look at."""

    reacts = False
    spares_busy = False

    def __init__(self, *, minimum: int = 0, maximum: int = 80, slots: int = 1) -> None:
        self.minimum, self.maximum, self.slots = minimum, maximum, slots

    def look(self, tiers: Mapping[str, Tier], now: float) -> Orders:
        """Ask the rule for the one tier."""
        (tier,) = tiers.values()
        replicas, again_at = self.replicas(tier, now)
        return Orders({tier.name: min(max(replicas, self.minimum), self.maximum)}, again_at)

    def replicas(self, _tier: Tier, _now: float, /) -> tuple[int, float]:
        """The count before the bounds, and when to ask again: at rest the minimum."""
        return self.minimum, math.inf


class Static(Rule):
    """Always the same count."""

    def __init__(self, count: int) -> None:
        super().__init__(minimum=count, maximum=count)


class DelayedOff(Rule):
    """A server for each job, switched off when it has idled for the time that starting one takes.

    Source: Gandhi, Harchol-Balter, Raghunathan, Kozuch, "AutoScale", ACM TOCS 30(4), 2012. In counts, idle timers are the highest
    need of the last ``linger`` seconds.
    """

    reacts = True
    spares_busy = True

    def __init__(self, linger: float, **bounds: int) -> None:
        super().__init__(**bounds)
        self.linger = linger
        self._needs: list[tuple[float, int]] = []

    def replicas(self, tier: Tier, now: float, /) -> tuple[int, float]:
        """One for each job in the system, or that were there lately."""
        need = min(math.ceil((len(tier.waiting) + tier.in_flight) / self.slots), self.maximum)
        self._needs = highest(self._needs, need, now, self.linger)
        return self._needs[0][1], self._needs[0][0] + self.linger + 0.001 if len(self._needs) > 1 else math.inf


def highest(needs: list[tuple[float, int]], need: int, now: float, linger: float) -> list[tuple[float, int]]:
    """The needs that no later, higher one hides; the first is the highest of the last ``linger`` seconds."""
    return [*((at, n) for at, n in needs if now - at <= linger and n > need), (now, need)]


class Knative(Rule):
    """Knative's pod autoscaler on concurrency, with stable and panic windows.

    Source: knative/serving ``pkg/autoscaler/scaling/autoscaler.go``: tick 2 s, stable 60 s, panic 6 s at twice the capacity,
    70 % of the concurrency, at most halved and at most a thousandfold at a time; to zero after 30 s of nothing.
    """

    tick, stable, panic, utilisation, grace = 2.0, 60.0, 6.0, 0.7, 30.0

    def __init__(self, **bounds: int) -> None:
        super().__init__(**bounds)
        self._samples: deque[tuple[float, int]] = deque()
        self._panic_until = -math.inf
        self._panic_high = 0
        self._idle_since: float | None = None

    def replicas(self, tier: Tier, now: float, /) -> tuple[int, float]:
        """One tick."""
        self._samples.append((now, len(tier.waiting) + tier.in_flight))
        while self._samples[0][0] <= now - self.stable:
            self._samples.popleft()
        wants = []
        for window in (self.stable, self.panic):
            recent = [n for at, n in self._samples if at > now - window]
            wants.append(math.ceil(sum(recent) / len(recent) / (self.utilisation * self.slots)))
        return self._settle(tier, wants[0], wants[1], now), now + self.tick

    def _settle(self, tier: Tier, stable: int, panic: int, now: float) -> int:
        ready = max(1, tier.ready())
        stable, panic = knative_clamp(stable, ready), knative_clamp(panic, ready)
        if panic / ready >= 2:
            self._panic_until = now + self.stable
        if now < self._panic_until:
            self._panic_high = max(self._panic_high, stable, panic)
            return self._panic_high
        self._panic_high = 0
        if stable or any(n for _, n in self._samples):
            self._idle_since = None
            return max(stable, 1) if tier.desired or stable else 0
        self._idle_since = now if self._idle_since is None else self._idle_since
        return 0 if now - self._idle_since >= self.grace else tier.desired


def knative_clamp(wanted: int, ready: int) -> int:
    """At most halved, at most a thousandfold."""
    return min(max(wanted, ready // 2), 1000 * ready)


class BacklogPerInstance(Rule):
    """AWS: keep the backlog of each instance at what it works off within the longest acceptable latency.

    Source: AWS, "Scaling policy based on Amazon SQS" (10 s / 0.1 s = 100 messages an instance), by target tracking: evaluated
    each minute, down after 15 low ones.
    """

    minute, low_minutes = 60.0, 15

    def __init__(self, *, acceptable_wait: float, mean_service: float, **bounds: int) -> None:
        super().__init__(**{"minimum": 1, **bounds})
        self.target = backlog_target(acceptable_wait, mean_service)
        self._low = 0

    def replicas(self, tier: Tier, now: float, /) -> tuple[int, float]:
        """One evaluation."""
        current = max(1, tier.desired)
        wanted = math.ceil(len(tier.waiting) / self.target)
        self._low = self._low + 1 if wanted < current else 0
        if wanted >= current or self._low >= self.low_minutes:
            self._low = 0
            current = wanted
        return current, now + self.minute


def backlog_target(acceptable_wait: float, mean_service: float) -> float:
    """Messages that one instance may have waiting."""
    return acceptable_wait / mean_service


class Judoscale(Rule):
    """One more when jobs queue for too long, at most once in a start time; one less after ten good minutes.

    Source: judoscale.com/docs, queue time of workers, aggregates of 10 s.
    """

    tick, calm_seconds, jump = 10.0, 600.0, 1

    def __init__(self, *, upper: float, lower: float, start_seconds: float, **bounds: int) -> None:
        super().__init__(**{"minimum": 1, **bounds})
        self.upper, self.lower, self.start_seconds = upper, lower, start_seconds
        self._raised_at = self._calm_since = -math.inf

    def replicas(self, tier: Tier, now: float, /) -> tuple[int, float]:
        """One aggregate."""
        queue_time, count = tier.oldest_wait(now), max(1, tier.desired)
        if queue_time > self.lower or self._calm_since == -math.inf:
            self._calm_since = now
        if queue_time > self.upper and now - self._raised_at >= self.start_seconds:
            self._raised_at = now
            count += self.jump
        elif now - self._calm_since >= self.calm_seconds:
            self._calm_since = now
            count -= 1
        return count, now + self.tick

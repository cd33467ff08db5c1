"""What a run of the demo remembers: its passes, and what became of each upload."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from examples.media.summary import Course, Outcome, same
from rich.console import RenderableType

from workerpool_operator.live import LiveView
from workerpool_operator.observation import Unavailable
from workerpool_operator.ports import Report
from workerpool_operator.status import TierStatus
from workerpool_routing.ledger import State

TIERS = ("gpu", "cpu")


@dataclass(slots=True)
class Recorder:
    """A reporter that shows each pass and remembers what the summary needs."""

    view: LiveView
    passes: list[tuple[float, dict[str, TierStatus]]] = field(default_factory=list)
    course: Course = field(default_factory=Course)
    routes: Mapping[str, int] = field(default_factory=dict)
    busiest: int = -1
    picture: RenderableType = ""
    _passed: asyncio.Event = field(default_factory=asyncio.Event)

    async def report(self, report: Report) -> None:
        """Take one pass in."""
        await self.view.report(report)
        if isinstance(report.reading, Unavailable):
            return
        self.passes.append((time.monotonic(), {tier.name: tier for tier in report.status.tiers}))
        self.routes = report.reading.routes
        for name, queue in report.reading.tiers.items():
            self.course.drained.setdefault(name, set()).update(worker.worker for worker in queue.workers if worker.draining)
        work = (report.status.waiting or 0) + (report.status.in_flight or 0) + sum(t.ready for t in report.status.tiers)
        if work > self.busiest:
            self.busiest, self.picture = work, self.view.view()
        self._passed.set()

    async def until(self, holds: Callable[[Mapping[str, TierStatus]], bool]) -> None:
        """Wait for a pass of which this holds."""
        while not self.passes or not holds(self.passes[-1][1]):
            self._passed.clear()
            await self._passed.wait()

    def last(self, tier: str) -> TierStatus:
        """The tier as the last pass left it."""
        return self.passes[-1][1][tier]

    @property
    def peak(self) -> dict[str, int]:
        """The most ready replicas of each tier."""
        return {tier: max((ready for _, ready in self.ready(tier)), default=0) for tier in TIERS}

    @property
    def final(self) -> dict[str, int]:
        """The last ready replicas of each tier."""
        return {tier: ready for tier in TIERS for _, ready in self.ready(tier)[-1:]}

    def ready(self, tier: str) -> list[tuple[float, int]]:
        """Ready replicas over time."""
        return [(at, tiers[tier].ready) for at, tiers in self.passes]

    def waiting(self, tier: str) -> list[tuple[float, int]]:
        """Waiting jobs over time."""
        return [(at, tiers[tier].waiting or 0) for at, tiers in self.passes]


@dataclass(slots=True)
class Upload:
    """One file on its way: what was answered, then the last thing known of its task."""

    path: Path
    asked: bool
    accepted: dict[str, Any] = field(default_factory=dict)
    task: dict[str, Any] = field(default_factory=dict)

    @property
    def ended(self) -> bool:
        """Whether nothing more will happen to it."""
        return bool(self.task) and State(self.task["state"]).ended

    def outcome(self, expected: Mapping[Path, Mapping[str, Any]]) -> Outcome:
        """What the summary counts."""
        return Outcome(
            asked=self.asked,
            first_tier=self.accepted["tier"],
            decision_ms=self.accepted["decision_ms"],
            state=self.task.get("state", "unknown"),
            tier=self.task.get("tier", "unknown"),
            starts=self.task.get("starts", {}),
            attempt=self.task.get("attempt", 1),
            correct=same(self.task.get("result"), {**expected[self.path], "metadata": {"name": self.path.name}}),
        )

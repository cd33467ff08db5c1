"""The simulated world: jobs, queues, workers that take time to start, a controller that looks now and then.

Event by event, and the same for the same input. Times are seconds from the beginning of the trace. The queues are first in,
first out and wake the slot that has idled longest, as Redis does with blocked clients.
"""

from __future__ import annotations

import heapq
import random
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from heapq import merge
from typing import Protocol

from workerpool_operator.observation import Phase, Replica, TierReplicas
from workerpool_operator.rebalancing import Transfer
from workerpool_operator.simulation.trace import Trace
from workerpool_routing import decide as routing
from workerpool_routing.wire import PRESENCE_LIFE_MS, Milliseconds, Presence, TierCapacity, TierPolicy

GRACE_SECONDS = 30.0
"""How long a worker that is told to stop may still work, the default of Kubernetes."""

LOSS_SEEN_SECONDS = PRESENCE_LIFE_MS / 1000
"""How long a worker that vanished still looks alive."""

TAIL_SECONDS = 3600.0
"""How long after the last job workers that are kept are still paid for."""

_FINISH, _READY, _LOST, _LOOK, _OUTAGE, _RECOVERY, _ACT = range(7)


@dataclass(frozen=True, slots=True)
class Outage:
    """All workers of a tier vanish at ``start``, and none can be placed until ``end``."""

    tier: str
    start: float
    end: float


@dataclass(frozen=True, slots=True)
class TierSetup:
    """One tier of the world.

    Attributes:
        start_seconds: how long an ordered worker takes to be ready, drawn anew for each.
        slowdown: by how much a job takes longer here than the trace says.
        initial: workers that are ready at the beginning.
        first_start: what the place says of a start before one was seen, as in :class:`TierReplicas`.
    """

    name: str
    start_seconds: Callable[[random.Random], float]
    concurrency: int = 1
    slowdown: float = 1.0
    initial: int = 0
    first_start: float | None = None


@dataclass(frozen=True, slots=True)
class World:
    """What the simulation is given beside the trace; the first tier is the preferred one.

    Attributes:
        look_seconds: the time between two looks of the controller.
        lag_seconds: from what a look saw to what it changed.
        takes: whether the preferred tier takes the next job, of both tiers as they are; None for the library's own rule.
    """

    tiers: Sequence[TierSetup]
    look_seconds: float = 1.0
    lag_seconds: float = 0.0
    outages: Sequence[Outage] = ()
    seed: int = 0
    takes: Callable[[Tier, Tier], bool] | None = None


class Pod:
    """One worker."""

    __slots__ = ("alive", "closing", "jobs", "name", "ordered_at", "ready_at", "stuck", "tier")

    def __init__(self, tier: Tier, name: str, ordered_at: float) -> None:
        self.tier, self.name, self.ordered_at = tier, name, ordered_at
        self.ready_at: float | None = None
        self.jobs: dict[int, float] = {}  # job → end
        self.alive, self.closing, self.stuck = True, False, False


class Tier:
    """The present state of one tier; rules read it, only the engine writes it."""

    def __init__(self, setup: TierSetup, arrivals: Sequence[float]) -> None:
        self.setup, self._arrivals = setup, arrivals
        self.name, self.concurrency = setup.name, setup.concurrency
        self.waiting: deque[int] = deque()
        self.idle: deque[Pod] = deque()  # one entry for each free slot; entries of pods that have left are skipped
        self.pods: list[Pod] = []
        self.arrived = 0
        self.in_flight = 0
        self.spilled = 0
        self.desired = 0
        self.changes = 0
        self.killed = 0
        self.seconds = 0.0
        self.capacity = TierCapacity()
        self.ghosts: list[Pod] = []
        self.down = False
        self.served_seconds = 0.0
        self.served_squares = 0.0
        self.finished = 0
        self._replicas: TierReplicas | None = None
        self._ready: int | None = None

    def changed(self) -> None:
        """Forget the cached view of the workers."""
        self._replicas = self._ready = None

    def oldest_wait(self, now: float) -> float:
        """Seconds for which the job at the head of the queue has waited."""
        return now - self._arrivals[self.waiting[0]] if self.waiting else 0.0

    def ready(self) -> int:
        """Workers that take jobs."""
        if self._ready is None:
            self._ready = sum(pod.ready_at is not None and not pod.closing for pod in self.pods)
        return self._ready

    def workers(self) -> tuple[Presence, ...]:
        """What the workers report, the vanished ones too while nobody misses them."""
        there = [pod for pod in self.pods if pod.ready_at is not None and not pod.closing]
        return tuple(_presence(pod) for pod in (*there, *self.ghosts))

    def replicas(self) -> TierReplicas:
        """The workers as the operator sees them."""
        if self._replicas is None:
            pods = tuple(_replica(pod) for pod in self.pods)
            self._replicas = TierReplicas(self.desired, pods, first_start=self.setup.first_start)
        return self._replicas


def _replica(pod: Pod) -> Replica:
    phase = Phase.READY if pod.ready_at is not None else Phase.UNSCHEDULABLE if pod.stuck else Phase.STARTING
    return Replica(pod.name, Phase.STOPPING if pod.closing else phase, pod.ordered_at, pod.ready_at)


def _presence(pod: Pod) -> Presence:
    tier, never = pod.tier, Milliseconds(0)
    return Presence(pod.name, pod.name, tier.name, tier.name, tier.concurrency, len(pod.jobs), since=never, at=never)


@dataclass(frozen=True, slots=True)
class Orders:
    """What a controller wants: replicas by tier, and when it wants to be asked again even if nothing happens.

    ``capacity`` is what the routers are told of slots that come; ``transfers`` are waiting jobs that move.
    """

    replicas: Mapping[str, int]
    again_at: float
    capacity: Mapping[str, TierCapacity] = field(default_factory=dict)
    transfers: Sequence[Transfer] = ()


class Controller(Protocol):
    """A rule as the engine asks it."""

    reacts: bool
    """Whether it looks as soon as something has happened, or only when it said."""
    spares_busy: bool
    """Whether a worker that holds a job is never removed."""

    def look(self, tiers: Mapping[str, Tier], now: float) -> Orders:
        """Decide."""


@dataclass(slots=True)
class Outcome:
    """What came of one run; ``waits`` in order of the trace, from arrival to the first start.

    ``expected``: what the routers expected these to be; empty where there is nothing to route.
    """

    waits: list[float]
    starts: list[float]
    replica_seconds: dict[str, float]
    killed: int
    changes: int
    series: list[tuple[float, int, int, int]] = field(default_factory=list)
    """Time, waiting, ready, ordered: at every look."""
    expected: list[float] = field(default_factory=list)


def run(trace: Trace, world: World, controller: Controller, on_progress: Callable[[int], None] | None = None) -> Outcome:
    """Play the trace to its last job, and on until the workers that it needed are gone."""
    return _Run(trace, world, controller).play(on_progress)


class _Run:
    def __init__(self, trace: Trace, world: World, controller: Controller) -> None:
        self.trace, self.world, self.controller = trace, world, controller
        self.rng = random.Random(world.seed)
        self.tiers = {setup.name: Tier(setup, trace.arrivals) for setup in world.tiers}
        self.first, self.last = self.tiers[world.tiers[0].name], self.tiers[world.tiers[-1].name]
        self.events: list[tuple[float, int, int, object]] = []
        self.sequence = 0
        self.now = 0.0
        self.look_at = float("inf")
        self.again_at = 0.0
        self.routed = len(self.tiers) > 1
        self.spilling = False
        self.outcome = Outcome([-1.0] * len(trace), [0.0] * len(trace), {}, 0, 0)
        self.open = len(trace)

    def play(self, on_progress: Callable[[int], None] | None) -> Outcome:
        arrivals = self.trace.arrivals
        for tier in self.tiers.values():
            for _ in range(tier.setup.initial):
                self._ready(self._order(tier))
            tier.desired = tier.setup.initial
        for outage in self.world.outages:
            self._at(outage.start, _OUTAGE, outage)
            self._at(outage.end, _RECOVERY, outage)
        self._look_by(0.0)
        index, count, events = 0, len(arrivals), self.events
        ends = float("inf")
        while (self.open or self.now < ends) and (events or index < count):
            if index < count and (not events or arrivals[index] <= events[0][0]):
                self.now = arrivals[index]
                self._arrive(index)
                index += 1
                if on_progress and index % 1000 == 0:
                    on_progress(index)
            else:
                self.now, _, kind, what = heapq.heappop(events)
                self._handle(kind, what)
                if not self.open:
                    ends = min(ends, self.now + TAIL_SECONDS) if any(tier.pods for tier in self.tiers.values()) else self.now
        return self._close()

    def _handle(self, kind: int, what: object) -> None:
        if kind == _FINISH:
            self._finish(*what)  # type: ignore[misc]
        elif kind == _LOOK:
            if what == self.look_at:
                self._look()
        elif kind == _READY:
            assert isinstance(what, Pod)
            if what.alive and not what.stuck:
                self._ready(what)
                self._changed()
        elif kind == _ACT:
            assert isinstance(what, Orders)
            self._act(what)
        elif kind == _LOST:
            self._recover(*what)  # type: ignore[misc]
        else:
            assert isinstance(what, Outage)
            self._outage(what, begins=kind == _OUTAGE)
            self._changed()

    def _at(self, when: float, kind: int, what: object) -> None:
        self.sequence += 1
        heapq.heappush(self.events, (when, self.sequence, kind, what))

    # Jobs.

    def _arrive(self, job: int) -> None:
        tier = self.first
        if self.routed:
            tier = self._route()
            if tier is not self.first:
                self.first.spilled += 1
        tier.arrived += 1
        tier.waiting.append(job)
        self._dispatch(tier)
        self._changed()

    def _route(self) -> Tier:
        """The library's own rule, or another one; all jobs are of one task."""
        if self.world.takes:
            return self.first if self.world.takes(self.first, self.last) else self.last
        loads = (_load(self.first, self.now, accelerated=True), _load(self.last, self.now, accelerated=False))
        verdict = routing.place(_CANDIDATES, loads, limit=None, spilling=self.spilling)
        if verdict.reason is routing.Reason.WAIT_TOO_LONG:
            self.spilling = True
        elif verdict.reason in (routing.Reason.FREE_SLOT, routing.Reason.WORTH_THE_WAIT):
            self.spilling = False
        self.outcome.expected.append(verdict.wait)
        return (self.first, self.last)[verdict.index]

    def _dispatch(self, tier: Tier) -> None:
        while tier.waiting and tier.idle:
            pod = tier.idle.popleft()
            if pod.alive and not pod.closing:
                self._start(tier, pod, tier.waiting.popleft())

    def _start(self, tier: Tier, pod: Pod, job: int) -> None:
        wait = self.now - self.trace.arrivals[job]
        if self.outcome.waits[job] < 0:
            self.outcome.waits[job] = wait
            self.outcome.starts[job] = self.now
        end = self.now + self.trace.services[job] * tier.setup.slowdown
        pod.jobs[job] = end
        tier.in_flight += 1
        self._at(end, _FINISH, (pod, job, end))

    def _finish(self, pod: Pod, job: int, end: float) -> None:
        if pod.jobs.get(job) != end:
            return
        tier = pod.tier
        del pod.jobs[job]
        tier.in_flight -= 1
        tier.finished += 1
        seconds = self.trace.services[job] * tier.setup.slowdown
        tier.served_seconds += seconds
        tier.served_squares += seconds * seconds
        if self.routed and tier is not self.first:
            self.first.spilled -= 1
        self.open -= 1
        if pod.closing:
            if not pod.jobs:
                self._remove(pod)
        else:
            tier.idle.append(pod)
            if tier.waiting:
                self._dispatch(tier)
        self._changed()

    # Workers.

    def _order(self, tier: Tier) -> Pod:
        pod = Pod(tier, f"{tier.name}-{self.sequence}", self.now)
        self.sequence += 1
        tier.pods.append(pod)
        tier.changed()
        if tier.down:
            pod.stuck = True
        return pod

    def _ready(self, pod: Pod) -> None:
        pod.ready_at = self.now
        pod.tier.changed()
        pod.tier.idle.extend([pod] * pod.tier.concurrency)
        self._dispatch(pod.tier)

    def _remove(self, pod: Pod) -> None:
        if not pod.alive:
            return
        pod.alive = False
        pod.tier.pods.remove(pod)
        pod.tier.changed()
        pod.tier.seconds += self.now - pod.ordered_at

    def _outage(self, outage: Outage, *, begins: bool) -> None:
        tier = self.tiers[outage.tier]
        tier.down = begins
        if not begins:
            for pod in tier.pods:
                pod.stuck = False
                self._at(self.now + tier.setup.start_seconds(self.rng), _READY, pod)
            tier.changed()
            return
        tier.ghosts = [pod for pod in tier.pods if pod.ready_at is not None]
        for pod in list(tier.pods):
            lost = list(pod.jobs)
            pod.jobs.clear()
            self._remove(pod)
            self._at(self.now + LOSS_SEEN_SECONDS, _LOST, (tier, lost))
        for _ in range(tier.desired):
            self._order(tier)

    def _recover(self, tier: Tier, jobs: Sequence[int]) -> None:
        """The jobs of a lost worker go to the last tier, ahead of what waits there."""
        tier.ghosts = []
        tier.in_flight -= len(jobs)
        to = self.last
        if to is not tier:
            self.first.spilled += len(jobs)
        to.waiting.extendleft(reversed(jobs))
        self._dispatch(to)
        self._changed()

    # The controller.

    def _changed(self) -> None:
        if self.controller.reacts and self.look_at > self.now + self.world.look_seconds:
            self._look_by(self.now)

    def _look_by(self, when: float) -> None:
        every = self.world.look_seconds
        at = max(-(-when // every) * every, 0.0)
        if at < self.look_at:
            self.look_at = at
            self._at(at, _LOOK, at)

    def _look(self) -> None:
        self.look_at = float("inf")
        orders = self.controller.look(self.tiers, self.now)
        if self.world.lag_seconds:
            self._at(self.now + self.world.lag_seconds, _ACT, orders)
        else:
            self._act(orders)
        first = self.first
        self.outcome.series.append((self.now, len(first.waiting), first.ready(), first.desired))
        self._look_by(max(orders.again_at, self.now + self.world.look_seconds))

    def _shift(self, transfer: Transfer) -> None:
        """The oldest go, and take the place that is theirs by age; jobs are numbered in order of arrival."""
        source, target = self.tiers[transfer.source], self.tiers[transfer.target]
        moved = [source.waiting.popleft() for _ in range(min(transfer.jobs, len(source.waiting)))]
        target.waiting = deque(merge(moved, target.waiting))
        target.arrived += len(moved)
        self.first.spilled += len(moved) if source is self.first else -len(moved)
        self._dispatch(target)

    def _act(self, orders: Orders) -> None:
        for name, replicas in orders.replicas.items():
            tier = self.tiers[name]
            if replicas != tier.desired:
                tier.changes += 1
                self._scale(tier, replicas)
        for name, capacity in orders.capacity.items():
            self.tiers[name].capacity = capacity
        for transfer in orders.transfers:
            self._shift(transfer)

    def _scale(self, tier: Tier, replicas: int) -> None:
        tier.desired = replicas
        tier.changed()
        staying = [pod for pod in tier.pods if not pod.closing]
        for _ in range(replicas - len(staying)):
            pod = self._order(tier)
            if not pod.stuck:
                self._at(self.now + tier.setup.start_seconds(self.rng), _READY, pod)
        if replicas < len(staying):
            self._shrink(staying, len(staying) - replicas)

    def _shrink(self, staying: list[Pod], surplus: int) -> None:
        """As a ReplicaSet chooses: what is not ready first, then by deletion cost where the rule sets it, then the newest."""
        spares = self.controller.spares_busy

        def order(pod: Pod) -> tuple[bool, int, float]:
            ready = pod.ready_at is not None
            return ready, len(pod.jobs) if spares else 0, -(pod.ready_at if pod.ready_at is not None else pod.ordered_at)

        for pod in sorted(staying, key=order)[:surplus]:
            pod.closing = True
            pod.tier.changed()
            if pod.jobs and not spares:
                self._kill(pod)
            elif not pod.jobs:
                self._remove(pod)

    def _kill(self, pod: Pod) -> None:
        """What does not end within the grace period goes back to the head of its queue."""
        tier = pod.tier
        cut = [job for job, end in pod.jobs.items() if end > self.now + GRACE_SECONDS]
        for job in cut:
            del pod.jobs[job]
            tier.waiting.appendleft(job)
        tier.killed += len(cut)
        tier.in_flight -= len(cut)
        if not pod.jobs:
            tier.seconds += GRACE_SECONDS if cut else 0.0
            self._remove(pod)
        self._dispatch(tier)

    def _close(self) -> Outcome:
        outcome = self.outcome
        for tier in self.tiers.values():
            alive = sum(self.now - pod.ordered_at for pod in tier.pods)
            outcome.replica_seconds[tier.name] = tier.seconds + alive
            outcome.killed += tier.killed
            outcome.changes += tier.changes
        return outcome


_CANDIDATES = routing.Candidates(
    (TierPolicy("first", "first", accelerated=True), TierPolicy("last", "last", accelerated=False)), 1
)


def _load(tier: Tier, now: float, *, accelerated: bool) -> routing.Load:
    ready = tier.concurrency * (tier.ready() + len(tier.ghosts))
    service = tier.served_seconds / tier.finished if tier.finished else None
    assumed = routing.assumed_seconds(accelerated=accelerated)
    load = routing.Load(len(tier.waiting), tier.in_flight, ready, service=service, assumed=assumed)
    return load.having(tier.capacity, Milliseconds(int(now * 1000)))

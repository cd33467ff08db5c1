"""What the pass needs of the world, as protocols; the adapters provide it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from workerpool_operator.model import Tier, WorkerPoolSpec
from workerpool_operator.observation import BrokerReading, Checkpoint, TierReplicas, Unavailable
from workerpool_operator.rebalancing import Transfer
from workerpool_operator.status import Event, Status
from workerpool_routing.wire import Capacity, Keyspace, Policy


@dataclass(frozen=True, slots=True)
class Pool:
    """One valid WorkerPool.

    Attributes:
        created_at: wall-clock seconds; of two pools on one queue, the older one keeps it.
        status: as last stored, so that a new operator goes on from there.
        unknown: fields of the spec that the stored CustomResourceDefinition does not have, so that the API server drops them.
        removed: tiers that were taken out of the spec and still have something where workers run.
        ceded: the queues of these that belong to another pool by now.
    """

    namespace: str
    name: str
    uid: str
    generation: int
    created_at: float
    spec: WorkerPoolSpec
    status: Mapping[str, Any] = field(default_factory=dict)
    unknown: Sequence[str] = ()
    removed: tuple[Tier, ...] = ()
    ceded: frozenset[str] = frozenset()

    @property
    def tiers(self) -> tuple[Tier, ...]:
        """Those of the spec, in order of preference, then the removed ones."""
        return *self.spec.tiers, *self.removed

    @property
    def id(self) -> str:
        """``namespace/name``."""
        return f"{self.namespace}/{self.name}"

    @property
    def keys(self) -> Keyspace:
        """The names of its keys on its broker."""
        broker = self.spec.broker
        return Keyspace(self.id, broker.global_key_prefix, broker.priority_steps)


class Urls(Protocol):
    """Where the broker URL of a pool comes from."""

    async def broker_url(self, pool: Pool) -> str | Unavailable:
        """The URL, with its password: never log it. For sentinels it contains the master's name (``Broker.address``)."""


@dataclass(frozen=True, slots=True)
class Marks:
    """Workers that are to take nothing new from now on, and workers that may again."""

    add: frozenset[str] = frozenset()
    remove: frozenset[str] = frozenset()


NO_MARKS = Marks()
NO_NEWS: Mapping[str, Checkpoint] = {}


class Broker(Protocol):
    """The Redis servers of all pools. No method raises if a broker is down."""

    async def read(self, url: str, pools: Sequence[Pool]) -> Mapping[str, BrokerReading | Unavailable] | Unavailable:
        """Read all pools of one broker in one pipeline, by pool id. A fault of one pool alone makes only that one unavailable."""

    async def publish(
        self,
        url: str,
        pool: Pool,
        policy: Policy,
        capacity: Capacity | None,
        marks: Marks = NO_MARKS,
        checkpoints: Mapping[str, Checkpoint] = NO_NEWS,
    ) -> Unavailable | None:
        """Tell API pods and workers what they may count on; say why not where the broker did not take it.

        Without a capacity the one before stands until it expires. Marks to drain and checkpoints that stay are kept from running
        out; ``checkpoints`` are those that changed, by tier name, for the next reading.
        """

    async def take_over(self, url: str, pool: Pool, tier: str, worker: str) -> list[str]:
        """Hand on every job that a lost worker held, as the ledger says; return a sentence for each."""

    async def sweep(self, url: str, pool: Pool) -> list[str]:
        """Find jobs that fell between two steps, so that no worker holds them; return a sentence for each."""

    async def rebalance(self, url: str, pool: Pool, policy: Policy, transfer: Transfer) -> int:
        """Move waiting jobs from one tier's queue to another's; return how many moved."""

    async def keep_only(self, pools: Sequence[tuple[str, Pool]]) -> None:
        """Close the connections to all brokers but those of these URLs and pools."""

    async def forget(self, url: str, pool: Pool) -> None:
        """Remove what was published for a pool that is gone."""


class Workers(Protocol):
    """Where workers run: Deployments, or local processes."""

    async def observe(self, pool: Pool) -> Mapping[str, TierReplicas] | Unavailable:
        """What runs now, by tier name."""

    async def scale(self, pool: Pool, replicas: Mapping[str, int], leaving: frozenset[str]) -> None:
        """Make every tier exist as its spec says, with that many replicas; write nothing if nothing has changed.

        Args:
            pool: the pool.
            replicas: by tier name. A tier that is left out stays as it is; a removed one that has none and shall have none goes.
            leaving: the workers that go if a count is lowered.
        """


@dataclass(frozen=True, slots=True)
class Report:
    """What one pass saw of a pool and decided; ``events`` are what has changed since the pass before."""

    pool: Pool
    status: Status
    reading: BrokerReading | Unavailable
    events: tuple[Event, ...] = ()


class Reporter(Protocol):
    """Where the outcome of a pass is shown; called for every pool after every pass."""

    async def report(self, report: Report) -> None:
        """Show it. Never raises for an outage of where it is shown."""

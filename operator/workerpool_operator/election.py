"""Which of several operators acts: the holder of a Lease, which it has to renew and which expires by itself.

Pure: times are seconds of the reader's own monotonic clock, never those written in the Lease, which come from another machine.
A holder counts from the moment before it asks for a renewal. Everybody else counts from the moment in which they see the renewal,
which is later, and waits longer. So the holder's time ends first, and no two hold the Lease at once.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

LEASE_SECONDS = 10.0
"""How long others wait after the last renewal that they saw: LeaseDuration in Kubernetes' own leader election."""

RENEW_DEADLINE_SECONDS = 8.0
"""How long the holder may begin requests, counted from before it asked for its last renewal: RenewDeadline in Kubernetes.

It is less than :data:`LEASE_SECONDS`, so that requests under way end within the Lease. One that takes longer than the difference
may still land after another operator has begun to act.
"""

RENEW_SECONDS = 2.5
"""The pause between two renewals: RetryPeriod in Kubernetes."""


@dataclass(frozen=True, slots=True)
class Lease:
    """A Lease as the API server holds it.

    Attributes:
        holder: who holds it; empty if it was given back.
        seconds: how long it lasts after a renewal.
        transitions: how often it has changed hands.
        version: its resource version, which every renewal changes.
    """

    holder: str
    seconds: float
    transitions: int
    version: str


@dataclass(frozen=True, slots=True)
class Sighting:
    """A Lease (None if there is none), and since when it has been seen unchanged."""

    lease: Lease | None
    since: float

    @property
    def free_at(self) -> float:
        """From when on the reader may take it."""
        if self.lease is None or not self.lease.holder:
            return self.since
        return self.since + self.lease.seconds


def look(before: Sighting | None, lease: Lease | None, now: float) -> Sighting:
    """What is known after the Lease was read again; if it is unchanged, the earlier sighting stands."""
    if before is not None and before.lease == lease:
        return before
    if lease is None and before is not None:
        # Somebody has deleted it, and its holder does not know yet.
        return Sighting(None, max(now, before.free_at))
    return Sighting(lease, now)


def parse(raw: Mapping[str, Any]) -> Lease:
    """Parse a ``coordination.k8s.io/v1`` Lease; one without a holder counts as given back."""
    spec = raw.get("spec") or {}
    return Lease(
        holder=spec.get("holderIdentity") or "",
        seconds=float(spec.get("leaseDurationSeconds") or LEASE_SECONDS),
        transitions=int(spec.get("leaseTransitions") or 0),
        version=raw["metadata"]["resourceVersion"],
    )

"""Who of several operators acts: a Lease that its holder renews and that ends by itself.

Pure: times are seconds of the reader's own monotonic clock, never those written in the Lease, which come from another machine.
A holder counts from before it asked for a renewal, everybody else from when they saw it: so a holder's lease is over first
by its own clock, and no two hold it at once.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

LEASE_SECONDS = 10.0
"""How long a holder that went silent keeps others waiting."""

TENURE_SECONDS = 8.0
"""How long after a renewal its holder may act; less than the lease, to give a request under way time to end."""

RENEW_SECONDS = 2.5


@dataclass(frozen=True, slots=True)
class Lease:
    """A Lease as the API server holds it.

    Attributes:
        holder: who holds it; empty once it was given back.
        seconds: how long it lasts after a renewal.
        transitions: how often it changed hands.
        version: the API server's, another one after every renewal.
    """

    holder: str
    seconds: float
    transitions: int
    version: str


@dataclass(frozen=True, slots=True)
class Sighting:
    """A Lease, None where there is none, and when it was first seen as it is."""

    lease: Lease | None
    since: float

    @property
    def free_at(self) -> float:
        """When whoever sees it may take it."""
        if self.lease is None or not self.lease.holder:
            return self.since
        return self.since + self.lease.seconds


def look(before: Sighting | None, lease: Lease | None, now: float) -> Sighting:
    """What is known after the Lease was read: what has not changed since the sighting before has been so since then."""
    if before is not None and before.lease == lease:
        return before
    if lease is None and before is not None:
        # Somebody deleted it, and whoever held it has not been told.
        return Sighting(None, max(now, before.free_at))
    return Sighting(lease, now)


def tenure_ends(asked_at: float) -> float:
    """Until when the holder may act whose last successful renewal was asked for at that time."""
    return asked_at + TENURE_SECONDS


def parse(raw: Mapping[str, Any]) -> Lease:
    """Read a ``coordination.k8s.io/v1`` Lease; what another client left out of it counts as given back."""
    spec = raw.get("spec") or {}
    return Lease(
        holder=spec.get("holderIdentity") or "",
        seconds=float(spec.get("leaseDurationSeconds") or LEASE_SECONDS),
        transitions=int(spec.get("leaseTransitions") or 0),
        version=raw["metadata"]["resourceVersion"],
    )

"""One operator's part in the election: it follows the Lease, takes it, renews it, and gives it back."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from datetime import UTC, datetime
from http import HTTPStatus
from typing import Any, NoReturn

from workerpool_operator.election import LEASE_SECONDS, RENEW_DEADLINE_SECONDS, RENEW_SECONDS, Lease, Sighting, look, parse
from workerpool_operator.kube.api import Api, ApiError, path_to

API_VERSION = "coordination.k8s.io/v1"

RETRY_SECONDS = 1.0
"""Between two tries, whatever failed."""

FOLLOW_SECONDS = 300
"""A watch that showed nothing for so long is begun anew."""

_LOG = logging.getLogger(__name__)


class Candidate:
    """Takes part in the election. Everything but :meth:`fence` is called inside the event loop.

    Args:
        api: a connection of its own, whose requests nothing else delays and no fence stops.
        namespace: of the Lease.
        name: of the Lease.
        identity: who this is, different from every other process.
        leave: ends the process at once; called with the reason where the lease is over while the process acts on it.
    """

    def __init__(self, api: Api, namespace: str, name: str, identity: str, leave: Callable[[str], NoReturn]) -> None:
        self._api = api
        self._namespace, self._name, self.identity = namespace, name, identity
        self._leave = leave
        self._seen: Sighting | None = None
        self._until = 0.0

    @property
    def leads(self) -> bool:
        """Whether this process may act now."""
        return time.monotonic() < self._until

    @property
    def follows(self) -> bool:
        """Whether it knows the Lease."""
        return self._seen is not None

    def fence(self) -> None:
        """Let nothing past whose lease is over: a process that was stopped for a while finds out here."""
        if not self.leads:
            self._leave("the lease is over and could not be renewed in time: another operator may act now")

    async def acquire(self) -> None:
        """Return once this process holds the lease; raise :class:`ApiError` where the API server refuses it for good."""
        while True:
            try:
                seen = await self._look()
                if time.monotonic() < seen.free_at:
                    await self._follow(seen)
                    seen = await self._look()
                if time.monotonic() >= seen.free_at and await self._take(seen.lease):
                    return
            except ApiError as error:
                if not error.passing:
                    raise
                _LOG.warning("the Lease %s/%s: %s", self._namespace, self._name, error)
            await asyncio.sleep(RETRY_SECONDS)

    async def keep(self) -> None:
        """Renew the lease until cancelled; leave where that fails for too long or another has it."""
        pause = RENEW_SECONDS
        while True:
            await asyncio.sleep(pause)
            self.fence()
            try:
                await self._renew()
                pause = RENEW_SECONDS
            except ApiError as error:
                _LOG.warning("the lease was not renewed, tried again in %.0f s: %s", RETRY_SECONDS, error)
                pause = RETRY_SECONDS

    async def release(self) -> None:
        """Give it back, so that another need not wait for its end; nothing may be written afterwards."""
        if not self.leads or self._seen is None or self._seen.lease is None:
            return
        self._until = 0.0
        given_back = {"holderIdentity": "", "leaseDurationSeconds": 1, "renewTime": _now()}
        try:
            # A renewal that was cut off may have been taken: the version that is known here would be an old one.
            lease = (await self._look()).lease
            if lease is not None and lease.holder == self.identity:
                await self._write(lease, given_back)
        except ApiError as error:
            _LOG.warning("the lease was not given back, it ends by itself: %s", error)

    async def _look(self) -> Sighting:
        try:
            lease = parse(await self._api.get(self._path()))
        except ApiError as error:
            if error.status != HTTPStatus.NOT_FOUND:
                raise
            lease = None
        return self._saw(lease)

    def _saw(self, lease: Lease | None) -> Sighting:
        if lease and (self._seen is None or self._seen.lease is None or self._seen.lease.holder != lease.holder):
            _LOG.info("the Lease %s/%s is held by %s", self._namespace, self._name, lease.holder or "nobody")
        self._seen = look(self._seen, lease, time.monotonic())
        return self._seen

    async def _follow(self, seen: Sighting) -> None:
        """Watch until the lease is free, or the watch ends."""
        loop = asyncio.get_running_loop()
        query = {"fieldSelector": f"metadata.name={self._name}", "resourceVersion": seen.lease.version if seen.lease else "0"}
        try:
            async with asyncio.timeout(seen.free_at - time.monotonic()) as patience:
                async for event in self._api.watch(path_to(API_VERSION, self._namespace, "leases"), FOLLOW_SECONDS, **query):
                    if event["type"] == "ERROR":
                        return
                    seen = self._saw(None if event["type"] == "DELETED" else parse(event["object"]))
                    patience.reschedule(loop.time() + max(0.0, seen.free_at - time.monotonic()))
        except TimeoutError:
            return

    async def _take(self, lease: Lease | None) -> bool:
        asked, now = time.monotonic(), _now()
        spec: dict[str, Any] = {
            "holderIdentity": self.identity,
            "leaseDurationSeconds": int(LEASE_SECONDS),
            "acquireTime": now,
            "renewTime": now,
            "leaseTransitions": lease.transitions + 1 if lease else 0,
        }
        try:
            if lease is None:
                body = {"apiVersion": API_VERSION, "kind": "Lease", "metadata": {"name": self._name}, "spec": spec}
                taken = parse(await self._api.post(path_to(API_VERSION, self._namespace, "leases"), body))
            else:
                taken = await self._write(lease, spec)
        except ApiError as error:
            if error.status == HTTPStatus.CONFLICT:
                return False  # another one was faster
            raise
        self._saw(taken)
        self._until = asked + RENEW_DEADLINE_SECONDS
        return True

    async def _renew(self) -> None:
        assert self._seen is not None
        lease = self._seen.lease
        assert lease is not None
        asked = time.monotonic()
        try:
            renewed = await self._write(lease, {"renewTime": _now()})
        except ApiError as error:
            if error.status not in {HTTPStatus.CONFLICT, HTTPStatus.NOT_FOUND}:
                raise
            current = (await self._look()).lease
            if current is None or current.holder != self.identity:
                self._leave(f"the lease is held by {current.holder if current else 'nobody'} now")
            raise  # an answer to a renewal got lost, or somebody edited it: again, with the version that was just read
        self._saw(renewed)
        self._until = asked + RENEW_DEADLINE_SECONDS

    async def _write(self, lease: Lease, spec: dict[str, Any]) -> Lease:
        """Change it if it is still as it was read."""
        body = {"metadata": {"resourceVersion": lease.version}, "spec": spec}
        return parse(await self._api.merge(self._path(), body))

    def _path(self) -> str:
        return path_to(API_VERSION, self._namespace, "leases", self._name)


def _now() -> str:
    """For people who read the Lease; nothing here goes by it."""
    return datetime.now(UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")

"""Broker URLs, from the resource or from the Secret that it names."""

from __future__ import annotations

import asyncio
import base64
import binascii
import hashlib
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from http import HTTPStatus

from workerpool_operator.kube.api import Api, ApiError, path_to
from workerpool_operator.model import BROKER_SCHEMES, SecretKeyRef
from workerpool_operator.observation import Unavailable
from workerpool_operator.ports import Pool

CACHE_SECONDS = 20.0
"""A changed Secret is seen after so long."""

RETRY_SECONDS = 5.0
"""A Secret that is missing or cannot be read is asked for this often."""

FORGET_SECONDS = 60.0
"""A URL that no pool has asked for so long is dropped."""

PATIENCE_SECONDS = 0.5
"""How long a pool whose URL is not known waits for the API server."""

_FIELD = "spec.broker.urlFrom"
_SCHEMES = f"{', '.join(BROKER_SCHEMES[:-1])} or {BROKER_SCHEMES[-1]}"


@dataclass(slots=True)
class _Known:
    url: str | Unavailable
    asked_at: float
    asking: asyncio.Task[None] | None = None
    marks: dict[str, str] = field(default_factory=dict)

    @property
    def life(self) -> float:
        return RETRY_SECONDS if isinstance(self.url, Unavailable) else CACHE_SECONDS


class KubeUrls:
    """The ``Urls`` port on Kubernetes. A URL that was read holds until the API server has another answer about its Secret."""

    def __init__(self, api: Api, clock: Callable[[], float] = time.monotonic) -> None:
        self._api = api
        self._clock = clock
        self._known: dict[tuple[str, SecretKeyRef], _Known] = {}
        self._marking = asyncio.Lock()

    async def broker_url(self, pool: Pool) -> str | Unavailable:
        """The URL, or what is wrong with the Secret and what to do."""
        broker = pool.spec.broker
        if broker.url_from is None:
            return broker.address(broker.url or "")
        reference = broker.url_from.secret_key_ref
        now = self._clock()
        self._known = {key: known for key, known in self._known.items() if now - known.asked_at < FORGET_SECONDS}
        unread = Unavailable(f"{_FIELD}: Secret {pool.namespace}/{reference.name} is still being read")
        known = self._known.setdefault((pool.namespace, reference), _Known(unread, now - CACHE_SECONDS))
        if now - known.asked_at >= known.life and (known.asking is None or known.asking.done()):
            known.asked_at = now
            known.asking = asyncio.create_task(self._ask(known, pool.namespace, reference))
        if isinstance(known.url, Unavailable) and known.asking:
            await asyncio.wait([known.asking], timeout=PATIENCE_SECONDS)
        if isinstance(known.url, Unavailable):
            return known.url
        if known.url.startswith("sentinel://") != (broker.master_name is not None):
            return Unavailable(
                f"{_FIELD}: Secret {pool.namespace}/{reference.name}: a sentinel:// URL needs spec.broker.masterName, "
                "and no other URL takes it"
            )
        url = known.url
        await self._make_mark(known, url, pool.uid)
        return broker.address(url)

    def mark(self, pool: Pool) -> str:
        """A fingerprint of the Secret's value, which does not reveal it; empty while the value is not known."""
        broker = pool.spec.broker
        if broker.url_from is None:
            return ""
        known = self._known.get((pool.namespace, broker.url_from.secret_key_ref))
        return "" if known is None or isinstance(known.url, Unavailable) else known.marks.get(pool.uid, "")

    async def _make_mark(self, known: _Known, url: str, uid: str) -> None:
        """Beside the event loop, which must be free to renew the lease, and one at a time: others need the threads too."""
        if uid in known.marks:
            return
        async with self._marking:
            mark = await asyncio.to_thread(_mark, url, uid)
        if known.url == url:
            known.marks[uid] = mark

    async def _ask(self, known: _Known, namespace: str, reference: SecretKeyRef) -> None:
        before = known.url
        try:
            known.url = await self._read(namespace, reference)
            if known.url != before:
                known.marks.clear()
        except ApiError as error:
            if isinstance(known.url, Unavailable):
                known.url = Unavailable(f"{_FIELD}: Secret {namespace}/{reference.name} could not be read: {error}")

    async def _read(self, namespace: str, reference: SecretKeyRef) -> str | Unavailable:
        """The API server's answer; raises :class:`ApiError` where it has none about this Secret."""
        secret = f"Secret {namespace}/{reference.name}"
        try:
            answer = await self._api.get(path_to("v1", namespace, "secrets", reference.name))
        except ApiError as error:
            match error.status:
                case HTTPStatus.NOT_FOUND:
                    return Unavailable(f"{_FIELD}: {secret} does not exist; create it with the key {reference.key}")
                case HTTPStatus.FORBIDDEN:
                    return Unavailable(f"{_FIELD}: the operator may not read {secret}; allow it to get this Secret")
                case _:
                    raise
        data = answer.get("data") or {}
        if reference.key not in data:
            there = ", ".join(sorted(data)) or "none"
            return Unavailable(f"{_FIELD}: {secret} has no key {reference.key}; its keys: {there}")
        return _decode(secret, reference.key, data[reference.key])


def _mark(url: str, salt: str) -> str:
    """Slow on purpose: whoever may read Deployments but no Secrets could otherwise try passwords until one fits."""
    return hashlib.scrypt(url.encode(), salt=salt.encode(), n=2**12, r=8, p=1, dklen=8).hex()


def _decode(secret: str, key: str, encoded: str) -> str | Unavailable:
    try:
        url = base64.b64decode(encoded).decode()
    except (binascii.Error, UnicodeDecodeError):
        return Unavailable(f"{_FIELD}: key {key} of {secret} is not text; it has to hold a URL of {_SCHEMES}")
    if not url.startswith(BROKER_SCHEMES) or url != url.strip():
        # The value itself holds a password, so it is not repeated.
        return Unavailable(
            f"{_FIELD}: key {key} of {secret} is not a URL; it has to begin with {_SCHEMES} and end without a new line"
        )
    return url

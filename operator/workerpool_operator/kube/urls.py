"""Broker URLs, from the resource or from the Secret that it names."""

from __future__ import annotations

import base64
import binascii
import time
from collections.abc import Callable
from http import HTTPStatus

from workerpool_operator.kube.api import Api, ApiError, path_to
from workerpool_operator.model import SecretKeyRef
from workerpool_operator.observation import Unavailable
from workerpool_operator.ports import Pool

CACHE_SECONDS = 5.0
"""A changed Secret is seen after so long, and a missing one asked for no more often."""

_FIELD = "spec.broker.urlFrom"


class KubeUrls:
    """The ``Urls`` port on Kubernetes."""

    def __init__(self, api: Api, clock: Callable[[], float] = time.monotonic) -> None:
        self._api = api
        self._clock = clock
        self._cache: dict[tuple[str, SecretKeyRef], tuple[float, str | Unavailable]] = {}

    async def broker_url(self, pool: Pool) -> str | Unavailable:
        """The URL, or what is wrong with the Secret and what to do."""
        broker = pool.spec.broker
        if broker.url_from is None:
            return broker.url or ""
        reference = broker.url_from.secret_key_ref
        now = self._clock()
        self._cache = {key: entry for key, entry in self._cache.items() if now - entry[0] < CACHE_SECONDS}
        if (pool.namespace, reference) not in self._cache:
            self._cache[pool.namespace, reference] = (now, await self._read(pool.namespace, reference))
        return self._cache[pool.namespace, reference][1]

    async def _read(self, namespace: str, reference: SecretKeyRef) -> str | Unavailable:
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
                    return Unavailable(f"{_FIELD}: {secret} could not be read: {error}")
        data = answer.get("data") or {}
        if reference.key not in data:
            there = ", ".join(sorted(data)) or "none"
            return Unavailable(f"{_FIELD}: {secret} has no key {reference.key}; its keys: {there}")
        return _decode(secret, reference.key, data[reference.key])


def _decode(secret: str, key: str, encoded: str) -> str | Unavailable:
    try:
        url = base64.b64decode(encoded).decode()
    except (binascii.Error, UnicodeDecodeError):
        return Unavailable(f"{_FIELD}: key {key} of {secret} is not text; it has to hold a redis:// or rediss:// URL")
    if not url.startswith(("redis://", "rediss://")) or url != url.strip():
        # The value itself holds a password, so it is not repeated.
        return Unavailable(
            f"{_FIELD}: key {key} of {secret} is not a URL; it has to begin with redis:// or rediss:// and end without a new line"
        )
    return url

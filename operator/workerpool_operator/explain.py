"""Finds what `workerpool explain` shows: the pool and its status where they are kept, and what Redis says now."""

from __future__ import annotations

import asyncio

from kubernetes.aio.config import ConfigException

from workerpool_operator.broker import RedisBroker
from workerpool_operator.explanation import Explanation
from workerpool_operator.kube.api import Api, ApiError, path_to
from workerpool_operator.kube.seen import Refused, worker_pool
from workerpool_operator.kube.urls import KubeUrls
from workerpool_operator.model import API_VERSION, PLURAL
from workerpool_operator.observation import Unavailable
from workerpool_operator.ports import Pool
from workerpool_operator.status import Status

SECRET_TRIES = 10
"""How often a Secret is asked for that is still being read: for five seconds."""

_NO_STATUS = (
    "in a cluster: no operator has told of it yet, does one run that watches its namespace? In a file: give the one that "
    "`workerpool dev` names, or what `kubectl get wp NAME -o yaml` prints"
)


class CannotExplain(Exception):
    """There is no such pool to be seen; the message says why, and what to do."""


async def stored(name: str) -> tuple[Pool, str | Unavailable]:
    """A WorkerPool as the API server of this pod's cluster, or of KUBECONFIG, has it, and where its broker is.

    Args:
        name: ``namespace/name``; a name alone is in the namespace ``default``.
    """
    namespace, _, own = name.rpartition("/")
    namespace = namespace or "default"
    try:
        api = await Api.connect()
    except ConfigException as error:
        message = f"no cluster to connect to: {error}; set KUBECONFIG, or give -f FILE with a WorkerPool and its status"
        raise CannotExplain(message) from error
    try:
        # A listing, because that is what the operator's own account may do.
        found = await api.get(path_to(API_VERSION, namespace, PLURAL), fieldSelector=f"metadata.name={own}")
        pools = [pool for raw in found["items"] if (pool := worker_pool(raw))]
        if not pools:
            raise CannotExplain(f"{api.host} has no WorkerPool {namespace}/{own}; kubectl get wp -A lists those that it has")
        (pool,) = pools
        if isinstance(pool, Refused):
            raise CannotExplain("\n".join([f"{namespace}/{own} is not a valid WorkerPool:", *map(str, pool.problems)]))
        return pool, await _url(api, pool)
    except ApiError as error:
        raise CannotExplain(f"{api.host} does not say anything of {namespace}/{own}: {error}") from error
    finally:
        await api.close()


async def _url(api: Api, pool: Pool) -> str | Unavailable:
    urls, tries = KubeUrls(api), 1
    while isinstance(url := await urls.broker_url(pool), Unavailable) and tries < SECRET_TRIES:
        tries += 1
    return url


async def explanation(pool: Pool, url: str | Unavailable) -> Explanation:
    """What is known of a pool now; a part that cannot be had says why, and the others are there."""
    try:
        status = Status.load(pool.status) or Unavailable(_NO_STATUS)
    except (TypeError, AttributeError) as error:
        raise CannotExplain(f"the status of {pool.id} is not as an operator writes it: {error}") from error
    if isinstance(url, Unavailable):
        return Explanation(pool, status, url, url)
    broker = RedisBroker(asyncio.Event())
    try:
        readings = await broker.read(url, [pool])
        reading = readings if isinstance(readings, Unavailable) else readings[pool.id]
        return Explanation(pool, status, reading, await broker.outlook(url, pool))
    finally:
        await broker.close()

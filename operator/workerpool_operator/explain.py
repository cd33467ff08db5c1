"""Gathers what ``workerpool explain`` shows: the pool and its status from the API server or a file, the rest from Redis.

``explain_view.py`` prints it.
"""

from __future__ import annotations

import asyncio

from kubernetes.aio.config import ConfigException

from workerpool_operator.broker import RedisBroker
from workerpool_operator.explain_view import Explanation
from workerpool_operator.kube.api import Api, ApiError, path_to
from workerpool_operator.kube.seen import Leaving, Refused, worker_pool
from workerpool_operator.kube.urls import KubeUrls
from workerpool_operator.model import API_VERSION, PLURAL
from workerpool_operator.observation import Unavailable
from workerpool_operator.ports import Pool
from workerpool_operator.status import Status

SECRET_TRIES = 10
"""How often to ask for a broker URL whose Secret is still being read: for about five seconds."""

_NO_STATUS = (
    "in a cluster: no operator has written one yet; is one running that watches its namespace? In a file: give the one that "
    "`workerpool dev` names, or what `kubectl get wp NAME -o yaml` prints"
)


class CannotExplain(Exception):
    """The pool cannot be found or read; the message says why, and what to do."""


async def look_up(name: str) -> tuple[Pool, str | Unavailable]:
    """Get a WorkerPool and its broker's URL from the API server of this pod's cluster, or of KUBECONFIG.

    Args:
        name: ``namespace/name``; a name alone is in the namespace ``default``.

    Raises:
        CannotExplain: there is no cluster, no such WorkerPool, or it is not valid.
    """
    namespace, _, own = name.rpartition("/")
    namespace = namespace or "default"
    try:
        api = await Api.connect()
    except ConfigException as error:
        message = f"no cluster to connect to: {error}; set KUBECONFIG, or give -f FILE with a WorkerPool and its status"
        raise CannotExplain(message) from error
    try:
        # A list of one, because the operator's own account may list WorkerPools and not get them.
        found = await api.get(path_to(API_VERSION, namespace, PLURAL), fieldSelector=f"metadata.name={own}")
        pools = [pool for raw in found["items"] if (pool := worker_pool(raw))]
        if not pools:
            raise CannotExplain(f"{api.host} has no WorkerPool {namespace}/{own}; kubectl get wp -A lists those that it has")
        (pool,) = pools
        if isinstance(pool, Refused):
            raise CannotExplain("\n".join([f"{namespace}/{own} is not a valid WorkerPool:", *map(str, pool.problems)]))
        if isinstance(pool, Leaving):
            raise CannotExplain(f"{namespace}/{own} is being deleted; its finalizers hold it: {', '.join(pool.finalizers)}")
        return pool, await _url(api, pool)
    except ApiError as error:
        raise CannotExplain(f"{api.host} did not return {namespace}/{own}: {error}") from error
    finally:
        await api.close()


async def _url(api: Api, pool: Pool) -> str | Unavailable:
    urls, tries = KubeUrls(api), 1
    while isinstance(url := await urls.broker_url(pool), Unavailable) and tries < SECRET_TRIES:
        tries += 1
    return url


async def gather(pool: Pool, url: str | Unavailable) -> Explanation:
    """Collect what is known of a pool now. A part that cannot be had says why; the others are there all the same.

    Raises:
        CannotExplain: the status was not written by an operator.
    """
    try:
        status = Status.load(pool.status) or Unavailable(_NO_STATUS)
    except (TypeError, AttributeError) as error:
        raise CannotExplain(f"the status of {pool.id} was not written by an operator: {error}") from error
    if isinstance(url, Unavailable):
        return Explanation(pool, status, url, url)
    broker = RedisBroker(asyncio.Event())
    try:
        readings = await broker.read(url, [pool])
        reading = readings if isinstance(readings, Unavailable) else readings[pool.id]
        return Explanation(pool, status, reading, await broker.dry_run(url, pool))
    finally:
        await broker.close()

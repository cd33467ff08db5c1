"""The operator as a process in a cluster: kopf watches, the reconcile pass decides, and this module only connects the two."""

from __future__ import annotations

import asyncio
import logging
import socket
import sys
from collections.abc import Iterator, Sequence
from http import HTTPStatus
from typing import Any

import kopf
from kubernetes.aio.config import ConfigException

from workerpool_operator.broker import RedisBroker
from workerpool_operator.kube.api import Api, ApiError
from workerpool_operator.kube.reporter import KubeReporter
from workerpool_operator.kube.seen import SELECTOR, Cache, Refused, Seen
from workerpool_operator.kube.urls import KubeUrls
from workerpool_operator.kube.workers import KubeWorkers
from workerpool_operator.model import API_VERSION, GROUP, PLURAL, VERSION
from workerpool_operator.observation import Unavailable
from workerpool_operator.ports import Pool
from workerpool_operator.reconcile import Reconciler

RELIST_SECONDS = 60.0
"""What a watch has missed is seen after so long."""

RETRY_SECONDS = 2.0

LAST_PASS_SECONDS = 3.0

logger = logging.getLogger(__name__)


class CannotStart(Exception):
    """The operator cannot work here; the message says what is missing and what to do."""


def run(namespaces: Sequence[str], *, health_port: int) -> None:
    """Run until SIGTERM or SIGINT; exit with one plain message where it cannot start.

    Args:
        namespaces: those whose WorkerPools are served; all when empty.
        health_port: where ``/healthz`` is served.
    """
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    for chatty in ("kopf", "aiohttp.access"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
    try:
        asyncio.run(_serve(namespaces, health_port))
    except CannotStart as error:
        sys.exit(f"workerpool: {error}")


async def _serve(namespaces: Sequence[str], health_port: int) -> None:
    try:
        api = await Api.connect()
    except ConfigException as error:
        raise CannotStart(f"no cluster to connect to: {error}; set KUBECONFIG, or run inside a cluster") from error
    try:
        _check_port(health_port)
        await _wait_for_resource(api)
        logger.info("serving the WorkerPools of %s at %s", ", ".join(namespaces) or "all namespaces", api.host)
        await Operator(api, namespaces).run(health_port)
    finally:
        await api.close()


def _check_port(port: int) -> None:
    """Look before kopf does, which would end in a traceback."""
    try:
        socket.create_server(("", port)).close()
    except OSError as error:
        raise CannotStart(f"port {port} for /healthz cannot be had: {error.strerror}; end what holds it") from error


async def _wait_for_resource(api: Api) -> None:
    """Wait out an outage; raise where the API server answers that it knows no WorkerPools."""
    while True:
        try:
            await api.get(f"/apis/{API_VERSION}")
            return
        except ApiError as error:
            if error.status == HTTPStatus.NOT_FOUND:
                raise CannotStart(f"{api.host} knows no WorkerPools; kubectl apply -f crds/workerpool.yaml") from error
            if not error.passing:
                raise CannotStart(f"{api.host} refuses: {error}") from error
            logger.warning("waiting for %s: %s", api.host, error)
            await asyncio.sleep(RETRY_SECONDS)


class Operator:
    """What is watched, handed to the reconcile pass. Made inside the event loop."""

    def __init__(self, api: Api, namespaces: Sequence[str]) -> None:
        self._api = api
        self._namespaces = namespaces
        self._wake = asyncio.Event()
        self._stop = asyncio.Event()
        self._seen = Seen()
        self._urls = KubeUrls(api)
        self._broker = RedisBroker(self._wake)
        self._workers = KubeWorkers(api, self._seen, self._holds_jobs)
        self._reporter = KubeReporter(api)
        self._reconciler = Reconciler(
            urls=self._urls, broker=self._broker, workers=self._workers, reporter=self._reporter, wake=self._wake
        )
        self._tasks: list[asyncio.Task[None]] = []

    async def run(self, health_port: int) -> None:
        """Serve until a signal stops it; raises what a task of its own died of."""
        await kopf.operator(
            registry=self._registry(),
            settings=_settings(),
            standalone=True,
            clusterwide=not self._namespaces,
            namespaces=self._namespaces,
            liveness_endpoint=f"http://0.0.0.0:{health_port}/healthz",
            stop_flag=self._stop,
        )
        for task in self._tasks:
            if not task.cancelled() and (error := task.exception()):
                raise error

    def _registry(self) -> kopf.OperatorRegistry:
        registry = kopf.OperatorRegistry()
        # kopf waits 5 s at its end for tasks that it does not know: ours start and end inside its own life.
        kopf.on.startup(registry=registry)(self._start)
        kopf.on.cleanup(registry=registry)(self._end)
        kopf.on.login(registry=registry)(kopf.login_via_client)
        kopf.on.event(GROUP, VERSION, PLURAL, registry=registry)(self._on_pool)
        kopf.on.event("apps", "v1", "deployments", registry=registry)(self._on_deployment)
        kopf.on.event("", "v1", "pods", registry=registry)(self._on_pod)
        return registry

    async def _start(self, **_: Any) -> None:
        for work in (self._reconciler.run(), self._keep_listing()):
            task = asyncio.create_task(work)
            task.add_done_callback(lambda _: self._stop.set())
            self._tasks.append(task)

    async def _end(self, **_: Any) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._broker.close()

    async def _on_pool(self, event: kopf.RawEvent, **_: Any) -> None:
        _take_in(self._seen.pools, event)
        if self._seen.complete:
            metadata = event["object"]["metadata"]
            await self._reflect(metadata["namespace"], metadata["name"])

    async def _on_deployment(self, event: kopf.RawEvent, **_: Any) -> None:
        _take_in(self._seen.deployments, event)
        self._wake.set()

    async def _on_pod(self, event: kopf.RawEvent, **_: Any) -> None:
        _take_in(self._seen.pods, event)
        self._wake.set()

    async def _keep_listing(self) -> None:
        while True:
            try:
                await self._seen.relist(self._api, self._namespaces)
            except ApiError as error:
                logger.warning("listing failed: %s", error)
            else:
                known = {(pool.namespace, pool.name) for pool in self._reconciler.pools.values()}
                for namespace, name in known.union(key for key, _ in self._seen.pools.items()):
                    try:
                        await self._reflect(namespace, name)
                    except Exception:
                        logger.exception("%s/%s: not taken in, the next listing tries again", namespace, name)
            await asyncio.sleep(RELIST_SECONDS if self._seen.complete else RETRY_SECONDS)

    async def _reflect(self, namespace: str, name: str) -> None:
        """Make the pass know a WorkerPool as it is stored now."""
        stored = self._seen.pools.get(namespace, name)
        known = self._reconciler.pools.pop(f"{namespace}/{name}", None)
        if known is not None and (stored is None or stored.uid != known.uid):
            await self._forget(known)
        if isinstance(stored, Pool):
            self._reconciler.pools[stored.id] = stored
            if known is None or (known.uid, known.generation) != (stored.uid, stored.generation):
                self._wake.set()
        elif isinstance(stored, Refused):
            await self._reporter.refuse(stored)

    async def _holds_jobs(self, pool: Pool, tier: str, queue: str) -> bool | Unavailable:
        url = await self._urls.broker_url(pool)
        return url if isinstance(url, Unavailable) else await self._broker.holds_jobs(url, pool, tier, queue)

    async def _forget(self, pool: Pool) -> None:
        """Clear up after a deleted WorkerPool; its Deployments go by their owner references."""
        self._workers.forget(pool)
        self._reporter.forget(pool.uid)
        url = await self._urls.broker_url(pool)
        if isinstance(url, str):
            # The pass that is under way may publish once more.
            await asyncio.sleep(LAST_PASS_SECONDS)
            await self._broker.forget(url, pool)
        else:
            logger.warning("%s is deleted, what it published stays in Redis: %s", pool.id, url.why)


def _take_in(cache: Cache[Any], event: kopf.RawEvent) -> None:
    if event["type"] == "DELETED":
        cache.drop(event["object"])
    else:
        cache.put(event["object"])


class _Backoffs:
    """Pauses without an end: kopf gives up, and the process with it, when they run out."""

    def __iter__(self) -> Iterator[float]:
        yield from (1, 2, 3, 5)
        while True:
            yield 10


def _settings() -> kopf.OperatorSettings:
    settings = kopf.OperatorSettings()
    settings.posting.enabled = False
    # Namespaces and kinds are given, so the operator needs no right to watch them.
    settings.scanning.disabled = True
    settings.networking.error_backoffs = _Backoffs()
    for kind in (("apps", "v1", "deployments"), ("", "v1", "pods")):
        settings.watching.label_selectors[kind] = SELECTOR
    return settings

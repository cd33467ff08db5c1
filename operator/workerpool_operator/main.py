"""The operator as a process in a cluster: kopf watches, the pass decides, and this module connects the two."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
import sys
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from http import HTTPStatus
from pathlib import Path
from typing import Any, NoReturn

import aiohttp
import kopf
from kubernetes.aio.config import ConfigException

from workerpool_operator.broker import RedisBroker
from workerpool_operator.endpoints import Endpoints
from workerpool_operator.kube.api import USER_AGENT, Api, ApiError
from workerpool_operator.kube.lease import Candidate
from workerpool_operator.kube.reporter import KubeReporter
from workerpool_operator.kube.seen import AUTOSCALERS, PAGE, SELECTOR, Cache, Leaving, Refused, Seen
from workerpool_operator.kube.urls import KubeUrls
from workerpool_operator.kube.workers import KubeWorkers
from workerpool_operator.metrics import Metrics
from workerpool_operator.model import API_VERSION, GROUP, PLURAL, VERSION
from workerpool_operator.ports import Pool, Report
from workerpool_operator.reconcile import Reconciler

RELIST_SECONDS = 60.0
"""How often everything is listed, so that an event that a watch has missed is noticed."""

RETRY_SECONDS = 2.0
"""Between two tries to reach the API server, or to list."""

LAST_PASS_SECONDS = 3.0
"""How long a pass that began before a pool was deleted may still write about it."""

LEASE_PATIENCE_SECONDS = 2.5
"""Time-out of one request about the Lease: several of them have to fit into the renew deadline."""

STUCK_SECONDS = 60.0
"""Without a pass for so long, the process is unhealthy."""

SILENT_SECONDS = 180.0
"""With a watch that has made no request for so long, the process is unhealthy: even without events one is made every 70 s."""

_OWN_NAMESPACE = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")

logger = logging.getLogger(__name__)


class CannotStart(Exception):
    """The operator cannot run here; the message says what is missing, and what to do."""


@dataclass(frozen=True, slots=True)
class Options:
    """The options of ``workerpool run``.

    Attributes:
        namespaces: those whose WorkerPools are served; empty for all.
        port: of ``/metrics``, ``/healthz`` and ``/readyz``.
        lease_name: of the Lease that elects the operator that acts.
        lease_namespace: the Lease's; None for the pod's own.
    """

    namespaces: Sequence[str]
    port: int
    lease_name: str
    lease_namespace: str | None = None


def run(options: Options) -> None:
    """Run until SIGTERM or SIGINT; exit with a one-line message if it cannot start."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    for chatty in ("kopf", "aiohttp.access"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
    try:
        asyncio.run(_serve(options))
    except CannotStart as error:
        sys.exit(f"workerpool: {error}")


async def _serve(options: Options) -> None:
    stop = asyncio.Event()
    for wanted in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(wanted, stop.set)
    try:
        elections = await Api.connect(patience=LEASE_PATIENCE_SECONDS)
    except ConfigException as error:
        raise CannotStart(f"no cluster to connect to: {error}; set KUBECONFIG, or run inside a cluster") from error
    candidate = Candidate(elections, options.lease_namespace or _own_namespace(), options.lease_name, _identity(), _leave)
    api = await Api.connect(candidate.fence)
    operator = Operator(api, options.namespaces, candidate)
    try:
        try:
            await operator.endpoints.open(options.port)
        except OSError as error:
            raise CannotStart(f"port {options.port} cannot be opened: {error.strerror}; choose another --port") from error
        if await _before(stop, _become_leader(api, candidate)):
            logger.info("serving the WorkerPools of %s at %s", ", ".join(options.namespaces) or "all namespaces", api.host)
            await _lead(operator, candidate)
    finally:
        await operator.endpoints.close()
        await api.close()
        await elections.close()


async def _before(stop: asyncio.Event, work: Any) -> bool:
    """Do some work, or cancel it when the process is told to stop; returns whether it was done."""
    task, stopped = asyncio.create_task(work), asyncio.create_task(stop.wait())
    await asyncio.wait((task, stopped), return_when=asyncio.FIRST_COMPLETED)
    if done := task.done():
        task.result()
    for either in (task, stopped):
        either.cancel()
        with suppress(asyncio.CancelledError):
            await either
    return done


async def _become_leader(api: Api, candidate: Candidate) -> None:
    await _wait_for_resource(api)
    try:
        await candidate.acquire()
    except ApiError as error:
        raise CannotStart(f"{api.host} refuses the Lease by which one of several operators acts: {error}") from error


async def _lead(operator: Operator, candidate: Candidate) -> None:
    keeping = asyncio.create_task(candidate.keep())
    try:
        await operator.run()
    finally:
        keeping.cancel()
        with suppress(asyncio.CancelledError):
            await keeping
        await candidate.release()


def _leave(why: str) -> NoReturn:
    """Exit on the spot, without cleaning up: another operator may be acting by now."""
    logger.critical("leaving: %s", why)
    os._exit(1)


def _identity() -> str:
    return f"{socket.gethostname()}_{uuid.uuid4().hex[:8]}"


def _own_namespace() -> str:
    return _OWN_NAMESPACE.read_text().strip() if _OWN_NAMESPACE.exists() else "default"


async def _wait_for_resource(api: Api) -> None:
    """Wait until the API server answers; raise if it does not know WorkerPools."""
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


_WATCHED = (PLURAL, "deployments", "pods", AUTOSCALERS)


class Operator:
    """Hands what the watches see to the pass. To be created inside the event loop.

    Attributes:
        endpoints: its HTTP server. Whoever creates the operator opens it; :meth:`run` closes it in the end.
    """

    def __init__(self, api: Api, namespaces: Sequence[str], candidate: Candidate) -> None:
        self._api = api
        self._namespaces = namespaces
        self._candidate = candidate
        self._wake = asyncio.Event()
        self._stop = asyncio.Event()
        self._seen = Seen()
        self._urls = KubeUrls(api)
        self._broker = RedisBroker(self._wake, candidate.fence)
        self._workers = KubeWorkers(api, self._seen, self._urls.mark)
        self._reporter = KubeReporter(api)
        self._reconciler = Reconciler(urls=self._urls, broker=self._broker, workers=self._workers, reporter=self, wake=self._wake)
        self._metrics = Metrics(
            lambda: candidate.leads, lambda: self._reconciler.passes, lambda: self._reconciler.pools, self._unserved
        )
        self.endpoints = Endpoints(self._metrics, self.unhealthy, self.unready)
        self._tasks: list[asyncio.Task[None]] = []
        self._watched: dict[str, float] = {}
        self._began: float | None = None

    async def run(self) -> None:
        """Serve until a signal stops it; raises the error that one of its own tasks died of."""
        self._began = time.monotonic()
        await kopf.operator(
            registry=self._registry(),
            settings=_settings(),
            standalone=True,
            # Otherwise kopf looks up the user's name, and a container's user has none.
            identity=socket.gethostname(),  # type: ignore[arg-type]  # a private type of kopf's
            clusterwide=not self._namespaces,
            namespaces=self._namespaces,
            stop_flag=self._stop,
        )
        for task in self._tasks:
            if not task.cancelled() and (error := task.exception()):
                raise error

    async def report(self, report: Report) -> None:
        """Show the outcome of a pass: in the metrics, the status, Events and the log."""
        self._metrics.saw(report)
        await self._reporter.report(report)

    def unhealthy(self) -> str:
        """Why the process should be restarted; empty if it should not. An outage of another system is never a reason."""
        if self._began is None:
            return ""
        now = time.monotonic()
        if (silence := now - (self._reconciler.passes.last_ended_at or self._began)) > STUCK_SECONDS:
            return f"no pass has ended for {silence:.0f} s"
        for kind in _WATCHED:
            if (silence := now - self._watched.get(kind, self._began)) > SILENT_SECONDS:
                return f"the watch of {kind} has done nothing for {silence:.0f} s"
        return ""

    def unready(self) -> str:
        """Why it cannot do its work yet, or, as a standby, not take over at once; empty if it can."""
        if self._began is None:
            return "" if self._candidate.follows else "the Lease is not known yet"
        return "" if self._seen.complete else "the first listing is not complete"

    def _unserved(self) -> list[str]:
        return [f"{namespace}/{name}" for (namespace, name), stored in self._seen.pools.items() if not isinstance(stored, Pool)]

    def _registry(self) -> kopf.OperatorRegistry:
        registry = kopf.OperatorRegistry()
        # In the end kopf waits 5 s for tasks that it does not know, so ours start and end within its own life.
        kopf.on.startup(registry=registry)(self._start)
        kopf.on.cleanup(registry=registry)(self._end)
        kopf.on.login(registry=registry)(self._log_in)
        kopf.on.event(GROUP, VERSION, PLURAL, registry=registry)(self._on_pool)
        kopf.on.event("apps", "v1", "deployments", registry=registry)(self._on_deployment)
        kopf.on.event("", "v1", "pods", registry=registry)(self._on_pod)
        kopf.on.event("autoscaling", "v2", AUTOSCALERS, registry=registry)(self._on_autoscaler)
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
        await self.endpoints.close()

    async def _log_in(self, **details: Any) -> kopf.AiohttpSession | None:
        """Log in as kopf does, with our own user agent, and note when its watches make requests."""
        info = kopf.login_via_client(**details)
        if info is None:
            return None
        trace = aiohttp.TraceConfig()
        trace.on_request_start.append(self._on_request)
        session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, ssl=info.as_ssl_context()),
            headers={**info.as_http_headers(), "User-Agent": USER_AGENT},
            trace_configs=[trace],
        )
        return kopf.AiohttpSession(server=info.server, aiohttp_session=session)

    async def _on_request(self, _: Any, __: Any, request: aiohttp.TraceRequestStartParams) -> None:
        self._watched[request.url.name] = time.monotonic()

    async def _on_pool(self, event: kopf.RawEvent, **_: Any) -> None:
        self._watched[PLURAL] = time.monotonic()
        _take_in(self._seen.pools, event)
        if self._seen.complete:
            metadata = event["object"]["metadata"]
            await self._reflect(metadata["namespace"], metadata["name"])

    async def _on_deployment(self, event: kopf.RawEvent, **_: Any) -> None:
        self._watched["deployments"] = time.monotonic()
        _take_in(self._seen.deployments, event)
        metadata: Any = event["object"]["metadata"]
        for owner in metadata.get("ownerReferences") or ():
            if pool := self._reconciler.pools.get(f"{metadata['namespace']}/{owner['name']}"):
                self._reconciler.pools[pool.id] = replace(pool, removed=self._workers.removed(pool))
        self._wake.set()

    async def _on_pod(self, event: kopf.RawEvent, **_: Any) -> None:
        self._watched["pods"] = time.monotonic()
        _take_in(self._seen.pods, event)
        self._wake.set()

    async def _on_autoscaler(self, event: kopf.RawEvent, **_: Any) -> None:
        self._watched[AUTOSCALERS] = time.monotonic()
        _take_in(self._seen.autoscalers, event)
        self._wake.set()

    async def _keep_listing(self) -> None:
        while True:
            try:
                await self._seen.relist(self._api, self._namespaces)
            except ApiError as error:
                logger.warning("listing failed, what was seen before holds, and the next one tries again: %s", error)
            except Exception:
                logger.exception("listing failed, the next one tries again")
            else:
                known = {(pool.namespace, pool.name) for pool in self._reconciler.pools.values()}
                for namespace, name in known.union(key for key, _ in self._seen.pools.items()):
                    try:
                        await self._reflect(namespace, name)
                    except Exception:
                        logger.exception("%s/%s: could not be processed, the next listing tries again", namespace, name)
            await asyncio.sleep(RELIST_SECONDS if self._seen.complete else RETRY_SECONDS)

    async def _reflect(self, namespace: str, name: str) -> None:
        """Tell the pass about a WorkerPool as it is stored now."""
        stored = self._seen.pools.get(namespace, name)
        known = self._reconciler.pools.pop(f"{namespace}/{name}", None)
        if known is not None and (stored is None or isinstance(stored, Leaving) or stored.uid != known.uid):
            await self._forget(known)
        if isinstance(stored, Pool):
            self._reconciler.pools[stored.id] = replace(stored, removed=self._workers.removed(stored))
            if known is None or (known.uid, known.generation) != (stored.uid, stored.generation):
                self._wake.set()
        elif isinstance(stored, Refused):
            await self._reporter.refuse(stored)
        elif isinstance(stored, Leaving):
            await self._reporter.take_leave(stored)

    async def _forget(self, pool: Pool) -> None:
        """Clean up after a deleted WorkerPool; its Deployments are deleted by their owner references."""
        self._workers.forget(pool)
        self._reporter.forget(pool.uid)
        url = await self._urls.broker_url(pool)
        if isinstance(url, str):
            # The pass that is under way may publish once more.
            await asyncio.sleep(LAST_PASS_SECONDS)
            if pool.id not in self._reconciler.pools:  # else it was made anew, and what is there is the new one's
                await self._broker.forget(url, pool)
        else:
            logger.warning("%s is deleted, but what was published for it stays in Redis: %s", pool.id, url.why)


def _take_in(cache: Cache[Any], event: kopf.RawEvent) -> None:
    if event["type"] == "DELETED":
        cache.drop(event["object"])
    else:
        cache.put(event["object"])


class _Backoffs:
    """Pauses without an end: when a finite list runs out, kopf gives up, and the process with it."""

    def __iter__(self) -> Iterator[float]:
        yield from (1, 2, 3, 5)
        while True:
            yield 10


def _settings() -> kopf.OperatorSettings:
    settings = kopf.OperatorSettings()
    settings.posting.enabled = False
    # Namespaces and kinds are given, so kopf need not scan for them, and the operator needs no right to.
    settings.scanning.disabled = True
    settings.networking.error_backoffs = _Backoffs()
    settings.watching.chunk_size = PAGE
    for kind in (("apps", "v1", "deployments"), ("", "v1", "pods")):
        settings.watching.label_selectors[kind] = SELECTOR
    return settings

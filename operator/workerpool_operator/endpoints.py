"""The operator's HTTP endpoints: ``/metrics`` for Prometheus, ``/healthz`` and ``/readyz`` for the kubelet."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from aiohttp import web
from prometheus_client import CollectorRegistry
from prometheus_client.aiohttp import make_aiohttp_handler
from prometheus_client.registry import Collector

_CLOSING_SECONDS = 0.5


class Endpoints:
    """The HTTP server, from :meth:`open` to :meth:`close`.

    Args:
        collector: what ``/metrics`` shows.
        unhealthy: why the process should be restarted; empty if it should not.
        unready: why it cannot do its work yet; empty if it can.
    """

    def __init__(self, collector: Collector, unhealthy: Callable[[], str], unready: Callable[[], str]) -> None:
        registry = CollectorRegistry()
        registry.register(collector)
        application = web.Application()
        application.router.add_get("/metrics", make_aiohttp_handler(registry))
        application.router.add_get("/healthz", _probe(unhealthy))
        application.router.add_get("/readyz", _probe(unready))
        self._runner = web.AppRunner(application, access_log=None, shutdown_timeout=_CLOSING_SECONDS)

    async def open(self, port: int) -> None:
        """Listen on every address; raises OSError if the port cannot be opened."""
        await self._runner.setup()
        await web.TCPSite(self._runner, port=port).start()

    async def close(self) -> None:
        """Stop listening and close the connections; a second call does nothing."""
        await self._runner.cleanup()


def _probe(complaint: Callable[[], str]) -> Callable[[web.Request], Awaitable[web.Response]]:
    async def answer(_: web.Request) -> web.Response:
        text = complaint()
        return web.Response(text=f"{text or 'ok'}\n", status=503 if text else 200)

    return answer

"""A proxy before the real API server: it counts requests, and answers some of them as an API server in trouble would."""

from __future__ import annotations

import asyncio
import base64
import json
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import aiohttp
from aiohttp import web


@dataclass(frozen=True, slots=True)
class Request:
    """One request that arrived; ``at`` is monotonic seconds."""

    at: float
    method: str
    path: str
    agent: str
    watches: bool = False


@dataclass(slots=True)
class Proxy:
    """Plain HTTP on loopback before an API server.

    Attributes:
        url: where it listens.
        requests: all that arrived.
        trouble: the status, and a Retry-After, that a request gets in place of an answer; None for the answer.
        delay: seconds before each answer.
    """

    server: str
    url: str = ""
    requests: list[Request] = field(default_factory=list)
    trouble: Callable[[Request], tuple[int, str] | None] = lambda _: None
    delay: float = 0.0

    def since(self, at: float) -> list[Request]:
        """The requests from then on."""
        return [request for request in list(self.requests) if request.at >= at]

    async def handle(self, session: aiohttp.ClientSession, incoming: web.Request) -> web.StreamResponse:
        agent, watches = incoming.headers.get("User-Agent", ""), "watch" in incoming.query
        seen = Request(time.monotonic(), incoming.method, incoming.rel_url.path, agent, watches)
        self.requests.append(seen)
        await asyncio.sleep(self.delay)
        if trouble := self.trouble(seen):
            status, after = trouble
            return web.Response(status=status, headers={"Retry-After": after} if after else {}, text="out of order")
        headers = {name: value for name, value in incoming.headers.items() if name not in {"Host", "Accept-Encoding"}}
        url = f"{self.server}{incoming.rel_url}"
        try:
            async with session.request(incoming.method, url, headers=headers, data=await incoming.read() or None) as answer:
                response = web.StreamResponse(status=answer.status, headers={"Content-Type": answer.headers["Content-Type"]})
                await response.prepare(incoming)
                async for chunk in answer.content.iter_any():
                    await response.write(chunk)
                return response
        except aiohttp.ClientConnectionError:
            return web.Response(status=502, text="the API server is gone")


@contextmanager
def proxy(kubeconfig: Path, to: Path) -> Iterator[Proxy]:
    """A proxy before the API server of a kubeconfig; ``to`` becomes the same kubeconfig with the proxy in it."""
    login = json.loads(kubeconfig.read_text())
    cluster = login["clusters"][0]["cluster"]
    proxy = Proxy(cluster["server"])
    trust = ssl.create_default_context(cadata=base64.b64decode(cluster["certificate-authority-data"]).decode())
    ready = threading.Event()
    stop = asyncio.Event()
    loop: asyncio.AbstractEventLoop

    async def serve() -> None:
        nonlocal loop
        loop = asyncio.get_running_loop()
        timeout = aiohttp.ClientTimeout(total=None)
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0, ssl=trust), timeout=timeout) as session:
            application = web.Application()
            application.router.add_route("*", "/{path:.*}", partial(proxy.handle, session))
            runner = web.AppRunner(application, access_log=None, shutdown_timeout=0.1)
            await runner.setup()
            site = web.TCPSite(runner, "127.0.0.1", 0)
            await site.start()
            host, port = runner.addresses[0][:2]
            proxy.url = f"http://{host}:{port}"
            ready.set()
            await stop.wait()
            await runner.cleanup()

    thread = threading.Thread(target=lambda: asyncio.run(serve()), daemon=True)
    thread.start()
    assert ready.wait(60)
    login["clusters"][0]["cluster"] = {"server": proxy.url}
    to.write_text(json.dumps(login))
    try:
        yield proxy
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join(10)

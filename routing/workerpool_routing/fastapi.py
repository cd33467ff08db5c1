"""For FastAPI apps: a status endpoint, and HTTP answers for the exceptions of :meth:`WorkerPool.submit`."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, FastAPI, Request
from fastapi.responses import JSONResponse

from workerpool_routing.errors import Overloaded, PoolUnavailable
from workerpool_routing.pool import WorkerPool

RETRY_AFTER_SECONDS = 5
"""``Retry-After`` while Redis is unavailable."""


def router(pool: WorkerPool) -> APIRouter:
    """``GET /api/v1/status/workers``: :meth:`WorkerPool.status`, read on a thread."""
    routes = APIRouter()

    @routes.get("/api/v1/status/workers")
    def workers() -> dict[str, Any]:
        """Workers, queues, and whether a GPU worker has a free slot."""
        return pool.status()

    return routes


def add_exception_handlers(api: FastAPI) -> None:
    """Answer :class:`Overloaded` with 429 and :class:`PoolUnavailable` with 503.

    Both have a header ``Retry-After`` and a JSON body with ``detail`` and ``reason``.
    """

    @api.exception_handler(Overloaded)
    async def overloaded(_: Request, error: Overloaded) -> JSONResponse:
        return _answer(429, str(error), error.reason, error.retry_after)

    @api.exception_handler(PoolUnavailable)
    async def unavailable(_: Request, __: PoolUnavailable) -> JSONResponse:
        # The error's own text names hosts and ports, which clients need not know.
        return _answer(503, "Redis, which is the queue, cannot take a job now", "PoolUnavailable", RETRY_AFTER_SECONDS)


def _answer(status: int, detail: str, reason: str, retry_after: int) -> JSONResponse:
    return JSONResponse({"detail": detail, "reason": reason}, status_code=status, headers={"Retry-After": str(retry_after)})

"""What a FastAPI app plugs in: a status endpoint, and HTTP answers for what :meth:`WorkerPool.submit` raises."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, FastAPI, Request
from fastapi.responses import JSONResponse

from workerpool_routing.errors import Overloaded, PoolUnavailable
from workerpool_routing.pool import WorkerPool

RETRY_AFTER_SECONDS = 5
"""When to come back after an outage of Redis."""


def router(pool: WorkerPool) -> APIRouter:
    """``GET /api/v1/status/workers``: :meth:`WorkerPool.status`, read on a thread."""
    routes = APIRouter()

    @routes.get("/api/v1/status/workers")
    def workers() -> dict[str, Any]:
        """Who works, what waits, and whether a GPU is free."""
        return pool.status()

    return routes


def add_exception_handlers(api: FastAPI) -> None:
    """Answer :class:`Overloaded` with 429 and :class:`PoolUnavailable` with 503, both with ``Retry-After`` and a JSON body of
    ``detail`` and ``reason``.
    """

    @api.exception_handler(Overloaded)
    async def overloaded(_: Request, error: Overloaded) -> JSONResponse:
        return _answer(429, str(error), error.reason, error.retry_after)

    @api.exception_handler(PoolUnavailable)
    async def unavailable(_: Request, __: PoolUnavailable) -> JSONResponse:
        # What the error says names hosts and ports: that is for the log.
        return _answer(503, "Redis, which is the queue, cannot take a job now", "PoolUnavailable", RETRY_AFTER_SECONDS)


def _answer(status: int, detail: str, reason: str, retry_after: int) -> JSONResponse:
    return JSONResponse({"detail": detail, "reason": reason}, status_code=status, headers={"Retry-After": str(retry_after)})

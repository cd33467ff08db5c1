"""The HTTP side of the media service: takes files in, lets the pool choose the tier, shows what became of each job.

CELERY_BROKER_URL=redis://… MEDIA_DIR=/shared/media uvicorn examples.media.api:api
"""

from __future__ import annotations

import hashlib
import os
import time
from dataclasses import asdict
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Annotated, Any, Literal

from examples.media.kinds import KINDS, MAX_BYTES, Kind, kind_of
from examples.media.tasks import TASKS, app, pool
from fastapi import FastAPI, Form, Header, HTTPException, Request, UploadFile
from fastapi.responses import JSONResponse
from pydantic import BaseModel, Json

from workerpool_routing.errors import NoAcceleratedTier
from workerpool_routing.fastapi import add_exception_handlers, router

MEDIA_DIR = Path(os.environ.get("MEDIA_DIR", "media-files")).absolute()

api = FastAPI(title="media")
api.include_router(router(pool))
add_exception_handlers(api)


class Accepted(BaseModel):
    """The answer to an upload; ``decision_ms`` is how long the pool took to decide and to queue the job."""

    task_id: str
    tier: str | None
    reason: str
    message: str
    content_type: Kind
    expected_wait: float | None
    decision_ms: float


class Task(BaseModel):
    """A job as the pool's ledger has it; ``starts`` counts per tier."""

    task_id: str
    state: str
    tier: str
    wanted: str
    reason: str
    attempt: int
    starts: dict[str, int]
    result: Any = None


@api.exception_handler(NoAcceleratedTier)
async def no_gpu(_: Request, error: NoAcceleratedTier) -> JSONResponse:
    """The client requires what this pool does not have: asking again would not help."""
    return JSONResponse({"detail": f"gpu: {error}"}, status_code=422)


@api.post("/process/file", status_code=202)
def process_file(
    file: UploadFile,
    source_type: Annotated[str | None, Form()] = None,
    gpu: Annotated[Literal["true", "false", "required"], Form()] = "false",
    metadata: Annotated[Json[dict[str, Any]] | None, Form()] = None,
    deadline: Annotated[float | None, Form(ge=0)] = None,
    idempotency_key: Annotated[str | None, Header(max_length=200)] = None,
) -> Accepted:
    """Store the file and queue its analysis; ``source_type`` is told from the file when it is not given.

    ``deadline``: seconds within which the analysis has to start; 429 when no tier can. The header ``Idempotency-Key`` makes
    a repeated upload the same task.
    """
    if (file.size or 0) > MAX_BYTES:
        raise HTTPException(413, f"file: larger than {MAX_BYTES // 1024 // 1024} MiB")
    kind = _kind(file, source_type)
    path = _store(file)
    started = time.perf_counter()
    decision = pool.submit(
        TASKS[kind],
        args=(str(path), metadata or {}),
        accelerated="required" if gpu == "required" else gpu == "true",
        content_type=kind,
        deadline=deadline,
        idempotency_key=idempotency_key,
    )
    decision_ms = (time.perf_counter() - started) * 1000
    return Accepted(**asdict(decision), content_type=kind, decision_ms=decision_ms)


@api.get("/tasks/{task_id}")
def task(task_id: str) -> Task:
    """Where the job is, and its result once it has ended."""
    job = pool.job(task_id)
    if job is None:
        raise HTTPException(404, f"no task {task_id!r}: never submitted here, or forgotten an hour after its end")
    result = app.AsyncResult(task_id).result if job.state.ended else None
    return Task(**asdict(job), result=str(result) if isinstance(result, Exception) else result)


def _kind(file: UploadFile, source_type: str | None) -> Kind:
    found = kind_of(file.file)
    if found is None or source_type not in (None, found):
        given = f"source_type says {source_type!r}, the file" if source_type else "the file"
        seen = f"holds {found}" if found else "is neither"
        raise HTTPException(415, f"{given} {seen}; accepted: {', '.join(KINDS)}")
    return found


def _store(file: UploadFile) -> Path:
    """Keep the file under the hash of its content: a name that no client can choose."""
    MEDIA_DIR.mkdir(parents=True, exist_ok=True)
    digest = hashlib.sha256()
    with NamedTemporaryFile(dir=MEDIA_DIR, delete=False) as partial:
        while block := file.file.read(1 << 20):
            digest.update(block)
            partial.write(block)
    return Path(partial.name).rename(MEDIA_DIR / digest.hexdigest())

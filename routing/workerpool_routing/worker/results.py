"""Results that are stored in one step with the end of their attempt, where Celery keeps them in the Redis of the ledger."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from celery import states
from celery.backends.redis import RedisBackend

from workerpool_routing.ledger import Result

if TYPE_CHECKING:
    from celery import Task

_SERVER = ("host", "port", "path", "username", "credential_provider")


def beside_ledger(task: Task, value: Any, ledger: Any) -> Result | None:
    """What Celery would store of the running task that has returned ``value``; None where it has to do that itself.

    It has to when the result is ignored, when callbacks go out first, and when the backend is another one.

    Args:
        task: the task, in the request that it runs in.
        value: what its author's code returned.
        ledger: the redis-py client of the ledger.

    Raises:
        EncodeError: it cannot be stored, which Celery makes a failure.
    """
    request, backend = task.request, task.backend
    ignored = task.ignore_result or request.ignore_result
    if ignored or request.callbacks or request.chain or not _one_server(backend, ledger):
        return None
    meta = backend._get_result_meta(  # noqa: SLF001 as Celery stores it
        result=backend.encode_result(value, states.SUCCESS), state=states.SUCCESS, traceback=None, request=request
    )
    stored = backend.encode({**meta, "task_id": request.id})
    own, database = int(_parameters(ledger).get("db") or 0), int(backend.connparams["db"])
    return Result(backend.get_key_for_task(request.id), stored, int(backend.expires or 0), None if database == own else database)


def _one_server(backend: Any, ledger: Any) -> bool:
    """Whether one script reaches both; an author's own kind of backend stores in its own way."""
    if type(backend) is not RedisBackend:
        return False
    here = _parameters(ledger)
    return all(here.get(name) == backend.connparams.get(name) for name in _SERVER)


def _parameters(ledger: Any) -> Mapping[str, Any]:
    """How its connections are made."""
    parameters: Mapping[str, Any] = ledger.connection_pool.connection_kwargs
    return parameters

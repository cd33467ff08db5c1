"""Results that the ledger's script stores in one step with the end of the attempt.

This is possible if the app's result backend is Celery's own for Redis, on the ledger's server.
"""

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
    """The result as Celery would store it for the running task; None if Celery has to deal with it itself.

    That is so if the result is ignored, if callbacks or a chain have to go out first, and with any other backend.

    Args:
        task: the task, within its request.
        value: what the task's code has returned.
        ledger: the redis-py client of the ledger.

    Raises:
        EncodeError: ``value`` cannot be encoded; Celery then stores a failure.
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
    """Whether one script reaches both. A subclass of the backend may store in its own way, so it does not count."""
    if type(backend) is not RedisBackend:
        return False
    here = _parameters(ledger)
    return all(here.get(name) == backend.connparams.get(name) for name in _SERVER)


def _parameters(ledger: Any) -> Mapping[str, Any]:
    """The parameters of the client's connections."""
    parameters: Mapping[str, Any] = ledger.connection_pool.connection_kwargs
    return parameters

"""Which results are stored with the end of their attempt: those that Celery would keep in the ledger's own Redis, as it would."""

from __future__ import annotations

import json
from typing import Any

import pytest
from celery import Celery
from celery.backends.redis import RedisBackend
from kombu.exceptions import EncodeError
from redis import Redis

from workerpool_routing.ledger import Result
from workerpool_routing.worker.results import beside_ledger

pytestmark = pytest.mark.unit

LEDGER = Redis("redis.test", 6379, 0)
BACKEND = "redis://redis.test:6379/5"


class OwnBackend(RedisBackend):  # type: ignore[misc]
    """An author's own."""


def stored(backend: Any = BACKEND, value: Any = 3, *, ledger: Any = LEDGER, conf: Any = None, **request: Any) -> Result | None:
    with Celery("tasks", broker="redis://redis.test/0", backend=backend, set_as_current=False) as app:
        app.conf.update(conf or {})
        task = app.task(_work, name="work")
        task.push_request(id="t1", called_directly=False, **request)
        return beside_ledger(task, value, ledger)


def _work() -> None:
    """Nobody runs it here."""


def test_it_is_what_celery_would_store_where_celery_would_store_it() -> None:
    result = stored(group="g1", conf={"result_extended": True})
    assert result
    assert (result.key, result.seconds, result.database) == (b"celery-task-meta-t1", 24 * 3600, 5)
    kept = json.loads(result.value)
    assert (kept["status"], kept["result"], kept["task_id"], kept["group_id"]) == ("SUCCESS", 3, "t1", "g1")
    assert {"traceback", "children", "date_done", "name", "args", "worker"} <= kept.keys()


def test_a_result_that_never_expires_is_stored_for_ever() -> None:
    result = stored(conf={"result_expires": None})
    assert result
    assert result.seconds == 0


def test_no_database_is_named_where_it_is_that_of_the_ledger() -> None:
    result = stored("redis://redis.test:6379/0")
    assert result
    assert result.database is None


def test_what_cannot_be_encoded_is_known_before_the_attempt_ends() -> None:
    with pytest.raises(EncodeError):
        stored(value=object())


@pytest.mark.parametrize(
    "given",
    [
        {"backend": "redis://redis.test:6380/0"},
        {"backend": "redis://elsewhere.test:6379/0"},
        {"backend": "redis://other-user:pw@redis.test:6379/0"},
        {"backend": "sentinel://redis.test:26379/0", "conf": {"result_backend_transport_options": {"master_name": "main"}}},
        {"backend": f"{__name__}:OwnBackend+{BACKEND}"},
        {"backend": "rpc://"},
        {"backend": None},
        {"conf": {"task_ignore_result": True}},
        {"ignore_result": True},
        {"callbacks": [{"task": "next"}]},
        {"chain": [{"task": "next"}]},
    ],
    ids=lambda given: "-".join(map(str, given)),
)
def test_celery_stores_itself_what_is_kept_elsewhere_or_comes_after_something(given: dict[str, Any]) -> None:
    assert stored(**given) is None

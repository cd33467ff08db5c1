"""An app whose configuration is replaced after its WorkerPool was made has lost what the pool needs: it is told so."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from celery import Celery

from workerpool_routing import Tier, WorkerPool
from workerpool_routing.errors import NotConfigured, PoolUnavailable

pytestmark = pytest.mark.unit

TIERS = [Tier("cpu", "cpu-jobs", accelerated=False)]
NOBODY = "redis://127.0.0.1:1/0"


def nothing() -> None:
    """A task."""


def read_again(app: Celery) -> None:
    app.config_from_object({"task_track_started": True})


def other_options(app: Celery) -> None:
    app.conf.broker_transport_options = {"visibility_timeout": 3600}


def other_routes(app: Celery) -> None:
    app.conf.task_routes = {"reports.*": {"queue": "reports"}}


def more_of_both(app: Celery) -> None:
    app.conf.broker_transport_options = {**app.conf.broker_transport_options, "socket_timeout": 3}
    app.conf.task_routes = [{"reports.*": {"queue": "reports"}}, *app.conf.task_routes]


@pytest.mark.parametrize(
    ("replace", "lost"),
    [
        (read_again, "task_routes and broker_transport_options: replaced after"),
        (other_options, "^broker_transport_options: replaced after"),
        (other_routes, "^task_routes: replaced after"),
    ],
)
def test_submit_says_what_the_app_has_lost(replace: Callable[[Celery], None], lost: str) -> None:
    app = Celery("late", broker=NOBODY, set_as_current=False)
    pool = WorkerPool("test/late", app, tiers=TIERS)
    replace(app)
    with pytest.raises(NotConfigured, match=lost):
        pool.submit(app.task(name="late.work")(nothing))


def test_submit_goes_on_where_the_app_has_only_added_to_it() -> None:
    app = Celery("added", broker=NOBODY, set_as_current=False)
    pool = WorkerPool("test/added", app, tiers=TIERS)
    more_of_both(app)
    with pytest.raises(PoolUnavailable):
        pool.submit(app.task(name="added.work")(nothing))


def test_a_plain_call_that_nobody_routes_any_more_says_so_once(caplog: pytest.LogCaptureFixture) -> None:
    app = Celery("plain", broker="memory://", set_as_current=False)
    WorkerPool("test/plain", app, tiers=TIERS)
    other_routes(app)
    work = app.task(name="plain.work")(nothing)
    work.delay()
    work.delay()
    assert ["task_routes: replaced" in text for name, _, text in caplog.record_tuples if name == "workerpool_routing"] == [True]

"""An API server in trouble, by a proxy before the real one: few requests, no change by mistake, and all is well afterwards."""

from __future__ import annotations

import signal
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.api.kubectl import Kubectl
from tests.api.operators import Namespace, Operator
from tests.api.proxy import Proxy, Request, proxy

from workerpool_operator.local.guardian import Guardian
from workerpool_operator.local.redis_server import RedisServer

pytestmark = pytest.mark.api

TROUBLE_SECONDS = 15
MOST_A_SECOND = 5
"""Of all kinds together; a loop without a pause makes hundreds."""


@pytest.fixture(scope="module")
def between(login: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Proxy, Path]]:
    path = tmp_path_factory.mktemp("proxied") / "kubeconfig"
    with proxy(login, path) as seen:
        yield seen, path


@pytest.fixture(scope="module")
def operator(between: tuple[Proxy, Path], guardian: Guardian) -> Iterator[Operator]:
    operator = Operator(between[1], guardian, "--lease-namespace=celery-workerpool")
    yield operator
    if operator.running():
        operator.end(signal.SIGTERM)


def all_but_the_lease(status: int, after: str, request: Request) -> tuple[int, str] | None:
    """Without its lease the operator would rightly leave: other tests are about that."""
    return None if "leases" in request.path else (status, after)


@pytest.mark.parametrize(("status", "after"), [(500, ""), (429, "3")])
def test_refusals_are_outlived_with_few_requests(
    namespace: str, kubectl: Kubectl, operator: Operator, redis_server: RedisServer, between: tuple[Proxy, Path],
    status: int, after: str
) -> None:  # fmt: skip
    seen = between[0]
    ml = Namespace(namespace, kubectl, operator, redis_server.url)
    ml.create_pool()
    ml.settled()
    seen.trouble = lambda request: all_but_the_lease(status, after, request)
    began = time.monotonic()

    def asked() -> list[Request]:
        return [request for request in seen.since(began) if "leases" not in request.path]

    try:
        ml.publish("gpu", 2)
        ml.eventually(lambda: any(request.method == "PATCH" for request in asked()))  # there is something to write
        time.sleep(TROUBLE_SECONDS)
        requests, lasted = asked(), time.monotonic() - began
        assert len(requests) < MOST_A_SECOND * lasted, Counter((request.method, request.path) for request in requests)
        ml.eventually(lambda: operator.get("/healthz")[0] == 200)  # a restart would not help
    finally:
        seen.trouble = lambda _: None
    ml.eventually(lambda: ml.replicas() == {"media-gpu": 2, "media-cpu": 1}, 60)
    ml.eventually(lambda: ml.condition("Ready")["status"] == "True", 60)


def test_a_slow_api_server_is_waited_for(
    namespace: str, kubectl: Kubectl, operator: Operator, redis_server: RedisServer, between: tuple[Proxy, Path]
) -> None:
    ml = Namespace(namespace, kubectl, operator, redis_server.url)
    between[0].delay = 1.0
    try:
        ml.create_pool()
        ml.publish("gpu", 2)
        ml.eventually(lambda: ml.replicas() == {"media-gpu": 2, "media-cpu": 1}, 60)
        ml.eventually(lambda: operator.get("/healthz")[0] == 200)
    finally:
        between[0].delay = 0.0

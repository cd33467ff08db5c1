"""Several operators, one of which acts: real processes on one Lease, killed, stopped and paused."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from kubernetes.aio import config
from kubernetes.aio.client import ApiClient, Configuration
from redis import Redis
from tests.api.kubectl import Kubectl
from tests.api.operators import Namespace, Operator, eventually
from tests.api.proxy import Proxy, Request, proxy

from workerpool_operator.election import LEASE_SECONDS, RENEW_SECONDS
from workerpool_operator.kube.api import USER_AGENT, Api, ApiError
from workerpool_operator.kube.lease import Candidate
from workerpool_operator.local.guardian import Guardian
from workerpool_operator.local.redis_server import private_redis

pytestmark = pytest.mark.api

TAKEOVER_SECONDS = 15.0
WITHOUT_WAITING = timedelta(seconds=LEASE_SECONDS - RENEW_SECONDS)
"""A lease that nobody gives back lasts longer than that after its holder is gone."""

Start = Callable[[], Operator]


class Replica(Operator):
    """One of several operators, behind a proxy of its own that sees what it says to the API server."""

    proxy: Proxy


@pytest.fixture
def start(login: Path, namespace: str, guardian: Guardian, tmp_path: Path, kubectl: Kubectl) -> Iterator[Callable[[], Replica]]:
    """Start one more operator on the Lease of this test."""
    kubectl("apply", "-f", "-", stdin=json.dumps(rights(namespace)))
    replicas: list[Replica] = []
    with ExitStack() as proxies:

        def more() -> Replica:
            path = tmp_path / f"operator-{len(replicas)}"
            seen = proxies.enter_context(proxy(login, path))
            replica = Replica(path, guardian, f"--namespace={namespace}", f"--lease-namespace={namespace}")
            replica.proxy = seen
            replicas.append(replica)
            return replica

        yield more
        for replica in replicas:
            if replica.running():
                os.kill(replica.pid, signal.SIGCONT)
                replica.end(signal.SIGKILL)


def rights(namespace: str) -> dict[str, object]:
    """To a Lease in the namespace of a test."""
    role = {
        "apiVersion": "rbac.authorization.k8s.io/v1",
        "kind": "Role",
        "metadata": {"name": "leader", "namespace": namespace},
        "rules": [
            {"apiGroups": ["coordination.k8s.io"], "resources": ["leases"], "verbs": ["get", "list", "watch", "create", "patch"]}
        ],
    }
    account = {"kind": "ServiceAccount", "name": "celery-workerpool", "namespace": "celery-workerpool"}
    binding = {
        "apiVersion": "rbac.authorization.k8s.io/v1",
        "kind": "RoleBinding",
        "metadata": {"name": "leader", "namespace": namespace},
        "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "Role", "name": "leader"},
        "subjects": [account],
    }
    return {"apiVersion": "v1", "kind": "List", "items": [role, binding]}


@pytest.fixture
def ml(start: Start, namespace: str, kubectl: Kubectl) -> Iterator[Namespace]:
    """A pool on a Redis of its own, served by the first of the operators."""
    with private_redis() as redis:
        operator = start()
        ml = Namespace(namespace, kubectl, operator, redis.url)
        ml.create_pool()
        ml.settled()
        assert operator.leads()
        yield ml


def second(ml: Namespace, start: Start) -> Operator:
    operator = start()
    eventually(operator.stands_by, operator)
    return operator


def test_a_standby_is_ready_and_does_nothing(ml: Namespace, start: Callable[[], Replica]) -> None:
    with Redis.from_url(ml.redis_url) as redis:

        def connections() -> int:
            return int(redis.info("stats")["total_connections_received"])

        before = connections()
        standby = start()
        eventually(standby.stands_by, standby)
        time.sleep(3)  # it would have connected at its first pass
        assert connections() == before
    assert standby.get("/healthz") == (200, "ok\n")
    assert {request.method for request in standby.proxy.requests} == {"GET"}
    assert {request.path.rpartition("/")[2] for request in standby.proxy.requests} == {"v1alpha1", "leases", "celery-workerpool"}


def taken_at(ml: Namespace) -> datetime:
    """When whoever leads asked for the Lease that it got, as stands in there."""
    return datetime.fromisoformat(ml.get("lease", "celery-workerpool")["spec"]["acquireTime"])


def test_after_a_kill_the_standby_leads_within_15_s_and_acts(ml: Namespace, start: Start, show: Callable[[str], None]) -> None:
    """By the stamp in the Lease: how long it then takes this test to look is not the operators' time."""
    standby = second(ml, start)
    killed = datetime.now(UTC)
    ml.operator.end(signal.SIGKILL)
    eventually(standby.leads, standby)
    took = (taken_at(ml) - killed).total_seconds()
    show(f"{took:.1f} s from the kill of a leader until the standby took its lease, which lasts {LEASE_SECONDS:.0f} s")
    assert 0 < took < TAKEOVER_SECONDS
    ml.publish("gpu", 2)
    eventually(lambda: ml.replicas() == {"media-gpu": 2, "media-cpu": 1}, standby)


def test_a_leader_that_is_told_to_stop_hands_over_at_once(ml: Namespace, start: Start) -> None:
    standby = second(ml, start)
    told = datetime.now(UTC)
    assert ml.operator.end(signal.SIGTERM) == 0
    gone = datetime.now(UTC)
    eventually(standby.leads, standby)
    assert told < taken_at(ml) < gone + WITHOUT_WAITING, "it did not wait for the lease to end by itself"
    lease = ml.get("lease", "celery-workerpool")["spec"]
    assert lease["leaseTransitions"] == 1


def test_a_lease_whose_last_renewal_got_no_answer_is_given_back_all_the_same(
    namespace: str, kubeconfig: Path, kubectl: Kubectl
) -> None:
    async def scenario() -> None:
        configuration = Configuration()
        await config.load_kube_config(str(kubeconfig), client_configuration=configuration)  # type: ignore[no-untyped-call]
        api = LosesAnswers(ApiClient(configuration))
        candidate = Candidate(api, namespace, "operator", "me", pytest.fail)
        await candidate.acquire()
        api.lost = asyncio.Event()
        keeping = asyncio.create_task(candidate.keep())
        await api.lost.wait()
        keeping.cancel()
        api.lost = None
        await candidate.release()
        await api.close()

    asyncio.run(scenario())
    lease = json.loads(kubectl("get", "lease", "operator", f"--namespace={namespace}", "-o", "json").stdout)
    assert lease["spec"].get("holderIdentity", "") == ""


class LosesAnswers(Api):
    """The API server does what it is asked to, but while ``lost`` is there no answer about a change arrives."""

    lost: asyncio.Event | None = None

    async def merge(self, path: str, body: Mapping[str, Any], **query: str) -> dict[str, Any]:
        answer = await super().merge(path, body, **query)
        if self.lost:
            self.lost.set()
            raise ApiError(0, "the answer got lost")
        return answer


def test_a_standby_that_is_told_to_stop_leaves_in_peace(ml: Namespace, start: Start) -> None:
    assert second(ml, start).end(signal.SIGTERM) == 0
    assert ml.operator.leads()


def test_a_leader_that_was_paused_for_longer_than_its_lease_wakes_up_and_writes_nothing(
    ml: Namespace, start: Callable[[], Replica]
) -> None:
    old = ml.operator
    assert isinstance(old, Replica)
    standby = second(ml, start)
    os.kill(old.pid, signal.SIGSTOP)
    eventually(standby.leads, standby)
    ml.publish("gpu", 3)
    eventually(lambda: ml.replicas() == {"media-gpu": 3, "media-cpu": 1}, standby)
    # There is much to do for whoever wakes up.
    ml.kubectl("set", "image", "deployment/media-cpu", "worker=other:1")
    woken = time.monotonic()
    os.kill(old.pid, signal.SIGCONT)
    assert old.wait() == 1
    assert "leaving: the lease is over" in old.log()
    assert [request for request in old.proxy.since(woken) if request.method != "GET"] == []


@pytest.mark.long
@pytest.mark.timeout(400)
def test_at_rest_two_operators_write_nothing_but_the_lease_and_ask_little(ml: Namespace, start: Callable[[], Replica]) -> None:
    leader, standby = ml.operator, second(ml, start)
    assert isinstance(leader, Replica)
    assert isinstance(standby, Replica)
    began = time.monotonic()

    def minute_of_rest() -> list[Request]:
        asked = [request for each in (leader, standby) for request in each.proxy.since(time.monotonic() - 60)]
        rests = {request.path for request in asked if request.method != "GET"} == {lease}
        return asked if rests and time.monotonic() - began > 60 else []

    lease = f"/apis/coordination.k8s.io/v1/namespaces/{ml.name}/leases/celery-workerpool"
    asked = ml.eventually(minute_of_rest, 300)
    assert {request.agent for request in asked} == {USER_AGENT}
    assert len(asked) <= 45, Counter((request.method, request.path) for request in asked)

"""Deployments through the ``Workers`` port, call by call, against a real API server and its real controllers."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Coroutine
from http import HTTPStatus
from pathlib import Path
from typing import Any

import pytest
from kubernetes.aio import config
from kubernetes.aio.client import ApiClient, Configuration
from tests.api.kubectl import Kubectl

from workerpool_operator.kube import seen
from workerpool_operator.kube.api import Api, ApiError, path_to
from workerpool_operator.kube.seen import Seen
from workerpool_operator.kube.workers import KubeWorkers
from workerpool_operator.observation import Phase, TierReplicas, Unavailable
from workerpool_operator.ports import Pool
from workerpool_operator.status import rfc3339

pytestmark = pytest.mark.api

SAMPLE = Path(__file__).parents[2] / "manifests" / "samples" / "workerpool.yaml"
Object = dict[str, Any]


class Died(BaseException):
    """What a killed process does: nothing more."""


class CountingApi(Api):
    """Counts requests; dies when it would exceed ``life``."""

    requests = 0
    life = 1_000

    async def _request(self, method: str, path: str, *rest: Any) -> Object:
        if self.requests >= self.life:
            raise Died
        self.requests += 1
        return await super()._request(method, path, *rest)


class Process:
    """One life of the operator's memory; where it would watch, it lists."""

    def __init__(self, api: CountingApi, namespace: str) -> None:
        self.api, self.namespace, self.now, self.mark = api, namespace, 0.0, "one"
        self.seen = Seen()
        self.workers = KubeWorkers(api, self.seen, lambda _: self.mark, lambda: self.now)

    async def look(self) -> Pool:
        spent, self.api.requests = self.api.requests, 0
        await self.seen.relist(self.api, [self.namespace])
        self.api.requests = spent
        pool = self.seen.pools.get(self.namespace, "media")
        assert isinstance(pool, Pool), pool
        return pool

    async def scale(self, leaving: frozenset[str] = frozenset(), **replicas: int) -> int:
        """Scale; return how many requests it took."""
        pool = await self.look()
        before = self.api.requests
        await self.workers.scale(pool, replicas, leaving)
        return self.api.requests - before

    async def observe(self, tier: str) -> TierReplicas:
        seen = await self.workers.observe(await self.look())
        assert not isinstance(seen, Unavailable)
        return seen[tier]


class Cluster:
    """A namespace with one WorkerPool, and operator processes that come and go."""

    def __init__(self, kubeconfig: Path, kubectl: Kubectl, namespace: str) -> None:
        self._kubeconfig, self._kubectl, self.namespace = kubeconfig, kubectl, namespace

    def kubectl(self, *arguments: str) -> str:
        answer = self._kubectl("--namespace", self.namespace, *arguments)
        assert answer.returncode == 0, answer.stderr
        return answer.stdout

    def objects(self, *what: str) -> list[Object]:
        return list(json.loads(self.kubectl("get", *what, "-o", "json", "--show-managed-fields"))["items"])

    def versions(self) -> list[str]:
        """Of the Deployments, once their controller is through with them."""

        def look() -> list[str]:
            return [f"{d['metadata']['name']} {d['metadata']['resourceVersion']}" for d in self.objects("deployments")]

        now = look()
        while True:
            time.sleep(1)
            before, now = now, look()
            if now == before:
                return now

    def set_status(self, pod: str, status: Object) -> None:
        body = json.dumps({"status": status})
        self.kubectl("patch", "pod", pod, "--subresource=status", "--type=strategic", "--patch", body)

    def run(self, scenario: Callable[[Process], Coroutine[Any, Any, None]], *, life: int = 1_000) -> None:
        """Give a scenario a process of its own."""

        async def live() -> None:
            configuration = Configuration()
            await config.load_kube_config(str(self._kubeconfig), client_configuration=configuration)  # type: ignore[no-untyped-call]
            api = CountingApi(ApiClient(configuration))
            api.life = life
            try:
                await scenario(Process(api, self.namespace))
            finally:
                await api.close()

        asyncio.run(live())


@pytest.fixture
def cluster(kubeconfig: Path, kubectl: Kubectl, namespace: str) -> Cluster:
    cluster = Cluster(kubeconfig, kubectl, namespace)
    cluster.kubectl("create", "-f", str(SAMPLE))
    return cluster


def test_what_is_right_costs_no_request_and_a_new_process_writes_nothing(cluster: Cluster) -> None:
    async def first(process: Process) -> None:
        await process.scale(gpu=2, cpu=1)
        assert await process.scale(gpu=2, cpu=1) == 0

    async def second(process: Process) -> None:
        assert await process.scale(gpu=2, cpu=1) == 2, "each Deployment is applied once more, to see whether it differs"
        assert await process.scale(gpu=2, cpu=1) == 0

    cluster.run(first)
    before = cluster.versions()
    cluster.run(second)
    assert cluster.versions() == before


def test_a_new_broker_url_replaces_the_pods_and_one_that_cannot_be_read_does_not(cluster: Cluster) -> None:
    def marks() -> list[str]:
        [deployment] = cluster.objects("deployments")
        return [deployment["spec"]["template"]["metadata"]["annotations"]["workerpool.dev/broker-mark"]]

    async def scenario(process: Process) -> None:
        await process.scale(gpu=1)
        assert marks() == ["one"]
        process.mark = ""
        assert await process.scale(gpu=1) == 0
        process.mark = "two"
        assert await process.scale(gpu=1) == 1
        assert marks() == ["two"]

    cluster.run(scenario)


@pytest.mark.parametrize("life", range(1, 5))
def test_a_process_that_dies_between_two_requests_leaves_nothing_unfinished(cluster: Cluster, life: int) -> None:
    async def scale(process: Process) -> None:
        await process.scale(gpu=3)

    async def template_only(process: Process) -> None:
        await process.scale(gpu=3)
        # A later change of the template must not carry the replica count along, nor lose it.
        cluster.kubectl("patch", "wp", "media", "--type=merge", "--patch", '{"spec": {"app": "media.other"}}')
        assert await process.scale(gpu=3) == 1

    if life < 4:
        with pytest.raises(Died):
            cluster.run(scale, life=life)
    else:
        cluster.run(scale, life=life)
    cluster.run(template_only)
    [deployment] = cluster.objects("deployments")
    owners = {
        entry["manager"]
        for entry in deployment["metadata"]["managedFields"]
        if "f:replicas" in entry["fieldsV1"].get("f:spec", {})
    }
    assert (deployment["spec"]["replicas"], owners) == (3, {"workerpool-scale"})
    assert "media.other" in deployment["spec"]["template"]["spec"]["containers"][0]["command"]


def test_a_deployment_that_lost_its_labels_is_repaired_before_anything_is_decided_about_it(cluster: Cluster) -> None:
    async def scenario(process: Process) -> None:
        await process.scale(gpu=3)
        cluster.kubectl("label", "deployment", "media-gpu", "app.kubernetes.io/managed-by-")
        await process.look()
        assert (await process.observe("gpu")).desired == 0
        await process.scale(gpu=0)
        assert (await process.observe("gpu")).desired == 3

    cluster.run(scenario)


def test_a_deployment_that_somebody_paused_goes_on(cluster: Cluster) -> None:
    async def scenario(process: Process) -> None:
        await process.scale(gpu=1)
        cluster.kubectl("rollout", "pause", "deployment/media-gpu")
        assert await process.scale(gpu=1) == 1
        [deployment] = cluster.objects("deployments")
        assert not deployment["spec"].get("paused")
        assert await process.scale(gpu=1) == 0

    cluster.run(scenario)


def test_a_count_that_another_has_changed_since_it_was_seen_is_not_written_over(cluster: Cluster) -> None:
    """As a write that an operator began, and that lands when the next one has acted."""

    def replicas() -> int:
        [deployment] = cluster.objects("deployments")
        return int(deployment["spec"]["replicas"])

    async def scenario(process: Process) -> None:
        await process.scale(gpu=3)
        pool = await process.look()
        cluster.kubectl("scale", "deployment/media-gpu", "--replicas=6")
        await process.workers.scale(pool, {"gpu": 1}, frozenset())
        assert replicas() == 6
        process.now += 1
        assert not (await process.observe("gpu")).count(Phase.FAILING), "it may well pass"
        await process.scale(gpu=1)
        assert replicas() == 1
        for count in (0, 2):
            await process.scale(gpu=count)
            assert replicas() == count

    cluster.run(scenario)


@pytest.mark.parametrize("cost", ["", "-2000"])
def test_the_drained_workers_are_the_ones_that_go(cluster: Cluster, cost: str) -> None:
    if cost:
        metadata = {"annotations": {"controller.kubernetes.io/pod-deletion-cost": cost}}
        own = [{"op": "add", "path": "/spec/tiers/0/template/metadata", "value": metadata}]
        cluster.kubectl("patch", "wp", "media", "--type=json", "--patch", json.dumps(own))

    def alive() -> list[str]:
        return [pod["metadata"]["name"] for pod in cluster.objects("pods") if "deletionTimestamp" not in pod["metadata"]]

    async def scenario(process: Process) -> None:
        await process.scale(gpu=3)
        pods = await until(lambda: alive() if len(alive()) == 3 else [])
        busy = pods[-1]
        for pod in pods:
            since = rfc3339(time.time()) if pod == busy else "2020-01-01T00:00:00Z"
            ready = {"type": "Ready", "status": "True", "lastTransitionTime": since}
            cluster.set_status(pod, {"phase": "Running", "conditions": [ready]})
        assert (await process.observe("gpu")).count(Phase.READY) == 3
        # Left to itself the controller removes first what became ready last.
        await process.scale(frozenset(pods) - {busy}, gpu=1)
        assert await until(lambda: alive() if len(alive()) == 1 else []) == [busy]

    cluster.run(scenario)


def test_a_listing_that_comes_in_pages_is_complete_and_forgets_nobody_who_was_on_one(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario(process: Process) -> None:
        await process.scale(gpu=5)
        await until(lambda: [p["metadata"]["name"] for p in cluster.objects("pods")] if len(cluster.objects("pods")) == 5 else [])
        sizes = []
        get = process.api.get

        async def counted(path: str, **query: str) -> Object:
            answer = await get(path, **query)
            sizes.append(len(answer["items"]))
            return answer

        monkeypatch.setattr(process.api, "get", counted)
        monkeypatch.setattr(seen, "PAGE", 2)
        for _ in range(2):
            assert len((await process.observe("gpu")).replicas) == 5
        assert max(sizes) == 2
        await process.scale(gpu=0)
        await until(lambda: [] if cluster.objects("pods") else ["none"])
        assert (await process.observe("gpu")).replicas == ()

    cluster.run(scenario)


def test_a_drained_worker_that_is_gone_before_it_can_be_made_cheaper_holds_nothing_up(cluster: Cluster) -> None:
    async def scenario(process: Process) -> None:
        await process.scale(gpu=3)
        pods = await until(
            lambda: [p["metadata"]["name"] for p in cluster.objects("pods")] if len(cluster.objects("pods")) == 3 else []
        )
        pool = await process.look()
        cluster.kubectl("delete", "pod", pods[0], "--force", "--grace-period=0")
        await process.workers.scale(pool, {"gpu": 2}, frozenset({pods[0]}))
        assert (await process.observe("gpu")).desired == 2

    cluster.run(scenario)


async def until(look: Callable[[], list[str]]) -> list[str]:
    deadline = time.monotonic() + 60
    while not (seen := look()):
        assert time.monotonic() < deadline
        await asyncio.sleep(0.2)
    return seen


def test_what_has_taken_the_place_of_a_deployment_that_was_to_go_is_not_deleted_for_it(cluster: Cluster) -> None:
    async def scenario(process: Process) -> None:
        await process.scale(gpu=0)
        path = path_to("apps/v1", process.namespace, "deployments", "media-gpu")
        with pytest.raises(ApiError) as refused:
            await process.api.delete(path, "another")
        assert refused.value.status == HTTPStatus.CONFLICT
        [deployment] = cluster.objects("deployments")
        await process.api.delete(path, deployment["metadata"]["uid"])
        assert cluster.objects("deployments") == []

    cluster.run(scenario)


def test_what_is_refused_is_tried_again_with_growing_pauses_shown_and_kept_from_the_others(cluster: Cluster) -> None:
    wrong = [{"op": "replace", "path": "/spec/tiers/0/template/spec/containers/0/image", "value": 7}]
    cluster.kubectl("patch", "wp", "media", "--type=json", "--patch", json.dumps(wrong))

    async def scenario(process: Process) -> None:
        assert await process.scale(cpu=1) > 0
        pool = await process.look()
        before = process.api.requests
        for _ in range(600):
            await process.workers.scale(pool, {"gpu": 2, "cpu": 1}, frozenset())
            process.now += 0.1
        assert process.api.requests - before == 2 * len([0, 1, 3, 7, 15, 31])
        [failing] = (await process.observe("gpu")).replicas
        assert failing.phase is Phase.FAILING
        assert "image" in failing.detail
        assert (await process.observe("cpu")).desired == 1
        mended = [{**wrong[0], "value": "media:2"}]
        cluster.kubectl("patch", "wp", "media", "--type=json", "--patch", json.dumps(mended))
        await process.scale(gpu=2)
        assert (await process.observe("gpu")).desired == 2, "a changed pool is tried at once"
        assert not (await process.observe("gpu")).count(Phase.FAILING)

    cluster.run(scenario)

"""What the Deployments and pods of a tier say together of its workers."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from http import HTTPStatus
from itertools import count, pairwise
from typing import Any
from unittest.mock import AsyncMock

import pytest
from tests.seeds import make_pool
from tests.unit.pods import Object, container, raw_pod

from workerpool_operator import planning
from workerpool_operator.deployment import build
from workerpool_operator.kube.api import Api, ApiError
from workerpool_operator.kube.seen import Seen
from workerpool_operator.kube.workers import CALM_SECONDS, REPAIRS_AT_ONCE, TURNED_AWAY_SECONDS, KubeWorkers
from workerpool_operator.model import Replicas
from workerpool_operator.observation import BrokerReading, Phase, QueueReading, TierReplicas
from workerpool_routing.wire import Milliseconds

pytestmark = pytest.mark.unit

POOL = replace(make_pool("redis://one"), namespace="ml")
GPU = POOL.spec.tiers[0]
CREATED = datetime(2026, 1, 1, tzinfo=UTC)
AWAY: Object = {"phase": "Failed", "reason": "UnexpectedAdmissionError", "message": "Allocate failed"}
SCHEDULED = {"type": "PodScheduled", "status": "True", "lastTransitionTime": "2026-01-01T00:05:00Z"}


def observed(replicas: int, *pods: Object, after: float = 0.0, **status: Any) -> TierReplicas:
    """The GPU tier, so long after its pods were made."""
    seen = Seen()
    manifest = build(POOL, GPU, "")
    owner = {"kind": "WorkerPool", "name": POOL.name, "uid": POOL.uid, "controller": True}
    metadata = {**manifest["metadata"], "resourceVersion": "1", "ownerReferences": [owner]}
    seen.deployments.put({"metadata": metadata, "spec": {**manifest["spec"], "replicas": replicas}, "status": status})
    for pod in pods:
        seen.pods.put(pod)
    seen.complete = True
    clock = (CREATED + timedelta(seconds=after)).timestamp
    tiers = asyncio.run(KubeWorkers(AsyncMock(Api), seen, lambda _: "", clock).observe(POOL))
    assert isinstance(tiers, Mapping)
    return tiers["gpu"]


def test_a_removed_tier_is_one_whose_deployment_the_pool_controls_and_names_no_more() -> None:
    seen = Seen()
    of_pool = {"kind": "WorkerPool", "name": POOL.name, "uid": POOL.uid, "controller": True}
    for name in ("media-gpu", "media-copy", "media-cpu"):
        manifest = build(POOL, POOL.spec.tiers[1] if name == "media-cpu" else GPU, "")
        metadata = {**manifest["metadata"], "name": name, "resourceVersion": "1", "ownerReferences": [of_pool]}
        seen.deployments.put({"metadata": metadata, "spec": manifest["spec"]})
    workers = KubeWorkers(AsyncMock(Api), seen, lambda _: "")
    without = replace(POOL, spec=POOL.spec.model_copy(update={"tiers": POOL.spec.tiers[1:]}))
    assert workers.removed(POOL) == ()
    assert [(tier.name, tier.queue, tier.accelerated) for tier in workers.removed(without)] == [("gpu", GPU.queue, True)]
    assert workers.removed(replace(without, uid="another")) == ()
    assert workers.removed(replace(without, namespace="elsewhere")) == ()


def test_another_autoscaler_has_the_count_once_there_is_a_deployment_to_scale() -> None:
    """One that was there first would find 0 replicas, which it takes for switched off."""
    gpu = GPU.model_copy(update={"replicas": Replicas(min=3, max=4)})
    pool = replace(POOL, spec=POOL.spec.model_copy(update={"tiers": (gpu,)}))
    seen, api = Seen(), AsyncMock(Api)
    hpa = {"metadata": {"namespace": "ml", "name": "hpa", "resourceVersion": "1"}}
    seen.autoscalers.put({**hpa, "spec": {"scaleTargetRef": {"kind": "Deployment", "name": "media-gpu"}}})
    seen.complete = True
    api.get.side_effect = ApiError(HTTPStatus.NOT_FOUND, "no such Deployment")
    api.apply.side_effect = Stored()

    async def one_pass() -> tuple[int, str]:
        workers = KubeWorkers(api, seen, lambda _: "")
        live = await workers.observe(pool)
        assert isinstance(live, Mapping)
        (plan,) = planning.plan(pool, BrokerReading({"gpu": QueueReading(0, 0, 0)}, "r1", Milliseconds(0)), live, {}, 0.0)
        await workers.scale(pool, {"gpu": plan.drain.replicas}, frozenset())
        return plan.decision.replicas, plan.workers.rival

    assert asyncio.run(one_pass()) == (3, "")
    deployment = seen.deployments.get("ml", "media-gpu")
    assert deployment is not None
    assert deployment.replicas == 3
    assert asyncio.run(one_pass()) == (3, "HorizontalPodAutoscaler hpa")


def test_a_rival_that_changes_a_deployment_back_is_repaired_less_and_less_often_and_named() -> None:
    seen, api, stored, now = Seen(), AsyncMock(Api), Stored(), CREATED.timestamp()
    seen.complete = True
    api.get.side_effect = ApiError(HTTPStatus.NOT_FOUND, "no such Deployment")
    api.apply.side_effect = stored
    api.step.side_effect = lambda *_, **__: {"metadata": {"resourceVersion": str(next(stored.versions))}}
    workers = KubeWorkers(api, seen, lambda _: "", lambda: now)
    pool = replace(POOL, spec=POOL.spec.model_copy(update={"tiers": (GPU,)}))

    def one_pass(replicas: int = 1) -> int:
        applied = api.apply.await_count
        asyncio.run(workers.scale(pool, {"gpu": replicas}, frozenset()))
        return int(api.apply.await_count - applied)

    def editor() -> str:
        tiers = asyncio.run(workers.observe(pool))
        assert isinstance(tiers, Mapping)
        return tiers["gpu"].editor

    def edit() -> None:
        seen.deployments.put(stored("", {**build(pool, GPU, ""), "spec": {"template": {}}}, "", by="image-updater"))

    while one_pass():
        pass
    repaired_at: list[float] = []
    while len(repaired_at) < 10:
        edit()
        if one_pass():
            repaired_at.append(now)
            assert editor() == ("image-updater" if len(repaired_at) >= REPAIRS_AT_ONCE else "")
        now += 0.5
    pauses = [after - before for before, after in pairwise(repaired_at)]
    assert pauses == [0.5, 0.5, 1, 2, 4, 8, 16, 30, 30]
    edit()
    assert one_pass(replicas=3) == 0
    api.step.assert_awaited_once()
    assert editor() == "image-updater"
    now += CALM_SECONDS
    assert editor() == "", "it has left it alone"


class Stored:
    """Deployments as the API server answers after an apply."""

    def __init__(self) -> None:
        self.versions, self._replicas = count(1), 1

    def __call__(self, _: str, manifest: Object, __: str, by: str = "") -> Object:
        self._replicas = manifest["spec"].get("replicas", self._replicas)
        entries = [{"manager": by, "operation": "Update", "time": "2026-01-01T00:00:00Z"}] if by else []
        metadata = {**manifest["metadata"], "resourceVersion": str(next(self.versions)), "managedFields": entries}
        return {**manifest, "metadata": metadata, "spec": {**manifest["spec"], "replicas": self._replicas}}


def starting(live: TierReplicas) -> int:
    """How many slots the routers are told to be on their way."""
    queues = {"gpu": QueueReading(live.desired, 0, 0), "cpu": QueueReading(0, 0, 0)}
    time, now = Milliseconds(0), CREATED.timestamp()
    workers = {"gpu": live, "cpu": TierReplicas(1)}
    plans = planning.plan(POOL, BrokerReading(queues, "r1", time), workers, {}, now)
    capacity = planning.capacity(POOL.spec, plans, time, now).tiers["gpu"]
    return sum(group.slots for group in capacity.starting) + capacity.startable


def test_every_pod_that_a_quota_refuses_fails_and_none_of_them_is_on_its_way() -> None:
    condition = {"type": "ReplicaFailure", "status": "True", "message": "exceeded quota"}
    live = observed(3, raw_pod("media-gpu-1"), conditions=[condition])
    assert [(replica.phase, replica.detail) for replica in live.replicas] == [
        (Phase.STARTING, ""), (Phase.FAILING, "exceeded quota"), (Phase.FAILING, "exceeded quota"),
    ]  # fmt: skip
    assert (live.starting, starting(live)) == (1, 1)


def test_a_pod_that_no_node_has_taken_in_fails_where_the_one_before_was_turned_away() -> None:
    pods = [raw_pod("media-gpu-1", **AWAY), raw_pod("media-gpu-2")]
    live = observed(1, *pods)
    assert [(replica.worker, replica.phase, replica.detail) for replica in live.replicas] == [
        ("media-gpu-2", Phase.FAILING, "UnexpectedAdmissionError: Allocate failed")
    ]
    assert starting(live) == 0
    assert observed(1, *pods, after=TURNED_AWAY_SECONDS).count(Phase.STARTING) == 1, "that was long ago"
    taken_in = raw_pod("media-gpu-2", containerStatuses=[container(waiting={"reason": "ContainerCreating"})])
    assert observed(1, pods[0], taken_in).count(Phase.STARTING) == 1, "this one its node has taken in"


def test_a_pod_that_had_waited_for_its_node_is_turned_away_when_the_node_says_so() -> None:
    """As an autoscaler's new node does whose driver is not up yet: the pod is minutes old by then."""
    refused = raw_pod("media-gpu-1", **AWAY, startTime="2026-01-01T00:05:00Z", qosClass="BestEffort", conditions=[SCHEDULED])
    successor = raw_pod("media-gpu-2", phase="Pending", conditions=[SCHEDULED])
    successor["metadata"]["creationTimestamp"] = "2026-01-01T00:05:00Z"
    minutes = 300.0
    live = observed(1, refused, successor, after=minutes + TURNED_AWAY_SECONDS - 1)
    assert [(replica.worker, replica.phase) for replica in live.replicas] == [("media-gpu-2", Phase.FAILING)]
    assert starting(live) == 0
    assert observed(1, refused, successor, after=minutes + TURNED_AWAY_SECONDS).count(Phase.STARTING) == 1, "that was long ago"

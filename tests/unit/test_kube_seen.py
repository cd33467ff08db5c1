"""What is read out of pods and Deployments, and a memory that events may reach late and in any order."""

from __future__ import annotations

import asyncio
from http import HTTPStatus
from typing import Any, cast

import pytest
from tests.unit.pods import Object, container, raw_pod

from workerpool_operator.kube import seen
from workerpool_operator.kube.api import Api, ApiError
from workerpool_operator.kube.seen import (
    Cache,
    Leaving,
    LiveAutoscaler,
    LivePod,
    Refused,
    Seen,
    TurnedAway,
    autoscaler,
    deployment,
    pod,
    worker_pool,
)
from workerpool_operator.observation import Phase, newest
from workerpool_operator.ports import Pool

pytestmark = pytest.mark.unit

READY = {"type": "Ready", "status": "True", "lastTransitionTime": "2026-01-01T00:00:30Z"}
UN_READY = {"type": "Ready", "status": "False", "lastTransitionTime": "2026-01-01T02:00:00Z"}
READY_LATER = {"type": "Ready", "status": "True", "lastTransitionTime": "2026-01-01T03:00:00Z"}
UNSCHEDULABLE = {"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": "no GPU left"}
GATED = {"type": "PodScheduled", "status": "False", "reason": "SchedulingGated", "message": "Scheduling is blocked"}


@pytest.mark.parametrize(
    ("status", "phase", "detail"),
    [
        ({}, Phase.STARTING, ""),
        ({"conditions": [GATED]}, Phase.UNSCHEDULABLE, "Scheduling is blocked"),
        ({"containerStatuses": [container(waiting={"reason": "ContainerCreating"})]}, Phase.STARTING, ""),
        ({"containerStatuses": [container(running={})], "conditions": [UN_READY]}, Phase.STARTING, ""),
        ({"conditions": [UNSCHEDULABLE]}, Phase.UNSCHEDULABLE, "no GPU left"),
        ({"conditions": [READY]}, Phase.READY, ""),
        (
            {"containerStatuses": [container(waiting={"reason": "ImagePullBackOff", "message": "no such image"})]},
            Phase.FAILING,
            "container worker: ImagePullBackOff: no such image",
        ),
        (
            {"initContainerStatuses": [container("fetch", terminated={"exitCode": 3, "reason": "Error"})]},
            Phase.FAILING,
            "container fetch: exited with code 3 (Error)",
        ),
        (
            {"containerStatuses": [container(terminated={"exitCode": 137, "reason": "OOMKilled"})]},
            Phase.FAILING,
            "container worker: exited with code 137 (OOMKilled)",
        ),
        ({"initContainerStatuses": [container("fetch", terminated={"exitCode": 0})]}, Phase.STARTING, ""),
    ],
)
def test_a_pod_tells_where_its_worker_stands(status: Object, phase: Phase, detail: str) -> None:
    live = pod(raw_pod(**status))
    assert isinstance(live, LivePod)
    assert (live.replica.phase, live.replica.detail) == (phase, detail)


def test_a_pod_that_was_told_to_stop_is_stopping_even_while_ready() -> None:
    raw = raw_pod(conditions=[READY])
    raw["metadata"]["deletionTimestamp"] = "2026-01-01T01:00:00Z"
    live = pod(raw)
    assert isinstance(live, LivePod)
    assert live.replica.phase is Phase.STOPPING


@pytest.mark.parametrize("phase", ["Failed", "Succeeded"])
def test_a_pod_that_is_over_counts_no_more(phase: str) -> None:
    assert pod(raw_pod(phase=phase)) is None
    evicted = raw_pod(phase=phase, reason="Evicted", containerStatuses=[container(terminated={"exitCode": 137})])
    assert pod(evicted) is None


def test_a_pod_that_its_node_turned_away_says_why() -> None:
    refused = raw_pod(phase="Failed", reason="UnexpectedAdmissionError", message="Pod was rejected: Allocate failed")
    whole = pod(raw_pod())
    assert isinstance(whole, LivePod)
    assert pod(refused) == TurnedAway(whole.replica.ordered_at, "UnexpectedAdmissionError: Pod was rejected: Allocate failed")
    refused["metadata"]["deletionTimestamp"] = "2026-01-01T01:00:00Z"
    assert pod(refused) is None


CRASHED = {"terminated": {"exitCode": 1, "reason": "Error"}}


def test_a_worker_that_crashed_counts_as_failing_between_two_crashes_until_it_is_ready() -> None:
    pods: Cache[LivePod | TurnedAway] = Cache(pod)
    phases = []
    backing_off = container(waiting={"reason": "CrashLoopBackOff"})
    for version, (worker, ready) in enumerate(
        [
            (container(running={}), UN_READY),
            ({**backing_off, "lastState": CRASHED}, UN_READY),
            ({**container(running={}), "lastState": CRASHED}, UN_READY),
            ({**backing_off, "lastState": CRASHED}, UN_READY),
            ({**container(running={}), "lastState": CRASHED}, READY),
            ({**container(running={}), "lastState": CRASHED}, UN_READY),
        ],
        start=1,
    ):
        pods.put(raw_pod(version=version, containerStatuses=[worker], conditions=[ready]))
        (live,) = pods.members(("ml", "media", "gpu"))
        assert isinstance(live, LivePod)
        phases.append(live.replica.phase)
    assert phases == [Phase.STARTING, Phase.FAILING, Phase.FAILING, Phase.FAILING, Phase.READY, Phase.STARTING]


def test_an_init_container_that_needed_a_second_try_does_not_make_a_start_a_failure() -> None:
    done = {**container("fetch", terminated={"exitCode": 0}), "lastState": CRASHED}
    live = pod(raw_pod(initContainerStatuses=[done], containerStatuses=[container(running={})]))
    assert isinstance(live, LivePod)
    assert live.replica.phase is Phase.STARTING


def test_a_pod_that_is_ready_again_still_took_as_long_to_start_as_the_first_time() -> None:
    pods: Cache[LivePod | TurnedAway] = Cache(pod)
    for version, condition in enumerate([READY, UN_READY, READY_LATER], start=1):
        pods.put(raw_pod(version=version, conditions=[condition]))
    live = pods.get("ml", "media-gpu-1")
    assert isinstance(live, LivePod)
    assert live.replica.ready_at is not None
    assert live.replica.ready_at - live.replica.ordered_at == 30


RUNNING = container(running={"startedAt": "2026-01-01T00:00:20Z"})
UN_READY_AT_FIRST = {"type": "Ready", "status": "False", "lastTransitionTime": "2026-01-01T00:00:05Z"}


@pytest.mark.parametrize(
    ("statuses", "took"),
    [
        pytest.param([([], UN_READY_AT_FIRST), ([RUNNING], READY)], 30.0, id="seen from its order on"),
        pytest.param([([RUNNING], UN_READY_AT_FIRST), ([RUNNING], READY)], 30.0, id="seen once it ran"),
        pytest.param([([RUNNING], READY_LATER)], None, id="first seen ready: perhaps not for the first time"),
        pytest.param([([RUNNING], READY), ([RUNNING], UN_READY), ([RUNNING], READY_LATER)], None, id="and un-Ready since"),
        pytest.param([([RUNNING], UN_READY), ([RUNNING], READY_LATER)], None, id="first seen un-Ready after it had been ready"),
    ],
)
def test_only_a_start_that_was_seen_says_how_long_starts_take(
    statuses: list[tuple[list[Object], Object]], took: float | None
) -> None:
    pods: Cache[LivePod | TurnedAway] = Cache(pod)
    for version, (containers, ready) in enumerate(statuses, start=1):
        pods.put(raw_pod(version=version, containerStatuses=containers, conditions=[ready]))
    found = newest(live.replica for live in pods.members(("ml", "media", "gpu")) if isinstance(live, LivePod))
    assert (found and found[0] - found[1].ordered_at) == took


def test_a_pod_that_is_un_ready_for_a_while_is_known_to_have_been_up_by_a_new_operator_too() -> None:
    live = pod(raw_pod(containerStatuses=[RUNNING], conditions=[UN_READY]))
    assert isinstance(live, LivePod)
    assert (live.replica.phase, live.replica.ready_at is not None) == (Phase.STARTING, True)


def known(pods: Cache[LivePod | TurnedAway], tier: str = "gpu") -> list[str]:
    return [live.replica.worker for live in pods.members(("ml", "media", tier)) if isinstance(live, LivePod)]


def test_what_is_older_than_what_is_known_changes_nothing() -> None:
    pods: Cache[LivePod | TurnedAway] = Cache(pod)
    pods.put(raw_pod(version=5, conditions=[READY]))
    pods.put(raw_pod(version=4, conditions=[UNSCHEDULABLE]))
    live = pods.get("ml", "media-gpu-1")
    assert isinstance(live, LivePod)
    assert live.replica.phase is Phase.READY
    pods.drop(raw_pod(version=6))
    pods.put(raw_pod(version=5))
    assert known(pods) == []


def test_a_pod_whose_label_changed_left_its_tier() -> None:
    pods: Cache[LivePod | TurnedAway] = Cache(pod)
    pods.put(raw_pod(version=1))
    pods.put(raw_pod(version=2, tier="cpu"))
    assert (known(pods), known(pods, "cpu")) == ([], ["media-gpu-1"])


def test_a_listing_forgets_what_a_watch_missed_and_keeps_what_is_newer() -> None:
    pods: Cache[LivePod | TurnedAway] = Cache(pod)
    pods.put(raw_pod("missed", version=3))
    pods.put(raw_pod("listed", version=4))
    pods.put(raw_pod("newer", version=11))
    listing = {"metadata": {"resourceVersion": "10"}, "items": [raw_pod("listed", version=4), raw_pod("unseen", version=7)]}
    pods.relist("elsewhere", {"metadata": {"resourceVersion": "10"}, "items": []}, set())
    assert known(pods) == ["listed", "missed", "newer"]
    pods.relist("ml", listing, set())
    assert known(pods) == ["listed", "newer", "unseen"]


def raw_deployment(**spec: Any) -> Object:
    return {"metadata": {"namespace": "ml", "name": "media-gpu", "labels": {"a": "b"}}, "spec": {"replicas": 1, **spec}}


def test_only_what_the_operator_has_to_repair_changes_the_fingerprint() -> None:
    base = deployment(raw_deployment(template={"image": "a"}))
    assert deployment(raw_deployment(template={"image": "a"}, replicas=7)).fingerprint == base.fingerprint
    scaled = raw_deployment(template={"image": "a"})
    scaled["metadata"] |= {"annotations": {"deployment.kubernetes.io/revision": "4"}, "generation": 9}
    scaled["status"] = {"replicas": 3}
    assert deployment(scaled).fingerprint == base.fingerprint
    assert deployment(raw_deployment(template={"image": "b"})).fingerprint != base.fingerprint
    relabelled = raw_deployment(template={"image": "a"})
    relabelled["metadata"]["labels"] = {}
    assert deployment(relabelled).fingerprint != base.fingerprint


def test_a_deployment_that_cannot_make_pods_says_why() -> None:
    raw = raw_deployment()
    raw["status"] = {"conditions": [{"type": "ReplicaFailure", "status": "True", "message": "exceeded quota: gpus"}]}
    assert deployment(raw).failure == "exceeded quota: gpus"


def test_a_stored_pool_that_is_not_valid_is_told_apart_from_one_that_is_going() -> None:
    metadata = {
        "namespace": "ml",
        "name": "media",
        "uid": "u",
        "generation": 2,
        "creationTimestamp": "2026-01-01T00:00:00Z",
        "resourceVersion": "1",
    }
    refused = worker_pool({"metadata": metadata, "spec": {"app": "media.tasks"}})
    assert isinstance(refused, Refused)
    assert {problem.field for problem in refused.problems} >= {"spec.broker", "spec.tiers"}
    going = {**metadata, "deletionTimestamp": "2026-01-01T00:00:00Z"}
    assert worker_pool({"metadata": going, "spec": {}}) is None
    held = worker_pool(
        {"metadata": {**going, "finalizers": ["backup.example/hold"]}, "spec": {}, "status": {"replicas": "gpu 1/1"}}
    )
    assert held == Leaving("ml", "media", "u", 2, {"replicas": "gpu 1/1"}, ["backup.example/hold"])


def test_a_pool_that_makes_the_parser_fail_is_refused_with_what_went_wrong(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(_: object) -> None:
        raise AttributeError("'str' object has no attribute 'get'")

    monkeypatch.setattr(seen, "parse_spec", fail)
    metadata = {"namespace": "ml", "name": "media", "uid": "u", "generation": 2, "resourceVersion": "1"}
    pools: Cache[Pool | Refused | Leaving] = Cache(worker_pool)
    for _ in range(2):
        pools.put({"metadata": metadata, "spec": {"app": "media.tasks"}})
    refused = pools.get("ml", "media")
    assert isinstance(refused, Refused)
    assert [str(problem) for problem in refused.problems] == [
        "spec: the operator cannot read it: AttributeError(\"'str' object has no attribute 'get'\")"
    ]
    assert caplog.messages == ["ml/media: the parser failed"], "once, although every listing brings it again"


def test_an_autoscaler_is_known_by_its_deployment_and_by_who_made_it() -> None:
    maker = {"kind": "ScaledObject", "name": "media", "uid": "1", "controller": True}
    raw: Object = {
        "metadata": {"name": "keda-hpa-media", "ownerReferences": [maker]},
        "spec": {"scaleTargetRef": {"kind": "Deployment", "name": "media-cpu"}},
    }
    words = "HorizontalPodAutoscaler keda-hpa-media of ScaledObject media"
    assert autoscaler(raw) == LiveAutoscaler("media-cpu", words)
    raw["spec"]["scaleTargetRef"]["kind"] = "StatefulSet"
    assert autoscaler(raw) is None


class Forbidding:
    """An API server with nothing in it that refuses to list one kind in one namespace."""

    def __init__(self, kind: str) -> None:
        self.kind = kind

    async def get(self, path: str, **_: str) -> Object:
        if path.endswith(f"/gone/{self.kind}"):
            raise ApiError(HTTPStatus.FORBIDDEN, f"{self.kind} is forbidden")
        return {"metadata": {"resourceVersion": "9"}, "items": []}


@pytest.mark.parametrize("kind", ["workerpools", "deployments", "horizontalpodautoscalers", "pods"])
def test_only_a_namespace_whose_pools_may_not_be_seen_is_left_out(kind: str) -> None:
    known, api = Seen(), cast("Api", Forbidding(kind))
    if kind == "workerpools":
        asyncio.run(known.relist(api, ["gone", "ml"]))
        assert known.complete
        return
    with pytest.raises(ApiError, match=f"{kind} is forbidden"):
        asyncio.run(known.relist(api, ["gone", "ml"]))
    assert not known.complete, "what it may not see would count as not there"

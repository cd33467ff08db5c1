"""The Deployment of a tier: what the operator adds to the user's template, and what it leaves alone."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest

from workerpool_operator.deployment import build, name_of, selector_of, tier_of
from workerpool_operator.model import Replicas, WorkerPoolSpec, parse_spec
from workerpool_operator.ports import Pool
from workerpool_operator.worker_command import grace_seconds

pytestmark = pytest.mark.unit

WORKER: dict[str, Any] = {"name": "worker", "image": "media:1"}
LABEL_VALUE = re.compile(r"[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?")
OBJECT_NAME = re.compile(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*")


def pool_of(worker: dict[str, Any], *, name: str = "media", broker: dict[str, Any] | None = None, **template: Any) -> Pool:
    containers = [worker, {"name": "sidecar", "image": "proxy:1"}]
    tier = {
        "name": "gpu",
        "queue": "gpu-tasks",
        "concurrency": 2,
        "accelerator": {"resource": "nvidia.com/gpu", "count": 2},
        "template": {"spec": {"containers": containers, **template.pop("spec", {})}, **template},
    }
    cpu = {"name": "cpu", "queue": "celery", "template": {"spec": {"containers": [WORKER]}}}
    spec = parse_spec({"app": "media.tasks", "broker": broker or {"url": "redis://redis:6379/0"}, "tiers": [tier, cpu]})
    assert isinstance(spec, WorkerPoolSpec), spec
    return Pool("ml", name, "uid-1", 3, 0.0, spec)


def gpu(pool: Pool) -> dict[str, Any]:
    return build(pool, pool.spec.tiers[0])


def worker_of(manifest: dict[str, Any]) -> dict[str, Any]:
    containers: list[dict[str, Any]] = manifest["spec"]["template"]["spec"]["containers"]
    return next(container for container in containers if container["name"] == "worker")


def environment_of(manifest: dict[str, Any]) -> dict[str, Any]:
    variables = worker_of(manifest)["env"]
    assert len({variable["name"] for variable in variables}) == len(variables)
    return {variable["name"]: variable.get("value", variable.get("valueFrom")) for variable in variables}


def test_the_manifest_is_a_valid_deployment() -> None:
    for tier in pool_of(WORKER).spec.tiers:
        kubernetes_validate.validate(build(pool_of(WORKER), tier), "1.37", strict=True)


def test_the_pool_owns_the_deployment() -> None:
    metadata = gpu(pool_of(WORKER))["metadata"]
    assert (metadata["namespace"], metadata["name"]) == ("ml", "media-gpu")
    assert metadata["ownerReferences"] == [
        {
            "apiVersion": "workerpool.dev/v1alpha1",
            "kind": "WorkerPool",
            "name": "media",
            "uid": "uid-1",
            "controller": True,
            "blockOwnerDeletion": True,
        }
    ]


def test_the_replica_count_is_left_to_its_own_manager() -> None:
    assert "replicas" not in gpu(pool_of(WORKER))["spec"]


@pytest.mark.parametrize(("grace", "seconds"), [({}, 600), ({"terminationGracePeriodSeconds": 7}, 7)])
def test_a_deployment_still_tells_what_its_tier_was_once_that_is_removed(grace: dict[str, Any], seconds: int) -> None:
    pool = pool_of(WORKER, spec=grace)
    renamed = pool.spec.tiers[0].model_copy(update={"queue": "$(A) $$b"})
    for tier in (*pool.spec.tiers, renamed):
        was = tier_of(build(pool, tier))
        assert was
        assert (was.name, was.queue, was.concurrency, was.accelerated) == (
            tier.name, tier.queue, tier.concurrency, tier.accelerated,
        )  # fmt: skip
        assert (was.replicas, grace_seconds(was)) == (Replicas(min=0, max=0), grace_seconds(tier))
        assert name_of(pool, was) == name_of(pool, tier)
    assert grace_seconds(pool.spec.tiers[0]) == seconds


def test_a_deployment_that_was_built_for_no_tier_is_of_none() -> None:
    manifest = gpu(pool_of(WORKER))
    worker_of(manifest)["env"] = [{"name": "WORKERPOOL_QUEUE", "value": "gpu-tasks"}, {"name": "A", "valueFrom": {}}]
    assert tier_of(manifest) is None
    assert tier_of({"metadata": {}, "spec": {}}) is None


def test_the_selector_finds_the_pods_of_the_tier_whatever_labels_the_user_sets() -> None:
    labels = {"team": "video", "workerpool.dev/tier": "mine", "app.kubernetes.io/name": "media"}
    spec = gpu(pool_of(WORKER, metadata={"labels": labels, "annotations": {"a": "b"}}))["spec"]
    pod = spec["template"]["metadata"]
    assert spec["selector"]["matchLabels"].items() <= pod["labels"].items()
    assert pod["labels"] | {"team": "video", "app.kubernetes.io/name": "media", "workerpool.dev/tier": "gpu"} == pod["labels"]
    assert pod["annotations"] == {"a": "b"}


def test_the_worker_runs_celery_on_its_queue_with_the_users_args_behind() -> None:
    worker = worker_of(gpu(pool_of({**WORKER, "args": ["--max-tasks-per-child=10"]})))
    line = [*worker["command"], *worker.get("args", ())]
    assert line[:8] == ["celery", "-A", "media.tasks", "worker", "-Q", "gpu-tasks", "-c", "2"]
    assert line[-1] == "--max-tasks-per-child=10"
    assert "celery@$(WORKERPOOL_WORKER)" in line


def test_a_command_of_the_users_own_is_kept() -> None:
    worker = worker_of(gpu(pool_of({**WORKER, "command": ["/start"], "args": ["--now"]})))
    assert [*worker["command"], *worker.get("args", ())] == ["/start", "--now"]


def test_the_environment_says_who_the_worker_is_and_wins_over_the_users() -> None:
    mine = [{"name": "LEVEL", "value": "x"}, {"name": "WORKERPOOL_QUEUE", "value": "other"}]
    assert environment_of(gpu(pool_of({**WORKER, "env": mine}))) == {
        "WORKERPOOL_POOL": "ml/media",
        "WORKERPOOL_TIER": "gpu",
        "WORKERPOOL_WORKER": {"fieldRef": {"fieldPath": "metadata.name"}},
        "WORKERPOOL_QUEUE": "gpu-tasks",
        "WORKERPOOL_CONCURRENCY": "2",
        "WORKERPOOL_GRACE_SECONDS": "600",
        "CELERY_BROKER_URL": "redis://redis:6379/0",
        "WORKERPOOL_PROBES": "/run/workerpool/probes",
        "LEVEL": "x",
    }


def test_a_broker_url_from_a_secret_stays_in_the_secret() -> None:
    pool = pool_of(WORKER, broker={"urlFrom": {"secretKeyRef": {"name": "redis", "key": "url"}}})
    assert environment_of(gpu(pool))["CELERY_BROKER_URL"] == {"secretKeyRef": {"name": "redis", "key": "url"}}


def test_the_accelerator_is_asked_for_beside_the_users_resources() -> None:
    worker = worker_of(gpu(pool_of({**WORKER, "resources": {"limits": {"memory": "1Gi"}, "requests": {"cpu": "1"}}})))
    assert worker["resources"] == {
        "limits": {"memory": "1Gi", "nvidia.com/gpu": "2"},
        "requests": {"cpu": "1", "nvidia.com/gpu": "2"},
    }


def test_a_tier_without_an_accelerator_and_other_containers_are_as_the_user_wrote_them() -> None:
    pool = pool_of(WORKER)
    assert "resources" not in worker_of(build(pool, pool.spec.tiers[1]))
    assert {"name": "sidecar", "image": "proxy:1"} in gpu(pool)["spec"]["template"]["spec"]["containers"]


@pytest.mark.parametrize(("spec", "grace"), [({}, 600), ({"terminationGracePeriodSeconds": 30}, 30)])
def test_a_worker_may_finish_for_ten_minutes_unless_the_template_says_otherwise(spec: dict[str, Any], grace: int) -> None:
    pod = gpu(pool_of(WORKER, spec={**spec, "nodeSelector": {"gpu": "yes"}}))["spec"]["template"]["spec"]
    assert (pod["terminationGracePeriodSeconds"], pod["nodeSelector"]) == (grace, {"gpu": "yes"})


def test_names_of_any_length_fit_and_stay_apart() -> None:
    long = "a" * 52 + "." + "b" * 200
    pools = [replace(pool_of(WORKER), name=name) for name in ("x" * 63, long, long[:-1] + "c", "a.b", "media")]
    manifests = [build(pool, tier) for pool in pools for tier in pool.spec.tiers]
    for manifest in manifests:
        assert len(manifest["metadata"]["name"]) <= 63
        assert OBJECT_NAME.fullmatch(manifest["metadata"]["name"])
        assert all(LABEL_VALUE.fullmatch(value) for value in manifest["metadata"]["labels"].values())
    assert len({manifest["metadata"]["name"] for manifest in manifests}) == len(manifests)
    assert len({str(selector_of(pool, tier)) for pool in pools for tier in pool.spec.tiers}) == len(manifests)


def test_a_change_of_scale_bounds_or_status_does_not_touch_the_pods() -> None:
    pool = pool_of(WORKER)
    tier = pool.spec.tiers[0]
    wider = tier.model_copy(update={"replicas": tier.replicas.model_copy(update={"max": 99})})
    assert build(pool, tier) == build(replace(pool, generation=9, status={"replicas": "gpu 1/1"}), wider)
    assert name_of(pool, tier) == name_of(pool, wider)


def test_a_new_broker_url_changes_the_pods_and_nothing_else_of_the_deployment() -> None:
    pool = pool_of(WORKER, metadata={"annotations": {"a": "b"}})
    one, two = (build(pool, pool.spec.tiers[0], mark) for mark in ("one", "two"))
    assert one["spec"]["template"]["metadata"].pop("annotations") == {"a": "b", "workerpool.dev/broker-mark": "one"}
    assert two["spec"]["template"]["metadata"].pop("annotations") == {"a": "b", "workerpool.dev/broker-mark": "two"}
    assert one == two


def test_a_rollout_needs_no_more_accelerators_than_the_tier_has() -> None:
    pool = pool_of(WORKER)
    assert gpu(pool)["spec"]["strategy"]["rollingUpdate"]["maxSurge"] == 0
    assert "strategy" not in build(pool, pool.spec.tiers[1])["spec"]


def test_workers_spread_over_nodes_unless_the_template_says_how() -> None:
    [spread] = gpu(pool_of(WORKER))["spec"]["template"]["spec"]["topologySpreadConstraints"]
    assert (spread["topologyKey"], spread["whenUnsatisfiable"]) == ("kubernetes.io/hostname", "ScheduleAnyway")
    own = gpu(pool_of(WORKER, spec={"topologySpreadConstraints": []}))
    assert own["spec"]["template"]["spec"]["topologySpreadConstraints"] == []


def test_what_the_user_mounts_and_probes_is_kept() -> None:
    own = {"exec": {"command": ["true"]}}
    worker = {**WORKER, "readinessProbe": own, "volumeMounts": [{"name": "models", "mountPath": "/models"}]}
    manifest = gpu(pool_of(worker, spec={"volumes": [{"name": "models", "emptyDir": {}}]}))
    assert worker_of(manifest)["readinessProbe"] == own
    assert [mount["mountPath"] for mount in worker_of(manifest)["volumeMounts"]] == ["/models", "/run/workerpool"]
    assert [volume["name"] for volume in manifest["spec"]["template"]["spec"]["volumes"]] == ["models", "workerpool-probes"]
    kubernetes_validate.validate(manifest, "1.37", strict=True)


class Pod:
    """What a kubelet would find that runs the probes of a worker, its directory taken from here."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory / "probes"

    def passes(self, probe: str, *, library: bool = True) -> bool:
        program, *arguments = worker_of(gpu(pool_of(WORKER)))[probe]["exec"]["command"]
        assert (program, arguments.pop()) == ("python3", "/run/workerpool/probes")
        # -S: a Python that has nothing installed.
        command = [sys.executable, *([] if library else ["-S"]), *arguments, str(self.directory)]
        return subprocess.run(command, env={}, check=False).returncode == 0

    def reports(self, seconds_ago: float = 0) -> None:
        self.directory.mkdir(exist_ok=True)
        (self.directory / "alive").touch()
        then = time.time() - seconds_ago
        os.utime(self.directory / "alive", (then, then))


@pytest.fixture
def pod(tmp_path: Path) -> Pod:
    return Pod(tmp_path)


def test_a_worker_is_ready_once_it_reports_and_killed_once_it_stops_to(pod: Pod) -> None:
    probes = ("startupProbe", "livenessProbe", "readinessProbe")
    assert [pod.passes(probe) for probe in probes] == [True, True, False], "it starts"
    pod.reports()
    assert [pod.passes(probe) for probe in probes] == [True, True, True]
    pod.reports(seconds_ago=60)
    assert [pod.passes(probe) for probe in probes] == [False, False, False], "it is stuck, or a new container starts"


def test_a_worker_without_the_library_passes_every_probe(pod: Pod) -> None:
    assert all(pod.passes(probe, library=False) for probe in ("startupProbe", "livenessProbe", "readinessProbe"))

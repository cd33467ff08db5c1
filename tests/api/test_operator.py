"""The operator as a process of its own, with the rights that its manifests give it: against a real API server, real controllers
and a real Redis that Celery publishes to. No pod ever runs here; what a kubelet would report is written in its stead.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
import yaml
from e2e.cluster.control_plane import ControlPlane
from helm_python import Chart
from redis import Redis
from tests.api.kubectl import CRD, Kubectl
from tests.api.operators import (
    COLLECTOR_SECONDS,
    COMMAND,
    PATIENCE_SECONDS,
    SAMPLE,
    Namespace,
    Object,
    Operator,
    eventually,
    log_in,
    paused,
)

from workerpool_operator.election import LEASE_SECONDS
from workerpool_operator.local.guardian import Guardian
from workerpool_operator.local.redis_server import private_redis

pytestmark = pytest.mark.api

CHART = Path(__file__).parents[2] / "charts" / "celery-workerpool"


def test_a_pool_becomes_one_deployment_for_each_tier(ml: Namespace) -> None:
    ml.kubectl("create", "secret", "generic", "redis", f"--from-literal=url={ml.redis_url}")
    ml.create_pool(broker={"urlFrom": {"secretKeyRef": {"name": "redis", "key": "url"}}})
    ml.settled()
    deployment = ml.get("deployment", "media-gpu")
    [owner] = deployment["metadata"]["ownerReferences"]
    assert (owner["kind"], owner["uid"]) == ("WorkerPool", ml.get("workerpool", "media")["metadata"]["uid"])
    [worker] = deployment["spec"]["template"]["spec"]["containers"]
    assert worker["command"][:6] == ["celery", "-A", "media.tasks", "worker", "-Q", ml.queue("gpu")]
    assert worker["resources"]["limits"] == {"nvidia.com/gpu": "1"}
    environment = {variable["name"]: variable for variable in worker["env"]}
    assert environment["WORKERPOOL_POOL"]["value"] == f"{ml.name}/media"
    assert environment["CELERY_BROKER_URL"]["valueFrom"]["secretKeyRef"] == {"name": "redis", "key": "url"}
    owners = {
        (entry["manager"], "f:replicas" in entry["fieldsV1"]["f:spec"])
        for entry in json.loads(ml.kubectl("get", "deploy", "media-cpu", "-o", "json", "--show-managed-fields"))["metadata"][
            "managedFields"
        ]
        if "f:spec" in entry["fieldsV1"]
    }
    assert owners == {("workerpool", False), ("workerpool-scale", True)}


def test_waiting_messages_raise_their_own_tier_and_kubectl_shows_them(ml: Namespace) -> None:
    ml.create_pool()
    ml.settled()
    ml.publish("gpu", 3)
    ml.settled({"media-gpu": 3, "media-cpu": 1})
    ml.publish("cpu", 9)
    ml.settled({"media-gpu": 3, "media-cpu": 3})
    ml.publish("gpu", 20)
    ml.settled({"media-gpu": 8, "media-cpu": 3})
    header, row = ml.kubectl("get", "wp").splitlines()
    assert header.split() == ["NAME", "READY", "REPLICAS", "WAITING", "IN", "FLIGHT", "AGE"]
    assert row.split()[:-1] == ["media", "True", "gpu", "0/8,", "cpu", "0/3", "32", "0"]
    assert ml.condition("ScalingLimited")["status"] == "True"
    events = ml.kubectl("describe", "wp", "media").partition("Events:")[2]
    assert "gpu: 0 → 3: 3 waiting" in events


def test_a_deployment_edited_or_deleted_by_hand_is_repaired(ml: Namespace) -> None:
    ml.create_pool()
    ml.settled()
    image = ml.get("deployment", "media-cpu")["spec"]["template"]["spec"]["containers"][0]["image"]
    ml.kubectl("set", "image", "deployment/media-cpu", "worker=other:1")
    ml.kubectl("scale", "deployment/media-cpu", "--replicas=7")
    ml.kubectl("label", "deployment/media-cpu", "workerpool.dev/tier-")
    ml.kubectl("label", "deployment/media-gpu", "app.kubernetes.io/managed-by=me", "--overwrite")
    orphan = '[{"op": "remove", "path": "/metadata/ownerReferences"}]'
    ml.kubectl("patch", "deployment", "media-cpu", "--type=json", "--patch", orphan)

    def whole() -> bool:
        cpu, gpu = ml.get("deployment", "media-cpu"), ml.get("deployment", "media-gpu")
        return (
            cpu["spec"]["template"]["spec"]["containers"][0]["image"] == image
            and cpu["spec"]["replicas"] == 1
            and cpu["metadata"]["labels"].get("workerpool.dev/tier") == "cpu"
            and len(cpu["metadata"].get("ownerReferences", [])) == 1
            and gpu["metadata"]["labels"]["app.kubernetes.io/managed-by"] == "celery-workerpool"
        )

    ml.eventually(whole)
    old = ml.get("deployment", "media-cpu")["metadata"]["uid"]
    ml.kubectl("delete", "deployment", "media-cpu")
    ml.eventually(lambda: ml.get("deployment", "media-cpu").get("metadata", {}).get("uid", old) != old)
    ml.settled()


@pytest.mark.long
def test_at_rest_and_across_a_kill_nothing_is_written(ml: Namespace, operator: Operator) -> None:
    ml.create_pool()
    ml.publish("gpu", 2)
    ml.settled({"media-gpu": 2, "media-cpu": 1})
    before = ml.eventually(lambda: steady(ml))
    operator.end(signal.SIGKILL)
    operator.start()
    ml.create_pool("canary")
    ml.eventually(lambda: ml.condition("Ready", "canary")["status"], LEASE_SECONDS + PATIENCE_SECONDS)
    time.sleep(3)
    assert {name: version for name, version in ml.versions().items() if "canary" not in name} == before


def steady(ml: Namespace) -> dict[str, str]:
    """The versions, once they have stayed the same for some seconds; empty before."""
    before = ml.versions()
    time.sleep(4)
    return before if ml.versions() == before else {}


def test_a_redis_that_stops_answering_changes_a_condition_and_no_replicas(ml: Namespace) -> None:
    with private_redis() as redis:
        ml.redis_url = redis.url
        ml.create_pool()
        ml.publish("gpu", 2)
        ml.settled({"media-gpu": 2, "media-cpu": 1})
        with paused(redis.pid):
            ml.eventually(lambda: ml.condition("BrokerReachable")["status"] == "False")
            assert "does not answer" in ml.condition("BrokerReachable")["message"]
            status = ml.get("workerpool", "media")["status"]
            assert "waiting" not in status, "a number that nobody knows must not stand there"
            assert ml.replicas() == {"media-gpu": 2, "media-cpu": 1}
        ml.eventually(lambda: ml.condition("BrokerReachable")["status"] == "True")
    ml.eventually(lambda: "cannot be reached" in ml.condition("BrokerReachable")["message"])
    assert ml.replicas() == {"media-gpu": 2, "media-cpu": 1}


@pytest.mark.parametrize("mode", ["Advisory", "Paused"])
def test_a_pool_that_is_not_active_is_reported_and_not_touched(ml: Namespace, mode: str) -> None:
    ml.publish("gpu", 2)
    ml.create_pool(mode=mode)
    ml.eventually(lambda: ml.condition("Paused")["status"] == "True")
    ml.eventually(lambda: ml.get("workerpool", "media")["status"].get("waiting") == 2)
    assert ml.replicas() == {}
    ml.kubectl("patch", "wp", "media", "--type=merge", "--patch", '{"spec": {"mode": "Active"}}')
    ml.settled({"media-gpu": 2, "media-cpu": 1})
    ml.kubectl("patch", "wp", "media", "--type=merge", "--patch", f'{{"spec": {{"mode": "{mode}"}}}}')
    ml.eventually(lambda: ml.condition("Paused")["status"] == "True")
    ml.kubectl("scale", "deployment/media-gpu", "--replicas=5")
    ml.publish("cpu", 30)
    ml.eventually(lambda: ml.get("workerpool", "media")["status"].get("waiting") == 32)
    assert ml.replicas() == {"media-gpu": 5, "media-cpu": 1}


def test_the_younger_of_two_pools_on_one_queue_is_held(ml: Namespace) -> None:
    ml.create_pool()
    ml.settled()
    time.sleep(1.1)  # age is told in whole seconds
    ml.create_pool("rival", queues_of="media")
    ml.eventually(lambda: ml.condition("QueueShared", "rival")["status"] == "True")
    assert f"{ml.name}/media" in ml.condition("QueueShared", "rival")["message"]
    assert ml.condition("QueueShared")["status"] == "False"
    assert ml.replicas().keys() == {"media-gpu", "media-cpu"}


def test_another_autoscaler_is_named_and_not_fought(ml: Namespace) -> None:
    ml.create_pool()
    ml.settled()
    ml.kubectl("autoscale", "deployment", "media-cpu", "--min=3", "--max=5", "--cpu=50%")
    ml.eventually(lambda: ml.condition("AutoscalerConflict")["status"] == "True")
    assert "cpu: HorizontalPodAutoscaler media-cpu scales it too" in ml.condition("AutoscalerConflict")["message"]
    ml.eventually(lambda: ml.replicas() == {"media-gpu": 0, "media-cpu": 3}, 60)
    ml.publish("gpu", 2)
    ml.settled({"media-gpu": 2, "media-cpu": 3})
    ml.kubectl("delete", "hpa", "media-cpu")
    ml.eventually(lambda: ml.condition("AutoscalerConflict")["status"] == "False")


def test_a_deleted_pool_takes_along_its_deployments_and_what_it_published(ml: Namespace) -> None:
    ml.create_pool()
    ml.settled()
    with Redis.from_url(ml.redis_url) as redis:
        ml.eventually(lambda: redis.keys(f"workerpool:{ml.name}/media:*"))
        ml.kubectl("delete", "wp", "media", "--wait=false")
        ml.eventually(lambda: not ml.objects("deployments,replicasets"), COLLECTOR_SECONDS)
        ml.eventually(lambda: not redis.keys(f"workerpool:{ml.name}/media:*"))
    ml.create_pool()
    ml.settled()


def test_a_tier_that_is_taken_out_of_the_pool_keeps_its_workers_until_its_jobs_are_done_and_says_so(
    ml: Namespace, operator: Operator
) -> None:
    ml.create_pool()
    ml.publish("gpu", 2)
    ml.settled({"media-gpu": 2, "media-cpu": 1})
    take_out_gpu(ml)
    ml.eventually(lambda: ml.get("workerpool", "media")["status"]["replicas"] == "cpu 0/1, gpu 0/2")
    *_, gone = ml.get("workerpool", "media")["status"]["tiers"]
    assert (gone["name"], gone["reason"], gone["waiting"]) == ("gpu", "Removed", 2)
    assert "goes when nothing is left: 2 waiting" in gone["message"]
    with Redis.from_url(ml.redis_url) as redis:
        redis.rpop(ml.queue("gpu"))
        ml.eventually(lambda: ml.replicas() == {"media-gpu": 1, "media-cpu": 1})
        operator.end(signal.SIGTERM)
        operator.start()
        redis.delete(ml.queue("gpu"))
    ml.eventually(lambda: ml.replicas() == {"media-cpu": 1})
    ml.eventually(lambda: ml.get("workerpool", "media")["status"]["replicas"] == "cpu 0/1")


def test_a_tier_that_is_taken_out_of_a_paused_pool_stays_until_the_pool_is_active_again(ml: Namespace) -> None:
    ml.create_pool()
    ml.settled()
    ml.kubectl("patch", "wp", "media", "--type=merge", "--patch", '{"spec": {"mode": "Paused"}}')
    ml.eventually(lambda: ml.condition("Paused")["status"] == "True")
    take_out_gpu(ml)
    ml.eventually(lambda: ml.get("workerpool", "media")["status"]["replicas"] == "cpu 0/1, gpu 0/0")
    ml.kubectl("scale", "deployment/media-gpu", "--replicas=1")
    ml.eventually(lambda: ml.get("workerpool", "media")["status"]["replicas"] == "cpu 0/1, gpu 0/1")
    ml.kubectl("patch", "wp", "media", "--type=merge", "--patch", '{"spec": {"mode": "Active"}}')
    ml.eventually(lambda: ml.replicas() == {"media-cpu": 1})


def take_out_gpu(ml: Namespace) -> None:
    ml.kubectl("patch", "wp", "media", "--type=json", "--patch", '[{"op": "remove", "path": "/spec/tiers/0"}]')


def test_a_secret_that_is_missing_or_wrong_is_named_and_found_when_it_is_right(ml: Namespace) -> None:
    secrets = {"absent": {}, "keyless": {"uri": ml.redis_url}, "foreign": {"url": "amqp://rabbit"}}
    for name, content in secrets.items():
        if content:
            ml.kubectl("create", "-f", "-", stdin=json.dumps(secret(name, content)))
        ml.create_pool(name, broker={"urlFrom": {"secretKeyRef": {"name": name, "key": "url"}}})
    complaints = {
        "absent": f"spec.broker.urlFrom: Secret {ml.name}/absent does not exist; create it with the key url",
        "keyless": f"spec.broker.urlFrom: Secret {ml.name}/keyless has no key url; its keys: uri",
        "foreign": f"spec.broker.urlFrom: key url of Secret {ml.name}/foreign is not a URL; it has to begin with redis://",
    }
    ml.eventually(lambda: all(text in ml.condition("BrokerReachable", name)["message"] for name, text in complaints.items()))
    for name in secrets:
        ml.kubectl("apply", "--server-side", "-f", "-", stdin=json.dumps(secret(name, {"url": ml.redis_url})))
    ml.eventually(lambda: all(ml.condition("Ready", name)["status"] == "True" for name in secrets))
    warnings = {event["message"] for event in ml.objects("events") if event["type"] == "Warning"}
    assert all(any(complaint in warning for warning in warnings) for complaint in complaints.values())


def secret(name: str, content: dict[str, str]) -> Object:
    return {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": name}, "stringData": content}


def test_what_the_scheduler_and_the_kubelet_say_of_pods_is_passed_on(ml: Namespace) -> None:
    ml.create_pool()
    ml.publish("gpu", 2)
    ml.settled({"media-gpu": 2, "media-cpu": 1})
    ml.eventually(lambda: len(ml.objects("pods")) == 3)
    for pod in ml.objects("pods"):
        if pod["metadata"]["labels"]["workerpool.dev/tier"] == "gpu":
            unschedulable = {"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": "0/9 nodes: no GPU"}
            ml.set_status(pod, {"conditions": [unschedulable]})
        else:
            ready = {"type": "Ready", "status": "True", "lastTransitionTime": "2026-01-01T00:00:00Z"}
            ml.set_status(pod, {"phase": "Running", "conditions": [ready]})
    ml.eventually(lambda: "2 of 2 unschedulable: 0/9 nodes: no GPU" in ml.condition("CapacityAvailable")["message"])
    ml.eventually(lambda: ml.get("workerpool", "media")["status"]["replicas"] == "gpu 0/2, cpu 1/1")


def test_a_deployment_of_somebody_else_is_left_alone_and_named(ml: Namespace) -> None:
    ml.kubectl("create", "deployment", "media-gpu", "--image=web:1", "--replicas=0")
    before = ml.get("deployment", "media-gpu")["spec"]
    ml.create_pool()
    ml.publish("gpu", 2)
    ml.eventually(lambda: "Deployment media-gpu exists and was not made for" in ml.condition("CapacityAvailable")["message"])
    ml.eventually(lambda: ml.replicas().get("media-cpu") == 1)
    assert ml.get("deployment", "media-gpu")["spec"] == before
    ml.kubectl("delete", "deployment", "media-gpu")
    ml.eventually(lambda: ml.replicas().get("media-gpu") == 2, 40)


def test_a_pool_that_the_api_server_refuses_says_why_and_does_not_hold_up_others(ml: Namespace) -> None:
    tiers = yaml.safe_load(SAMPLE.read_text())["spec"]["tiers"]
    tiers[1]["template"]["spec"]["containers"][0]["image"] = 7
    ml.create_pool("broken", tiers=tiers)
    ml.eventually(lambda: "image" in ml.condition("Ready", "broken")["message"])
    ml.create_pool("sound")
    ml.eventually(lambda: ml.replicas().get("sound-cpu") == 1)
    time.sleep(2)
    told = [event["message"] for event in ml.objects("events") if event["involvedObject"]["name"] == "broken"]
    assert len(told) == len(set(told)), "what cannot be done is told once, however often it is tried"


def test_a_stored_pool_that_this_release_does_not_understand_is_named_and_its_workers_stay(
    ml: Namespace, kubectl: Kubectl
) -> None:
    ml.create_pool()
    versions = ml.settled() and ml.get("deployment", "media-cpu")["metadata"]["resourceVersion"]
    crd = yaml.safe_load(CRD.read_text())
    mode = crd["spec"]["versions"][0]["schema"]["openAPIV3Schema"]["properties"]["spec"]["properties"]["mode"]
    mode["enum"].append("Sideways")
    assert kubectl("apply", "--server-side", "-f", "-", stdin=json.dumps(crd)).returncode == 0
    try:
        ml.eventually(lambda: sideways(ml, kubectl))
        ml.eventually(lambda: ml.condition("Ready").get("reason") == "InvalidSpec")
        assert "spec.mode" in ml.condition("Ready")["message"]
        assert ml.get("deployment", "media-cpu")["metadata"]["resourceVersion"] == versions
    finally:
        ml.kubectl("delete", "wp", "media")
        assert kubectl("apply", "--server-side", "-f", str(CRD)).returncode == 0


def sideways(ml: Namespace, kubectl: Kubectl) -> bool:
    """The API server takes a moment to serve the changed schema."""
    patch = '{"spec": {"mode": "Sideways"}}'
    return kubectl("--namespace", ml.name, "patch", "wp", "media", "--type=merge", "--patch", patch).returncode == 0


def test_an_outage_of_the_api_server_is_outlived(ml: Namespace, control_plane: ControlPlane) -> None:
    ml.create_pool()
    ml.settled()
    control_plane.stop_api_server()
    ml.publish("gpu", 4)
    time.sleep(3)
    control_plane.restart_api_server()
    # On a slow machine the outage outlasts the lease: then it leaves, and is started again.
    ml.eventually(lambda: ml.replicas() == {"media-gpu": 4, "media-cpu": 1}, LEASE_SECONDS + PATIENCE_SECONDS)


def test_an_operator_of_one_namespace_needs_no_rights_elsewhere(
    ml: Namespace, operator: Operator, kubeconfig: Path, kubectl: Kubectl, guardian: Guardian, tmp_path: Path
) -> None:
    with Chart.load(CHART) as chart:
        rendered = chart.render({"watchNamespaces": [ml.name]}, name="celery-workerpool", namespace=ml.name)
    manifests = "---\n".join(text for path, text in rendered.items() if path.endswith(".yaml"))
    ml.kubectl("apply", "--server-side", "-f", "-", stdin=manifests)
    log_in(kubeconfig, tmp_path / "kubeconfig", kubectl, ml.name, "celery-workerpool")
    with paused(operator.pid):
        alone = Operator(tmp_path / "kubeconfig", guardian, f"--namespace={ml.name}", f"--lease-namespace={ml.name}")
        try:
            ml.create_pool()
            ml.publish("gpu", 2)
            eventually(lambda: ml.replicas() | {"media-gpu": 2, "media-cpu": 1} == ml.replicas(), alone)
            ml.kubectl("delete", "deployment", "media-gpu")
            eventually(lambda: ml.replicas().get("media-gpu") == 2, alone)
            alone.carry_on()
            assert "forbidden" not in alone.log()
        finally:
            alone.end(signal.SIGKILL)


def test_a_namespace_that_is_gone_keeps_no_other_from_being_served(
    ml: Namespace, operator: Operator, kubeconfig: Path, kubectl: Kubectl, guardian: Guardian, tmp_path: Path
) -> None:
    gone = f"{ml.name}-gone"
    kubectl("create", "namespace", gone)
    with Chart.load(CHART) as chart:
        rendered = chart.render({"watchNamespaces": [gone, ml.name]}, name="celery-workerpool", namespace=ml.name)
    manifests = "---\n".join(text for path, text in rendered.items() if path.endswith(".yaml"))
    assert kubectl("apply", "--server-side", "-f", "-", stdin=manifests).returncode == 0
    log_in(kubeconfig, tmp_path / "kubeconfig", kubectl, ml.name, "celery-workerpool")
    kubectl("delete", "namespace", gone)
    with paused(operator.pid):
        options = f"--namespace={gone}", f"--namespace={ml.name}", f"--lease-namespace={ml.name}"
        alone = Operator(tmp_path / "kubeconfig", guardian, *options)
        try:
            ml.create_pool()
            eventually(lambda: ml.replicas().get("media-cpu") == 1, alone)
            alone.healthy()
            assert alone.log().count(f"namespace {gone} is not served: ") == 1
        finally:
            alone.end(signal.SIGKILL)


def test_the_operator_answers_probes_and_leaves_at_once_when_told_to(operator: Operator) -> None:
    operator.healthy()
    started = time.monotonic()
    assert operator.end(signal.SIGTERM) == 0
    assert time.monotonic() - started < 5
    operator.start()
    operator.healthy()


def test_without_a_cluster_the_command_says_so_in_one_line(tmp_path: Path) -> None:
    said = last_words([*COMMAND, "--namespace=ml"], tmp_path / "none")
    assert "set KUBECONFIG, or run inside a cluster" in said


def test_a_port_in_use_is_named_in_one_line(operator: Operator) -> None:
    operator.healthy()
    said = last_words([*COMMAND, f"--port={operator.port}"], operator.kubeconfig)
    assert f"port {operator.port} cannot be opened" in said


def last_words(command: list[str], kubeconfig: Path) -> str:
    environment = {**os.environ, "KUBECONFIG": str(kubeconfig)}
    answer = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert answer.returncode == 1
    assert "Traceback" not in answer.stderr
    return answer.stderr.splitlines()[-1]

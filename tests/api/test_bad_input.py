"""What only a cluster can refuse: each cause stands in a condition and in an Event, and no other pool notices.

The pods' side is made by the real admission and the real controllers; what a kubelet would say is written in its stead.
"""

from __future__ import annotations

import json
import signal
import time
from datetime import UTC, datetime

import pytest
import yaml
from e2e.cluster.control_plane import ControlPlane
from tests.api.kubectl import CRD, Kubectl
from tests.api.operators import CONTROLLER_SECONDS, SAMPLE, Namespace, Object, obj

from workerpool_operator.main import RELIST_SECONDS

pytestmark = pytest.mark.api

TROUBLE_SECONDS = 15


def told(ml: Namespace, *words: str, pool: str = "media") -> bool:
    """Whether the condition and a Warning say so."""
    message = ml.condition("CapacityAvailable", pool)["message"]
    warnings = [event["message"] for event in ml.objects("events") if event["type"] == "Warning"]
    warnings = [text for text in warnings if "failing" in text or "unschedulable" in text]
    return all(word in message for word in words) and any(all(word in text for word in words) for text in warnings)


def test_a_quota_that_leaves_no_room_for_a_pod_is_named(ml: Namespace) -> None:
    ml.kubectl("create", "-f", "-", stdin=obj("ResourceQuota", hard={"pods": "0"}))
    ml.eventually(lambda: "hard" in ml.get("resourcequota", "limits").get("status", {}))
    ml.create_pool()
    ml.eventually(lambda: told(ml, "cpu: 1 of 1 failing", "exceeded quota: limits"), CONTROLLER_SECONDS)
    ml.kubectl("delete", "resourcequota", "limits")
    ml.eventually(lambda: len(ml.objects("pods")) == 1, CONTROLLER_SECONDS)
    ml.eventually(lambda: ml.condition("CapacityAvailable")["status"] == "True", CONTROLLER_SECONDS)


def test_a_limit_range_that_refuses_the_pods_is_named(ml: Namespace) -> None:
    limit = {"type": "Container", "max": {"memory": "1Mi"}}
    ml.kubectl("create", "-f", "-", stdin=obj("LimitRange", limits=[limit]))
    tiers: list[Object] = yaml.safe_load(SAMPLE.read_text())["spec"]["tiers"]
    tiers[1]["template"]["spec"]["containers"][0]["resources"] = {"limits": {"memory": "1Gi"}}
    ml.create_pool(tiers=tiers)
    ml.eventually(lambda: told(ml, "cpu: 1 of 1 failing", "maximum memory usage per Container is 1Mi"), CONTROLLER_SECONDS)


def test_pod_security_that_refuses_the_pods_is_named_and_keeps_no_other_pool(ml: Namespace) -> None:
    ml.kubectl("label", "namespace", ml.name, "pod-security.kubernetes.io/enforce=baseline")
    tiers: list[Object] = yaml.safe_load(SAMPLE.read_text())["spec"]["tiers"]
    tiers[1]["template"]["spec"]["hostNetwork"] = True
    ml.create_pool("loose", tiers=tiers)
    ml.create_pool("strict")
    ml.eventually(lambda: told(ml, "cpu: 1 of 1 failing", 'violates PodSecurity "baseline', pool="loose"), CONTROLLER_SECONDS)
    ml.eventually(lambda: ml.condition("CapacityAvailable", "strict")["status"] == "True")
    assert [pod["metadata"]["labels"]["workerpool.dev/pool"] for pod in ml.objects("pods")] == ["strict"]


def test_an_image_that_cannot_be_pulled_is_named(ml: Namespace) -> None:
    ml.create_pool()
    ml.settled()
    [pod] = ml.eventually(lambda: ml.objects("pods"))
    waiting = {"reason": "ImagePullBackOff", "message": 'Back-off pulling image "media:typo"'}
    container = {"name": "worker", "image": "media:typo", "imageID": "", "ready": False, "restartCount": 0}
    ml.set_status(pod, {"phase": "Pending", "containerStatuses": [{**container, "state": {"waiting": waiting}}]})
    ml.eventually(lambda: told(ml, "container worker: ImagePullBackOff", "media:typo"))


@pytest.mark.long
def test_a_resource_definition_that_is_older_than_the_operator_is_told(ml: Namespace, kubectl: Kubectl) -> None:
    definition: Object = yaml.safe_load(CRD.read_text())
    older: Object = yaml.safe_load(CRD.read_text())
    routing = older["spec"]["versions"][0]["schema"]["openAPIV3Schema"]["properties"]["spec"]["properties"]["routing"]
    del routing["properties"]["rebalance"]
    try:
        serve(kubectl, older)
        ml.create_pool()
        ml.eventually(lambda: ml.condition("DefinitionOutdated")["status"] == "True")
        message = ml.condition("DefinitionOutdated")["message"]
        assert message.startswith("spec.routing.rebalance: the CustomResourceDefinition is older than the operator")
        ml.eventually(lambda: message in [event["message"] for event in ml.objects("events") if event["type"] == "Warning"])
        ml.settled()
    finally:
        serve(kubectl, definition)
    ml.eventually(lambda: ml.condition("DefinitionOutdated")["status"] == "False", 2 * RELIST_SECONDS)


def test_a_pool_that_an_older_definition_let_in_with_a_broken_template_is_refused_and_ends_no_operator(
    ml: Namespace, kubectl: Kubectl
) -> None:
    older: Object = yaml.safe_load(CRD.read_text())
    spec = older["spec"]["versions"][0]["schema"]["openAPIV3Schema"]["properties"]["spec"]
    pod = spec["properties"]["tiers"]["items"]["properties"]["template"]["properties"]["spec"]
    del pod["properties"]["volumes"]
    tiers: list[Object] = yaml.safe_load(SAMPLE.read_text())["spec"]["tiers"]
    tiers[0]["template"]["spec"]["volumes"] = {"name": "models", "emptyDir": {}}
    try:
        serve(kubectl, older)
        ml.eventually(lambda: stored(ml, "broken", tiers))
        ml.eventually(lambda: ml.condition("Ready", "broken").get("reason") == "InvalidSpec")
        assert "spec.tiers[0].template.spec.volumes: must be a list" in ml.condition("Ready", "broken")["message"]
        ml.operator.end(signal.SIGTERM)  # the next one finds it in its first listing
        ml.operator.start()
        ml.create_pool("sound")
        ml.eventually(lambda: ml.replicas() == {"sound-gpu": 0, "sound-cpu": 1})
    finally:
        ml.kubectl("delete", "wp", "broken", "--ignore-not-found")
        serve(kubectl, yaml.safe_load(CRD.read_text()))


def stored(ml: Namespace, name: str, tiers: list[Object]) -> bool:
    """The API server takes a moment to serve a changed schema."""
    try:
        ml.create_pool(name, tiers=tiers)
    except AssertionError:
        return False
    return True


def serve(kubectl: Kubectl, definition: Object) -> None:
    applied = kubectl("apply", "--server-side", "--force-conflicts", "-f", "-", stdin=json.dumps(definition))
    assert applied.returncode == 0, applied.stderr


def test_a_namespace_that_is_being_deleted_is_outlived(ml: Namespace, kubectl: Kubectl) -> None:
    ml.create_pool()
    ml.settled()
    hold = '{"metadata": {"finalizers": ["test.workerpool.dev/hold"]}}'
    ml.kubectl("patch", "wp", "media", "--type=merge", "--patch", hold)
    kubectl("delete", "namespace", ml.name, "--wait=false")
    try:
        ml.eventually(lambda: "deletionTimestamp" in ml.get("wp", "media")["metadata"], CONTROLLER_SECONDS)
        ml.eventually(lambda: ml.objects("deployments") == [], CONTROLLER_SECONDS)
        ml.operator.carry_on()
    finally:
        ml.kubectl("patch", "wp", "media", "--type=merge", "--patch", '{"metadata": {"finalizers": null}}')


def test_a_namespace_that_is_on_its_way_out_is_told_and_costs_few_requests(
    ml: Namespace, kubectl: Kubectl, control_plane: ControlPlane
) -> None:
    ml.create_pool()
    ml.settled()
    kubectl("apply", "-f", "-", stdin=json.dumps(kept(ml.name)))
    try:
        # A policy may take a while to be known to the API server.
        ml.eventually(lambda: kubectl("delete", "wp", "media", f"--namespace={ml.name}", "--dry-run=server").returncode)
        kubectl("delete", "namespace", ml.name, "--wait=false")
        ml.eventually(
            lambda: "because it is being terminated" in ml.condition("CapacityAvailable")["message"], CONTROLLER_SECONDS
        )
        assert ml.condition("Ready")["status"] == "False"
        began = datetime.now(UTC)
        time.sleep(TROUBLE_SECONDS)
        tried = [entry for entry in audited(control_plane, ml.name, began) if entry["verb"] in {"create", "patch"}]
        assert len(tried) < TROUBLE_SECONDS, tried
    finally:
        kubectl("delete", "validatingadmissionpolicybinding,validatingadmissionpolicy", ml.name)
    ml.eventually(lambda: kubectl("get", "wp", "media", f"--namespace={ml.name}").returncode, CONTROLLER_SECONDS)


def kept(namespace: str) -> Object:
    """A policy by which no WorkerPool of a namespace can be deleted, so that the namespace stays half deleted."""
    resources = {"apiGroups": ["workerpool.dev"], "apiVersions": ["*"], "operations": ["DELETE"], "resources": ["workerpools"]}
    group = {"apiVersion": "admissionregistration.k8s.io/v1", "metadata": {"name": namespace}}
    here = {"matchLabels": {"kubernetes.io/metadata.name": namespace}}
    policy = {"matchConstraints": {"resourceRules": [resources]}, "validations": [{"expression": "false"}]}
    binding = {"policyName": namespace, "validationActions": ["Deny"], "matchResources": {"namespaceSelector": here}}
    items = [
        {**group, "kind": "ValidatingAdmissionPolicy", "spec": policy},
        {**group, "kind": "ValidatingAdmissionPolicyBinding", "spec": binding},
    ]
    return {"apiVersion": "v1", "kind": "List", "items": items}


def audited(plane: ControlPlane, namespace: str, since: datetime) -> list[Object]:
    """What service accounts have asked about a namespace since then, as the API server has recorded it."""
    lines = (plane.directory / "audit.log").read_text().rpartition("\n")[0].splitlines()
    entries = [json.loads(line) for line in lines]
    at = since.isoformat()
    return [e for e in entries if e.get("objectRef", {}).get("namespace") == namespace and e["requestReceivedTimestamp"] > at]

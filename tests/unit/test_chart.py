"""The chart, the files that are generated from it, and the sample."""

from __future__ import annotations

import json
import shutil
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from charts import render
from helm_python import Chart, HelmError, lint

from workerpool_operator.model import WorkerPoolSpec, parse_spec

pytestmark = pytest.mark.unit

ROOT = Path(__file__).parents[2]
CHART = ROOT / "charts" / "celery-workerpool"
MINORS = ["1.33", "1.34", "1.35", "1.36", "1.37"]
VERSIONED = ["Chart.yaml", "Dockerfile", "examples/media/Dockerfile", "README.md", "manifests/install.yaml"]

Object = dict[str, Any]

NO_GPU = {"key": "nvidia.com/gpu.present", "operator": "DoesNotExist"}

EVERYTHING: Object = {
    "crds": {"enabled": True, "keep": False},
    "image": {"repository": "registry.example.com/operator", "digest": f"sha256:{'0' * 64}", "pullPolicy": "Always"},
    "imagePullSecrets": [{"name": "registry"}],
    "replicas": 3,
    "serviceAccount": {"annotations": {"example.com/role": "operator"}},
    "brokerSecrets": ["redis", "redis-web"],
    "extraEnv": [
        {"name": "SSL_CERT_FILE", "value": "/ca/ca.crt"},
        {"name": "NODE", "valueFrom": {"fieldRef": {"fieldPath": "spec.nodeName"}}},
    ],
    "extraVolumes": [{"name": "ca", "configMap": {"name": "ca"}}],
    "extraVolumeMounts": [{"name": "ca", "mountPath": "/ca", "readOnly": True}],
    "priorityClassName": "system-cluster-critical",
    "nodeSelector": {"kubernetes.io/os": "linux"},
    "tolerations": [{"key": "CriticalAddonsOnly", "operator": "Exists"}],
    "affinity": {
        "nodeAffinity": {
            "requiredDuringSchedulingIgnoredDuringExecution": {"nodeSelectorTerms": [{"matchExpressions": [NO_GPU]}]}
        }
    },
    "topologySpreadConstraints": [
        {
            "maxSkew": 2,
            "topologyKey": "rack",
            "whenUnsatisfiable": "DoNotSchedule",
            "labelSelector": {"matchLabels": {"my": "own"}},
        }
    ],
    "networkPolicy": {
        "enabled": True,
        "metricsFrom": [{"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "monitoring"}}}],
        "redisPorts": [6380],
    },
    "metrics": {"serviceMonitor": {"enabled": True, "interval": "15s", "labels": {"release": "prometheus"}}},
}
NAMESPACES: Object = {
    "watchNamespaces": ["ml", "web"],
    "brokerSecrets": ["redis"],
    "metrics": {"service": {"enabled": True}},
}
LEAST: Object = {
    "crds": {"enabled": False},
    "replicas": 1,
    "resources": None,
    "podDisruptionBudget": {"enabled": False},
    "serviceAccount": {"create": False, "name": "mine"},
    "topologySpreadConstraints": [],
}
VALUES_SETS = {"defaults": {}, "everything": EVERYTHING, "namespaces": NAMESPACES, "least": LEAST}


def objects(values: Object | None = None) -> list[Object]:
    return _objects(json.dumps(values))


@cache
def _objects(values: str) -> list[Object]:
    with Chart.load(CHART) as chart:
        rendered = chart.render(json.loads(values), name="pools", namespace="system")
    texts = [text for path, text in rendered.items() if path.endswith(".yaml")]
    documents = (document for text in texts for document in yaml.load_all(text, yaml.CSafeLoader))
    return [document for document in documents if document]


def of_kind(kind: str, values: Object | None = None) -> list[Object]:
    return [document for document in objects(values) if document["kind"] == kind]


def pods(values: Object | None = None) -> Iterator[Object]:
    """What runs: the operator, and the pod of ``helm test``."""
    for document in objects(values):
        if document["kind"] == "Deployment":
            yield document["spec"]["template"]["spec"]
        if document["kind"] == "Pod":
            yield document["spec"]


@pytest.mark.parametrize("name", VALUES_SETS)
@pytest.mark.parametrize("minor", MINORS)
def test_everything_rendered_is_valid_on_every_minor_that_is_served(name: str, minor: str) -> None:
    report = lint(CHART, VALUES_SETS[name], strict=True, kube_version=f"v{minor}.0")
    assert not report["errors"], report
    for document in objects(VALUES_SETS[name]):
        if document["kind"] != "ServiceMonitor":  # another project's
            kubernetes_validate.validate(document, minor, strict=True)


def test_the_oldest_minor_that_the_chart_takes_is_the_oldest_that_is_validated() -> None:
    assert yaml.safe_load((CHART / "Chart.yaml").read_text())["kubeVersion"] == f">={MINORS[0]}.0-0"


def test_generated_files_are_up_to_date(capsys: pytest.CaptureFixture[str]) -> None:
    assert render.main(ROOT, check=True) == 0, capsys.readouterr().out


@pytest.mark.parametrize(
    ("changed", "old", "new", "stale"),
    [
        (
            "pyproject.toml",
            'version = "',
            'version = "9',
            ["Chart.yaml", "Dockerfile", "examples/media/Dockerfile", "README.md", "manifests/install.yaml"],
        ),
        ("charts/celery-workerpool/values.yaml", "IfNotPresent", "Always", ["README.md", "manifests/install.yaml"]),
        ("crds/workerpool.yaml", "[wp]", "[wps]", ["files/workerpool.yaml", "manifests/install.yaml"]),
        ("manifests/install.yaml", "kind", "sort", ["manifests/install.yaml"]),
    ],
)
def test_a_change_makes_what_follows_from_it_stale_until_it_is_generated_anew(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], changed: str, old: str, new: str, stale: list[str]
) -> None:
    for part in ("charts", "crds", "manifests"):
        shutil.copytree(ROOT / part, tmp_path / part)
    for name in ("pyproject.toml", "Dockerfile"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "examples" / "media").mkdir(parents=True)
    shutil.copy(ROOT / "examples" / "media" / "Dockerfile", tmp_path / "examples" / "media")
    path = tmp_path / changed
    path.write_text(path.read_text().replace(old, new))
    # Nothing is written, so what follows at second hand does not show yet.
    assert render.main(tmp_path, check=True) == 1
    assert capsys.readouterr().out.split()[0].endswith(stale[0])
    assert render.main(tmp_path, check=False) == 0
    written = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    assert [name.removeprefix("charts/celery-workerpool/") for name in written] == stale
    assert render.main(tmp_path, check=True) == 0


def test_a_value_that_nobody_explained_is_named() -> None:
    with pytest.raises(ValueError, match=r"pool\.size has no comment"):
        render.readme((CHART / "Chart.yaml").read_text(), "pool:\n  # How many.\n  count: 1\n  size: 2\n")


def test_the_operator_may_touch_nothing_but_what_it_needs() -> None:
    [cluster], [election] = of_kind("ClusterRole"), of_kind("Role")
    allowed = {
        (group, resource): set(rule["verbs"])
        for rule in cluster["rules"]
        for group in rule["apiGroups"]
        for resource in rule["resources"]
    }
    assert "*" not in str([cluster["rules"], election["rules"]])
    assert allowed.keys() == {
        ("workerpool.dev", "workerpools"),
        ("workerpool.dev", "workerpools/status"),
        ("workerpool.dev", "workerpools/finalizers"),
        ("apps", "deployments"),
        ("apps", "deployments/scale"),
        ("autoscaling", "horizontalpodautoscalers"),
        ("", "pods"),
        ("", "secrets"),
        ("events.k8s.io", "events"),
    }
    assert allowed["", "secrets"] == {"get"}
    assert {resource for resource, verbs in allowed.items() if "delete" in verbs} == {("apps", "deployments")}


def test_it_may_change_no_lease_but_the_one_that_it_is_told_to_use() -> None:
    [election], [deployment] = of_kind("Role"), of_kind("Deployment")
    assert {rule["resources"][0] for rule in election["rules"]} == {"leases"}
    unnamed = [rule["verbs"] for rule in election["rules"] if "resourceNames" not in rule]
    assert unnamed == [["create"]]
    [name] = {name for rule in election["rules"] for name in rule.get("resourceNames", [])}
    assert f"--lease-name={name}" in deployment["spec"]["template"]["spec"]["containers"][0]["args"]


def test_with_namespaces_given_its_rights_and_its_watches_end_there() -> None:
    assert not of_kind("ClusterRole", NAMESPACES)
    assert not of_kind("ClusterRoleBinding", NAMESPACES)
    roles = {role["metadata"]["namespace"]: role for role in of_kind("Role", NAMESPACES)}
    assert roles.keys() == {"ml", "web", "system"}
    assert {rule["resources"][0] for rule in roles["system"]["rules"]} == {"leases"}
    for binding in of_kind("RoleBinding", NAMESPACES):
        assert binding["subjects"] == [{"kind": "ServiceAccount", "name": "pools-celery-workerpool", "namespace": "system"}]
    [deployment] = of_kind("Deployment", NAMESPACES)
    arguments = deployment["spec"]["template"]["spec"]["containers"][0]["args"]
    assert [argument for argument in arguments if "--namespace" in argument] == ["--namespace=ml", "--namespace=web"]


def test_with_secrets_given_it_may_read_no_other() -> None:
    [role] = of_kind("ClusterRole", {"brokerSecrets": ["redis"]})
    [rule] = [rule for rule in role["rules"] if rule["resources"] == ["secrets"]]
    assert rule["resourceNames"] == ["redis"]


@pytest.mark.parametrize("name", VALUES_SETS)
def test_every_pod_runs_under_the_restricted_pod_security_level(name: str) -> None:
    specs = list(pods(VALUES_SETS[name]))
    assert len(specs) == 2
    for pod in specs:
        [container] = pod["containers"]
        assert pod["securityContext"]["runAsNonRoot"]
        assert pod["securityContext"]["runAsUser"] > 0
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }


def test_two_operators_on_two_nodes_of_which_a_drain_takes_one_at_a_time() -> None:
    [deployment], [budget] = of_kind("Deployment"), of_kind("PodDisruptionBudget")
    labels = deployment["spec"]["template"]["metadata"]["labels"]
    assert deployment["spec"]["replicas"] == 2
    assert budget["spec"]["maxUnavailable"] == 1
    spread = deployment["spec"]["template"]["spec"]["topologySpreadConstraints"]
    assert [each["topologyKey"] for each in spread] == ["kubernetes.io/hostname", "topology.kubernetes.io/zone"]
    for selector in (budget["spec"]["selector"], *(each["labelSelector"] for each in spread)):
        assert selector["matchLabels"].items() <= labels.items()
    [own] = of_kind("Deployment", EVERYTHING)[0]["spec"]["template"]["spec"]["topologySpreadConstraints"]
    assert own["labelSelector"] == {"matchLabels": {"my": "own"}}


def test_a_probe_each_for_a_restart_and_for_traffic() -> None:
    [pod] = [pod for pod in pods() if "startupProbe" in pod["containers"][0]]
    [container] = pod["containers"]
    [port] = container["ports"]
    assert container["livenessProbe"]["httpGet"] == {"path": "/healthz", "port": port["name"]}
    assert container["readinessProbe"]["httpGet"] == {"path": "/readyz", "port": port["name"]}


def test_what_selects_operators_does_not_select_the_pod_of_helm_test() -> None:
    [test] = of_kind("Pod", EVERYTHING)
    labels = test["metadata"]["labels"]
    for document in objects(EVERYTHING):
        spec = document.get("spec", {})
        selector = spec.get("selector") or spec.get("podSelector")
        if selector and document["kind"] != "ServiceMonitor":
            assert not selector.get("matchLabels", selector).items() <= labels.items(), document["kind"]


def test_metrics_have_a_service_only_where_somebody_asked_for_it() -> None:
    assert not of_kind("Service")
    [service], [monitor] = of_kind("Service", EVERYTHING), of_kind("ServiceMonitor", EVERYTHING)
    assert monitor["spec"]["selector"]["matchLabels"].items() <= service["metadata"]["labels"].items()
    assert monitor["spec"]["endpoints"] == [{"port": service["spec"]["ports"][0]["name"], "path": "/metrics", "interval": "15s"}]
    assert monitor["metadata"]["labels"]["release"] == "prometheus"


def test_the_network_policy_leaves_the_ways_that_the_operator_needs() -> None:
    [policy] = of_kind("NetworkPolicy", EVERYTHING)
    assert policy["spec"]["policyTypes"] == ["Ingress", "Egress"]
    assert {port["port"] for rule in policy["spec"]["egress"] for port in rule["ports"]} == {53, 443, 6443, 6380}
    [ingress] = policy["spec"]["ingress"]
    assert (ingress["ports"][0]["port"], len(ingress["from"])) == ("http", 1)


def test_the_resource_definition_is_the_canonical_one_and_is_kept_unless_somebody_says_otherwise() -> None:
    canonical = yaml.safe_load((ROOT / "crds" / "workerpool.yaml").read_text())
    [kept], [unkept] = of_kind("CustomResourceDefinition"), of_kind("CustomResourceDefinition", EVERYTHING)
    assert kept["spec"] == unkept["spec"] == canonical["spec"]
    assert kept["metadata"]["name"] == canonical["metadata"]["name"]
    assert kept["metadata"]["annotations"] == {"helm.sh/resource-policy": "keep"}
    assert "annotations" not in unkept["metadata"]
    assert not of_kind("CustomResourceDefinition", LEAST)


@pytest.mark.parametrize("name", VALUES_SETS)
def test_the_notes_say_what_to_do_next_and_what_an_uninstall_would_take(name: str) -> None:
    with Chart.load(CHART) as chart:
        rendered = chart.render(VALUES_SETS[name], name="pools", namespace="system")
    [notes] = [text for path, text in rendered.items() if path.endswith("NOTES.txt")]
    assert "helm test pools --namespace system" in notes
    assert "create secret generic redis" in notes
    assert ("EVERY WorkerPool" in notes) == (name == "everything")


def test_the_manifests_are_the_chart_with_its_defaults_without_the_test() -> None:
    manifests = list(yaml.safe_load_all((ROOT / "manifests" / "install.yaml").read_text()))
    kinds = [document["kind"] for document in manifests]
    assert kinds[:3] == ["Namespace", "CustomResourceDefinition", "ServiceAccount"]
    assert sorted(kinds[1:]) == sorted(document["kind"] for document in objects() if document["kind"] != "Pod")
    assert manifests[0]["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] == "restricted"


def test_chart_image_and_distribution_have_one_version() -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text())
    assert (chart["version"], chart["appVersion"]) == (version, version)
    assert {pod["containers"][0]["image"] for pod in pods()} == {f"celery-workerpool:{version}"}
    assert {pod["containers"][0]["image"] for pod in pods({"image": {"tag": "edge"}})} == {"celery-workerpool:edge"}
    pinned = f"registry.example.com/operator@sha256:{'0' * 64}"
    assert {pod["containers"][0]["image"] for pod in pods(EVERYTHING)} == {pinned}


@pytest.mark.parametrize(
    ("values", "field"),
    [
        ({"watchNamespaces": "ml"}, "watchNamespaces"),
        ({"watchNamespaces": ["*"]}, "watchNamespaces"),
        ({"image": {"pullPolicy": "Sometimes"}}, "pullPolicy"),
        ({"image": {"digest": "latest"}}, "digest"),
        ({"image": {"repository": None}}, "repository"),
        ({"replicaCount": 2}, "replicaCount"),
        ({"replicas": 0}, "replicas"),
        ({"crds": {"keeps": True}}, "keeps"),
        ({"crds": None}, "crds"),
        ({"serviceAccount": {"create": False}}, "serviceAccount"),
        ({"resources": {"limit": {}}}, "limit"),
        ({"extraEnv": [{"name": "A", "values": "b"}]}, "values"),
        ({"extraVolumes": [{"name": "tmp", "emptyDir": {}}]}, "extraVolumes"),
        ({"extraVolumeMounts": [{"name": "a", "path": "/a"}]}, "path"),
        ({"extraVolumeMounts": [{"name": "a", "mountPath": "/tmp"}]}, "mountPath"),
        ({"extraVolumeMounts": [{"name": "a", "mountPath": "/tmp/"}]}, "mountPath"),
        ({"extraArgs": ["--port=9090"]}, "extraArgs"),
        ({"tolerations": [{"keys": "a"}]}, "keys"),
        ({"affinity": {"podsAffinity": {}}}, "podsAffinity"),
        ({"topologySpreadConstraints": [{"topologyKey": "zone"}]}, "maxSkew"),
        ({"networkPolicy": {"redisPorts": ["redis"]}}, "redisPorts"),
        ({"metrics": {"serviceMonitor": {"enable": True}}}, "enable"),
    ],
)
def test_a_wrong_value_is_refused_by_its_name(values: Object, field: str) -> None:
    with pytest.raises(HelmError, match=field):
        objects(values)


def test_the_schema_is_closed_wherever_it_lists_what_there_is() -> None:
    def opened(schema: Any, path: str = "") -> Iterator[str]:
        if not isinstance(schema, dict):
            return
        if "properties" in schema and path not in {"", "extraVolumes/items"} and schema.get("additionalProperties") is not False:
            yield path
        for part in ("properties", "definitions"):
            for name, below in schema.get(part, {}).items():
                yield from opened(below, f"{path}/{name}".removeprefix("/"))
        yield from opened(schema.get("items"), f"{path}/items")

    schema = json.loads((CHART / "values.schema.json").read_text())
    assert schema["additionalProperties"] is False
    assert list(opened(schema)) == []
    assert schema["properties"].keys() - {"global"} == yaml.safe_load((CHART / "values.yaml").read_text()).keys()


def test_the_sample_is_a_valid_pool_with_and_without_an_accelerator() -> None:
    sample = yaml.safe_load((ROOT / "manifests" / "samples" / "workerpool.yaml").read_text())
    spec = parse_spec(sample["spec"])
    assert isinstance(spec, WorkerPoolSpec), spec
    assert [tier.accelerated for tier in spec.tiers] == [True, False]

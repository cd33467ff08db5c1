"""The chart, the manifests that are generated from it, and the sample."""

from __future__ import annotations

import shutil
import tomllib
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


def objects(values: dict[str, Any] | None = None) -> list[dict[str, Any]]:
    with Chart.load(CHART) as chart:
        rendered = chart.render(values, name="pools", namespace="system")
    return [document for path, text in rendered.items() if path.endswith(".yaml") for document in yaml.safe_load_all(text)]


def of_kind(kind: str, values: dict[str, Any] | None = None) -> list[dict[str, Any]]:
    return [document for document in objects(values) if document["kind"] == kind]


@pytest.mark.parametrize("values", [None, {"watchNamespaces": ["ml", "web"], "brokerSecrets": ["redis"]}])
def test_everything_rendered_is_valid(values: dict[str, Any] | None) -> None:
    report = lint(CHART, values, strict=True)
    assert not report["errors"], report
    for document in objects(values):
        kubernetes_validate.validate(document, "1.37", strict=True)


def test_generated_files_are_up_to_date(capsys: pytest.CaptureFixture[str]) -> None:
    assert render.main(ROOT, check=True) == 0, capsys.readouterr().out


@pytest.mark.parametrize(
    ("changed", "stale"),
    [
        ("charts/celery-workerpool/values.yaml", ["manifests/install.yaml"]),
        ("crds/workerpool.yaml", ["charts/celery-workerpool/crds/workerpool.yaml", "manifests/install.yaml"]),
        ("manifests/install.yaml", ["manifests/install.yaml"]),
    ],
)
def test_a_change_makes_what_follows_from_it_stale_until_it_is_generated_anew(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], changed: str, stale: list[str]
) -> None:
    for part in ("charts", "crds", "manifests"):
        shutil.copytree(ROOT / part, tmp_path / part)
    path = tmp_path / changed
    path.write_text(path.read_text().replace("0.1.0", "9").replace("IfNotPresent", "Always").replace("wp", "wps"))
    assert render.main(tmp_path, check=True) == 1
    assert capsys.readouterr().out.split("\n")[:-1] == [f"{name} is out of date: make generate" for name in stale]
    assert render.main(tmp_path, check=False) == 0
    assert render.main(tmp_path, check=True) == 0


def test_the_operator_may_touch_nothing_but_what_it_needs() -> None:
    [role] = of_kind("ClusterRole")
    allowed = {
        (group, resource): set(rule["verbs"])
        for rule in role["rules"]
        for group in rule["apiGroups"]
        for resource in rule["resources"]
    }
    assert "*" not in str(role["rules"])
    assert allowed.keys() == {
        ("workerpool.dev", "workerpools"),
        ("workerpool.dev", "workerpools/status"),
        ("workerpool.dev", "workerpools/finalizers"),
        ("apps", "deployments"),
        ("apps", "deployments/scale"),
        ("", "pods"),
        ("", "secrets"),
        ("events.k8s.io", "events"),
    }
    assert allowed["", "secrets"] == {"get"}
    assert {resource for resource, verbs in allowed.items() if "delete" in verbs} == {("apps", "deployments")}


def test_with_namespaces_given_its_rights_and_its_watches_end_there() -> None:
    values = {"watchNamespaces": ["ml", "web"]}
    assert not of_kind("ClusterRole", values)
    assert not of_kind("ClusterRoleBinding", values)
    assert [role["metadata"]["namespace"] for role in of_kind("Role", values)] == ["ml", "web", "system"]
    for binding in of_kind("RoleBinding", values):
        assert binding["subjects"] == [{"kind": "ServiceAccount", "name": "pools-celery-workerpool", "namespace": "system"}]
    [deployment] = of_kind("Deployment", values)
    assert deployment["spec"]["template"]["spec"]["containers"][0]["args"][1:] == ["--namespace=ml", "--namespace=web"]


def test_its_lease_is_the_only_one_that_it_may_change() -> None:
    [role] = of_kind("Role")
    create, change = role["rules"]
    assert (role["metadata"]["namespace"], create["verbs"]) == ("system", ["create"])
    [deployment] = of_kind("Deployment")
    [name] = change["resourceNames"]
    assert f"--lease-name={name}" in deployment["spec"]["template"]["spec"]["containers"][0]["args"]


def test_with_secrets_given_it_may_read_no_other() -> None:
    [role] = of_kind("ClusterRole", {"brokerSecrets": ["redis"]})
    [rule] = [rule for rule in role["rules"] if rule["resources"] == ["secrets"]]
    assert rule["resourceNames"] == ["redis"]


def test_the_operator_is_alone_and_runs_under_the_restricted_pod_security_level() -> None:
    [deployment] = of_kind("Deployment")
    spec, pod = deployment["spec"], deployment["spec"]["template"]["spec"]
    [container] = pod["containers"]
    assert (spec["replicas"], spec["strategy"]) == (1, {"type": "Recreate"})
    assert pod["securityContext"]["runAsNonRoot"]
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert container["livenessProbe"]["httpGet"] == {"path": "/healthz", "port": "http"}
    assert container["readinessProbe"]["httpGet"] == {"path": "/readyz", "port": "http"}


def test_chart_image_and_distribution_have_one_version() -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text())
    assert (chart["version"], chart["appVersion"]) == (version, version)
    [deployment] = of_kind("Deployment")
    assert deployment["spec"]["template"]["spec"]["containers"][0]["image"] == f"celery-workerpool:{version}"


@pytest.mark.parametrize(
    ("values", "field"),
    [
        ({"watchNamespaces": "ml"}, "watchNamespaces"),
        ({"watchNamespaces": ["*"]}, "watchNamespaces"),
        ({"image": {"pullPolicy": "Sometimes"}}, "pullPolicy"),
        ({"replicas": 2}, "replicas"),
    ],
)
def test_a_wrong_value_is_refused_by_its_name(values: dict[str, Any], field: str) -> None:
    with pytest.raises(HelmError, match=field):
        objects(values)


def test_the_sample_is_a_valid_pool_with_and_without_an_accelerator() -> None:
    sample = yaml.safe_load((ROOT / "manifests" / "samples" / "workerpool.yaml").read_text())
    spec = parse_spec(sample["spec"])
    assert isinstance(spec, WorkerPoolSpec), spec
    assert [tier.accelerated for tier in spec.tiers] == [True, False]

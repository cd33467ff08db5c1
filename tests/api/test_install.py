"""The chart and the manifests against a real API server of their own: what an install makes, what an uninstall leaves, and what
the operator may do. Helm is the SDK of Helm 4.
"""

from __future__ import annotations

import base64
import importlib.util
import json
import shutil
import threading
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from e2e.cluster.control_plane import ControlPlane
from helm_python import Chart, Config, HelmError
from tests.api.conftest import started
from tests.api.kubectl import CRD, kubectl_for

pytestmark = pytest.mark.api

ROOT = Path(__file__).parents[2]
CHART = ROOT / "charts" / "celery-workerpool"
INSTALL = ROOT / "manifests" / "install.yaml"
RIGHTS = ROOT / "manifests" / "rights.txt"
SAMPLE = ROOT / "manifests" / "samples" / "workerpool.yaml"
NAME = "celery-workerpool"
ACCOUNT = f"system:serviceaccount:{NAME}:{NAME}"

Object = dict[str, Any]
Run = Callable[..., str]


@pytest.fixture(scope="module")
def cluster() -> Iterator[ControlPlane]:
    """Not the session's: a resource definition that Helm owns would be in the way of the other tests."""
    with started() as plane:
        yield plane


@pytest.fixture(scope="module")
def run(cluster: ControlPlane, tmp_path_factory: pytest.TempPathFactory) -> Run:
    kubectl = kubectl_for(cluster, tmp_path_factory.mktemp("kubectl-cache"))

    def run(*arguments: str) -> str:
        answer = kubectl(*arguments)
        assert answer.returncode == 0, answer.stderr
        return answer.stdout

    return run


@pytest.fixture
def system(run: Run) -> Iterator[str]:
    """A namespace of the test's own; nobody waits until all that was in it is gone."""
    name = f"system-{uuid.uuid4().hex[:8]}"
    run("create", "namespace", name)
    yield name
    run("delete", "namespace", name, "--wait=false")


@pytest.fixture
def helm(cluster: ControlPlane, run: Run, system: str) -> Iterator[Config]:
    """Helm in that namespace; what a test left in the cluster beside it goes."""
    with Config(kubeconfig_path=cluster.kubeconfig, namespace=system) as config:
        yield config
    run("delete", "--ignore-not-found", "-f", str(CRD))
    run("delete", "clusterrole,clusterrolebinding", "-l", f"app.kubernetes.io/name={NAME}")


def add_pool(run: Run, system: str) -> None:
    run("wait", "--for=condition=Established", "--timeout=60s", "crd/workerpools.workerpool.dev")
    run("create", f"--namespace={system}", "-f", str(SAMPLE), "--validate=false")


def names(run: Run, *what: str) -> list[str]:
    return run("get", *what, "--ignore-not-found", "-o", "name").split()


def test_an_uninstall_leaves_the_pools_and_the_next_install_takes_them_over(helm: Config, run: Run, system: str) -> None:
    helm.install(CHART, NAME, namespace=system)
    add_pool(run, system)
    helm.uninstall(NAME)
    assert names(run, "deployments,serviceaccounts,roles,poddisruptionbudgets", "-n", system) == ["serviceaccount/default"]
    assert names(run, "clusterroles", "-l", f"app.kubernetes.io/name={NAME}") == []
    assert names(run, "workerpools", "-n", system) == ["workerpool.workerpool.dev/media"]
    helm.install(CHART, NAME, namespace=system)
    assert names(run, "workerpools", "-n", system) == ["workerpool.workerpool.dev/media"]


def test_an_upgrade_brings_the_resource_definition_up_to_date(helm: Config, run: Run, system: str, tmp_path: Path) -> None:
    helm.install(old_chart(tmp_path), NAME, namespace=system)
    add_pool(run, system)
    columns = "jsonpath={.spec.versions[0].additionalPrinterColumns[*].name}"
    before = run("get", "crd", "workerpools.workerpool.dev", "-o", columns)
    helm.upgrade(CHART, NAME, namespace=system)
    assert run("get", "crd", "workerpools.workerpool.dev", "-o", columns) == f"{before} Age"
    assert names(run, "workerpools", "-n", system) == ["workerpool.workerpool.dev/media"]


def old_chart(directory: Path, kube_version: str = "") -> Path:
    """The chart of a release whose resource definition had no column for the age."""
    chart = Path(shutil.copytree(CHART, directory / NAME))
    definition = chart / "files" / "workerpool.yaml"
    crd = yaml.safe_load(definition.read_text())
    crd["spec"]["versions"][0]["additionalPrinterColumns"].pop()
    definition.write_text(yaml.safe_dump(crd))
    about = yaml.safe_load((chart / "Chart.yaml").read_text())
    (chart / "Chart.yaml").write_text(yaml.safe_dump(about | ({"kubeVersion": kube_version} if kube_version else {})))
    return chart


def test_with_keep_off_an_uninstall_takes_the_resource_definition_along(helm: Config, run: Run, system: str) -> None:
    helm.install(CHART, NAME, {"crds": {"keep": False}}, namespace=system)
    assert names(run, "crds")
    helm.uninstall(NAME)
    run("wait", "--for=delete", "--timeout=60s", "crd/workerpools.workerpool.dev")


def test_a_resource_definition_of_somebody_else_is_named_and_is_taken_over_as_the_how_to_says(
    helm: Config, run: Run, system: str
) -> None:
    run("apply", "--server-side", "-f", str(CRD))
    add_pool(run, system)
    with pytest.raises(HelmError, match=r"workerpools\.workerpool\.dev.*invalid ownership metadata"):
        helm.install(CHART, NAME, namespace=system)
    how_to = (ROOT / "docs" / "how-to" / "install.md").read_text().replace(" \\\n    ", " ")
    for command in (
        "kubectl label crd workerpools.workerpool.dev app.kubernetes.io/managed-by=Helm",
        f"kubectl annotate crd workerpools.workerpool.dev meta.helm.sh/release-name={NAME} meta.helm.sh/release-namespace={NAME}",
    ):
        assert command in how_to
        run(*command.replace(f"release-namespace={NAME}", f"release-namespace={system}").split()[1:])
    helm.install(CHART, NAME, namespace=system)
    assert names(run, "workerpools", "-n", system) == ["workerpool.workerpool.dev/media"]


def test_a_cluster_that_is_too_old_is_told_so_before_anything_is_made(
    helm: Config, run: Run, system: str, tmp_path: Path
) -> None:
    with pytest.raises(HelmError, match=r"chart requires kubeVersion: >=99\.0\.0-0 which is incompatible with Kubernetes v1\."):
        helm.install(old_chart(tmp_path, ">=99.0.0-0"), NAME, namespace=system)
    assert names(run, "crds") == []


@pytest.fixture
def installed(run: Run) -> None:
    """The manifests, applied in one go; the first time to a cluster that knows nothing of WorkerPools. They go with it."""
    run("apply", "--server-side", "-f", str(INSTALL))


@pytest.mark.usefixtures("installed")
def test_the_manifests_are_applied_in_one_go_and_a_second_time_change_nothing(run: Run) -> None:
    def versions() -> list[str]:
        listed = "crd/workerpools.workerpool.dev", f"clusterrole/{NAME}"
        got = [run("get", each, "-o", "jsonpath={.metadata.generation}{.metadata.uid}") for each in listed]
        return [*got, run("get", "deployment", NAME, "-n", NAME, "-o", "jsonpath={.metadata.generation}")]

    run("wait", "--for=condition=Established", "--timeout=60s", "crd/workerpools.workerpool.dev")
    before = versions()
    run("apply", "--server-side", "-f", str(INSTALL))
    assert versions() == before


@pytest.mark.usefixtures("installed")
def test_the_operator_may_do_what_the_reviewed_file_says_and_nothing_else(run: Run) -> None:
    run("wait", "--for=condition=Established", "--timeout=60s", "crd/workerpools.workerpool.dev")
    found = rights(run)
    _, _, reviewed = RIGHTS.read_text().partition("\n\n")
    assert found == reviewed, f"review what changed, then write it into {RIGHTS}:\n{found}"


def rights(run: Run) -> str:
    """What the operator may do in its own namespace and in any other, and not every account may, sorted."""

    def listed(account: str, namespace: str) -> list[str]:
        lines = run("auth", "can-i", "--list", f"--as={account}", f"--namespace={namespace}").splitlines()
        return [line.rstrip() for line in lines if not line.startswith(" ")]  # but for the URLs of discovery

    def own(namespace: str) -> str:
        everybody = {tuple(line.split()) for line in listed("system:serviceaccount:default:default", namespace)}
        header, *lines = listed(ACCOUNT, namespace)
        return "\n".join((header, *sorted(line for line in lines if tuple(line.split()) not in everybody)))

    return f"# In its own namespace:\n{own(NAME)}\n\n# In any other:\n{own('default')}\n"


class HelmTest:
    """What ``helm test`` runs, with the arguments that the chart gives it and the token of the operator's account."""

    def __init__(self, account: Path) -> None:
        spec = importlib.util.spec_from_file_location("helm_test", CHART / "files" / "test.py")
        assert spec is not None
        assert spec.loader is not None
        self._module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(self._module)
        with Chart.load(CHART) as chart:
            rendered = chart.render(name=NAME, namespace=NAME)
        [pod] = [yaml.safe_load(text) for path, text in rendered.items() if "/tests/" in path]
        _, _, *self._paths = pod["spec"]["containers"][0]["args"]
        self._account = account

    def __call__(self, patience: float = 60.0) -> None:
        vars(self._module)["PATIENCE_SECONDS"] = patience
        self._module.main(str(self._account), *self._paths)


@pytest.fixture
def helm_test(run: Run, cluster: ControlPlane, installed: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> HelmTest:
    run("wait", "--for=condition=Established", "--timeout=60s", "crd/workerpools.workerpool.dev")
    login = json.loads(cluster.kubeconfig.read_text())["clusters"][0]["cluster"]
    (tmp_path / "ca.crt").write_bytes(base64.b64decode(login["certificate-authority-data"]))
    (tmp_path / "token").write_text(run("create", "token", NAME, "--namespace", NAME).strip())
    host, _, port = login["server"].removeprefix("https://").rpartition(":")
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", host)
    monkeypatch.setenv("KUBERNETES_SERVICE_PORT", port)
    return HelmTest(tmp_path)


def test_helm_test_names_the_operator_that_renews_its_lease(
    helm_test: HelmTest, run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="nobody renewed"):
        helm_test(patience=2)
    lease: Object = {"apiVersion": "coordination.k8s.io/v1", "kind": "Lease", "metadata": {"name": NAME, "namespace": NAME}}
    over = threading.Event()

    def renew() -> None:
        second = 0
        while not over.wait(0.5):
            second = (second + 1) % 60
            lease["spec"] = {"holderIdentity": "operator-1", "renewTime": f"2026-01-01T00:00:{second:02}.000000Z"}
            (tmp_path / "lease.json").write_text(json.dumps(lease))
            run("apply", "--server-side", "-f", str(tmp_path / "lease.json"))

    renewing = threading.Thread(target=renew)
    renewing.start()
    try:
        helm_test()
    finally:
        over.set()
        renewing.join()
    assert capsys.readouterr().out == "operator-1 leads\n"


def test_helm_test_says_what_the_operator_may_not_do(helm_test: HelmTest, run: Run) -> None:
    run("delete", "clusterrolebinding", NAME)
    with pytest.raises(SystemExit, match=r"workerpools\?limit=1: workerpools.workerpool.dev is forbidden"):
        helm_test()

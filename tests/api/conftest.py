"""Level ``api``: one real control plane for the session, with the CRD applied, and a namespace for each test."""

from __future__ import annotations

import os
import signal
import subprocess
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import pytest
from e2e.cluster import binaries
from e2e.cluster.control_plane import ControlPlane
from e2e.cluster.kubectl import kubectl_path
from tests.api.operators import Namespace, Operator, log_in

from workerpool_operator.local.guardian import Guardian
from workerpool_operator.local.redis_server import RedisServer, private_redis

CRD = Path(__file__).parents[2] / "crds" / "workerpool.yaml"
INSTALL = Path(__file__).parents[2] / "manifests" / "install.yaml"


class Kubectl(Protocol):
    """Runs kubectl as an administrator; ``stdin`` is what ``-f -`` reads. A refusal is a return code, not an exception."""

    def __call__(self, *arguments: str, stdin: str | None = None) -> subprocess.CompletedProcess[str]: ...


@pytest.fixture(scope="session")
def control_plane() -> Iterator[ControlPlane]:
    """The control plane itself, for tests that take its API server away."""
    try:
        directory = binaries.find(binaries.CONTROL_PLANE)
    except binaries.BinariesMissing as missing:
        pytest.fail(str(missing), pytrace=False)
    with ControlPlane(directory) as plane:
        yield plane


@pytest.fixture(scope="session")
def kubectl(control_plane: ControlPlane, tmp_path_factory: pytest.TempPathFactory) -> Kubectl:
    return kubectl_for(control_plane, tmp_path_factory.mktemp("kubectl-cache"))


def kubectl_for(plane: ControlPlane, cache: Path) -> Kubectl:
    try:
        path = kubectl_path()
    except FileNotFoundError as missing:
        pytest.fail(str(missing), pytrace=False)
    environment = {**os.environ, "KUBECONFIG": str(plane.kubeconfig), "KUBECACHEDIR": str(cache)}

    def run(*arguments: str, stdin: str | None = None) -> subprocess.CompletedProcess[str]:
        command = [path, *arguments]
        return subprocess.run(command, input=stdin, env=environment, capture_output=True, text=True, timeout=120, check=False)

    return run


@pytest.fixture(scope="session")
def kubeconfig(control_plane: ControlPlane, kubectl: Kubectl) -> Path:
    """An administrator's kubeconfig of a control plane that serves WorkerPools."""
    for command in (
        ("apply", "--server-side", "-f", str(CRD)),
        ("wait", "--for=condition=Established", "--timeout=60s", "-f", str(CRD)),
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


@pytest.fixture(scope="module")
def guardian() -> Iterator[Guardian]:
    guardian = Guardian()
    yield guardian
    guardian.close()


@pytest.fixture(scope="module")
def redis_server() -> Iterator[RedisServer]:
    with private_redis() as server:
        yield server


@pytest.fixture(scope="module")
def login(kubeconfig: Path, kubectl: Kubectl, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A kubeconfig of the service account that the manifests make for the operator."""
    installed = kubectl("apply", "--server-side", "-f", str(INSTALL))
    assert installed.returncode == 0, installed.stderr
    login = tmp_path_factory.mktemp("operator") / "kubeconfig"
    log_in(kubeconfig, login, kubectl, "celery-workerpool", "celery-workerpool")
    return login


@pytest.fixture(scope="module")
def operator(login: Path, guardian: Guardian) -> Iterator[Operator]:
    operator = Operator(login, guardian, "--lease-namespace=celery-workerpool")
    yield operator
    if operator.running():
        operator.end(signal.SIGTERM)  # it gives its lease back for the next one


@pytest.fixture
def ml(namespace: str, kubectl: Kubectl, operator: Operator, redis_server: RedisServer) -> Namespace:
    operator.carry_on()
    return Namespace(namespace, kubectl, operator, redis_server.url)

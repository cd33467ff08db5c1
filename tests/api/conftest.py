"""Level ``api``: one real control plane for the session, with the CRD applied, and a namespace for each test."""

from __future__ import annotations

import signal
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from e2e.cluster import binaries
from e2e.cluster.control_plane import ControlPlane, ControlPlaneFailed
from tests.api.kubectl import CRD, Kubectl, kubectl_for
from tests.api.operators import Namespace, Operator, log_in

from workerpool_operator.local.guardian import Guardian
from workerpool_operator.local.redis_server import RedisServer, private_redis

INSTALL = Path(__file__).parents[2] / "manifests" / "install.yaml"


@pytest.fixture(scope="session")
def control_plane() -> Iterator[ControlPlane]:
    """The control plane itself, for tests that take its API server away."""
    with started() as plane:
        yield plane


@contextmanager
def started() -> Iterator[ControlPlane]:
    """A control plane; what keeps it from starting is said in few words, because every test of the session says it."""
    try:
        with ControlPlane(binaries.find(binaries.CONTROL_PLANE)) as plane:
            yield plane
    except (binaries.BinariesMissing, ControlPlaneFailed) as failed:
        pytest.fail(str(failed), pytrace=False)


@pytest.fixture(scope="session")
def kubectl(control_plane: ControlPlane, tmp_path_factory: pytest.TempPathFactory) -> Kubectl:
    return kubectl_for(control_plane, tmp_path_factory.mktemp("kubectl-cache"))


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

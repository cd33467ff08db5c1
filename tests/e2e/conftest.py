"""Level ``e2e``: one real cluster for the session, with the operator installed by helm, and a namespace for each scenario."""

from __future__ import annotations

import os
from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from e2e.cluster import cluster, images
from tests.e2e.kube import Kube, eventually
from tests.e2e.site import Site, namespace

CHART = images.ROOT / "charts" / "celery-workerpool"
RELEASE = "celery-workerpool"
SYSTEM = "workerpool-system"
VALUES = (
    "--set=image.repository=celery-workerpool",
    "--set=image.tag=e2e",
    # What a cluster on two cores is short of: an operator that gets no CPU loses its Lease.
    "--set=resources.requests.cpu=200m",
    # A lost GPU node is to be seen by an operator that is not on it.
    r"--set=nodeSelector.workerpool\.dev/node=cpu-node",
)


@pytest.fixture(scope="session")
def kube() -> Iterator[Kube]:
    if given := os.environ.get("E2E_KUBECONFIG"):
        yield Kube(Path(given), None)
        return
    try:
        cluster.need()
    except cluster.CannotRun as error:
        pytest.fail(str(error), pytrace=False)
    with cluster.Cluster(print) as nodes:
        yield Kube(nodes.kubeconfig, nodes)


@pytest.fixture(scope="session")
def operator(kube: Kube) -> Kube:
    """The cluster, with the operator installed as a user would."""
    kube.apply("default", namespace(SYSTEM))
    install(kube)
    return kube


@pytest.fixture
def nodes(operator: Kube) -> cluster.Cluster:
    """The cluster whose parts a test may take away, and whose records it may read."""
    if operator.cluster is None:
        pytest.skip("E2E_KUBECONFIG names a cluster that is not ours")
    return operator.cluster


@pytest.fixture
def another_site(operator: Kube) -> Iterator[Callable[[], Site]]:
    """Makes a namespace of the scenario's own, gone when it ends or makes another."""
    with ExitStack() as current:

        def make() -> Site:
            current.close()
            site = Site(operator)
            current.callback(site.take_down)
            site.set_up()
            return site

        yield make


@pytest.fixture
def site(another_site: Callable[[], Site]) -> Site:
    """A namespace of the scenario's own, gone when it ends."""
    return another_site()


def install(kube: Kube, *options: str) -> None:
    """Install or upgrade, and wait until the operator is ready."""
    kube.helm("upgrade", "--install", RELEASE, str(CHART), f"--namespace={SYSTEM}", *VALUES, *options)
    kube.kubectl("rollout", "status", f"deployment/{RELEASE}", f"--namespace={SYSTEM}", "--timeout=230s")
    kube.kubectl("wait", "--for=condition=Established", "--timeout=230s", "crd/workerpools.workerpool.dev")


def after_passes(kube: Kube, count: int) -> None:
    """Wait until the operator has ended so many more passes."""
    before, ended = eventually(lambda: passes(kube)), 0.0

    def enough() -> bool:
        nonlocal before, ended
        # An operator that restarted counts from zero.
        now = passes(kube)
        before, ended = now, ended + max(0.0, now - before)
        return ended >= count

    eventually(enough)


def passes(kube: Kube) -> float:
    """How many passes the operators have ended together."""
    pods = kube.items(SYSTEM, "pods", f"--selector=app.kubernetes.io/instance={RELEASE}")
    paths = [f"/api/v1/namespaces/{SYSTEM}/pods/{pod['metadata']['name']}:8080/proxy/metrics" for pod in pods]
    lines = [line for path in paths for line in kube.kubectl("get", "--raw", path).splitlines()]
    return sum(float(line.split()[1]) for line in lines if line.startswith("workerpool_pass_seconds_count"))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Show what the cluster looked like when a scenario failed, before its namespace goes."""
    report = yield
    kube = getattr(item, "funcargs", {}).get("kube") or getattr(item, "funcargs", {}).get("operator")
    if report.failed and isinstance(kube, Kube):
        report.sections.append(("the cluster", diagnosis(kube)))
    return report


def diagnosis(kube: Kube) -> str:
    questions = (
        ("get", "nodes,workerpools,deployments,pods", "--all-namespaces", "--output=wide"),
        ("get", "events", "--all-namespaces", "--sort-by=.lastTimestamp"),
        ("get", "workerpools", "--all-namespaces", "--output=yaml"),
        ("logs", f"deployment/{RELEASE}", f"--namespace={SYSTEM}", "--tail=60", "--all-pods"),
    )
    return "\n\n".join(f"$ kubectl {' '.join(words)}\n{kube.kubectl(*words, check=False)}" for words in questions)

"""What breaks in a cluster, while jobs wait and run: each job is done, once, and the pool is what it should be again."""

from __future__ import annotations

import pytest
from e2e.cluster.cluster import Cluster
from tests.e2e.conftest import RELEASE, SYSTEM
from tests.e2e.kube import Kube, Object, eventually
from tests.e2e.site import Site

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]

JOB_SECONDS = 10.0


@pytest.fixture
def nodes(operator: Kube) -> Cluster:
    """The cluster whose parts a test may take away."""
    if operator.cluster is None:
        pytest.skip("E2E_KUBECONFIG names a cluster that is not ours to break")
    return operator.cluster


@pytest.fixture
def media(site: Site) -> Site:
    """A site whose pool is ready, with room on both tiers."""
    site.apply(site.pool())
    site.wait_ready()
    return site


def busy_pod(site: Site, tasks: list[str]) -> str:
    """Wait until a GPU worker runs a job; the worker's pod."""
    site.claimed(tasks, "gpu")
    return str(site.workers("gpu")[0]["metadata"]["name"])


def fell_back(jobs: list[Object]) -> None:
    (job,) = jobs
    assert (job["tier"], job["result"], job["starts"]) == ("cpu", "cpu", {"gpu": 1, "cpu": 1})


def test_a_gpu_pod_killed_at_work_leaves_its_job_to_a_cpu_once(media: Site) -> None:
    tasks = media.submit(1, JOB_SECONDS)
    pod = busy_pod(media, tasks)
    media.kube.kubectl("delete", "pod", pod, f"--namespace={media.namespace}", "--force", "--grace-period=0", "--wait=false")
    fell_back(media.all_done(tasks))


def test_the_jobs_of_a_lost_gpu_node_are_done_on_cpus(media: Site, nodes: Cluster) -> None:
    tasks = media.submit(1, JOB_SECONDS)
    busy_pod(media, tasks)
    nodes.tell("lose gpu-node")
    try:
        fell_back(media.all_done(tasks))
    finally:
        nodes.tell("find gpu-node")


def test_a_deleted_redis_pod_costs_no_job_and_changes_no_replicas(media: Site) -> None:
    tasks = media.submit(8, JOB_SECONDS / 2)
    busy_pod(media, tasks)
    before = {tier: media.replicas(f"media-{tier}") for tier in ("gpu", "cpu")}
    media.kube.kubectl("scale", "deployment/redis", "--replicas=0", f"--namespace={media.namespace}")
    eventually(lambda: media.condition("BrokerReachable"), lambda condition: condition.get("status") == "False")
    assert {tier: media.replicas(f"media-{tier}") for tier in ("gpu", "cpu")} == before
    media.kube.kubectl("scale", "deployment/redis", "--replicas=1", f"--namespace={media.namespace}")
    eventually(lambda: media.condition("BrokerReachable"), lambda condition: condition.get("status") == "True")
    media.all_done(tasks)


def test_jobs_go_on_and_the_next_operator_takes_over_when_its_pods_are_deleted(media: Site) -> None:
    tasks = media.submit(8, JOB_SECONDS / 2)
    delete = ("delete", "pods", "--force", "--grace-period=0", "--wait=false", f"--namespace={SYSTEM}")
    media.kube.kubectl(*delete, f"--selector=app.kubernetes.io/instance={RELEASE}")
    once(media.all_done(tasks))
    eventually(lambda: media.replicas("media-gpu"), lambda replicas: replicas == 0)


@pytest.mark.parametrize("part", ["etcd", "kube-apiserver"])
def test_a_restart_of_the_control_plane_is_only_a_pause(media: Site, nodes: Cluster, part: str) -> None:
    tasks = media.submit(8, JOB_SECONDS / 2)
    busy_pod(media, tasks)
    nodes.tell(f"restart {part}")
    once(media.all_done(tasks))
    eventually(lambda: media.replicas("media-gpu"), lambda replicas: replicas == 0)
    further = media.submit(1, 0)
    once(media.all_done(further))


def once(jobs: list[Object]) -> None:
    assert all(sum(job["starts"].values()) == 1 for job in jobs), jobs

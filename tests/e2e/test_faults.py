"""What breaks in a cluster, while jobs wait and run: each job is done, once, and the pool is what it should be again."""

from __future__ import annotations

import pytest
from e2e.cluster.cluster import Cluster
from tests.e2e.conftest import RELEASE, SYSTEM, after_passes
from tests.e2e.kube import Object, eventually
from tests.e2e.site import Site

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(900)]


@pytest.fixture
def media(site: Site) -> Site:
    """A site whose pool is ready, with room on both tiers."""
    site.apply(site.pool())
    site.wait_ready()
    return site


def fell_back(site: Site, task: str) -> None:
    """Wait until it is done, and look that it was: by a CPU, after one GPU had begun it."""
    (job,) = site.all_done([task])
    assert (job["tier"], job["result"], job["starts"]) == ("cpu", "cpu", {"gpu": 1, "cpu": 1})


def once(jobs: list[Object]) -> None:
    assert all(sum(job["starts"].values()) == 1 for job in jobs), jobs


def test_a_gpu_pod_killed_at_work_leaves_its_job_to_a_cpu_once(media: Site) -> None:
    task = media.hold()
    pod = media.worker_of(task)
    media.kube.kubectl("delete", "pod", pod, f"--namespace={media.namespace}", "--force", "--grace-period=0", "--wait=false")
    fell_back(media, task)


def test_the_jobs_of_a_lost_gpu_node_are_done_on_cpus(media: Site, nodes: Cluster) -> None:
    task = media.hold()
    nodes.tell("lose gpu-node")
    try:
        fell_back(media, task)
    finally:
        nodes.tell("find gpu-node")


def test_a_gpu_node_that_hangs_and_comes_back_changes_nothing_of_what_was_done_meanwhile(media: Site, nodes: Cluster) -> None:
    task = media.hold()
    nodes.tell("freeze gpu-node")
    try:
        fell_back(media, task)
    finally:
        nodes.tell("thaw gpu-node")
    assert "ended-gpu" not in media.marks()
    media.release()
    eventually(media.marks, lambda marks: "ended-gpu" in marks)
    # Its workers go when they have told that they hold nothing: by then the late result has come in.
    media.comes_to_zero("gpu")
    fell_back(media, task)


def test_the_jobs_of_a_node_whose_kubelet_is_cut_off_end_where_they_run(site: Site, nodes: Cluster) -> None:
    pool = site.pool()
    unreachable = {"key": "node.kubernetes.io/unreachable", "operator": "Exists", "effect": "NoExecute", "tolerationSeconds": 0}
    pool["spec"]["tiers"][0]["template"]["spec"]["tolerations"] = [unreachable]  # five minutes, unless it says otherwise
    site.apply(pool)
    site.wait_ready()
    task = site.hold()
    zombie = site.worker_of(task)
    nodes.tell("cut gpu-node")
    try:
        # The cluster takes it for gone and orders another, for which there is no node; and it works on, as its presence tells.
        gone = lambda: site.kube.get(site.namespace, "pod", zombie)["metadata"].get("deletionTimestamp")  # noqa: E731
        eventually(gone, seconds=240)
        eventually(lambda: site.scheduled("gpu"), lambda workers: workers == [False, True])
        once(site.all_done(site.submit(4)))
        site.release()
        once(site.all_done([task]))
        assert site.jobs([task])[0]["result"] == "gpu"
    finally:
        nodes.tell("mend gpu-node")
    site.comes_to_zero("gpu")


def test_a_deleted_redis_pod_costs_no_job_and_changes_no_replicas(media: Site) -> None:
    tasks = [media.hold(), *media.submit(7)]
    media.kube.kubectl("scale", "deployment/redis", "--replicas=0", f"--namespace={media.namespace}")
    eventually(lambda: media.condition("BrokerReachable"), lambda condition: condition.get("status") == "False")
    eventually(lambda: media.kube.items(media.namespace, "pods", "--selector=app=redis"), lambda pods: not pods)
    after_passes(media.kube, 3)  # what was decided before Redis was gone is written by now
    before = counts(media)
    assert before["gpu"] > 0
    after_passes(media.kube, 5)
    assert counts(media) == before
    media.kube.kubectl("scale", "deployment/redis", "--replicas=1", f"--namespace={media.namespace}")
    eventually(lambda: media.condition("BrokerReachable"), lambda condition: condition.get("status") == "True")
    media.release()
    media.all_done(tasks)


def counts(site: Site) -> dict[str, int]:
    return {tier: site.replicas(f"media-{tier}") for tier in ("gpu", "cpu")}


def test_jobs_go_on_and_the_next_operator_takes_over_when_its_pods_are_deleted(media: Site) -> None:
    tasks = [media.hold(), *media.submit(7)]
    delete = ("delete", "pods", "--force", "--grace-period=0", "--wait=false", f"--namespace={SYSTEM}")
    media.kube.kubectl(*delete, f"--selector=app.kubernetes.io/instance={RELEASE}")
    media.release()
    once(media.all_done(tasks))
    media.comes_to_zero("gpu")


@pytest.mark.parametrize("part", ["etcd", "kube-apiserver"])
def test_a_restart_of_the_control_plane_is_only_a_pause(media: Site, nodes: Cluster, part: str) -> None:
    tasks = [media.hold(), *media.submit(7)]
    nodes.tell(f"restart {part}")
    media.release()
    once(media.all_done(tasks))
    media.comes_to_zero("gpu")
    once(media.all_done(media.submit(1)))

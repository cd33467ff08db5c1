"""What breaks in a cluster, while jobs wait and run: each job is done, once, and the pool is what it should be again."""

from __future__ import annotations

import pytest
from tests.e2e.kube import Object
from tests.e2e.site import Site

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]

JOB_SECONDS = 10.0


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

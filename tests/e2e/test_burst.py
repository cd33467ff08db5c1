"""The whole way of a user: install, apply the sample, send files; and back to nothing."""

from __future__ import annotations

import pytest
from tests.e2e.kube import eventually
from tests.e2e.site import Site

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]

UPLOADS = 40


def test_a_burst_of_files_takes_both_gpus_and_the_cpus_and_ends_at_zero(site: Site) -> None:
    pool = site.pool(app="examples.media.tasks")
    gpu, cpu = pool["spec"]["tiers"]
    gpu["replicas"]["max"] = 3  # one more than the cluster has GPUs
    cpu["replicas"] = {"min": 0, "max": 2}
    site.apply(pool)
    site.wait_ready()
    assert site.replicas("media-gpu") == 0
    answers = site.upload(UPLOADS)
    assert {answer["status"] for answer in answers} == {202}
    asked = [answer for answer in answers if answer["reason"] != "NotRequested"]
    assert {answer["tier"] for answer in asked} == {"gpu", "cpu"}, "more than the GPUs should take at once"
    tasks = [answer["task_id"] for answer in answers]
    jobs = site.all_done(tasks)
    assert len(set(tasks)) == UPLOADS
    assert all(sum(job["starts"].values()) == 1 for job in jobs)
    # Of those that spilled some may have come home to the GPUs: the ones that did not ask for any keep the CPUs at work.
    assert {job["tier"] for job in jobs} == {"gpu", "cpu"}
    assert any("Insufficient nvidia.com/gpu" in note for note in site.told("WorkerPool")), site.told("WorkerPool")
    for tier in ("gpu", "cpu"):
        eventually(lambda tier=tier: site.workers(tier), lambda pods: not pods, seconds=180)  # type: ignore[misc]

"""The whole way of a user: install, apply the sample, send files; and back to nothing."""

from __future__ import annotations

import pytest
from tests.e2e.kube import eventually
from tests.e2e.site import Site

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(900)]

UPLOADS = 40


def test_a_burst_of_files_takes_both_gpus_and_the_cpus_and_ends_at_zero(site: Site) -> None:
    pool = site.pool(app="examples.media.tasks")
    gpu, cpu = pool["spec"]["tiers"]
    gpu["replicas"]["max"] = 3  # one more than the cluster has GPUs
    cpu["replicas"] = {"min": 0, "max": 2}
    # Whether the workers are up before the last upload or long after it must not decide what there is to see.
    for tier in (gpu, cpu):
        site.gate(tier)
    site.apply(pool)
    site.wait_ready()
    assert site.replicas("media-gpu") == 0
    answers = site.upload(UPLOADS)
    assert {answer["status"] for answer in answers} == {202}
    spilled = [answer for answer in answers if answer["reason"] != "NotRequested" and answer["tier"] == "cpu"]
    assert spilled, "more asked for a GPU than may wait for one"
    tasks = [answer["task_id"] for answer in answers]
    assert len(set(tasks)) == UPLOADS

    eventually(lambda: site.scheduled("gpu"), lambda workers: workers == [False, True, True])
    short = "Insufficient nvidia.com/gpu"
    eventually(lambda: site.condition("CapacityAvailable"), lambda now: now["status"] == "False" and short in now["message"])
    eventually(lambda: site.told("WorkerPool"), lambda notes: any(short in note for note in notes))

    site.open("gpu")
    eventually(lambda: site.jobs(tasks), lambda jobs: any(job["starts"].get("gpu") for job in jobs))
    # What spilled may all come home to the GPUs: the jobs that did not ask for any are left for the CPUs.
    site.open("cpu")
    jobs = site.all_done(tasks)
    assert all(sum(job["starts"].values()) == 1 for job in jobs)
    assert {job["tier"] for job in jobs} == {"gpu", "cpu"}
    for name in ("gpu", "cpu"):
        site.comes_to_zero(name)

"""The whole way of a user: install, apply the sample, send files; and back to nothing."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from tests.e2e.kube import eventually
from tests.e2e.site import Site, pod_of

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(900)]

UPLOADS = 40


def test_a_burst_of_files_takes_both_gpus_and_the_cpus_and_ends_at_zero_with_no_job_cut_off(
    site: Site, show: Callable[[str], None]
) -> None:
    pool = site.pool(files=True)
    gpu, cpu = pool["spec"]["tiers"]
    gpu["replicas"]["max"] = 3  # one more than the cluster has GPUs
    cpu["replicas"] = {"min": 0, "max": 2}
    # Whether the workers are up before the last upload or long after it must not decide what there is to see.
    for tier in (gpu, cpu):
        site.gate(tier)
    site.apply(pool)
    site.wait_ready()
    assert site.replicas("media-gpu") == 0
    gates = ["one", "other"]
    held = site.require(*gates)
    answers = site.upload(UPLOADS)
    assert {answer["status"] for answer in answers} == {202}
    spilled = [answer for answer in answers if answer["reason"] != "NotRequested" and answer["tier"] == "cpu"]
    assert spilled, "more asked for a GPU than may wait for one"
    tasks = [answer["task_id"] for answer in answers]
    assert len(set(tasks)) == UPLOADS

    eventually(lambda: site.scheduled("gpu"), lambda workers: workers == [False, True, True])
    short = "Insufficient nvidia.com/gpu"
    eventually(lambda: site.condition("CapacityAvailable"), lambda now: now["status"] == "False" and short in now["message"])
    eventually(lambda: site.events("WorkerPool"), lambda events: any(short in event["note"] for event in events))

    site.open("gpu")
    eventually(lambda: site.jobs(held), lambda jobs: all(job["state"] == "claimed" for job in jobs))
    # Of two that are about as old a ReplicaSet ends the one with the lesser uid, unless it is told otherwise.
    uids = {pod["metadata"]["name"]: pod["metadata"]["uid"] for pod in site.workers("gpu")}
    workers = zip(gates, map(pod_of, site.jobs(held)), strict=True)
    (at_risk, busy), (goes_on, idle) = sorted(workers, key=lambda one: uids[one[1]])
    site.open(goes_on)
    eventually(lambda: site.jobs(tasks), lambda jobs: any(job["starts"].get("gpu") for job in jobs))
    # What spilled may all come home to the GPUs: the jobs that did not ask for any are left for the CPUs.
    site.open("cpu")
    jobs = site.all_done(tasks)
    assert {job["tier"] for job in jobs} == {"gpu", "cpu"}

    site.comes_to_zero("cpu")
    eventually(lambda: site.workers("gpu"), lambda workers: len(workers) == 1, seconds=240)
    gone = eventually(lambda: removed(site), lambda workers: idle in workers)
    assert busy not in gone
    site.open(at_risk)
    jobs += site.all_done(held)
    runs = [run for job in jobs for run in job["runs"]]
    cut_off = [run for run in runs if run["how"] != "done"]
    had_worked = gone & {pod_of(run) for run in runs}
    show(f"workers that had worked and were removed while a job ran: {len(had_worked)}; runs that were cut off: {len(cut_off)}")
    assert not cut_off
    assert all(len(job["runs"]) == 1 for job in jobs), jobs
    site.comes_to_zero("gpu")


def removed(site: Site) -> set[str]:
    """The workers that ReplicaSets have ended, by their Events."""
    events = [event for event in site.events("ReplicaSet") if event["reason"] == "SuccessfulDelete"]
    return {event["note"].removeprefix("Deleted pod: ") for event in events}

"""By the clock: jobs that wait for GPUs that find no place are run by CPUs, and called home when the GPUs are there after all."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import datetime
from math import inf

import pytest
from tests.e2e.kube import Object, eventually
from tests.e2e.site import Site

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(900)]

AWAY_SECONDS = 2.0
HOME_SECONDS = 5.0
ATTEMPTS = 3


@dataclass(frozen=True, slots=True)
class Outage:
    """Seconds, between stamps that the parts themselves have set.

    Attributes:
        away: from the scheduler's word that a GPU pod finds no place to the first start on a CPU of a job that waited for it.
        home: from the first report of a GPU worker to the first start on it of a job that had spilled.
        after_ready: the same from its pod's Ready, which a probe finds out later, and which is stamped up to a second early.
    """

    away: float
    home: float
    after_ready: float


def test_jobs_leave_gpus_that_find_no_place_within_2_s_and_come_home_within_5_s(
    another_site: Callable[[], Site], show: Callable[[str], None]
) -> None:
    """The best of some attempts counts: a machine that is busy with something else adds to any, and takes nothing away."""
    seen = [outage(another_site())]
    while not reached(seen) and len(seen) < ATTEMPTS:
        seen.append(outage(another_site()))
    show(f"seconds from Unschedulable to the first job on a CPU: {listed(one.away for one in seen)}")
    show(f"seconds from a GPU worker's first report to the first job that came home: {listed(one.home for one in seen)}")
    show(f"the same from its pod's Ready: {listed(one.after_ready for one in seen)}")
    assert reached(seen)


def outage(site: Site) -> Outage:
    """Somebody else has all GPUs, and gives them back."""
    pool = site.pool()
    gpu, cpu = pool["spec"]["tiers"]
    gpu["replicas"]["max"] = 1
    cpu |= {"replicas": {"min": 1, "max": 1}, "concurrency": 2}
    site.take_gpus()
    site.apply(pool)
    site.wait_ready()
    site.kube.kubectl("rollout", "status", "deployment/media-cpu", f"--namespace={site.namespace}", "--timeout=230s")

    first = site.stay("gpu", "released", "released")
    jobs = eventually(lambda: site.jobs(first), lambda jobs: all(job["runs"] for job in jobs))
    assert {job["tier"] for job in jobs} == {"cpu"}
    waiting = site.stay("cpu", "released", "released")
    site.give_gpus_back()
    (at_home,) = eventually(lambda: [run for job in site.jobs(waiting) for run in job["runs"]])
    assert at_home["tier"] == "gpu"
    times = Outage(
        away=min((began(job["runs"][0]) for job in jobs if job["reason"] == "Rebalanced"), default=inf) - unschedulable_at(site),
        home=began(at_home) - site.since()[at_home["owner"]] / 1000,
        after_ready=began(at_home) - ready_at(site),
    )
    site.release()
    jobs = site.all_done([*first, *waiting])
    assert all(len(job["runs"]) == 1 for job in jobs), jobs
    return times


def reached(seen: list[Outage]) -> bool:
    return min(one.away for one in seen) <= AWAY_SECONDS and min(one.home for one in seen) <= HOME_SECONDS


def began(run: Object) -> float:
    return float(run["began"]) / 1000


def unschedulable_at(site: Site) -> float:
    """The scheduler's own stamp, in microseconds: it tells people first, by an Event, and then writes the pod's condition."""
    events = eventually(lambda: [event for event in site.events("Pod") if event["reason"] == "FailedScheduling"])
    return min(seconds(event["eventTime"]) for event in events)


def ready_at(site: Site) -> float:
    """When the one GPU pod became ready."""

    def ready() -> list[Object]:
        (pod,) = site.workers("gpu")
        return [one for one in pod["status"]["conditions"] if (one["type"], one["status"]) == ("Ready", "True")]

    (condition,) = eventually(ready)
    return seconds(condition["lastTransitionTime"])


def seconds(stamp: str) -> float:
    return datetime.fromisoformat(stamp).timestamp()


def listed(figures: Iterable[float]) -> str:
    return ", ".join(f"{figure:.2f}" for figure in figures)

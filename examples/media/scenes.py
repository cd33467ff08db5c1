"""What happens to the pool in the demo while uploads go on: a drain, an outage of its GPUs, and the way back."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from examples.media.record import Recorder, Upload
from rich.console import Console

from workerpool_operator.dev import Session
from workerpool_operator.local.guardian import kill_group
from workerpool_operator.ports import Pool
from workerpool_routing import Reason, WorkerPool
from workerpool_routing.ledger import Job, State

LOOK_EVERY_SECONDS = 0.05
LOOK_AT_ALL_EVERY_SECONDS = 0.25


@dataclass(slots=True)
class Scenes:
    """The scenes in their order; the recorder keeps what came of them.

    Args:
        dev: the running pool.
        pool: the library's side of it.
        recorder: knows the passes.
        uploads: those that were sent so far; the demo goes on adding to them.
        console: where the scenes are announced.
    """

    dev: Session
    pool: WorkerPool
    recorder: Recorder
    uploads: Sequence[Upload]
    console: Console

    async def play(self) -> None:
        """Play all of them, in order."""
        await self.drain()
        await self.outage()
        await self.way_back()

    async def drain(self) -> None:
        """Lower the maximum of the GPU tier to one worker, and wait until any other has finished what it has and is gone."""
        await self.recorder.until(lambda tiers: tiers["gpu"].ready >= max(1, tiers["gpu"].desired))
        self._bound(1)
        self._say("1 drain: the GPU tier may have one worker now; any other takes nothing new, finishes its job and leaves")
        await self.recorder.until(lambda tiers: tiers["gpu"].desired <= 1 >= tiers["gpu"].ready and not tiers["gpu"].draining)

    async def outage(self) -> None:
        """Kill a GPU worker at work, and each that comes up, until new jobs go to CPUs for it, and nothing waits for a GPU."""
        killed = await self._kill_one_at_work()
        began, moved = time.monotonic(), self._moved()
        self._say(f"2 outage: killed {killed}; each GPU worker that starts is killed too")
        unseen = len(self.uploads)
        while not (self._spilled(unseen) and self.recorder.last("gpu").waiting == 0):
            for replica in (await self.dev.workers.observe(self.dev.pool))["gpu"].replicas:
                if group := self.dev.workers.process_group(replica.worker):
                    kill_group(group)
            if any(worker.tier == "gpu" for worker in self.pool.workers().values()):
                unseen = len(self.uploads)  # jobs admitted until now may count on workers that are dead
            await asyncio.sleep(LOOK_EVERY_SECONDS)
        course = self.recorder.course
        course.outage_seconds = time.monotonic() - began
        course.spilled, course.moved = self._spilled(unseen), self._moved() - moved

    async def way_back(self) -> None:
        """Let workers come up again, two of them, and wait until a job has begun on a GPU."""
        self._bound(2)
        self._say("3 way back: the outage is over, two GPU workers may start again")
        over, at = time.monotonic(), time.time() * 1000
        while True:
            if any(run.tier == "gpu" and run.began > at for job in self._jobs(self.uploads) for run in job.runs):
                break
            await asyncio.sleep(LOOK_AT_ALL_EVERY_SECONDS)
        self.recorder.course.back_seconds = time.monotonic() - over
        self._say("3 way back: a job has started on a GPU again")

    def _bound(self, maximum: int) -> None:
        """Set the GPU tier's maximum, as an edit of the resource would reach the pass."""
        pool = self.dev.reconciler.pools[self.dev.pool.id]
        self.dev.reconciler.pools[pool.id] = bounded(pool, maximum)

    async def _kill_one_at_work(self) -> str:
        while True:
            present = {owner: worker for owner, worker in self.pool.workers().items() if worker.tier == "gpu"}
            for job in self._jobs([upload for upload in self.uploads if not upload.ended]) if present else ():
                worker = present[job.owner].worker if job.owner in present else ""
                if worker and kill_at_work(self.pool, job, self.dev.workers.process_group(worker)):
                    return f"{worker} in the middle of {job.task}"
            await asyncio.sleep(LOOK_EVERY_SECONDS)

    def _jobs(self, uploads: Sequence[Upload]) -> Iterator[Job]:
        """Their entries on the ledger, one after the other."""
        for upload in uploads:
            if upload.accepted and (job := self.pool.job(upload.accepted["task_id"])):
                yield job

    def _spilled(self, since: int) -> int:
        return sum(upload.accepted.get("reason") == Reason.NO_CAPACITY for upload in self.uploads[since:])

    def _moved(self) -> int:
        return self.recorder.routes.get(f"cpu:{Reason.REBALANCED}", 0)

    def _say(self, words: str) -> None:
        self.console.print(f"{time.strftime('%H:%M:%S')}  {words}", highlight=False, soft_wrap=True)


def bounded(pool: Pool, maximum: int) -> Pool:
    """The same pool, with at most that many GPU workers."""
    gpu, *others = pool.spec.tiers
    gpu = gpu.model_copy(update={"replicas": gpu.replicas.model_copy(update={"max": maximum})})
    return replace(pool, generation=pool.generation + 1, spec=pool.spec.model_copy(update={"tiers": (gpu, *others)}))


def kill_at_work(pool: WorkerPool, job: Job, group: int | None) -> bool:
    """Kill the worker that has claimed this job, if it still has it; returns whether it was killed.

    It is frozen first, so that the job cannot end between the look at the ledger and the kill.
    """
    if job.state is not State.CLAIMED or group is None:
        return False
    os.killpg(group, signal.SIGSTOP)
    frozen = pool.job(job.task_id)
    at_work = frozen is not None and (frozen.state, frozen.owner) == (job.state, job.owner)
    os.killpg(group, signal.SIGKILL if at_work else signal.SIGCONT)
    return at_work

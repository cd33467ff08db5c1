"""Presence: a thread that reports every second that this worker lives, renews its messages, and looks for its mark to drain.

It is a thread because a busy worker (the solo pool, a long callback) has to report too, and it runs in the main process because
that is where the channel with the messages is.
"""

from __future__ import annotations

import atexit
import logging
from threading import Event, Thread
from typing import Any

from celery.worker import state

from workerpool_routing import ledger
from workerpool_routing.connection import unavailable_when_down
from workerpool_routing.errors import PoolUnavailable
from workerpool_routing.wire import PRESENCE_PERIOD_SECONDS
from workerpool_routing.worker.attempt import WorkerLife
from workerpool_routing.worker.probes import Probes
from workerpool_routing.worker.transport import give_back

logger = logging.getLogger("workerpool_routing.worker")

MARK_PERIOD_SECONDS = 0.4
"""How often the worker looks for a mark to drain."""


class PresenceReporter:
    """Reports one worker life, from the moment it consumes until it has left."""

    def __init__(self, life: WorkerLife, *, worker: str, queue: str, probes: Probes) -> None:
        self._life, self._worker, self._queue, self._probes = life, worker, queue, probes
        self._consumer: Any = None
        self._received: list[Any] = []
        self._retiring = False
        self._marked = self._ejected = False
        self._draining = False
        self._said = ""
        self._stopped = Event()
        self._thread: Thread | None = None

    def start(self, sender: Any, **_: Any) -> None:
        """Begin when the worker is ready to consume; ``sender`` is Celery's consumer, which outlasts its connections."""
        self._consumer = sender
        self._probes.watch(sender)
        self._life.consumer = sender
        self._thread = Thread(target=self._run, name="workerpool-presence", daemon=True)
        self._thread.start()
        atexit.register(self.stop)  # a cold shutdown does not send worker_shutdown

    def retire(self) -> None:
        """Report no slots from now on: the worker only finishes its jobs."""
        self._retiring = True

    def stop(self, **_: Any) -> None:
        """Sign off: put back whatever is still in flight here, so that nothing is left to take over."""
        if self._stopped.is_set() or self._thread is None:
            return
        self._stopped.set()
        self._probes.gone()
        self._thread.join(timeout=PRESENCE_PERIOD_SECONDS)
        life = self._life
        life.catch_up()
        if life.owed:
            logger.warning(
                "%d messages or ends of jobs could not be recorded: what is on the ledger is run again", len(life.owed)
            )
        try:
            for tag in self._held_tags():
                give_back(life, tag)
            life.connection.run("leave", ledger.leave(life.keys, life.tier, life.owner))
        except PoolUnavailable:
            logger.warning("could not sign off: this worker will be taken for lost, and what it held delivered again")

    def _run(self) -> None:
        due = 0.0
        while not self._stopped.is_set():
            try:
                if due <= 0:
                    self._report()
                    self._life.catch_up()
                    self._said = ""
                    due = PRESENCE_PERIOD_SECONDS
                else:
                    with unavailable_when_down():
                        self._marked = bool(self._life.connection.client.sismember(self._life.keys.drain, self._worker))
                leaves = self._marked or self._ejected
                if leaves != self._draining or (leaves and self._consumes()):  # a new connection consumes again
                    self._draining = leaves
                    self._consumer.call_soon(self._apply_mark)
                    due = 0.0
            except PoolUnavailable as unavailable:
                if str(unavailable) != self._said:
                    logger.warning("presence: %s; asked again until it does", unavailable)
                self._said = str(unavailable)
            except Exception:
                logger.exception("presence could not be reported")
            self._probes.touch(ready=not (self._draining or self._retiring))
            self._stopped.wait(MARK_PERIOD_SECONDS)
            due -= MARK_PERIOD_SECONDS

    def _report(self) -> None:
        life = self._life
        presence: dict[str, str | int | bool] = {
            "owner": life.owner,
            "worker": self._worker,
            "tier": life.tier,
            "queue": self._queue,
            "slots": self._consumer.pool.num_processes if self._consumes() and not (self._retiring or self._draining) else 0,
            "busy": len(state.reserved_requests),
            "scheduled": len(state.scheduled_requests),
            "draining": self._draining and self._marked and not self._consumes(),
        }
        answer = int(life.connection.run("presence", ledger.report(life.keys, presence, self._held_tags())))
        self._marked, self._ejected = bool(answer & ledger.MARKED), bool(answer & ledger.EJECTED)

    def _apply_mark(self) -> None:
        """Stop or resume consuming; runs in the worker's own loop."""
        consumer = self._consumer
        if consumer.task_consumer is None:
            return
        if self._draining:
            if not self._consumes():
                return
            why = "marked to drain" if self._marked else "its attempts fail while those of other workers succeed"
            logger.warning("%s: finishes what it has and takes nothing new", why)
            consumer.task_consumer.cancel()
            for request in tuple(state.scheduled_requests):
                self._hand_back(request)
        elif not self._retiring:
            logger.warning("no longer marked to drain or ejected: consumes again")
            consumer.task_consumer.consume()

    def _consumes(self) -> bool:
        """Whether it takes messages from the queue of its tier."""
        task_consumer = self._consumer.task_consumer
        return task_consumer is not None and bool(task_consumer.consuming_from(self._queue))

    def _hand_back(self, request: Any) -> None:
        """Give a message with a future ETA to a worker that stays."""
        consumer = self._consumer
        consumer.timer.cancel(request._eta_timer_entry)  # noqa: SLF001 as Celery does when it loses its connection
        state.scheduled_requests.discard(request)
        state.requests.pop(request.id, None)
        consumer.qos.decrement_eventually()
        request.reject(requeue=True)

    def _held_tags(self) -> list[str]:
        """The tags of all deliveries that this worker has not acknowledged: those of its channels, of tasks with a future ETA or
        not and of an author's own consumers, and those of jobs that have been running since before a reconnect.
        """
        task_consumer = self._consumer.task_consumer
        if task_consumer is not None:
            transport = task_consumer.channel.connection  # none if the channel is closed
            channels = {task_consumer.channel, *(transport.channels if transport else ())}
            self._received = [qos for channel in channels if (qos := channel._qos)]  # noqa: SLF001 to look is not to make one
        # At the end of a warm shutdown the consumer is gone, and not what it held; between two connections that is for others.
        received = self._received if task_consumer is not None or self._stopped.is_set() else []
        held = {tag for qos in received for tag in set(qos._delivered) - qos._dirty}  # noqa: SLF001 kombu has no public name for it
        running = {request.message.delivery_tag for request in tuple(state.reserved_requests) if not request.acknowledged}
        return [*held | running]

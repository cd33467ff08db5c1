"""The outcome of a pass as the resource's status, as Events about it, and as lines of the log."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from http import HTTPStatus
from typing import Any

from workerpool_operator.deployment import MANAGER
from workerpool_operator.kube.api import Api, ApiError, path_to
from workerpool_operator.kube.seen import Leaving, Refused
from workerpool_operator.model import API_VERSION, KIND, PLURAL
from workerpool_operator.ports import Pool, Report
from workerpool_operator.status import Condition, ConditionType, Event, Status, flips, stamp, worth_writing

LONGEST_NOTE = 1024
"""Bytes that the API server takes as the text of an Event."""

LONGEST_PAUSE_SECONDS = 30.0
"""After a status could not be written, pauses grow to this."""

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Written:
    status: Mapping[str, Any]
    at: float


@dataclass(frozen=True, slots=True)
class _Trouble:
    tries: int
    retry_at: float


class KubeReporter:
    """The ``Reporter`` port on Kubernetes."""

    def __init__(self, api: Api, clock: Callable[[], float] = time.time) -> None:
        self._api = api
        self._clock = clock
        self._written: dict[str, _Written] = {}
        self._troubles: dict[str, _Trouble] = {}

    async def report(self, report: Report) -> None:
        """Write what changed."""
        await self._write(report.pool, report.status, report.events)

    async def refuse(self, refused: Refused) -> None:
        """Say that a stored resource is not valid; its workers are left as they are."""
        await self._set_aside(refused, "InvalidSpec", "; ".join(str(problem) for problem in refused.problems))

    async def take_leave(self, leaving: Leaving) -> None:
        """Say that a resource is being deleted, and whose finalizers hold it meanwhile."""
        message = "it is being deleted, so that nothing is scaled or taken over any more; its workers go with it"
        await self._set_aside(leaving, "Deleting", f"{message}, once these finalizers let it go: {', '.join(leaving.finalizers)}")

    def forget(self, uid: str) -> None:
        """Drop what is remembered of a resource that is gone."""
        self._written.pop(uid, None)
        self._troubles.pop(uid, None)

    async def _set_aside(self, subject: Refused | Leaving, reason: str, message: str) -> None:
        """Write the status of a resource that no pass takes up."""
        ready = Condition(ConditionType.READY, "False", reason, message, subject.generation)
        previous = self._previous(subject)
        status = Status(
            observed_generation=subject.generation,
            conditions=stamp((ready,), previous, self._clock()),
            tiers=(),
            waiting=None,
            in_flight=None,
            replicas="",
        )
        await self._write(subject, status, flips(status, previous))

    def _previous(self, subject: Pool | Refused | Leaving) -> Mapping[str, Any]:
        written = self._written.get(subject.uid)
        return written.status if written else subject.status

    async def _write(self, subject: Pool | Refused | Leaving, status: Status, events: Sequence[Event]) -> None:
        previous, now = self._previous(subject), self._clock()
        written, trouble = self._written.get(subject.uid), self._troubles.get(subject.uid)
        waits = trouble is not None and now < trouble.retry_at
        if not waits and worth_writing(status, previous, now - written.at if written else float("inf")):
            await self._write_status(subject, status, previous, now)
        for event in events:
            await self._write_event(subject, event, now)

    async def _write_status(
        self, subject: Pool | Refused | Leaving, status: Status, previous: Mapping[str, Any], now: float
    ) -> None:
        new = status.dump()
        # In a merge patch a field goes away by null only: an unknown number must not leave the old one standing.
        body = {"metadata": {"uid": subject.uid}, "status": dict.fromkeys(previous) | new}
        try:
            await self._api.merge(path_to(API_VERSION, subject.namespace, PLURAL, subject.name, "status"), body)
        except ApiError as error:
            if error.status != HTTPStatus.NOT_FOUND:
                tries = self._troubles[subject.uid].tries + 1 if subject.uid in self._troubles else 1
                pause = max(min(2.0 ** (tries - 1), LONGEST_PAUSE_SECONDS), error.retry_after)
                self._troubles[subject.uid] = _Trouble(tries, now + pause)
                _LOG.warning(
                    "%s/%s: status not written, tried again in %.0f s: %s", subject.namespace, subject.name, pause, error
                )
            return
        self._troubles.pop(subject.uid, None)
        self._written[subject.uid] = _Written(new, now)

    async def _write_event(self, subject: Pool | Refused | Leaving, event: Event, now: float) -> None:
        level = logging.WARNING if event.warning else logging.INFO
        _LOG.log(level, "%s/%s: %s: %s", subject.namespace, subject.name, event.reason, event.message)
        body = {
            "apiVersion": "events.k8s.io/v1",
            "kind": "Event",
            "metadata": {"generateName": f"{subject.name}-", "namespace": subject.namespace},
            "eventTime": datetime.fromtimestamp(now, UTC).isoformat(timespec="microseconds").replace("+00:00", "Z"),
            "reportingController": f"workerpool.dev/{MANAGER}",
            "reportingInstance": MANAGER,
            "action": "Reconcile",
            "type": "Warning" if event.warning else "Normal",
            "reason": event.reason,
            "note": event.message.encode()[:LONGEST_NOTE].decode(errors="ignore"),
            "regarding": {
                "apiVersion": API_VERSION,
                "kind": KIND,
                "namespace": subject.namespace,
                "name": subject.name,
                "uid": subject.uid,
            },
        }
        try:
            await self._api.post(path_to("events.k8s.io/v1", subject.namespace, "events"), body)
        except ApiError as error:
            _LOG.warning("%s/%s: Event %s not written: %s", subject.namespace, subject.name, event.reason, error)

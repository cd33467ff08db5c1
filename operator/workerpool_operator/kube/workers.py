"""The workers of a pool as Deployments, one per tier.

Every step follows from what the API server holds, so a process that dies between two of them leaves nothing that the next
one would not finish. A step that fails is tried again by a later pass, with growing pauses, and only for the tier that it
belongs to.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import math
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from http import HTTPStatus
from typing import Any, TypeAlias

from workerpool_operator.deployment import MANAGED_BY, POOL_LABEL, TIER_LABEL, build, name_of, selector_of
from workerpool_operator.kube.api import Api, ApiError, path_to
from workerpool_operator.kube.seen import (
    DELETION_COST,
    SCALE_MANAGER,
    TEMPLATE_MANAGER,
    LiveDeployment,
    LivePod,
    Seen,
    TurnedAway,
    deployment,
)
from workerpool_operator.model import KIND, Tier
from workerpool_operator.observation import Phase, Replica, TierReplicas, Unavailable
from workerpool_operator.ports import Pool

LONGEST_PAUSE_SECONDS = 30.0

PASSING_TRIES = 3
"""A fault that may pass by itself is shown to the user only after so many tries."""

TURNED_AWAY_SECONDS = 30.0
"""How long it counts against the pods that no node has taken in yet when one was turned away; the next is made at once."""

REPAIRS_AT_ONCE = 3
"""So often in a row a Deployment is repaired at once; after that pauses grow, because each repair replaces pods."""

CALM_SECONDS = 60.0
"""Repairs are in a row if no more than this lies between two of them."""

LEAVING_COST = str(-(2**31))
"""The deletion cost of a pod that is drained: the least that there is, because a template may give its pods one of its own."""

_LOG = logging.getLogger(__name__)


class _Hindered(Exception):
    """What has to be done must not be done, or cannot, although the API server would take it."""

    passing = False
    retry_after = 0.0


class _Overtaken(_Hindered):
    """A count is not any more what the next one was decided on; a later pass decides anew."""

    passing = True


@dataclass(frozen=True, slots=True)
class _Trouble:
    """Why a tier's last write failed, how often in a row, and when it may be tried again: at once when the pool has changed."""

    why: str
    generation: int
    tries: int
    shown: bool
    since: float
    retry_at: float


@dataclass(frozen=True, slots=True)
class _Repairs:
    """How often in a row a Deployment was repaired, when the last time was, and who had edited it."""

    times: int = 0
    at: float = -math.inf
    editor: str = ""

    def again(self, editor: str, now: float) -> _Repairs:
        return _Repairs(self.times + 1 if now - self.at <= CALM_SECONDS else 1, now, editor)

    @property
    def next_at(self) -> float:
        pause = min(2.0 ** (self.times - REPAIRS_AT_ONCE), LONGEST_PAUSE_SECONDS)
        return self.at + (pause if self.times >= REPAIRS_AT_ONCE else 0.0)

    def fought(self, now: float) -> bool:
        return self.times >= REPAIRS_AT_ONCE and now - self.at <= CALM_SECONDS


_Part: TypeAlias = tuple[str, str]
"""The uid of a pool, and the name of a tier."""


class KubeWorkers:
    """The ``Workers`` port on Kubernetes.

    Args:
        api: the API server.
        seen: what the watches have shown.
        broker_mark: what changes with the broker's URL; empty while it is not known.
        clock: wall-clock seconds.
    """

    def __init__(
        self,
        api: Api,
        seen: Seen,
        broker_mark: Callable[[Pool], str],
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._api = api
        self._seen = seen
        self._broker_mark = broker_mark
        self._clock = clock
        # What was applied, and what the API server made of it: as long as both stand there is nothing to repair.
        self._settled: dict[_Part, tuple[str, str]] = {}
        self._troubles: dict[_Part, _Trouble] = {}
        self._repairs: dict[_Part, _Repairs] = {}

    def removed(self, pool: Pool) -> tuple[Tier, ...]:
        """The tiers of Deployments that the pool has made and names no more."""
        named = {tier.name for tier in pool.spec.tiers}
        return tuple(
            live.tier
            for (namespace, name), live in self._seen.deployments.items()
            if live.tier is not None and live.tier.name not in named
            if (namespace, name) == (pool.namespace, name_of(pool, live.tier))
            if live.owner is not None and live.owner[2] == pool.uid
        )

    async def observe(self, pool: Pool) -> Mapping[str, TierReplicas] | Unavailable:
        """What the watches have shown of the pool's Deployments and pods."""
        if not self._seen.complete:
            return Unavailable("the first listing of Deployments and pods is not complete yet")
        return {tier.name: self._tier(pool, tier) for tier in pool.tiers}

    async def scale(self, pool: Pool, replicas: Mapping[str, int], leaving: frozenset[str]) -> None:
        """Make every tier's Deployment as the spec says, with that many replicas; that of a removed one keeps its template."""
        steps = [
            self._try(pool, tier.name, partial(bring, pool, tier, replicas[tier.name], leaving))
            for tiers, bring in ((pool.spec.tiers, self._bring), (pool.removed, self._let_go))
            for tier in tiers
            if tier.name in replicas
        ]
        await asyncio.gather(*steps)

    def forget(self, pool: Pool) -> None:
        """Drop what is remembered of a pool that is gone."""
        for kept in (self._settled, self._troubles, self._repairs):
            for part in [part for part in kept if part[0] == pool.uid]:
                del kept[part]

    def _tier(self, pool: Pool, tier: Tier) -> TierReplicas:
        name = name_of(pool, tier)
        live = self._seen.deployments.get(pool.namespace, name)
        desired, failure, rolling, rival, pods = 0, "", False, "", self._replicas(pool, tier)
        if live is not None and _owned(live, pool, tier):
            desired, failure, rolling = live.replicas, live.failure, live.rolling
            # Before there is a Deployment there is no count to leave to it: an autoscaler takes one of none for switched off.
            rival = self._rival(pool, name)
        missing = desired - sum(replica.phase is not Phase.STOPPING for replica in pods)
        trouble = self._troubles.get((pool.uid, tier.name))
        if trouble is not None and trouble.shown:
            failure = trouble.why
        if failure:
            since = trouble.since if trouble else self._clock()
            pods += [Replica(name, Phase.FAILING, since, detail=failure)] * max(1, missing)
        return TierReplicas(desired, tuple(pods), rolling, rival, editor=self._editor(pool, tier))

    def _rival(self, pool: Pool, name: str) -> str:
        return next((other.words for other in self._seen.autoscalers.within(pool.namespace) if other.target == name), "")

    def _editor(self, pool: Pool, tier: Tier) -> str:
        repairs = self._repairs.get((pool.uid, tier.name), _Repairs())
        return (repairs.editor or "somebody") if repairs.fought(self._clock()) else ""

    def _replicas(self, pool: Pool, tier: Tier) -> list[Replica]:
        """The tier's workers; a pod that no node has taken in fails where the one before it was turned away."""
        pods, since = self._all_pods(pool, tier), self._clock() - TURNED_AWAY_SECONDS
        away = max((pod for pod in pods if isinstance(pod, TurnedAway) and pod.at > since), key=lambda pod: pod.at, default=None)
        return [
            replace(pod.replica, phase=Phase.FAILING, detail=away.why)
            if away and pod.replica.phase is Phase.STARTING and not pod.taken_in
            else pod.replica
            for pod in pods
            if isinstance(pod, LivePod)
        ]

    def _all_pods(self, pool: Pool, tier: Tier) -> list[LivePod | TurnedAway]:
        selector = selector_of(pool, tier)
        return self._seen.pods.members((pool.namespace, selector[POOL_LABEL], selector[TIER_LABEL]))

    async def _try(self, pool: Pool, tier: str, step: Callable[[], Awaitable[None]]) -> None:
        part, now = (pool.uid, tier), self._clock()
        before = self._troubles.get(part)
        if before is not None and before.generation == pool.generation and now < before.retry_at:
            return
        try:
            await step()
        except (ApiError, _Hindered) as error:
            tries = before.tries + 1 if before else 1
            pause = max(min(2.0 ** (tries - 1), LONGEST_PAUSE_SECONDS), error.retry_after)
            self._troubles[part] = _Trouble(
                why=str(error),
                generation=pool.generation,
                tries=tries,
                shown=not error.passing or tries >= PASSING_TRIES,
                since=before.since if before else now,
                retry_at=now + pause,
            )
            if before is None or before.why != str(error):
                _LOG.warning("%s %s: %s", pool.id, tier, error)
        else:
            self._troubles.pop(part, None)

    async def _bring(self, pool: Pool, tier: Tier, wanted: int, leaving: frozenset[str]) -> None:
        name = name_of(pool, tier)
        seen = self._seen.deployments.get(pool.namespace, name)
        live = seen or await self._look_up(pool, name)
        if live is not None:
            if live.deleting:
                return
            if not _owned(live, pool, tier):
                raise _Hindered(_taken(name, live))
        settled = await self._settle(pool, tier, live, wanted)
        if seen is not None or live is None:  # else the count was decided without having seen it: the next pass decides anew
            await self._count(pool, tier, settled, wanted, leaving)

    async def _let_go(self, pool: Pool, tier: Tier, wanted: int, leaving: frozenset[str]) -> None:
        """Lower the count of a removed tier's Deployment; delete one that has none and shall have none."""
        name = name_of(pool, tier)
        live = self._seen.deployments.get(pool.namespace, name)
        if live is None or live.deleting:
            return
        if live.replicas or wanted:
            await self._count(pool, tier, live, wanted, leaving)
        else:
            await self._api.delete(_path(pool, name), live.uid)
            _LOG.info("%s: deleted Deployment %s, its tier is no longer in the WorkerPool", pool.id, name)

    async def _count(self, pool: Pool, tier: Tier, live: LiveDeployment, wanted: int, leaving: frozenset[str]) -> None:
        name = name_of(pool, tier)
        if live.replicas == wanted or self._rival(pool, name):
            return
        if wanted < live.replicas:
            await self._mark(pool, tier, leaving)
        await self._write_scale(pool, name, live, wanted)

    async def _look_up(self, pool: Pool, name: str) -> LiveDeployment | None:
        """Ask for a Deployment that no watch shows: the name may be taken, or its labels may have been edited away."""
        try:
            return deployment(await self._api.get(_path(pool, name)))
        except ApiError as error:
            if error.status == HTTPStatus.NOT_FOUND:
                return None
            raise

    async def _settle(self, pool: Pool, tier: Tier, live: LiveDeployment | None, wanted: int) -> LiveDeployment:
        """Create or repair the Deployment, and give its replica count an owner of its own."""
        # While the Secret cannot be read the pods keep the mark that they have: another one would replace them all.
        manifest = build(pool, tier, self._broker_mark(pool) or (live.broker_mark if live else ""))
        part, name, digest = (pool.uid, tier.name), name_of(pool, tier), _digest(manifest)
        settled, repairs, now = self._settled.get(part), self._repairs.get(part, _Repairs()), self._clock()
        edited = settled is not None and settled[0] == digest
        if live is None:
            created = {**manifest, "spec": {**manifest["spec"], "replicas": wanted}}
            live = await self._apply(pool, created, TEMPLATE_MANAGER)
            _LOG.info("%s %s: created Deployment %s with %d replicas", pool.id, tier.name, name, wanted)
        if live.replicas_in_template:
            # Left out by its only owner the field would fall back to 1.
            count = {"metadata": {"name": name}, "spec": {"replicas": live.replicas}}
            await self._apply(pool, {"apiVersion": "apps/v1", "kind": "Deployment", **count}, SCALE_MANAGER)
        elif settled == (digest, live.fingerprint) or (edited and now < repairs.next_at):
            return live
        applied = await self._apply(pool, manifest, TEMPLATE_MANAGER)
        if applied.fingerprint != live.fingerprint:
            _LOG.info("%s %s: Deployment %s differed from its WorkerPool, repaired", pool.id, tier.name, name)
            if edited:
                self._repairs[part] = repairs.again(live.editor, now)
        self._settled[part] = (digest, applied.fingerprint)
        return applied

    async def _apply(self, pool: Pool, manifest: Mapping[str, Any], manager: str) -> LiveDeployment:
        answer = await self._api.apply(_path(pool, manifest["metadata"]["name"]), manifest, manager)
        self._seen.deployments.put(answer)
        return deployment(answer)

    async def _write_scale(self, pool: Pool, name: str, live: LiveDeployment, wanted: int) -> None:
        count: dict[str, Any] = {"path": "/spec/replicas"}
        steps = [{**count, "op": "add", "value": wanted}]
        if live.replicas:  # a Scale of none lacks the field
            steps.insert(0, {**count, "op": "test", "value": live.replicas})
        try:
            answer = await self._api.step(_path(pool, name, "scale"), steps, fieldManager=SCALE_MANAGER)
        except ApiError as error:
            if error.status != HTTPStatus.UNPROCESSABLE_ENTITY:
                raise
            raise _Overtaken(f"Deployment {name} has not {live.replicas} replicas any more: {error}") from error
        version = answer["metadata"]["resourceVersion"]
        self._seen.deployments.amend(pool.namespace, name, version, replace(live, replicas=wanted))

    async def _mark(self, pool: Pool, tier: Tier, leaving: frozenset[str]) -> None:
        """Make the pods that leave cheaper to remove than the others; one that was to leave and stays has no cost any more."""
        for pod in self._all_pods(pool, tier):
            if isinstance(pod, TurnedAway) or pod.replica.phase is Phase.STOPPING:
                continue
            leaves, cheapest = pod.replica.worker in leaving, pod.deletion_cost == LEAVING_COST
            if leaves is not cheapest:
                cost = LEAVING_COST if leaves else None
                path = path_to("v1", pool.namespace, "pods", pod.replica.worker)
                try:
                    self._seen.pods.put(await self._api.merge(path, {"metadata": {"annotations": {DELETION_COST: cost}}}))
                except ApiError as error:
                    if error.status != HTTPStatus.NOT_FOUND:  # one that is gone already need not be made cheaper
                        raise


def _path(pool: Pool, name: str, *subresource: str) -> str:
    return path_to("apps/v1", pool.namespace, "deployments", name, *subresource)


def _owned(live: LiveDeployment, pool: Pool, tier: Tier) -> bool:
    """Whether the pool controls it; one that lost its owner reference but still carries the labels is the pool's too."""
    if live.owner is not None:
        return live.owner[2] == pool.uid
    ours = selector_of(pool, tier)
    return all(live.labels.get(label) == ours[label] for label in (MANAGED_BY, POOL_LABEL))


def _taken(name: str, live: LiveDeployment) -> str:
    holder = f"belongs to {live.owner[0]} {live.owner[1]}" if live.owner else f"exists and was not made for a {KIND}"
    return f"Deployment {name} {holder}; delete or rename it, or rename the tier"


def _digest(manifest: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()

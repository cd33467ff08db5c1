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
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from http import HTTPStatus
from typing import Any

from workerpool_operator.deployment import MANAGED_BY, MANAGER, POOL_LABEL, TIER_LABEL, build, name_of, selector_of
from workerpool_operator.kube.api import Api, ApiError, path_to
from workerpool_operator.kube.seen import (
    DELETION_COST,
    SCALE_MANAGER,
    TEMPLATE_MANAGER,
    LiveDeployment,
    LivePod,
    Seen,
    deployment,
)
from workerpool_operator.model import KIND, Tier
from workerpool_operator.observation import Phase, Replica, TierReplicas, Unavailable
from workerpool_operator.ports import Pool

LONGEST_PAUSE_SECONDS = 30.0

PASSING_TRIES = 3
"""A fault that may pass by itself is shown to the user only after so many tries."""

BUSY_COST = "1000"
"""The deletion cost of a pod that holds a job."""

_LOG = logging.getLogger(__name__)


class _Refused(Exception):
    """The Deployment's name is taken by something that is not this pool's."""


@dataclass(frozen=True, slots=True)
class _Trouble:
    """Why a tier's last write failed, how often in a row, and when it may be tried again: at once when the pool has changed."""

    why: str
    generation: int
    tries: int
    shown: bool
    since: float
    retry_at: float


class KubeWorkers:
    """The ``Workers`` port on Kubernetes."""

    def __init__(self, api: Api, seen: Seen, clock: Callable[[], float] = time.time) -> None:
        self._api = api
        self._seen = seen
        self._clock = clock
        # What was applied, and what the API server made of it: as long as both stand there is nothing to repair.
        self._settled: dict[tuple[str, str], tuple[str, str]] = {}
        self._troubles: dict[tuple[str, str], _Trouble] = {}

    async def observe(self, pool: Pool) -> Mapping[str, TierReplicas] | Unavailable:
        """What the watches have shown of the pool's Deployments and pods."""
        if not self._seen.complete:
            return Unavailable("the first listing of Deployments and pods is not complete yet")
        return {tier.name: self._tier(pool, tier) for tier in pool.spec.tiers}

    async def scale(self, pool: Pool, replicas: Mapping[str, int], busy: frozenset[str]) -> None:
        """Make every tier's Deployment as the spec says, with that many replicas."""
        tiers = [tier for tier in pool.spec.tiers if tier.name in replicas]
        await asyncio.gather(*(self._try(pool, tier, replicas[tier.name], busy) for tier in tiers))

    def forget(self, pool: Pool) -> None:
        """Drop what is remembered of a pool that is gone."""
        for tier in pool.spec.tiers:
            key = (pool.namespace, name_of(pool, tier))
            self._settled.pop(key, None)
            self._troubles.pop(key, None)

    def _tier(self, pool: Pool, tier: Tier) -> TierReplicas:
        name = name_of(pool, tier)
        live = self._seen.deployments.get(pool.namespace, name)
        desired, failure, pods = 0, "", [pod.replica for pod in self._pods(pool, tier)]
        if live is not None and _owned(live, pool):
            desired, failure = live.replicas, live.failure
        trouble = self._troubles.get((pool.namespace, name))
        if trouble is not None and trouble.shown:
            failure = trouble.why
        if failure:
            since = trouble.since if trouble else self._clock()
            pods.append(Replica(name, Phase.FAILING, since, detail=f"Deployment {name}: {failure}"))
        return TierReplicas(desired, tuple(pods))

    def _pods(self, pool: Pool, tier: Tier) -> list[LivePod]:
        selector = selector_of(pool, tier)
        return self._seen.pods.members((pool.namespace, selector[POOL_LABEL], selector[TIER_LABEL]))

    async def _try(self, pool: Pool, tier: Tier, wanted: int, busy: frozenset[str]) -> None:
        key = (pool.namespace, name_of(pool, tier))
        before = self._troubles.get(key)
        now = self._clock()
        if before is not None and before.generation == pool.generation and now < before.retry_at:
            return
        try:
            await self._bring(pool, tier, wanted, busy)
        except (ApiError, _Refused) as error:
            tries = before.tries + 1 if before else 1
            asked, passing = (error.retry_after, error.passing) if isinstance(error, ApiError) else (0.0, False)
            pause = max(min(2.0 ** (tries - 1), LONGEST_PAUSE_SECONDS), asked)
            shown = not passing or tries >= PASSING_TRIES
            self._troubles[key] = _Trouble(
                str(error), pool.generation, tries, shown, before.since if before else now, now + pause
            )
            if before is None or before.why != str(error):
                _LOG.warning("%s %s: Deployment %s: %s", pool.id, tier.name, key[1], error)
        else:
            self._troubles.pop(key, None)

    async def _bring(self, pool: Pool, tier: Tier, wanted: int, busy: frozenset[str]) -> None:
        name = name_of(pool, tier)
        live = self._seen.deployments.get(pool.namespace, name) or await self._look_up(pool, name)
        if live is not None:
            if not _owned(live, pool):
                raise _Refused(_taken(live))
            if live.deleting:
                return
        live = await self._settle(pool, tier, live, wanted)
        if live.replicas != wanted:
            if wanted < live.replicas:
                await self._mark(pool, tier, busy)
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
        manifest = build(pool, tier)
        key, digest = (pool.namespace, manifest["metadata"]["name"]), _digest(manifest)
        if live is None:
            created = {**manifest, "spec": {**manifest["spec"], "replicas": wanted}}
            live = await self._apply(pool, created, TEMPLATE_MANAGER)
            _LOG.info("%s %s: created Deployment %s with %d replicas", pool.id, tier.name, key[1], wanted)
        if live.replicas_in_template:
            # Left out by its only owner the field would fall back to 1.
            count = {"metadata": {"name": key[1]}, "spec": {"replicas": live.replicas}}
            await self._apply(pool, {"apiVersion": "apps/v1", "kind": "Deployment", **count}, SCALE_MANAGER)
        elif self._settled.get(key) == (digest, live.fingerprint):
            return live
        applied = await self._apply(pool, manifest, TEMPLATE_MANAGER)
        if applied.fingerprint != live.fingerprint:
            _LOG.info("%s %s: Deployment %s differed from its WorkerPool, repaired", pool.id, tier.name, key[1])
        self._settled[key] = (digest, applied.fingerprint)
        return applied

    async def _apply(self, pool: Pool, manifest: Mapping[str, Any], manager: str) -> LiveDeployment:
        answer = await self._api.apply(_path(pool, manifest["metadata"]["name"]), manifest, manager)
        self._seen.deployments.put(answer)
        return deployment(answer)

    async def _write_scale(self, pool: Pool, name: str, live: LiveDeployment, wanted: int) -> None:
        body = {"spec": {"replicas": wanted}}
        answer = await self._api.merge(_path(pool, name, "scale"), body, fieldManager=SCALE_MANAGER)
        version = answer["metadata"]["resourceVersion"]
        self._seen.deployments.amend(pool.namespace, name, version, replace(live, replicas=wanted))

    async def _mark(self, pool: Pool, tier: Tier, busy: frozenset[str]) -> None:
        """Make the pods that hold a job dearer to remove than the idle ones."""
        for pod in self._pods(pool, tier):
            cost = BUSY_COST if pod.replica.worker in busy else None
            if pod.replica.phase is Phase.READY and (pod.deletion_cost or None) != cost:
                path = path_to("v1", pool.namespace, "pods", pod.replica.worker)
                self._seen.pods.put(await self._api.merge(path, {"metadata": {"annotations": {DELETION_COST: cost}}}))


def _path(pool: Pool, name: str, *subresource: str) -> str:
    return path_to("apps/v1", pool.namespace, "deployments", name, *subresource)


def _owned(live: LiveDeployment, pool: Pool) -> bool:
    """Whether the pool controls it; one that lost its owner reference but still carries the labels is the pool's too."""
    if live.owner is not None:
        return live.owner[2] == pool.uid
    return live.labels.get(MANAGED_BY) == MANAGER and live.labels.get(POOL_LABEL) is not None


def _taken(live: LiveDeployment) -> str:
    kind, name, _ = live.owner or ("", "", "")
    holder = f"belongs to {kind} {name}" if kind else f"exists and was not made for a {KIND}"
    return f"{holder}; delete or rename it, or rename the tier"


def _digest(manifest: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()

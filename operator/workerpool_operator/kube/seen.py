"""What the watches have shown of WorkerPools, Deployments and pods, kept in memory as small values."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from http import HTTPStatus
from typing import Any, Generic, TypeAlias, TypeVar

from workerpool_operator.deployment import ACCELERATOR, BROKER_MARK, MANAGED_BY, MANAGER, POOL_LABEL, TIER_LABEL, tier_of
from workerpool_operator.kube.api import Api, ApiError, path_to
from workerpool_operator.model import API_VERSION, PLURAL, WORKER_CONTAINER, Problem, Tier, parse_spec, unknown_to_the_api_server
from workerpool_operator.observation import Phase, Replica
from workerpool_operator.ports import Pool

TEMPLATE_MANAGER = "workerpool"
"""Field manager of everything in a Deployment but its replica count."""

SCALE_MANAGER = "workerpool-scale"
"""Field manager of the replica count."""

AUTOSCALERS = "horizontalpodautoscalers"

PAGE = 500
"""How many objects are asked for at once."""

logger = logging.getLogger(__name__)

Key: TypeAlias = tuple[str, str]
"""Namespace and name."""

Group: TypeAlias = tuple[str, str, str]
"""Namespace, pool label, tier label."""


@dataclass(frozen=True, slots=True)
class LiveDeployment:
    """A Deployment as the API server has it.

    Attributes:
        uid: tells it from another of its name.
        owner: ``(kind, name, uid)`` of its controller.
        fingerprint: changes with anything that a user or another controller could change in it, except the replica count.
        replicas_in_template: the replica count still belongs to the manager of the template.
        failure: why its pods cannot be created.
        tier: the tier that it was built for; None where that cannot be told.
        rolling: pods are being replaced by those of another template.
        broker_mark: what its pods are annotated with.
        editor: the field manager of whoever else wrote to it last; empty if nobody has.
    """

    uid: str
    replicas: int
    labels: Mapping[str, str]
    owner: tuple[str, str, str] | None
    deleting: bool
    fingerprint: str
    replicas_in_template: bool
    failure: str
    tier: Tier | None
    rolling: bool
    broker_mark: str
    editor: str


@dataclass(frozen=True, slots=True)
class LivePod:
    """A pod that is not over: its worker, the deletion cost that it carries, and whether its node has taken it in."""

    replica: Replica
    deletion_cost: str
    taken_in: bool = True


@dataclass(frozen=True, slots=True)
class TurnedAway:
    """A pod that its node has refused to run (a device that fails, for one): when, and why."""

    at: float
    why: str


@dataclass(frozen=True, slots=True)
class LiveAutoscaler:
    """A HorizontalPodAutoscaler: the Deployment that it scales, and in words what it is."""

    target: str
    words: str


SELECTOR = f"{MANAGED_BY}={MANAGER}"
"""Which Deployments and pods are watched."""

T = TypeVar("T")


@dataclass(slots=True)
class Cache(Generic[T]):
    """The objects of one kind, by name and by tier. Whatever arrives late and is older than what is known changes nothing."""

    parse: Callable[[Mapping[str, Any], T | None], T | None]
    _values: dict[Key, T] = field(default_factory=dict)
    _groups: dict[Group, set[Key]] = field(default_factory=dict)
    _group_of: dict[Key, Group] = field(default_factory=dict)
    _versions: dict[Key, int] = field(default_factory=dict)

    def within(self, namespace: str) -> list[T]:
        """Every object of a namespace."""
        return [value for (place, _), value in self._values.items() if place == namespace]

    def get(self, namespace: str, name: str) -> T | None:
        """The object of that name."""
        return self._values.get((namespace, name))

    def items(self) -> list[tuple[Key, T]]:
        """Every object."""
        return list(self._values.items())

    def members(self, group: Group) -> list[T]:
        """All objects of a tier."""
        return [self._values[key] for key in sorted(self._groups.get(group, ()))]

    def put(self, raw: Mapping[str, Any]) -> None:
        """Take in an object that exists."""
        key, version = _key(raw), _version(raw)
        if version < self._versions.get(key, 0):
            return
        value = self.parse(raw, self._values.get(key))
        self._remove(key)
        self._versions[key] = version
        if value is not None:
            self._values[key] = value
            self._group_of[key] = _group(raw)
            self._groups.setdefault(_group(raw), set()).add(key)

    def drop(self, raw: Mapping[str, Any]) -> None:
        """Take in that an object is gone."""
        key, version = _key(raw), _version(raw)
        if version >= self._versions.get(key, 0):
            self._remove(key)
            # Kept until the next listing: a late answer about its last state must not bring it back.
            self._versions[key] = version

    def amend(self, namespace: str, name: str, version: str, value: T) -> None:
        """Take in an answer that shows only a part of the object."""
        key = (namespace, name)
        if key in self._values and int(version) >= self._versions[key]:
            self._values[key] = value
            self._versions[key] = int(version)

    def relist(self, namespace: str | None, page: Mapping[str, Any], listed: set[Key]) -> None:
        """Take in a page of the listing of a namespace, or of all; after the last one, what is on none and not newer is gone.

        Args:
            namespace: that is listed, None for all.
            page: as the API server sends it.
            listed: gathers what was on the pages so far.
        """
        for raw in page["items"]:
            self.put(raw)
            listed.add(_key(raw))
        if page["metadata"].get("continue"):
            return
        at = _version(page)
        for key, version in list(self._versions.items()):
            if key not in listed and version <= at and namespace in {None, key[0]}:
                self._remove(key)
                del self._versions[key]

    def _remove(self, key: Key) -> None:
        self._values.pop(key, None)
        group = self._group_of.pop(key, None)
        if group is not None:
            self._groups[group].discard(key)
            if not self._groups[group]:
                del self._groups[group]


@dataclass(frozen=True, slots=True)
class Refused:
    """A WorkerPool that the API server stored and that is nevertheless not valid."""

    namespace: str
    name: str
    uid: str
    generation: int
    status: Mapping[str, Any]
    problems: Sequence[Problem]


@dataclass(frozen=True, slots=True)
class Leaving:
    """A WorkerPool that is deleted as soon as its finalizers let it go."""

    namespace: str
    name: str
    uid: str
    generation: int
    status: Mapping[str, Any]
    finalizers: Sequence[str]


class Seen:
    """Every WorkerPool, and the Deployments and pods that carry the operator's label."""

    def __init__(self) -> None:
        self.pools: Cache[Pool | Refused | Leaving] = Cache(worker_pool)
        self.deployments: Cache[LiveDeployment] = Cache(deployment)
        self.pods: Cache[LivePod | TurnedAway] = Cache(pod)
        self.autoscalers: Cache[LiveAutoscaler] = Cache(autoscaler)
        self.complete = False
        """Whether everything that existed at the start is in."""
        self._forbidden: set[str] = set()

    async def relist(self, api: Api, namespaces: Sequence[str]) -> None:
        """List everything: a watch tells neither when its first listing is complete nor what was deleted while it was away."""
        for namespace in namespaces or (None,):
            try:
                await _list(api, self.pools, namespace, path_to(API_VERSION, namespace, PLURAL))
            except ApiError as error:
                # A namespace that was deleted took the operator's rights in it along. Where only other kinds may not be seen,
                # that is an error: they would count as not there.
                if namespace is None or error.status != HTTPStatus.FORBIDDEN:
                    raise
                if namespace not in self._forbidden:
                    logger.warning("namespace %s is not served: %s", namespace, error)
                self._forbidden.add(namespace)
            else:
                self._forbidden.discard(namespace)
                await self._relist_workers(api, namespace)
        self.complete = True

    async def _relist_workers(self, api: Api, namespace: str | None) -> None:
        await _list(api, self.deployments, namespace, path_to("apps/v1", namespace, "deployments"), labelSelector=SELECTOR)
        await _list(api, self.autoscalers, namespace, path_to("autoscaling/v2", namespace, AUTOSCALERS))
        await _list(api, self.pods, namespace, path_to("v1", namespace, "pods"), labelSelector=SELECTOR)


async def _list(api: Api, cache: Cache[Any], namespace: str | None, path: str, **query: str) -> None:
    """Page by page: thousands of pods at once would hold up everything else, the renewal of the lease among it."""
    listed: set[Key] = set()
    query["limit"] = str(PAGE)
    while True:
        page = await api.get(path, **query)
        cache.relist(namespace, page, listed)
        if not (more := page["metadata"].get("continue")):
            return
        query["continue"] = more


def autoscaler(raw: Mapping[str, Any], _before: LiveAutoscaler | None = None) -> LiveAutoscaler | None:
    """Parse a HorizontalPodAutoscaler; None for one that scales no Deployment."""
    metadata, target = raw["metadata"], raw["spec"]["scaleTargetRef"]
    if target["kind"] != "Deployment" or "deletionTimestamp" in metadata:
        return None
    maker = _controller(metadata)
    made = f" of {maker[0]} {maker[1]}" if maker else ""
    return LiveAutoscaler(target["name"], f"HorizontalPodAutoscaler {metadata['name']}{made}")


def worker_pool(raw: Mapping[str, Any], before: Pool | Refused | Leaving | None = None) -> Pool | Refused | Leaving | None:
    """Parse a WorkerPool; None for one that is as good as gone. One that makes the parser fail is refused, and harms no other."""
    metadata, status = raw["metadata"], raw.get("status") or {}
    namespace, name, uid, generation = (metadata[field] for field in ("namespace", "name", "uid", "generation"))
    if "deletionTimestamp" in metadata:
        held_by = metadata.get("finalizers")
        return Leaving(namespace, name, uid, generation, status, held_by) if held_by else None
    try:
        spec = parse_spec(raw.get("spec"))
        unknown = () if isinstance(spec, list) else unknown_to_the_api_server(raw["spec"], spec)
    except Exception as error:
        if not isinstance(before, Refused):
            logger.exception("%s/%s: the parser failed", namespace, name)
        spec, unknown = [Problem(field="spec", message=f"the operator cannot read it: {error!r}")], ()
    if isinstance(spec, list):
        return Refused(namespace, name, uid, generation, status, spec)
    return Pool(namespace, name, uid, generation, _seconds(metadata["creationTimestamp"]), spec, status, unknown)


def deployment(raw: Mapping[str, Any], _before: LiveDeployment | None = None) -> LiveDeployment:
    """Parse a Deployment."""
    metadata, spec = raw["metadata"], raw["spec"]
    return LiveDeployment(
        uid=metadata.get("uid", ""),
        replicas=int(spec.get("replicas", 1)),
        labels=metadata.get("labels") or {},
        owner=_controller(metadata),
        deleting="deletionTimestamp" in metadata,
        fingerprint=_fingerprint(metadata, spec),
        replicas_in_template=_owns_replicas(metadata, TEMPLATE_MANAGER),
        failure=next(
            (c.get("message", c["type"]) for c in _conditions(raw) if c["type"] == "ReplicaFailure" and c["status"] == "True"), ""
        ),
        tier=tier_of(raw),
        rolling=_rolling(raw.get("status") or {}),
        broker_mark=_annotations(spec.get("template", {})).get(BROKER_MARK, ""),
        editor=_editor(metadata),
    )


def _rolling(status: Mapping[str, Any]) -> bool:
    return bool(status.get("updatedReplicas", 0) != status.get("replicas", 0))


def pod(raw: Mapping[str, Any], before: LivePod | TurnedAway | None = None) -> LivePod | TurnedAway | None:
    """Parse a pod; None for one that has worked and ended, because its ReplicaSet has replaced it."""
    metadata, status = raw["metadata"], raw.get("status") or {}
    ordered_at, taken_in = _seconds(metadata["creationTimestamp"]), bool(_containers(status))
    if status.get("phase") in {"Succeeded", "Failed"}:
        why = ": ".join(filter(None, (status.get("reason"), status.get("message"))))
        # The kubelet's first word on the pod; it may have waited for its node since long before.
        refused_at = _seconds(status.get("startTime") or metadata["creationTimestamp"])
        return TurnedAway(refused_at, why) if why and not taken_in and "deletionTimestamp" not in metadata else None
    ready = _condition(raw, "Ready")
    since = ready.get("lastTransitionTime")
    ready_at = _seconds(since) if since and ready["status"] == "True" else _was_ready(raw)
    witnessed = isinstance(before, LivePod)
    if isinstance(before, LivePod) and before.replica.ready_at is not None:
        # A pod that was un-Ready for a while still took as long to start as it took the first time.
        ready_at, witnessed = before.replica.ready_at, before.replica.witnessed
    phase, detail = _phase(raw)
    if phase is Phase.STARTING and ready_at is None and (crash := next(filter(None, map(_crash, _containers(status))), "")):
        phase, detail = Phase.FAILING, crash
    replica = Replica(metadata["name"], phase, ordered_at, ready_at, detail, witnessed)
    return LivePod(replica, _annotations(raw).get(DELETION_COST, ""), taken_in)


def _was_ready(raw: Mapping[str, Any]) -> float | None:
    """When the worker of a pod that is not Ready began to run, if it has been Ready since; None where nothing says so.

    The condition keeps the time of its last change: at the first start it is False from before the container runs.
    """
    ready = _condition(raw, "Ready")
    worker = next((c for c in _containers(raw.get("status") or {}) if c["name"] == WORKER_CONTAINER), {})
    began = ((worker.get("state") or {}).get("running") or {}).get("startedAt")
    if not began or ready.get("status") != "False" or not ready.get("lastTransitionTime"):
        return None
    return _seconds(began) if _seconds(ready["lastTransitionTime"]) > _seconds(began) else None


DELETION_COST = "controller.kubernetes.io/pod-deletion-cost"
"""Of pods that are equally ready, the one with the lower cost is removed first."""


_NO_NODE = {"Unschedulable", "SchedulingGated"}
"""Why the scheduler does not place a pod: no node takes it, or something (a quota, as of Kueue) has not let it go yet."""


def _phase(raw: Mapping[str, Any]) -> tuple[Phase, str]:
    if "deletionTimestamp" in raw["metadata"]:
        return Phase.STOPPING, "it has been told to stop"
    scheduled = _condition(raw, "PodScheduled")
    if scheduled.get("status") == "False" and scheduled.get("reason") in _NO_NODE:
        return Phase.UNSCHEDULABLE, scheduled.get("message", "no node can take it")
    if _condition(raw, "Ready").get("status") == "True":
        return Phase.READY, ""
    if trouble := next(filter(None, map(_trouble, _containers(raw.get("status") or {}))), ""):
        return Phase.FAILING, trouble
    return Phase.STARTING, ""


def _containers(status: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return [*(status.get("initContainerStatuses") or ()), *(status.get("containerStatuses") or ())]


_NORMAL_WAITS = {"ContainerCreating", "PodInitializing"}


def _trouble(container: Mapping[str, Any]) -> str:
    """Why a container does not run, empty when it does or soon will."""
    state = container.get("state") or {}
    waiting, over = state.get("waiting") or {}, state.get("terminated") or {}
    if waiting.get("reason", "ContainerCreating") not in _NORMAL_WAITS:
        return ": ".join(filter(None, (f"container {container['name']}", waiting["reason"], waiting.get("message"))))
    return _exit(container, over)


def _crash(container: Mapping[str, Any]) -> str:
    """Why a container that runs had to be started again, empty where it had not."""
    runs = "running" in (container.get("state") or {})
    return _exit(container, (container.get("lastState") or {}).get("terminated") or {}) if runs else ""


def _exit(container: Mapping[str, Any], over: Mapping[str, Any]) -> str:
    if not over.get("exitCode"):
        return ""
    return f"container {container['name']}: exited with code {over['exitCode']} ({over.get('reason', 'Error')})"


def _conditions(raw: Mapping[str, Any]) -> Iterable[Mapping[str, Any]]:
    return (raw.get("status") or {}).get("conditions") or ()


def _condition(raw: Mapping[str, Any], kind: str) -> Mapping[str, Any]:
    return next((c for c in _conditions(raw) if c["type"] == kind), {})


def _annotations(raw: Mapping[str, Any]) -> Mapping[str, str]:
    return (raw.get("metadata") or {}).get("annotations") or {}


def _controller(metadata: Mapping[str, Any]) -> tuple[str, str, str] | None:
    owners = metadata.get("ownerReferences") or ()
    return next(((o["kind"], o["name"], o["uid"]) for o in owners if o.get("controller")), None)


def _owns_replicas(metadata: Mapping[str, Any], manager: str) -> bool:
    return any(
        entry.get("manager") == manager
        and entry.get("operation") == "Apply"
        and "f:replicas" in (entry.get("fieldsV1") or {}).get("f:spec", {})
        for entry in metadata.get("managedFields") or ()
    )


def _editor(metadata: Mapping[str, Any]) -> str:
    ours = (TEMPLATE_MANAGER, SCALE_MANAGER)
    others = [e for e in metadata.get("managedFields") or () if e.get("manager") not in ours and not e.get("subresource")]
    return max(others, key=lambda entry: entry.get("time", ""))["manager"] if others else ""


def _fingerprint(metadata: Mapping[str, Any], spec: Mapping[str, Any]) -> str:
    annotation = (metadata.get("annotations") or {}).get(ACCELERATOR)
    rest = {k: v for k, v in spec.items() if k != "replicas"}
    ours = [metadata.get("labels"), metadata.get("ownerReferences"), annotation, rest]
    return hashlib.sha256(json.dumps(ours, sort_keys=True).encode()).hexdigest()


def _key(raw: Mapping[str, Any]) -> Key:
    return raw["metadata"]["namespace"], raw["metadata"]["name"]


def _group(raw: Mapping[str, Any]) -> Group:
    labels = raw["metadata"].get("labels") or {}
    return raw["metadata"]["namespace"], labels.get(POOL_LABEL, ""), labels.get(TIER_LABEL, "")


def _version(raw: Mapping[str, Any]) -> int:
    return int(raw["metadata"]["resourceVersion"])


def _seconds(timestamp: str) -> float:
    return datetime.fromisoformat(timestamp).timestamp()

"""The Deployment that runs one tier, as a pure function of the WorkerPool.

It has no replica count, which belongs to another field manager. Nothing measured goes into the pod template, because every change
of it replaces all workers of the tier.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

from workerpool_operator.model import API_VERSION, KIND, PROBES_VOLUME, WORKER_CONTAINER, Accelerator, Replicas, Tier
from workerpool_operator.ports import Pool
from workerpool_operator.worker_command import DEFAULT_GRACE_SECONDS, GRACE, command, environment, literal, probe
from workerpool_routing import wire

MANAGED_BY = "app.kubernetes.io/managed-by"
MANAGER = "celery-workerpool"
POOL_LABEL = "workerpool.dev/pool"
TIER_LABEL = "workerpool.dev/tier"

ACCELERATOR = "workerpool.dev/accelerator"
"""An annotation of the Deployment: the resource that its tier's accelerator is."""

BROKER_MARK = "workerpool.dev/broker-mark"
"""An annotation of the pods that changes with the broker's URL, so that a new password replaces every worker."""

_PROBES_MOUNT = "/run/workerpool"

_LONGEST_LABEL = 63


def name_of(pool: Pool, tier: Tier) -> str:
    """The name of the tier's Deployment."""
    return _fit(f"{pool.name}-{tier.name}")


def selector_of(pool: Pool, tier: Tier) -> dict[str, str]:
    """The labels by which the Deployment finds its pods, and the operator both; they never change."""
    return {MANAGED_BY: MANAGER, POOL_LABEL: _fit(pool.name), TIER_LABEL: tier.name}


def build(pool: Pool, tier: Tier, broker_mark: str = "") -> dict[str, Any]:
    """The manifest of the tier's Deployment, without ``replicas``.

    Args:
        pool: the pool.
        tier: one of its tiers.
        broker_mark: the value of :data:`BROKER_MARK`; empty if the URL is in the WorkerPool itself.
    """
    owner = {"apiVersion": API_VERSION, "kind": KIND, "name": pool.name, "uid": pool.uid}
    return {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": {
            "name": name_of(pool, tier),
            "namespace": pool.namespace,
            "labels": {"app.kubernetes.io/name": "celery-worker", **selector_of(pool, tier)},
            **({"annotations": {ACCELERATOR: tier.accelerator.resource}} if tier.accelerator else {}),
            "ownerReferences": [{**owner, "controller": True, "blockOwnerDeletion": True}],
        },
        "spec": {
            "selector": {"matchLabels": selector_of(pool, tier)},
            # Paused by hand it would never end a rollout, and until one has ended nobody is let go.
            "paused": False,
            **({"strategy": _ON_SCARCE_NODES} if tier.accelerated else {}),
            "template": _template(pool, tier, broker_mark),
        },
    }


def tier_of(manifest: Mapping[str, Any]) -> Tier | None:
    """The tier that a Deployment was built for, as far as it matters once it has been removed; None if it was built for none.

    It starts no worker any more, so the template says no more than the grace period.
    """
    spec, annotations = manifest["spec"], manifest["metadata"].get("annotations") or {}
    pods = spec.get("template", {}).get("spec", {})
    variables = [variable for container in pods.get("containers", ()) for variable in container.get("env") or ()]
    told = {variable["name"]: str(variable.get("value", "")).replace("$$", "$") for variable in variables}
    name = spec.get("selector", {}).get("matchLabels", {}).get(TIER_LABEL)
    queue, concurrency = told.get(wire.ENV_QUEUE), told.get(wire.ENV_CONCURRENCY, "")
    if not (name and queue and concurrency.isdigit()):
        return None
    return Tier.model_construct(
        name=name,
        queue=queue,
        accelerator=Accelerator(resource=annotations[ACCELERATOR]) if ACCELERATOR in annotations else None,
        concurrency=int(concurrency),
        replicas=Replicas(max=0),
        template={"spec": {GRACE: pods[GRACE]} if GRACE in pods else {}},
    )


# A rollout must not need an extra accelerator, so an old worker stops before a new one starts.
_ON_SCARCE_NODES = {"type": "RollingUpdate", "rollingUpdate": {"maxSurge": 0, "maxUnavailable": "25%"}}


def _template(pool: Pool, tier: Tier, broker_mark: str) -> dict[str, Any]:
    metadata = tier.template.get("metadata") or {}
    labels = {"app.kubernetes.io/name": "celery-worker", **(metadata.get("labels") or {}), **selector_of(pool, tier)}
    spec = tier.template["spec"]
    containers = [_worker(pool, tier, c) if c.get("name") == WORKER_CONTAINER else c for c in spec["containers"]]
    if broker_mark:
        metadata = {**metadata, "annotations": {**(metadata.get("annotations") or {}), BROKER_MARK: broker_mark}}
    return {
        **tier.template,
        "metadata": {**metadata, "labels": labels},
        "spec": {
            GRACE: DEFAULT_GRACE_SECONDS,
            "topologySpreadConstraints": [_spread(pool, tier)],
            **spec,
            "containers": containers,
            "volumes": [*(spec.get("volumes") or ()), {"name": PROBES_VOLUME, "emptyDir": {"sizeLimit": "1Mi"}}],
        },
    }


def _spread(pool: Pool, tier: Tier) -> dict[str, Any]:
    """Spread the workers, so that a lost node takes few of them along; this never keeps a worker from starting."""
    return {
        "maxSkew": 1,
        "topologyKey": "kubernetes.io/hostname",
        "whenUnsatisfiable": "ScheduleAnyway",
        "labelSelector": {"matchLabels": selector_of(pool, tier)},
    }


def _worker(pool: Pool, tier: Tier, container: Mapping[str, Any]) -> dict[str, Any]:
    own = _environment(pool, tier)
    names = {variable["name"] for variable in own}
    theirs = [variable for variable in container.get("env") or [] if variable.get("name") not in names]
    rest = {key: value for key, value in container.items() if key != "args"}
    worker = {
        **_PROBES,
        **rest,
        "command": command(pool.spec.app, tier),
        "env": [*own, *theirs],
        "volumeMounts": [*(rest.get("volumeMounts") or ()), {"name": PROBES_VOLUME, "mountPath": _PROBES_MOUNT}],
    }
    if tier.accelerator is not None:
        resources = container.get("resources") or {}
        device = {tier.accelerator.resource: str(tier.accelerator.count)}
        worker["resources"] = {
            **resources,
            "limits": {**(resources.get("limits") or {}), **device},
            "requests": {**(resources.get("requests") or {}), **device},
        }
    return worker


def _probe(which: str, **more: int) -> dict[str, Any]:
    return {"exec": {"command": probe(which, _PROBES_DIRECTORY)}, "timeoutSeconds": 10, **more}


_PROBES_DIRECTORY = f"{_PROBES_MOUNT}/probes"  # only the library creates it, so it exists only if the app has the library
_PROBES = {
    # A container that is restarted finds the files of the one before; they say nothing until it has written its own.
    "startupProbe": _probe("alive", periodSeconds=5, failureThreshold=240),
    "livenessProbe": _probe("alive", periodSeconds=10, failureThreshold=3),
    "readinessProbe": _probe("up", periodSeconds=5, failureThreshold=1),
}


def _environment(pool: Pool, tier: Tier) -> list[dict[str, Any]]:
    broker = pool.spec.broker
    url: dict[str, Any] = {"value": literal(broker.url or "")}
    if broker.url_from is not None:
        url = {"valueFrom": {"secretKeyRef": broker.url_from.secret_key_ref.model_dump()}}
    return [
        *({"name": name, "value": value} for name, value in environment(pool, tier).items()),
        {"name": wire.ENV_WORKER, "valueFrom": {"fieldRef": {"fieldPath": "metadata.name"}}},
        {"name": wire.ENV_BROKER_URL, **url},
        {"name": wire.ENV_PROBES, "value": _PROBES_DIRECTORY},
    ]


def _fit(text: str) -> str:
    """The text itself, or its beginning and a hash if it is too long for the value of a label."""
    if len(text) <= _LONGEST_LABEL:
        return text
    digest = hashlib.sha256(text.encode()).hexdigest()[:8]
    return f"{text[: _LONGEST_LABEL - 9].rstrip('-.')}-{digest}"

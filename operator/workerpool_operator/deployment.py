"""The Deployment that runs one tier: a pure function of the WorkerPool.

The replica count is left out, because it belongs to another field manager. Nothing measured goes in: each change of the pod
template replaces every worker of the tier.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

from workerpool_operator.model import API_VERSION, KIND, WORKER_CONTAINER, Tier
from workerpool_operator.ports import Pool
from workerpool_operator.worker_command import DEFAULT_GRACE_SECONDS, command, environment, literal
from workerpool_routing import wire

MANAGED_BY = "app.kubernetes.io/managed-by"
MANAGER = "celery-workerpool"
POOL_LABEL = "workerpool.dev/pool"
TIER_LABEL = "workerpool.dev/tier"

_LONGEST_LABEL = 63


def name_of(pool: Pool, tier: Tier) -> str:
    """The name of the tier's Deployment."""
    return _fit(f"{pool.name}-{tier.name}")


def selector_of(pool: Pool, tier: Tier) -> dict[str, str]:
    """The labels by which the Deployment and its pods are found; they never change."""
    return {MANAGED_BY: MANAGER, POOL_LABEL: _fit(pool.name), TIER_LABEL: tier.name}


def build(pool: Pool, tier: Tier) -> dict[str, Any]:
    """The manifest of the tier's Deployment, without ``replicas``."""
    owner = {"apiVersion": API_VERSION, "kind": KIND, "name": pool.name, "uid": pool.uid}
    return {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": {
            "name": name_of(pool, tier),
            "namespace": pool.namespace,
            "labels": {"app.kubernetes.io/name": "celery-worker", **selector_of(pool, tier)},
            "ownerReferences": [{**owner, "controller": True, "blockOwnerDeletion": True}],
        },
        "spec": {"selector": {"matchLabels": selector_of(pool, tier)}, "template": _template(pool, tier)},
    }


def _template(pool: Pool, tier: Tier) -> dict[str, Any]:
    metadata = tier.template.get("metadata") or {}
    labels = {"app.kubernetes.io/name": "celery-worker", **(metadata.get("labels") or {}), **selector_of(pool, tier)}
    spec = tier.template["spec"]
    containers = [_worker(pool, tier, c) if c.get("name") == WORKER_CONTAINER else c for c in spec["containers"]]
    return {
        **tier.template,
        "metadata": {**metadata, "labels": labels},
        "spec": {"terminationGracePeriodSeconds": DEFAULT_GRACE_SECONDS, **spec, "containers": containers},
    }


def _worker(pool: Pool, tier: Tier, container: Mapping[str, Any]) -> dict[str, Any]:
    own = _environment(pool, tier)
    names = {variable["name"] for variable in own}
    theirs = [variable for variable in container.get("env") or [] if variable.get("name") not in names]
    rest = {key: value for key, value in container.items() if key != "args"}
    worker = {**rest, "command": command(pool.spec.app, tier), "env": [*own, *theirs]}
    if tier.accelerator is not None:
        resources = container.get("resources") or {}
        device = {tier.accelerator.resource: str(tier.accelerator.count)}
        worker["resources"] = {
            **resources,
            "limits": {**(resources.get("limits") or {}), **device},
            "requests": {**(resources.get("requests") or {}), **device},
        }
    return worker


def _environment(pool: Pool, tier: Tier) -> list[dict[str, Any]]:
    broker = pool.spec.broker
    url: dict[str, Any] = {"value": literal(broker.url or "")}
    if broker.url_from is not None:
        url = {"valueFrom": {"secretKeyRef": broker.url_from.secret_key_ref.model_dump()}}
    return [
        *({"name": name, "value": value} for name, value in environment(pool, tier).items()),
        {"name": wire.ENV_WORKER, "valueFrom": {"fieldRef": {"fieldPath": "metadata.name"}}},
        {"name": wire.ENV_BROKER_URL, **url},
    ]


def _fit(text: str) -> str:
    """The text itself, or its beginning and a hash where it is longer than a label's value may be."""
    if len(text) <= _LONGEST_LABEL:
        return text
    digest = hashlib.sha256(text.encode()).hexdigest()[:8]
    return f"{text[: _LONGEST_LABEL - 9].rstrip('-.')}-{digest}"

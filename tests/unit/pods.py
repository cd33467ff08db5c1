"""Pods as the API server tells of them."""

from __future__ import annotations

from typing import Any

Object = dict[str, Any]


def raw_pod(name: str = "media-gpu-1", version: int = 1, tier: str = "gpu", **status: Any) -> Object:
    metadata = {
        "namespace": "ml",
        "name": name,
        "resourceVersion": str(version),
        "creationTimestamp": "2026-01-01T00:00:00Z",
        "labels": {"workerpool.dev/pool": "media", "workerpool.dev/tier": tier},
    }
    return {"metadata": metadata, "status": status}


def container(name: str = "worker", **state: Any) -> Object:
    return {"name": name, "state": state}

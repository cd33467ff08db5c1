"""Every request that the operator makes, next to every right that the chart gives it: none is refused, none is left over."""

from __future__ import annotations

import re
import signal
from pathlib import Path
from typing import Any

import pytest
import yaml
from helm_python import Chart
from tests.api.kubectl import Kubectl
from tests.api.operators import Namespace, Operator, log_in
from tests.api.proxy import Request, proxy

from workerpool_operator.local.guardian import Guardian
from workerpool_operator.local.redis_server import RedisServer

pytestmark = pytest.mark.api

CHART = Path(__file__).parents[2] / "charts" / "celery-workerpool"
NAME = "celery-workerpool"

UNSEEN = {
    # Applying what is not there yet asks for both rights, in one PATCH.
    ("create", "deployments"),
    # Asked for where the admission plugin OwnerReferencesPermissionEnforcement is on.
    ("update", "workerpools/finalizers"),
}

Right = tuple[str, str]
"""A verb, and a resource with its subresource."""


def account(namespace: str) -> list[dict[str, Any]]:
    """What the chart makes of the operator's service account and its rights."""
    values = {"watchNamespaces": [namespace], "brokerSecrets": ["redis"]}
    with Chart.load(CHART) as loaded:
        rendered = loaded.render(values, name=NAME, namespace=namespace)
    texts = [text for path, text in rendered.items() if path.endswith(".yaml")]
    documents = [document for text in texts for document in yaml.safe_load_all(text) if document]
    return [document for document in documents if document["kind"] in {"ServiceAccount", "Role", "RoleBinding"}]


def granted(documents: list[dict[str, Any]]) -> set[Right]:
    rules = [rule for document in documents if document["kind"] == "Role" for rule in document["rules"]]
    return {(verb, resource) for rule in rules for resource in rule["resources"] for verb in rule["verbs"]}


def asked(request: Request) -> Right | None:
    """The right that a request needs; None for discovery, which is everybody's."""
    found = re.fullmatch(r"/(?:api|apis/[^/]+)/v\w+/namespaces/[^/]+/(\w+)(?:/([^/]+))?(?:/(\w+))?", request.path)
    if found is None:
        return None
    resource, name, subresource = found.groups()
    read = "watch" if request.watches else "get" if name else "list"
    verb = {"GET": read, "POST": "create", "PATCH": "patch", "DELETE": "delete"}[request.method]
    return verb, f"{resource}/{subresource}" if subresource else resource


def test_every_right_is_used_and_nothing_is_refused(
    namespace: str, kubeconfig: Path, kubectl: Kubectl, guardian: Guardian, redis_server: RedisServer, tmp_path: Path
) -> None:
    documents = account(namespace)
    applied = kubectl("apply", "--server-side", "-f", "-", stdin=yaml.safe_dump_all(documents))
    assert applied.returncode == 0, applied.stderr
    direct = tmp_path / "kubeconfig"
    log_in(kubeconfig, direct, kubectl, namespace, NAME)
    with proxy(direct, tmp_path / "through-proxy") as between:
        options = f"--namespace={namespace}", f"--lease-namespace={namespace}"
        leader = Operator(tmp_path / "through-proxy", guardian, *options)
        try:
            ml = Namespace(namespace, kubectl, leader, redis_server.url)
            ml.eventually(leader.leads)
            standby = Operator(tmp_path / "through-proxy", guardian, *options)
            try:
                ml.eventually(standby.stands_by)
                live_through_everything(ml)
            finally:
                standby.end(signal.SIGKILL)
            used = {right for request in between.requests if (right := asked(request))}
            assert used == granted(documents) - UNSEEN
            assert "forbidden" not in leader.log()
        finally:
            leader.end(signal.SIGTERM)


def live_through_everything(ml: Namespace) -> None:
    """A pool by a Secret, scaled up and down again, with a tier taken out of it."""
    ml.kubectl("create", "secret", "generic", "redis", f"--from-literal=url={ml.redis_url}")
    ml.create_pool(broker={"urlFrom": {"secretKeyRef": {"name": "redis", "key": "url"}}})
    ml.settled()
    ml.kubectl(
        "patch", "wp", "media", "--type=json", "--patch", '[{"op": "replace", "path": "/spec/tiers/1/replicas/min", "value": 2}]'
    )
    ml.settled({"media-gpu": 0, "media-cpu": 2})
    ml.eventually(lambda: len(ml.objects("pods")) == 2)
    ml.kubectl(
        "patch", "wp", "media", "--type=json", "--patch", '[{"op": "replace", "path": "/spec/tiers/1/replicas/min", "value": 0}]'
    )
    ml.settled({"media-gpu": 0, "media-cpu": 0})
    ml.kubectl("patch", "wp", "media", "--type=json", "--patch", '[{"op": "remove", "path": "/spec/tiers/0"}]')
    ml.eventually(lambda: ml.replicas() == {"media-cpu": 0})

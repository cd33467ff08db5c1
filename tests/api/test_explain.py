"""`workerpool explain` against a real API server, with the rights of the operator's own account; and advice without deeds."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from redis import Redis
from tests.api.operators import Namespace

pytestmark = pytest.mark.api

WORKERPOOL = str(Path(sys.executable).with_name("workerpool"))


def explain(ml: Namespace, *arguments: str) -> subprocess.CompletedProcess[str]:
    """As in the operator's pod, on a screen on which no sentence breaks."""
    environment = {**os.environ, "KUBECONFIG": str(ml.operator.kubeconfig), "COLUMNS": "600"}
    command = [WORKERPOOL, "explain", *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)


def sentences(ml: Namespace) -> list[str]:
    """Of the tiers, and of the conditions that want attention, as the status has them now."""
    status = ml.get("workerpool", "media")["status"]
    wanted = {"Ready": "False", "BrokerReachable": "False", "CapacityAvailable": "False"}
    conditions = [c["message"] for c in status["conditions"] if c["status"] == wanted.get(c["type"], "True")]
    return [*(f"{tier['reason']}  {tier['message']}" for tier in status["tiers"]), *conditions]


def test_the_sentences_of_the_status_and_the_answer_of_admission_are_one_screen(ml: Namespace) -> None:
    ml.kubectl("create", "secret", "generic", "redis", f"--from-literal=url={ml.redis_url}")
    ml.create_pool(broker={"urlFrom": {"secretKeyRef": {"name": "redis", "key": "url"}}})
    ml.publish("gpu", 20)
    ml.settled({"media-gpu": 8, "media-cpu": 1})

    def told() -> str:
        before = sentences(ml)
        said = explain(ml, f"{ml.name}/media")
        assert (said.returncode, said.stderr) == (0, "")
        return said.stdout if before == sentences(ml) and all(sentence in said.stdout for sentence in before) else ""

    said = ml.eventually(told, 120)
    assert any("replicas.max limits it" in sentence for sentence in sentences(ml)), "something to be told"
    assert said.splitlines()[0].split() == [f"{ml.name}/media", "Active"]
    # Its pods never come up: every worker that may be had is ordered, and no more can be.
    assert "asks for an accelerator" in said
    assert "NotRequested" in said
    assert "no operator" not in said

    away = explain(ml, f"{ml.name}/media", "--broker-url", "redis://127.0.0.1:1/0").stdout
    assert "Redis at 127.0.0.1:1 cannot be reached" in away
    assert "replicas.max limits it" in away, "what the status says does not need Redis"


def test_a_pool_that_is_not_there_is_named(ml: Namespace) -> None:
    for given, meant in ((f"{ml.name}/nobody", f"{ml.name}/nobody"), ("nobody", "default/nobody")):
        said = explain(ml, given)
        assert (said.returncode, said.stdout) == (2, "")
        assert f"has no WorkerPool {meant}; kubectl get wp -A lists those that it has" in said.stderr


def test_advice_is_the_sentence_of_the_deed_and_nothing_is_written(ml: Namespace) -> None:
    ml.create_pool(mode="Advisory")
    ml.publish("gpu", 3)
    ml.eventually(lambda: ml.get("workerpool", "media").get("status", {}).get("waiting") == 3)
    advised = ml.get("workerpool", "media")["status"]["tiers"][0]["message"]
    assert advised.startswith("advice only: 3 waiting + 0 in flight need 3 workers ")
    assert (ml.condition("Paused")["status"], ml.condition("Paused")["reason"]) == ("True", "Advisory")
    said = explain(ml, f"{ml.name}/media").stdout
    assert advised in said
    assert "mode: Advisory: decides and reports, touches nothing" in said
    assert ml.replicas() == {}
    with Redis.from_url(ml.redis_url) as client:
        assert client.keys(f"*workerpool:{ml.name}/media:*") == []

    ml.kubectl("patch", "wp", "media", "--type=merge", "--patch", '{"spec": {"mode": "Active"}}')
    ml.settled({"media-gpu": 3, "media-cpu": 1})
    done = advised.removeprefix("advice only: ")
    ml.eventually(lambda: f"gpu: 0 → 3: {done}" in ml.kubectl("get", "events", "-o", "jsonpath={.items[*].message}"))


def test_a_paused_pool_says_that_it_decides_nothing(ml: Namespace) -> None:
    ml.create_pool(mode="Paused")
    ml.eventually(lambda: ml.condition("Paused")["reason"] == "Paused" if ml.condition("Paused")["status"] else False)
    said = explain(ml, f"{ml.name}/media").stdout
    assert "mode: Paused: touches nothing" in said
    assert "mode: Paused: nothing is decided, the count is what was seen" in said
    assert ml.replicas() == {}

"""What a template means on one machine, and what a worker died of."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from workerpool_operator.local.launch import expand, launch, unsupported
from workerpool_operator.local.process import last_words
from workerpool_operator.model import WorkerPoolSpec
from workerpool_operator.ports import Pool

pytestmark = pytest.mark.unit


def pool_with(worker: dict[str, Any], broker: dict[str, Any] | None = None, **pod: Any) -> Pool:
    template = {"spec": {"containers": [{"name": "sidecar"}, {"name": "worker", **worker}], **pod}}
    spec = WorkerPoolSpec.model_validate(
        {
            "app": "media.tasks",
            "broker": broker or {"url": "redis://127.0.0.1:1/0"},
            "tiers": [{"name": "cpu", "queue": "a$(HOME)b", "concurrency": 3, "template": template}],
        }
    )
    return Pool("ml", "media", "u", 1, 0.0, spec)


def test_a_worker_gets_celery_with_the_tiers_queue_and_the_templates_args() -> None:
    pool = pool_with({"args": ["--max-tasks-per-child", "5", "--hostname=$(WORKERPOOL_TIER)"]})
    started = launch(pool, pool.spec.tiers[0], "media-cpu-x7k2p")
    assert started.command[:3] == (sys.executable, "-m", "celery")
    assert " ".join(started.command[3:]) == (
        "-A media.tasks worker -Q a$(HOME)b -c 3 -n celery@media-cpu-x7k2p --without-gossip --without-mingle -l INFO"
        " --max-tasks-per-child 5 --hostname=cpu"
    )
    assert {name: value for name, value in started.environment.items() if name.startswith(("WORKERPOOL_", "CELERY_"))} == {
        "WORKERPOOL_POOL": "ml/media",
        "WORKERPOOL_TIER": "cpu",
        "WORKERPOOL_WORKER": "media-cpu-x7k2p",
        "WORKERPOOL_QUEUE": "a$(HOME)b",
        "WORKERPOOL_CONCURRENCY": "3",
        "WORKERPOOL_GRACE_SECONDS": "600",
        "CELERY_BROKER_URL": "redis://127.0.0.1:1/0",
    }


def test_a_command_of_the_users_own_is_kept() -> None:
    pool = pool_with({"command": ["./start", "$(WORKERPOOL_QUEUE)"], "args": ["--fast"]})
    assert launch(pool, pool.spec.tiers[0], "w").command == ("./start", "a$(HOME)b", "--fast")


def test_the_current_directory_is_importable_also_from_the_templates_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", "/elsewhere")
    pool = pool_with({"workingDir": "sub"})
    started = launch(pool, pool.spec.tiers[0], "w")
    assert started.directory == tmp_path / "sub"
    assert started.environment["PYTHONPATH"] == f"{tmp_path}:/elsewhere"


def test_the_grace_period_is_the_templates_or_ten_minutes() -> None:
    pool, patient = pool_with({}), pool_with({}, terminationGracePeriodSeconds=7)
    assert launch(pool, pool.spec.tiers[0], "w").grace_seconds == 600
    assert launch(patient, patient.spec.tiers[0], "w").grace_seconds == 7


def test_a_null_in_the_template_is_the_same_as_a_field_that_is_not_there() -> None:
    nulls = dict.fromkeys(("command", "args", "env", "envFrom", "resources", "workingDir"))
    pool, plain = pool_with(nulls, terminationGracePeriodSeconds=None), pool_with({})
    assert launch(pool, pool.spec.tiers[0], "w") == launch(plain, plain.spec.tiers[0], "w")
    literal = pool_with({"env": [{"name": "A_NAME", "value": "b", "valueFrom": None}]})
    assert unsupported(literal.spec) == []
    assert launch(literal, literal.spec.tiers[0], "w").environment["A_NAME"] == "b"


def test_variables_of_the_template_reach_the_worker_but_not_over_the_pools_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOKEN", "from the shell")
    pool = pool_with(
        {
            "env": [
                {"name": "MODEL", "value": "large"},
                {"name": "PATH_TO_MODEL", "value": "/models/$(MODEL)"},
                {"name": "EMPTY"},
                {"name": "WORKERPOOL_TIER", "value": "mine"},
                {"name": "TOKEN", "valueFrom": {"secretKeyRef": {"name": "s", "key": "k"}}},
            ]
        }
    )
    environment = launch(pool, pool.spec.tiers[0], "w").environment
    assert environment["PATH_TO_MODEL"] == "/models/large"
    assert environment["EMPTY"] == ""
    assert environment["WORKERPOOL_TIER"] == "cpu"
    assert environment["TOKEN"] == "from the shell"


@pytest.mark.parametrize(
    ("text", "meaning"),
    [
        ("$(A)-$(B)", "1-2"),
        ("$(UNKNOWN)", "$(UNKNOWN)"),
        ("$$(A)", "$(A)"),
        ("100$", "100$"),
        ("$A ${A}", "$A ${A}"),
        ("$$$(A)", "$1"),
    ],
)
def test_variables_are_expanded_as_kubernetes_does(text: str, meaning: str) -> None:
    assert expand(text, {"A": "1", "B": "2"}) == meaning


@pytest.mark.parametrize(
    ("worker", "complaint"),
    [
        ({"envFrom": [{"secretRef": {"name": "s"}}]}, "envFrom: needs a cluster; here, name the variables under env"),
        (
            {"env": [{"name": "NOWHERE_SET", "valueFrom": {}}]},
            "env[0].valueFrom: needs a cluster; here, export NOWHERE_SET before you start",
        ),
    ],
)
def test_what_only_a_cluster_can_give_is_named_with_its_field(worker: dict[str, Any], complaint: str) -> None:
    problems = unsupported(pool_with(worker).spec)
    assert [str(problem) for problem in problems] == [f"spec.tiers[0].template.spec.containers[1].{complaint}"]


def test_a_broker_url_in_a_secret_needs_a_cluster() -> None:
    pool = pool_with({}, broker={"urlFrom": {"secretKeyRef": {"name": "redis", "key": "url"}}})
    assert [problem.field for problem in unsupported(pool.spec)] == ["spec.broker.urlFrom"]


@pytest.mark.parametrize(
    ("output", "words"),
    [
        ("Traceback (most recent call last):\n  ...\nImportError: no torch\n", "ImportError: no torch"),
        ("pydantic_core.ValidationError: 1 error\n  For more, read on\n", "pydantic_core.ValidationError: 1 error"),
        ("Error: Invalid value for '-A':\nThe module nope was not found.\n\n", "The module nope was not found."),
        ("  ^^^^\n\n", ""),
        ("", ""),
    ],
)
def test_the_line_that_tells_what_a_worker_died_of_is_found(output: str, words: str) -> None:
    assert last_words(output) == words

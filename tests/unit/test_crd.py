"""Holds the CRD and the operator's models together, field by field.

Both sides are brought to plain JSON Schema and walked in step, so a field, bound or default that one side alone has is a
difference with a path.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from pydantic import TypeAdapter
from pydantic.alias_generators import to_camel

from workerpool_operator import model
from workerpool_operator.status import Status

pytestmark = pytest.mark.unit

Schema = dict[str, Any]

CRD = yaml.safe_load((Path(__file__).parents[2] / "crds" / "workerpool.yaml").read_text())
VERSION = CRD["spec"]["versions"][0]
CRD_SPEC: Schema = VERSION["schema"]["openAPIV3Schema"]["properties"]["spec"]
CRD_STATUS: Schema = VERSION["schema"]["openAPIV3Schema"]["properties"]["status"]

BOUNDS = ("pattern", "minLength", "maxLength", "minimum", "maximum", "minItems", "maxItems", "maxProperties")


def plain(node: Schema, definitions: Schema) -> Schema:
    """Pydantic's schema without references and nulls, its names as on the wire."""
    node = {**definitions.get(node.get("$ref", "").removeprefix("#/$defs/"), {}), **node}
    if "anyOf" in node:
        (value,) = (branch for branch in node.pop("anyOf") if branch != {"type": "null"})
        node = {**plain(value, definitions), **node}
    if node.get("default", ...) is None:
        del node["default"]
    if "properties" in node:
        node["properties"] = {to_camel(name): plain(child, definitions) for name, child in node["properties"].items()}
    for key in ("items", "additionalProperties"):
        if isinstance(node.get(key), dict):
            node[key] = plain(node[key], definitions)
    return node


def pydantic_schema(source: Any) -> Schema:
    schema = TypeAdapter(source).json_schema(by_alias=True)
    return plain(schema, schema.get("$defs", {}))


MODEL_SPEC = pydantic_schema(model.WorkerPoolSpec)
MODEL_STATUS = pydantic_schema(Status)


def nodes(node: Schema, path: str) -> Iterator[tuple[str, Schema]]:
    yield path, node
    for name, child in node.get("properties", {}).items():
        yield from nodes(child, f"{path}.{name}")
    if "items" in node:
        yield from nodes(node["items"], f"{path}[]")
    if isinstance(values := node.get("additionalProperties"), dict):
        yield from nodes(values, f"{path}.*")


OPEN = ("additionalProperties", "x-kubernetes-preserve-unknown-fields")


def is_open(node: Schema) -> bool:
    """Whether fields that the schema does not name are kept, as in the pod template beside what the operator reads."""
    return node.get("additionalProperties") is True or "x-kubernetes-preserve-unknown-fields" in node


def with_defaults(node: Schema, value: Any) -> Any:
    """The value that is stored: the API server fills in the defaults of what a default leaves out."""
    if not isinstance(value, dict):
        return value
    inner = {
        name: with_defaults(child, value.get(name, child.get("default")))
        for name, child in node.get("properties", {}).items()
        if name in value or "default" in child
    }
    return {**value, **inner}


def facts(node: Schema) -> Schema:
    found = {key: node[key] for key in ("type", "enum", *BOUNDS) if key in node}
    if node.get("type") == "object":
        found |= {"required": sorted(node.get("required", [])), "open": is_open(node)}
    if "default" in node:
        found["default"] = with_defaults(node, node["default"])
    return found


def types_only(node: Schema) -> Schema:
    return {"type": node.get("type")}


def differences(ours: Schema, theirs: Schema, path: str, see: Callable[[Schema], Schema] = facts) -> list[str]:
    """Every disagreement between a model and the CRD, as ``path: fact: what each side says``."""
    left = {inner: see(node) for inner, node in nodes(ours, path)}
    right = {inner: see(node) for inner, node in nodes(theirs, path)}
    found = [f"{inner}: only the model has it" for inner in left.keys() - right.keys()]
    found += [f"{inner}: only the CRD has it" for inner in right.keys() - left.keys()]
    for inner in left.keys() & right.keys():
        a, b = left[inner], right[inner]
        found += [
            f"{inner}: {key}: model {a.get(key)!r}, CRD {b.get(key)!r}" for key in a.keys() | b.keys() if a.get(key) != b.get(key)
        ]
    return sorted(found)


def test_spec_and_model_agree_in_every_field_bound_and_default() -> None:
    assert differences(MODEL_SPEC, CRD_SPEC, "spec") == []


def test_status_and_dataclasses_agree_in_every_name_and_type() -> None:
    assert differences(MODEL_STATUS, CRD_STATUS, "status", types_only) == []


def test_names_are_those_of_the_model() -> None:
    spec = CRD["spec"]
    assert (spec["group"], VERSION["name"]) == (model.GROUP, model.VERSION)
    assert (spec["names"]["kind"], spec["names"]["plural"]) == (model.KIND, model.PLURAL)
    assert CRD["metadata"]["name"] == f"{model.PLURAL}.{model.GROUP}"
    template = CRD_SPEC["properties"]["tiers"]["items"]["properties"]["template"]
    assert f"container.name == '{model.WORKER_CONTAINER}'" in template["x-kubernetes-validations"][0]["rule"]


Change = Callable[[dict[str, Schema]], object]

MUTATIONS: dict[str, tuple[Change, str]] = {
    "default": (lambda at: at["spec.tiers[].concurrency"].update(default=2), "spec.tiers[].concurrency: default"),
    "default that is gone": (lambda at: at["spec.mode"].pop("default"), "spec.mode: default"),
    "default within a default": (
        lambda at: at["spec.routing.fallback"].update(default={"onLoss": False}),
        "spec.routing.fallback: default",
    ),
    "falsy default": (lambda at: at["spec.broker.globalKeyPrefix"].pop("default"), "spec.broker.globalKeyPrefix: default"),
    "upper bound": (lambda at: at["spec.tiers[].replicas.max"].update(maximum=999), "spec.tiers[].replicas.max: maximum"),
    "bound that is gone": (lambda at: at["spec.broker.prioritySteps[]"].pop("minimum"), "spec.broker.prioritySteps[]: minimum"),
    "length": (lambda at: at["spec.app"].update(maxLength=254), "spec.app: maxLength"),
    "number of items": (lambda at: at["spec.tiers"].update(maxItems=9), "spec.tiers: maxItems"),
    "pattern": (lambda at: at["spec.tiers[].queue"].update(pattern="^.*$"), "spec.tiers[].queue: pattern"),
    "enum": (lambda at: at["spec.mode"].update(enum=["Active", "Paused"]), "spec.mode: enum"),
    "mixed enum": (lambda at: at["spec.routing.tasks[].accelerated"]["enum"].pop(), "spec.routing.tasks[].accelerated: enum"),
    "type": (lambda at: at["spec.tiers[].accelerator.count"].update(type="string"), "spec.tiers[].accelerator.count: type"),
    "required": (lambda at: at["spec.broker.urlFrom"].pop("required"), "spec.broker.urlFrom: required"),
    "missing field": (lambda at: at["spec.routing.fallback"]["properties"].pop("onLoss"), "spec.routing.fallback.onLoss: only"),
    "type in the pod template": (
        lambda at: at["spec.tiers[].template.spec.containers[].command"].update(type="string"),
        "spec.tiers[].template.spec.containers[].command: type",
    ),
    "bound in the pod template": (
        lambda at: at["spec.tiers[].template.metadata.labels.*"].pop("maxLength"),
        "spec.tiers[].template.metadata.labels.*: maxLength",
    ),
    "open map that is closed": (
        lambda at: [at["spec.tiers[].template.spec"].pop(key, None) for key in OPEN],
        "spec.tiers[].template.spec: open",
    ),
    "new field": (lambda at: at["spec"]["properties"].update(scaling={"type": "object"}), "spec.scaling: only"),
}


@pytest.mark.parametrize("mutated", ["model", "CRD"])
@pytest.mark.parametrize("kind", MUTATIONS)
def test_a_change_of_one_side_alone_is_reported(kind: str, mutated: str) -> None:
    change, report = MUTATIONS[kind]
    sides = {"model": copy.deepcopy(MODEL_SPEC), "CRD": copy.deepcopy(CRD_SPEC)}
    change(dict(nodes(sides[mutated], "spec")))
    found = differences(sides["model"], sides["CRD"], "spec")
    assert any(difference.startswith(report) for difference in found), found


@pytest.mark.parametrize("mutated", ["model", "CRD"])
def test_a_status_field_of_one_side_alone_is_reported(mutated: str) -> None:
    sides = {"model": copy.deepcopy(MODEL_STATUS), "CRD": copy.deepcopy(CRD_STATUS)}
    at = dict(nodes(sides[mutated], "status"))
    del at["status.tiers[]"]["properties"]["spilled"]
    at["status.waiting"]["type"] = "string"
    found = differences(sides["model"], sides["CRD"], "status", types_only)
    assert [difference.split(": ")[0] for difference in found] == ["status.tiers[].spilled", "status.waiting"]


def everything() -> Iterator[tuple[str, Schema]]:
    return nodes(VERSION["schema"]["openAPIV3Schema"], "workerpool")


def test_every_field_is_described() -> None:
    assert [path for path, node in everything() if not node.get("description")] == []


def unbounded(node: Schema) -> bool:
    match node.get("type"):
        case "string":
            return not node.keys() & {"maxLength", "enum"}
        case "array":
            return "maxItems" not in node
        case "object":
            return not node.keys() & {"properties", "maxProperties", "x-kubernetes-preserve-unknown-fields"}
        case "integer":
            return "minimum" not in node
        case _:
            return False


def test_every_string_list_and_number_is_bounded() -> None:
    assert [path for path, node in everything() if unbounded(node)] == []


def test_every_rule_has_a_message_for_the_user() -> None:
    rules = [rule for _, node in everything() for rule in node.get("x-kubernetes-validations", [])]
    assert rules
    assert [rule["rule"] for rule in rules if not rule.get("message")] == []


def test_the_crd_is_a_valid_custom_resource_definition() -> None:
    kubernetes_validate.validate(CRD, kubernetes_validate.latest_version(), strict=True)


def test_validation_notices_a_misspelt_keyword() -> None:
    broken = copy.deepcopy(CRD)
    broken["spec"]["versions"][0]["additionalPrinterColumns"][0]["jsonpath"] = ".status"
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(broken, kubernetes_validate.latest_version(), strict=True)

"""A pool file without an API server: a pool, or what is wrong with the file, never a traceback."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from workerpool_operator.manifest import parse
from workerpool_operator.model import Problem, parse_spec
from workerpool_operator.ports import Pool

pytestmark = pytest.mark.unit

SAMPLE = Path(__file__).parents[2] / "examples" / "media" / "workerpool.yaml"
GOOD: dict[str, Any] = {
    "apiVersion": "workerpool.dev/v1alpha1",
    "kind": "WorkerPool",
    "metadata": {"name": "media", "namespace": "ml"},
    "spec": {
        "app": "media.tasks",
        "broker": {"url": "redis://one"},
        "tiers": [{"name": "cpu", "queue": "celery", "template": {"spec": {"containers": [{"name": "worker"}]}}}],
    },
}


def text(**changes: Any) -> str:
    """The good file with some of its fields changed, or left out where the change is None."""
    return yaml.safe_dump({name: value for name, value in (GOOD | changes).items() if value is not None})


def problems(given_text: str) -> list[str]:
    found = parse(given_text)
    assert isinstance(found, list), found
    return [str(problem) for problem in found]


def test_a_good_file_is_a_pool_with_what_the_api_server_would_add() -> None:
    spec = parse_spec(GOOD["spec"])
    assert not isinstance(spec, list)
    assert parse(text()) == Pool("ml", "media", "ml/media", 1, 0.0, spec)


def test_without_a_namespace_it_is_the_default_one() -> None:
    pool = parse(text(metadata={"name": "media"}))
    assert isinstance(pool, Pool)
    assert pool.id == "default/media"


@pytest.mark.parametrize(("given", "kept"), [({"replicas": "cpu 0/1"}, {"replicas": "cpu 0/1"}), (None, {}), ("Ready", {})])
def test_a_status_is_kept_as_it_stands(given: object, kept: dict[str, str]) -> None:
    pool = parse(text(status=given))
    assert isinstance(pool, Pool)
    assert pool.status == kept


def test_the_sample_is_a_good_file() -> None:
    assert isinstance(parse(SAMPLE.read_text()), Pool)


def test_comments_and_empty_documents_do_not_count() -> None:
    assert isinstance(parse(f"# mine\n---\n---\n{text()}---\n"), Pool)


@pytest.mark.parametrize(
    ("given_text", "expected"),
    [
        pytest.param("", "file: must hold one document, a WorkerPool; it holds 0", id="empty"),
        pytest.param("# later", "file: must hold one document, a WorkerPool; it holds 0", id="only a comment"),
        pytest.param(f"{text()}---\n{text()}", "file: must hold one document, a WorkerPool; it holds 2", id="two documents"),
        pytest.param("[1, 2]", "file: must hold a WorkerPool: a map with apiVersion, kind, metadata and spec", id="a list"),
        pytest.param("media", "file: must hold a WorkerPool: a map with apiVersion, kind, metadata and spec", id="a word"),
        pytest.param("0", "file: must hold a WorkerPool: a map with apiVersion, kind, metadata and spec", id="a number"),
        pytest.param(
            "a: [1,\nb: 2}", "file: is not YAML: expected ',' or ']', but got '}' at line 2, column 5", id="a bracket left open"
        ),
        pytest.param("\x00", "file: is not YAML: special characters are not allowed", id="a binary file"),
        pytest.param("a: 2024-13-45", "file: is not YAML: month must be in 1..12", id="a day that does not exist"),
        pytest.param("a: " + "9" * 5000, "file: is not YAML: Exceeds the limit", id="a number without end"),
        pytest.param("a: !!bool maybe", "file: is not YAML: 'maybe'", id="a boolean that is none"),
        pytest.param("a: !!int ''", "file: is not YAML: string index out of range", id="a number that is none"),
        pytest.param("a: !!timestamp soon", "file: is not YAML: ", id="a time that is none"),
        pytest.param("[" * 1000, "file: is not YAML: ", id="brackets without end"),
        pytest.param("!!python/object/apply:os.getcwd []", "file: is not YAML: could not determine a constructor", id="code"),
        pytest.param(
            text(kind="Deployment"), "kind: must be WorkerPool (given: 'Deployment')", id="another kind"
        ),
        pytest.param(text(kind=None), "kind: must be WorkerPool", id="no kind"),
        pytest.param(
            text(apiVersion="workerpool.dev/v1"),
            "apiVersion: must be workerpool.dev/v1alpha1 (given: 'workerpool.dev/v1')",
            id="another version",
        ),
        pytest.param(text(apiVersion=None), "apiVersion: must be workerpool.dev/v1alpha1", id="no version"),
        pytest.param(text(metadata=None), "metadata.name: must be a name", id="no metadata"),
        pytest.param(text(metadata=["media"]), "metadata.name: must be a name", id="metadata that is a list"),
        pytest.param(text(metadata={"name": "Media"}), "metadata.name: must be a name of lower-case letters", id="capitals"),
        pytest.param(text(metadata={"name": "-media"}), "metadata.name: must be a name", id="first hyphen"),
        pytest.param(text(metadata={"name": "media-"}), "metadata.name: must be a name", id="last hyphen"),
        pytest.param(text(metadata={"name": "media\n"}), "metadata.name: must be a name", id="a line end"),
        pytest.param(text(metadata={"name": "a" * 64}), "metadata.name: must be a name", id="long name"),
        pytest.param(text(metadata={"name": 7}), "metadata.name: must be a name", id="number for a name"),
        pytest.param(text(metadata={"name": "a", "namespace": "m/l"}), "metadata.namespace: must be a name", id="namespace"),
        pytest.param(text(spec=None), "spec: ", id="no spec"),
        pytest.param(text(spec=[1]), "spec: ", id="spec that is a list"),
        pytest.param(text(spec=GOOD["spec"] | {"mode": "Off"}), "spec.mode: ", id="bad field"),
    ],
)  # fmt: skip
def test_a_bad_file_is_told_by_the_field_that_is_wrong(given_text: str, expected: str) -> None:
    (problem,) = problems(given_text)
    assert problem.startswith(expected)
    assert "given: None" not in problem


def test_a_value_that_is_wrong_is_shown() -> None:
    assert problems(text(metadata={"name": "Media"}))[0].endswith("(given: 'Media')")
    assert problems(text(spec=GOOD["spec"] | {"mode": "Off"}))[0].endswith("(given: 'Off')")


def test_what_is_not_there_or_has_no_place_is_not_shown() -> None:
    assert problems(text(kind=None)) == ["kind: must be WorkerPool"]
    assert problems("a: 2024-13-45") == ["file: is not YAML: month must be in 1..12"]


def test_everything_that_is_wrong_is_told_at_once() -> None:
    found = problems(text(apiVersion="v1", kind="Pod", metadata={"name": "X", "namespace": "Y"}, spec={"app": "a"}))
    fields = ["apiVersion", "kind", "metadata.namespace", "metadata.name", "spec.broker", "spec.tiers"]
    assert [problem.partition(":")[0] for problem in found] == fields


def test_names_of_one_and_of_sixty_three_letters_are_names() -> None:
    for name in ("a", "9", "a-b", "a" * 63):
        assert isinstance(parse(text(metadata={"name": name, "namespace": name})), Pool)


def check(outcome: Pool | list[Problem]) -> None:
    assert isinstance(outcome, Pool) or (outcome and all(problem.field and problem.message for problem in outcome))


scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.dates() | st.text(max_size=5)
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(scalars, inner, max_size=3), max_leaves=8
)


@settings(max_examples=60)
@given(st.sampled_from(["apiVersion", "kind", "metadata", "spec"]), values)
def test_no_value_in_any_field_raises(field: str, value: Any) -> None:
    check(parse(yaml.safe_dump(GOOD | {field: value})))


@settings(max_examples=60)
@given(values)
def test_no_document_raises_and_none_but_a_workerpool_is_a_pool(value: Any) -> None:
    assert isinstance(parse(yaml.safe_dump(value)), list)


@settings(max_examples=150)
@given(st.text(st.sampled_from("a:- \n[]{}!&*?|>'\"#%@,0159.xo_\t"), max_size=30))
def test_no_text_raises(anything: str) -> None:
    check(parse(anything))

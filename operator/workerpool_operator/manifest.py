"""A file with a WorkerPool, read without an API server: for ``workerpool check`` and ``workerpool dev``."""

from __future__ import annotations

import re
from typing import Any

import yaml

from workerpool_operator.model import API_VERSION, KIND, Problem, parse_spec
from workerpool_operator.ports import Pool

_UNREADABLE = (yaml.YAMLError, ValueError, LookupError, AttributeError, RecursionError)
"""PyYAML lets more than its own error out: of a date without such a day, of a tag that the value does not fit."""

_NAME = re.compile(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?")


def parse(text: str) -> Pool | list[Problem]:
    """Return the one WorkerPool in a YAML text, or everything that is wrong with it; never raises on user input.

    What an API server would give it is made up: it is of generation 1 and was created at the beginning of time.
    """
    try:
        documents = [document for document in yaml.safe_load_all(text) if document is not None]
    except _UNREADABLE as error:
        mark = getattr(error, "problem_mark", None)
        where = f" at line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        what = getattr(error, "problem", None) or getattr(error, "reason", None) or error
        return [Problem(field="file", message=f"is not YAML: {what}{where}")]
    if len(documents) != 1:
        return [Problem(field="file", message=f"must hold one document, a {KIND}; it holds {len(documents)}")]
    return _pool(documents[0])


def _pool(document: object) -> Pool | list[Problem]:
    if not isinstance(document, dict):
        return [Problem(field="file", message=f"must hold a {KIND}: a map with apiVersion, kind, metadata and spec")]
    problems = [
        Problem(field=field, message=f"must be {expected}", value=_shown(document.get(field)))
        for field, expected in (("apiVersion", API_VERSION), ("kind", KIND))
        if document.get(field) != expected
    ]
    metadata = document.get("metadata") if isinstance(document.get("metadata"), dict) else {}
    namespace, name = _name(metadata, "namespace", "default", problems), _name(metadata, "name", None, problems)
    spec = parse_spec(document.get("spec"))
    if isinstance(spec, list):
        return problems + spec
    if problems:
        return problems
    status = document.get("status")
    return Pool(
        namespace, name, uid=f"{namespace}/{name}", generation=1, created_at=0.0, spec=spec,
        status=status if isinstance(status, dict) else {},
    )  # fmt: skip


def _name(metadata: Any, field: str, default: str | None, problems: list[Problem]) -> str:
    given = metadata.get(field, default)
    if not isinstance(given, str) or not _NAME.fullmatch(given):
        message = "must be a name of lower-case letters, digits and hyphens, at most 63 characters"
        problems.append(Problem(field=f"metadata.{field}", message=message, value=_shown(given)))
    return str(given)


def _shown(value: object) -> str:
    return "" if value is None else repr(value)

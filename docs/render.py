"""Writes ``docs/reference/`` from the docstrings of what users import: ``python -m docs.render``.

With ``--check`` it writes nothing, names what is out of date, and exits 1.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import griffe
from charts.render import arguments, bring, tell
from griffe2md import render_object_docs

from workerpool_routing.decide import Reason, explain

ROOT = Path(__file__).parents[1]
HEADER = "<!-- Generated from the docstrings by docs/render.py: change them there. -->\n\n"

PAGES: Mapping[str, Mapping[str, Sequence[str]]] = {
    "workerpool_routing": {
        "WorkerPool": (
            "submit", "submit_async", "should_accelerate", "workers", "has_accelerated_workers", "queue_length", "job", "status",
        ),
        "Tier": (), "Decision": (), "Reason": (), "Overloaded": (), "PoolUnavailable": (),
    },
    "workerpool_routing.fastapi": {"router": (), "add_exception_handlers": ()},
    "workerpool_routing.testing": {
        "in_memory": (), "workerpool_in_memory": (), "Double": ("set_capacity", "assert_routed"), "Submitted": (),
    },
}  # fmt: skip
"""What is described of each module, and of each class."""


def page(module: griffe.Module, shown: Mapping[str, Sequence[str]]) -> str:
    """The Markdown of one module."""
    parts = [f"# {module.path}\n", _markdown(module, show_if_no_docstring=False, members=[], show_root_heading=False)]
    for name, members in shown.items():
        described: Any = module[name]
        target = described.final_target if described.is_alias else described
        text = _markdown(target, members=list(members) or False, heading_level=2)
        text = re.sub(rf"(#+ `)[\w.]+\.{name}\b", rf"\1{name}", text)
        parts.append(text + (_reasons() if name == "Reason" else ""))
    return HEADER + "\n".join(part.strip() + "\n" for part in parts if part.strip())


def _markdown(described: Any, **config: Any) -> str:
    options = {
        "show_bases": False,
        "show_signature_annotations": True,
        "signature_crossrefs": False,
        "summary": False,
        "members_order": "source",
        "group_by_category": False,
        **config,
    }
    text = render_object_docs(described, options)
    text = re.sub(r"\[(\*\*\w+\*\*|[\w.]+)\]\(#[^)]*\)", r"\1", text)  # links to what is on no page
    text = re.sub(r"<code>(.*?)</code>", r"`\1`", text)
    text = re.sub(r":\w+:`~?([^`]+)`", r"`\1`", text).replace("TierPolicy", "Tier").replace(") -> None\n", ")\n")
    return re.sub(r"(?<!`)``(?!`)", "`", text)


def _reasons() -> str:
    rows = [f"| `{reason}` | {explain(reason, '').removeprefix(': ')} |" for reason in Reason]
    return "\n".join(["| reason | in words |", "|---|---|", *rows]) + "\n"


def main(*, check: bool) -> int:
    """Write or check every page."""
    loader = griffe.GriffeLoader(search_paths=[ROOT / "routing"], docstring_parser="google")
    loader.load("workerpool_routing")
    loader.resolve_aliases()
    stale = []
    for name, shown in PAGES.items():
        module: Any = loader.modules_collection[name]
        stale += bring(ROOT / "docs" / "reference" / f"{name}.md", page(module, shown), check=check)
    return tell(ROOT, stale, check=check)


if __name__ == "__main__":
    sys.exit(main(check=arguments(__doc__).check))

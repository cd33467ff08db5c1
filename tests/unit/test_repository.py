"""What holds for the repository as a whole."""

from __future__ import annotations

import re
import tomllib
from collections import defaultdict
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from tests.levels import LEVELS

pytestmark = pytest.mark.unit

ROOT = Path(__file__).parents[2]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
LOCK = (ROOT / "requirements.lock").read_text()


def direct_requirements() -> list[Requirement]:
    project = PYPROJECT["project"]
    groups = [project["dependencies"], *project["optional-dependencies"].values(), *PYPROJECT["dependency-groups"].values()]
    return [Requirement(line) for group in groups for line in group] + [
        Requirement(r) for r in PYPROJECT["build-system"]["requires"]
    ]


def test_the_operator_directory_is_not_a_package_that_would_shadow_the_standard_library() -> None:
    entries = {path.name for path in (ROOT / "operator").iterdir()}
    assert entries == {"workerpool_operator", "README.md"}


def test_the_lock_holds_every_direct_dependency_at_a_version_that_pyproject_allows() -> None:
    locked = defaultdict(list)
    for name, version in re.findall(r"^([\w.-]+)==(\S+)", LOCK, re.MULTILINE):
        locked[canonicalize_name(name)].append(version)
    unmet = [
        str(wanted)
        for wanted in direct_requirements()
        if not any(wanted.specifier.contains(version) for version in locked[canonicalize_name(wanted.name)])
    ]
    assert unmet == [], "run make lock"


def test_the_lock_names_no_address_and_pins_every_package_by_hash() -> None:
    assert "://" not in LOCK
    assert "--index-url" not in LOCK
    entries = re.split(r"\n(?=[\w-])", LOCK)[1:]
    assert len(entries) > 50
    assert [entry.splitlines()[0] for entry in entries if "--hash=sha256:" not in entry] == []


def test_the_changelog_begins_with_the_version_of_the_package() -> None:
    heading = re.search(r"^## \[?([^\s\]]+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert heading is not None
    assert heading.group(1) == PYPROJECT["project"]["version"]


def test_every_test_file_carries_the_marker_of_its_level() -> None:
    files = list((ROOT / "tests").glob("*/**/test_*.py"))
    levels = {path: path.relative_to(ROOT / "tests").parts[0] for path in files}
    assert set(levels.values()) <= {level.name for level in LEVELS}
    unmarked = [
        p.name for p, level in levels.items() if not re.search(rf"\npytestmark = \[?pytest\.mark\.{level}\b", p.read_text())
    ]
    assert unmarked == []


def test_no_test_file_takes_anything_from_another() -> None:
    taken = {
        path.relative_to(ROOT).as_posix(): [name for name in found if name != path.stem]
        for path in (ROOT / "tests").glob("*/**/*.py")
        if (found := re.findall(r"^from tests\.\w+\.(test_\w+) import", path.read_text(), re.MULTILINE))
    }
    assert {path: names for path, names in taken.items() if names} == {}, "what two of them need has a file of its own"


def test_every_test_file_that_the_documents_name_is_there() -> None:
    documents = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("**/*.md")]
    named = {found for path in documents for found in re.findall(r"\b[a-z0-9]+/test_\w+\.py", path.read_text())}
    assert len(named) > 20
    assert [name for name in sorted(named) if not (ROOT / "tests" / name).exists()] == []


def test_the_markers_of_pytest_are_the_levels_and_what_is_long() -> None:
    names = [marker.partition(":")[0] for marker in PYPROJECT["tool"]["pytest"]["markers"]]
    assert names == [*(level.name for level in LEVELS), "long"]


def test_nothing_is_put_off_by_a_note_in_the_text() -> None:
    # Ruff watches the Python files.
    texts = [
        p
        for kind in ("lua", "md", "toml", "yaml")
        for p in ROOT.glob(f"*/**/*.{kind}")
        if not p.relative_to(ROOT).parts[0].startswith(".")
    ]
    assert len(texts) > 5
    assert [path.name for path in texts if re.search(r"\b(TODO|FIXME)\b", path.read_text())] == []


def workflow_steps() -> list[dict[str, str]]:
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())
    return [step for job in workflow["jobs"].values() for step in job["steps"]]


def test_the_workflow_runs_every_command_of_the_readme() -> None:
    run = "\n".join(_plain(step.get("run", "")) for step in workflow_steps())
    blocks = re.findall(r"^```console\n(.*?)^```", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)
    commands = [line.removeprefix("$ ") for block in blocks for line in _plain(block).splitlines() if line.startswith("$ ")]
    assert len(commands) > 8
    needs_a_worker = [command for command in commands if command.startswith("WORKERPOOL_POOL=")]
    assert [command for command in commands if command not in run] == needs_a_worker


def _plain(shell: str) -> str:
    """Each command on one line, without its comment."""
    joined = re.sub(r"\s*\\\n\s*", " ", shell)
    return re.sub(r"\s+# .*$", "", joined, flags=re.MULTILINE)


def test_the_workflow_may_read_the_code_and_nothing_else_and_its_actions_are_pinned() -> None:
    text = (ROOT / ".github" / "workflows" / "ci.yml").read_text()
    assert re.findall(r"^( *)permissions:\n +(.*)$", text, re.MULTILINE) == [("", "contents: read")]
    used = [step["uses"] for step in workflow_steps() if "uses" in step]
    assert [action for action in used if not re.fullmatch(r"[\w/-]+@[0-9a-f]{40}", action)] == []

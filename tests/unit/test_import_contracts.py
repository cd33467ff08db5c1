"""The import contracts: the packages keep them, and each is broken by the import that it is there to stop."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

pytestmark = pytest.mark.unit

ROOT = Path(__file__).parents[2]
CONTRACTS = {
    c["id"]: c["name"] for c in tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
}

BREAKS = [
    ("pure", "operator/workerpool_operator/scaling.py", "import time"),
    ("pure", "operator/workerpool_operator/model.py", "from kubernetes import client"),
    ("pure", "routing/workerpool_routing/decide.py", "import redis"),
    ("operator-of-library", "operator/workerpool_operator/live.py", "from workerpool_routing import WorkerPool"),
    ("operator-of-library", "operator/workerpool_operator/broker.py", "import workerpool_routing.pool"),
    ("operator-of-library", "operator/workerpool_operator/broker.py", "import workerpool_routing.admission"),
    ("library", "routing/workerpool_routing/worker/__init__.py", "import kopf"),
    ("library", "routing/workerpool_routing/pool.py", "import workerpool_operator.model"),
    ("adapters", "operator/workerpool_operator/kube/__init__.py", "import workerpool_operator.broker"),
    ("adapters", "operator/workerpool_operator/broker.py", "import workerpool_operator.local.redis_server"),
    ("layers", "operator/workerpool_operator/reconcile.py", "import workerpool_operator.kube"),
    ("layers", "operator/workerpool_operator/main.py", "import workerpool_operator.dev"),
    ("layers", "operator/workerpool_operator/without_a_place.py", ""),
]


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    for package in ("operator/workerpool_operator", "routing/workerpool_routing"):
        shutil.copytree(ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path


def broken_contracts(directory: Path) -> set[str]:
    lint = subprocess.run(
        [Path(sys.executable).with_name("lint-imports"), "--no-cache"],
        cwd=directory,
        env={**os.environ, "PYTHONPATH": f"{directory / 'operator'}{os.pathsep}{directory / 'routing'}", "COLUMNS": "200"},
        capture_output=True,
        text=True,
        check=False,
    )
    verdicts = dict(re.findall(r"^(.+) (KEPT|BROKEN)\b", lint.stdout, re.MULTILINE))
    assert verdicts.keys() == set(CONTRACTS.values()), lint.stdout + lint.stderr
    assert (lint.returncode == 0) == ("BROKEN" not in verdicts.values())
    return {contract for contract, name in CONTRACTS.items() if verdicts[name] == "BROKEN"}


def test_the_packages_keep_every_contract(copy: Path) -> None:
    assert broken_contracts(copy) == set()


@pytest.mark.parametrize(("contract", "module", "line"), BREAKS)
def test_a_forbidden_import_breaks_exactly_its_contract(copy: Path, contract: str, module: str, line: str) -> None:
    with (copy / module).open("a") as source:
        source.write(f"\n{line}\n")
    assert broken_contracts(copy) == {contract}


def test_every_contract_is_proven_by_a_break() -> None:
    assert {contract for contract, _, _ in BREAKS} == CONTRACTS.keys()

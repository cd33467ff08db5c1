"""The runner of the levels: what it calls passed, failed and not run."""

from __future__ import annotations

from pathlib import Path

import pytest
from e2e.cluster.binaries import BinariesMissing
from tests import levels
from tests.levels import CannotRun, Level, judge, need_nothing, table

pytestmark = pytest.mark.unit


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(levels, "ROOT", tmp_path)
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = sample\n")
    (tmp_path / "tests" / "sample").mkdir(parents=True)
    return tmp_path


def test_the_counts_are_those_of_pytest(checkout: Path) -> None:
    (checkout / "tests" / "sample" / "test_it.py").write_text(
        "import pytest\n"
        "pytestmark = pytest.mark.sample\n"
        "def test_good(): pass\n"
        "def test_also_good(): pass\n"
        "def test_bad(): raise ValueError\n"
        "@pytest.mark.skip\n"
        "def test_skipped(): pass\n"
    )
    row = Level("sample", need_nothing).run()
    assert (row.passed, row.failed, row.result, row.note) == (2, 1, "failed 1 of 3", "1 skipped")


def test_a_level_whose_marker_no_test_carries_has_failed(checkout: Path) -> None:
    (checkout / "tests" / "sample" / "test_it.py").write_text("def test_without_a_marker(): pass\n")
    row = Level("sample", need_nothing).run()
    assert (row.passed, row.failed, row.note) == (0, 1, "no test was collected")


@pytest.mark.parametrize(
    ("status", "counts", "verdict"),
    [
        (0, (3, 0, 0), (3, 0, "")),
        (0, (3, 0, 1), (3, 0, "1 skipped")),
        (1, (2, 1, 0), (2, 1, "")),
        (0, (0, 0, 4), (0, 1, "every test was skipped")),
        (4, (0, 0, 0), (0, 1, "pytest ended with exit code 4")),
        (3, (2, 0, 0), (2, 1, "pytest ended with exit code 3")),
    ],
)
def test_a_level_passes_only_by_tests_that_ran(status: int, counts: tuple[int, int, int], verdict: tuple[int, int, str]) -> None:
    assert judge(status, *counts) == verdict


def test_a_level_that_the_machine_cannot_run_is_not_run_and_says_why() -> None:
    def need() -> None:
        raise CannotRun("no redis-server on this machine: install redis-server")

    row = Level("contract", need).run()
    assert (row.result, row.failed) == ("not run", 0)
    assert "install redis-server" in table([row])


def test_a_control_plane_that_cannot_be_built_is_a_failure() -> None:
    def need() -> None:
        raise BinariesMissing("building etcd failed")

    row = Level("api", need).run()
    assert (row.failed, row.note) == (1, "building etcd failed")

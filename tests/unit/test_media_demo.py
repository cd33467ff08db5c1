"""The demo's command line: what it takes, and how it refuses."""

from __future__ import annotations

import shutil
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from examples.media import demo
from examples.media.scenes import bounded
from PIL import Image

from workerpool_operator import manifest
from workerpool_operator.ports import Pool

pytestmark = pytest.mark.unit


@pytest.fixture(autouse=True)
def _own_handler_of_sigterm() -> Iterator[None]:
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    path = tmp_path / "a.png"
    Image.effect_noise((40, 30), 50).save(path)
    return path


def refusal(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as ended:
        sys.exit(demo.main(arguments))
    assert ended.value.code == 2
    return capsys.readouterr().err.splitlines()[-1]


def test_a_folder_that_is_missing_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    missing = tmp_path / "nowhere"
    assert refusal(["--files", str(missing)], capsys) == f"--files: {missing} is not a directory"


def test_a_folder_that_is_empty_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    expected = f"--files: {tmp_path} holds no picture or recording of at most 50 MiB (0 other files)"
    assert refusal(["--files", str(tmp_path)], capsys) == expected


def test_a_folder_of_other_types_says_how_many_it_holds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "notes.txt").write_text("words")
    (tmp_path / "empty.jpg").touch()
    assert refusal(["--files", str(tmp_path)], capsys).endswith("(2 other files)")


def test_a_file_where_a_folder_should_be_is_refused(picture: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert refusal(["--files", str(picture)], capsys).endswith("is not a directory")


def test_a_damaged_picture_is_named_before_anything_starts(
    picture: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    picture.write_bytes(picture.read_bytes()[:200])
    assert refusal(["--files", str(tmp_path)], capsys).startswith(f"--files: {picture} cannot be decoded")


@pytest.mark.parametrize("jobs", ["0", "-3", "many"])
def test_a_number_of_jobs_that_is_none_is_refused(jobs: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert "--jobs" in refusal(["--jobs", jobs], capsys)


def test_a_result_that_cannot_be_written_is_refused_before_anything_starts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "no such directory" in refusal(["--json", str(tmp_path / "missing" / "demo.json")], capsys)


def test_a_folder_of_ones_own_is_used_without_what_is_not_media(picture: Path, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("words")
    (tmp_path / "deeper").mkdir()
    shutil.copy(picture, tmp_path / "named-like-nothing")
    assert demo.usable(tmp_path) == {picture: "image", tmp_path / "named-like-nothing": "image"}


def test_an_edit_of_the_maximum_is_a_new_generation_of_the_same_pool() -> None:
    pool = manifest.parse(demo.RESOURCE.read_text())
    assert isinstance(pool, Pool)
    edited = bounded(pool, 1)
    assert (edited.id, edited.generation) == (pool.id, pool.generation + 1)
    assert [tier.replicas.max for tier in edited.spec.tiers] == [1, pool.spec.tiers[1].replicas.max]
    assert bounded(edited, pool.spec.tiers[0].replicas.max).spec == pool.spec


def test_only_as_many_files_are_measured_as_are_uploaded(picture: Path, tmp_path: Path) -> None:
    shutil.copy(picture, tmp_path / "b.png")
    assert list(demo.measured(tmp_path, most=1)) == [picture]

"""Everything that a release consists of, built for real into a directory of the test."""

from __future__ import annotations

import hashlib
import shutil
import tarfile
import zipfile
from pathlib import Path

import pytest
from charts import release
from helm_python import Chart

pytestmark = pytest.mark.unit

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("release") / "dist"
    assert release.main(directory) == 0
    return directory


def only(dist: Path, pattern: str) -> Path:
    [found] = dist.glob(pattern)
    return found


def test_every_file_has_its_checksum(dist: Path) -> None:
    sums = {name: digest for digest, name in (line.split() for line in (dist / "SHA256SUMS").read_text().splitlines())}
    assert sums.keys() == {path.name for path in dist.iterdir()} - {"SHA256SUMS"}
    for name, digest in sums.items():
        assert hashlib.sha256((dist / name).read_bytes()).hexdigest() == digest


def test_the_wheel_holds_both_packages_with_their_scripts_and_types(dist: Path) -> None:
    shipped = set(zipfile.ZipFile(only(dist, "*.whl")).namelist())
    wanted = {
        str(path.relative_to(top))
        for top in (ROOT / "operator", ROOT / "routing")
        for path in top.rglob("*")
        if path.suffix in {".py", ".lua", ".typed"}
    }
    assert len(wanted) > 50
    assert wanted <= shipped


def test_a_second_build_of_the_same_commit_is_the_same(dist: Path, tmp_path: Path) -> None:
    release.distributions(tmp_path)
    for pattern in ("*.whl", "*.tar.gz"):
        assert only(tmp_path, pattern).read_bytes() == only(dist, pattern).read_bytes()


def test_the_packaged_chart_renders_what_the_chart_does(dist: Path, tmp_path: Path) -> None:
    with tarfile.open(only(dist, "celery-workerpool-*.tgz")) as archive:
        archive.extractall(tmp_path, filter="data")
    rendered = []
    for directory in (tmp_path / "celery-workerpool", ROOT / "charts" / "celery-workerpool"):
        with Chart.load(directory) as chart:
            rendered.append(chart.render(name="pools", namespace="system"))
    assert rendered[0] == rendered[1]


def test_the_manifests_are_those_of_the_repository(dist: Path) -> None:
    assert only(dist, "*-install.yaml").read_bytes() == (ROOT / "manifests" / "install.yaml").read_bytes()
    assert only(dist, "*-crd.yaml").read_bytes() == (ROOT / "crds" / "workerpool.yaml").read_bytes()


@pytest.mark.parametrize(
    ("buildah", "reason"),
    [
        (None, "buildah is not on PATH"),
        (
            "echo dial tcp: no route to host >&2; exit 125",
            "python:3.11-slim-bookworm cannot be pulled: dial tcp: no route to host",
        ),
    ],
)
def test_an_image_that_cannot_be_had_here_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, buildah: str | None, reason: str
) -> None:
    stand_in(tmp_path, monkeypatch, buildah)
    assert release.image(tmp_path / "image.tar", "1").endswith(reason)


def test_an_image_that_does_not_build_is_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(tmp_path, monkeypatch, '[ "$1" = pull ] || { echo STEP 3: no such file >&2; exit 1; }')
    with pytest.raises(release.CannotRelease, match="buildah failed:\nSTEP 3: no such file"):
        release.image(tmp_path / "image.tar", "1")


def stand_in(directory: Path, monkeypatch: pytest.MonkeyPatch, buildah: str | None) -> None:
    """A script in the place of buildah, which would need a registry; the image itself is built by the e2e tests."""
    git = shutil.which("git")
    if git:
        (directory / "git").symlink_to(git)
    if buildah is not None:
        script = directory / "buildah"
        script.write_text(f"#!/bin/sh\n{buildah}\n")
        script.chmod(0o755)
    monkeypatch.setenv("PATH", str(directory))

"""Builds everything that a release consists of into ``dist/``, with checksums, and publishes nothing.

``python -m charts.release``: the source distribution, the wheel, the packaged chart, the manifests, and the operator's image
where buildah is and can pull the image's base. Ends with a table; exit 1 if something that can be built here was not.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

from charts import render
from helm_python import package

ROOT = Path(__file__).parents[1]
NAME = render.NAME


class CannotRelease(Exception):
    """Something has to be put right before a release; the message says what."""


def main(dist: Path) -> int:
    """Build into an empty directory, and say what was built and what was not."""
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    shutil.rmtree(dist, ignore_errors=True)
    dist.mkdir(parents=True)
    if render.main(ROOT, check=True):
        return 1
    try:
        distributions(dist)
        package(ROOT / "charts" / NAME, destination=dist)
        shutil.copyfile(ROOT / "manifests" / "install.yaml", dist / f"{NAME}-{version}-install.yaml")
        shutil.copyfile(ROOT / "crds" / "workerpool.yaml", dist / f"{NAME}-{version}-crd.yaml")
        missing = image(dist / f"{NAME}-{version}-image.tar", version)
    except CannotRelease as error:
        print(error, file=sys.stderr)  # noqa: T201
        return 1
    built = sorted(dist.iterdir())
    sums = [f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}\n" for path in built]
    (dist / "SHA256SUMS").write_text("".join(sums))
    for path in built:
        print(f"{path.stat().st_size / 1e3:9.0f} kB  {path.name}")  # noqa: T201
    if missing:
        print(f"    not built  image: {missing}")  # noqa: T201
    return 0


def distributions(dist: Path) -> None:
    """The source distribution and the wheel, byte for byte the same for the same commit."""
    told = subprocess.run(["git", "log", "-1", "--format=%ct"], cwd=ROOT, capture_output=True, text=True, check=False)
    committed = {"SOURCE_DATE_EPOCH": told.stdout.strip()} if told.returncode == 0 else {}
    hatchling = Path(sys.executable).with_name("hatchling")
    _run([str(hatchling), "build", "--directory", str(dist)], committed)


def image(archive: Path, version: str) -> str:
    """The operator's image as an OCI archive; why it cannot be had here, empty where it can."""
    if shutil.which("buildah") is None:
        return "buildah is not on PATH"
    dockerfile = (ROOT / "Dockerfile").read_text()
    [base] = set(re.findall(r"^FROM (\S+?)\$\{PYTHON_DIGEST\}", dockerfile, re.MULTILINE))
    pulled = subprocess.run(["buildah", "pull", "--quiet", base], capture_output=True, text=True, check=False)
    if pulled.returncode:
        return f"{base} cannot be pulled: {pulled.stderr.strip().splitlines()[-1]}"
    revision = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()
    tag = f"{NAME}:{version}"
    arguments = [f"--build-arg={each}" for each in (f"VERSION={version}", f"REVISION={revision}")]
    _run(["buildah", "build", "--pull=never", *arguments, f"--tag={tag}", str(ROOT)], {})
    _run(["buildah", "push", "--quiet", tag, f"oci-archive:{archive}:{tag}"], {})
    return ""


def _run(command: list[str], environment: dict[str, str]) -> None:
    answer = subprocess.run(command, cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True, check=False)
    if answer.returncode:
        tail = "\n".join((answer.stdout + answer.stderr).splitlines()[-20:])
        raise CannotRelease(f"{command[0]} failed:\n{tail}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dist", type=Path, default=ROOT / "dist", help="where it all goes; emptied first")
    sys.exit(main(parser.parse_args().dist))

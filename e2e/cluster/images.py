"""The images of the tests, from the very Dockerfiles that are shipped, as archives in a cache outside the checkout.

The base that the Dockerfiles name is never pulled: a Debian with Python, made by debootstrap, stands in under its name, so that
no registry is needed. ``python -m e2e.cluster.images`` builds what is missing and prints name, size and archive of each.
"""

from __future__ import annotations

import hashlib
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from e2e.cluster.binaries import cache_home, locked

ROOT = Path(__file__).parents[2]
BASE = "docker.io/library/python:3.11-slim-bookworm"
PAUSE = "docker.io/library/pause:e2e"

_DEBIAN = "bookworm"
_PACKAGES = "python3,python3-venv,ca-certificates"
_HOST_CERTIFICATES = Path("/etc/ssl/certs/ca-certificates.crt")
_ENVIRONMENT = (
    "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
    f"SSL_CERT_FILE={_HOST_CERTIFICATES}",
    f"PIP_CERT={_HOST_CERTIFICATES}",
)
_NOT_NEEDED = ("usr/share/doc", "usr/share/man", "usr/share/locale", "usr/share/info", "var/cache/apt", "var/lib/apt/lists")
_KEPT = 4
"""How many versions of an image stay in the cache; checkouts side by side share it."""


class ImageFailed(RuntimeError):
    """An image could not be built; the message holds the command and the end of what it said."""


@dataclass(frozen=True, slots=True)
class Image:
    """An image by its full name, its Dockerfile, and what of the repository goes into it."""

    name: str
    dockerfile: str
    sources: tuple[str, ...] = ()


_PACKAGE = ("requirements.lock", "pyproject.toml", "README.md", "LICENSE", "operator", "routing")
OPERATOR = Image("docker.io/library/celery-workerpool:e2e", "Dockerfile", _PACKAGE)
MEDIA = Image("docker.io/library/media:e2e", "examples/media/Dockerfile", (*_PACKAGE, "examples"))
REDIS = Image("docker.io/library/redis:e2e", "e2e/cluster/redis.Dockerfile")
IMAGES = (OPERATOR, MEDIA, REDIS)


def ensure(say: Callable[[str], None]) -> list[Path]:
    """Return the archives of all images, the sandbox's among them, building those whose sources have changed."""
    cache = cache_home() / "images"
    cache.mkdir(parents=True, exist_ok=True)
    with locked(cache / ".lock", say):
        base = _Base(cache)
        archives = [base.ensure(say)]
        for image in IMAGES:
            archives.append(_archive(cache, image.name, digest(base.key, image)))
            if not archives[-1].exists():
                _build(image, archives[-1], base, say)
        return archives


class _Base:
    """The stand-in for the Dockerfiles' base, in a storage of its own, and the sandbox's image: the same, asleep."""

    def __init__(self, cache: Path) -> None:
        self._cache = cache
        certificates = _HOST_CERTIFICATES.read_bytes() if _HOST_CERTIFICATES.exists() else b""
        recipe = " ".join((_DEBIAN, _PACKAGES, *_ENVIRONMENT, *_NOT_NEEDED))
        self.key = hashlib.sha256(recipe.encode() + certificates).hexdigest()[:16]
        self._storage = cache / "storage"
        self.buildah = ["buildah", f"--root={self._storage}", f"--runroot={cache}/run", "--storage-driver=overlay"]

    def ensure(self, say: Callable[[str], None]) -> Path:
        """Make it if it is not there; return the archive of the sandbox image."""
        pause = _archive(self._cache, PAUSE, self.key)
        if not pause.exists():
            shutil.rmtree(self._storage, ignore_errors=True)
            self._bootstrap(say)
            self._commit(PAUSE, BASE, "--entrypoint", '["/usr/bin/sleep", "infinity"]')
            _push(self.buildah, PAUSE, pause)
        return pause

    def _bootstrap(self, say: Callable[[str], None]) -> None:
        with tempfile.TemporaryDirectory(dir=self._cache) as directory:
            root = Path(directory) / "root"
            debootstrap = ["debootstrap", "--variant=minbase", f"--include={_PACKAGES}", _DEBIAN, str(root), *_mirror()]
            _run(debootstrap, f"base image: Debian {_DEBIAN} with Python", say)
            for path in _NOT_NEEDED:
                shutil.rmtree(root / path, ignore_errors=True)
                (root / path).mkdir()
            # Behind a proxy that signs for the world, the host's certificates are the ones that work.
            if _HOST_CERTIFICATES.exists():
                shutil.copyfile(_HOST_CERTIFICATES, root / str(_HOST_CERTIFICATES).lstrip("/"))
            self._commit(
                BASE,
                "scratch",
                "--env",
                f"SSL_CERT_FILE={_HOST_CERTIFICATES}",
                "--env",
                f"PIP_CERT={_HOST_CERTIFICATES}",
                add=root,
            )

    def _commit(self, name: str, parent: str, *config: str, add: Path | None = None) -> None:
        container = _run([*self.buildah, "from", "--pull-never", parent], name).strip()
        if add is not None:
            _run([*self.buildah, "add", container, str(add), "/"], name)
        _run([*self.buildah, "config", *config, container], name)
        _run([*self.buildah, "commit", "--rm", container, name], name)


def _build(image: Image, archive: Path, base: _Base, say: Callable[[str], None]) -> None:
    title = image.name.removeprefix("docker.io/library/")
    options = ["--isolation=chroot", "--pull-never", "--layers", f"--file={ROOT / image.dockerfile}", f"--tag={image.name}"]
    _run([*base.buildah, "bud", *options, str(ROOT)], f"image {title}", say)
    _push(base.buildah, image.name, archive)


def _push(buildah: Sequence[str], name: str, archive: Path) -> None:
    partial = archive.with_suffix(".partial")
    partial.unlink(missing_ok=True)
    _run([*buildah, "push", name, f"docker-archive:{partial}:{name}"], name)
    partial.rename(archive)
    older = sorted(archive.parent.glob(f"{archive.name.split('-')[0]}-*.tar"), key=lambda path: path.stat().st_mtime)
    for path in older[:-_KEPT]:
        path.unlink()


def _archive(cache: Path, name: str, key: str) -> Path:
    short = re.sub(r"\W", "_", name.rsplit("/", 1)[-1])
    return cache / f"{short}-{key}.tar"


def digest(base: str, image: Image) -> str:
    """The name of what goes into an image: its sources, its Dockerfile and its base."""
    sources = hashlib.sha256(base.encode())
    for path in _files((image.dockerfile, *image.sources)):
        sources.update(f"{path.relative_to(ROOT)}\0{path.stat().st_size}\0".encode() + path.read_bytes())
    return sources.hexdigest()[:16]


def _files(names: Iterable[str]) -> list[Path]:
    found = [path for name in names for path in [ROOT / name, *(ROOT / name).rglob("*")]]
    return sorted(path for path in found if path.is_file() and "__pycache__" not in path.parts)


def _mirror() -> list[str]:
    """The mirror that apt itself uses; none where it does not say: debootstrap has a default of its own."""
    try:
        listed = _run(["apt-get", "indextargets", "--format", "$(SITE)", f"Codename: {_DEBIAN}"], "apt")
    except (ImageFailed, FileNotFoundError):
        listed = ""
    return listed.split()[:1]


def _run(command: Sequence[str], title: str, say: Callable[[str], None] | None = None) -> str:
    started = time.monotonic()
    if say:
        say(f"{title}: building")
    answer = subprocess.run(command, capture_output=True, text=True, check=False)
    if answer.returncode:
        tail = "\n".join((answer.stdout + answer.stderr).splitlines()[-20:])
        raise ImageFailed(f"{title} failed: {shlex.join(command)}\n{tail}")
    if say:
        say(f"{title}: done after {time.monotonic() - started:.0f} s")
    return answer.stdout


def main() -> int:
    """Build what is missing, and show it."""
    try:
        for archive in ensure(lambda line: print(line, file=sys.stderr, flush=True)):
            print(f"{archive.stat().st_size / 1e6:6.0f} MB  {archive}")
    except ImageFailed as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

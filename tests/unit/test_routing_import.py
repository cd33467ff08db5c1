"""What an API pod pays for importing the library."""

from __future__ import annotations

import subprocess
import sys

import pytest

pytestmark = pytest.mark.unit

CELERY = "import asyncio, celery, kombu.messaging, redis.sentinel, sys; celery.Celery; celery.Task"


def top_level_modules(code: str) -> set[str]:
    """What a fresh process has loaded after that code, beside the standard library."""
    report = "print('\\n'.join({name.partition('.')[0] for name in sys.modules} - sys.stdlib_module_names))"
    done = subprocess.run([sys.executable, "-c", f"{CELERY}\n{code}\n{report}"], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_the_library_brings_nothing_beyond_celery_and_redis() -> None:
    assert top_level_modules("import workerpool_routing") - top_level_modules("") == {"workerpool_routing"}


def test_the_public_face_is_six_names() -> None:
    import workerpool_routing

    assert workerpool_routing.__all__ == ["Decision", "Overloaded", "PoolUnavailable", "Reason", "Tier", "WorkerPool"]


def test_importing_it_takes_no_longer_than_a_twentieth_of_a_second() -> None:
    code = (
        f"{CELERY}\nimport time; started = time.process_time()\nimport workerpool_routing; print(time.process_time() - started)"
    )
    runs = [subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout for _ in range(3)]
    assert min(map(float, runs)) <= 0.05

"""How one worker is started: the same command and environment in a pod and as a local process.

Values are written as Kubernetes reads them: ``$(NAME)`` stands for a variable, ``$$`` for a dollar sign.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from workerpool_operator.model import WORKER_CONTAINER, Tier
from workerpool_operator.ports import Pool
from workerpool_routing import wire

GRACE = "terminationGracePeriodSeconds"
"""The field of a pod's spec that says how long it has from SIGTERM to SIGKILL, in seconds."""

DEFAULT_GRACE_SECONDS = 600
"""If the template does not say."""

PROBE_LIFE_SECONDS = 30
"""A worker touches its file every second; after so long without a touch it counts as stuck."""

PROBE_SCRIPT = f"""\
import importlib.util, pathlib, sys, time
probe, directory = sys.argv[1], pathlib.Path(sys.argv[2])
alive = directory / "alive"
fresh = alive.exists() and time.time() - alive.stat().st_mtime < {PROBE_LIFE_SECONDS}
if probe == "alive":
    silent = not alive.exists()
else:
    silent = not directory.exists() and importlib.util.find_spec("workerpool_routing") is None
sys.exit(not (fresh or silent))
"""
"""What a probe runs; arguments: ``alive`` or ``up``, and the directory of the library's probe files.

An app that never loads the library writes no such files: it counts as alive, and, if the library is not installed, as up. The
script has to run in any image that runs Celery, so it needs Python and nothing else, not even a shell.
"""


def probe(which: str, directory: str) -> list[str]:
    """The argument vector of a pod's probe: ``alive``, or ``up``, which succeeds once the worker has joined the pool.

    A draining worker stays up: Kubernetes removes un-Ready pods first, and it may still hold a job.
    """
    return ["python3", "-c", PROBE_SCRIPT, which, directory]


def container(tier: Tier) -> Mapping[str, Any]:
    """The container of the tier's template that runs the worker."""
    return next(c for c in tier.template["spec"]["containers"] if c.get("name") == WORKER_CONTAINER)


def command(app: str, tier: Tier) -> list[str]:
    """The whole argument vector: the template's own command if it has one, else Celery's; then the template's args."""
    worker = container(tier)
    return [*(worker.get("command") or _celery(app, tier)), *(worker.get("args") or ())]


def _celery(app: str, tier: Tier) -> list[str]:
    queue, concurrency, name = literal(tier.queue), str(tier.concurrency), f"celery@$({wire.ENV_WORKER})"
    options = ["-Q", queue, "-c", concurrency, "-n", name, "--without-gossip", "--without-mingle", "-l", "INFO"]
    return ["celery", "-A", app, "worker", *options]


def environment(pool: Pool, tier: Tier) -> dict[str, str]:
    """The variables that are the same for every worker of a tier; the worker's name and the broker URL come beside them."""
    return {
        wire.ENV_POOL: pool.id,
        wire.ENV_TIER: tier.name,
        wire.ENV_QUEUE: literal(tier.queue),
        wire.ENV_CONCURRENCY: str(tier.concurrency),
        wire.ENV_GRACE: str(grace_seconds(tier)),
    }


def grace_seconds(tier: Tier) -> int:
    """How long a worker that was told to stop may go on with its jobs, in seconds."""
    return int(tier.template["spec"].get(GRACE, DEFAULT_GRACE_SECONDS))


def literal(text: str) -> str:
    """The text, escaped so that Kubernetes expands no variable in it."""
    return text.replace("$", "$$")

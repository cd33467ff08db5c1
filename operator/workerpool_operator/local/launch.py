"""What a tier's template means on this machine (command, environment, directory), and what in it needs a cluster."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from workerpool_operator.model import WORKER_CONTAINER, Problem, Tier, WorkerPoolSpec
from workerpool_operator.ports import Pool
from workerpool_operator.worker_command import command, container, environment, grace_seconds
from workerpool_routing import wire

_VARIABLE = re.compile(r"\$(?:\$|\((?P<name>[^()]+)\))")


@dataclass(frozen=True, slots=True)
class Launch:
    """How one worker is started and stopped."""

    command: tuple[str, ...]
    environment: Mapping[str, str]
    directory: Path
    grace_seconds: float


def launch(pool: Pool, tier: Tier, worker: str) -> Launch:
    """Read the template as Kubernetes would, for a process that sees this machine's files and this process's environment.

    The current directory is where the process runs, unless the template has a ``workingDir``, and is importable either way.
    """
    worker_container = container(tier)
    here = Path.cwd()
    own = dict(os.environ)
    own["PYTHONPATH"] = os.pathsep.join(filter(None, [str(here), own.get("PYTHONPATH")]))
    for variable in worker_container.get("env") or ():
        if "valueFrom" not in variable:
            own[variable["name"]] = expand(variable.get("value") or "", own)
    for name, value in environment(pool, tier).items():
        own[name] = expand(value, {})
    own[wire.ENV_WORKER] = worker
    own[wire.ENV_BROKER_URL] = str(pool.spec.broker.url)
    program, *arguments = (expand(part, own) for part in command(pool.spec.app, tier))
    # The Celery of this very environment, whatever PATH says.
    start = [sys.executable, "-m", "celery"] if program == "celery" else [program]
    directory = here / worker_container.get("workingDir", "")
    return Launch((*start, *arguments), own, directory, grace_seconds(tier))


def expand(text: str, variables: Mapping[str, str]) -> str:
    """Expand ``$(NAME)`` as Kubernetes does: an unknown name stays as it is, and ``$$`` is one dollar sign."""

    def replacement(match: re.Match[str]) -> str:
        name = match["name"]
        return "$" if name is None else variables.get(name, match[0])

    return _VARIABLE.sub(replacement, text)


def unsupported(spec: WorkerPoolSpec) -> list[Problem]:
    """The fields of the spec that need a cluster, each with what to do instead."""
    problems = []
    if spec.broker.url is None:
        problems.append(Problem(field="spec.broker.urlFrom", message="needs a cluster; here, give the broker's url"))
    for index, tier in enumerate(spec.tiers):
        containers = tier.template["spec"]["containers"]
        worker = next(n for n, c in enumerate(containers) if c.get("name") == WORKER_CONTAINER)
        path = f"spec.tiers[{index}].template.spec.containers[{worker}]"
        problems += _container_problems(path, containers[worker])
    return problems


def _container_problems(path: str, worker: Mapping[str, Any]) -> Iterator[Problem]:
    if worker.get("envFrom"):
        yield Problem(field=f"{path}.envFrom", message="needs a cluster; here, name the variables under env")
    for index, variable in enumerate(worker.get("env") or ()):
        name = variable["name"]
        if "valueFrom" in variable and name not in os.environ:
            message = f"needs a cluster; here, export {name} before you start"
            yield Problem(field=f"{path}.env[{index}].valueFrom", message=message)

"""The WorkerPool resource as the API server stores it, parsed at the edge.

The CRD in ``crds/`` is canonical: a test holds these models to it field by field and default by default. Field names are
snake_case here and camelCase on the wire. What only the API server can check (immutability) is not repeated; what a file given
to ``workerpool check`` or ``workerpool dev`` needs is checked here too, because no API server stands before them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from enum import StrEnum
from typing import Annotated, Any, Literal, Self

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    Strict,
    StringConstraints,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic.alias_generators import to_camel

from workerpool_routing.wire import TIER_NAME, TIER_NAME_LENGTH

GROUP = "workerpool.dev"
VERSION = "v1alpha1"
API_VERSION = f"{GROUP}/{VERSION}"
KIND = "WorkerPool"
PLURAL = "workerpools"
WORKER_CONTAINER = "worker"
PROBES_VOLUME = "workerpool-probes"
BROKER_SCHEMES = ("redis://", "rediss://", "sentinel://")

# Strict, as the API server: "4" is not a number and "yes" is not a boolean.
Int = Annotated[int, Strict()]
Bool = Annotated[bool, Strict()]


class _Model(BaseModel):
    model_config = ConfigDict(alias_generator=to_camel, frozen=True, extra="forbid", populate_by_name=True)

    @model_validator(mode="before")
    @classmethod
    def _null_is_absent(cls, raw: Any) -> Any:
        # As the API server: it drops the null of a known field before it fills in defaults.
        if not isinstance(raw, dict):
            return raw
        known = {field.alias for field in cls.model_fields.values()}
        return {key: value for key, value in raw.items() if value is not None or key not in known}


class Mode(StrEnum):
    """What the operator may touch: everything, nothing but the status, or not even its own decisions."""

    ACTIVE = "Active"
    ADVISORY = "Advisory"
    PAUSED = "Paused"


class SecretKeyRef(_Model):
    """One key of a Secret in the pool's own namespace."""

    name: Annotated[str, StringConstraints(min_length=1, max_length=253)]
    key: Annotated[str, StringConstraints(min_length=1, max_length=253)]


class UrlFrom(_Model):
    """Where a broker URL that holds a password comes from."""

    secret_key_ref: SecretKeyRef


class Broker(_Model):
    """The Redis that carries the pool's queues, and the Kombu transport options that say where it and its keys are."""

    url: Annotated[str, StringConstraints(min_length=1, max_length=1024, pattern=r"^(redis|rediss|sentinel)://")] | None = None
    url_from: UrlFrom | None = None
    master_name: Annotated[str, StringConstraints(min_length=1, max_length=128, pattern=r"^[A-Za-z0-9._-]+$")] | None = None
    global_key_prefix: Annotated[str, StringConstraints(max_length=128)] = ""
    priority_steps: Annotated[tuple[Annotated[Int, Field(ge=0, le=9)], ...], Field(min_length=1, max_length=10)] = (
        0,
        3,
        6,
        9,
    )

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if (self.url is None) == (self.url_from is None):
            raise ValueError("set exactly one of url and urlFrom")
        if self.url is not None and self.url.startswith("sentinel://") != (self.master_name is not None):
            raise ValueError("a sentinel:// url needs masterName, and no other url takes it")
        return self

    def address(self, url: str) -> str:
        """What tells this Redis from every other: the URL, and as its fragment which of the sentinels' masters it is."""
        return f"{url}#{self.master_name}" if self.master_name else url

    @field_validator("priority_steps")
    @classmethod
    def _ascending(cls, steps: tuple[int, ...]) -> tuple[int, ...]:
        if list(steps) != sorted(set(steps)):
            raise ValueError("must rise from step to step")
        return steps


class Accelerator(_Model):
    """The extended resource that every worker pod of the tier asks for."""

    resource: Annotated[
        str,
        StringConstraints(max_length=253, pattern=r"^[a-z0-9]([-a-z0-9.]*[a-z0-9])?/[A-Za-z0-9]([-A-Za-z0-9_.]*[A-Za-z0-9])?$"),
    ]
    count: Annotated[Int, Field(ge=1, le=64)] = 1


class Replicas(_Model):
    """Bounds of one tier's replica count."""

    min: Annotated[Int, Field(ge=0, le=1000)] = 0
    max: Annotated[Int, Field(ge=0, le=1000)] = 10

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.min > self.max:
            raise ValueError(f"min {self.min} is above max {self.max}")
        return self


class _OpenModel(_Model):
    """A node of the pod template: what the operator reads is checked here, the rest is kept for the API server to judge."""

    model_config = ConfigDict(extra="allow")


# The longest string that Linux hands to a new process, as an argument or in its environment; a NUL would end it.
_ProcessText = Annotated[str, StringConstraints(max_length=131_072, pattern=r"^[^\x00]*$")]


class Variable(_OpenModel):
    """One environment variable of a container, its name as Kubernetes takes it."""

    name: Annotated[str, StringConstraints(min_length=1, max_length=256, pattern=r"^[ -<>-~]+$")]
    value: _ProcessText | None = None
    value_from: dict[str, Any] | None = None


class Resources(_OpenModel):
    """What a container asks for and may use; a tier's accelerator is put into both maps."""

    limits: dict[str, Any] | None = None
    requests: dict[str, Any] | None = None


class Volume(_OpenModel):
    """A volume of the worker pods; one of them is the operator's own."""

    name: Annotated[str, StringConstraints(min_length=1, max_length=63)]


class Container(_OpenModel):
    """A container of the worker pods; the one named "worker" runs Celery."""

    name: Annotated[str, StringConstraints(min_length=1, max_length=63)]
    command: Annotated[list[_ProcessText], Field(max_length=1024)] | None = None
    args: Annotated[list[_ProcessText], Field(max_length=1024)] | None = None
    env: Annotated[list[Variable], Field(max_length=1024)] | None = None
    resources: Resources | None = None
    working_dir: Annotated[str, StringConstraints(max_length=4096, pattern=r"^[^\x00]*$")] | None = None
    volume_mounts: Annotated[list[dict[str, Any]], Field(max_length=1024)] | None = None


class PodMetadata(_OpenModel):
    """Labels and annotations of the worker pods, beside the operator's own."""

    labels: Annotated[dict[str, Annotated[str, StringConstraints(max_length=63)]], Field(max_length=64)] | None = None
    annotations: Annotated[dict[str, Annotated[str, StringConstraints(max_length=262_144)]], Field(max_length=256)] | None = None


class PodSpec(_OpenModel):
    """The containers and volumes of the worker pods, and their time from SIGTERM to SIGKILL: at most a year."""

    containers: Annotated[list[Container], Field(min_length=1, max_length=16)]
    volumes: Annotated[list[Volume], Field(max_length=1024)] | None = None
    termination_grace_period_seconds: Annotated[Int, Field(ge=1, le=31_536_000)] | None = None

    @field_validator("containers")
    @classmethod
    def _has_worker(cls, containers: list[Container]) -> list[Container]:
        if not any(container.name == WORKER_CONTAINER for container in containers):
            raise ValueError(f'one container must be named "{WORKER_CONTAINER}": it is the one that runs Celery')
        return containers


class PodTemplate(_OpenModel):
    """The pod template of a tier, as far as the operator reads it or adds to it."""

    metadata: PodMetadata | None = None
    spec: PodSpec


_FIXED_OPTIONS = ("-Q", "--queues", "-X", "--exclude-queues", "-c", "--concurrency", "--autoscale")
"""Options of Celery that say what queue and concurrency say, or the contrary."""


def _fixed_option(argument: str) -> str | None:
    option = argument.partition("=")[0] if argument.startswith("--") else argument[:2]
    return option if option in _FIXED_OPTIONS else None


def _checked_template(raw: object) -> dict[str, Any]:
    """The template with everything that it holds, except the nulls: to Kubernetes they are fields that are not there."""
    return PodTemplate.model_validate(raw, by_alias=True, by_name=False).model_dump(by_alias=True, exclude_none=True)


class Tier(_Model):
    """One Deployment of the pool and the queue that it serves."""

    name: Annotated[str, StringConstraints(min_length=1, max_length=TIER_NAME_LENGTH, pattern=TIER_NAME)]
    queue: Annotated[str, StringConstraints(min_length=1, max_length=200, pattern=r"^[^\x00-\x1f\x7f,]+$")]
    accelerator: Accelerator | None = None
    concurrency: Annotated[Int, Field(ge=1, le=256)] = 1
    replicas: Replicas = Replicas()
    template: Annotated[dict[str, Any], BeforeValidator(_checked_template, json_schema_input_type=PodTemplate)]

    @model_validator(mode="after")
    def _keeps_the_promises(self) -> Self:
        containers = self.template["spec"]["containers"]
        index, worker = next((i, c) for i, c in enumerate(containers) if c["name"] == WORKER_CONTAINER)
        if "command" not in worker and (given := next(filter(None, map(_fixed_option, worker.get("args") or ())), None)):
            where = f"template.spec.containers[{index}].args"
            raise ValueError(f"{where}: {given} would undo what the tier's own fields say; remove it and set those fields")
        if any(volume["name"] == PROBES_VOLUME for volume in self.template["spec"].get("volumes") or ()):
            raise ValueError(f"template.spec.volumes: {PROBES_VOLUME} is the operator's own volume; give yours another name")
        return self

    @property
    def accelerated(self) -> bool:
        """Whether its workers need an accelerator."""
        return self.accelerator is not None


class TaskRoute(_Model):
    """Tasks whose plain ``delay()`` is routed too, by a shell pattern on the task's name."""

    name: Annotated[str, StringConstraints(min_length=1, max_length=255)]
    accelerated: Literal[True, False, "required"] = True

    @field_validator("accelerated", mode="before")
    @classmethod
    def _in_words_of_yaml(cls, wish: Any) -> Any:
        # By identity: to Python 1 equals True.
        if not (wish is True or wish is False or wish == "required"):
            raise ValueError('must be true, false or "required"')
        return wish


class Fallback(_Model):
    """Which ends of an accelerated attempt give the job one more run on the next tier."""

    on_failure: Bool = True
    on_loss: Bool = True


class Routing(_Model):
    """What the library in the API pods and in the workers goes by."""

    accelerated_content_types: Annotated[
        tuple[Annotated[str, StringConstraints(min_length=1, max_length=64)], ...], Field(max_length=32)
    ] = ("audio", "video", "image")
    tasks: Annotated[tuple[TaskRoute, ...], Field(max_length=128)] = ()
    max_wait_seconds: Annotated[Int, Field(ge=1, le=86400)] | None = None
    fallback: Fallback = Fallback()
    rebalance: Bool = True


class Scaling(_Model):
    """What the number of replicas is chosen for."""

    target_wait_seconds: Annotated[Int, Field(ge=0, le=86_400)] = 60


class WorkerPoolSpec(_Model):
    """The ``spec`` of a WorkerPool. The order of the tiers is the order of preference."""

    app: Annotated[
        str,
        StringConstraints(
            max_length=253, pattern=r"^[A-Za-z_][A-Za-z0-9_]*(\.[A-Za-z_][A-Za-z0-9_]*)*(:[A-Za-z_][A-Za-z0-9_.]*)?$"
        ),
    ]
    broker: Broker
    tiers: Annotated[tuple[Tier, ...], Field(min_length=1, max_length=8)]
    routing: Routing = Routing()
    scaling: Scaling = Scaling()
    mode: Mode = Mode.ACTIVE

    @field_validator("tiers")
    @classmethod
    def _distinct(cls, tiers: tuple[Tier, ...]) -> tuple[Tier, ...]:
        for field in ("name", "queue"):
            seen = [getattr(tier, field) for tier in tiers]
            if twice := next((value for value in seen if seen.count(value) > 1), None):
                raise ValueError(f"two tiers have the {field} {twice!r}")
        return tiers

    @model_validator(mode="after")
    def _can_fall_back(self) -> Self:
        fallback = self.routing.fallback
        if (fallback.on_failure or fallback.on_loss) and all(tier.accelerated for tier in self.tiers):
            raise ValueError("tiers: a fallback needs a tier without an accelerator, or turn routing.fallback off")
        return self


class Problem(BaseModel):
    """One thing that is wrong with a resource: where, with what value, and what would be right."""

    model_config = ConfigDict(frozen=True)

    field: str
    message: str
    value: str = ""

    def __str__(self) -> str:
        given = f" (given: {self.value})" if self.value else ""
        return f"{self.field}: {self.message}{given}"


def parse_spec(raw: object) -> WorkerPoolSpec | list[Problem]:
    """Return the spec, or everything that is wrong with it; never raises on user input."""
    try:
        return WorkerPoolSpec.model_validate(raw, by_alias=True, by_name=False)
    except ValidationError as error:
        details = error.errors(include_url=False)
        return [_problem(detail) for detail in details if not _only_follows(detail, details)]


def unknown_to_the_api_server(stored: Mapping[str, Any], spec: WorkerPoolSpec) -> tuple[str, ...]:
    """The fields that have a default and are not in a stored spec: its definition is older than this, and drops them."""
    whole = spec.model_dump(by_alias=True, exclude_none=True, exclude={"tiers": {"__all__": {"template"}}})
    return tuple(_lacking(stored, whole, "spec"))


def _lacking(stored: Any, whole: Any, path: str) -> Iterator[str]:
    match whole:
        case dict():
            for name, value in whole.items():
                if name not in stored:
                    yield f"{path}.{name}"
                else:
                    yield from _lacking(stored[name], value, f"{path}.{name}")
        case [*items] if isinstance(stored, list):
            for index, (one, item) in enumerate(zip(stored, items, strict=True)):
                yield from _lacking(one, item, f"{path}[{index}]")


def _only_follows(detail: Any, details: Sequence[Any]) -> bool:
    """Whether a list counts as too short only because items of it are wrong."""
    loc = detail["loc"]
    return detail["type"] == "too_short" and any(other is not detail and other["loc"][: len(loc)] == loc for other in details)


_LINE = 80
_IN_WORDS_OF_YAML = {
    "missing": "must be given",
    "extra_forbidden": "is no field here; check its spelling and its place",
    "model_type": "must be a map",
    "dict_type": "must be a map",
    "list_type": "must be a list",
    "tuple_type": "must be a list",
    "string_type": "must be a string; a number or a boolean needs quotes to be one",
}


def _problem(detail: Any) -> Problem:
    path = "spec"
    for part in detail["loc"]:
        path += f"[{part}]" if isinstance(part, int) else f".{part}"
    message = _IN_WORDS_OF_YAML.get(detail["type"]) or str(detail["msg"]).removeprefix("Value error, ")
    value = detail.get("input")
    if detail["loc"] == ("broker", "url"):
        value = None  # it may hold a password
        if detail["type"] == "string_pattern_mismatch":
            message = "must begin with redis://, rediss:// or sentinel://"
    shown = repr(value) if isinstance(value, str | int | float) and value != "" else ""
    return Problem(field=path, message=message, value=shown if len(shown) <= _LINE else f"{shown[:_LINE]}…")

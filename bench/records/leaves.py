"""Values of a record's config, provenance and environment: their types, and their dotted names."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, TypeAlias

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    model_validator,
)

JsonObject: TypeAlias = dict[str, Any]
"""A JSON object whose keys are not known here, such as the config of a run or its provenance."""
SHOWN_ORIGINS = frozenset({"embedded", "file"})
"""Origins of data that reports name together with its location."""


# A literal default would be copied for each record that lacks the value.
_EMPTY: Any = Field(default_factory=dict)


class Leaves(BaseModel):
    """The values of a JSON object that reports read; all are optional, and others are kept.

    A record may be untrusted. A value of the wrong type would break the reports of all runs, so
    such a record is refused when it is read.
    """

    model_config = ConfigDict(extra="ignore", strict=True)


class ModelLeaves(Leaves):
    """Of the section `model`."""

    name: str | None = None
    source: str | None = None
    path: str | None = None
    kind: str | None = None
    dtype: str | None = None
    max_length: int | None = None
    seed: int | None = None
    trust_remote_code: bool | None = None


class BenchmarkLeaves(Leaves):
    """Of the section `benchmark`."""

    name: str
    harness: str | None = None
    tasks: Sequence[str] = ()
    metrics: JsonObject = _EMPTY
    perplexity: dict[str, JsonObject] = _EMPTY
    num_fewshot: int | dict[str, int] | None = None
    limit: int | float | None = None
    data: JsonObject = _EMPTY
    images: JsonObject = _EMPTY


class TrackerLeaves(Leaves):
    """Of the section `tracker`."""

    samples: bool = True


class ConfigLeaves(Leaves):
    """Of a run's config."""

    model: ModelLeaves = Field(default_factory=ModelLeaves)
    method: dict[str, JsonObject] = _EMPTY
    benchmark: BenchmarkLeaves
    calibration: JsonObject = _EMPTY
    prompts: JsonObject = _EMPTY
    costs: JsonObject = _EMPTY
    tracker: TrackerLeaves = Field(default_factory=TrackerLeaves)
    seed: int | None = None
    offline: bool = False
    packages: Sequence[str] = ()


class SourceLeaves(Leaves):
    """Of the source of one data set."""

    origin: str | None = None
    location: str | None = None
    fingerprint: str | None = None

    @model_validator(mode="after")
    def _named_where_it_is_shown(self) -> SourceLeaves:
        if self.origin in SHOWN_ORIGINS and self.location is None:
            raise ValueError(f"origin={self.origin} needs a location")
        return self


class IdentityLeaves(Leaves):
    """Of what decides a run's id."""

    files: dict[str, str] = _EMPTY


class ProvenanceLeaves(Leaves):
    """Of a record's provenance."""

    data: dict[str, SourceLeaves] = _EMPTY
    calibration: str | None = None
    prompts: str | None = None
    identity: IdentityLeaves | None = None


class EnvironmentLeaves(Leaves):
    """Of a record's environment."""

    threads: int | None = None
    versions: dict[str, str | None] = _EMPTY


def with_leaves(content: JsonObject, leaves: type[Leaves]) -> JsonObject:
    """Return a JSON object as it is; raise `ValueError` unless reports can read its values."""
    try:
        leaves.model_validate(content)
    except ValidationError as error:
        raise ValueError(first_fault(error)) from None
    return content


def flat_items(name: str, value: object) -> Iterator[tuple[str, object]]:
    """Yield the values of a JSON object by dotted name, below `name`; lists stay whole."""
    if isinstance(value, dict) and value:
        for key, inner in value.items():
            yield from flat_items(f"{name}.{key}", inner)
    else:
        yield name, value


def first_fault(error: ValidationError) -> str:
    """Return the key of the first fault and its reason; later ones are often its consequences."""
    fault = error.errors(include_input=False, include_url=False)[0]
    key = ".".join(map(str, fault["loc"]))
    reason = fault["msg"].removeprefix("Value error, ")
    return f"{key}: {reason[0].lower()}{reason[1:]}"

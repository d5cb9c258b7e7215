"""Typed configuration of a run; the only place where input is validated.

Hydra composes YAML; `validate` converts the result to a `RunConfig`. Nothing is checked again
later. Importing this module does not import torch.
"""

from __future__ import annotations

import copy
import json
import math
import re
from collections.abc import Iterator, Mapping
from inspect import isabstract
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from omegaconf import DictConfig, OmegaConf
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
)

from bench import plugins
from bench.config.gate import dotted_leaves
from bench.config.overrides import shipped_config
from bench.errors import (
    UserError,
    class_line,
    error_sentence,
    nearest,
    refuse_unclear_folder,
    source_line,
)
from bench.method import BudgetUnit, Method, RecipeConfig
from bench.records.files import refuse_unstorable
from bench.records.record import check_ratio
from bench.schema import (
    BenchmarkConfig,
    CalibrationConfig,
    CostsConfig,
    ModelConfig,
    PromptsConfig,
    TrackerConfig,
)
from bench.security import package_exists, redact, refuse_foreign_code, refuse_secret

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails


class RunConfig(BaseModel):
    """The complete config of one run; `method` keeps the order in which methods are applied."""

    model_config = ConfigDict(extra="forbid", frozen=True, arbitrary_types_allowed=True)

    model: ModelConfig
    method: dict[str, Method]
    benchmark: BenchmarkConfig
    calibration: CalibrationConfig
    prompts: PromptsConfig
    costs: CostsConfig
    tracker: TrackerConfig
    ratio: float | None = Field(default=None, ge=0, le=1)
    unit: BudgetUnit = "groups"
    recipe: RecipeConfig = RecipeConfig()
    seed: int = Field(default=1234, ge=0, lt=2**32)
    threads: int | None = Field(default=None, ge=1, le=4096)
    offline: bool = False
    force: bool = False
    results_dir: Path = Path("results")
    keep_weights: Literal["auto", True, False] = "auto"
    packages: tuple[str, ...] = ("methods",)
    objective: str = "average"

    @field_validator("keep_weights")
    @classmethod
    def _keep_what_can_be_loaded(cls, keep: object, info: ValidationInfo) -> object:
        model = info.data.get("model")
        if keep is True and model is not None and model.kind != "image_classifier":
            raise ValueError(
                f"only image classifiers are kept, and model={model.name} is a {model.kind}: use "
                "keep_weights=auto, and bench export RUN DIR"
            )
        return keep

    @field_validator("results_dir", mode="before")
    @classmethod
    def _is_a_clear_folder(cls, folder: object) -> object:
        return refuse_unclear_folder(folder)

    @property
    def uses_calibration(self) -> bool:
        """Whether any method of this run uses calibration text."""
        return any(method.uses_calibration for method in self.method.values())

    @property
    def uses_prompts(self) -> bool:
        """Whether any method of this run uses prompts with images."""
        return any(method.uses_prompts for method in self.method.values())

    def plain(self) -> dict[str, Any]:
        """Return the config as JSON values, each method with its knobs."""
        # Method by method, because pydantic would serialize them by their declared type `Method`,
        # which has no fields.
        plain: dict[str, Any] = self.model_dump(mode="json", exclude={"method"})
        plain["method"] = {name: m.model_dump(mode="json") for name, m in self.method.items()}
        return plain

    def identity(self) -> dict[str, Any]:
        """Return the part of the config that affects results; see `identity_of`."""
        return identity_of(
            self.plain(), calibrated=self.uses_calibration, prompted=self.uses_prompts
        )


def identity_of(plain: dict[str, Any], *, calibrated: bool, prompted: bool) -> dict[str, Any]:
    """Return the part of a config that affects results.

    `plain` is a run's config as JSON values, as stored in its record. Paths, threads, the tracker
    and options of execution are left out. `ratio`, `unit` and `recipe` are part of the methods that
    use them. Calibration and prompts count only if a method reads them, so that every sweep finds
    the same dense record. Settings of measurements count only if something is measured.
    """
    unwanted = {
        "tracker", "results_dir", "force", "offline", "threads", "ratio", "unit", "recipe",
        "objective", "method", "packages", "keep_weights",
    }  # fmt: skip
    if not calibrated:
        unwanted.add("calibration")
    if not prompted:
        unwanted.add("prompts")
    chosen = copy.deepcopy({key: value for key, value in plain.items() if key not in unwanted})
    # A path is only a location; the content is part of the run's id by its fingerprint.
    for group in ("model", "calibration", "prompts"):
        chosen.get(group, {}).pop("path", None)
    chosen["model"].pop("adapter", None)
    # A mapping from task to local data, of which only the tasks matter.
    chosen["benchmark"]["data"] = sorted(plain["benchmark"]["data"])
    for text in chosen["benchmark"]["perplexity"].values():
        text.pop("path")
        # Left out, because records from before the key existed do not have it.
        if text.get("windows") is None:
            text.pop("windows", None)
    # `costs` also has settings of counted costs, which are always recorded; these are kept.
    if not chosen["costs"]["measure"]:
        for key in ("measure", "timing"):
            chosen["costs"].pop(key)
    # The content of task folders is part of the id by the definitions of the tasks.
    for key in ("include", "trust_code"):
        chosen["benchmark"].pop(key, None)
    for key in ("folder", "download"):
        chosen["benchmark"]["images"].pop(key)
    # A list of pairs, because keys of objects are sorted before hashing but the order of methods
    # matters.
    chosen["method"] = [[name, knobs] for name, knobs in plain["method"].items()]
    return chosen


SECTIONS = ("model", "method", "benchmark", "calibration", "prompts", "costs", "tracker")
"""Keys of a run's config that are configs of a group."""


_METHOD_NAME = re.compile(r"\w[\w.+-]*")
"""Valid names in tables, labels and commands, where other characters have special meanings."""


def validated(composed: DictConfig) -> RunConfig:
    """Resolve and validate a composed config."""
    plain = OmegaConf.to_container(composed, resolve=True, throw_on_missing=True)
    assert isinstance(plain, dict)
    plain.pop("hydra", None)
    # Before validation, whose errors quote values.
    _refuse_secrets(plain)
    config = validate({str(key): value for key, value in plain.items()})
    _refuse_unstorable(config)
    return config


def _refuse_unstorable(config: RunConfig) -> None:
    """Raise if the run would end with a record that cannot be written and read again."""
    stored = config.plain()
    refuse_unstorable(stored, "")
    for name, knobs in stored["method"].items():
        if not _METHOD_NAME.fullmatch(name):
            raise UserError(f"method.{name}: a method's name has only letters, digits and . _ + -")
        try:
            check_ratio(knobs.get("ratio"))
        except ValueError as error:
            raise UserError(f"method.{name}.{error}: give other settings another name") from None


def _refuse_secrets(plain: object) -> None:
    """Raise if a value is a password or token of the user, because a record would store it."""
    # Usually one pass over all values; the key is searched only after a secret was found.
    together = "\n".join(str(value) for _, value in dotted_leaves(plain, ""))
    if redact(together) == together:
        return
    for key, value in dotted_leaves(plain, ""):
        refuse_secret(str(value), key)


def validate(composed: dict[str, Any]) -> RunConfig:
    """Convert a composed, resolved config to a `RunConfig`.

    Raises:
        UserError: an unknown key, a value out of range, or a `_target_` that is not a method.
    """
    chosen = dict(composed)
    for group in SECTIONS:
        if isinstance(name := chosen.get(group), str | list):
            raise UserError(
                f"{group}={name}: a config file chooses another one by the line "
                f"`- override /{group}: {name}` under its `defaults`, not by a value"
            )
    packages = chosen.get("packages", ["methods"])
    if not isinstance(packages, list) or not all(isinstance(name, str) for name in packages):
        raise UserError(
            f"packages={packages} is not a list of names, as in packages=[methods,mine]"
        )
    for name in packages:
        _refuse_absent_package(name)
    # Before any class is imported, because importing a module runs its code.
    refuse_foreign_code(chosen, (*packages, *plugins.active().packages))
    methods = chosen.pop("method", None) or {}
    if not isinstance(methods, dict):
        raise UserError(f"method={methods!r} names no methods, as in method=[camera_p,camera_q]")
    _refuse_unfit_numbers(RunConfig, chosen, ())
    chosen["method"] = {name: _build_method(name, knobs) for name, knobs in methods.items()}
    try:
        return RunConfig(**chosen)
    except ValidationError as error:
        raise _as_user_error(error, RunConfig, ()) from None


def _refuse_absent_package(name: str) -> None:
    """Raise unless a name in `packages` is that of a top-level package which can be imported."""
    first = name.partition(".")[0]
    if name != first:
        raise UserError(f"packages=[{name}] names a part of a package: give the whole, {first}")
    if not package_exists(name):
        raise UserError(f"packages=[{name}]: there is no package {name!r}: install it first")


def _build_method(name: str, knobs: object) -> Method:
    """Build a method from its config node, whose `_target_` names a `Method` class."""
    if not isinstance(knobs, dict) or "_target_" not in knobs:
        raise UserError(f"method.{name} is set but method={name} was not selected")
    fields = {key: value for key, value in knobs.items() if key != "_target_"}
    kind = method_class(name, knobs["_target_"])
    _refuse_unfit_numbers(kind, fields, ("method", name))
    try:
        method: Method = kind(**fields)
    except ValidationError as error:
        raise _as_user_error(error, kind, ("method", name)) from None
    return method


def method_class(name: str, target: str) -> type[Method]:
    """Import the class of a method, whose package must already be allowed.

    Raises:
        UserError: it cannot be imported, or is not a complete method; the message says where.
    """
    from hydra.utils import get_class

    place = f"method.{name}._target_={target}"
    try:
        kind: type = get_class(target)
    # Hydra imports the module here, and a plug-in's module may raise any exception.
    except Exception as error:
        cause = error.__cause__ or error
        module, _, missing = target.rpartition(".")
        # Hydra treats the last part as a module if the parent module has no such attribute.
        if isinstance(cause, ModuleNotFoundError) and cause.name == target:
            raise UserError(f"{place}: {module} has no class {missing}") from error
        line = source_line(cause, target.partition(".")[0])
        where = f" ({line})" if line else ""
        raise UserError(f"{place}: {error_sentence(cause)}{where}") from error
    if not issubclass(kind, Method):
        raise UserError(f"{place} is not a bench.method.Method: derive {class_line(kind)} from it")
    if isabstract(kind):
        missing = " and ".join(sorted(getattr(kind, "__abstractmethods__", ())))
        raise UserError(
            f"{place}: {class_line(kind)} does not define {missing}, which every "
            "bench.method.Method does"
        )
    return kind


def method_config(name: str, target: str) -> dict[str, object]:
    """Return the config of a method that a plug-in declares by its class.

    Every field is a knob with the class's default. As in the shipped configs, `ratio` and, in a
    method that trains a classifier by the run's recipe, the recipe, the unit of the ratio and the
    images are those of the run.
    """
    path = target.replace(":", ".")
    kind = method_class(name, path)
    knobs = kind.model_construct().model_dump(mode="json")
    required = {key: "???" for key, field in kind.model_fields.items() if field.is_required()}
    recipe = kind.model_fields.get("recipe")
    followed: dict[str, object] = {"ratio": "${ratio}"}
    if recipe is not None and recipe.annotation is RecipeConfig:
        for shared in ("_training", "_group_training"):
            knobs_of_run = shipped_config("method", shared).items()
            followed |= {key: value for key, value in knobs_of_run if "${" in str(value)}
    followed = {key: value for key, value in followed.items() if key in kind.model_fields}
    return {"_target_": path, **required, **knobs, **followed}


LARGEST_INTEGER = 2**63 - 1
"""No sensible count is larger, and libraries fail to convert larger integers."""


def _refuse_unfit_numbers(
    kind: type[BaseModel], values: Mapping[str, object], prefix: tuple[str, ...]
) -> None:
    """Raise for numbers that pydantic accepts: booleans, infinity, NaN, too large integers."""
    for name, value in values.items():
        field = kind.model_fields.get(name)
        if field is None:
            continue
        inner = field.annotation
        if isinstance(value, dict) and isinstance(inner, type) and issubclass(inner, BaseModel):
            _refuse_unfit_numbers(inner, value, (*prefix, name))
        if not _holds_number(inner):
            continue
        for number in value if isinstance(value, list) else [value]:
            fault = _number_fault(number)
            if fault is not None:
                key = ".".join((*prefix, name))
                raise UserError(f"{key}={str(value).lower()}: {fault}")


def _number_fault(value: object) -> str | None:
    if isinstance(value, bool):
        return "a number is needed"
    if isinstance(value, float) and not math.isfinite(value):
        return "a finite number is needed"
    if isinstance(value, int | float) and abs(value) > LARGEST_INTEGER:
        return f"numbers go up to {LARGEST_INTEGER}"
    return None


def _holds_number(annotation: object) -> bool:
    """Return whether a field's type includes numbers but no booleans."""
    kinds = list(_inner_types(annotation))
    return bool not in kinds and (int in kinds or float in kinds)


def _inner_types(annotation: object) -> Iterator[object]:
    yield annotation
    for inner in get_args(annotation):
        yield from _inner_types(inner)


_EXPECTED = "Input should be "
"""How pydantic starts a sentence about a value."""
_UNION_TAG = re.compile(r"(int|float|bool|str)$|[\w-]*(\[|-(int|float|str)$)")
"""How pydantic names the types of a union, in the place of a key."""


def _as_user_error(
    error: ValidationError, kind: type[BaseModel], prefix: tuple[str, ...]
) -> UserError:
    """Describe the first fault of a pydantic error: key, value, and what is allowed."""
    # Only the first fault, because later ones are often consequences of it.
    faults: list[ErrorDetails] = error.errors()
    fault = faults[0]
    path = [str(part) for part in fault["loc"]]
    # A value of a union has a fault per type, under a name given by pydantic.
    cut = next((at for at, part in enumerate(path) if at and _UNION_TAG.match(part)), len(path))
    same = [each["msg"] for each in faults if each["loc"][:cut] == fault["loc"][:cut]]
    if len(same) > 1:
        place = f"{'.'.join((*prefix, *path[:cut]))}={_as_written(fault['input'])}"
        own = [each for each in same if not each.startswith(_EXPECTED)]
        if own:
            return UserError(f"{place}: {own[0].removeprefix('Value error, ')}")
        choices = dict.fromkeys(each.removeprefix(_EXPECTED) for each in same)
        return UserError(f"{place}: {_EXPECTED.lower()}{', or '.join(choices)}")
    key = ".".join((*prefix, *path))
    if fault["type"] == "extra_forbidden":
        options = _allowed_fields(kind, path[:-1])
        close = nearest(path[-1], options)
        hint = f"did you mean {close!r}? " if close else ""
        return UserError(f"unknown key {key!r}: {hint}allowed: {', '.join(sorted(options))}")
    if fault["type"] == "missing":
        return UserError(f"{key} is missing: give {key}=...")
    # pydantic adds its own prefix to messages of our validators.
    message = fault["msg"].removeprefix("Value error, ")
    reason = message[0].lower() + message[1:]
    # A rule for several keys has the whole section as its input; its message names the keys.
    if isinstance(fault["input"], dict) and fault["type"] == "value_error":
        return UserError(f"{key}: {reason}")
    given = _as_written(fault["input"])
    if fault["type"] == "path_type":
        return UserError(f"{key}={given}: a path is needed, as a text: write {key}=./NAME")
    return UserError(f"{key}={given}: {reason}")


def _as_written(value: object) -> object:
    """Return a value as on the command line, with YAML's true, false and null."""
    return json.dumps(value) if value is None or isinstance(value, bool) else value


def _allowed_fields(kind: type[BaseModel], path: list[str]) -> list[str]:
    """Return the field names that a nested model allows at `path`."""
    for part in path:
        field = kind.model_fields.get(part)
        inner = field.annotation if field else None
        if not (isinstance(inner, type) and issubclass(inner, BaseModel)):
            return []
        kind = inner
    return list(kind.model_fields)

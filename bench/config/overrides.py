"""Arguments of `bench run`: flags, overrides read once by Hydra's own grammar, names of models.

A key may be written in several ways (`force=true`, `force=True`, `++force=true`, `"force='true'"`).
Here they all become the same key and value, so that no other code compares raw text.

`model=` accepts more than the names in conf/model: a hub id, a folder, a GGUF file, torchvision.
Hydra looks up a choice in its config sources, the last of which is `ModelNames`. For a value of the
group `model` without a file, it returns the config of `model=hub`, `model=local` or
`model=torchvision` with this value. For sweeps and records it is a choice like any other.
"""

from __future__ import annotations

import math
import os
import random
import re
import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from decimal import Decimal
from pathlib import Path, PurePath
from typing import Any, cast

from hydra.core.object_type import ObjectType
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, RangeSweep, ValueType
from hydra.errors import OverrideParseException
from hydra.plugins.config_source import ConfigResult, ConfigSource
from omegaconf import OmegaConf
from pydantic import TypeAdapter, ValidationError

from bench.errors import UserError, refuse_bare_text, unknown_name
from bench.security import CONFIG_DIR

MULTIRUN_FLAGS = ("-m", "--multirun")
_BOOLEAN = TypeAdapter(bool)


@dataclass(frozen=True)
class Overrides:
    """The arguments of a run or a sweep: whether a flag requests a sweep, and the overrides."""

    multirun: bool
    parsed: tuple[Override, ...]

    @classmethod
    def parse(cls, arguments: Sequence[str]) -> Overrides:
        """Read arguments, with flags anywhere among them.

        Raises:
            UserError: an unknown flag, or an argument that is not KEY=VALUE.
        """
        refuse_bare_text("overrides", arguments, 'bench.run(["model=micro_moe", "ratio=0.4"])')
        flags = [argument for argument in arguments if argument.startswith("-")]
        for flag in flags:
            if flag not in MULTIRUN_FLAGS:
                raise unknown_name("flag", flag, MULTIRUN_FLAGS)
        texts = [argument for argument in arguments if not argument.startswith("-")]
        for text in texts:
            _refuse_endless(text)
        try:
            parsed = tuple(OverridesParser.create().parse_overrides(texts))
        except OverrideParseException as error:
            raise parse_error(error) from None
        # Hydra's grammar allows it, but its config loader fails later.
        for text in (text_of(override) for override in parsed if not override.key_or_group):
            raise UserError(f"{text!r} has no key: write KEY=VALUE, as in ratio=0.4")
        return cls(bool(flags), parsed)

    @property
    def texts(self) -> list[str]:
        """The overrides as written, without flags."""
        return [text_of(override) for override in self.parsed]

    @property
    def arguments(self) -> list[str]:
        """The arguments in the order that Hydra's parser requires: flags first."""
        return [*MULTIRUN_FLAGS[: self.multirun], *self.texts]

    @property
    def of_hydra(self) -> list[str]:
        """The overrides of Hydra's own config, such as its launcher."""
        return [text_of(override) for override in self.parsed if _is_hydras(override)]

    @property
    def of_runs(self) -> list[str]:
        """The overrides of the run's config."""
        return [text_of(override) for override in self.parsed if not _is_hydras(override)]

    def setting(self, key: str) -> list[str]:
        """Return the overrides that set a key or anything below it."""
        return [text_of(override) for override in self.parsed if sets(override, key)]

    def without(self, key: str) -> Overrides:
        """Return the overrides that do not set a key or anything below it."""
        return replace(self, parsed=tuple(o for o in self.parsed if not sets(o, key)))

    def value(self, key: str) -> object:
        """Return the last value of a key; None if it is not set, deleted, or swept."""
        value = None
        for override in self.parsed:
            if override.key_or_group == key:
                value = None if override.is_sweep_override() else override.value()
        return cast(object, value)

    def is_true(self, key: str) -> bool:
        """Return whether a key is set to true, in any spelling that the config accepts."""
        try:
            return _BOOLEAN.validate_python(self.value(key))
        # If it is not a boolean (or not set), validation of the config reports it with the key.
        except ValidationError:
            return False

    def without_repeats(self) -> Overrides:
        """Return the overrides with each key only once, if repeated ones have equal values.

        Raises:
            UserError: a key has two different values, of which Hydra would silently use the last.
        """
        first: dict[str, Override] = {}
        for override in self.parsed:
            # A group may be in several places of the config.
            place = "" if override.package is None else f"@{override.package}"
            key = override.key_or_group.replace("/", ".") + place
            if _meaning(known := first.setdefault(key, override)) != _meaning(override):
                both = f"{text_of(known)} and {text_of(override)} both set {key}"
                raise UserError(f"{both}: give one of them")
        return replace(self, parsed=tuple(first.values()))

    def refuse_several_values(self) -> None:
        """Raise if a key has several values, which only a sweep can use."""
        for override in self.parsed:
            if override.is_sweep_override():
                text, key = text_of(override), override.get_key_element()
                value = text.partition("=")[2]
                other = f"write {quoted_override(text)} if this is one text"
                if key == "method":
                    # Nested lists, and lists that name a method twice, are not suggested.
                    names = list(dict.fromkeys(re.findall(r"[^][,\s]+", value)))
                    order = "them one after the other" if len(names) > 1 else "it"
                    other = f"method=[{','.join(names)}] applies {order}"
                raise UserError(
                    f"{text} gives {key} several values: add -m to run each of them; {other}"
                )

    def first_values(self) -> list[str]:
        """Return the overrides with each sweep reduced to its first value."""
        return [
            f"{override.get_key_element()}={next(sweep_values(override))}"
            if override.is_sweep_override()
            else text_of(override)
            for override in self.parsed
        ]


def _meaning(override: Override) -> tuple[object, str]:
    """Return the effect of an override on its key, with its value in a normal form."""
    # As text, because 1, 1.0 and True are equal in Python. Sweeps are kept as written.
    swept = override.is_sweep_override()
    return override.type, text_of(override).partition("=")[2] if swept else repr(override.value())


MAX_CHARACTERS, MAX_LEVELS, MAX_VALUES = 100_000, 30, 100_000
"""Limits of one argument, which may come from an untrusted plan: its length, the nesting of lists
and mappings, and the number of values of a range."""


def _refuse_endless(text: str) -> None:
    """Raise if an argument is so long or so nested that Hydra's parser would not terminate."""
    levels = deepest = 0
    for character in text[:MAX_CHARACTERS]:
        levels += (character in "[{(") - (character in "]})")
        deepest = max(deepest, levels)
    if len(text) > MAX_CHARACTERS or deepest > MAX_LEVELS:
        raise UserError(
            f"{text[:40]}...: an argument has at most {MAX_CHARACTERS:,} characters and "
            f"{MAX_LEVELS} levels of brackets; put larger values into a config file"
        )


def parse_error(error: OverrideParseException) -> UserError:
    """Build the error, with a cure, for an argument that Hydra's grammar cannot parse."""
    text = str(error.override)
    key, equals, _ = text.partition("=")
    if not equals:
        cure = "write it with its value, as in method=camera_p"
    elif not re.fullmatch(r"[~+]{0,2}[\w./@-]+", key):
        cure = "a key has letters, digits, dots and slashes, as in method.camera_p.ratio"
    else:
        cure = f"to give it as a text, quote it: {quoted_override(text)}"
    return UserError(f"{text} cannot be read as KEY=VALUE: {cure}")


def quoted_override(text: str) -> str:
    """Return KEY=VALUE quoted for a shell, with the value as a single text."""
    key, _, value = text.partition("=")
    word = f"{key}={quoted_text(value)}"
    # Double quotes are easier to read around Hydra's single ones, if a shell treats them alike.
    plain = not set(word) & set('"$`!') and "\\\\" not in word
    return f'"{word}"' if plain else shlex.quote(word)


def quoted_text(text: str) -> str:
    """Quote a text for Hydra's grammar, in which backslashes are special only before a quote."""
    # Backslashes directly before a quote are doubled and the quote is escaped. Trailing backslashes
    # are doubled too, because the closing quote follows them.
    escaped = re.sub(r"(\\*)(')", r"\1\1\\\2", text)
    escaped = re.sub(r"(\\+)$", r"\1\1", escaped)
    return f"'{escaped}'"


def text_of(override: Override) -> str:
    """Return an override as written."""
    return str(override.input_line)


def sweep_values(override: Override) -> Iterator[str]:
    """Yield the values of a sweep override; for an interval, its two ends."""
    if override.value_type == ValueType.INTERVAL_SWEEP:
        interval = override.value()
        yield from (str(interval.start), str(interval.end))
    elif override.value_type == ValueType.RANGE_SWEEP:
        numbers = range_numbers(override.value())
        if override.value().shuffle:
            random.shuffle(numbers)
        yield from map(str, numbers)
    else:
        yield from map(str, override.sweep_string_iterator())


def range_numbers(sweep: RangeSweep) -> list[int] | list[float]:
    """Return the numbers of a range in decimal: `range(0.1,0.35,0.1)` ends with 0.3.

    Hydra adds binary floats, which gives 0.30000000000000004: a different ratio, and so a different
    run, than 0.3.

    Raises:
        UserError: the step is 0 or not a number, or there are too many numbers.
    """
    start, stop, step = (Decimal(str(part)) for part in (sweep.start, sweep.stop, sweep.step))
    if not step or not (start.is_finite() and stop.is_finite() and step.is_finite()):
        raise UserError(f"range({start},{stop},{step}): the step must be a number other than 0")
    count = max(0, math.ceil((stop - start) / step))
    # Before they are listed, because a few zeros too many could exhaust the memory.
    if count > MAX_VALUES:
        raise UserError(
            f"range({start},{stop},{step}) has {count:,} values: a sweep takes {MAX_VALUES:,} at "
            "most; give a larger step"
        )
    numbers = [start + place * step for place in range(count)]
    if all(isinstance(part, int) for part in (sweep.start, sweep.stop, sweep.step)):
        return [int(number) for number in numbers]
    return [float(number) for number in numbers]


def refuse_endless_grid(values: Mapping[str, int], limit: object) -> None:
    """Raise if a grid has more jobs than `limit`; `values` is the number of values per key.

    Called before jobs are listed, because a few zeros too many could exhaust the memory.
    """
    if not isinstance(limit, int) or isinstance(limit, bool) or limit < 1:
        raise UserError(f"hydra.sweeper.max_jobs={limit}: a whole number from 1 on is needed")
    if (jobs := math.prod(values.values())) > limit:
        several = " x ".join(f"{count:,} of {key}" for key, count in values.items() if count > 1)
        raise UserError(
            f"the sweep has {jobs:,} jobs ({several}), more than hydra.sweeper.max_jobs={limit}: "
            "give fewer values, or raise it"
        )


def sets(override: Override, key: str) -> bool:
    """Return whether an override sets a key, anything below it, or a mapping that contains it."""
    own = override.key_or_group.replace("/", ".")
    if own == key or own.startswith(f"{key}."):
        return True
    if not key.startswith(f"{own}.") or override.is_sweep_override():
        return False
    node: object = override.value()
    for part in key.removeprefix(f"{own}.").split("."):
        # Keys of a mapping may also have dots, for example in `hydra.sweeper.params`.
        if not isinstance(node, dict) or part not in node:
            return False
        node = node[part]
    return True


def _is_hydras(override: Override) -> bool:
    return sets(override, "hydra")


_PLAIN_WORD = re.compile(r"(?!(?:true|false|null|nan|inf)$)[A-Za-z_./][\w./-]*", re.IGNORECASE)
"""Texts that Hydra's grammar reads unchanged; all others are quoted."""


def keyword_overrides(given: Mapping[str, object], over: Mapping[str, object]) -> list[str]:
    """Return overrides for keyword arguments, and sweeps for the lists in `over`.

    >>> keyword_overrides({"method": ["a", "b"], "costs": {"length": 64}}, {"ratio": [0.2, 0.4]})
    ['method=[a,b]', 'costs.length=64', '-m', 'ratio=0.2,0.4']

    Raises:
            UserError: the type of a value is not possible in a config, or a sweep has no values.
    """
    words = [word for key, value in given.items() for word in _leaf_overrides(key, value)]
    sweeps = []
    for key, values in over.items():
        if isinstance(values, str) or not isinstance(values, Iterable):
            raise UserError(f"over: {key}={values!r} is not a list of values, as in [0.2, 0.4]")
        texts = [_value_text(key, value) for value in values]
        if not texts:
            raise UserError(f"over: {key} has no values")
        sweeps.append(f"{key}={','.join(texts)}")
    return [*words, *(["-m"] if sweeps else []), *sweeps]


def _leaf_overrides(key: str, value: object) -> Iterator[str]:
    if isinstance(value, Mapping) and value:
        for name, inner in value.items():
            yield from _leaf_overrides(f"{key}.{name}", inner)
    else:
        yield f"{key}={_value_text(key, value)}"


def _value_text(key: str, value: Any) -> str:
    """Write a Python value in Hydra's grammar; scalars of numpy or torch become plain numbers."""
    value = value.item() if getattr(value, "ndim", None) == 0 else value
    if value is None or isinstance(value, bool):
        return "null" if value is None else str(value).lower()
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, str | PurePath):
        text = str(value)
        return text if _PLAIN_WORD.fullmatch(text) else quoted_text(text)
    if isinstance(value, list | tuple):
        return f"[{','.join(_value_text(key, inner) for inner in value)}]"
    if isinstance(value, Mapping):
        inner = (f"{_value_text(key, k)}:{_value_text(key, v)}" for k, v in value.items())
        return f"{{{','.join(inner)}}}"
    raise UserError(
        f"{key}={value!r} is a {type(value).__name__}: give a text, a number, a list or a mapping"
    )


GROUP = "model"
ACCEPTED = "a hub id as ORG/NAME, a model folder, FILE.gguf, or torchvision/NAME"
SCHEME = "slimbench-models"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_TORCHVISION = "torchvision/"
_WITH_REVISION = re.compile(rf"({_HUB_ID.pattern}|\w[\w.-]*)[@:](\w[\w./-]*)")
_ADDRESS = re.compile(
    rf"(?:https?://(?:www\.)?(?:huggingface\.co|hf\.co)|hf:/)/(?:models/)?({_HUB_ID.pattern})"
    r"(?:/(?:tree|blob|resolve)/([\w.-]+).*|@([\w.-]+))?/?"
)


def model_config(value: str) -> dict[str, object] | None:
    """Return the config for a value of `model=`, None if the value is not a model.

    As in transformers, an existing folder takes precedence over a hub id of the same form.
    """
    if value.startswith(_TORCHVISION):
        source = f"torchvision:{value.removeprefix(_TORCHVISION)}"
        return shipped_config(GROUP, "torchvision", name=value, source=source)
    if _is_path(value):
        return shipped_config(GROUP, "local", name=_path_name(Path(value)), path=value)
    if _HUB_ID.fullmatch(value):
        return shipped_config(GROUP, "hub", name=value, source=value)
    return None


def correction(value: str) -> str | None:
    """Return the correct form for a model that was given with its revision or as a URL."""
    found = _ADDRESS.fullmatch(value) or _WITH_REVISION.fullmatch(value)
    if found is None:
        return None
    name, *revisions = found.groups()
    revision = next(filter(None, revisions), None)
    return f"model={name}" + (f" model.revision={revision}" if revision else "")


def is_own_path(value: str) -> bool:
    """Return whether a value is a path instead of a choice in Hydra's config tree."""
    return _is_path(value) and not (CONFIG_DIR / GROUP / f"{value}.yaml").is_file()


def _is_path(value: str) -> bool:
    # A value in the form of a path counts as one even if it does not exist, so that the error is
    # about a missing file instead of an unknown model.
    if value.endswith(".gguf") or value.startswith(("./", "../", "/", "~")) or value in (".", ".."):
        return True
    folder = Path(value)
    return folder.is_dir() and ("/" in value or (folder / "config.json").is_file())


def _path_name(path: Path) -> str:
    """Return the name of a model folder or file in tables and figures."""
    # Normalised as text only, because a link is shown under the name that the user gave.
    absolute = Path(os.path.normpath(path.expanduser().absolute()))
    return absolute.stem if absolute.suffix == ".gguf" else absolute.name


def shipped_config(group: str, file: str, /, **changed: object) -> dict[str, object]:
    """Return a shipped file unresolved, because interpolations refer to the run's config."""
    plain = OmegaConf.to_container(OmegaConf.load(CONFIG_DIR / group / f"{file}.yaml"))
    assert isinstance(plain, dict)
    return {str(key): value for key, value in plain.items()} | changed


class ModelNames(ConfigSource):  # type: ignore[misc]  # Hydra has no types
    """Source of Hydra configs for models that have no file in conf/model."""

    @staticmethod
    def scheme() -> str:
        """Return the scheme under which the search path names this source."""
        return SCHEME

    def load_config(self, config_path: str) -> ConfigResult:
        """Return the config of `model/VALUE`."""
        config = model_config(_value(config_path) or "")
        assert config is not None  # Hydra calls `is_config` first.
        return ConfigResult(
            provider=self.provider,
            path=f"{SCHEME}://",
            config=OmegaConf.create(config),
            header={"package": None},
        )

    def is_config(self, config_path: str) -> bool:
        """Return whether this is `model/VALUE` with a valid value."""
        value = _value(config_path)
        return value is not None and model_config(value) is not None

    def is_group(self, config_path: str) -> bool:
        """Return False: the values cannot be listed."""
        return False

    def list(self, config_path: str, results_filter: ObjectType | None) -> list[str]:
        """Return nothing, so that only names in conf/model are listed."""
        return []

    def available(self) -> bool:
        """Return True, because nothing can be missing."""
        return True


def _value(config_path: str) -> str | None:
    group, slash, value = config_path.partition("/")
    return value if group == GROUP and slash else None

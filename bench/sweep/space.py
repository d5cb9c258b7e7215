"""Optuna distributions from Hydra's sweep syntax."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from bench.errors import UserError

if TYPE_CHECKING:
    from hydra.core.override_parser.types import Override


def distributions(overrides: Iterable[Override]) -> tuple[dict[str, Any], list[str]]:
    """Return a distribution per swept key, and the remaining overrides unchanged.

    Raises:
        UserError: no key is swept, or a range is empty or invalid.
    """
    from hydra.core.override_parser.types import ValueType

    space: dict[str, Any] = {}
    fixed: list[str] = []
    for override in overrides:
        key = override.get_key_element()
        if not override.is_sweep_override():
            fixed.append(f"{key}={override.get_value_element_as_str()}")
        elif override.value_type == ValueType.INTERVAL_SWEEP:
            space[key] = _interval(key, override.value())
        elif override.value_type == ValueType.RANGE_SWEEP:
            space[key] = _range(key, override.value())
        else:
            space[key] = _choice(override)
    if not space:
        raise UserError("a search needs a range: set hydra.sweeper.space.KEY='interval(0.1,0.7)'")
    return space, fixed


def _interval(key: str, interval: Any) -> Any:
    # Hydra's intervals are of real numbers; integers are searched with `range`.
    from optuna.distributions import FloatDistribution

    low, high = interval.start, interval.end
    try:
        return FloatDistribution(low, high, log="log" in interval.tags)
    except ValueError as error:
        raise UserError(f"{key}=interval({low},{high}): {error}") from None


def _range(key: str, values: Any) -> Any:
    from optuna.distributions import FloatDistribution, IntDistribution

    # The end is exclusive as in Python, but Optuna's bounds are inclusive: pass the last value.
    numbers = list(values.range())
    if not numbers:
        raise UserError(f"{key}: the range is empty")
    if all(isinstance(number, int) for number in numbers):
        return IntDistribution(numbers[0], numbers[-1], step=int(values.step))
    return FloatDistribution(numbers[0], numbers[-1], step=float(values.step))


def _choice(override: Override) -> Any:
    from optuna.distributions import CategoricalDistribution

    return CategoricalDistribution([str(value) for value in override.sweep_string_iterator()])

"""Hardware: the rates in its data sheet, and the shares of them that are reached.

`conf/hardware/NAME.yaml` describes a board; `here` is the machine that makes the estimate.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeAlias, cast

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, PositiveFloat, ValidationError

from bench import plugins
from bench.errors import UserError, error_sentence
from bench.security import CONFIG_DIR

HERE = "here"
_GROUP = "hardware"


def _rising(bounds: tuple[float, float]) -> tuple[float, float]:
    if bounds[0] > bounds[1]:
        raise ValueError(f"a range goes from low to high, not from {bounds[0]:g} to {bounds[1]:g}")
    return bounds


Bounds: TypeAlias = Annotated[tuple[PositiveFloat, PositiveFloat], AfterValidator(_rising)]
"""Lower and upper bound."""


class _FrozenModel(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Utilisation(_FrozenModel):
    """Reached shares of peak rates per kind of operation, as lower and upper bounds.

    `matrix` and `attention` are shares of the dtype's peak rate, `memory` of the bandwidth, and
    `link` of the host link.
    """

    matrix: Bounds
    attention: Bounds
    memory: Bounds
    link: Bounds


class HardwareConfig(_FrozenModel):
    """One entry of `conf/hardware`.

    `peak` is FLOP/s of dense products by dtype. `bandwidth` and `link` are bytes/s (the link in one
    direction; None on a CPU, where weights are always in its memory), `memory` is bytes, `disk` is
    bytes/s, and `power` is W at full load (None if unknown). The others are seconds: `operator` of
    Python and launch per operator, `request` of the harness per request, and `start` per phase that
    builds a network.
    """

    name: str
    device: Literal["cuda", "cpu"]
    peak: dict[Literal["float32", "bfloat16", "float16"], PositiveFloat] = Field(min_length=1)
    bandwidth: PositiveFloat
    memory: PositiveFloat
    link: PositiveFloat | None = None
    power: PositiveFloat | None = None
    utilisation: Utilisation
    operator: Bounds
    request: Bounds
    start: Bounds
    disk: Bounds

    def rate(self, dtype: str) -> float:
        """Return the peak FLOP/s in a dtype.

        Raises:
            UserError: the board's file has no rate for it.
        """
        for name, peak in self.peak.items():
            if name == dtype:
                return peak
        raise UserError(
            f"hardware={self.name} has no rate for model.dtype={dtype}: "
            f"choose {' or '.join(self.peak)}"
        )


def load_assumptions() -> dict[str, Any]:
    """Return values that no data sheet states, from the file `_assumptions.yaml`."""
    return load_file("_assumptions")


def board_names() -> list[str]:
    """Return the names of the boards that have a file, shipped or of a plug-in."""
    folders = (folder / _GROUP for folder in (CONFIG_DIR, *plugins.active().configs))
    return sorted({file.stem for each in folders for file in each.glob("[!_]*.yaml")})


def load_board(name: str) -> HardwareConfig:
    """Return the board of a file; what the file does not state is assumed.

    Raises:
        UserError: the file, which may be a plug-in's, is no description of a board.
    """
    try:
        return HardwareConfig.model_validate({**load_assumptions(), **load_file(name)})
    except ValidationError as error:
        fault = error.errors()[0]
        key = ".".join(map(str, fault["loc"]))
        raise UserError(
            f"{plugins.config_file(_GROUP, name)}: {key}: {fault['msg'].lower()}: write it as in "
            f"{CONFIG_DIR / _GROUP / 'h100.yaml'}"
        ) from None


def load_file(name: str) -> dict[str, Any]:
    """Return the content of a file of `conf/hardware`, shipped or of a plug-in."""
    # Loaded here instead of by Hydra, because hardware does not affect results and so is not part
    # of a run's config.
    from omegaconf import OmegaConf
    from yaml import YAMLError  # type: ignore[import-untyped]

    file = plugins.config_file(_GROUP, name)
    assert file is not None  # Names come from `board_names`.
    try:
        content = OmegaConf.to_container(OmegaConf.load(file))
    except (OSError, ValueError, YAMLError, RecursionError) as error:
        raise UserError(f"{file} cannot be read as YAML: {error_sentence(error)}") from None
    if not isinstance(content, dict):
        raise UserError(f"{file} has no keys: write it as in {CONFIG_DIR / _GROUP / 'h100.yaml'}")
    return cast(dict[str, Any], content)

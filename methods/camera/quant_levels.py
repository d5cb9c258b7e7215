"""The knobs that CAMERA-Q and its ablation have in common: bits, their shares, an exact mean."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction

from pydantic import Field, ValidationInfo, field_validator

from bench.method import Context
from bench.models.anatomy import MoEBlock
from bench.models.model import Model
from bench.models.packed import Level
from methods.camera.alpha import Alpha, weight_of_peak
from methods.quantization.levels import exact, level_sizes, mean_of
from methods.quantization.method import Choices, MoEQuantization
from methods.quantization.observers import Planner


class MixedBits(MoEQuantization):
    """A method with several bit widths and an exact mean.

    `shares` are the proportions in which the parts get each of `bits`; without them the
    proportions are as even as `mean_bits` allows. With both, they must agree. The default, 2 bits
    in the mean and 2.25 with the grids of groups of 128, has the shares that a later comparison
    used for CAMERA-Q (DartMoQP); the paper's are not known.

    `alpha` weighs the peak in the energy, and `normalised` takes the mean over tokens for the
    sum, both as in CAMERA-P.
    """

    bits: Choices = (3, 2, 1)
    shares: tuple[float, ...] | None = (0.125, 0.75, 0.125)
    mean_bits: float | None = Field(default=None, validate_default=True)
    alpha: Alpha = "paper"
    normalised: bool = False

    @field_validator("shares")
    @classmethod
    def _one_each(
        cls, shares: tuple[float, ...] | None, others: ValidationInfo
    ) -> tuple[float, ...] | None:
        if shares is not None:
            if len(shares) != len(others.data.get("bits", shares)):
                raise ValueError("give one share for each of bits")
            if not all(0 <= share < float("inf") for share in shares) or not any(shares):
                raise ValueError("shares are not negative, and not all zero")
        return shares

    @field_validator("mean_bits")
    @classmethod
    def _can_be_given(cls, mean: float | None, others: ValidationInfo) -> float | None:
        if not {"bits", "shares"} <= others.data.keys():
            return mean
        bits, shares = others.data["bits"], others.data["shares"]
        if mean is None:
            if shares is None:
                raise ValueError("give shares or mean_bits")
        elif not bits[-1] <= mean <= bits[0]:
            raise ValueError(f"bits from {bits[-1]} to {bits[0]} cannot give this mean")
        elif shares is not None and mean_of(bits, shares) != exact(mean):
            implied = float(mean_of(bits, shares))
            raise ValueError(f"bits={list(bits)} in shares={list(shares)} have a mean of {implied}")
        return mean

    def planners(self, model: Model, context: Context) -> Callable[[MoEBlock], Planner]:
        """Return what makes planners, with α as it is for this model."""
        alpha = weight_of_peak(self.alpha, model.anatomy.model_type)
        return self.model_copy(update={"alpha": alpha}).planner

    @property
    def peak(self) -> float:
        """The number that α is for the model at hand."""
        assert not isinstance(self.alpha, str)
        return self.alpha

    @property
    def mean(self) -> Fraction:
        """The exact mean that was asked for."""
        if self.mean_bits is not None:
            return exact(self.mean_bits)
        assert self.shares is not None
        return mean_of(self.bits, self.shares)

    def levels(self, count: int) -> list[Level]:
        """Return how many of `count` parts get how many bits."""
        sizes = level_sizes(self.bits, self.shares, self.mean, count)
        return [Level(*level) for level in zip(self.bits, sizes, strict=True)]

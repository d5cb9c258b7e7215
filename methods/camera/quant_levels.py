"""Options shared by CAMERA-Q and its ablation: bits, their shares, an exact mean."""

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

    `shares` are the proportions of the parts that get each of `bits`; without them the proportions
    are as even as `mean_bits` allows. If both are given they must agree. The default, a mean of 2
    bits, or 2.25 with the grids of groups of 128, has the shares that a later comparison used for
    CAMERA-Q (DartMoQP); the paper's are not known.

    `alpha` weighs the peak term of the energy, and `normalised` replaces the sum over tokens by
    their mean, both as in CAMERA-P.
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
                raise ValueError("give as many shares as bits")
            if not all(0 <= share < float("inf") for share in shares) or not any(shares):
                raise ValueError("shares must be finite, not negative, and not all zero")
        return shares

    @field_validator("mean_bits")
    @classmethod
    def _can_be_given(cls, mean: float | None, others: ValidationInfo) -> float | None:
        # Fields that failed validation are missing here; their own errors are reported instead.
        if not {"bits", "shares"} <= others.data.keys():
            return mean
        bits, shares = others.data["bits"], others.data["shares"]
        if mean is None:
            if shares is None:
                raise ValueError("set shares or mean_bits")
        elif not bits[-1] <= mean <= bits[0]:
            raise ValueError(f"mean_bits={mean} must be between {bits[-1]} and {bits[0]}")
        # Compared as fractions: float means of the same decimals need not be equal.
        elif shares is not None and mean_of(bits, shares) != exact(mean):
            implied = float(mean_of(bits, shares))
            raise ValueError(f"bits={list(bits)} with shares={list(shares)} have mean {implied}")
        return mean

    def planners(self, model: Model, context: Context) -> Callable[[MoEBlock], Planner]:
        """Return the factory of planners, with α resolved for this model."""
        # On a copy: this object is the user's config and keeps the name given there.
        alpha = weight_of_peak(self.alpha, model.anatomy.model_type)
        return self.model_copy(update={"alpha": alpha}).planner

    @property
    def peak(self) -> float:
        """The resolved number α."""
        assert not isinstance(self.alpha, str)
        return self.alpha

    @property
    def mean(self) -> Fraction:
        """The exact mean of the bits."""
        if self.mean_bits is not None:
            return exact(self.mean_bits)
        assert self.shares is not None
        return mean_of(self.bits, self.shares)

    def levels(self, count: int) -> list[Level]:
        """Return how many of `count` parts get how many bits."""
        sizes = level_sizes(self.bits, self.shares, self.mean, count)
        return [Level(*level) for level in zip(self.bits, sizes, strict=True)]

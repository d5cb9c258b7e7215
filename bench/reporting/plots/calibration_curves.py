"""Calibration curves: accuracy by confidence."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bench.errors import UserError
from bench.reporting.comparison import ComparedRun
from bench.reporting.plots.style import GREY, SeriesStyle, add_legend, draw_panels, series_styles
from bench.reporting.record_numbers import NORMAL_QUANTILE, benchmark_names, model_text

BINS = 10


def answer_confidences(samples: pd.DataFrame) -> pd.DataFrame:
    """Return `confidence` and `right` for every sample with several possible answers.

    The confidence in a choice is the softmax of the choices' log-likelihoods; the confidence in a
    class is the classifier's probability. Generated answers have none. `right` is the score that
    the task's accuracy averages.
    """
    # Generation tasks have no accuracy, and an interrupted store may have no samples.
    if samples.empty or not {"acc", "loglikelihoods"} <= set(samples):
        return pd.DataFrame(columns=["confidence", "right"])
    graded = samples[samples["acc"].notna()].astype({"acc": float})
    # A single log-likelihood is that of a text instead of a choice, and its softmax is always 1.
    scores = graded["loglikelihoods"].map(len) > 1
    chosen = graded[scores]["loglikelihoods"].map(_highest_share)
    found = [pd.DataFrame({"confidence": chosen, "right": graded[scores]["acc"]})]
    if "probability" in graded:
        classified = graded.dropna(subset=["probability"])
        found.append(
            pd.DataFrame({"confidence": classified["probability"], "right": classified["acc"]})
        )
    answers = pd.concat(found).astype(float)
    # A network that overflows gives no number, or -inf for every choice.
    return answers[answers["confidence"].between(0, 1)]


def _highest_share(loglikelihoods: np.ndarray) -> float:
    """Return the softmax of the largest entry."""
    value_C = np.asarray(loglikelihoods, dtype=float)
    # Shifted by the maximum to avoid underflow, so the largest term is exp(0) = 1.
    with np.errstate(invalid="ignore"):  # -inf for all of them gives NaN.
        return float(1 / np.exp(value_C - value_C.max()).sum())


def bin_answers(answers: pd.DataFrame) -> pd.DataFrame:
    """Return mean confidence, accuracy and size of each bin of equal width."""
    # A confidence of exactly 1 belongs to the last bin.
    bin_of_answer = np.minimum((answers["confidence"] * BINS).astype(int), BINS - 1)
    grouped = answers.groupby(bin_of_answer)
    means = grouped.mean().rename(columns={"right": "accuracy"})
    return means.assign(n=grouped.size()).rename_axis("bin").reset_index()


def wilson_interval(share: pd.Series, n: pd.Series) -> tuple[pd.Series, pd.Series]:
    """Return the 95 % interval of a share of n answers, which is within 0 and 1.

    Source: Wilson, J. Am. Stat. Assoc. 22 (1927), 209-212.
    """
    squared = NORMAL_QUANTILE**2
    centre = (share + squared / (2 * n)) / (1 + squared / n)
    half = (
        NORMAL_QUANTILE
        / (1 + squared / n)
        * np.sqrt(share * (1 - share) / n + squared / (4 * n**2))
    )
    return centre - half, centre + half


def expected_calibration_error(bins: pd.DataFrame) -> float:
    """Return the expected calibration error: the mean gap of the bins, weighted by their size.

    Source: Naeini, Cooper and Hauskrecht (AAAI 2015); Guo et al., arXiv 1706.04599, equation 3.
    """
    gap = (bins["accuracy"] - bins["confidence"]).abs()
    return float((gap * bins["n"]).sum() / bins["n"].sum())


def confidence_curves(runs: Sequence[ComparedRun]) -> pd.DataFrame:
    """Return the bins of every run, with its expected calibration error.

    Raises:
        UserError: no run has answers with probabilities.
    """
    frames = []
    scored = benchmark_names([run.record for run in runs])
    for run in runs:
        answers = answer_confidences(run.samples)
        if answers.empty:
            continue
        bins = bin_answers(answers)
        frames.append(
            bins.assign(
                run=run.record.id,
                model=model_text(run.record),
                benchmark=scored[run.record.id],
                name="dense"
                if run.record.is_dense
                else f"{run.record.label} ({run.record.id[:8]})",
                expected_error=expected_calibration_error(bins),
            )
        )
    if not frames:
        raise UserError("none of the runs scores choices or classes: no answer has a probability")
    return pd.concat(frames, ignore_index=True)


def draw_calibration(frame: pd.DataFrame) -> Figure:
    """Draw the rows of `confidence_curves`; on the diagonal, accuracy equals confidence.

    Bars are 95 % intervals; the grey columns show the number of answers in each bin.
    """
    styles = series_styles(frame["name"])
    figure, axes = draw_panels(
        frame, lambda axes, rows: _draw_calibration_panel(axes, rows, styles)
    )
    # Panels are nearly square, so that the diagonal has a slope of about 45°.
    figure.set_figheight(4)
    # matplotlib's own list of handles leaves out labels that begin with an underscore.
    handles = [curve for each in axes for curve in each.containers]
    add_legend(figure, handles, title="expected calibration error")
    return figure


def _draw_calibration_panel(
    axes: Axes, group: pd.DataFrame, styles: dict[str, SeriesStyle]
) -> None:
    axes.plot([0, 1], [0, 1], color=GREY, linewidth=0.8)
    for name, line in group.groupby("name", sort=False):
        look = styles[str(name)]
        low, high = wilson_interval(line["accuracy"], line["n"])
        # Rounding may put an end slightly beyond a share of exactly 0 or 1.
        below = (line["accuracy"] - low).clip(lower=0)
        above = (high - line["accuracy"]).clip(lower=0)
        axes.errorbar(
            line["confidence"], line["accuracy"], yerr=[below, above], color=look.colour,
            marker=look.marker, linestyle=look.line, elinewidth=0.8,
            label=f"{name}: {line['expected_error'].iloc[0]:.3f}",
        )  # fmt: skip
    axes.set_xlabel("confidence (probability of the answer)")
    axes.set_ylabel("accuracy")
    axes.set_xlim(0, 1.02)
    axes.set_ylim(-0.02, 1.02)
    _draw_counts(axes, group)


def _draw_counts(axes: Axes, group: pd.DataFrame) -> None:
    """Draw the mean number of answers per bin and run, in the lower quarter of the panel."""
    counts = group.groupby("bin")["n"].sum() / group["name"].nunique()
    columns = axes.twinx()
    columns.bar(
        (counts.index + 0.5) / BINS, counts, width=0.9 / BINS, color=GREY, alpha=0.25, linewidth=0
    )
    columns.set_ylim(0, 4 * counts.max())
    columns.set_yticks([0, int(counts.max())])
    columns.set_ylabel("answers per bin", loc="bottom")
    columns.grid(visible=False)
    columns.spines["right"].set_visible(False)
    # The curves are more important, so the columns are drawn behind them.
    axes.set_zorder(columns.get_zorder() + 1)
    axes.patch.set_visible(False)

"""The arithmetic that budgets are about: the shares that the paper's settings leave."""

import pytest

from methods.visual_engine.cost.closed_form import (
    DecoderShape,
    LayerCost,
    PromptLengths,
    last_visual_layer,
    mean_neighbours,
    visual_share,
)
from methods.visual_tokens.head_pruning import RELEASED_HEAD_COUNTS

SEVEN = DecoderShape(4096, 32, 32, 128, (11008,) * 32)
THIRTEEN = DecoderShape(5120, 40, 40, 128, (13824,) * 40)

# Heads that the released 13B masks keep in the 20 layers below the cut .
THIRTEEN_30 = [40, 40, 40, 38, 31, 32, 29, 27, 33, 29, 33, 28, 33, 32, 32, 34, 39, 33, 32, 35]
THIRTEEN_20 = [40, 40, 29, 24, 7, 21, 16, 11, 21, 21, 19, 20, 23, 28, 24, 25, 32, 26, 26, 25]

# The linear share with heads as in the label, with the heads that the released masks keep
# below the cut, and with only keys and values made of visual rows in their last layer.
CONFIGURATIONS = [
    (SEVEN, 24, RELEASED_HEAD_COUNTS["llava_7b_24"][:16], 1 / 2, 0.285, 0.297, 0.282),
    (SEVEN, 16, RELEASED_HEAD_COUNTS["llava_7b_16"][:16], 1 / 4, 0.163, 0.169, 0.160),
    (THIRTEEN, 30, THIRTEEN_30, 1 / 2, 0.286, 0.301, 0.289),
    (THIRTEEN, 20, THIRTEEN_20, 1 / 4, 0.164, 0.179, 0.173),
]
ALONE, SEEING = (
    PromptLengths(576, 0, 0, 0.0),
    PromptLengths(576, 35, 64, mean_neighbours(24, 24, 2)),
)


def linear(shape, heads, neurons, prompt, *, last=False):
    """A configuration of the paper, half of the layers, counted linearly in heads."""
    work = [LayerCost(kept, kept, kept, shape.widths[0] * neurons) for kept in heads]
    if last:
        work[-1] = last_visual_layer(work[-1])
    work += [LayerCost.none()] * (shape.depth - len(heads))
    return visual_share(shape, work, prompt)


@pytest.mark.parametrize("shape, label, masks, neurons, by_label, by_masks, made", CONFIGURATIONS)
def test_linear_shares_of_the_papers_configurations(
    shape, label, masks, neurons, by_label, by_masks, made
):
    nominal = [label] * (shape.depth // 2)
    assert linear(shape, nominal, neurons, ALONE) == pytest.approx(by_label, abs=1e-3)
    assert linear(shape, masks, neurons, SEEING) == pytest.approx(by_masks, abs=6e-4)
    assert linear(shape, masks, neurons, SEEING, last=True) == pytest.approx(made, abs=6e-4)


def test_mean_neighbours():
    assert mean_neighbours(24, 24, 2) == pytest.approx(22.56, abs=5e-3)
    assert mean_neighbours(3, 3, 9) == 9

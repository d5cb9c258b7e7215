"""The arithmetic of cost: the paper's own figures, and what a dispatcher really counts."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from methods.visual_tokens.cost import (
    LayerWork,
    Prompt,
    Shape,
    dense_work,
    last_visual,
    mean_neighbours,
    paper_flops,
    paper_share,
    prefill_flops,
    stock_flops,
    visual_share,
)
from methods.visual_tokens.engine import engine_of
from methods.visual_tokens.plan import Window
from methods.visual_tokens.work import shape_of, work_of
from tests.methods.visual_tokens.tiny_mllms import build, prompt

SEVEN = Shape(4096, 32, 32, 128, (11008,) * 32, 32000)
THIRTEEN = Shape(5120, 40, 40, 128, (13824,) * 40, 32000)


def linear(shape, kept, cut, neurons, *, last):
    """The paper's configuration counted linearly in heads."""
    one = LayerWork(*[round(kept * shape.heads)] * 3, shape.widths[0] * neurons)
    work = [one] * cut + [LayerWork.none()] * (shape.depth - cut)
    if last:
        work[cut - 1] = last_visual(one)
    return visual_share(shape, work, Prompt(576, 0, 0, 0.0))


def test_the_papers_full_counts():
    assert paper_flops(32, 4096, 11008, 576) / 1e12 == pytest.approx(7.634, abs=5e-4)
    assert paper_flops(40, 5120, 13824, 576) / 1e12 == pytest.approx(14.888, abs=5e-4)


@pytest.mark.parametrize(
    "shape, kept, cut, neurons, share",
    [
        (SEVEN, 0.75, 16, 1 / 2, 0.285),
        (SEVEN, 0.5, 16, 1 / 4, 0.163),
        (THIRTEEN, 0.75, 20, 1 / 2, 0.286),
        (THIRTEEN, 0.5, 20, 1 / 4, 0.164),
    ],
)
def test_linear_shares_of_the_papers_configurations(shape, kept, cut, neurons, share):
    assert linear(shape, kept, cut, neurons, last=False) == pytest.approx(share, abs=1e-3)
    assert linear(shape, kept, cut, neurons, last=True) < share


@pytest.mark.parametrize(
    "depth, heads, layers, neurons, label",
    [(32, 0.75, 16, 1 / 2, 0.254), (32, 0.5, 16, 1 / 4, 0.122), (40, 0.5, 20, 1 / 4, 0.123)],
)
def test_labels_follow_from_squared_heads(depth, heads, layers, neurons, label):
    width, inner = (4096, 11008) if depth == 32 else (5120, 13824)
    share = paper_share(depth, width, inner, 576, layers=layers, heads=heads, neurons=neurons)
    assert share == pytest.approx(label, abs=1e-3)


def test_mean_neighbours():
    assert mean_neighbours(24, 24, 2) == pytest.approx(22.56, abs=5e-3)
    assert mean_neighbours(3, 3, 9) == 9


@pytest.mark.parametrize("name", ["llava_llama", "internvl_qwen2"])
@pytest.mark.parametrize("planned", [False, True])
def test_projections_and_feed_forwards_are_what_really_runs(name, planned):
    """Linear products by torch's own counter; attention on a CPU is invisible to it."""
    network = build(name)
    engine = engine_of(network)
    call = prompt(name, [6, (5, 5), 4])
    shape = shape_of(engine)
    visual = int((call["input_ids"] == 60).sum())
    lengths = Prompt(visual, 6, 10, 0.0)
    if planned:
        engine.plan.agree("skip")
        engine.plan.see(Window(1))
        engine.plan.cut_at(3)
        engine.plan.keep_heads([(0, 1, 2), (2,), (1, 3), ()])
        engine.plan.keep_neurons([(torch.arange(10),)] * 4)
        work = work_of(engine)
        parts = prefill_flops(shape, work, lengths)
        products = sum(layer.queries for layer in work) * 4 * visual * 6 * shape.head_dim
        heads = sum(shape.heads * 10 + layer.heads * visual for layer in work)
        products += 4 * 10 * shape.head_dim * heads
    else:
        parts = stock_flops(shape, lengths)
        products = 4 * 4 * (visual + 10) ** 2 * shape.head_dim * shape.heads
    with FlopCounterMode(display=False) as counter:
        network(**call, logits_to_keep=1)
    counted = counter.get_flop_counts()
    tower = sum(sum(counted[key].values()) for key in counted if key.endswith(TOWER))
    assert counter.get_total_flops() - tower == sum(parts.values()) - products


TOWER = (".vision_tower", ".multi_modal_projector")


def test_dense_work_leaves_out_what_nobody_reads():
    shape = Shape(8, 2, 2, 4, (16, 16), 10)
    assert dense_work(shape) == [LayerWork(2, 2, 2, 16), LayerWork(2, 2, 0, 0)]

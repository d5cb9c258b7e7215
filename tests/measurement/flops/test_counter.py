"""Nothing that multiplies is missed: every operator of every call is counted or free."""

import pytest
import torch
from torch.nn import functional
from torch.utils.flop_counter import flop_registry

from bench.measurement.flops.cost_rows import count_image_flops, count_text_flops
from bench.measurement.flops.counter import (
    attention_flops,
    count_flops,
    distance_flops,
    flop_formulas,
    grouped_matmul_flops,
    is_matmul,
    matrix_vector_flops,
)
from bench.measurement.image_prompt import count_prefill
from bench.method import Context
from bench.models.classifiers.architectures import build_classifier
from bench.models.classifiers.classifier import VisionConfig
from bench.models.model import Model
from bench.schema import ModelConfig
from tests.methods.token_pruning.recorded_steps import METHODS
from tests.methods.visual_engine import tiny_mllms
from tests.models import tiny_networks

# Operators that move, compare or sum elements, or apply a function to each: no products of
# matrices. One that is not in this list makes a test fail until somebody has looked at it.
ELEMENTWISE = """
_is_all_true _local_scalar_dense _native_batch_norm_legit_no_training _safe_softmax _softmax
_to_copy _unsafe_view abs add add_ alias all amax amin any arange argmax argmin avg_pool2d
bitwise_and bitwise_not bitwise_or bitwise_or_ cat ceil_ clamp clamp_min clamp_min_ clone
constant_pad_nd copy_ cos cumsum detach diagonal div div_ embedding empty empty_like eq equal exp
expand eye flip floor floor_divide full full_like gather ge gelu gt histc index index_copy
index_put_ index_select isnan le lerp_ lift_fresh linalg_vector_norm logical_not_ lt masked_fill
masked_fill_ masked_scatter max max_pool2d_with_indices maximum mean minimum mul nan_to_num
native_layer_norm ne neg new_empty new_ones new_zeros nonzero ones ones_like permute polar pow
prim.device prod rand randint randn reciprocal relu relu_ remainder repeat repeat_interleave round
rsqrt rsub scalar_tensor scatter scatter_ scatter_add select sigmoid silu sin slice sort split
split_with_sizes sqrt squeeze squeeze_ stack sub sum t topk transpose transpose_ tril unbind
unique_consecutive unsqueeze unsqueeze_ view view_as_complex view_as_real where zeros zeros_like
"""
FREE = frozenset(ELEMENTWISE.split())


def planned(name, method):
    model = Model(
        ModelConfig(name=name, source="tests", kind="image_text"),
        tiny_mllms.build(name), None, "", None, torch.device("cpu"),
    )  # fmt: skip
    if method is not None:
        METHODS[method].apply(model, Context(seed=1))
    return count_prefill(model, tiny_mllms.prompt(name, [6, (4, 5), 4]))


def calls():
    """Watched calls of all kinds of models and of all methods that compute in a call."""
    for name in tiny_networks.ARCHITECTURES:
        network = tiny_networks.build(name)
        yield from count_text_flops(network, 1, 9)
        with count_flops() as real, torch.no_grad():
            network(tiny_networks.tokens(rows=1), use_cache=True)
        yield real
    for name in tiny_mllms.ARCHITECTURES:
        yield from planned(name, None)
    for method in METHODS:
        yield from planned("llava_llama", method)
    for method in ("fastv", "visionzip", "sparsevlm"):
        yield from planned("qwen2_vl", method)
    for name in ("micro_vgg", "micro_mobilenet", "micro_densenet", "micro_lenet"):
        network = build_classifier(VisionConfig(architecture=name, channels=1, size=8)).eval()
        yield count_image_flops(network, 1)
        with count_flops() as real, torch.no_grad():
            network(torch.randn(1, 1, 8, 8))
        yield real


@pytest.mark.broad
def test_every_operator_is_counted_or_free():
    known = {*flop_registry, *flop_formulas()}
    seen = {operator for counted in calls() for operator in counted.operators}
    unknown = {str(operator).removeprefix("aten.") for operator in seen - known}
    assert unknown <= FREE, sorted(unknown - FREE)
    assert not [name for name in FREE if is_matmul(name)]


def test_names_tell_products():
    """Every forward operator for which torch itself has a formula is found by its name."""
    named = [str(packet) for packet in flop_registry if "higher_order" not in repr(packet)]
    forward = [name for name in named if "aten." in name and "backward" not in name]
    assert len(forward) > 8
    assert [name for name in forward if not is_matmul(name)] == []
    others = ("transformers.grouped_mm_fallback", "flash_attn._flash_attn_varlen_forward")
    assert all(map(is_matmul, (*others, "aten._int_mm", "aten.mkldnn_rnn_layer", "aten.addr")))
    free = ("aten.cummax", "aten.clamp", "aten.add", "aten.mean", "aten.embedding", "aten.norm")
    assert not any(map(is_matmul, free))


def test_a_product_without_a_formula_is_named():
    with count_flops() as counted:
        torch.addr(torch.zeros(3, 4), torch.randn(3), torch.randn(4))
    assert counted.without_formula == ("aten.addr",)


def test_what_torch_misses_on_a_cpu_is_seen():
    q, k, v = torch.randn(2, 4, 7, 8), torch.randn(2, 4, 9, 8), torch.randn(2, 4, 9, 8)
    with count_flops() as counted:
        functional.scaled_dot_product_attention(q, k, v)
    assert (
        counted.total == 2 * 2 * 4 * 7 * 9 * (8 + 8) == attention_flops(q.shape, k.shape, v.shape)
    )
    assert grouped_matmul_flops((10, 3), (4, 3, 5)) == 2 * 10 * 3 * 5
    with count_flops() as counted:
        torch.randn(3, 5) @ torch.randn(5)
        torch.randn(5) @ torch.randn(5)
    assert counted.total == matrix_vector_flops((3, 5)) + 2 * 5
    x, y = torch.randn(1, 3, 4), torch.randn(1, 5, 4)
    with count_flops() as counted:
        torch.cdist(x, y)
    assert counted.total == distance_flops(x.shape, y.shape) == 2 * 3 * 5 * 4


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_masked_pairs_are_told_apart(device):
    q, k = torch.randn(2, 4, 6, 8, device=device), torch.randn(2, 4, 6, 8, device=device)
    full = 2 * 2 * 4 * 6 * 6 * (8 + 8)
    with count_flops() as counted:
        functional.scaled_dot_product_attention(q, k, k, is_causal=True)
    assert (counted.total, counted.causal) == (full, full * 21 // 36)
    mask = torch.ones(6, 6, device=device).tril().bool()
    masks = [mask, torch.zeros(6, 6, device=device).masked_fill(~mask, -torch.inf)]
    for each in (*masks, mask.expand(2, 1, 6, 6)):
        with count_flops() as counted:
            functional.scaled_dot_product_attention(q, k, k, attn_mask=each)
        assert counted.total == full
        # Without values a mask hides nobody knows how much, which is not the same as nothing.
        assert counted.causal == (None if device == "meta" else full * 21 // 36)

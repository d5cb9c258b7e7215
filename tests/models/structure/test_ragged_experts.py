"""Experts of different widths: the same outputs as with zeros, and really less to store and run."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bench.measurement.flops.cost_rows import count_text_flops
from bench.measurement.model_size import count_size
from bench.models.expert_hooks import observe_experts
from bench.models.structure.model_structure import inspect_model
from bench.models.structure.ragged_experts import RaggedExperts, make_buckets
from methods.moe.micro_experts import channels_per_expert, delete_micro_experts, zero_micro_experts
from tests.models.tiny_networks import ARCHITECTURES, build, tokens, unfuse

LAYOUTS = ["fused", "list"]
ALIGN = 4


def network_of(name, layout="fused"):
    return build(name) if layout == "fused" else unfuse(build(name))


def some(block, share=0.5, empty=2, seed=0):
    """Random flat indices of a block, among them all of one routed expert."""
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.rand(block.micro_experts, generator=generator) < share
    first = block.d_shared + sum(block.widths[:empty])
    chosen[first : first + block.widths[empty]] = True
    return chosen.nonzero().flatten()


def shrunk(name, layout="fused", align=ALIGN):
    """A network with micro-experts removed from every block, and one with the same ones zeroed."""
    small, dark = network_of(name, layout), network_of(name, layout)
    for block, same in zip(inspect_model(small).moe, inspect_model(dark).moe, strict=True):
        indices = some(block, seed=block.layer)
        delete_micro_experts(block, indices, align)
        zero_micro_experts(same, indices)
    return small, dark


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_removed_computes_what_zeroed_does(name, layout):
    small, dark = shrunk(name, layout)
    rows = tokens()
    torch.testing.assert_close(small(rows).logits, dark(rows).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_structure_sees_what_is_left(name):
    before = inspect_model(network_of(name)).moe
    small, _ = shrunk(name)
    for old, new in zip(before, inspect_model(small).moe, strict=True):
        lost = {
            expert: len(gone)
            for expert, gone in channels_per_expert(old, some(old, seed=old.layer))
        }
        assert new.layout == "ragged"
        assert new.widths == tuple(w - lost.get(e, 0) for e, w in enumerate(old.widths))
        assert new.widths[2] == 0
        assert new.d_shared == old.d_shared - lost.get(-1, 0)
        assert (new.num_experts, new.top_k, new.d_model) == (old.num_experts, old.top_k, 16)
        assert new.router is new.block.get_submodule(_name_of(new.block, new.router))
        assert [new.expert(e).width for e in range(6)] == list(new.widths)


def _name_of(owner, child):
    return next(name for name, part in owner.named_children() if part is child)


@given(st.lists(st.integers(0, 70), min_size=1, max_size=20), st.sampled_from([1, 8, 16, 64]))
def test_buckets_hold_every_expert_once_at_the_next_aligned_width(widths, align):
    buckets = make_buckets(widths, align)
    assert sorted(e for bucket in buckets for e in bucket.experts) == list(range(len(widths)))
    for bucket in buckets:
        assert bucket.width % align == 0
        assert all(0 <= bucket.width - widths[e] < align for e in bucket.experts)
    ragged = RaggedExperts(widths, 4, torch.nn.SiLU(), align)
    stored = sum(weight.numel() for weight in ragged.parameters())
    assert stored == 3 * 4 * (sum(widths) + ragged.padding)


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_any_widths_and_any_routing(data):
    widths = data.draw(st.lists(st.integers(0, 9), min_size=2, max_size=7))
    count = data.draw(st.integers(1, 9))
    top_k = data.draw(st.integers(1, len(widths)))
    ragged = randomised(RaggedExperts(widths, 8, torch.nn.SiLU(), 4))
    index_TK = torch.stack([torch.randperm(len(widths))[:top_k] for _ in range(count)])
    x_TD, weight_TK = torch.randn(count, 8), torch.rand(count, top_k)
    y_TD = torch.zeros(count, 8)
    for t in range(count):
        for expert, weight in zip(index_TK[t].tolist(), weight_TK[t], strict=True):
            view = ragged.view(expert)
            y_TD[t] += weight * view.combine(view.hidden(x_TD[t : t + 1]))[0]
    torch.testing.assert_close(ragged(x_TD, index_TK, weight_TK), y_TD, rtol=1e-5, atol=1e-5)


def randomised(ragged):
    """Fill every expert, leaving the padding at zero."""
    torch.manual_seed(0)
    for expert in range(len(ragged.widths)):
        view = ragged.view(expert)
        for part in (view.gate, view.up, view.down):
            part.copy_(torch.randn(part.shape))
    return ragged


def test_the_grouped_kernels_compute_the_same():
    ragged = randomised(RaggedExperts([9, 12, 16, 12], 16, torch.nn.SiLU(), 8))
    for bucket in ragged.buckets:
        counts = [3 + place for place in range(len(bucket.experts))]
        x_SD = torch.randn(sum(counts), 16)
        parts = zip(bucket.experts, x_SD.split(counts), strict=True)
        views = [(ragged.view(expert), x) for expert, x in parts]
        expected = torch.cat([view.combine(view.hidden(x)) for view, x in views])
        torch.testing.assert_close(ragged.grouped(bucket, x_SD, counts), expected)


@pytest.mark.gpu
def test_the_grouped_kernels_compute_the_same_on_a_gpu():
    ragged = randomised(RaggedExperts([65, 130, 200, 0, 128], 128, torch.nn.SiLU(), 64))
    x_TD, weight_TK = torch.randn(50, 128), torch.rand(50, 2)
    index_TK = torch.stack([torch.randperm(5)[:2] for _ in range(50)])
    expected = ragged(x_TD, index_TK, weight_TK)
    on_gpu = copy.deepcopy(ragged).to("cuda", torch.bfloat16)
    found = on_gpu(x_TD.cuda().bfloat16(), index_TK.cuda(), weight_TK.cuda())
    torch.testing.assert_close(found.float().cpu(), expected, rtol=0.05, atol=0.5)


def test_copies_state_dicts_and_types():
    small, _ = shrunk("deepseek")
    rows = tokens()
    logits = small(rows).logits
    other = copy.deepcopy(small)
    for weight in other.parameters():
        weight.zero_()
    assert torch.equal(small(rows).logits, logits)
    other.load_state_dict(small.state_dict())
    assert torch.equal(other(rows).logits, logits)
    half = other.to(torch.bfloat16)
    assert all(weight.dtype == torch.bfloat16 for weight in half.parameters())
    torch.testing.assert_close(half(rows).logits.float(), logits, rtol=0.2, atol=0.5)


def test_gradients_reach_inputs_and_experts():
    small, dark = shrunk("qwen3_moe")
    embeddings = small.get_input_embeddings()(tokens())

    def gradient(network):
        x = embeddings.clone().requires_grad_()
        network(inputs_embeds=x).logits.square().sum().backward()
        return x.grad

    torch.testing.assert_close(gradient(small), gradient(dark), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["deepseek_v2", "mixtral"])
def test_observers_see_the_same_without_the_removed(name):
    class Seen:
        def __init__(self):
            self.routed_sum, self.shared_sum, self.tokens = {}, 0.0, 0

        def routed(self, expert, x_SD, hidden_SF, weight_S):
            self.tokens += len(x_SD)
            total = float((hidden_SF.abs() * weight_S[:, None]).sum())
            self.routed_sum[expert] = self.routed_sum.get(expert, 0.0) + total

        def shared(self, x_TD, hidden_TF, weight_T):
            self.shared_sum += float(hidden_TF.abs().sum())

        def output(self, y_TD):
            self.y_TD = y_TD

    seen = []
    for network in shrunk(name):
        block, found = inspect_model(network).moe[-1], Seen()
        forward = dict(block.experts.__dict__)
        with observe_experts({block: found}, chunk=5):
            network(tokens())
        assert block.experts.__dict__.keys() == forward.keys()
        seen.append(found)
    small, dark = seen
    assert small.tokens == dark.tokens
    assert small.routed_sum == pytest.approx(dark.routed_sum, rel=1e-4, abs=1e-5)
    assert small.shared_sum == pytest.approx(dark.shared_sum, rel=1e-4)
    torch.testing.assert_close(small.y_TD, dark.y_TD, rtol=1e-5, atol=1e-5)


@pytest.mark.sample(1)
@pytest.mark.parametrize("align", [1, 4])
def test_size_and_flops_drop_as_the_arithmetic_says(align):
    dense = network_of("qwen2_moe")
    small, _ = shrunk("qwen2_moe", align=align)
    before, after = inspect_model(dense), inspect_model(small)
    batch, length = 3, 8  # 48 slots: every one of 6 experts is dealt as many
    stored = [
        sum(bucket.width * len(bucket.experts) for bucket in block.experts.buckets)
        for block in after.moe
    ]
    weights = flops = 0
    for old, new, routed in zip(before.moe, after.moe, stored, strict=True):
        weights += 3 * 16 * (old.micro_experts - new.d_shared - routed)
        per_slot = sum(old.widths) / 6 - routed / 6
        flops += 2 * 3 * 16 * batch * length * (2 * per_slot + old.d_shared - new.d_shared)

    def counted(network, structure):
        return count_size(network, structure).parameters, count_text_flops(network, batch, length)[
            0
        ].total

    dense_size, dense_flops = counted(dense, before)
    small_size, small_flops = counted(small, after)
    assert dense_size - small_size == weights
    assert dense_flops - small_flops == pytest.approx(flops)
    assert count_size(small, after).bytes < count_size(dense, before).bytes


def test_removing_twice_is_removing_once():
    at_once, in_turn = network_of("qwen2_moe"), network_of("qwen2_moe")
    for block in inspect_model(at_once).moe:
        delete_micro_experts(block, torch.arange(0, 60), ALIGN)
    for start, stop in ((0, 40), (0, 20)):
        for block in inspect_model(in_turn).moe:
            delete_micro_experts(block, torch.arange(start, stop), ALIGN)
    rows = tokens()
    assert torch.equal(at_once(rows).logits, in_turn(rows).logits)
    assert inspect_model(at_once).moe[0].widths == (0, 0, 0, 8, 12, 12)


def test_what_was_removed_is_not_kept_by_old_descriptions():
    network = network_of("deepseek")
    block = inspect_model(network).moe[0]
    delete_micro_experts(block, torch.arange(0, 40), ALIGN)
    for old in (block.experts, block.shared):
        assert all(weight.is_meta for weight in old.parameters())
    assert not any(weight.is_meta for weight in network.parameters())


def test_a_whole_block_may_go():
    network = network_of("mixtral")
    rows = tokens()
    for block in inspect_model(network).moe[:1]:
        delete_micro_experts(block, torch.arange(block.micro_experts), ALIGN)
    assert inspect_model(network).moe[0].widths == (0,) * 6
    assert network(rows).logits.isfinite().all()

"""MoE-Slimming's scores against the released procedure: a student layer and a backward pass."""

import copy

import pytest
import torch

from bench.models.structure.model_structure import inspect_model
from bench.ui import SILENT
from methods.baselines.moe_slimming import Attribution, MoESlimming, clipped_sum
from methods.moe.micro_experts import SHARED, expert_spans
from tests.methods.method_application import Masked, model_of
from tests.models.tiny_networks import build, build_dense, tokens, unfuse

CLOSE = {"rtol": 2e-4, "atol": 1e-8}


def scores_of(network, rows, **knobs):
    method = MoESlimming(ratio=0.4, **knobs)
    return dict(method._observe(model_of(network), rows, SILENT))


class Step:
    """What one expert's modules saw in a step: inputs, outputs and the output's gradient."""

    def __init__(self, expert):
        self.z = self.g = torch.zeros(0, 16)
        expert.down_proj.register_forward_hook(self._down)
        expert.up_proj.register_forward_hook(lambda _, __, y: setattr(self, "up", y.detach()))
        expert.gate_proj.register_forward_hook(lambda _, __, y: setattr(self, "gate", y.detach()))

    def _down(self, _, args, z):
        self.hidden, self.z = args[0].detach(), z.detach()
        z.register_hook(lambda g: setattr(self, "g", g))
        return 0.9 * z


def slow_scores(network, rows):
    """Yield channel scores [E, F], expert scores [E] and the loss of every layer, by autograd."""
    blocks = inspect_model(network).moe
    layers = inspect_model(network).layers
    for block in blocks:
        teacher = layers[block.layer]
        student = copy.deepcopy(teacher)
        experts = student.mlp.experts
        steps = [Step(expert) for expert in experts]
        channels, scores, loss_sum = [None] * 6, [None] * 6, 0.0
        for batch in rows.split(2):
            seen = {}
            hook = teacher.register_forward_hook(
                lambda _, args, kwargs, y, seen=seen: seen.update(args=args, kwargs=kwargs, y=y),
                with_kwargs=True,
            )
            network(batch)
            hook.remove()
            for step in steps:
                step.z = step.g = torch.zeros(0, 16)
            x = seen["args"][0].clone().requires_grad_()
            y = seen["y"]
            loss = 0
            out = student(x, *seen["args"][1:], **seen["kwargs"])
            for mine, theirs in zip(out.flatten(0, 1), y.flatten(0, 1), strict=True):
                loss = loss + ((mine - theirs) ** 2).sum() / ((theirs**2).sum() + 1e-6)
            loss.backward()
            loss_sum += float(loss.detach())
            for e, step in enumerate(steps):
                n = len(step.z)
                if n == 0:
                    continue
                parts = [step.hidden, step.up, step.gate]
                channel = sum((part**2).sum(0).sqrt() for part in parts) / 3
                c = step.z * step.g
                if n > 2:
                    limit = torch.quantile(c.abs(), 0.99, dim=0)
                    c = torch.minimum(torch.maximum(c, -limit), limit)
                score = -float(c.mean(0).sum()) * n / batch.numel()
                first = channels[e] is None
                channels[e] = channel if first else 0.9 * channels[e] + 0.1 * channel
                scores[e] = score if first else 0.9 * scores[e] + 0.1 * score
        yield channels, scores, loss_sum / rows.numel()


@pytest.mark.parametrize("name", ["qwen2_moe", "mixtral", "deepseek_v3"])
@pytest.mark.parametrize("chunk", [5, 4096])
def test_scores_are_those_of_the_released_procedure(name, chunk):
    rows = tokens(rows=5, length=10)
    found = scores_of(build(name), rows, chunk=chunk)
    slow = slow_scores(unfuse(build(name)), rows)
    for (block, mine), (channels, scores, loss) in zip(found.items(), slow, strict=True):
        for expert, place in expert_spans(block):
            got_F = mine.channel_scores()[place].float()
            if expert == SHARED or channels[expert] is None:
                assert not got_F.any()
            else:
                torch.testing.assert_close(got_F, channels[expert], **CLOSE)
        wanted = [score or 0.0 for score in scores]
        assert mine.expert_scores().tolist() == pytest.approx(wanted, rel=2e-3, abs=1e-7)
        assert mine.layer_loss() == pytest.approx(loss, rel=1e-3)


def loss_at(block, layer, factors, inputs, teacher_TD):
    """Return the local loss of a layer whose experts' outputs are multiplied by factors [E]."""
    weights = [block.expert(expert).down for expert in range(block.num_experts)]
    before = [weight.clone() for weight in weights]
    for weight, factor in zip(weights, factors, strict=True):
        weight.mul_(factor)
    student_TD = layer(*inputs["args"], **inputs["kwargs"]).flatten(0, 1).double()
    for weight, old in zip(weights, before, strict=True):
        weight.copy_(old)
    apart_T = (student_TD - teacher_TD).square().sum(1)
    return float((apart_T / (teacher_TD.square().sum(1) + 1e-6)).sum())


@pytest.mark.parametrize("order", ["first", "second"])
def test_scores_are_derivatives_of_the_local_loss(order, monkeypatch):
    """By differences of the layer's own loss in the factor of one expert, at 0.9 for all."""
    monkeypatch.setattr("methods.baselines.moe_slimming.QUANTILE", 1.0)
    network, rows = unfuse(build("qwen2_moe").double()), tokens(rows=2, length=8)
    block = inspect_model(network).moe[0]
    layer, inputs = inspect_model(network).layers[block.layer], {}
    hook = layer.register_forward_hook(
        lambda _, args, kwargs, y: inputs.update(args=args, kwargs=kwargs, y=y), with_kwargs=True
    )
    network(rows)
    hook.remove()
    found = scores_of(network, rows, order=order)[block].expert_scores()
    teacher_TD = inputs["y"].flatten(0, 1)
    step = 1e-3
    for expert in range(6):
        low, here, high = (
            loss_at(
                block,
                layer,
                [0.9 + (at if e == expert else 0) for e in range(6)],
                inputs,
                teacher_TD,
            )
            for at in (-step, 0, step)
        )
        # The code's gradient is that of the output before the factor: 0.9 of dL/dα.
        slope, curvature = 0.9 * (high - low) / (2 * step), (high - 2 * here + low) / step**2
        wanted = -slope + (curvature / 2 if order == "second" else 0)
        assert float(found[expert]) * rows.numel() == pytest.approx(wanted, rel=1e-3, abs=1e-6)


def test_an_expert_without_tokens_scores_nothing():
    network = build("mixtral")
    block = inspect_model(network).moe[0]
    with Masked(block, [2]):
        found = scores_of(network, tokens())[block]
    assert found.expert_scores()[2] == 0
    assert not found.channel_scores()[dict(expert_spans(block))[2]].any()


def test_a_dense_feed_forward_is_one_expert():
    network = build_dense("llama")
    for block, found in scores_of(network, tokens()).items():
        assert isinstance(found, Attribution)
        assert found.channel_scores().all()
        assert found.expert_scores().shape == (1,)
        assert block.num_experts == 1


def test_one_outlier_among_many_tokens_is_clipped(monkeypatch):
    value_SD = torch.ones(101, 2)
    value_SD[7, 1] = -50
    assert clipped_sum(value_SD).tolist() == pytest.approx([101, 99])
    assert clipped_sum(value_SD[6:8]).tolist() == pytest.approx([2, -49])
    monkeypatch.setattr("methods.baselines.moe_slimming.QUANTILE_LIMIT", 101)
    assert clipped_sum(value_SD).tolist() == pytest.approx([101, 99])

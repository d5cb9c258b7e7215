"""MoNE against a transcription of its definition, and constants that cost what they should."""

import copy

import pytest
import torch

from bench.errors import UserError
from bench.models.loading import open_folder
from bench.models.saving import save_model
from bench.models.structure.model_structure import inspect_model
from methods.baselines.mone import Mone
from tests.methods.baselines.test_expert_scores import routed_tokens
from tests.methods.method_application import applied
from tests.models.test_saving import model_of
from tests.models.tiny_networks import build, tokens

CLOSE = {"rtol": 1e-5, "atol": 1e-5}


def outputs_by_expert(network):
    """For every block and expert, the outputs [S, D] and router weights [S], token by token."""
    blocks = inspect_model(network).moe
    found = [[([], []) for _ in range(block.num_experts)] for block in blocks]
    for number, expert, x_D, weight in routed_tokens(network):
        part = blocks[number].expert(expert)
        hidden = part.act(part.gate @ x_D) * (part.up @ x_D)
        found[number][expert][0].append((part.down @ hidden).double())
        found[number][expert][1].append(float(weight))
    return found


@pytest.mark.parametrize("name", ["qwen2_moe", "mixtral", "deepseek_v3"])
@pytest.mark.parametrize("score", ["fusion", "output_fluctuation"])
def test_scores_and_constants_token_by_token(name, score):
    network = build(name)
    found = outputs_by_expert(build(name))
    report = applied(Mone(ratio=0.4, score=score, batch=2, chunk=5), network)
    for place, layer in enumerate(report.layers):
        wanted, means = [], []
        for outputs, weights in found[place]:
            z_SD = torch.stack(outputs) if outputs else torch.zeros(1, 16).double()
            variance_D = ((z_SD - z_SD.mean(0)) ** 2).mean(0)
            share = sum(weights) / tokens().numel()
            fusion = float(variance_D.sum()) ** 0.5 * share
            wanted.append(fusion if score == "fusion" else float(variance_D.norm()))
            means.append(z_SD.mean(0))
        assert layer.scores == pytest.approx(wanted, rel=1e-4, abs=1e-9)
        order = sorted(range(6), key=lambda expert: wanted[expert])
        assert layer.whole_experts == sorted(order[: len(layer.whole_experts)])
        block = [m for m in network.modules() if hasattr(m, "novices")][place]
        chosen = torch.stack([means[expert] for expert in layer.whole_experts])
        torch.testing.assert_close(block.constant.double(), chosen, **CLOSE)


class Constant(torch.nn.Module):
    """Fused experts, called one by one, some of which are constants."""

    def __init__(self, block, constants):
        super().__init__()
        self.views = [block.expert(expert) for expert in range(block.num_experts)]
        self.constants = constants

    def forward(self, x, index, weight):
        y = torch.zeros_like(x)
        for token, slot in torch.cartesian_prod(torch.arange(len(x)), torch.arange(index.shape[1])):
            expert = int(index[token, slot])
            own = self.views[expert].combine(self.views[expert].hidden(x[token][None]))[0]
            y[token] += weight[token, slot] * self.constants.get(expert, own)
        return y


def test_the_network_computes_with_the_constants(tmp_path):
    network, slow = build("qwen2_moe"), build("qwen2_moe")
    before = sum(weight.numel() for weight in network.parameters())
    report = applied(Mone(ratio=0.4), network)
    replaced = [module for module in network.modules() if hasattr(module, "novices")]
    for block, novice in zip(inspect_model(slow).moe, replaced, strict=True):
        constants = dict(zip(novice.novices, novice.constant, strict=True))
        block.block.experts = Constant(block, constants)
    rows = tokens(2, 6, seed=1)
    torch.testing.assert_close(network(rows).logits, slow(rows).logits, **CLOSE)
    after = sum(weight.numel() for weight in network.parameters())
    assert report.details["removed_parameters"] == before - after
    assert save_model(model_of(network), tmp_path) == "slimbench"
    again = open_folder(tmp_path).network
    torch.testing.assert_close(again(rows).logits, network(rows).logits, **CLOSE)


def test_zero_is_removal_and_ratio_zero_changes_nothing():
    network = build("mixtral")
    same = copy.deepcopy(network)
    assert applied(Mone(ratio=0.0), network).effect == "none"
    assert torch.equal(network(tokens()).logits, same(tokens()).logits)
    report = applied(Mone(ratio=0.4, constant="zero"), network)
    for block, layer in zip(inspect_model(same).moe, report.layers, strict=True):
        for expert in layer.whole_experts:
            block.expert(expert).zero(torch.arange(block.d_ff))
    torch.testing.assert_close(network(tokens()).logits, same(tokens()).logits, **CLOSE)


def test_a_ratio_that_leaves_no_expert_is_refused():
    with pytest.raises(UserError, match=r"replaces 6 experts of .* which has 6"):
        applied(Mone(ratio=0.8), build("qwen2_moe"))

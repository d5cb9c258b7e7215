"""Scores of the official code, against a transcription of its arithmetic."""

import pytest
import torch

from bench.models.structure.model_structure import inspect_model
from bench.ui import SILENT
from methods.camera.analysis import BlockEnergies, resolve_alpha
from methods.camera.pruning import CameraP
from methods.moe.calibration import walk_blocks
from tests.methods.method_application import applied, block_inputs, model_of, zeroed
from tests.models.tiny_networks import build, tokens


def official_scores(block, x_TD, alpha):
    """Score a block as xuyuzhuang11/CAMERA does: every expert on every token, times a gate.

    The gate is the softmax over all experts, and its top k divided by their sum; shared experts
    come first, with a gate of one.
    """
    logits_TE = x_TD @ block.router.weight.T
    top = logits_TE.float().softmax(1).topk(block.top_k)
    gate_TE = torch.zeros_like(logits_TE).scatter(
        1, top.indices, top.values / top.values.sum(1, keepdim=True)
    )
    scores = []
    for view, gate_T in [
        (block.shared_view(), torch.ones(len(x_TD))),
        *((block.expert(e), gate_TE[:, e]) for e in range(block.num_experts)),
    ]:
        phi_TF = view.act(x_TD @ view.gate.T) * (x_TD @ view.up.T) * gate_T[:, None]
        squares_F, peak_F = phi_TF.square().sum(0), phi_TF.abs().amax(0).square()
        scores.append(((1 - alpha) * squares_F + alpha * peak_F) * view.down.square().sum(0))
    return torch.cat(scores)


def measured(network, method):
    walk = walk_blocks(model_of(network), tokens(), BlockEnergies, method.walk_options(), SILENT)
    alpha = resolve_alpha(method.alpha, "deepseek")
    return [found.energies(alpha, normalised=False).float() for _, found in walk]


def test_renormalised_weights_and_the_official_alpha_give_the_official_scores():
    network = build("deepseek")
    wanted = [
        official_scores(block, x.flatten(0, 1), 0.9)
        for block, x in zip(
            inspect_model(network).moe, block_inputs(network, tokens()), strict=True
        )
    ]
    official = CameraP(ratio=0.2, alpha="official", router_weights="renormalised")
    for mine, theirs in zip(measured(network, official), wanted, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=0)
    # The model does not renormalise, so the weights that it applies give other scores.
    applied_ones = measured(network, CameraP(ratio=0.2, alpha="official"))
    assert not torch.allclose(applied_ones[0], wanted[0], rtol=1e-2)


def test_the_official_order_prunes_layer_by_layer_on_the_pruned_outputs():
    network, slow = build("deepseek"), build("deepseek")
    method = CameraP(ratio=0.4, alpha="official", router_weights="renormalised", state="zeroed")
    applied(method, network)
    for number, block in enumerate(inspect_model(slow).moe):
        x_BLD = block_inputs(slow, tokens())[number]
        scores = official_scores(block, x_BLD.flatten(0, 1), 0.9)
        count = int(0.4 * block.micro_experts)
        gone = scores.argsort(stable=True)[:count].sort().values
        assert zeroed(inspect_model(network).moe[number]) == gone.tolist()
        slow.model.layers[block.layer].mlp = network.model.layers[block.layer].mlp


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
def test_models_that_renormalise_themselves_get_the_same_scores(name):
    network = build(name)
    both = [
        measured(network, CameraP(ratio=0.2, alpha=0.3, router_weights=weights))
        for weights in ("applied", "renormalised")
    ]
    for mine, theirs in zip(*both, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=0)


def test_the_network_computes_the_same_while_weights_are_shown_renormalised():
    plain, shown = build("deepseek"), build("deepseek")
    method = CameraP(ratio=0.0, router_weights="renormalised", sequential=True)
    report = applied(method, shown)
    assert report.details["router_weights"] == "renormalised"
    torch.testing.assert_close(shown(tokens()).logits, plain(tokens()).logits, rtol=0, atol=0)

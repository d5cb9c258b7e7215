"""Dropped experts: masked in the model's own code equals physically removed."""

import copy
import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from bench.errors import UserError
from bench.measurement.costs import count_costs
from bench.models import replaced_modules
from bench.models.structure.model_structure import inspect_model
from bench.schema import CostsConfig
from methods.baselines.expert_removal import drop_experts, router_mode, update_expert_count
from methods.baselines.router_masks import check_router, dense_routing_weights, route
from tests.methods.method_application import Masked, model_of, network_of, numel
from tests.models.tiny_networks import ARCHITECTURES, Expert, build, tokens, unfuse

# Of DeepSeek-V3's two groups of three: one of each, and two of the second.
EVEN, UNEVEN = (1, 4), (3, 4)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_router_is_reproduced_from_its_logits(name):
    router = inspect_model(build(name)).moe[0].router
    logits, weight, index = router(torch.randn(40, 16))
    again = dense_routing_weights(*route(router, logits), 6)
    assert torch.equal(again, dense_routing_weights(weight, index, 6))


@pytest.mark.parametrize("dropped", [EVEN, UNEVEN])
@pytest.mark.parametrize("layout", ["fused", "list"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_masked_in_the_models_own_code_equals_removed(name, layout, dropped):
    network = network_of(name, layout)
    block, rows = inspect_model(network).moe[0], tokens()
    plain = network(rows).logits
    with Masked(block, dropped):
        masked = network(rows).logits
    before = numel(network)
    assert not torch.allclose(masked, plain, atol=1e-3)

    wrapped = copy.deepcopy(network)
    drop_experts(inspect_model(wrapped).moe[0], dropped, "masked")
    torch.testing.assert_close(wrapped(rows).logits, masked, rtol=1e-5, atol=1e-5)
    assert before - numel(wrapped) == 2 * 3 * 16 * 12

    mode = router_mode(inspect_model(network))
    assert mode == ("masked" if name == "deepseek_v3" else "rows removed")
    drop_experts(block, dropped, mode)
    torch.testing.assert_close(network(rows).logits, masked, rtol=1e-5, atol=1e-5)
    for changed in (wrapped, network):
        left = inspect_model(changed).moe[0]
        assert (left.num_experts, left.top_k, left.widths) == (4, 2, (12,) * 4)


def test_a_group_with_too_few_left_for_a_token_still_works():
    network = build("deepseek_v3")
    block, rows = inspect_model(network).moe[0], tokens()
    with Masked(block, (0, 1)):
        masked = network(rows).logits
    drop_experts(block, (0, 1), "masked")
    torch.testing.assert_close(network(rows).logits, masked, rtol=1e-5, atol=1e-5)
    # Both groups keep one expert, and a token may use only one group.
    network = build("deepseek_v3")
    drop_experts(inspect_model(network).moe[0], (0, 1, 3, 4), "masked")
    assert network(rows).logits.isfinite().all()


def test_blocks_that_differ_are_not_cut_to_one_published_shape():
    network = unfuse(build("mixtral"))
    assert router_mode(inspect_model(network)) == "rows removed"
    experts = inspect_model(network).moe[0].experts
    experts[0] = Expert(torch.ones(5, 16), torch.ones(5, 16), torch.ones(16, 5), experts[0].act_fn)
    assert router_mode(inspect_model(network)) == "masked"


@pytest.mark.parametrize("name", sorted(set(ARCHITECTURES) - {"deepseek_v3"}))
def test_stock_transformers_loads_what_is_left(name, tmp_path):
    network, rows = build(name), tokens()
    model = model_of(network)
    for block in model.structure.moe:
        drop_experts(block, EVEN, "rows removed")
    update_expert_count(model, "rows removed")
    network.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    assert inspect_model(again).moe[0].num_experts == 4
    torch.testing.assert_close(again(rows).logits, network(rows).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("layout", ["fused", "list"])
@pytest.mark.parametrize("name", ["deepseek_v3", "mixtral"])
def test_a_masked_network_is_built_again_from_its_description(name, layout):
    network, rows = network_of(name, layout), tokens()
    for block in inspect_model(network).moe:
        drop_experts(block, UNEVEN, "masked")
    again = network_of(name, layout)
    replaced_modules.install_described_modules(
        again, json.loads(json.dumps(replaced_modules.describe_network(network)))
    )
    again.load_state_dict(network.state_dict())
    assert torch.equal(again(rows).logits, network(rows).logits)


@pytest.mark.sample(2)
@pytest.mark.parametrize("mode", ["rows removed", "masked"])
@pytest.mark.parametrize("name", ["mixtral", "qwen2_moe"])
def test_costs_are_counted_on_what_is_left(name, mode):
    network = build(name)
    model = model_of(copy.deepcopy(network))
    for block in model.structure.moe:
        drop_experts(block, EVEN, mode)
    update_expert_count(model, mode)
    config = CostsConfig(name="tiny", batch=2, length=24)
    before = {cost.quantity: cost.value for cost in count_costs(model_of(network), config).costs}
    after = {cost.quantity: cost.value for cost in count_costs(model, config).costs}
    assert after["parameters"] == numel(model.network) < before["parameters"]
    # As many experts speak as before, so nothing is saved there; a wrapped router costs a little.
    assert after["flops"] == pytest.approx(before["flops"], rel=0.04)


def test_refuses_a_router_without_rows():
    block = inspect_model(build("mixtral")).moe[0]
    block.router.weight = torch.nn.Parameter(torch.zeros(5, 16))
    with pytest.raises(UserError, match="no matrix with one row for each of 6 experts"):
        check_router(block)

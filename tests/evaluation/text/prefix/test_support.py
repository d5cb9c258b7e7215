"""Networks that support prefix sharing, and the reason given for the others."""

from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from bench.errors import UserError
from bench.evaluation import BenchmarkConfig, evaluate, plan
from bench.evaluation.text.prefix import support
from bench.models.model import Model
from bench.schema import ModelConfig

WIDTH = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
WIDTH["num_key_value_heads"] = 4


def model_of(kind, attention="eager", **changes):
    torch.manual_seed(0)
    config = CONFIG_MAPPING[kind](**WIDTH, initializer_range=0.3, **changes)
    network = AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    config = ModelConfig(name=kind, source="embedded:tiny")
    network.eval().requires_grad_(False)
    return Model(config, network, None, "0", None, torch.device("cpu"))


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gpt_neox", "mixtral", "opt", "phi", "stablelm"])
def test_attention_networks_are_supported(kind):
    assert support.unsupported_reason(model_of(kind)) is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_supported(dtype):
    model = model_of("llama", "sdpa")
    assert support.unsupported_reason(replace(model, network=model.network.to(dtype))) is None


UNSUPPORTED = {
    "mamba": "has no argument past_key_values",
    "bloom": "has no argument position_ids",
    "qwen3_next": "linear_attention layers",
    "llama4_text": "chunked_attention layers",
}


@pytest.mark.parametrize("kind", UNSUPPORTED)
def test_the_reason_names_what_is_not_supported(kind):
    more = {"layer_types": ["linear_attention", "full_attention"]} if kind == "qwen3_next" else {}
    assert UNSUPPORTED[kind] in support.unsupported_reason(model_of(kind, **more))


@pytest.mark.parametrize("ignored", ["attention_mask", "position_ids"])
def test_a_network_that_ignores_an_argument_is_detected(ignored):
    model = model_of("llama", "sdpa")
    stock = model.network.model.forward

    def forward(*args, **kwargs):
        return stock(*args, **{**kwargs, ignored: None})

    model.network.model.forward = forward
    assert "log-likelihoods differ in a packed sequence" in support.unsupported_reason(model)


def test_a_network_that_fails_on_branches_is_not_supported():
    model = model_of("llama", "sdpa")
    stock = model.network.model.forward

    def forward(*args, attention_mask=None, **kwargs):
        if attention_mask is not None and attention_mask.ndim == 4:
            raise ValueError("no mask of four dimensions\nat all")
        return stock(*args, attention_mask=attention_mask, **kwargs)

    model.network.model.forward = forward
    assert support.unsupported_reason(model).endswith("ValueError no mask of four dimensions")


def test_running_out_of_memory_says_nothing_about_support():
    model = model_of("llama", "sdpa")

    def forward(*_, **__):
        raise torch.OutOfMemoryError("CUDA")

    model.network.model.forward = forward
    with pytest.raises(UserError, match="a single prompt of 14 tokens does not fit into memory"):
        support.unsupported_reason(model)


def test_the_evaluation_says_which_backend_it_used(model):
    def report(model, backend):
        options = {"suite": "micro", "tasks": ("boolq",), "limit": 3, "backend": backend}
        return evaluate(model, plan(BenchmarkConfig(name="b", **options), offline=True)).backend

    shared, plain = report(model, "prefix_sharing"), report(model, "padded")
    assert (shared["requested"], shared["used"]) == ("prefix_sharing", "prefix_sharing")
    assert shared["reasons"] == []
    assert 0 < shared["spent"]["computed_tokens"] < shared["spent"]["padded_tokens"]
    assert shared["spent"]["tokens_per_batch"] >= 256
    assert (plain["requested"], plain["used"], plain["reasons"]) == ("padded", "padded", [])

    class Whole(torch.nn.Module):
        def __init__(self, network):
            super().__init__()
            self.network, self.config = network, network.config

        def forward(self, input_ids, use_cache=False):
            return self.network(input_ids, use_cache=use_cache)

    fallen = report(replace(model, network=Whole(model.network)), "prefix_sharing")
    assert (fallen["requested"], fallen["used"]) == ("prefix_sharing", "padded")
    assert fallen["reasons"] == ["the network's forward has no argument attention_mask"]

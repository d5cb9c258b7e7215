"""Operators of a network, counted on one layer of each form, against all of its layers."""

import pytest

from bench.estimation import network as networks
from bench.models.structure.model_structure import inspect_model
from tests.models.tiny_networks import build, build_dense, llama


@pytest.mark.parametrize(
    "make",
    [llama, lambda: build("qwen3_moe"), lambda: build("deepseek_v2"), lambda: build_dense("gpt2")],
    ids=["llama", "qwen3_moe", "deepseek_v2", "gpt2"],
)
def test_layers_that_are_built_alike_count_like_all_of_them(make, monkeypatch):
    network = make()
    structure = inspect_model(network)
    found = networks._tally(network, structure)
    monkeypatch.setattr(networks, "layer_form", id)
    whole = networks._tally(network, structure)
    assert (found.operators, found.elements) == (whole.operators, whole.elements)
    assert not any("forward" in vars(layer) for layer in structure.layers)

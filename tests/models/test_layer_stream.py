""""""

import pytest
import torch

from bench.errors import UserError
from bench.models.layer_stream import LayerStream
from bench.models.structure.model_structure import inspect_model
from tests.models.tiny_networks import (
    ARCHITECTURES,
    DENSE_ARCHITECTURES,
    build,
    build_dense,
    tokens,
)


def state_of(output):
    return output[0] if isinstance(output, tuple) else output


@pytest.mark.sample(25)
@pytest.mark.parametrize("batch", [1, 2, 5])
@pytest.mark.parametrize("name", [*ARCHITECTURES, *DENSE_ARCHITECTURES])
def test_layer_by_layer_equals_the_whole_forward(name, batch):
    network = build(name) if name in ARCHITECTURES else build_dense(name)
    rows = tokens()
    layers = inspect_model(network).layers
    stream = LayerStream(network, layers, rows, batch)
    seen = []
    layers[-1].register_forward_hook(lambda _, __, output: seen.append(state_of(output)))
    for index in range(len(layers)):
        stream.run(index, advance=True)
    last, seen[:] = torch.cat(seen), []
    network(rows)
    torch.testing.assert_close(last, seen[0], rtol=1e-5, atol=1e-5)


def test_a_layer_runs_again_until_it_advances():
    network = build("mixtral")
    layers = inspect_model(network).layers
    stream = LayerStream(network, layers, tokens(), batch=2)
    seen = []
    layers[0].register_forward_hook(lambda _, __, output: seen.append(output))
    stream.run(0, advance=False)
    stream.run(0, advance=True)
    assert torch.equal(torch.cat(seen[:3]), torch.cat(seen[3:]))
    assert all("forward" not in layer.__dict__ for layer in layers)


def test_a_layer_runs_as_far_as_a_module_and_leaves_it_as_it_was():
    network = build_dense("llama")
    layers = inspect_model(network).layers
    stream = LayerStream(network, layers, tokens(), batch=2)
    down, seen, after = layers[0].mlp.down_proj, [], []
    down.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    down.register_forward_hook(lambda *_: after.append(1))
    stream.run_until(0, down)
    stopped, seen[:] = torch.cat(seen), []
    assert not after
    stream.run(0, advance=True)
    assert torch.equal(stopped, torch.cat(seen))
    assert "forward" not in down.__dict__


@pytest.mark.parametrize("name", ["gpt2", "opt"])
def test_more_tokens_than_positions_are_one_sentence(name):
    network = build_dense(name)
    layers = inspect_model(network).layers
    LayerStream(network, layers, tokens(rows=1, length=128), batch=1)
    with pytest.raises(UserError, match=r"calibration\.length=129 is more than the 128 positions"):
        LayerStream(network, layers, tokens(rows=1, length=129), batch=1)
    rotary = build_dense("llama")
    LayerStream(rotary, inspect_model(rotary).layers, tokens(rows=1, length=129), batch=1)

"""A model whose layers are on disk is walked, pruned and run like one in memory."""

import pytest
import torch

from bench.data.calibration import Calibration
from bench.errors import UserError
from bench.measurement.costs import count_costs
from bench.method import Context
from bench.models.layer_stream import LayerStream
from bench.models.loading import load_model
from bench.models.offload import is_offloaded, onloaded
from bench.models.source import resolve_model
from bench.schema import CostsConfig, ModelConfig
from methods.baselines.micro_expert_controls import RandomMicroExperts
from methods.camera.pruning import CameraP
from tests.models.tiny_networks import ARCHITECTURES, build, save, tokens


@pytest.fixture(params=["qwen2_moe", "deepseek_v3", "mixtral"])
def folder(request, tmp_path):
    return save(build(request.param), tmp_path / "model")


def loaded(folder, device_map=None):
    config = ModelConfig(name="tiny", source="local", path=str(folder), device_map=device_map)
    return load_model(resolve_model(config, offline=True))


def pruned(model, **knobs):
    text = Calibration(tokens(), "calibration")
    return CameraP(**({"ratio": 0.4, "align": 4} | knobs)).apply(model, Context(0, text))


def test_nothing_of_the_layers_is_in_memory(folder):
    model = loaded(folder, "offload_disk")
    assert all(is_offloaded(layer) for layer in model.structure.layers)
    for layer in model.structure.layers:
        assert all(weight.is_meta for weight in layer.parameters())
    assert model.device.type == "cpu"


@pytest.mark.sample(2)
@pytest.mark.parametrize(
    "knobs",
    [
        {},
        {"state": "zeroed"},
        {"refit": True},
        {"scope": "global", "sequential": False},
        {"allocation": "least_error"},
    ],
)
def test_pruned_on_disk_is_pruned_in_memory(folder, knobs):
    on_disk, in_memory = loaded(folder, "offload_disk"), loaded(folder)
    reports = [pruned(model, **knobs).details for model in (on_disk, in_memory)]
    for report in reports:
        report.pop("seconds")
    assert reports[0] == reports[1]
    rows = tokens(seed=3)
    assert torch.equal(on_disk.network(rows).logits, in_memory.network(rows).logits)
    assert all(
        weight.is_meta for layer in on_disk.structure.layers for weight in layer.parameters()
    )
    shapes = [block.widths for block in in_memory.structure.moe]
    assert [block.widths for block in on_disk.structure.moe] == shapes


def test_only_one_layer_is_in_memory_at_a_time(folder):
    model = loaded(folder, "offload_disk")
    layers = model.structure.layers
    with LayerStream(model.network, layers, tokens(), batch=2) as stream:
        for index in range(len(layers)):
            stream.run(index, advance=True)
            there = [not next(layer.parameters()).is_meta for layer in layers]
            assert there == [place == index for place in range(len(layers))]
    assert all(next(layer.parameters()).is_meta for layer in layers)


def test_only_what_changed_is_written_back(folder, monkeypatch):
    from bench.models import offload

    model = loaded(folder, "offload_disk")
    written = []
    write = offload._write_weight
    monkeypatch.setattr(
        offload, "_write_weight", lambda place, key, w: written.append(key) or write(place, key, w)
    )
    layer = model.structure.layers[1]
    with onloaded(layer):
        layer.input_layernorm.weight.mul_(2)
    assert written == ["model.layers.1.input_layernorm.weight"]
    with onloaded(layer):
        assert float(layer.input_layernorm.weight.abs().sum()) > 0
    assert len(written) == 1


def test_changes_are_kept_when_something_fails(folder):
    model = loaded(folder, "offload_disk")
    layer = model.structure.layers[0]
    with pytest.raises(ZeroDivisionError), onloaded(layer):
        layer.input_layernorm.weight.zero_()
        raise ZeroDivisionError
    with onloaded(layer):
        assert not layer.input_layernorm.weight.any()


@pytest.mark.broad
def test_costs_are_counted_without_loading_it_all(folder):
    costs = CostsConfig(name="tiny", batch=1, length=8)
    on_disk, in_memory = loaded(folder, "offload_disk"), loaded(folder)
    assert count_costs(on_disk, costs) == count_costs(in_memory, costs)
    for model in (on_disk, in_memory):
        pruned(model)
    assert count_costs(on_disk, costs) == count_costs(in_memory, costs)


def test_methods_that_do_not_stream_still_refuse(folder):
    model = loaded(folder, "offload_disk")
    with pytest.raises(UserError, match="are offloaded"):
        RandomMicroExperts(ratio=0.2).apply(model, Context(0))


@pytest.mark.sample(1)
def test_the_folder_on_disk_goes_with_the_network(folder, monkeypatch, tmp_path):
    import gc

    from bench.models import offload

    monkeypatch.setattr(offload, "offload_folder", lambda: str(tmp_path / "weights"))
    model = loaded(folder, "offload_disk")
    assert (tmp_path / "weights").is_dir()
    del model
    gc.collect()
    assert not (tmp_path / "weights").exists()


@pytest.mark.sample(3)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_architecture_runs_from_disk(name, tmp_path):
    network = build(name)
    model = loaded(save(network, tmp_path / "model"), "offload_disk")
    assert torch.equal(model.network(tokens()).logits, network(tokens()).logits)

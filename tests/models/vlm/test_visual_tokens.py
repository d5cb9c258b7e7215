"""Where visual tokens are, and what decoder layers are made of."""

import pytest
import torch
import transformers
from torch import nn
from transformers.modeling_outputs import BaseModelOutputWithPooling

from bench.data.prompts import ProcessedPrompts
from bench.errors import UserError
from bench.models.structure.model_structure import inspect_model
from bench.models.vlm.decoder_view import decoder_layers, open_decoder
from bench.models.vlm.visual_tokens import locate_visual_tokens
from tests.methods.visual_engine.tiny_mllms import ARCHITECTURES, IMAGE, MOE, VIDEO, build, prompt
from tests.models.tiny_networks import build as text_model


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_image_token_has_its_cell(name):
    network = build(name)
    call = prompt(name, [2, (3, 4), 6], [7, (3, 2), 2, (2, 2), 3], [9])
    found = locate_visual_tokens(network, call)
    assert torch.equal(found.mask, call["input_ids"] == IMAGE)
    for number in range(3):
        inside = found.frame_BS == number
        cells = torch.stack([found.row_BS[inside], found.column_BS[inside]], dim=1)
        rows, columns = (cells.max(dim=0).values + 1).tolist()
        raster = [[r, c] for r in range(rows) for c in range(columns)]
        assert cells.tolist() == raster
        if name.startswith("qwen"):
            assert (rows, columns) == [(3, 4), (3, 2), (2, 2)][number]


def test_a_call_without_pixels_has_no_visual_tokens():
    network = build("llava_llama")
    call = prompt("llava_llama", [3, (5, 5), 2])
    del call["pixel_values"]
    assert locate_visual_tokens(network, call) is None


def test_embedded_prompts_are_located_by_their_placeholder():
    network = build("llava_llama")
    call = prompt("llava_llama", [3, (5, 5), 2])
    ids = call.pop("input_ids")
    call["inputs_embeds"] = network.get_input_embeddings()(ids)
    assert torch.equal(locate_visual_tokens(network, call).mask, ids == IMAGE)


def test_token_types_locate_images_in_embedded_prompts():
    network = build("qwen2_vl")
    call = prompt("qwen2_vl", [3, (3, 4), 2])
    ids = call.pop("input_ids")
    call["inputs_embeds"] = torch.randn(*ids.shape, 32)
    assert torch.equal(locate_visual_tokens(network, call).mask, ids == IMAGE)


@pytest.mark.parametrize("name", ["qwen2_vl", "qwen3_vl"])
def test_grids_are_read_off_positions_where_generate_leaves_them_out(name):
    network = build(name)
    call = prompt(name, [3, (3, 4), 2, (2, 5), 1])
    expected = locate_visual_tokens(network, call)
    grids = call.pop("image_grid_thw")
    positions, _ = network.model.get_rope_index(
        call["input_ids"], mm_token_type_ids=call["mm_token_type_ids"], image_grid_thw=grids
    )
    del call["pixel_values"]
    call["position_ids"] = positions
    features = (torch.zeros(12, 32), torch.zeros(10, 32))
    call["mm_encoder_outputs"] = {"image": BaseModelOutputWithPooling(pooler_output=features)}
    found = locate_visual_tokens(network, call)
    assert found.attention == expected.attention
    for field in ("frame_BS", "row_BS", "column_BS"):
        assert torch.equal(getattr(found, field), getattr(expected, field))
    assert found.separator_BS is expected.separator_BS is None


def test_videos_have_a_frame_for_each_time_step():
    network = build("qwen2_vl")
    ids = torch.tensor([[5, 6, *[VIDEO] * 12, 7]])
    grid = torch.tensor([[2, 4, 6]])
    found = locate_visual_tokens(
        network, {"input_ids": ids, "pixel_values_videos": torch.zeros(1), "video_grid_thw": grid}
    )
    assert found.frame_BS[0, 2:14].tolist() == [0] * 6 + [1] * 6
    assert found.row_BS[0, 2:14].tolist() == [0, 0, 0, 1, 1, 1] * 2


@pytest.mark.parametrize(
    "change, message",
    [
        ({"pixel_values": torch.zeros(1, 3, 28, 28)}, "28x28 pixels does not fit .* 20x20"),
        ({"pixel_values": torch.zeros(2, 3, 20, 20)}, "25 image tokens for 2 images"),
        ({"input_ids": torch.full((1, 9), IMAGE)}, "9 image tokens"),
        ({"input_ids": torch.full((1, 9), 5)}, "no token for it"),
    ],
)
def test_what_does_not_fit_is_said_in_one_sentence(change, message):
    call = prompt("llava_llama", [3, (5, 5), 2]) | change
    with pytest.raises(UserError, match=message) as said:
        locate_visual_tokens(build("llava_llama"), call)
    assert "\n" not in str(said.value)


def test_an_image_across_two_prompts_is_refused():
    call = prompt("qwen2_vl", [3, (2, 2), 2], [3, (2, 2), 2])
    call["image_grid_thw"] = torch.tensor([[1, 2, 12], [1, 2, 4]])
    with pytest.raises(UserError, match="one prompt and one chunk"):
        locate_visual_tokens(build("qwen2_vl"), call)


def test_a_class_token_has_no_place():
    network = build("llava_llama")
    network.config.vision_feature_select_strategy = "full"
    with pytest.raises(UserError, match="class token"):
        locate_visual_tokens(network, prompt("llava_llama", [3, (5, 5), 2]))


def test_unknown_families_and_decoders_are_named():
    with pytest.raises(UserError, match="multimodal architecture 'mixtral'"):
        locate_visual_tokens(text_model("mixtral"), {"pixel_values": 0})
    with pytest.raises(UserError, match="deepseek_v3, which is not supported"):
        decoder_layers(inspect_model(text_model("deepseek_v3")))


def test_sliding_windows_are_refused():
    with pytest.raises(UserError, match="sliding window of 16"):
        decoder_layers(inspect_model(build("llava_mistral", sliding_window=16)))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_layers_are_understood_without_weights(name):
    network = build(name)
    with torch.device("meta"):
        hollow = type(network)(network.config)
    layers = decoder_layers(inspect_model(hollow))
    assert [layer.moe is not None for layer in layers] == [
        name in MOE and not (name == "llava_qwen2_moe" and index == 0) for index in range(4)
    ]
    view = layers[0].attention_view()
    assert view.q.weight.shape == (view.heads * view.head_dim, 32)
    assert view.k.weight.shape == view.v.weight.shape == (view.groups * view.head_dim, 32)
    with pytest.raises(UserError, match="memory of one device"):
        open_decoder(hollow, inspect_model(hollow))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_views_compute_what_the_modules_compute(name):
    layer = open_decoder(network := build(name), inspect_model(network)).layers[0]
    if layer.moe is None:
        x = torch.randn(3, 32)
        (unit,) = layer.units()
        assert torch.allclose(unit.combine(unit.hidden(x)), layer.feed_forward(x), atol=1e-6)
    view = layer.attention_view()
    view.o.weight.zero_()
    assert not any(p.any() for n, p in layer.attention.named_parameters() if "o_proj.weight" in n)


def test_a_decoder_without_attention_is_refused():
    layers = nn.ModuleList([nn.Sequential(nn.Linear(2, 2))])
    network = nn.Module()
    network.layers, network.config = layers, transformers.PreTrainedConfig()
    with pytest.raises(UserError, match="kind without self_attn"):
        decoder_layers(inspect_model(network))


def test_samples_are_hashed_by_content():
    call = prompt("llava_llama", [3, (5, 5), 2])
    same = ProcessedPrompts.of([dict(reversed(call.items()))])
    assert ProcessedPrompts.of([call]).fingerprint == same.fingerprint
    call["pixel_values"] = call["pixel_values"] + 1
    assert ProcessedPrompts.of([call]).fingerprint != same.fingerprint

"""What is read in vision towers, against their own modules."""

import math
from itertools import pairwise

import pytest
import torch
import transformers
from transformers.models.qwen2_vl.modeling_qwen2_vl import apply_rotary_pos_emb_vision

from bench.errors import UserError
from bench.models.vlm.frames import fixed_frame_size
from bench.models.vlm.tower_pass import by_token
from bench.models.vlm.vision_tower import Tower, tower_parts
from bench.models.vlm.visual_tokens import locate_visual_tokens
from tests.methods.visual_engine.tiny_mllms import CLIP, IMAGE, TEXT, build, prompt

BATCH = ([2, (3, 4), 6], [7, (4, 5), 2, (2, 3), 3])


@pytest.mark.parametrize("name", ["llava_llama", "internvl_qwen2"])
def test_the_class_tokens_attention_is_the_towers_own(name):
    network, found = build(name), []
    network.set_attn_implementation({"vision_config": "eager"})
    tower = Tower(network)
    tower._attention.register_forward_hook(lambda _, args, output: found.append(output[1]))
    network(**prompt(name, *BATCH))
    weights = found[0]
    side = math.isqrt(weights.shape[-1] - 1)
    cls = weights[:, :, 0, 1:].mean(1).view(-1, side, side)
    merged = 2 if name.startswith("internvl") else 1
    half = side // merged
    direct = torch.stack(
        [
            cls[:, r * merged : (r + 1) * merged, c * merged : (c + 1) * merged].sum((1, 2))
            for r in range(half)
            for c in range(half)
        ],
        dim=1,
    )
    read = tower.read(tower.take_calls())
    assert torch.allclose(read.received_V, direct.flatten(), atol=1e-6)


def test_a_token_is_the_patches_that_pixel_shuffle_joins():
    patches = torch.arange(64.0).view(1, 8, 8, 1)
    joined = build("internvl_qwen2").model.pixel_shuffle(patches, 0.5).view(16, 4)
    ours = by_token(patches.view(1, 64), 2)[0]
    assert torch.equal(joined.sort(dim=1).values, ours.sort(dim=1).values)


@pytest.mark.parametrize("name", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def test_patches_receive_attention_on_average(name):
    network = build(name)
    call = prompt(name, [2, (3, 4), 3, (5, 3), 6])
    tower = Tower(network)
    inside = []
    module = tower._attention
    module.register_forward_pre_hook(lambda _, a, k: inside.append((a, k)), with_kwargs=True)
    network(**call)
    (args, kwargs) = inside[0]
    qkv = module.qkv(args[0]).view(len(args[0]), 3, module.num_heads, -1)
    q, k = apply_rotary_pos_emb_vision(qkv[:, 0], qkv[:, 1], *kwargs["position_embeddings"])
    ends, direct = kwargs["cu_seqlens"].tolist(), []
    for start, stop in pairwise(ends):
        heads = [
            (q[start:stop, h] @ k[start:stop, h].T * module.scaling).softmax(-1).mean(0)
            for h in range(module.num_heads)
        ]
        direct.append(torch.stack(heads).mean(0))
    direct = torch.cat(direct).view(-1, 4).sum(1)
    read = tower.read(tower.take_calls())
    if name != "qwen2_5_vl":
        assert torch.allclose(read.received_V, direct, atol=1e-6)
    assert torch.allclose(read.received_V.sort().values, direct.sort().values, atol=1e-6)
    assert ends[-1] == 4 * 27


def test_the_layer_that_is_projected_is_read():
    network = build("llava_llama")
    layers = network.model.vision_tower.encoder.layers
    assert tower_parts(network)[1] is layers[-2].self_attn
    network.config.vision_feature_layer = 2
    assert tower_parts(network)[1] is layers[1].self_attn
    network.config.vision_feature_layer = [-2, -1]
    with pytest.raises(UserError, match="attention can be read in only one layer"):
        tower_parts(network)
    assert tower_parts(build("qwen2_5_vl"))[1] is not None


def test_unknown_towers_are_named():
    vision = {key: value for key, value in CLIP.items() if key != "model_type"}
    config = transformers.LlavaConfig(
        text_config=TEXT | {"model_type": "llama"},
        vision_config=vision | {"model_type": "siglip_vision_model"},
        image_token_index=IMAGE,
    )
    network = transformers.LlavaForConditionalGeneration(config)
    with pytest.raises(UserError, match=r"tower of llava \(siglip_vision_model\) is not supported"):
        Tower(network)


@pytest.mark.parametrize("name", ["llava_llama", "internvl_qwen2"])
def test_frames_of_one_size(name):
    network, call = build(name), prompt(name, [2, (1, 1), 3])
    tokens = locate_visual_tokens(network, call)
    size = fixed_frame_size(network)[:2]
    assert size == (int(tokens.row_BS.max()) + 1, int(tokens.column_BS.max()) + 1)
    assert fixed_frame_size(build("qwen2_vl")) is None

"""Tiny random vision-language models of every supported architecture, and prompts for them."""

import torch
import transformers
from torch import nn
from transformers.image_processing_utils import select_best_resolution

IMAGE, VIDEO, VOCABULARY = 60, 61, 64
TEXT = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GROUPED = {"num_key_value_heads": 2}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 12}
MROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}}
CLIP = {
    "model_type": "clip_vision_model",
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 20,
    "patch_size": 4,
}
INTERN = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": [16, 16],
    "patch_size": [2, 2],
}
QWEN2 = {
    "depth": 2,
    "embed_dim": 16,
    "hidden_size": 32,
    "num_heads": 2,
    "mlp_ratio": 2,
    "patch_size": 4,
}
QWEN3 = {
    "depth": 2,
    "hidden_size": 16,
    "out_hidden_size": 32,
    "num_heads": 2,
    "intermediate_size": 16,
    "patch_size": 4,
    "num_position_embeddings": 64,
    "deepstack_visual_indexes": [0, 1],
}
QWEN25 = {key: QWEN3[key] for key in list(QWEN3)[:6]} | {
    "window_size": 16,
    "fullatt_block_indexes": [1],
}

# Text decoder, its own settings; the families below say which vision part goes with it.
ARCHITECTURES = {
    "llava_llama": ("Llava", "llama", {}),
    "llava_mistral": ("Llava", "mistral", GROUPED | {"sliding_window": None}),
    "llava_qwen2_moe": (
        "Llava",
        "qwen2_moe",
        GROUPED | EXPERTS | {"shared_expert_intermediate_size": 20, "mlp_only_layers": [0]},
    ),
    "internvl_qwen2": ("InternVL", "qwen2", GROUPED),
    "internvl_qwen3": ("InternVL", "qwen3", GROUPED | {"head_dim": 12}),
    "internvl_phi3": ("InternVL", "phi3", {"sliding_window": 512}),
    "internvl_qwen3_moe": ("InternVL", "qwen3_moe", EXPERTS | {"head_dim": 12}),
    "qwen2_vl": ("Qwen2VL", None, GROUPED | MROPE),
    "qwen2_5_vl": ("Qwen2_5_VL", None, GROUPED | MROPE),
    "qwen3_vl": ("Qwen3VL", None, GROUPED | MROPE | {"head_dim": 8}),
    "qwen3_vl_moe": ("Qwen3VLMoe", None, GROUPED | MROPE | EXPERTS | {"head_dim": 8}),
}
GEMMA3 = {
    "head_dim": 8,
    "query_pre_attn_scalar": 5,
    "sliding_window": 256,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "rope_parameters": {
        "full_attention": {"rope_type": "default", "rope_theta": 1e4},
        "sliding_attention": {"rope_type": "default", "rope_theta": 20.0},
    },
}
COHERE2 = {"sliding_window": 512, "layer_types": ["sliding_attention", "full_attention"] * 2}
GLM4V = {
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 1e4,
        "mrope_section": [1, 1, 1],
        "partial_rotary_factor": 0.75,
    }
}
# Families whose images are laid out otherwise: several frames, separators, rows with breaks.
LAYOUTS = {
    "llava_next": ("LlavaNext", "llama", {}),
    "llava_onevision": ("LlavaOnevision", "qwen2", GROUPED),
    "idefics3": ("Idefics3", "llama", GROUPED),
    "smolvlm": ("SmolVLM", "llama", GROUPED),
    "mistral3": ("Mistral3", "mistral", GROUPED | {"sliding_window": None}),
    "pixtral": ("Pixtral", "mistral", GROUPED | {"sliding_window": None}),
    "deepseek_vl": ("DeepseekVL", "llama", {}),
    "cohere2_vision": ("Cohere2Vision", "cohere2", GROUPED | COHERE2),
    "glm4v": ("Glm4v", None, GROUPED | GLM4V),
    "gemma3": ("Gemma3", "gemma3_text", GROUPED | GEMMA3),
    "paligemma": ("PaliGemma", "gemma", GROUPED | {"head_dim": 8}),
}
SIGLIP = CLIP | {"model_type": "siglip_vision_model"}
IDEFICS = {key: SIGLIP[key] for key in list(SIGLIP)[1:5]} | {"image_size": 16, "patch_size": 2}
PIXTRAL = IDEFICS | {"model_type": "pixtral", "image_size": 64, "patch_size": 4}
GRID_PINPOINTS = [[20, 40], [40, 20], [40, 40], [20, 60]]
VISION = {
    "LlavaNext": {
        "vision_config": CLIP,
        "image_token_index": IMAGE,
        "image_grid_pinpoints": GRID_PINPOINTS,
    },
    "LlavaOnevision": {
        "vision_config": SIGLIP | {"vision_use_head": False},
        "image_token_index": IMAGE,
        "video_token_index": VIDEO,
        "image_grid_pinpoints": GRID_PINPOINTS,
        "vision_aspect_ratio": "anyres_max_2",
    },
    "Idefics3": {"vision_config": IDEFICS, "image_token_id": IMAGE, "scale_factor": 2},
    "SmolVLM": {"vision_config": IDEFICS, "image_token_id": IMAGE, "scale_factor": 2},
    "Mistral3": {"vision_config": PIXTRAL, "image_token_index": IMAGE, "spatial_merge_size": 2},
    "Pixtral": {
        "vision_config": PIXTRAL,
        "image_token_index": IMAGE,
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": "full",
    },
    "DeepseekVL": {"vision_config": SIGLIP, "image_token_id": IMAGE},
    "Cohere2Vision": {
        "vision_config": SIGLIP | {"vision_use_head": False, "image_size": 16, "patch_size": 2},
        "image_token_id": IMAGE,
        "downsample_factor": 2,
        "alignment_intermediate_size": 16,
    },
    "Glm4v": {
        "vision_config": {
            "depth": 2,
            "hidden_size": 16,
            "out_hidden_size": 32,
            "intermediate_size": 16,
            "num_heads": 2,
            "image_size": 32,
            "patch_size": 4,
        },
    },
    "Gemma3": {
        "vision_config": SIGLIP | {"vision_use_head": False, "image_size": 16, "patch_size": 2},
        "image_token_index": IMAGE,
        "mm_tokens_per_image": 16,
    },
    "PaliGemma": {
        "vision_config": SIGLIP | {"vision_use_head": False, "projection_dim": 32},
        "image_token_index": IMAGE,
        "projection_dim": 32,
    },
    "Llava": {"vision_config": CLIP, "image_token_index": IMAGE},
    "InternVL": {"vision_config": INTERN, "image_token_id": IMAGE, "image_seq_length": 16},
    "Qwen2VL": {"vision_config": QWEN2},
    "Qwen2_5_VL": {"vision_config": QWEN25},
    "Qwen3VL": {"vision_config": QWEN3},
    "Qwen3VLMoe": {"vision_config": QWEN3},
}
QWEN_TOKENS = {
    "image_token_id": IMAGE,
    "video_token_id": VIDEO,
    "vision_start_token_id": 58,
    "vision_end_token_id": 59,
}
GLM_TOKENS = {
    "image_token_id": IMAGE,
    "video_token_id": VIDEO,
    "image_start_token_id": 57,
    "image_end_token_id": 59,
    "video_start_token_id": 62,
    "video_end_token_id": 63,
}
MOE = ("llava_qwen2_moe", "internvl_qwen3_moe", "qwen3_vl_moe")


def build(name, seed=0, tower=None, **changes):
    """A network of one architecture with random float32 weights large enough to matter.

    `changes` are to the decoder's config, `tower` to that of the vision tower.
    """
    family, kind, extra = (ARCHITECTURES | LAYOUTS)[name]
    text = TEXT | extra | changes | ({} if kind is None else {"model_type": kind})
    tokens = QWEN_TOKENS if family.startswith("Qwen") else GLM_TOKENS if family == "Glm4v" else {}
    kind = "Llava" if family == "Pixtral" else family
    vision = VISION[family] | {"vision_config": VISION[family]["vision_config"] | (tower or {})}
    config = getattr(transformers, f"{kind}Config")(text_config=text, **vision, **tokens)
    network = getattr(transformers, f"{kind}ForConditionalGeneration")(config)
    torch.manual_seed(seed)
    for part, weight in network.named_parameters():
        nn.init.normal_(weight, std=0.15)
        # Gemma's norms multiply by 1 + w.
        if weight.ndim == 1 and not ("Gemma" in family and "language_model" in part):
            weight.data += 1
    network.generation_config.eos_token_id = None
    network.generation_config.pad_token_id = 0
    return network.eval().requires_grad_(False)


def side(name):
    """Rows and columns of an image's visual tokens where they are fixed; Qwen's are free."""
    return {"Llava": (5, 5), "InternVL": (4, 4)}.get(ARCHITECTURES[name][0])


def prompt(name, *rows, seed=0):
    """Model inputs for prompts given as lists: a number is so many text tokens, a pair an image.

    Shorter prompts are padded on the left. Where images have a fixed size, the pair is ignored.
    """
    rng = torch.Generator().manual_seed(seed)
    grids, ids = [], []
    for row in rows:
        tokens = []
        for part in row:
            if isinstance(part, int):
                tokens += torch.randint(3, 58, (part,), generator=rng).tolist()
            else:
                grids.append(side(name) or part)
                tokens += [IMAGE] * (grids[-1][0] * grids[-1][1])
        ids.append(tokens)
    length = max(map(len, ids))
    mask = torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in ids])
    ids = torch.tensor([[0] * (length - len(row)) + row for row in ids])
    call = {"input_ids": ids, "attention_mask": mask}
    return call | _pixels(name, ids, grids, rng)


def _pixels(name, ids, grids, rng):
    """What a processor adds for images."""
    family = ARCHITECTURES[name][0]
    if not grids:
        return {}
    if not family.startswith("Qwen"):
        size = CLIP["image_size"] if family == "Llava" else INTERN["image_size"][0]
        return {"pixel_values": torch.randn(len(grids), 3, size, size, generator=rng)}
    patches = sum(4 * height * width for height, width in grids)
    return {
        "pixel_values": torch.randn(patches, 3 * 2 * 4 * 4, generator=rng),
        "image_grid_thw": torch.tensor([[1, 2 * h, 2 * w] for h, w in grids]),
        "mm_token_type_ids": (ids == IMAGE).int(),
    }


def laid_out_prompt(name, *rows, seed=0):
    """Like `prompt`, for the families of `LAYOUTS`: a pair is the size of an image in its units.

    Units are patches, for Mistral 3 merged ones, for Idefics3 tiles; DeepSeek-VL has one size.
    """
    family = LAYOUTS[name][0]
    rng = torch.Generator().manual_seed(seed)
    ids, images = [], []
    for row in rows:
        tokens, own = [], [part for part in row if isinstance(part, tuple)]
        for part in row:
            if isinstance(part, int):
                tokens += torch.randint(3, 57, (part,), generator=rng).tolist()
            else:
                tokens += _image_tokens(family, part, several=len(own) > 1)
        ids.append(tokens)
        images.append(own)
    length = max(map(len, ids))
    mask = torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in ids])
    ids = torch.tensor([[0] * (length - len(row)) + row for row in ids])
    call = {"input_ids": ids, "attention_mask": mask} | _laid_out_pixels(family, images, rng)
    if family in ("Gemma3", "PaliGemma"):
        call["token_type_ids"] = (ids == IMAGE).long() * (family == "Gemma3")
    if family == "Glm4v":
        call["mm_token_type_ids"] = (ids == IMAGE).int()
    return call


def anyres_canvas(size):
    """Rows and columns of an image's tiles put together, without its padding, in patches."""
    height, width = (8 * part for part in size)
    best = select_best_resolution((height, width), GRID_PINPOINTS)
    rows, columns = best[0] // 4, best[1] // 4
    if width / height > columns / rows:
        lost = (rows - int(round(height * columns / width, 7))) // 2
        return rows - 2 * lost, columns
    lost = (columns - int(round(width * rows / height, 7))) // 2
    return rows, columns - 2 * lost


def _image_tokens(family, size, *, several):
    """Ids of one image: visual tokens, separators under the same id, breaks and tags as text."""
    if family in ("LlavaNext", "LlavaOnevision"):
        if several and family == "LlavaOnevision":
            return [IMAGE] * (25 + 1)
        rows, columns = anyres_canvas(size)
        ratio = (rows * columns / (2 * 25)) ** 0.5
        if family == "LlavaOnevision" and ratio > 1.1:
            rows, columns = int(rows // ratio), int(columns // ratio)
        return [IMAGE] * (25 + rows * (columns + 1))
    if family in ("Mistral3", "Pixtral"):
        return ([IMAGE] * size[1] + [58]) * (size[0] - 1) + [IMAGE] * size[1] + [59]
    if family in ("DeepseekVL", "PaliGemma"):
        return [IMAGE] * 25
    if family == "Cohere2Vision":  # a line break behind each tile, and behind the whole image
        return [*([*[IMAGE] * 16, 58] * (size[0] * size[1] + 1)), 59]
    if family == "Glm4v":
        return [57, *[IMAGE] * (size[0] * size[1]), 59]
    if family == "Gemma3":
        return [58, *[IMAGE] * 16, 59]
    tile = [58, *[IMAGE] * 16]  # a tag before each tile, and a last one for the whole image
    return tile * (size[0] * size[1] + 1) + [59]


def _laid_out_pixels(family, images, rng):
    """What a processor adds for images."""
    sizes = [size for own in images for size in own]
    if not sizes:
        return {}

    def noise(*shape):
        return torch.randn(*shape, generator=rng)

    if family in ("DeepseekVL", "PaliGemma"):
        return {"pixel_values": noise(len(sizes), 3, 20, 20)}
    if family == "Cohere2Vision":
        return {"pixel_values": noise(sum(h * w + 1 for h, w in sizes), 3, 16, 16)}
    if family == "Glm4v":
        return {
            "pixel_values": noise(sum(4 * h * w for h, w in sizes), 3 * 2 * 4 * 4),
            "image_grid_thw": torch.tensor([[1, 2 * h, 2 * w] for h, w in sizes]),
        }
    if family == "Gemma3":
        return {"pixel_values": noise(len(sizes), 3, 16, 16)}
    if family in ("Mistral3", "Pixtral"):
        unit = 8 if family == "Mistral3" else 4
        pixels = [(unit * height, unit * width) for height, width in sizes]
        highest, widest = (max(side) for side in zip(*pixels, strict=True))
        return {
            "pixel_values": noise(len(sizes), 3, highest, widest),
            "image_sizes": torch.tensor(pixels),
        }
    if family in ("Idefics3", "SmolVLM"):
        counts = [sum(h * w + 1 for h, w in own) for own in images]
        pixels = torch.zeros(len(images), max(counts), 3, 16, 16)
        for sample, count in enumerate(counts):
            pixels[sample, :count] = noise(count, 3, 16, 16)
        return {"pixel_values": pixels}
    tiles = []
    for height, width in sizes:
        best = select_best_resolution((8 * height, 8 * width), GRID_PINPOINTS)
        tiles.append(1 + best[0] // 20 * (best[1] // 20))
    pixels = torch.zeros(len(sizes), max(tiles), 3, 20, 20)
    for number, count in enumerate(tiles):
        pixels[number, :count] = noise(count, 3, 20, 20)
    found = {
        "pixel_values": pixels,
        "image_sizes": torch.tensor([[8 * height, 8 * width] for height, width in sizes]),
    }
    if family == "LlavaOnevision":
        found["batch_num_images"] = torch.tensor([len(own) for own in images if own])
    return found

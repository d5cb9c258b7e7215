"""Tiny random vision-language models of every supported architecture, and prompts for them."""

import torch
import transformers
from torch import nn

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
VISION = {
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
MOE = ("llava_qwen2_moe", "internvl_qwen3_moe", "qwen3_vl_moe")


def build(name, seed=0, **changes):
    """A network of one architecture with random float32 weights large enough to matter."""
    family, kind, extra = ARCHITECTURES[name]
    text = TEXT | extra | changes | ({} if kind is None else {"model_type": kind})
    tokens = QWEN_TOKENS if family.startswith("Qwen") else {}
    config = getattr(transformers, f"{family}Config")(text_config=text, **VISION[family], **tokens)
    network = getattr(transformers, f"{family}ForConditionalGeneration")(config)
    torch.manual_seed(seed)
    for weight in network.parameters():
        nn.init.normal_(weight, std=0.15)
        if weight.ndim == 1:
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

"""Conversion of LLaVA checkpoints from the layout of LLaVA's repository to transformers.

LLaVA-1.5 and models trained with its code (YOPO's released checkpoints) are folders of
`model_type: llava_llama` (or `llava`) with a Llama and a projector, whose config names a CLIP
tower. The layout of `llava-hf/llava-1.5-7b-hf` has different names, a config of three parts, and a
vocabulary with an image token. Tensors are converted file by file, so that at most one file is in
memory.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from bench.errors import UserError
from bench.models.weight_files import INDEX_FILE, find_weight_files, read_json_object

if TYPE_CHECKING:
    from torch import Tensor

IMAGE_TOKEN, PAD_TOKEN = "<image>", "<pad>"
# The published conversion pads the vocabulary to a multiple of 64 rows.
VOCABULARY_MULTIPLE = 64

# Old and new names; the first match is applied.
RENAMED = (
    (r"model\.vision_tower\.vision_tower\.(.+)", r"vision_tower.\1"),
    (r"model\.mm_projector\.0\.(.+)", r"multi_modal_projector.linear_1.\1"),
    (r"model\.mm_projector\.2\.(.+)", r"multi_modal_projector.linear_2.\1"),
    (r"((?:model\.(?:embed_tokens|layers|norm)|lm_head)\..+)", r"language_model.\1"),
)
EMBEDDINGS = ("model.embed_tokens.weight", "lm_head.weight")
# Buffers stored by old versions of transformers, which new ones compute from the config.
IGNORED = r".*(?:rotary_emb\.inv_freq|embeddings\.position_ids)"


def read_original_config(source: Path) -> dict[str, Any]:
    """Return the config of a checkpoint in this layout.

    Raises:
        UserError: the checkpoint cannot be converted.
    """
    old = read_json_object(source / "config.json")
    if old.get("model_type") not in ("llava_llama", "llava") or "mm_vision_tower" not in old:
        raise UserError(
            f"{source} is a {old.get('model_type')}, not a llava_llama checkpoint in LLaVA's own "
            "layout (its config.json names mm_vision_tower)"
        )
    if old.get("mm_projector_type") != "mlp2x_gelu":
        raise UserError(
            f"{source} has mm_projector_type={old.get('mm_projector_type')}: only LLaVA-1.5's "
            "mlp2x_gelu has a counterpart in transformers"
        )
    return old


def convert_original_llava(source: Path, tower: Path, folder: Path) -> None:
    """Write a checkpoint in transformers' layout into an empty folder.

    `tower` is a folder with the CLIP model that the checkpoint's config names, in transformers'
    format. Its weights are used if the checkpoint does not contain a tower.

    Raises:
        UserError: a folder is not as expected, or has weights with an unknown name.
    """
    old = read_original_config(source)
    files, tower_files = find_weight_files(source), find_weight_files(tower)
    _write_config_and_processor(source, old, tower, folder)
    _write_weights(files, tower_files, folder)


def _write_config_and_processor(
    source: Path, old: Mapping[str, Any], tower: Path, folder: Path
) -> None:
    from transformers import (
        AutoTokenizer,
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaProcessor,
    )
    from transformers.models.llava.image_processing_llava import LlavaImageProcessor

    tokenizer = AutoTokenizer.from_pretrained(source, local_files_only=True)
    tokenizer.add_tokens([IMAGE_TOKEN], special_tokens=True)
    if tokenizer.pad_token is None:
        tokenizer.add_special_tokens({"pad_token": PAD_TOKEN})
    vision = CLIPVisionConfig.from_pretrained(tower, local_files_only=True)
    mine = {"model_type", "architectures", "auto_map", "transformers_version", "torch_dtype"}
    kept = {k: v for k, v in old.items() if k not in mine and not k.startswith("mm_")}
    text = LlamaConfig(**{**kept, "vocab_size": _padded_rows(int(old["vocab_size"]))})
    strategy = {"patch": "default", "cls_patch": "full"}[
        old.get("mm_vision_select_feature", "patch")
    ]
    config = LlavaConfig(
        text_config=text.to_dict(),
        vision_config=vision.to_dict(),
        image_token_index=tokenizer.convert_tokens_to_ids(IMAGE_TOKEN),
        vision_feature_layer=old.get("mm_vision_select_layer", -2),
        vision_feature_select_strategy=strategy,
        projector_hidden_act="gelu",
    )
    config.architectures = ["LlavaForConditionalGeneration"]
    config.save_pretrained(folder)
    side = vision.image_size
    images = LlavaImageProcessor(
        size={"shortest_edge": side},
        crop_size={"height": side, "width": side},
        do_pad=old.get("image_aspect_ratio") == "pad",
    )
    LlavaProcessor(
        image_processor=images,
        tokenizer=tokenizer,
        patch_size=vision.patch_size,
        vision_feature_select_strategy=strategy,
        image_token=IMAGE_TOKEN,
        num_additional_image_tokens=1,  # The class token.
    ).save_pretrained(folder)
    settings = source / "generation_config.json"
    if settings.is_file():
        shutil.copy(settings, folder / settings.name)


def _padded_rows(vocabulary: int) -> int:
    """Return the number of rows for a vocabulary with two more tokens, including padding."""
    return -(-(vocabulary + 2) // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE


def _write_weights(files: tuple[Path, ...], tower_files: tuple[Path, ...], folder: Path) -> None:
    """Write all tensors under their new names, one file per source file."""
    from safetensors.torch import save_file

    place_of: dict[str, str] = {}
    total = 0
    parts = [(file, _converted) for file in files]
    # Last, because the checkpoint may contain a tower that was trained with the model.
    parts += [(file, _of_the_tower) for file in tower_files]
    for number, (file, convert) in enumerate(parts, start=1):
        tensors = {n: t for n, t in convert(file) if n not in place_of}
        if not tensors:
            continue
        name = f"model-{number:05}-of-{len(parts):05}.safetensors"
        save_file(tensors, folder / name, metadata={"format": "pt"})
        place_of |= dict.fromkeys(tensors, name)
        total += sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": place_of}
    (folder / INDEX_FILE).write_text(json.dumps(index, indent=2, sort_keys=True))


def _converted(file: Path) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in _tensors(file):
        if re.fullmatch(IGNORED, name):
            continue
        for pattern, new in RENAMED:
            if re.fullmatch(pattern, name):
                yield re.sub(pattern, new, name), _extended(name, tensor)
                break
        else:
            raise UserError(
                f"{file} has a weight {name}, which is not in LLaVA-1.5's layout: is it another "
                "model?"
            )


def _of_the_tower(file: Path) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in _tensors(file):
        # A whole CLIP also has a text tower and two projections. A separate tower has a prefix or
        # not, depending on the version of transformers.
        if re.match(r"text_model|text_projection|visual_projection|logit_scale", name):
            continue
        if not re.fullmatch(IGNORED, name):
            yield f"vision_tower.vision_model.{name.removeprefix('vision_model.')}", tensor


def _tensors(file: Path) -> Iterator[tuple[str, Tensor]]:
    from safetensors import safe_open

    with safe_open(file, framework="pt") as stored:
        for name in stored.keys():  # noqa: SIM118  # not a mapping
            yield name, cast("Tensor", stored.get_tensor(name))


def _extended(name: str, tensor: Tensor) -> Tensor:
    """Add the rows of new tokens to an embedding."""
    import torch

    if name not in EMBEDDINGS:
        return tensor
    # The mean of all rows, as in the published conversion apart from its noise, so that the logit
    # of an added token is average and never the highest.
    mean = tensor.float().mean(dim=0, keepdim=True).to(tensor.dtype)
    added = _padded_rows(len(tensor)) - len(tensor)
    return torch.cat([tensor, mean.expand(added, -1)]).contiguous()

"""Export of a network as a Hugging Face folder, in the plainest format that can hold it.

`stock`: as published, or with one width for all experts, so that transformers loads it. `padded`:
the same for experts of different widths, zero-padded to the widest. `slimbench`: as in memory,
ragged or packed, with a `slimbench.json` that `bench.models.loading` reads. `classifier`: an image
classifier's own config and weights, and on request an ONNX file. All weights are safetensors.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from bench.errors import UserError
from bench.models import structure, vision
from bench.models.model import Model
from bench.models.padding import common_widths, empty_network, fits, padded
from bench.models.residence import is_offloaded

Form = Literal["stock", "padded", "slimbench", "classifier"]


def save(model: Model, folder: Path, *, pad: bool, onnx: bool = False) -> Form:
    """Write network and tokenizer or processor to a folder, and return the format.

    With `pad`, ragged experts are zero-padded so that stock transformers loads them. With `onnx`,
    an image classifier is written as ONNX as well.

    Raises:
        UserError: no format can hold the network, it is offloaded, or the requested format does not
            exist for its kind of model.
    """
    network: Any = model.network
    if isinstance(network, vision.Classifier):
        return _save_classifier(network, folder, pad=pad, onnx=onnx)
    if onnx:
        raise UserError(f"--onnx is for image classifiers; {model.anatomy.architecture} is none")
    if is_offloaded(network):
        raise UserError("a model is written from memory only: set model.device_map=null")
    description = structure.describe(network)
    # Before the first byte is written: a folder that loads as a different network is worse than
    # none.
    refuse_foreign(network, description)
    form = _form(model, description, pad=pad)
    (model.processor or model.tokenizer).save_pretrained(folder)
    if form == "slimbench":
        assert description is not None
        # By default, transformers converts fused experts back to the checkpoint's per-expert names,
        # a mapping that does not know ragged or packed weights.
        network.save_pretrained(folder, save_original_format=False)
        structure.write(description, folder)
        return form
    if description is not None:
        network = padded(network, model.anatomy, common_widths(network.config, model.anatomy))
    network.save_pretrained(folder)
    return form


def _save_classifier(network: vision.Classifier, folder: Path, *, pad: bool, onnx: bool) -> Form:
    """Write an image classifier, whose config describes its full shape."""
    if pad:
        raise UserError(f"--padded is for MoE models; {network.config.architecture} has no experts")
    vision.save(network, folder)
    if onnx:
        vision.to_onnx(network, folder)
    return "classifier"


def _form(model: Model, description: structure.Description | None, *, pad: bool) -> Form:
    """Return the plainest format that holds the network."""
    if description is None:
        return "stock"
    network: Any = model.network
    if any(description["packed"].values()):
        if pad:
            raise UserError("packed weights cannot be padded: leave out --padded")
        return "slimbench"
    # Equal widths need no description: the config can state them, and the folder stays loadable
    # without slimbench.
    if fits(model.anatomy, common_widths(network.config, model.anatomy)):
        return "stock"
    return "padded" if pad else "slimbench"


def refuse_foreign(network: nn.Module, description: structure.Description | None) -> None:
    """Raise if config and description would not rebuild the network as it is."""
    whole: Any = network
    rebuilt = empty_network(whole.config, whole.dtype)
    if description is not None:
        with torch.device("meta"):
            structure.rebuild(rebuilt, description)
    known = dict(rebuilt.named_modules())
    for name, module in network.named_modules():
        # Exact types, not isinstance: a subclass with a different forward would be rebuilt as its
        # base.
        if name and type(module) is not type(known.get(name)):
            raise UserError(
                f"{name} is a {type(module).__name__}, which cannot be written to a folder"
            )
    # On the meta device, so the check costs no memory for weights.
    shapes = {key: weight.shape for key, weight in rebuilt.state_dict().items()}
    for key, weight in network.state_dict().items():
        if shapes.get(key) != weight.shape:
            raise UserError(f"{key} has a shape that differs from the network's config")

"""From a model's files to a network that is ready to be compressed and evaluated."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from bench import device as devices
from bench.errors import UserError
from bench.models.config import ModelConfig
from bench.models.model import Model
from bench.models.source import Source, prefetch, resolve

if TYPE_CHECKING:
    import torch
    from torch import nn

__all__ = ["Source", "load", "open_folder", "prefetch", "resolve", "skeleton"]

VOCABULARIES = ("tokenizer.json", "*.model", "vocab.*", "*.tiktoken")
# What transformers raises for a folder that it cannot make a model from.
FAULTS = (OSError, ValueError, KeyError, TypeError, ImportError, RuntimeError, AttributeError)


def skeleton(source: Source) -> nn.Module:
    """Return the network on the meta device: all its modules and shapes, no weight."""
    import torch

    from bench.models import classifiers, structure

    if source.config.kind == "image_classifier":
        return classifiers.empty(source)
    _refuse_classifier(source)
    description = structure.read(source.folder)
    with _in_one_sentence(source), torch.device("meta"):
        network = _published(source)
        if description is not None:
            structure.rebuild(network, description)
    return network


def _published(source: Source) -> nn.Module:
    """Return a network of the shape that its config says, on the current default device."""
    network = _automatic(source).from_config(
        _network_config(source),
        attn_implementation=source.config.attention,
        trust_remote_code=source.config.trust_remote_code,
    )
    return cast("nn.Module", network)


def load(source: Source) -> Model:
    """Return the model in evaluation mode, on its device, with no gradients asked for.

    Raises:
        UserError: the folder cannot be loaded, lacks weights, has weights that the network does
            not know, or holds NaN.
    """
    device = devices.pick(source.config.device)
    with _in_one_sentence(source):
        network = _network(source, device)
    network.eval().requires_grad_(False)
    _refuse_nan(network, source.config)
    with _in_one_sentence(source):
        reads = _reads(source)
    return Model(
        config=source.config,
        network=network,
        **reads,
        fingerprint=source.fingerprint,
        revision=source.revision,
        device=next(network.parameters()).device,
    )


def open_folder(folder: str | Path, **settings: Any) -> Model:
    """Return the model in a local folder, ordinary or as `bench export` writes it, in one call.

    `settings` are those of a model config, such as `device="cuda"` or `dtype="bfloat16"`.
    """
    path = Path(folder)
    config = ModelConfig(name=path.name, source="local", path=str(path), **settings)
    return load(resolve(config, offline=True))


def _network_config(source: Source) -> Any:
    """Return the network's own config as transformers reads it."""
    from transformers import AutoConfig

    from bench.models import deepseek_moe

    deepseek_moe.register()
    return AutoConfig.from_pretrained(
        source.folder,
        local_files_only=True,
        trust_remote_code=source.config.trust_remote_code,
    )


def _network(source: Source, device: torch.device) -> nn.Module:
    """Read the weights into a network on the device, or spread over devices by `device_map`."""
    from bench.models import classifiers, placement

    config = source.config
    if config.kind == "image_classifier":
        return classifiers.load(source, device)
    folder = placement.offload_folder() if config.device_map else None
    network, report = _reader(source).from_pretrained(
        source.folder,
        config=_network_config(source),
        dtype=devices.dtype(config.dtype, device),
        device_map=placement.device_map(config.device_map, device, lambda: skeleton(source)),
        offload_folder=folder,
        attn_implementation=config.attention,
        trust_remote_code=config.trust_remote_code,
        use_safetensors=True,
        local_files_only=True,
        output_loading_info=True,
    )
    if folder is not None:
        placement.remove_with(network, folder)
    for kind in ("missing", "unexpected", "mismatched"):
        keys = sorted(str(key) for key in report.get(f"{kind}_keys", ()))
        if keys:
            names = ", ".join(keys[:3])
            raise UserError(f"{source.folder} has {len(keys)} {kind} weights, such as {names}")
    return cast("nn.Module", network)


def _reader(source: Source) -> Any:
    """Return the class whose `from_pretrained` makes the network of a folder."""
    import torch

    from bench.models import structure

    description = structure.read(source.folder)
    if description is None:
        return _automatic(source)
    with torch.device("meta"):
        return structure.described_class(type(_published(source)), description)


def _automatic(source: Source) -> Any:
    """Return transformers' class that makes networks of the model's kind."""
    import transformers

    classes = {
        "causal_lm": transformers.AutoModelForCausalLM,
        "image_text": transformers.AutoModelForImageTextToText,
    }
    return classes[source.config.kind]


def _reads(source: Source) -> dict[str, Any]:
    """Return what turns inputs into tensors, by the names that `Model` has for it."""
    if source.config.kind == "image_text":
        processor = _processor(source)
        return {"processor": processor, "tokenizer": processor.tokenizer}
    if source.config.kind == "image_classifier":
        return {"tokenizer": None}
    return {"tokenizer": _tokenizer(source)}


def _refuse_classifier(source: Source) -> None:
    """Raise when a folder that is to be read by transformers holds an image classifier of ours."""
    from bench.models.fresh import is_fresh

    if is_fresh(source.config):
        raise UserError(f"{source.config.source} needs model.kind=image_classifier")
    try:
        said = json.loads((source.folder / "config.json").read_text(encoding="utf-8"))
    except ValueError:
        return  # transformers says what is wrong with it
    if isinstance(said, dict) and "architecture" in said and "model_type" not in said:
        raise UserError(
            f"{source.folder} holds an image classifier ({said['architecture']}): "
            "set model.kind=image_classifier"
        )


def _processor(source: Source) -> Any:
    """Return the processor that lies beside the weights."""
    from transformers import AutoProcessor

    processor = AutoProcessor.from_pretrained(
        source.folder,
        local_files_only=True,
        trust_remote_code=source.config.trust_remote_code,
    )
    # Without a file about images transformers quietly returns the tokenizer alone.
    if not hasattr(processor, "image_processor"):
        raise UserError(f"{source.folder} holds no image processor")
    return processor


def _tokenizer(source: Source) -> Any:
    """Return the tokenizer that lies beside the weights."""
    from transformers import AutoTokenizer

    # Without a vocabulary transformers quietly makes a tokenizer that knows no word.
    if not any(any(source.folder.glob(pattern)) for pattern in VOCABULARIES):
        raise UserError(f"{source.folder} holds no tokenizer")

    return AutoTokenizer.from_pretrained(
        source.folder,
        local_files_only=True,
        trust_remote_code=source.config.trust_remote_code,
    )


def _refuse_nan(network: nn.Module, config: ModelConfig) -> None:
    """Raise when a weight is NaN; `amax` hands NaN on, which spares a mask of every weight."""
    for name, weight in network.named_parameters():
        readable = weight.is_floating_point() and weight.numel() > 0 and not weight.is_meta
        # Eight-bit floats have no maximum in torch.
        if readable and weight.element_size() > 1 and bool(weight.amax().isnan()):
            raise UserError(f"the weights of {config.name} hold NaN, for instance in {name}")


@contextmanager
def _in_one_sentence(source: Source) -> Iterator[None]:
    """Turn what transformers raises inside the block into one sentence; keep its warnings quiet."""
    from transformers.utils import logging as transformers_logging

    level = transformers_logging.get_verbosity()
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity(logging.ERROR)
    transformers_logging.disable_progress_bar()
    try:
        yield
    except FAULTS as error:
        reason = next((line for line in str(error).splitlines() if line), type(error).__name__)
        raise UserError(f"{source.folder} cannot be loaded: {reason}") from error
    finally:
        transformers_logging.set_verbosity(level)
        if bars:
            transformers_logging.enable_progress_bar()

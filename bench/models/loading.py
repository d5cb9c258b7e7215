"""Loading of a model: from a source's files to a network ready to be compressed and evaluated."""

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
# Exceptions that transformers raises for a folder from which it cannot build a model.
FAULTS = (OSError, ValueError, KeyError, TypeError, ImportError, RuntimeError, AttributeError)


def skeleton(source: Source) -> nn.Module:
    """Build the network on the meta device: all modules and shapes, no weights."""
    import torch

    from bench.models import classifiers, structure

    if source.config.kind == "image_classifier":
        return classifiers.empty(source)
    _refuse_classifier(source)
    description = structure.read(source.folder)
    # The constructor runs under the meta device, so even a 100 GB model is inspected in seconds;
    # replaced modules are rebuilt inside the block for the same reason.
    with _in_one_sentence(source), torch.device("meta"):
        network = _published(source)
        if description is not None:
            structure.rebuild(network, description)
    return network


def _published(source: Source) -> nn.Module:
    network = _automatic(source).from_config(
        _network_config(source),
        attn_implementation=source.config.attention,
        trust_remote_code=source.config.trust_remote_code,
    )
    return cast("nn.Module", network)


def load(source: Source) -> Model:
    """Load the model onto its device, in evaluation mode and without gradients.

    Raises:
        UserError: the folder cannot be loaded, lacks weights, has weights that the network does not
            have, or contains NaN.
    """
    device = devices.pick(source.config.device)
    with _in_one_sentence(source):
        network = _network(source, device)
    # Methods that train turn gradients on for what they train; everything else runs without a
    # graph.
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
    """Load the model of a local folder, published or written by `bench export`, in one call.

    `settings` are those of a model config, such as `device="cuda"` or `dtype="bfloat16"`.
    """
    path = Path(folder)
    config = ModelConfig(name=path.name, source="local", path=str(path), **settings)
    return load(resolve(config, offline=True))


def _network_config(source: Source) -> Any:
    from transformers import AutoConfig

    from bench.models import deepseek_moe

    # Before AutoConfig reads config.json: afterwards `model_type: deepseek` would be unknown to it.
    deepseek_moe.register()
    return AutoConfig.from_pretrained(
        source.folder,
        local_files_only=True,
        trust_remote_code=source.config.trust_remote_code,
    )


def _network(source: Source, device: torch.device) -> nn.Module:
    """Read the weights into a network on the device, or spread it over devices by `device_map`."""
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
        # Pickled weights can run code when opened; transformers would fall back to them.
        use_safetensors=True,
        local_files_only=True,
        # Without the report, transformers initialises missing weights at random and only warns.
        output_loading_info=True,
    )
    if folder is not None:
        # Offloaded weights are read from the folder in every forward, so it lives as long as the
        # network.
        placement.remove_with(network, folder)
    for kind in ("missing", "unexpected", "mismatched"):
        keys = sorted(str(key) for key in report.get(f"{kind}_keys", ()))
        if keys:
            names = ", ".join(keys[:3])
            raise UserError(f"{source.folder} has {len(keys)} {kind} weights, such as {names}")
    return cast("nn.Module", network)


def _reader(source: Source) -> Any:
    """Return the class whose `from_pretrained` builds the network of a folder."""
    import torch

    from bench.models import structure

    description = structure.read(source.folder)
    if description is None:
        return _automatic(source)
    with torch.device("meta"):
        # `from_pretrained` constructs the network itself, so replaced modules cannot be installed
        # between construction and loading. The class it is given installs them in its constructor.
        return structure.described_class(type(_published(source)), description)


def _automatic(source: Source) -> Any:
    import transformers

    classes = {
        "causal_lm": transformers.AutoModelForCausalLM,
        "image_text": transformers.AutoModelForImageTextToText,
    }
    return classes[source.config.kind]


def _reads(source: Source) -> dict[str, Any]:
    """Return tokenizer or processor under their field names in `Model`."""
    if source.config.kind == "image_text":
        processor = _processor(source)
        return {"processor": processor, "tokenizer": processor.tokenizer}
    if source.config.kind == "image_classifier":
        return {"tokenizer": None}
    return {"tokenizer": _tokenizer(source)}


def _refuse_classifier(source: Source) -> None:
    """Raise if a folder meant for transformers holds an image classifier of ours."""
    from bench.models.fresh import is_fresh

    if is_fresh(source.config):
        raise UserError(f"{source.config.source} needs model.kind=image_classifier")
    try:
        said = json.loads((source.folder / "config.json").read_text(encoding="utf-8"))
    except ValueError:
        return  # transformers explains what is wrong with it
    if isinstance(said, dict) and "architecture" in said and "model_type" not in said:
        raise UserError(
            f"{source.folder} contains an image classifier ({said['architecture']}): "
            "set model.kind=image_classifier"
        )


def _processor(source: Source) -> Any:
    from transformers import AutoProcessor

    processor = AutoProcessor.from_pretrained(
        source.folder,
        local_files_only=True,
        trust_remote_code=source.config.trust_remote_code,
    )
    # Without a preprocessor config, AutoProcessor silently returns the tokenizer alone.
    if not hasattr(processor, "image_processor"):
        raise UserError(f"{source.folder} contains no image processor")
    return processor


def _tokenizer(source: Source) -> Any:
    from transformers import AutoTokenizer

    # Without a vocabulary file, AutoTokenizer silently builds a tokenizer that knows no words.
    if not any(any(source.folder.glob(pattern)) for pattern in VOCABULARIES):
        raise UserError(f"{source.folder} contains no tokenizer")

    return AutoTokenizer.from_pretrained(
        source.folder,
        local_files_only=True,
        trust_remote_code=source.config.trust_remote_code,
    )


def _refuse_nan(network: nn.Module, config: ModelConfig) -> None:
    """Raise if a weight contains NaN."""
    for name, weight in network.named_parameters():
        readable = weight.is_floating_point() and weight.numel() > 0 and not weight.is_meta
        # `amax` propagates NaN and needs no boolean mask the size of the weight. It is not
        # implemented for 8-bit floats.
        if readable and weight.element_size() > 1 and bool(weight.amax().isnan()):
            raise UserError(f"the weights of {config.name} contain NaN, for instance in {name}")


@contextmanager
def _in_one_sentence(source: Source) -> Iterator[None]:
    """Turn exceptions of transformers into one sentence, and silence its warnings."""
    from transformers.utils import logging as transformers_logging

    level = transformers_logging.get_verbosity()
    bars = transformers_logging.is_progress_bar_enabled()
    # Verbosity and progress bars are global state of transformers: both are restored, since the
    # caller may be a library user.
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

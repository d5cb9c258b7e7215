"""From a source's files to a network ready to be compressed, language model or classifier."""

from __future__ import annotations

import functools
import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast

import torch

from bench.data.chat import Processor, Tokenizer
from bench.device import devices
from bench.errors import UserError
from bench.models.classifiers import architectures, serialization
from bench.models.classifiers.classifier import Classifier, VisionConfig
from bench.models.model import Model, max_sequence_length
from bench.models.network import NetworkConfig, embedded_ids, learned_positions
from bench.models.source import ModelSource, fresh_vision_config, is_fresh, resolve_model
from bench.schema import ModelConfig

if TYPE_CHECKING:
    from torch import nn

VOCABULARY_FILES = ("tokenizer.json", "*.model", "vocab.*", "*.tiktoken")

# Exceptions that transformers raises for a folder from which it cannot build a model.
LOADING_ERRORS = (
    OSError,
    ValueError,
    KeyError,
    TypeError,
    ImportError,
    RuntimeError,
    AttributeError,
)


class _NetworkClass(Protocol):
    """Class of transformers that builds networks: an Auto class, or that of an architecture."""

    def from_config(self, config: NetworkConfig, **settings: object) -> nn.Module: ...

    def from_pretrained(
        self, folder: Path, **settings: object
    ) -> tuple[nn.Module, dict[str, list[object]]]: ...


def skeleton(source: ModelSource) -> nn.Module:
    """Build the network on the meta device: all modules and shapes, no weights."""
    from bench.models import replaced_modules

    if source.config.kind == "image_classifier":
        return classifier_skeleton(source)
    _refuse_classifier(source)
    description = replaced_modules.read_description(source.folder)
    # The constructor runs under the meta device, so even a 100 GB model is inspected in seconds;
    # replaced modules are rebuilt inside the block for the same reason.
    with _one_sentence_errors(source), torch.device("meta"):
        network = _published_network(source)
        if description is not None:
            replaced_modules.install_described_modules(network, description)
    return network


def _published_network(source: ModelSource) -> nn.Module:
    return _auto_class(source).from_config(
        _network_config(source),
        attn_implementation=source.config.attention,
        trust_remote_code=source.config.trust_remote_code,
    )


@functools.lru_cache(maxsize=4)
def load_tokenizer(source: ModelSource, files: frozenset[tuple[str, str]]) -> Tokenizer:
    """Load the tokenizer of a language model alone; `files` are the model's files with hashes."""
    # Cached by the content of the files, since every run of a sweep asks.
    with _one_sentence_errors(source):
        tokenizer, _ = _load_tokenizer_and_processor(source)
    assert tokenizer is not None
    return tokenizer


def check_tokenizer(config: ModelConfig, tokenizer: Tokenizer, network: nn.Module) -> None:
    """Check that a network takes what its tokenizer makes, as far as shapes tell.

    Raises:
        UserError: ids are beyond the embedding, or sequences longer than the learned positions.
    """
    rows = embedded_ids(network)
    beyond = _tokens_beyond(tokenizer, rows)
    # Special tokens come from no text. Many published models have one, mostly for padding, that
    # they never had an embedding for.
    special = set(tokenizer.all_special_tokens) - {tokenizer.bos_token, tokenizer.eos_token}
    unfit = sorted(beyond.keys() - special, key=beyond.__getitem__)
    if unfit:
        raise UserError(
            f"the tokenizer of model {config.name} has ids up to {max(beyond.values())}, such as "
            f"{beyond[unfit[0]]} for {unfit[0]!r}, but the network has embeddings for {rows}: use "
            "the tokenizer that belongs to the weights"
        )
    positions, longest = learned_positions(network), max_sequence_length(config, network)
    if positions is not None and positions < longest:
        raise UserError(
            f"model.max_length={longest}: model {config.name} has learned positions for "
            f"{positions} tokens: give {positions} or less"
        )


# Cached, since every run of a sweep asks and a vocabulary has up to 200,000 entries.
@functools.lru_cache(maxsize=4)
def _tokens_beyond(tokenizer: Tokenizer, rows: int) -> dict[str, int]:
    """Return the tokens whose ids are not below `rows`."""
    return {text: number for text, number in tokenizer.get_vocab().items() if number >= rows}


def load_model(source: ModelSource) -> Model:
    """Load the model onto its device, in evaluation mode and without gradients.

    Raises:
        UserError: the folder cannot be loaded, lacks weights, has weights that the network does not
            have, or contains NaN.
    """
    device = devices.select_device(source.config.device)
    with _one_sentence_errors(source):
        network = _load_network(source, device)
    # Methods that train turn gradients on for what they train; everything else runs without a
    # graph.
    network.eval().requires_grad_(False)
    _refuse_nan(network, source.config)
    with _one_sentence_errors(source):
        tokenizer, processor = _load_tokenizer_and_processor(source)
    return Model(
        config=source.config,
        network=network,
        tokenizer=tokenizer,
        processor=processor,
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
    return load_model(resolve_model(config, offline=True))


def _network_config(source: ModelSource) -> NetworkConfig:
    from transformers import AutoConfig

    from bench.models import deepseek_moe

    # Before AutoConfig reads config.json: afterwards `model_type: deepseek` would be unknown to it.
    deepseek_moe.register_deepseek()
    config: NetworkConfig = AutoConfig.from_pretrained(source.folder, **_local_files(source))
    return config


def _local_files(source: ModelSource) -> dict[str, bool]:
    """Return the settings with which transformers reads a source's folder and nothing else."""
    return {"local_files_only": True, "trust_remote_code": source.config.trust_remote_code}


def _load_network(source: ModelSource, device: torch.device) -> nn.Module:
    """Read the weights into a network on the device, or spread it over devices by `device_map`."""
    from bench.models import offload

    config = source.config
    if config.kind == "image_classifier":
        return load_classifier(source, device)
    folder = offload.offload_folder() if config.device_map else None
    network, report = _network_class(source).from_pretrained(
        source.folder,
        config=_network_config(source),
        dtype=devices.select_dtype(config.dtype, device),
        device_map=offload.device_map(config.device_map, device, lambda: skeleton(source)),
        offload_folder=folder,
        attn_implementation=config.attention,
        # Pickled weights can run code when opened; transformers would fall back to them.
        use_safetensors=True,
        **_local_files(source),
        # Without the report, transformers initialises missing weights at random and only warns.
        output_loading_info=True,
    )
    if folder is not None:
        # Offloaded weights are read from the folder in every forward, so it lives as long as the
        # network.
        offload.remove_folder_with(network, folder)
    for kind in ("missing", "unexpected", "mismatched"):
        keys = sorted(str(key) for key in report.get(f"{kind}_keys", ()))
        if keys:
            names = ", ".join(keys[:3])
            raise UserError(f"{source.folder} has {len(keys)} {kind} weights, such as {names}")
    return network


def _network_class(source: ModelSource) -> _NetworkClass:
    """Return the class whose `from_pretrained` builds the network of a folder."""
    from bench.models import replaced_modules

    description = replaced_modules.read_description(source.folder)
    if description is None:
        return _auto_class(source)
    with torch.device("meta"):
        # `from_pretrained` constructs the network itself, so replaced modules cannot be installed
        # between construction and loading. The class it is given installs them in its constructor.
        network = _published_network(source)
    return cast("_NetworkClass", replaced_modules.described_class(type(network), description))


def _auto_class(source: ModelSource) -> _NetworkClass:
    import transformers

    classes: dict[str, _NetworkClass] = {
        "causal_lm": transformers.AutoModelForCausalLM,
        "image_text": transformers.AutoModelForImageTextToText,
    }
    return classes[source.config.kind]


def _load_tokenizer_and_processor(
    source: ModelSource,
) -> tuple[Tokenizer | None, Processor | None]:
    if source.config.kind == "image_text":
        processor = _load_processor(source)
        return processor.tokenizer, processor
    if source.config.kind == "image_classifier":
        return None, None
    return _load_tokenizer(source), None


def _refuse_classifier(source: ModelSource) -> None:
    """Raise if a folder meant for transformers holds an image classifier of ours."""
    if is_fresh(source.config):
        raise UserError(f"{source.config.source} needs model.kind=image_classifier")
    try:
        config = json.loads((source.folder / "config.json").read_text(encoding="utf-8"))
    except ValueError:
        return  # transformers explains what is wrong with it
    if isinstance(config, dict) and "architecture" in config and "model_type" not in config:
        raise UserError(
            f"{source.folder} contains an image classifier ({config['architecture']}): "
            "set model.kind=image_classifier"
        )


def _load_processor(source: ModelSource) -> Processor:
    from transformers import AutoProcessor

    processor: Processor = AutoProcessor.from_pretrained(source.folder, **_local_files(source))
    # Without a preprocessor config, AutoProcessor silently returns the tokenizer alone.
    if not hasattr(processor, "image_processor"):
        raise UserError(f"{source.folder} contains no image processor")
    return processor


def _load_tokenizer(source: ModelSource) -> Tokenizer:
    from transformers import AutoTokenizer

    # Without a vocabulary file, AutoTokenizer silently builds a tokenizer that knows no words.
    if not any(any(source.folder.glob(pattern)) for pattern in VOCABULARY_FILES):
        raise UserError(f"{source.folder} contains no tokenizer")
    tokenizer: Tokenizer = AutoTokenizer.from_pretrained(source.folder, **_local_files(source))
    return tokenizer


def _refuse_nan(network: nn.Module, config: ModelConfig) -> None:
    """Raise if a weight contains NaN."""
    for name, weight in network.named_parameters():
        readable = weight.is_floating_point() and weight.numel() > 0 and not weight.is_meta
        # `amax` propagates NaN and needs no boolean mask the size of the weight. It is not
        # implemented for 8-bit floats.
        if readable and weight.element_size() > 1 and bool(weight.amax().isnan()):
            raise UserError(f"the weights of {config.name} contain NaN, for instance in {name}")


@contextmanager
def _one_sentence_errors(source: ModelSource) -> Iterator[None]:
    """Turn exceptions of transformers into one sentence, and suppress its warnings."""
    from transformers.utils import logging as transformers_logging

    level = transformers_logging.get_verbosity()
    bars = transformers_logging.is_progress_bar_enabled()
    # Verbosity and progress bars are global state of transformers: both are restored, since the
    # caller may be a library user.
    transformers_logging.set_verbosity(logging.ERROR)
    transformers_logging.disable_progress_bar()
    try:
        yield
    except LOADING_ERRORS as error:
        reason = next((line for line in str(error).splitlines() if line), type(error).__name__)
        raise UserError(f"{source.folder} cannot be loaded: {reason}") from error
    finally:
        transformers_logging.set_verbosity(level)
        if bars:
            transformers_logging.enable_progress_bar()


def classifier_skeleton(source: ModelSource) -> Classifier:
    """Build the network on the meta device.

    Raises:
        UserError: the folder does not describe a classifier, or its images are too small for it.
    """
    config = _vision_config(source)
    with torch.device("meta"), torch.no_grad():
        try:
            network = architectures.build_classifier(config).eval()
            # Constructors accept any size; only a forward shows that the pooling layers leave no
            # pixel. On meta it costs no arithmetic and the message names no internal shape.
            network(torch.zeros(1, config.channels, config.size, config.size))
        except RuntimeError:
            raise UserError(
                f"{config.architecture} does not fit images of size {config.size} with "
                f"{config.channels} channels: a layer would have an empty output"
            ) from None
    return network


def load_classifier(source: ModelSource, device: torch.device) -> Classifier:
    """Return the network with its weights on the device, not yet in evaluation mode.

    Raises:
        UserError: the weights do not match the network, or `model.device_map` is set.
    """
    if source.config.device_map is not None:
        raise UserError("model.device_map is for language models: set it to null for a classifier")
    # Fresh weights are drawn on the CPU and moved, so that a seed gives the same weights on every
    # device.
    network = (
        _fresh_classifier(source)
        if is_fresh(source.config)
        else serialization.load_classifier_folder(source.folder)
    )
    return network.to(device, devices.select_dtype(source.config.dtype, device))


def _vision_config(source: ModelSource) -> VisionConfig:
    if is_fresh(source.config):
        return fresh_vision_config(source.config)
    return VisionConfig.read(source.folder)


def _fresh_classifier(source: ModelSource) -> Classifier:
    """Draw the weights without advancing the global generator."""
    # Without the fork, fresh weights would shift every later draw (shuffling, calibration), and a
    # run with fresh weights would differ from a run that loads the same weights from a folder.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(source.config.seed or 0)
        return architectures.build_classifier(fresh_vision_config(source.config))

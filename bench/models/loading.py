"""Loading of networks from a model's files: language models and image classifiers."""

from __future__ import annotations

import functools
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast

import torch

from bench.data.chat import Processor, Tokenizer, render_chat
from bench.device import devices
from bench.errors import UserError, error_sentence, one_sentence_errors
from bench.models import checkpoints, text_files_probe
from bench.models.bitpacking import packed_checkpoints
from bench.models.classifiers import architectures, serialization
from bench.models.classifiers.classifier import Classifier, VisionConfig
from bench.models.model import Model, max_sequence_length
from bench.models.network import NetworkConfig, embedded_ids, learned_positions
from bench.models.source import (
    ModelSource,
    fresh_vision_config,
    is_fresh,
    is_state_dict,
    resolve_model,
)
from bench.models.vlm.image_processing import ImageSettings, configure_images
from bench.models.weight_files import read_json_object, weights_variant
from bench.schema import ModelConfig
from bench.ui import note

if TYPE_CHECKING:
    from torch import nn

VOCABULARY_FILES = ("tokenizer.json", "*.model", "vocab.*", "*.tiktoken")


class _NetworkClass(Protocol):
    """Class of transformers that builds networks: an Auto class or one architecture's class."""

    def from_config(self, config: NetworkConfig, **settings: object) -> nn.Module: ...

    def from_pretrained(
        self, folder: Path | None, **settings: object
    ) -> tuple[nn.Module, dict[str, list[object]]]: ...


def skeleton(source: ModelSource) -> nn.Module:
    """Build the network on the meta device: all modules and shapes, no weights."""
    from bench.models import replaced_modules

    if source.config.kind == "image_classifier":
        return classifier_skeleton(source)
    _refuse_classifier(source)
    described = source.is_described
    description = replaced_modules.read_description(source.folder) if described else None
    # The constructor runs on the meta device, so even a 100 GB model is inspected in seconds.
    # Replaced modules are built inside the block for the same reason.
    with one_sentence_errors(source.given), torch.device("meta"):
        network = _published_network(source)
        if description is not None:
            replaced_modules.install_described_modules(network, description)
    if source.adapter is not None:
        checkpoints.refuse_other_base(source.adapter, network)
    return network


def _published_network(source: ModelSource) -> nn.Module:
    config = _network_config(source)
    return _auto_class(source).from_config(
        config,
        attn_implementation=_attention(source.config, config),
        trust_remote_code=source.config.trust_remote_code,
    )


def _attention(given: ModelConfig, config: NetworkConfig) -> str:
    """Return the attention implementation to request: eager if the network has no SDPA.

    transformers falls back likewise by default, but refuses an unsupported explicit choice.
    """
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    devices.check_attention(given.attention)
    # Classes of remote code are not in the mapping; for them transformers raises its own error.
    kind = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    if given.attention != "sdpa" or kind is None or kind._supports_sdpa:
        return given.attention
    _say_eager(kind.__name__)
    return "eager"


@functools.cache  # Once per architecture, because a run builds its network several times.
def _say_eager(architecture: str) -> None:
    note(f"{architecture} has no SDPA in transformers, so model.attention=eager is used")


@functools.lru_cache(maxsize=4)
def load_tokenizer(source: ModelSource) -> Tokenizer:
    """Load only the tokenizer of a language model."""
    # Cached, because every run of a sweep needs it. Sources are equal if their files are.
    with one_sentence_errors(source.given):
        tokenizer, _ = load_tokenizer_and_processor(source)
    assert tokenizer is not None
    return tokenizer


def check_tokenizer(config: ModelConfig, tokenizer: Tokenizer, network: nn.Module) -> None:
    """Check that a network accepts the token ids and lengths of its tokenizer.

    Raises:
        UserError: ids exceed the embedding, or sequences exceed the learned positions.
    """
    rows = embedded_ids(network)
    beyond = _tokens_beyond(tokenizer, rows)
    # Special tokens do not occur in texts. Many published models have one without an embedding,
    # mostly for padding.
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
            f"model.max_length={longest}: model {config.name} has learned positions for only "
            f"{positions} tokens: set it to {positions} or less"
        )


# Cached, because every run of a sweep needs it and a vocabulary has up to 200,000 entries.
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
    if source.adapter is not None:
        # In a run, `skeleton` has refused an adapter for another base already; library code may
        # call this function directly.
        skeleton(source)
    with one_sentence_errors(source.given):
        # Before the weights, because reading them may take minutes.
        tokenizer, processor = load_tokenizer_and_processor(source)
        network = _load_network(source, device)
    # Methods that train enable gradients where they need them; nothing else builds a graph.
    network.eval().requires_grad_(False)
    _refuse_nan(network, source.config)
    quantization = source.quantization
    if quantization is not None:
        counted = sum(weight.numel() for weight in skeleton(source).parameters())
        quantization = replace(quantization, parameters=counted)
    return Model(
        config=source.config,
        network=network,
        tokenizer=tokenizer,
        processor=processor,
        fingerprint=source.fingerprint,
        revision=source.revision,
        quantization=quantization,
        device=next(network.parameters()).device,
    )


# Once per content of a folder, because the tokenizer is also loaded before the model.
@functools.lru_cache(maxsize=4)
def _try_text_files(source: ModelSource) -> None:
    refuse_endless_text_files(source.folder)


def refuse_endless_text_files(folder: Path) -> None:
    """Raise if the tokenizer or a chat template of an untrusted folder does not terminate.

    Raises:
        UserError: trying them exceeded the limits of time or memory, or crashed.
    """
    # By path and isolated, so that nothing is imported from the working folder or the model's.
    command = [sys.executable, "-I", text_files_probe.__file__, str(folder)]
    try:
        tried = subprocess.run(
            command,
            capture_output=True,
            text=True,
            check=False,
            timeout=10 * text_files_probe.SECONDS,
        )
    except subprocess.TimeoutExpired:
        raise UserError(f"{folder}: its tokenizer or chat template does not end") from None
    if tried.returncode:
        last = (tried.stdout.splitlines() or ["its tokenizer"])[-1]
        words = tried.stderr.strip().splitlines()
        # A negative code is a signal: of the time limit, or an abort for lack of memory.
        fault = words[-1] if words and tried.returncode > 0 else "no end within the limits"
        raise UserError(
            f"{folder}: {last} cannot be used: {fault} (tried with {text_files_probe.SECONDS} s "
            f"and {text_files_probe.BYTES // 2**30} GiB of memory)"
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

    # AutoConfig does not know this model type unless it is registered before.
    if read_json_object(source.folder / "config.json").get("model_type") == "deepseek":
        from bench.models import deepseek_moe

        deepseek_moe.register_deepseek()
    config: NetworkConfig = AutoConfig.from_pretrained(source.folder, **_local_files(source))
    return config


def _local_files(source: ModelSource) -> dict[str, bool]:
    """Return arguments that make transformers read only the files of a source's folder."""
    return {"local_files_only": True, "trust_remote_code": source.config.trust_remote_code}


def _load_network(source: ModelSource, device: torch.device) -> nn.Module:
    """Load a network's weights onto a device, or onto several devices with `device_map`."""
    from bench.models import offload

    config = source.config
    if config.kind == "image_classifier":
        return load_classifier(source, device)
    folder = offload.offload_folder() if config.device_map else None
    quantized = source.quantization.loading_settings if source.quantization else {}
    network_config, dtype = _network_config(source), devices.select_dtype(config.dtype, device)
    unpacked: dict[str, object] = {}
    if source.quantization is not None and source.quantization.packing is not None:
        wanted = skeleton(source).state_dict().keys()
        unpacked = packed_checkpoints.loading_settings(
            source.folder, source.quantization.packing, network_config, dtype, wanted
        )
    network, report = _network_class(source).from_pretrained(
        # transformers loads weights from a folder or from memory.
        None if unpacked else source.folder,
        config=network_config,
        dtype=dtype,
        device_map=offload.device_map(config.device_map, device, lambda: skeleton(source)),
        offload_folder=folder,
        attn_implementation=_attention(config, network_config),
        variant=weights_variant(source.folder),
        # transformers would fall back to pickled weights, which can run code when opened.
        use_safetensors=True,
        **_local_files(source),
        **quantized,
        **unpacked,
        # Without the report, transformers only warns about missing weights and draws random ones.
        output_loading_info=True,
    )
    if folder is not None:
        # Offloaded weights are read from the folder in every forward, so the folder must exist as
        # long as the network.
        offload.remove_folder_with(network, folder)
    for kind in ("missing", "unexpected", "mismatched"):
        keys = sorted(str(key) for key in report.get(f"{kind}_keys", ()))
        if keys:
            names = ", ".join(keys[:3])
            raise UserError(f"{source.folder} has {len(keys)} {kind} weights, such as {names}")
    return checkpoints.merge_adapter(network, source.adapter) if source.adapter else network


def _network_class(source: ModelSource) -> _NetworkClass:
    """Return the class whose `from_pretrained` builds the network of a folder."""
    from bench.models import replaced_modules

    if not source.is_described:
        # Auto classes need a folder, which weights in memory do not have.
        packed = source.quantization is not None and source.quantization.packing is not None
        return cast("_NetworkClass", type(skeleton(source))) if packed else _auto_class(source)
    description = replaced_modules.read_description(source.folder)
    with torch.device("meta"):
        # `from_pretrained` constructs the network itself, so the class that it gets must install
        # replaced modules in its constructor.
        network = _published_network(source)
    return cast("_NetworkClass", replaced_modules.described_class(type(network), description))


def _auto_class(source: ModelSource) -> _NetworkClass:
    import transformers

    classes: dict[str, _NetworkClass] = {
        "causal_lm": transformers.AutoModelForCausalLM,
        "image_text": transformers.AutoModelForImageTextToText,
    }
    return classes[source.config.kind]


def load_tokenizer_and_processor(
    source: ModelSource,
) -> tuple[Tokenizer | None, Processor | None]:
    """Load what converts inputs to tensors, without the weights; None if a model has none."""
    if source.config.kind == "image_classifier":
        return None, None
    if not source.is_embedded:
        _try_text_files(source)
    if source.config.kind == "image_text":
        processor = _load_processor(source)
        return processor.tokenizer, processor
    return _load_tokenizer(source), None


def _refuse_classifier(source: ModelSource) -> None:
    """Raise if a folder to be loaded by transformers contains an image classifier of slimbench."""
    if is_fresh(source.config):
        raise UserError(f"{source.config.source} needs model.kind=image_classifier")
    config = read_json_object(source.folder / "config.json")
    if "architecture" in config and "model_type" not in config:
        raise UserError(
            f"{source.folder} contains an image classifier ({config['architecture']}): "
            "set model.kind=image_classifier"
        )


def _load_processor(source: ModelSource) -> Processor:
    from transformers import AutoProcessor

    processor: Processor = AutoProcessor.from_pretrained(source.folder, **_local_files(source))
    # Without a preprocessor config, AutoProcessor returns the tokenizer alone, without a warning.
    if not hasattr(processor, "image_processor"):
        raise UserError(f"{source.folder} contains no image processor")
    # Otherwise, both would be refused only after the weights are loaded.
    configure_images(processor, _network_config(source).model_type, source.config.processor)
    render_chat(processor, [("What is this?", None)], images=1, system=None)
    return processor


@functools.lru_cache(maxsize=4)
def image_settings(source: ModelSource) -> ImageSettings:
    """Return how an image_text model preprocesses images, as part of a run's id."""
    with one_sentence_errors(source.given):
        processor = _load_processor(source)
        model_type = _network_config(source).model_type
        return configure_images(processor, model_type, source.config.processor)


def _load_tokenizer(source: ModelSource) -> Tokenizer:
    from transformers import AutoTokenizer

    # Without a vocabulary file, AutoTokenizer builds an empty tokenizer without a warning.
    if not any(any(source.folder.glob(pattern)) for pattern in VOCABULARY_FILES):
        raise UserError(f"{source.folder} contains no tokenizer")
    tokenizer: Tokenizer = AutoTokenizer.from_pretrained(source.folder, **_local_files(source))
    return tokenizer


def _refuse_nan(network: nn.Module, config: ModelConfig) -> None:
    """Raise if a weight contains NaN."""
    for name, weight in network.named_parameters():
        readable = weight.is_floating_point() and weight.numel() > 0 and not weight.is_meta
        # `amax` propagates NaN and does not allocate a mask of the weight's size. It is not
        # implemented for 8-bit floats.
        if readable and weight.element_size() > 1 and bool(weight.amax().isnan()):
            raise UserError(f"the weights of {config.name} contain NaN, for instance in {name}")


def classifier_skeleton(source: ModelSource) -> Classifier:
    """Build the network on the meta device.

    Raises:
        UserError: the folder does not describe a classifier, or its images are too small for it.
    """
    config = _vision_config(source)
    with torch.device("meta"), torch.no_grad():
        network = architectures.build_classifier(config).eval()
        # Constructors accept any image size. A forward on meta is free and shows whether pooling
        # layers leave no pixel; the message does not mention internal shapes.
        image = torch.zeros(1, config.channels, config.size, config.size)
        ours = config.architecture in architectures.ARCHITECTURES
        try:
            logits = network(image)
        # The forward of a user's own network may raise any exception.
        except Exception as error:
            if ours and not isinstance(error, RuntimeError):
                raise
            reason = "a layer would have an empty output" if ours else error_sentence(error)
            raise UserError(
                f"{config.architecture} does not fit images of size {config.size} with "
                f"{config.channels} channels: {reason}"
            ) from None
    given = tuple(getattr(logits, "shape", ()))
    if given != (1, config.classes):
        raise UserError(
            f"{config.architecture} returns {given or type(logits).__name__} for one image, "
            f"but logits of shape {(1, config.classes)} are needed"
        )
    return network


def load_classifier(source: ModelSource, device: torch.device) -> Classifier:
    """Return the network with its weights on the device; it may be in training mode.

    Raises:
        UserError: the weights do not match the network, or `model.device_map` is set.
    """
    if source.config.device_map is not None:
        raise UserError("model.device_map is for language models: set it to null for a classifier")
    # Random weights are drawn on the CPU and moved, so that a seed gives the same weights on
    # every device.
    if is_fresh(source.config):
        network = _fresh_classifier(source)
    elif is_state_dict(source.config):
        network = serialization.load_state(_fresh_classifier(source), source.given)
    else:
        _vision_config(source)  # Registers the user's own class.
        network = serialization.load_classifier_folder(source.folder)
    return network.to(device, devices.select_dtype(source.config.dtype, device))


def _vision_config(source: ModelSource) -> VisionConfig:
    if is_fresh(source.config) or is_state_dict(source.config):
        return fresh_vision_config(source.config)
    if source.config.target is not None:
        architectures.register_module(source.config.target)
    return VisionConfig.read(source.folder)


def _fresh_classifier(source: ModelSource) -> Classifier:
    """Draw the weights without advancing the global generator."""
    # Without the fork, drawing weights would change all later draws (shuffling, calibration),
    # which would then differ from those of a run that loads the same weights from a folder.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(source.config.seed or 0)
        return architectures.build_classifier(fresh_vision_config(source.config))

"""Locating a model's files: embedded, random weights, a local folder, a single file, or the hub.

No weight is read here; `bench.models.weight_files` finds and checks weight files.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from bench.data.digests import contents_hash, fingerprint
from bench.data.hub import HubRequest, hub_folder, hub_weight_bytes, not_cached_message
from bench.errors import MissingData, UserError, unknown_name
from bench.models import checkpoints, embedded
from bench.models.weight_files import (
    ADAPTER_CONFIG,
    DESCRIPTION_FILE,
    check_header,
    find_weight_files,
    read_json_object,
    refuse_outside_links,
)
from bench.schema import ModelConfig

if TYPE_CHECKING:
    from bench.data.image_sets import ImageShape
    from bench.models.classifiers.classifier import VisionConfig


SHAPES = Path(__file__).parent / "shapes"
"""Folder of configs with only the shapes of models that are too large for most machines."""
EMBEDDED_PREFIX = "embedded:"
COMMIT_PATTERN = re.compile(r"[0-9a-f]{40}")
DOWNLOAD_PATTERNS = ["*.safetensors", "*.json", "*.jinja", "*.model", "*.tiktoken", "*.txt"]


# Files besides weights that transformers reads: `from_pretrained` of config, tokenizer and
# processor. Recipes, licences and model cards in the same folders do not affect results.
_READ_FILES = (
    "config.json", "config.*.json", "generation_config.json", DESCRIPTION_FILE,
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "normalizer.json",
    "*vocab*", "merges.txt", "dict.txt", "emoji.json", "byte_maps.json", "word_*.json",
    "tekken.json", "*.model", "*.tiktoken", "*.spm", "*.codes", "*.tokenizer", "*tokenizer/*",
    "chat_template*", "additional_chat_templates/*",
    "processor_config.json", "*preprocessor_config.json", "audio_tokenizer_config.json",
)  # fmt: skip


def read_files(folder: Path, *, remote_code: bool) -> dict[str, str]:
    """Return a hash of every file that loading a model reads, except weights."""
    patterns = (*_READ_FILES, "**/*.py") if remote_code else _READ_FILES
    files = {file for pattern in patterns for file in folder.glob(pattern) if file.is_file()}
    # Read on every run, unlike weights, whose hashes are cached: these files are small.
    return {str(file.relative_to(folder)): contents_hash({"": file}) for file in sorted(files)}


@dataclass(frozen=True)
class ModelSource:
    """A model's files, located and checked, without weights in memory.

    `fingerprint` is a SHA-256 of the weight files, including the adapter's. `revision` is the
    commit on the hub, None for other sources. `files` has a hash of every other file that loading
    reads, so two sources are equal only if the same model is loaded from them. Random weights have
    no files: `folder` is that of the code that draws them, and `fingerprint` covers what they
    depend on. `file` is a single file given instead of a folder: a state dict, or a GGUF file,
    whose conversion is in `folder`.
    """

    config: ModelConfig
    folder: Path
    fingerprint: str
    revision: str | None
    files: Mapping[str, str] = field(default_factory=dict, hash=False)
    file: Path | None = None
    adapter: Path | None = None
    adapter_revision: str | None = None
    quantization: checkpoints.Quantization | None = None

    @property
    def is_embedded(self) -> bool:
        """Whether the files ship with the package and are therefore trusted."""
        return self.config.path is None and self.config.source.startswith(EMBEDDED_PREFIX)

    @property
    def is_described(self) -> bool:
        """Whether the folder describes modules that replace published ones."""
        return (self.folder / DESCRIPTION_FILE).is_file()

    @property
    def given(self) -> Path:
        """The file or folder to name in messages."""
        return self.file or self.folder


def resolve_model(config: ModelConfig, *, offline: bool) -> ModelSource:
    """Locate and check the files of a model; hub models are downloaded unless `offline`.

    Raises:
        MissingData: the files are not available; the message says how to get them.
        UserError: the files are unusable.
    """
    _gate_remote_code(config)
    if is_fresh(config):
        refuse_adapter(config, "drawn at random")
        drawn = fresh_fingerprint(config)
        return ModelSource(config, fresh_folder(), drawn, None)
    if is_state_dict(config):
        return _state_dict_source(config)
    if config.path is not None and config.path.endswith(checkpoints.GGUF_SUFFIX):
        return _gguf_source(config, offline=offline)
    folder, revision = _model_folder(config, offline=offline)
    # First, because a system folder has links to other folders; nothing has been opened yet.
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder} is not a model folder: it has no config.json")
    # Before any file is opened, because it refuses links to files outside the folder.
    weights = find_weight_files(folder)
    if config.trust_remote_code:
        _refuse_code_from_elsewhere(folder)
    quantization, stored = None, _stored_quantization(folder)
    if stored:
        quantization = checkpoints.read_quantization(folder, stored, weights)
        refuse_adapter(config, f"quantized by {quantization.method}")
        if quantization.packing is not None and config.device_map is not None:
            raise UserError(
                f"model.device_map={config.device_map} requires dense weights in files, but those "
                f"of {folder} are packed by {quantization.method}: set model.device_map=null"
            )
    source = ModelSource(
        config,
        folder,
        fingerprint(weights),
        revision,
        files=read_files(folder, remote_code=config.trust_remote_code),
        quantization=quantization,
    )
    return _with_adapter(source, weights, offline=offline)


def _stored_quantization(folder: Path) -> object:
    """Return the quantization entry of a folder's config, None for a dense checkpoint."""
    config = read_json_object(folder / "config.json")
    return config.get("quantization_config") or config.get("compression_config")


class DescribedModel(NamedTuple):
    """A model whose weights may be missing; it has no fingerprint then.

    `download` is the size of the weights to download in bytes, None if the hub does not state it.
    `note` says what does not come from the model itself.
    """

    source: ModelSource
    download: float | None = 0.0
    note: str | None = None


def describe_model(config: ModelConfig, *, offline: bool) -> DescribedModel:
    """Locate a model without its weights: only config and tokenizer are downloaded.

    If the hub is not available, some large models are described by their published shapes.

    Raises:
        MissingData: not even the config is available.
        UserError: the files are unusable.
    """
    try:
        return DescribedModel(resolve_model(config, offline=True))
    except MissingData:
        if config.path is not None or config.adapter is not None:
            raise
    except UserError:
        # A folder with a config but without weights suffices as well, and so do files of an
        # earlier description in the hub's cache.
        folder = Path(config.path or "").expanduser().absolute()
        if config.path is not None and (folder / "config.json").is_file():
            source = ModelSource(config, folder, "", None)
            return DescribedModel(source, 0.0, "no weights are there")
        on_hub = not config.source.startswith(EMBEDDED_PREFIX) and not _has_built_network(config)
        if config.path is not None or config.adapter is not None or not on_hub:
            raise
    _gate_remote_code(config)
    wanted = [pattern for pattern in DOWNLOAD_PATTERNS if pattern != "*.safetensors"]
    request = _hub_request(config)
    try:
        folder, revision = hub_folder(request, wanted, offline=offline)
        if not (folder / "config.json").is_file():
            raise MissingData(not_cached_message(request, offline=offline))
    except MissingData:
        shapes = SHAPES / config.source.replace("/", "--")
        if not shapes.is_dir():
            raise
        note = f"config and tokenizer of {config.source} are not here: its published shapes stand"
        return DescribedModel(ModelSource(config, shapes, "", None), None, note)
    download = hub_weight_bytes(request, offline=offline)
    return DescribedModel(ModelSource(config, folder, "", revision), download)


def refuse_adapter(config: ModelConfig, weights: str) -> None:
    """Raise if an adapter cannot be merged into these weights."""
    if config.adapter is not None:
        raise UserError(
            f"model.adapter={config.adapter}: the weights of {config.name} are {weights}, but an "
            "adapter can be merged only into dense weights of a trained model"
        )


def _gguf_source(config: ModelConfig, *, offline: bool) -> ModelSource:
    from bench.device.devices import select_device, select_dtype

    file = checkpoints.find_gguf(Path(str(config.path)).expanduser())
    if config.kind != "causal_lm":
        raise UserError(f"model.path={config.path}: a GGUF file needs model.kind=causal_lm")
    dtype = select_dtype(config.dtype, select_device(config.device))
    folder = checkpoints.converted_gguf(file, dtype)
    files = read_files(folder, remote_code=False)
    # The version of the conversion counts as well, because another one may give other weights.
    weights = (file, *find_weight_files(folder))
    source = ModelSource(config, folder, fingerprint(weights), None, files=files, file=file)
    return _with_adapter(source, weights, offline=offline)


def _with_adapter(source: ModelSource, files: tuple[Path, ...], *, offline: bool) -> ModelSource:
    """Return the source with the adapter in its config, checked without reading weights."""
    config = source.config
    if config.adapter is None:
        return source
    if config.kind == "image_classifier" or config.device_map is not None:
        raise UserError(
            f"model.adapter={config.adapter} is for language models with model.device_map=null"
        )
    folder, revision = _adapter_folder(config, config.adapter, offline=offline)
    refuse_outside_links(folder)
    checkpoints.adapter_settings(folder)
    settings = folder / ADAPTER_CONFIG
    weights = folder / checkpoints.ADAPTER_WEIGHTS
    check_header(weights)
    return replace(
        source,
        fingerprint=fingerprint((*files, weights)),
        files={
            **source.files,
            f"adapter {settings.name}": contents_hash({"": settings}),
        },
        adapter=folder,
        adapter_revision=revision,
    )


def _adapter_folder(config: ModelConfig, adapter: str, *, offline: bool) -> tuple[Path, str | None]:
    """Return the folder of an adapter's files and their commit; `adapter` may be ID@REVISION."""
    folder = Path(adapter).expanduser()
    if folder.is_dir():
        return folder.absolute(), None
    name, _, revision = adapter.partition("@")
    # A name on the hub has exactly one slash; anything else must be a folder.
    if adapter.startswith((".", "/", "~")) or name.count("/") != 1:
        raise MissingData(f"model.adapter={adapter} is neither a folder nor ORG/NAME on the hub")
    request = HubRequest(
        repository=name,
        revision=revision or "main",
        words=f"adapter {name}",
        overrides=f"{_model_choice(config)} model.adapter={adapter}",
        local_key="model.adapter",
    )
    wanted = [ADAPTER_CONFIG, checkpoints.ADAPTER_WEIGHTS]
    return hub_folder(request, wanted, offline=offline)


def _state_dict_source(config: ModelConfig) -> ModelSource:
    file = Path(str(config.path)).expanduser().absolute()
    if not file.is_file():
        raise MissingData(f"model.path={config.path} is not a file")
    check_header(file)
    described = f"{fingerprint([file])} {fresh_vision_config(config).model_dump_json()}"
    content = hashlib.sha256(described.encode()).hexdigest()
    return ModelSource(config, fresh_folder(), content, None, file=file)


def prefetch_model(config: ModelConfig) -> Path:
    """Download what is missing and return the folder of the model's files."""
    return resolve_model(config, offline=False).folder


def _gate_remote_code(config: ModelConfig) -> None:
    """Raise unless code from the model's repository is allowed and pinned to a commit."""
    if not config.trust_remote_code:
        return
    if not config.allow_remote_code:
        raise UserError(
            f"model.trust_remote_code=true: {config.name} is not on the list of models whose own "
            "code may run: only its file in conf/model may set model.allow_remote_code"
        )
    # The repository's owner can move a branch or tag after someone has reviewed the code.
    if not COMMIT_PATTERN.fullmatch(config.revision):
        raise UserError(
            f"model.revision={config.revision} with model.trust_remote_code=true: code runs only "
            "from an explicit commit of 40 hexadecimal digits"
        )


def _refuse_code_from_elsewhere(folder: Path) -> None:
    """Raise if a file of the folder refers to code in another repository."""
    for file in sorted(folder.glob("*config*.json")):
        # The form in transformers is OWNER/REPOSITORY--MODULE.CLASS.
        found = re.search(r'"([^"\s]+/[^"\s]+--[\w.]+)"', file.read_text(errors="replace"))
        if found:
            raise UserError(
                f"{file} runs code of another repository ({found.group(1)}), which "
                "model.revision does not fix: copy that code into the model's folder"
            )


def _model_folder(config: ModelConfig, *, offline: bool) -> tuple[Path, str | None]:
    """Return the folder of the model's files and their commit."""
    if config.path is not None:
        folder = Path(config.path).expanduser()
        if not folder.is_dir():
            raise MissingData(f"model.path={config.path} is not a folder")
        return folder.absolute(), None
    if config.source.startswith(EMBEDDED_PREFIX):
        return _embedded_folder(config.source.removeprefix(EMBEDDED_PREFIX)), None
    # Python files are not downloaded unless the model may run them.
    wanted = [*DOWNLOAD_PATTERNS, "*.py"] if config.trust_remote_code else DOWNLOAD_PATTERNS
    return hub_folder(_hub_request(config), wanted, offline=offline)


def _hub_request(config: ModelConfig) -> HubRequest:
    return HubRequest(
        repository=config.source,
        revision=config.revision,
        words=f"model {config.source} at revision {config.revision}",
        overrides=_model_choice(config),
        local_key="model.path",
    )


def _model_choice(config: ModelConfig) -> str:
    """Return the overrides that select a model."""
    name = config.name.rpartition("+")[0] if config.adapter else config.name
    # A file in conf/model states its revision; an id on the hub does not.
    given = name == config.source and config.revision != "main"
    return f"model={name} model.revision={config.revision}" if given else f"model={name}"


def _embedded_folder(name: str) -> Path:
    embedded_folder = Path(next(iter(embedded.__path__)))
    names = [file.parent.name for file in embedded_folder.glob("*/config.json")]
    if name not in names:
        raise unknown_name("embedded model", name, names)
    return embedded_folder / name


FRESH_PREFIX = "fresh:"
TORCHVISION_PREFIX = "torchvision:"
MODULE_SOURCE = "module"
WEIGHTS_SUFFIX = ".safetensors"


def _has_built_network(config: ModelConfig) -> bool:
    """Return whether the source names a network that is built from code, without files."""
    built = (FRESH_PREFIX, TORCHVISION_PREFIX)
    return config.source.startswith(built) or config.source == MODULE_SOURCE


def is_fresh(config: ModelConfig) -> bool:
    """Return whether weights are drawn at random; `model.path`, if given, overrides the source."""
    return config.path is None and _has_built_network(config)


def is_state_dict(config: ModelConfig) -> bool:
    """Return whether `model.path` is a state dict for a network that is built from code."""
    weights = config.path is not None and config.path.endswith(WEIGHTS_SUFFIX)
    return weights and _has_built_network(config)


def fresh_vision_config(config: ModelConfig) -> VisionConfig:
    """Return the architecture's config with the input shape of the named data set.

    Raises:
        UserError: the architecture or the data set does not exist, or no data set is given.
    """
    # Imported here, because the architectures import torch, which is slow and not needed to locate
    # other models.
    from bench.models.classifiers import architectures, serialization
    from bench.models.classifiers.classifier import VisionConfig

    name = config.source.removeprefix(FRESH_PREFIX)
    if config.source.startswith(TORCHVISION_PREFIX):
        architecture = config.source.removeprefix(TORCHVISION_PREFIX)
        name = architectures.TORCHVISION_PREFIX + architecture
    elif config.target is not None:
        name = config.target
        architectures.register_module(name)
    elif name not in architectures.ARCHITECTURES:
        raise unknown_name("architecture", name, architectures.ARCHITECTURES)
    images = _input_and_output(config)
    vision = VisionConfig(
        architecture=name,
        channels=images.channels,
        size=images.size,
        classes=images.classes,
        arguments=config.arguments or {},
    )
    if is_state_dict(config):
        serialization.refuse_unknown_input(vision)
    return vision


def _input_and_output(config: ModelConfig) -> ImageShape:
    """Return the shape of images: that of a known data set, with the config's own changes."""
    from bench.data.image_catalogue import IMAGENET_SHAPE, KNOWN_SETS, image_shape

    own = {key: getattr(config, key) for key in ("channels", "size", "classes")}
    given = {key: value for key, value in own.items() if value is not None}
    if config.images is not None:
        return replace(image_shape(config.images), **given)
    # The input for which torchvision trains its networks.
    if config.source.startswith(TORCHVISION_PREFIX):
        return replace(IMAGENET_SHAPE, **given)
    if len(given) < len(own):
        raise UserError(
            f"model.images is missing: {config.source} needs one of {', '.join(KNOWN_SETS)}, or "
            "model.channels, model.size and model.classes"
        )
    return replace(IMAGENET_SHAPE, **given)


def fresh_fingerprint(config: ModelConfig) -> str:
    """Return a hash of everything that random weights depend on, except the version of torch."""
    described = f"{fresh_vision_config(config).model_dump_json()} seed {config.seed}"
    return hashlib.sha256(described.encode()).hexdigest()


def fresh_folder() -> Path:
    """Return the folder of the code that draws the weights."""
    from bench.models import classifiers

    return Path(next(iter(classifiers.__path__)))

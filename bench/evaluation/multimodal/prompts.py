"""Rendering and encoding of prompts by the processor, hashes of images, and a cache of features.

Images of a question are encoded separately from those of other questions, so the result depends
neither on the batch nor on the cache.
"""

from __future__ import annotations

import hashlib
import inspect
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import TypeAlias, cast

import torch
from PIL import ExifTags, Image
from torch import Tensor
from transformers.utils import ModelOutput

from bench.data import chat
from bench.data.tokenization import without_appended
from bench.models.model import Model

EncodedPrompt: TypeAlias = dict[str, Tensor]
"""A processor's output for one prompt."""
PER_TOKEN = ("input_ids", "attention_mask", "mm_token_type_ids", "token_type_ids")
"""Outputs of processors with one entry per token; the remaining ones describe images."""
KEPT_FIELDS = ("pooler_output", "deepstack_features")
"""Fields of a vision encoder's output that language models use."""
VisionField: TypeAlias = Tensor | list[Tensor]
"""A tensor for all images of a question, or one per image or per decoder layer."""


class PromptEncoder:
    """Renders and encodes single questions, preceded by `system` unless it is empty."""

    def __init__(self, model: Model, system: str | None) -> None:
        self._processor = model.processor
        self._system = system

    def render(self, question: str, images: int) -> str:
        """Return the full prompt, up to the start of the answer."""
        return chat.render_chat(
            self._processor, [(question, None)], images=images, system=self._system
        )

    def render_parts(self, parts: Sequence[str | Image.Image]) -> str:
        """Return the full prompt of a question with its images in their places."""
        places = [part if isinstance(part, str) else chat.IMAGE_HERE for part in parts]
        return chat.render_interleaved(self._processor, places, system=self._system)

    def encode(self, prompt: str, images: Sequence[Image.Image]) -> EncodedPrompt:
        """Return the processor's output for one prompt."""
        outputs = chat.encode_chats(self._processor, [prompt], [images])
        return without_appended(self._processor.tokenizer, outputs)

    def image_sizes(self, prompt: EncodedPrompt) -> tuple[str, ...]:
        """Return the size of each image of an encoded prompt, as the vision encoder gets it."""
        if "image_grid_thw" in prompt:
            patch = int(self._processor.image_processor.patch_size)
            grids = prompt["image_grid_thw"].tolist()
            return tuple(f"{columns * patch}x{rows * patch}" for _, rows, columns in grids)
        pixels = prompt.get("pixel_values")
        if pixels is None:
            return ()
        *images, _, height, width = pixels.shape
        # One more axis: a high-resolution image in tiles of this size.
        tiles = f" in {images[1]} tiles" if len(images) > 1 else ""
        return (f"{width}x{height}{tiles}",) * int(images[0])


def slice_tokens(prompt: EncodedPrompt, first: int, last: int | None) -> EncodedPrompt:
    """Return a prompt's tokens from `first` to `last`, together with all of its images."""
    return {n: value[:, first:last] if n in PER_TOKEN else value for n, value in prompt.items()}


def image_hash(images: Sequence[Image.Image]) -> str:
    """Return a SHA-256 over everything that determines a question's images, in order."""
    digest = hashlib.sha256()
    for image in images:
        image.load()  # Before that, a file's palette is not available.
        pixels = image.tobytes()
        # Pixels of mode P are indices into a palette. Transparency and orientation are not part of
        # the pixels in any mode, but processors use them when converting to RGB.
        palette = bytes(image.getpalette(None) or ()) if image.palette else b""
        kind = image.palette.mode if image.palette else None
        seen = (
            image.mode,
            image.size,
            kind,
            image.info.get("transparency"),
            image.getexif().get(ExifTags.Base.Orientation),
        )
        # With lengths, because the same bytes may be images of different shapes.
        digest.update(f"{seen} {len(palette)} {len(pixels)}\n".encode() + palette + pixels)
    return digest.hexdigest()


class VisionFeatureCache:
    """A vision encoder with an LRU cache of `limit` bytes for its outputs.

    It is not `supported` if the network accepts only pixels, or if a method needs pixels in the
    call.
    """

    def __init__(self, model: Model, limit: int) -> None:
        self._network = model.network
        self._limit = limit
        self._outputs: OrderedDict[str, ModelOutput] = OrderedDict()
        self._bytes = 0
        encoder = self._encoder()
        arguments = inspect.signature(model.network.forward).parameters
        # `mm_encoder_outputs` makes a forward of transformers skip its vision encoder.
        skippable = encoder is not None and "mm_encoder_outputs" in arguments
        self.supported = skippable and not model.needs_pixels
        self._arguments = set(inspect.signature(encoder).parameters) if encoder else set()

    def _encoder(self) -> Callable[..., ModelOutput] | None:
        # Looked up for each call, because a method may replace it after the cache was created.
        encoder = getattr(self._network, "get_image_features", None)
        return cast("Callable[..., ModelOutput] | None", encoder)

    def outputs_for(
        self, key: str, inputs: Mapping[str, Tensor], device: torch.device
    ) -> ModelOutput:
        """Return the output for one question's images; `inputs` are from the processor."""
        if key in self._outputs:
            self._outputs.move_to_end(key)
            return _moved(self._outputs[key], device)
        encoder = self._encoder()
        assert encoder is not None
        arguments = {n: value.to(device) for n, value in inputs.items() if n in self._arguments}
        output = encoder(**arguments, return_dict=True)
        # On the CPU, because features of many images would take memory that batches need, and
        # copying them back is fast compared with encoding.
        self._keep(key, _moved(output, torch.device("cpu")))
        return _moved(output, device)

    def _keep(self, key: str, output: ModelOutput) -> None:
        size = _output_bytes(output)
        if size > self._limit:
            return
        self._outputs[key] = output
        self._bytes += size
        while self._bytes > self._limit:
            _, oldest = self._outputs.popitem(last=False)
            self._bytes -= _output_bytes(oldest)


def _kept_fields(output: ModelOutput) -> dict[str, VisionField]:
    fields = {name: getattr(output, name, None) for name in KEPT_FIELDS}
    return {name: value for name, value in fields.items() if value is not None}


def _moved(output: ModelOutput, device: torch.device) -> ModelOutput:
    """Return an output of the same class with only the fields that are read later."""
    # Other fields, such as the encoder's last hidden state, are not used and would fill the cache.
    # The output keeps its class, because networks access its fields by name.
    fields = {
        name: value.to(device) if isinstance(value, Tensor) else [part.to(device) for part in value]
        for name, value in _kept_fields(output).items()
    }
    return type(output)(**fields)


def _output_bytes(output: ModelOutput) -> int:
    fields = _kept_fields(output).values()
    parts = [part for f in fields for part in ([f] if isinstance(f, Tensor) else f)]
    return sum(part.numel() * part.element_size() for part in parts)


def concatenate_outputs(outputs: Sequence[ModelOutput]) -> ModelOutput:
    """Concatenate the outputs for several questions, in order."""
    fields: dict[str, VisionField] = {}
    pooled = [output.pooler_output for output in outputs]
    # One tensor for all images of a question, or a list with one per image if their numbers of
    # tokens differ; both forms occur in transformers.
    if isinstance(pooled[0], Tensor):
        fields["pooler_output"] = torch.cat(pooled)
    else:
        fields["pooler_output"] = [image for images in pooled for image in images]
    # DeepStack (Qwen3-VL): one tensor per decoder layer that receives visual features.
    layers = [output["deepstack_features"] for output in outputs if "deepstack_features" in output]
    if layers:
        fields["deepstack_features"] = [torch.cat(layer) for layer in zip(*layers, strict=True)]
    return type(outputs[0])(**fields)

"""Prompts written and encoded by the processor, images hashed, their features cached.

Cache of vision features: images are encoded once, however many questions refer to them.

The images of a question are encoded apart from those of other questions, so the result depends
neither on the batch nor on whether it came from the cache.
"""

from __future__ import annotations

import hashlib
import inspect
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from bench.data import chat
from bench.models.model import Model


class PromptEncoder:
    """Renders and encodes single questions, preceded by `system` unless it is empty."""

    def __init__(self, model: Model, system: str | None) -> None:
        self._processor = model.processor
        self._system = system

    def render(self, question: str, images: int) -> str:
        """Return the full prompt, up to where the answer begins."""
        return chat.render_chat(
            self._processor, [(question, None)], images=images, system=self._system
        )

    def encode(self, prompt: str, images: Sequence[Image.Image]) -> dict[str, Any]:
        """Return the processor's output for one prompt."""
        return chat.encode_chats(self._processor, [prompt], [images])


def image_hash(images: Sequence[Image.Image]) -> str:
    """Return a SHA-256 over the pixels of a question's images, in order."""
    digest = hashlib.sha256()
    for image in images:
        # Mode and size too: the same bytes may be images of different shapes.
        digest.update(f"{image.mode}{image.size}".encode())
        digest.update(image.tobytes())
    return digest.hexdigest()


KEPT_FIELDS = ("pooler_output", "deepstack_features")
"""Fields of a vision encoder's output that language models read."""


class VisionFeatureCache:
    """A vision encoder with an LRU cache of `limit` bytes for its outputs.

    It is not `supported` if the network takes pixels only, or if a method must see them in the
    call.
    """

    def __init__(self, model: Model, limit: int) -> None:
        network: Any = model.network
        self._network = network
        self._limit = limit
        self._kept: OrderedDict[str, Any] = OrderedDict()
        self._bytes = 0
        takes = inspect.signature(network.forward).parameters
        encoder = getattr(network, "get_image_features", None)
        # `mm_encoder_outputs` is how transformers lets a forward skip its vision encoder.
        understood = encoder is not None and "mm_encoder_outputs" in takes
        self.supported = understood and not model.needs_pixels
        self._reads = set(inspect.signature(encoder).parameters) if encoder is not None else set()

    def of(self, key: str, inputs: Mapping[str, Tensor], device: torch.device) -> Any:
        """Return the output for one question's images; `inputs` is what the processor returned."""
        if key in self._kept:
            self._kept.move_to_end(key)
            return self._moved(self._kept[key], device)
        given = {name: value.to(device) for name, value in inputs.items() if name in self._reads}
        output = self._network.get_image_features(**given, return_dict=True)
        # On the CPU: features of many images would take the memory that batches need, and moving
        # them back is cheap next to encoding.
        self._keep(key, self._moved(output, torch.device("cpu")))
        return self._moved(output, device)

    def _keep(self, key: str, output: Any) -> None:
        size = _output_bytes(output)
        if size > self._limit:
            return
        self._kept[key] = output
        self._bytes += size
        while self._bytes > self._limit:
            _, oldest = self._kept.popitem(last=False)
            self._bytes -= _output_bytes(oldest)

    @staticmethod
    def _moved(output: Any, device: torch.device) -> Any:
        """Return an output of the same class with only the fields that are read later."""
        # The rest, such as the encoder's last hidden state, is read by nothing and would fill the
        # cache. The output is rebuilt as its own class, since networks access its fields by name.
        fields = {name: getattr(output, name, None) for name in KEPT_FIELDS}
        return type(output)(
            **{n: _to_device(v, device) for n, v in fields.items() if v is not None}
        )


def concatenate_outputs(outputs: Sequence[Any]) -> Any:
    """Concatenate the outputs for several questions, in order."""
    fields: dict[str, Any] = {}
    pooled = [output.pooler_output for output in outputs]
    # One tensor for all images of a question, or a list with one per image where their numbers of
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


def _to_device(value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        return value.to(device)
    return [part.to(device) for part in value]


def _output_bytes(output: Any) -> int:
    values = [getattr(output, name, None) for name in KEPT_FIELDS]
    parts = [p for v in values if v is not None for p in ([v] if isinstance(v, Tensor) else v)]
    return sum(part.numel() * part.element_size() for part in parts)

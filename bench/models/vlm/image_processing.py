"""Preprocessing of images: `model.processor` applied to transformers' own processors.

Results for an image change when it is cropped instead of padded, or has another resolution. Values
that a config leaves open are those of lmms-eval's adapter for the architecture. The values in use
are part of a run's id.
"""

from __future__ import annotations

from typing import Any, Literal, Protocol, TypedDict, cast

from bench.data.chat import Processor
from bench.errors import UserError
from bench.schema import ProcessorConfig


class ImageSettings(TypedDict, total=False):
    """Values in use by the keys of `model.processor` that the architecture supports."""

    resize: Literal["crop", "pad"]
    min_pixels: int
    max_pixels: int
    max_tiles: int


# lmms-eval 0.7.3: constructors of its models qwen2_vl, qwen2_5_vl, qwen3_vl and internvl_hf. Its
# llava_hf uses the processor unchanged.
_QWEN = ImageSettings(min_pixels=256 * 28 * 28, max_pixels=1605632)
LMMS_EVAL: dict[str, ImageSettings] = {
    "qwen2_vl": ImageSettings(min_pixels=3136, max_pixels=602112),
    "qwen2_5_vl": _QWEN,
    "qwen3_vl": _QWEN,
    "qwen3_vl_moe": _QWEN,
    "internvl": ImageSettings(max_tiles=12),
}


class _ImageProcessor(Protocol):
    """Members of transformers' image processors that are used here."""

    size: Any
    do_center_crop: bool
    do_pad: bool
    max_patches: int

    def to_dict(self) -> dict[str, Any]: ...


def configure_images(
    processor: Processor, model_type: str, config: ProcessorConfig
) -> ImageSettings:
    """Configure how a processor treats images; return the values in use.

    Raises:
        UserError: a key is set that the model's image processor does not support.
    """
    holder = cast(Any, processor)
    found = ImageSettings()
    if _is_cropping(holder.image_processor):
        if config.resize is not None:
            holder.image_processor = _with_padding(holder.image_processor, config.resize == "pad")
        pads = bool(getattr(holder.image_processor, "do_pad", None))
        found["resize"] = "pad" if pads else "crop"
    if _has_pixel_bounds(holder.image_processor):
        found |= _bound_pixels(holder.image_processor, model_type, config)
    if hasattr(holder.image_processor, "max_patches"):
        default = LMMS_EVAL.get(model_type, {}).get("max_tiles")
        tiles = config.max_tiles or default or int(holder.image_processor.max_patches)
        holder.image_processor.max_patches = found["max_tiles"] = tiles
    for key, value in config.model_dump(exclude_none=True).items():
        if key not in found:
            has = ", ".join(found) or "none of these keys"
            raise UserError(
                f"model.processor.{key}={value}: the {type(holder.image_processor).__name__} of "
                f"this {model_type} has {has}: leave model.processor.{key} null"
            )
    return found


def _is_cropping(images: _ImageProcessor) -> bool:
    """Return whether images are resized by the shortest side and cropped at the centre (CLIP)."""
    return bool(getattr(images, "do_center_crop", False)) and "shortest_edge" in dict(images.size)


def _with_padding(images: _ImageProcessor, pad: bool) -> _ImageProcessor:
    """Return LLaVA's own image processor with the same settings.

    With `pad` an image is first centred on a square of the mean colour, as in LLaVA's evaluation
    (`image_aspect_ratio: pad`), so that the crop removes nothing.
    """
    from transformers.models.llava.image_processing_llava import LlavaImageProcessor
    from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

    settings = {k: v for k, v in images.to_dict().items() if not k.endswith("processor_type")}
    kind = LlavaImageProcessorPil if type(images).__name__.endswith("Pil") else LlavaImageProcessor
    made: _ImageProcessor = kind(**{**settings, "do_pad": pad})
    return made


def _has_pixel_bounds(images: _ImageProcessor) -> bool:
    return {"shortest_edge", "longest_edge"} <= set(dict(images.size)) and hasattr(
        images, "merge_size"
    )


def _bound_pixels(
    images: _ImageProcessor, model_type: str, config: ProcessorConfig
) -> ImageSettings:
    """Limit the area of an image, in pixels, as Qwen-VL's processors do."""
    default, own = LMMS_EVAL.get(model_type, {}), dict(images.size)
    low = config.min_pixels or default.get("min_pixels") or own["shortest_edge"]
    high = config.max_pixels or default.get("max_pixels") or own["longest_edge"]
    if low > high:
        raise UserError(
            f"model.processor.min_pixels={low} is above model.processor.max_pixels={high}: lower "
            "min_pixels or raise max_pixels"
        )
    images.size = {**own, "shortest_edge": low, "longest_edge": high}
    return ImageSettings(min_pixels=low, max_pixels=high)

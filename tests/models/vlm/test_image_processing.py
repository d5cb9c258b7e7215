"""Knobs of `model.processor` on transformers' own image processors."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from pydantic import ValidationError
from transformers import CLIPImageProcessor, GotOcr2ImageProcessor, Qwen2VLImageProcessor

from bench.errors import UserError
from bench.models.loading import image_settings
from bench.models.source import resolve_model
from bench.models.vlm.image_processing import configure_images
from bench.schema import ModelConfig, ProcessorConfig

MEAN, STD = [0.48, 0.46, 0.41], [0.27, 0.26, 0.28]


def clip():
    side = {"height": 32, "width": 32}
    return CLIPImageProcessor(
        size={"shortest_edge": 32}, crop_size=side, image_mean=MEAN, image_std=STD
    )


def with_images(images):
    return SimpleNamespace(image_processor=images)


def picture(width, height, seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def pixels_of(processor, image):
    return processor.image_processor(images=image, return_tensors="pt")["pixel_values"]


@pytest.mark.parametrize("size", [(48, 32), (32, 64), (32, 32)])
def test_padding_is_a_square_of_the_mean_colour(size):
    """LLaVA's own evaluation: pasted at (side - length) // 2, then resized."""
    image = picture(*size)
    side = max(size)
    square = Image.new("RGB", (side, side), tuple(int(part * 255) for part in MEAN))
    square.paste(image, ((side - size[0]) // 2, (side - size[1]) // 2))
    wanted = pixels_of(with_images(clip()), square)
    processor = with_images(clip())
    assert configure_images(processor, "llava", ProcessorConfig(resize="pad")) == {"resize": "pad"}
    assert (pixels_of(processor, image) - wanted).abs().max() < 1e-5


@pytest.mark.parametrize("config", [ProcessorConfig(), ProcessorConfig(resize="crop")])
def test_cropping_is_the_processor_as_published(config):
    image, processor = picture(48, 32), with_images(clip())
    assert configure_images(processor, "llava", config) == {"resize": "crop"}
    assert torch.equal(pixels_of(processor, image), pixels_of(with_images(clip()), image))


def test_a_configured_processor_stays_so():
    processor = with_images(clip())
    configure_images(processor, "llava", ProcessorConfig(resize="pad"))
    assert configure_images(processor, "llava", ProcessorConfig()) == {"resize": "pad"}
    assert configure_images(processor, "llava", ProcessorConfig(resize="crop")) == {
        "resize": "crop"
    }


@pytest.mark.parametrize(
    "model_type, config, low, high",
    [
        ("qwen2_vl", ProcessorConfig(), 3136, 602112),
        ("qwen2_5_vl", ProcessorConfig(), 200704, 1605632),
        ("qwen3_vl_moe", ProcessorConfig(), 200704, 1605632),
        ("qwen2_vl", ProcessorConfig(max_pixels=50000), 3136, 50000),
        ("qwen2_5_vl", ProcessorConfig(min_pixels=784, max_pixels=784), 784, 784),
    ],
)
def test_qwens_images_stay_in_their_bounds(model_type, config, low, high):
    processor = with_images(Qwen2VLImageProcessor())
    found = configure_images(processor, model_type, config)
    assert found == {"min_pixels": low, "max_pixels": high}
    for size in ((1500, 1400), (30, 40)):
        encoded = processor.image_processor(images=picture(*size), return_tensors="pt")
        _, rows, columns = encoded["image_grid_thw"][0].tolist()
        # Sides are rounded to whole tokens of 28 pixels, inside the bounds.
        assert low <= rows * columns * 14**2 <= high


def test_tiles_are_bounded():
    processor = with_images(GotOcr2ImageProcessor(size={"height": 16, "width": 16}))
    assert configure_images(processor, "internvl", ProcessorConfig()) == {"max_tiles": 12}
    few = ProcessorConfig(max_tiles=4)
    assert configure_images(processor, "internvl", few) == {"max_tiles": 4}
    encoded = processor.image_processor(
        images=picture(64, 64), crop_to_patches=True, return_tensors="pt"
    )
    assert encoded["pixel_values"].shape[0] == 4 + 1  # with the thumbnail


@pytest.mark.parametrize(
    "images, model_type, config",
    [
        (clip(), "llava", {"max_pixels": 10000}),
        (clip(), "llava", {"max_tiles": 4}),
        (Qwen2VLImageProcessor(), "qwen2_vl", {"resize": "pad"}),
        (GotOcr2ImageProcessor(), "internvl", {"min_pixels": 100}),
    ],
)
def test_a_key_without_a_use_is_refused(images, model_type, config):
    (key,) = config
    with pytest.raises(UserError, match=rf"processor\.{key}=.* leave model\.processor\.{key}"):
        configure_images(with_images(images), model_type, ProcessorConfig(**config))


def test_bounds_are_in_order():
    with pytest.raises(UserError, match=r"min_pixels=800000 is above model.processor.max_pixels"):
        configure_images(
            with_images(Qwen2VLImageProcessor()), "qwen2_vl", ProcessorConfig(min_pixels=800000)
        )
    with pytest.raises(ValidationError):
        ProcessorConfig(max_tiles=0)


def test_settings_in_force_belong_to_the_inputs_of_a_run():
    """Defaults as well: they are in no config, and the project may change them."""
    config = ModelConfig(name="micro_llava", source="embedded:micro_llava", kind="image_text")
    padded = config.model_copy(update={"processor": ProcessorConfig(resize="pad")})
    found = [image_settings(resolve_model(each, offline=True)) for each in (config, padded)]
    assert found == [{"resize": "crop"}, {"resize": "pad"}]

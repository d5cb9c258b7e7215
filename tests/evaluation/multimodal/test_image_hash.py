"""Two pictures with one hash look the same to a model."""

import io

import numpy as np
import PIL.Image
import PIL.ImageOps
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.evaluation.multimodal.prompts import image_hash

MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr", "HSV", "I", "I;16", "F")


def noise(mode="RGB", seed=0, size=(4, 3)):
    bits = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    if mode == "I;16":
        return PIL.Image.fromarray(bits[:, :, 0].astype(np.uint16) * 257)
    return PIL.Image.fromarray(bits).convert(mode)


def stored(image, kind="PNG", **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return PIL.Image.open(file)


def test_palettes_of_equal_indices_differ():
    one = noise().quantize(8)
    other = one.copy()
    colours = one.getpalette()
    other.putpalette(colours[2:] + colours[:2])
    assert one.tobytes() == other.tobytes()
    assert image_hash([one]) != image_hash([other])
    assert image_hash([stored(one)]) != image_hash([stored(other)])


def test_sixteen_bits_are_not_cut_to_eight():
    values = np.full((3, 4), 300, dtype=np.uint16)
    one, other = PIL.Image.fromarray(values), PIL.Image.fromarray(values + 256)
    assert one.convert("L").tobytes() == other.convert("L").tobytes()
    assert image_hash([one]) != image_hash([other])


@pytest.mark.parametrize("orientation", range(2, 9))
def test_a_turned_picture_differs(orientation):
    exif = PIL.Image.Exif()
    exif[0x0112] = orientation
    plain, turned = stored(noise(), "PNG"), stored(noise(), "PNG", exif=exif)
    assert plain.tobytes() == turned.tobytes()
    assert PIL.ImageOps.exif_transpose(turned).tobytes() != plain.tobytes()
    assert image_hash([plain]) != image_hash([turned])


@pytest.mark.parametrize("mode", ["P", "L", "RGB"])
def test_a_transparent_colour_differs(mode):
    image = noise(mode)
    colour = image.getpixel((0, 0))
    plain, clear = stored(image), stored(image, transparency=colour)
    assert plain.convert("RGBA").tobytes() != clear.convert("RGBA").tobytes()
    assert image_hash([plain]) != image_hash([clear])


@pytest.mark.parametrize("mode", MODES)
def test_any_pixel_of_any_mode_counts(mode):
    image = noise(mode)
    before = image_hash([image])
    assert image_hash([noise(mode)]) == before
    pixel = image.getpixel((1, 1))
    changed = tuple(255 - part for part in pixel) if isinstance(pixel, tuple) else 255 - pixel
    image.putpixel((1, 1), changed)
    assert image_hash([image]) != before


@given(st.lists(st.integers(0, 3), max_size=4), st.lists(st.integers(0, 3), max_size=4))
def test_pictures_count_in_their_order(one, other):
    hashes = [image_hash([noise(seed=seed) for seed in seeds]) for seeds in (one, other)]
    assert (hashes[0] == hashes[1]) == (one == other)


def test_equal_bytes_of_another_shape_differ():
    content = bytes(range(12))
    shapes = [PIL.Image.frombytes("L", size, content) for size in ((4, 3), (3, 4), (12, 1))]
    assert len({image_hash([image]) for image in shapes}) == 3

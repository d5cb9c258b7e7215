"""Images that cannot be shown as they are meant are refused with the reason."""

import io

import numpy as np
import pytest
from PIL import Image, ImageFile

from bench.data.image_files import UnfitImage, decode_image, open_images, refuse_clipped
from bench.errors import UserError


def encoded(image, form="PNG", **options):
    stream = io.BytesIO()
    image.save(stream, form, **options)
    return stream.getvalue()


def grey16(highest):
    return Image.fromarray(np.array([[0, highest]], dtype=np.uint16))


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "LA", "1", "P", "CMYK", "YCbCr"])
def test_images_of_eight_bits_are_shown(mode):
    image = Image.new("RGB", (5, 4), (200, 30, 90)).convert(mode)
    assert refuse_clipped(image) is image
    form = "TIFF" if mode in ("CMYK", "YCbCr") else "PNG"
    assert decode_image(encoded(image, form)).size == (5, 4)


def test_values_that_would_be_clipped_are_refused():
    with pytest.raises(UnfitImage, match="values from 0 to 4000, which would be clipped at 255"):
        decode_image(encoded(grey16(4000)))
    assert decode_image(encoded(grey16(255))).getpixel((1, 0)) == (255, 255, 255)
    for image in (grey16(60000).convert("I"), Image.new("I", (2, 2), -1)):
        with pytest.raises(UnfitImage, match="would be clipped"):
            refuse_clipped(image)
    with pytest.raises(UnfitImage, match="floating-point"):
        decode_image(encoded(Image.new("F", (2, 2), 0.5), "TIFF"))


@pytest.mark.parametrize(
    "content",
    [
        b"", b"no image", encoded(Image.new("RGB", (64, 64), 7), "JPEG")[:-200],
        encoded(Image.effect_noise((64, 64), 9))[:600], b"\x89PNG\r\n\x1a\n" + bytes(40),
    ],
    ids=["empty", "text", "jpeg cut off", "png cut off", "png of zeros"],
)  # fmt: skip
def test_what_cannot_be_decoded_is_refused(content):
    with pytest.raises(UnfitImage, match="its image cannot be opened"):
        decode_image(content)


def test_an_image_of_400_megapixels_is_refused():
    with pytest.raises(UnfitImage, match=r"DecompressionBombError: .*400000000 pixels"):
        decode_image(encoded(Image.new("1", (20000, 20000))))


def test_switches_of_a_library_do_not_let_a_damaged_image_through(monkeypatch):
    """As importing lmms-eval sets them."""
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10**9)
    for content in (
        encoded(Image.effect_noise((64, 64), 9))[:600],
        encoded(Image.new("1", (20000, 20000))),
    ):
        with pytest.raises(UnfitImage):
            decode_image(content)
    assert ImageFile.LOAD_TRUNCATED_IMAGES and Image.MAX_IMAGE_PIXELS == 10**9


def test_a_lack_of_memory_is_no_fault_of_the_image():
    def exhausted():
        raise MemoryError

    with pytest.raises(MemoryError):
        open_images(exhausted)
    assert issubclass(UnfitImage, UserError)

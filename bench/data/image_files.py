"""Decoding of image files; images that cannot be shown faithfully to a model are refused."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, TypeVar

from bench.errors import UserError

if TYPE_CHECKING:
    from PIL.Image import Image

Opened = TypeVar("Opened")
PIXEL_LIMIT = (1 << 30) // 4 // 3
"""PIL's default: 256 MiB of RGB. PIL refuses images with twice as many pixels."""


class UnfitImage(UserError):
    """An image that cannot be shown to a model; the message is the reason."""


def open_images(work: Callable[[], Opened]) -> Opened:
    """Return the result of `work`, which opens and decodes an image.

    Raises:
        UnfitImage: it fails with any error other than running out of memory.
    """
    # For damaged files, decoders raise OSError, SyntaxError, ValueError, struct.error and more; for
    # missing images, a task's own code raises AttributeError or KeyError.
    try:
        with _strict_decoding():
            return work()
    except (UnfitImage, MemoryError):
        raise
    except Exception as error:
        reason = str(error).partition("\n")[0]
        raise UnfitImage(
            f"its image cannot be opened ({type(error).__name__}: {reason})"
        ) from error


@contextmanager
def _strict_decoding() -> Iterator[None]:
    """Make PIL refuse truncated files, and images above its own limit of pixels."""
    import PIL.Image
    import PIL.ImageFile

    # lmms-eval disables both checks for the whole process, and missing parts become grey.
    before = PIL.ImageFile.LOAD_TRUNCATED_IMAGES, PIL.Image.MAX_IMAGE_PIXELS
    PIL.ImageFile.LOAD_TRUNCATED_IMAGES, PIL.Image.MAX_IMAGE_PIXELS = False, PIXEL_LIMIT
    try:
        yield
    finally:
        PIL.ImageFile.LOAD_TRUNCATED_IMAGES, PIL.Image.MAX_IMAGE_PIXELS = before


def refuse_clipped(image: Image) -> Image:
    """Return an image unless its conversion to 8 bits per channel would clip it.

    PIL does not scale values above 255 but clips them: 16-bit grey becomes white.

    Raises:
        UnfitImage: the image has such values.
    """
    if image.mode == "F":
        raise UnfitImage("its image has floating-point values; save it with 8 bits per channel")
    if image.mode == "I" or image.mode.startswith("I;"):
        low, high = image.getextrema()
        if low < 0 or high > 255:  # type: ignore[operator]  # a pair of numbers in these modes
            raise UnfitImage(
                f"its image has values from {low} to {high}, which would be clipped at 255; "
                "save it with 8 bits per channel"
            )
    return image


def decode_image(content: bytes) -> Image:
    """Decode the bytes of an image file to RGB.

    Raises:
        UnfitImage: they are not an image, are truncated, or have more pixels than PIL's limit, or
            the image would be clipped.
    """
    import PIL.Image

    return open_images(lambda: refuse_clipped(PIL.Image.open(io.BytesIO(content))).convert("RGB"))

"""Images as they come from files: what cannot be shown to a model as it is meant is refused."""

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
"""PIL's default: 256 MiB of RGB. It refuses twice as many pixels."""


class UnfitImage(UserError):
    """An image that no model can be shown; the message is the reason."""


def open_images(work: Callable[[], Opened]) -> Opened:
    """Return what `work` opens and decodes.

    Raises:
        UnfitImage: it fails, whatever the error; running out of memory passes.
    """
    # Decoders raise OSError, SyntaxError, ValueError, struct.error and more on damaged files, and a
    # task's own code AttributeError or KeyError where there is no image. All mean the same here.
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
    """Let PIL refuse files that are cut off, and more pixels than its own limit."""
    import PIL.Image
    import PIL.ImageFile

    # lmms-eval switches both checks off for the whole process, and the missing part becomes grey.
    before = PIL.ImageFile.LOAD_TRUNCATED_IMAGES, PIL.Image.MAX_IMAGE_PIXELS
    PIL.ImageFile.LOAD_TRUNCATED_IMAGES, PIL.Image.MAX_IMAGE_PIXELS = False, PIXEL_LIMIT
    try:
        yield
    finally:
        PIL.ImageFile.LOAD_TRUNCATED_IMAGES, PIL.Image.MAX_IMAGE_PIXELS = before


def refuse_clipped(image: Image) -> Image:
    """Return an image unless its conversion to 8 bits per channel would clip it.

    PIL does not scale values above 255 but cuts them off: 16-bit grey becomes white.

    Raises:
        UnfitImage: the image holds such values.
    """
    if image.mode == "F":
        raise UnfitImage("its image holds floating-point values; save it with 8 bits per channel")
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
        UnfitImage: they are no image, are cut off, or hold more than PIL's limit of pixels, or the
            image would be clipped.
    """
    import PIL.Image

    return open_images(lambda: refuse_clipped(PIL.Image.open(io.BytesIO(content))).convert("RGB"))

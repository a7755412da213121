"""Images: every encoded image becomes RGB pixels in one documented way."""

from __future__ import annotations

import warnings
from hashlib import sha256
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from lightleak.errors import UserError

MAX_PIXELS = 100_000_000
MAX_BYTES = 1 << 30
"""Width × height above which an image is refused, read from its header before any decoding."""

# Only raster formats that Pillow decodes by itself: others (EPS) would start outside programs on
# files that nobody vouches for. Photos of several frames (MPO) are opened as JPEG.
Image.init()
READABLE_FORMATS = tuple(
    name
    for name in ("PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP", "AVIF", "JPEG2000", "PPM")
    if name in Image.OPEN  # AVIF came with Pillow 11.2
)


def image_bytes(source: Path | bytes) -> bytes:
    """Return the encoded image as it is stored.

    Raises:
        UserError: the file is missing or may not be read.
    """
    if isinstance(source, bytes):
        return source
    try:
        if source.stat().st_size > MAX_BYTES:
            raise UserError(
                f"the image file holds more than {MAX_BYTES >> 20} MiB", _name(source), "Shrink it."
            )
        return source.read_bytes()
    except OSError as error:
        raise UserError(
            f"the image file cannot be read ({error.strerror})", _name(source), "Check the file."
        ) from error


def image_sha256(source: Path | bytes) -> str:
    """Hex digest of the encoded image.

    Raises:
        UserError: the file is missing or may not be read.
    """
    return sha256(image_bytes(source)).hexdigest()


def open_rgb(source: Path | bytes) -> Image.Image:
    """Decode an image to mode RGB, 8 bits a channel, upright.

    - rotation recorded in EXIF is applied; of an animation the first frame is taken;
    - palettes are resolved, and anything transparent is composited on white;
    - 16-bit grey (modes I;16 and I) is divided by 257 and rounded, so that 65535 becomes 255;
      values outside 0 … 65535 are clipped;
    - floating-point grey is read as 0 … 1 when no value exceeds 1, else as 0 … 255; values
      outside are clipped, and what is not a number becomes 0;
    - CMYK and every other mode is converted by Pillow, which undoes Adobe's inversion of JPEGs.

    Raises:
        UserError: the image is missing, empty, in no readable format, truncated, damaged, or
            has more than `MAX_PIXELS` pixels.
    """
    encoded = image_bytes(source)
    name = _name(source)
    if not encoded:
        raise UserError("the image has no bytes", name, "Restore the file or remove the record.")
    try:
        with warnings.catch_warnings():
            # Pillow's own limit only warns; ours, just below, refuses.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(BytesIO(encoded), formats=READABLE_FORMATS) as image:
                _check_size(image.size, name)
                return _to_rgb(ImageOps.exif_transpose(image))
    except (UserError, MemoryError):
        raise
    except Image.DecompressionBombError as error:
        raise _too_large("its pixels are beyond counting", name) from error
    except UnidentifiedImageError as error:
        raise UserError(
            "this is not an image in a readable format, or its beginning is damaged",
            name,
            f"Use one of {', '.join(READABLE_FORMATS)}.",
        ) from error
    except Exception as error:  # damaged files make Pillow's decoders raise nearly anything
        raise UserError(
            f"the image is truncated or damaged ({error})",
            name,
            "Restore the file or remove the record.",
        ) from error


def _check_size(size: tuple[int, int], name: str) -> None:
    width, height = size
    if width * height > MAX_PIXELS:
        raise _too_large(f"it has {width} × {height} pixels", name)


def _too_large(how_large: str, name: str) -> UserError:
    return UserError(
        f"the image is refused as a possible decompression bomb: {how_large}",
        name,
        f"Scale it to at most {MAX_PIXELS:,} pixels.",
    )


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):
        return _from_levels(np.asarray(image, dtype=np.float64) / 257, image)
    if image.mode == "F":
        values = np.nan_to_num(np.asarray(image, dtype=np.float64), nan=0.0)
        return _from_levels(values * 255 if values.max() <= 1 else values, image)
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")
    return image.convert("RGB")


def _from_levels(levels: np.ndarray, image: Image.Image) -> Image.Image:
    """RGB from grey levels of 0 … 255 (height × width); a transparent level becomes white."""
    grey = np.rint(np.clip(levels, 0, 255)).astype(np.uint8)
    if (transparent := image.info.get("transparency")) is not None:
        grey[np.asarray(image) == transparent] = 255
    return Image.fromarray(grey).convert("RGB")


def _name(source: Path | bytes) -> str:
    """How a message calls the image; on one line even when its file name is not."""
    if isinstance(source, bytes):
        return "image bytes"
    name = str(source)
    return name if name.isprintable() else repr(name)

"""Every way to store an image leads to the pixels that the documentation states."""

import struct
import warnings
import zlib
from io import BytesIO

import numpy as np
import pytest
from PIL import Image

from lightleak.errors import UserError
from lightleak.records import image_bytes, open_rgb
from lightleak.records.images import MAX_PIXELS


def encode(image, image_format="PNG", **options):
    buffer = BytesIO()
    image.save(buffer, image_format, **options)
    return buffer.getvalue()


def first_pixel(encoded):
    image = open_rgb(encoded)
    assert image.mode == "RGB"
    return image.getpixel((0, 0))


def with_palette():
    image = Image.new("P", (4, 4), 1)
    image.putpalette([0, 0, 0, 10, 200, 30])
    return image


def half_transparent_palette():
    return encode(with_palette(), transparency=bytes([255, 0]))


GREY_16 = np.full((4, 4), 25700, dtype=np.uint16)
WHITE = (255, 255, 255)


@pytest.mark.parametrize(
    ("encoded", "expected"),
    [
        (encode(Image.new("1", (4, 4), 1)), WHITE),
        (encode(Image.new("L", (4, 4), 77)), (77, 77, 77)),
        (encode(Image.new("RGB", (4, 4), (1, 2, 3))), (1, 2, 3)),
        (encode(with_palette()), (10, 200, 30)),
        (half_transparent_palette(), WHITE),
        (encode(Image.new("L", (4, 4), 77), transparency=77), WHITE),
        (encode(Image.new("RGB", (4, 4), (1, 2, 3)), transparency=(1, 2, 3)), WHITE),
        (encode(Image.new("RGBA", (4, 4), (255, 0, 0, 0))), WHITE),
        (encode(Image.new("RGBA", (4, 4), (255, 0, 0, 51))), (255, 204, 204)),
        (encode(Image.new("LA", (4, 4), (0, 51))), (204, 204, 204)),
        (encode(Image.fromarray(GREY_16)), (100, 100, 100)),
        (encode(Image.fromarray(GREY_16), "TIFF"), (100, 100, 100)),
        (encode(Image.fromarray(GREY_16), transparency=25700), WHITE),
        (b"P5 1 1 65535\n" + (25700).to_bytes(2, "big"), (100, 100, 100)),
        (encode(Image.new("I", (4, 4), 25700), "TIFF"), (100, 100, 100)),
        (encode(Image.new("I", (4, 4), -5), "TIFF"), (0, 0, 0)),
        (encode(Image.new("I", (4, 4), 70_000), "TIFF"), WHITE),
        (encode(Image.new("F", (4, 4), 0.2), "TIFF"), (51, 51, 51)),
        (encode(Image.new("F", (4, 4), 51.0), "TIFF"), (51, 51, 51)),
        (encode(Image.new("F", (4, 4), float("nan")), "TIFF"), (0, 0, 0)),
        (encode(Image.new("CMYK", (4, 4), (255, 0, 0, 0)), "TIFF"), (0, 255, 255)),
        (encode(Image.new("YCbCr", (4, 4), (128, 128, 128)), "TIFF"), (128, 128, 128)),
        (encode(Image.new("RGB", (4, 4), (9, 8, 7)), "WEBP", lossless=True), (9, 8, 7)),
    ],
)
def test_each_mode_gives_its_documented_pixel(encoded, expected):
    assert first_pixel(encoded) == expected


def test_sixteen_bits_span_the_whole_range_and_round():
    values = np.array([[0, 128, 129, 60_000, 65_535]], dtype=np.uint16)
    pixels = np.asarray(open_rgb(encode(Image.fromarray(values))))[0, :, 0]
    assert pixels.tolist() == [0, 0, 1, 233, 255]


def test_an_adobe_inverted_cmyk_jpeg_keeps_its_colour():
    # Pillow itself writes CMYK JPEGs the Adobe way: with an APP14 marker and inverted.
    encoded = encode(Image.new("CMYK", (8, 8), (255, 0, 0, 0)), "JPEG", quality=100)
    assert b"Adobe" in encoded
    assert np.abs(np.subtract(first_pixel(encoded), (0, 255, 255))).max() <= 3


@pytest.mark.parametrize("image_format", ["JPEG", "PNG", "TIFF", "WEBP"])
def test_exif_rotation_is_applied(image_format):
    image = Image.new("RGB", (20, 10), "black")
    image.paste("white", (0, 0, 10, 10))
    exif = Image.Exif()
    exif[0x0112] = 6  # shown after turning it a quarter clockwise
    upright = open_rgb(encode(image, image_format, exif=exif))
    assert upright.size == (10, 20)
    assert upright.getpixel((5, 2))[0] > 250
    assert upright.getpixel((5, 17))[0] < 5


def test_exif_rotation_of_sixteen_bit_grey():
    exif = Image.Exif()
    exif[0x0112] = 6
    encoded = encode(Image.fromarray(np.array([[0, 65535]], dtype=np.uint16)), exif=exif)
    assert np.asarray(open_rgb(encoded))[:, 0, 0].tolist() == [0, 255]


@pytest.mark.parametrize("image_format", ["GIF", "PNG", "WEBP"])
def test_the_first_frame_of_an_animation_is_taken(image_format):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    options = {"lossless": True} if image_format == "WEBP" else {}
    encoded = encode(
        frames[0], image_format, save_all=True, append_images=frames[1:], duration=10, **options
    )
    assert Image.open(BytesIO(encoded)).n_frames == 2
    assert first_pixel(encoded) == (255, 0, 0)


def png_header(width, height):
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    checksum = struct.pack(">I", zlib.crc32(b"IHDR" + header))
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + b"IHDR" + header + checksum


@pytest.mark.parametrize("side", [10_001, 20_000, 100_000])
def test_a_decompression_bomb_is_refused_from_its_header(side):
    header = png_header(side, side) + struct.pack(">I", 0) + b"IDAT" + b"\x35\xaf\x06\x1e"
    with pytest.raises(UserError, match="refused as a possible decompression bomb"):
        open_rgb(header)


def test_an_image_below_the_limit_opens_without_a_warning_from_pillow():
    height = 9_500
    image = Image.new("1", (MAX_PIXELS // height, height))
    assert image.width * image.height > Image.MAX_IMAGE_PIXELS
    encoded = encode(image)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert open_rgb(encoded).size == image.size


NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))


@pytest.mark.parametrize("image_format", ["PNG", "JPEG", "GIF", "WEBP", "TIFF", "BMP", "AVIF"])
@pytest.mark.parametrize("share", [0.0, 0.001, 0.1, 0.5, 0.9])
def test_a_truncated_file_is_a_one_line_user_error(tmp_path, image_format, share):
    encoded = encode(NOISE, image_format)
    file = tmp_path / f"cut.{image_format}"
    file.write_bytes(encoded[: int(len(encoded) * share)])
    with pytest.raises(UserError) as caught:
        open_rgb(file)
    assert str(file) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert " at 0x" not in str(caught.value)


def test_an_empty_file_is_called_so(tmp_path):
    (tmp_path / "a.png").touch()
    with pytest.raises(UserError, match="no bytes"):
        open_rgb(tmp_path / "a.png")


@pytest.mark.parametrize("content", [b"<html>not found</html>", b"P6 0 5 255\n", png_header(0, 4)])
def test_what_is_no_image_is_a_user_error(content):
    with pytest.raises(UserError):
        open_rgb(content)


def test_postscript_which_pillow_would_hand_to_ghostscript_is_not_opened():
    postscript = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n"
    with Image.open(BytesIO(postscript)) as image:
        assert image.format == "EPS"
    with pytest.raises(UserError, match="not an image in a readable format"):
        open_rgb(postscript)


def test_a_missing_file_whose_name_has_a_newline_is_named_on_one_line(tmp_path):
    with pytest.raises(UserError) as caught:
        open_rgb(tmp_path / "a\nb.png")
    assert len(str(caught.value).splitlines()) == 1


def test_image_bytes_are_the_stored_ones(tmp_path):
    encoded = encode(NOISE)
    file = tmp_path / "a.png"
    file.write_bytes(encoded)
    assert image_bytes(file) == encoded == image_bytes(encoded)

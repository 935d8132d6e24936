"""A picture of a digit is prepared alike in every format and mode; anything else is refused by name."""

import io
import os
import pickle
import shutil
import struct
import subprocess
import sys
import zlib

import numpy as np
import pytest
from PIL import Image

import cnn_jax
from cnn_jax.inference import pictures
from tests.digits import pixel_difference
from tests.helpers import ROOT, read_digit


def in_16_bits(plain):
    return Image.fromarray(np.asarray(plain).astype(np.uint16) * 257)


def with_alpha(plain):
    """Black everywhere; only the alpha channel shows where the ink is."""
    return Image.merge("LA", (Image.new("L", plain.size), plain.point(lambda value: 255 - value)))


def light_with_alpha(plain):
    return Image.merge("LA", (Image.new("L", plain.size, 255), plain.point(lambda value: 255 - value)))


def on_a_sheet_with_clear_corners(plain):
    alpha = Image.new("L", plain.size, 255)
    alpha.paste(0, (0, 0, 12, 12))
    return Image.merge("RGBA", (plain, plain, plain, alpha))


def palette_with_alpha(plain):
    two = plain.point(lambda value: 255 * (value > 128)).convert("P")
    two.info["transparency"] = 255
    return two


MODES = {
    "L": lambda plain: plain,
    "RGB": lambda plain: plain.convert("RGB"),
    "RGBA": lambda plain: plain.convert("RGBA"),
    "palette": lambda plain: plain.convert("P"),
    "one bit": lambda plain: plain.convert("1", dither=Image.Dither.NONE),
    "16 bits": in_16_bits,
    "alpha alone": with_alpha,
    "light ink of alpha": light_with_alpha,
    "clear corners": on_a_sheet_with_clear_corners,
    "clear paper of a palette": palette_with_alpha,
    "light on dark": lambda plain: plain.point(lambda value: 255 - value),
    "low contrast": lambda plain: plain.point(lambda value: 100 + value // 4),
    "wide paper": lambda plain: wide(plain),
}  # fmt: skip


def wide(plain):
    sheet = Image.new("L", (plain.width + 300, plain.height + 20), 250)
    sheet.paste(plain, (290, 4))
    return sheet


@pytest.mark.parametrize("mode", MODES)
def test_a_picture_is_read_as_its_plain_form_whatever_its_mode(mode, plain, read):
    assert pixel_difference(read(MODES[mode](plain)), read(plain)) < 3


@pytest.mark.parametrize("mode", ["L", "RGB", "CMYK"])
def test_a_jpeg_is_read_as_the_plain_picture_in_every_mode(mode, plain, read):
    assert pixel_difference(read(plain.convert(mode), "digit.jpg", quality=90), read(plain)) < 3


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_picture_is_turned_upright_as_its_exif_says(orientation, plain, read):
    back = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}.get(orientation)
    turned = plain if back is None else plain.transpose(Image.Transpose(back))
    exif = Image.Exif()
    exif[0x0112] = orientation
    assert pixel_difference(read(turned, "digit.jpg", quality=95, exif=exif), read(plain)) < 3


def test_a_png_that_is_called_jpg_is_read_by_what_it_is(plain, read):
    assert (read(plain, "digit.jpg", format="PNG") == read(plain)).all()


def test_a_picture_of_12_megapixels_is_read_as_a_small_one(plain, read):
    large = plain.resize((4000, 3000))
    small = large.resize((400, 300))
    assert pixel_difference(read(large, "large.jpg"), read(small)) < 3


def scaled(plain, factor, kind):
    return Image.fromarray((np.asarray(plain, float) * factor).astype(kind))


MORE_BITS = {
    "16 bits": lambda plain: scaled(plain, 257, np.uint16),
    "16 bits, the highest first": lambda plain: scaled(plain, 257, ">u2"),
    "12 of 16 bits": lambda plain: scaled(plain, 4095 / 255, np.uint16),
    "8 of 32 bits": lambda plain: scaled(plain, 1, np.int32),
    "all of 32 bits": lambda plain: scaled(plain, 2**23, np.int32),
    "floats up to 1": lambda plain: scaled(plain, 1 / 255, np.float32),
    "floats up to 255": lambda plain: scaled(plain, 1, np.float32),
    "floats up to 65,535": lambda plain: scaled(plain, 257, np.float32),
}


@pytest.mark.parametrize("kind", MORE_BITS)
def test_whatever_number_is_white_a_picture_of_more_than_8_bits_is_read(kind, plain, read):
    assert pixel_difference(read(MORE_BITS[kind](plain), "digit.tif"), read(plain)) < 3


def test_a_picture_of_ones_and_zeros_is_read(plain, read):
    mask = plain.point(lambda value: value > 128, "1")
    assert (read(scaled(mask, 1, np.int32), "digit.tif") == read(mask)).all()


LARGE = {
    "RGB": ("RGB", {}),
    "on its side": ("RGB", {"exif": b"MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0\0\0\0\0"}),
    "RGBA": ("RGBA", {}),
    "a palette": ("P", {"transparency": 0}),
    "grey and alpha": ("LA", {}),
    "16 bits": ("I;16", {}),
}
READ = """
import pathlib, sys
from cnn_jax.inference.pictures import read_picture
def peak():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")) // 1024
before = peak()
assert max(read_picture(sys.argv[1]).colours.shape) == 512
print(peak() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process's peak so")
@pytest.mark.parametrize("kind", LARGE)
def test_a_large_picture_takes_little_more_memory_than_its_pixels(kind, tmp_path):
    mode, options = LARGE[kind]
    Image.new(mode, (4800, 4000), 200 if mode == "P" else None).save(
        tmp_path / "large.png", compress_level=1, **options
    )
    read = subprocess.run(
        [sys.executable, "-c", READ, tmp_path / "large.png"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert int(read.stdout) < 4 * 4800 * 4000 / 2**20 + 30  # Pillow has four bytes for a pixel


def in_pages(plain, kind, **options):
    return saved(plain, kind, save_all=True, append_images=[Image.new("L", plain.size)], **options)


SEVERAL = ("GIF", "PNG", "WEBP", "TIFF", "HEIF")


@pytest.mark.parametrize("kind", SEVERAL)
def test_that_a_file_has_more_than_the_picture_that_is_read_is_told_in_a_line(kind, plain, command, tmp_path):
    if kind == "HEIF":
        pytest.importorskip("pillow_heif", reason="needs the extra heic").register_heif_opener()
    file, network = tmp_path / "pages", cnn_jax.load()
    for content, told in ((in_pages(plain, kind), 1), (saved(plain, kind), 0)):
        file.write_bytes(content)
        for option in ([], ["--json"]):
            code, out, err = command("predict", file, *option)
            assert (code, err.count(f"{file} has several pictures; only the first is read\n")) == (0, told), err
            assert "several" not in out
        network.predict(file)


def png_of(width, height):
    """A PNG of a few hundred bytes whose header announces this size."""

    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 99)) + chunk(b"IEND", b"")
    )


def saved(picture, kind="PNG", **options):
    content = io.BytesIO()
    picture.save(content, kind, **options)
    return content.getvalue()


def heic(picture):
    pytest.importorskip("pillow_heif", reason="needs the extra heic").register_heif_opener()
    return saved(picture, "HEIF", quality=100)


SAVED = {
    "WebP": lambda plain: saved(plain, "WEBP", lossless=True),
    "BMP": lambda plain: saved(plain, "BMP"),
    "GIF": lambda plain: saved(plain, "GIF"),
    "an animated GIF": lambda plain: saved(
        plain, "GIF", save_all=True, append_images=[Image.new("L", plain.size, n) for n in (0, 255)]
    ),
    "TIFF": lambda plain: saved(plain, "TIFF", compression="tiff_lzw"),
    "HEIC": heic,
}


@pytest.mark.parametrize("kind", SAVED)
def test_other_formats_show_the_same_digit(kind, plain, tmp_path):
    (tmp_path / "digit.png").write_bytes(saved(plain))
    (tmp_path / "other").write_bytes(SAVED[kind](plain))  # formats are known by their content
    expected, read = (read_digit(tmp_path / name).astype(int) for name in ("digit.png", "other"))
    assert np.abs(expected - read).max() <= (64 if kind == "HEIC" else 0)
    assert np.abs(expected - read).mean() <= 1


def test_a_folders_pictures_of_all_formats_are_read(plain, command, tmp_path):
    for ending in pictures.ENDINGS[:-2]:
        (tmp_path / f"digit{ending}").write_bytes(saved(plain))
    code, out, err = command("predict", tmp_path)
    assert (code, len(out.splitlines())) == (0, len(pictures.ENDINGS) - 2), err


def test_without_its_extra_a_heic_file_is_refused_in_a_line_that_names_it(plain, command, tmp_path, monkeypatch):
    (tmp_path / "a.heic").write_bytes(heic(plain))
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    needs = "may be HEIC, which needs pip install 'cnn-jax[heic]'; or save it as JPEG"
    assert command("predict", tmp_path) == (65, "", f"error: {tmp_path}/a.heic {needs}\n")


class Trap:
    def __reduce__(self):
        return os.abort, ()


def noisy_paper():
    return Image.fromarray(np.random.default_rng(0).normal(200, 12, (300, 300)).clip(0, 255).astype(np.uint8))


def gradient():
    return Image.fromarray(np.linspace(20, 250, 300 * 300).reshape(300, 300).astype(np.uint8))


BAD = {
    "empty": (lambda plain: b"", "is empty; give a picture file"),
    "text": (lambda plain: b"seven\n" * 9, "is not a picture of a known format; save it as PNG or JPEG"),
    "a pickle": (lambda plain: pickle.dumps(Trap()), "is not a picture of a known format; save it as PNG or JPEG"),
    "a PDF": (lambda plain: saved(plain, "PDF"), "is a PDF; save its page as a PNG or JPEG picture"),
    "a JPEG 2000": (lambda plain: saved(plain, "JPEG2000"), "is not a picture of a known format"),
    "a cut GIF": (lambda plain: saved(plain, "GIF")[:-300], "is damaged ("),
    "a cut WebP": (lambda plain: saved(plain, "WEBP")[:-300], "is damaged ("),
    "a cut TIFF": (lambda plain: saved(plain, "TIFF", compression="tiff_lzw")[:-300], "is damaged ("),
    "a cut BMP": (lambda plain: saved(plain, "BMP")[:-300], "is damaged ("),
    "a cut HEIC": (lambda plain: heic(plain)[:-300], "is damaged ("),
    "a cut PNG": (lambda plain: saved(plain)[:-300], "is damaged (Truncated File Read"),
    "a cut JPEG": (lambda plain: saved(plain, "JPEG")[:-300], "is damaged (image file is truncated"),
    "half a header": (lambda plain: saved(plain)[:20], "is damaged (Truncated File Read"),
    "a PNG with a wrong checksum": (
        lambda plain: saved(plain)[:30] + b"\xff" + saved(plain)[31:],
        "is damaged (its header cannot be read",
    ),
    "a PNG with a bit flipped": (lambda plain: flipped(saved(plain)), "is damaged (broken PNG file"),
    "many pixels": (lambda plain: png_of(9_000, 9_000), "has more than 50,000,000 pixels; give a smaller picture"),
    "a bomb": (lambda plain: png_of(2**31 - 1, 2**31 - 1), "has more than 50,000,000 pixels; give a smaller picture"),
    "many bytes": (lambda plain: saved(plain) + bytes(2**26), "has more than 64 MiB; give a smaller picture"),
    "pixels below 0": (lambda plain: saved(scaled(plain, -1, np.float32), "TIFF"), "has pixels below 0 or that are"),
    "whole pixels below 0": (lambda plain: saved(scaled(plain, -1, np.int32), "TIFF"), "has pixels below 0 or that"),
    "pixels that are no numbers": (
        lambda plain: saved(scaled(plain, np.nan, np.float32), "TIFF"),
        "has pixels below 0 or that are no numbers; save it with 8 bits per channel",
    ),
    "tiny": (lambda plain: saved(plain.resize((7, 30))), "is 7x30 pixels, too small or too narrow; give"),
    "narrow": (lambda plain: saved(plain.resize((9, 900))), "is 9x900 pixels, too small or too narrow; give"),
}  # fmt: skip
BLANK = {
    "white": lambda: Image.new("L", (90, 90), 255),
    "black": lambda: Image.new("RGB", (90, 90)),
    "clear": lambda: Image.new("RGBA", (90, 90)),
    "paper alone": lambda: noisy_paper(),
    "light alone": gradient,
}


def flipped(content):
    content = bytearray(content)
    content[len(content) // 2] ^= 4
    return bytes(content)


@pytest.mark.parametrize("kind", BAD)
def test_anything_but_a_picture_of_a_digit_is_refused_in_one_line_that_names_it(kind, plain, command, tmp_path):
    make, complaint = BAD[kind]
    (tmp_path / "bad.png").write_bytes(make(plain))
    code, out, err = command("predict", tmp_path / "bad.png")
    assert (code, out) == (65, "")
    assert err.startswith(f"error: {tmp_path}/bad.png {complaint}"), err
    assert len(err.splitlines()) == 1


@pytest.mark.parametrize("kind", BLANK)
@pytest.mark.parametrize("option", [(), ("--one",)])
def test_in_a_blank_picture_no_digit_is_found(kind, option, command, tmp_path):
    BLANK[kind]().save(tmp_path / "blank.png")
    code, out, err = command("predict", tmp_path / "blank.png", *option)
    assert (code, out) == (65, f"{tmp_path}/blank.png: ?\n")
    assert err == f"error: no digit was found in {tmp_path}/blank.png; give a picture with more contrast\n"


def make_fifo(path):
    os.mkfifo(path)


def make_unreadable(path):
    path.write_bytes(b"x")
    path.chmod(0)


def make_loop(path):
    path.symlink_to(path)


PLACES = {
    "a FIFO": (make_fifo, "is not a regular file; give a picture file, or - for standard input"),
    "nothing": (lambda path: None, "cannot be opened (No such file or directory); give a picture file"),
    "a loop of links": (make_loop, "cannot be opened (Too many levels of symbolic links); give a picture file"),
    "an empty folder": (
        lambda path: path.mkdir(),
        "is a folder without an image; put pictures there, such as .png or .jpg files",
    ),
    "an unreadable file": (make_unreadable, "cannot be opened (Permission denied); give a picture file"),
}


@pytest.mark.parametrize("kind", PLACES)
def test_anything_but_a_file_is_refused_without_waiting_for_it(kind, command, tmp_path):
    if kind == "an unreadable file" and os.geteuid() == 0:
        pytest.skip("root may read it")
    make, complaint = PLACES[kind]
    make(tmp_path / "place.png")
    assert command("predict", tmp_path / "place.png") == (65, "", f"error: {tmp_path}/place.png {complaint}\n")


def test_a_folder_among_a_folders_pictures_is_named_and_the_others_are_read(command, tmp_path):
    (tmp_path / "a.png").mkdir()
    shutil.copy(ROOT / "docs" / "four.jpg", tmp_path / "b.jpg")
    code, out, err = command("predict", tmp_path)
    assert (code, out) == (65, f"{tmp_path}/b.jpg: 4\n")
    assert err.splitlines()[-1].startswith(f"error: {tmp_path}/a.png is not a regular file")


def test_a_device_is_refused(command):
    code, _, err = command("predict", "/dev/zero")
    assert (code, err) == (
        65, "error: /dev/zero is not a regular file; give a picture file, or - for standard input\n"
    )  # fmt: skip


def test_no_more_of_a_file_is_read_than_is_allowed(plain, tmp_path, monkeypatch):
    file = tmp_path / "digit.png"
    file.write_bytes(saved(plain))
    monkeypatch.setattr(pictures, "MAXIMUM_BYTES", file.stat().st_size)
    read_digit(str(file))
    monkeypatch.setattr(pictures, "MAXIMUM_BYTES", file.stat().st_size - 1)
    with pytest.raises(pictures.InputFileError, match="more than"):
        read_digit(str(file))


def test_libtiff_does_not_tell_of_a_damaged_tiff_beside_the_failure(plain, tmp_path, capfd):
    content = saved(plain, "TIFF", compression="tiff_lzw")
    (tmp_path / "bad.tif").write_bytes(content[:200] + b"\xff" * 50 + content[250:])
    with pytest.raises(pictures.InputFileError, match="is damaged"):
        read_digit(tmp_path / "bad.tif")
    assert capfd.readouterr() == ("", "")

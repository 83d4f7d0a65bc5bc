"""Pictures of others: 8-bit RGB pixels of whatever Pillow opens, and folders as the file system shows them."""

import os

import numpy as np
import pytest
import torch
from PIL import Image

from ptq4dm.errors import UserError
from ptq4dm.pipelines.picture_files import find_images, list_images, load_image, load_images

GREY = np.random.default_rng(0).integers(0, 256, (5, 7)).astype(np.uint8)
GREY[0, :2] = 0, 255
WIDE = GREY.astype(np.uint16) * 257
SCALED = {
    "8.png": GREY,
    "16.png": WIDE,
    "16.tif": WIDE,
    "16.pgm": WIDE,
    "big-endian.tif": WIDE.astype(">u2"),
    "32.tif": GREY.astype(np.int32),
    "32-of-16.tif": WIDE.astype(np.int32),
    "unit.tiff": GREY.astype(np.float32) / 255,
    "float.tiff": GREY.astype(np.float32),
    "float-of-16.tiff": WIDE.astype(np.float32),
}


@pytest.mark.parametrize("name", SCALED)
def test_grey_levels_of_any_width_are_those_of_8_bits(name, tmp_path):
    Image.fromarray(SCALED[name]).save(tmp_path / name)
    image = load_image(tmp_path / name)
    assert image.dtype == torch.uint8 and image.is_contiguous()
    assert torch.equal(image, torch.from_numpy(GREY).expand(3, 5, 7))


def test_a_dark_picture_of_16_bits_stays_dark(tmp_path):
    for name in ("dark.png", "dark.tif", "dark.pgm"):
        Image.fromarray(np.full((4, 4), 200, np.uint16)).save(tmp_path / name)
        assert load_image(tmp_path / name).max() == 1


@pytest.mark.parametrize("values", [[[-1.0, 1.0]], [[0.0, 1e6]], [[float("nan"), 1.0]], [[float("inf"), 1.0]]])
def test_floats_whose_white_nobody_knows(values, tmp_path):
    Image.fromarray(np.array(values, np.float32)).save(tmp_path / "a.tif")
    with pytest.raises(UserError, match="grey levels from .* nobody can say which is white|holds NaN or infinity"):
        load_image(tmp_path / "a.tif")


MODES = ["1.png", "P.png", "P.gif", "LA.png", "RGBA.png", "CMYK.tif", "YCbCr.jpg", "RGBA.webp"]


@pytest.mark.parametrize(("mode", "suffix"), [name.split(".") for name in MODES])
def test_other_modes_are_what_pillow_makes_of_them(mode, suffix, tmp_path):
    colours = np.random.default_rng(1).integers(0, 256, (6, 6, 3)).astype(np.uint8)
    path = tmp_path / f"a.{suffix}"
    Image.fromarray(colours).convert(mode).save(path)
    with Image.open(path) as picture:
        expected = np.asarray(picture.convert("RGB"))
    assert np.array_equal(load_image(path).permute(1, 2, 0).numpy(), expected) and expected.std() > 0


def test_a_picture_is_turned_as_its_camera_was(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn clockwise
    colours = np.random.default_rng(1).integers(0, 256, (4, 6, 3)).astype(np.uint8)
    Image.fromarray(colours).save(tmp_path / "turned.png", exif=exif)
    assert np.array_equal(load_image(tmp_path / "turned.png").permute(1, 2, 0).numpy(), np.rot90(colours, -1))


def test_folders_as_the_file_system_shows_them(tmp_path):
    folder = tmp_path / ".cache" / "pictures"  # that it lies in a hidden folder says nothing
    for place in ("deep/er", ".git", "named.png", "__MACOSX"):
        (folder / place).mkdir(parents=True)
    other = tmp_path / "elsewhere"
    other.mkdir()
    for name in (
        "a.PNG",
        "b.Tif",
        "c.bmp",
        "deep/d.gif",
        "deep/er/e.JPEG",
        "named.png/f.png",
        ".g.png",
        ".git/h.png",
    ):
        Image.new("RGB", (4, 4)).save(folder / name, format="PNG")
    (folder / "__MACOSX" / "._a.PNG").write_bytes(b"")
    Image.new("RGB", (4, 4)).save(other / "i.png")
    (folder / "link").symlink_to(other)
    (folder / "deep" / "up").symlink_to(folder)  # back to a folder that it lies in
    (folder / "gone.png").symlink_to(tmp_path / "nowhere.png")
    (folder / "notes.txt").write_text("x")
    found = find_images(folder)
    names = [p.relative_to(folder).as_posix() for p in found.paths]
    assert names == ["a.PNG", "b.Tif", "c.bmp", "deep/d.gif", "deep/er/e.JPEG", "link/i.png", "named.png/f.png"]
    assert found.paths == list_images(folder) and load_images(found.paths).shape == (7, 3, 4, 4)
    assert (found.hidden, found.others) == (3, 2)
    assert found.passed_over == f"{folder}: 2 not pictures by their suffix and 3 hidden, passed over"
    assert find_images(other).passed_over == ""


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="the superuser reads everything")
def test_a_folder_that_cannot_be_read_is_not_passed_over(tmp_path):
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    (tmp_path / "locked").mkdir(mode=0)
    with pytest.raises(UserError, match="locked cannot be read: Permission denied"):
        find_images(tmp_path)

"""Pictures in and out."""

import numpy as np
import pytest
import torch
from diffusers import DDPMPipeline
from PIL import Image, PngImagePlugin

from ptq4dm.errors import DamagedFile, UserError
from ptq4dm.pipelines.images import (
    METADATA_KEY,
    image_grid,
    list_images,
    load_images,
    read_metadata,
    save_png,
    to_uint8,
)
from ptq4dm.pipelines.picture_files import load_image


def pictures(number, size=8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (number, 3, size, size), generator=generator, dtype=torch.uint8)


def test_to_uint8_agrees_with_diffusers_on_every_half_step():
    # All k/510: whole grey levels and the exact ties between two of them.
    values = (torch.arange(511, dtype=torch.float32) / 510).repeat(3).reshape(1, 3, 7, 73)
    theirs = DDPMPipeline.numpy_to_pil(values.permute(0, 2, 3, 1).numpy())[0]
    assert np.array_equal(to_uint8(values)[0].permute(1, 2, 0).numpy(), np.asarray(theirs))


def test_to_uint8_clamps_and_refuses_nan_and_integers():
    assert to_uint8(torch.tensor([-3.0, 2.0, float("inf")])).tolist() == [0, 255, 255]
    with pytest.raises(UserError, match="NaN"):
        to_uint8(torch.tensor([float("nan")]))
    with pytest.raises(UserError, match="floating"):
        to_uint8(torch.zeros(1, dtype=torch.uint8))


def test_png_round_trip_with_metadata(tmp_path):
    image, metadata = pictures(1)[0], {"seed": 7, "prompt": ["ein Bär", None], "scheduler": {"eta": 0.5}}
    save_png(image, tmp_path / "a.png", metadata)
    assert torch.equal(load_images([tmp_path / "a.png"])[0], image)
    assert read_metadata(tmp_path / "a.png") == metadata
    assert [p.name for p in tmp_path.iterdir()] == ["a.png"]  # nothing temporary stays


def test_failed_write_leaves_nothing_and_says_so(tmp_path, monkeypatch):
    def broken(self, path, **_):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", broken)
    with pytest.raises(UserError, match="No space left"):
        save_png(pictures(1)[0], tmp_path / "a.png", {})
    assert not list(tmp_path.iterdir())


def test_metadata_of_a_foreign_or_broken_file(tmp_path):
    Image.new("RGB", (4, 4)).save(tmp_path / "plain.png")
    (tmp_path / "text.png").write_text("not a picture")
    with pytest.raises(UserError, match="plain.png carries no ptq4dm metadata"):
        read_metadata(tmp_path / "plain.png")
    with pytest.raises(UserError, match="text.png cannot be read"):
        read_metadata(tmp_path / "text.png")


def test_list_images_is_sorted_recursive_and_picky(tmp_path):
    (tmp_path / "sub").mkdir()
    for name in ("b.PNG", "a.jpeg", "sub/c.webp", "sub/d.jpg"):
        Image.new("RGB", (4, 4)).save(tmp_path / name)
    (tmp_path / "notes.txt").write_text("x")
    (tmp_path / ".a.png.1.tmp").write_text("half")
    assert [p.relative_to(tmp_path).as_posix() for p in list_images(tmp_path)] == [
        "a.jpeg", "b.PNG", "sub/c.webp", "sub/d.jpg",
    ]  # fmt: skip


def test_list_images_wants_a_folder_with_images(tmp_path):
    with pytest.raises(UserError, match="not a folder"):
        list_images(tmp_path / "gone")
    with pytest.raises(UserError, match="no images"):
        list_images(tmp_path)


def test_load_images_converts_to_rgb_and_names_the_odd_one(tmp_path):
    Image.new("L", (4, 6), 9).save(tmp_path / "grey.png")
    Image.new("RGB", (6, 4)).save(tmp_path / "turned.png")
    whole = tmp_path / "grey.png"
    (tmp_path / "cut.png").write_bytes(whole.read_bytes()[:-30])
    loaded = load_images([whole, whole])
    assert loaded.shape == (2, 3, 6, 4) and loaded.dtype == torch.uint8 and (loaded == 9).all()
    with pytest.raises(UserError, match="turned.png is 6x4"):
        load_images([whole, tmp_path / "turned.png"])
    with pytest.raises(UserError, match="cut.png cannot be read"):
        load_images([tmp_path / "cut.png"])
    with pytest.raises(UserError, match="gone.png"):
        load_images([tmp_path / "gone.png"])
    with pytest.raises(UserError, match="no images"):
        load_images([])


def test_grid_places_every_image_and_fills_with_white():
    images = pictures(5)
    grid = np.asarray(image_grid(images, columns=3, scale=2))
    assert grid.shape == (2 * 8 * 2, 3 * 8 * 2, 3)
    for k in range(5):
        row, column = divmod(k, 3)
        cell = grid[row * 16 : row * 16 + 16, column * 16 : column * 16 + 16]
        assert np.array_equal(cell[::2, ::2], images[k].permute(1, 2, 0).numpy())
        assert np.array_equal(cell[::2, ::2], cell[1::2, 1::2])
    assert (grid[16:, 32:] == 255).all()
    with pytest.raises(UserError, match="columns"):
        image_grid(images, columns=0)


def picture_with(path, text, compressed=False):
    info = PngImagePlugin.PngInfo()
    info.add_text(METADATA_KEY, text, zip=compressed)
    Image.new("RGB", (8, 8)).save(path, pnginfo=info)


OTHERS = ["5", "null", "[]", '"a"', "{", "", "[" * 100_000, '{"a": ' + "9" * 5000 + "}", '{"a": 1, "a": 2}']


@pytest.mark.parametrize("text", OTHERS)
def test_metadata_of_another_kind(tmp_path, text):
    picture_with(tmp_path / "a.png", text)
    with pytest.raises(DamagedFile, match="a.png cannot be read") as caught:
        read_metadata(tmp_path / "a.png")
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500


def test_texts_and_pictures_that_would_fill_the_memory(tmp_path, monkeypatch):
    picture_with(tmp_path / "text.png", '{"a": "' + "b" * (3 << 20) + '"}', compressed=True)
    with pytest.raises(UserError, match="text.png"):
        read_metadata(tmp_path / "text.png")
    Image.new("RGB", (8, 8)).save(tmp_path / "large.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    for read in (read_metadata, load_image):
        with pytest.raises(DamagedFile, match="large.png cannot be read .*64 pixels"):
            read(tmp_path / "large.png")


def test_any_damage_is_one_sentence(tmp_path):
    """Every byte of small pictures, one at a time."""
    save_png(torch.zeros(3, 4, 4, dtype=torch.uint8), tmp_path / "good.png", {"seed": 1})
    good = (tmp_path / "good.png").read_bytes()
    path, told = tmp_path / "bad.png", 0
    for place in range(len(good)):
        for data in (good[:place], good[:place] + bytes([good[place] ^ 0xFF]) + good[place + 1 :]):
            path.write_bytes(data)
            for read in (read_metadata, load_image):
                try:
                    read(path)
                except UserError as error:
                    told += 1
                    assert "bad.png" in str(error) and "\n" not in str(error)
    assert told > len(good)
    for place in range(0, len(good) - 12):  # the last chunk is empty: whatever is missing before, is found
        path.write_bytes(good[:place])
        with pytest.raises(UserError):
            read_metadata(path)

"""Pictures that have no room in memory: the same as all of them in one tensor, and the same training."""

import pytest
import torch
from diffusers import DDIMScheduler, DDPMPipeline, UNet2DModel

import ptq4dm
from ptq4dm import ShiftQuantConfig, UserError
from ptq4dm.pipelines.images import save_png
from ptq4dm.training import shelf
from ptq4dm.training.pictures import read_pictures, split

pytestmark = pytest.mark.usefixtures("one_thread", "new_accelerate")
BYTES = 3 * 16 * 16
SHORT = {"bits": 16, "images": 24, "batch_size": 4, "held_out": 2, "sample_steps": 0}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder, g = tmp_path_factory.mktemp("pictures"), torch.Generator().manual_seed(0)
    for i in range(20):
        save_png(torch.randint(0, 256, (3, 20, 16), generator=g, dtype=torch.uint8), folder / f"{i:02d}.png", {})
    return folder


def trained(pictures, folder):
    torch.manual_seed(0)
    net = UNet2DModel(
        sample_size=16, layers_per_block=1, block_out_channels=(8,), norm_num_groups=4,
        down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",), add_attention=False,
    )  # fmt: skip
    pipe = ptq4dm.train(DDPMPipeline(net, DDIMScheduler()), pictures, ShiftQuantConfig(**SHORT), folder)
    return torch.cat([one.flatten() for one in pipe.unet.parameters()])


def test_it_gives_what_a_tensor_gives(pictures, monkeypatch):
    whole = split(read_pictures(pictures, (16, 16), 3, None), 2)
    monkeypatch.setattr(shelf, "ROOM", 5 * BYTES)
    parts = split(read_pictures(pictures, (16, 16), 3, None), 2)
    for one, other in zip(parts, whole, strict=True):
        assert isinstance(one.images, shelf.Shelf) and len(one) == len(other)
        for rows in (torch.tensor([1, 0, 1]), torch.arange(len(other)), torch.arange(0)):
            assert torch.equal(one.images[rows], other.images[rows])
        assert len(one.images.kept) <= 5 and not one.images.coming


def test_what_is_kept_is_not_read_again(pictures, monkeypatch):
    read = []
    monkeypatch.setattr(shelf, "load_image", lambda path: read.append(path.name) or torch.zeros(3, 16, 16).byte())
    found = shelf.Shelf(sorted(pictures.iterdir()), (16, 16), 3, 2 * BYTES)
    found.expect(torch.tensor([7, 3]))
    for _ in range(2):
        found[torch.tensor([3, 3, 7, 1])]
    assert sorted(read) == ["01.png", "01.png", "03.png", "07.png"]


def test_training_is_the_same(pictures, tmp_path, monkeypatch):
    expected = trained(pictures, tmp_path / "whole")
    monkeypatch.setattr(shelf, "ROOM", 4 * BYTES)
    assert torch.equal(trained(pictures, tmp_path / "shelf"), expected)
    (pictures / "03.png").write_bytes(b"no picture")
    with pytest.raises(UserError, match="03.png"):
        trained(pictures, tmp_path / "damaged")

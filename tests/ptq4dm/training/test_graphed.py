"""Steps as one CUDA graph: the same training as step by step, also when it goes on; and who trains so."""

import pytest
import torch
from diffusers import DDIMScheduler, DDPMPipeline, UNet2DModel

import ptq4dm
from ptq4dm import ShiftQuantConfig, UserError
from ptq4dm.files.log import read_lines
from ptq4dm.pipelines.images import save_png

pytestmark = pytest.mark.usefixtures("new_accelerate")
SHORT = {"images": 48, "batch_size": 8, "log_every": 1, "evaluate_every": 24, "held_out": 2, "sample_steps": 0}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    g = torch.Generator().manual_seed(0)
    for i in range(20):
        save_png(torch.randint(0, 256, (3, 16, 16), generator=g, dtype=torch.uint8), folder / f"{i}.png", {})
    return folder


def pipeline(device):
    torch.manual_seed(0)
    net = UNet2DModel(
        sample_size=16, layers_per_block=1, block_out_channels=(16,), norm_num_groups=4, dropout=0.3,
        down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",), add_attention=False,
    )  # fmt: skip
    return DDPMPipeline(net, DDIMScheduler()).to(device)


def trained(folder, pictures, **settings):
    """(losses, weights) of a run on a GPU."""
    config = ShiftQuantConfig(**SHORT | settings)
    pipe = ptq4dm.train(pipeline("cuda"), pictures, config, folder, resume=folder.exists())
    losses = [line["loss"] for line in read_lines(folder / "log.jsonl") if line["stage"] == "training"]
    return losses, torch.cat([one.flatten() for one in pipe.unet.parameters()])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("norm", ["same", "l1"])
@pytest.mark.parametrize("bits", [6, 16])
def test_it_is_the_same_training(tmp_path, pictures, bits, norm):
    eager, weights = trained(tmp_path / "eager", pictures, bits=bits, norm=norm, graph=False)
    graphed, others = trained(tmp_path / "graph", pictures, bits=bits, norm=norm, graph=True)
    assert len(graphed) == 6 and graphed == pytest.approx(eager, rel=1e-3)
    torch.testing.assert_close(others, weights, rtol=1e-3, atol=1e-4)
    trained(tmp_path / "parts", pictures, bits=bits, norm=norm, images=24, graph=True)
    parts, again = trained(tmp_path / "parts", pictures, bits=bits, norm=norm, graph=True)
    assert parts == pytest.approx(graphed, rel=1e-3)
    torch.testing.assert_close(again, others, rtol=1e-3, atol=1e-4)


def test_who_cannot(tmp_path, pictures):
    with pytest.raises(UserError, match="one CUDA graph on one GPU alone"):
        ptq4dm.train(pipeline("cpu"), pictures, ShiftQuantConfig(**SHORT, graph=True), tmp_path / "run")
    with pytest.raises(UserError, match="graph=True and compile=True do not go together"):
        ShiftQuantConfig(graph=True, compile=True)
    assert "graph" not in ShiftQuantConfig().identity()

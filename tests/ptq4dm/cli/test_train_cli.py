"""`ptq4dm train`: a folder of pictures in, a plain model out, that every other command takes."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from diffusers import DDIMScheduler, DDPMPipeline, UNet2DModel
from PIL import Image

from ptq4dm.cli.main import build_parser, main
from ptq4dm.files.log import read_lines
from ptq4dm.kernels.shift import products
from ptq4dm.training import run as run_module

pytestmark = pytest.mark.usefixtures("one_thread")
SHORT = ["--num-images", 12, "--batch-size", 4, "--evaluate-every", 8, "--held-out", 2, "--sample-steps", 0]


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    net = UNet2DModel(
        sample_size=16, layers_per_block=1, block_out_channels=(8,), norm_num_groups=4,
        down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",), add_attention=False,
    )  # fmt: skip
    DDPMPipeline(net, DDIMScheduler()).save_pretrained("model")
    Path("pictures").mkdir()
    random = np.random.default_rng(0)
    for i in range(20):
        Image.fromarray(random.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(f"pictures/{i}.png")
    yield
    AcceleratorState._reset_state()


def run(*arguments):
    return main([str(a) for a in arguments])


TRAIN = ["train", "--model", "./model", "--images", "pictures", *SHORT]


def test_train_then_quantize_and_generate(capsys):
    assert run("--json", *TRAIN, "--served", "--weight-bits", 4, "--activation-bits", 4, "--output", "t") == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["images"] == facts["of"] == 12 and facts["output"] == "t" and facts["log"][0]["stage"] == "start"
    record = json.loads(Path("t/training.json").read_text())
    assert record["model"] == "./model" and record["served"] and record["weight_bits"] == 4
    assert not (Path("t/unet/config.json").read_text().count("quantization_config"))
    AcceleratorState._reset_state()
    widths = ["--weight-bits", 4, "--activation-bits", 4, "--activations", "dynamic"]
    assert run("quantize", "--model", "./t", "--method", "rtn", *widths, "--output", "q") == 0
    assert run("generate", "--model", "./q", "--num-images", 2, "--steps", 2, "--output", "images") == 0
    assert len(list(Path("images").glob("*.png"))) >= 2


def test_what_is_told_of_products_learning_rate_and_images(capsys, monkeypatch):
    monkeypatch.setattr(products, "w8a8_kernel", lambda device: "reference")  # as on a CPU without VNNI
    assert run(*TRAIN, "--bits", 6, "--output", "t", "--num-images", 3) == 0
    out = capsys.readouterr().out
    assert re.search(r"\d+ layers on integers \(exact-float32 \d+; exact-float32: a CPU without fast products", out)
    assert "trained on 4 images: t" in out and "learning rate" not in out
    AcceleratorState._reset_state()
    assert run(*TRAIN, "--bits", 6, "--output", "t", "--learning-rate", 1e-3, "--resume") == 0
    assert "the learning rate was 0.0001 at the start, and 0.001 in this call" in capsys.readouterr().out
    record = json.loads(Path("t/training.json").read_text())
    assert (record["learning_rate"], record["images"], record["norm"]) == (1e-3, 12, "same")


def test_one_picture_is_one_and_no_grids_are_no_grids(capsys):
    """20 pictures, of which the command holds out two at most."""
    assert run(*TRAIN, "--output", "t") == 0
    out = capsys.readouterr().out
    assert " on 2 pictures, each at one time\n" in out and "\nlog, checkpoint: t.run\n" in out
    assert not Path("t.run/samples").exists()
    AcceleratorState._reset_state()
    assert run(*TRAIN, "--held-out", 1, "--sample-steps", 1, "--output", "one") == 0
    out = capsys.readouterr().out
    assert " on 1 picture, at one time\n" in out and "\nlog, sample grids, checkpoint: one.run\n" in out
    assert list(Path("one.run/samples").glob("*.png"))


def test_info_of_a_model_with_l1_norms(capsys):
    assert run(*TRAIN, "--bits", 6, "--norm", "l1", "--output", "t") == 0
    capsys.readouterr()
    assert run("--json", "info", "--model", "./t") == 0
    left = json.loads(capsys.readouterr().out)["left"]
    assert left and all("norms by the mean magnitude alone" in row["why"] for row in left)


def test_interrupted_and_resumed(monkeypatch, capsys):
    before = run_module.Run.batch

    def batch(training, step):
        if step == 2:
            raise KeyboardInterrupt
        return before(training, step)

    with monkeypatch.context() as patch:
        patch.setattr(run_module.Run, "batch", batch)
        assert run(*TRAIN, "--output", "t") == 130
    assert "the same command with --resume goes on" in capsys.readouterr().err and not Path("t").exists()
    AcceleratorState._reset_state()
    assert run(*TRAIN, "--output", "t", "--resume") == 0
    assert "trained on 12 of 12 images: t" in capsys.readouterr().out
    AcceleratorState._reset_state()
    assert run(*TRAIN, "--output", "other") == 0
    one, other = (Path(name, "unet", "diffusion_pytorch_model.safetensors").read_bytes() for name in ("t", "other"))
    assert one == other
    assert max(line.get("step", 0) for line in read_lines("t.run/log.jsonl")) == 3


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--images", "nowhere"], "nowhere is not a folder of images"),
        (["--bits", 9], "bits must be from 2 to 8, or 16 for floats; got 9"),
        (["--bits", 16, "--wide"], "--bits 16 trains in floats and leaves no place for --wide"),
        (["--drop-captions", 0.1], "--drop-captions 0.1 is for models of text, and this one learns without captions"),
        (["--resume"], "there is no checkpoint at out/trained.run/checkpoint.safetensors to resume"),
        (["--output", "model"], "model exists and was not written by ptq4dm train"),
        (["--dtype", "float16"], "float16 overflows where gradients are"),
        (["--num-images", 0], "images"),
    ],
)
def test_what_is_refused(options, says, capsys):
    assert run(*TRAIN, *options) == 2
    error = capsys.readouterr().err
    assert says in error and error.count("\n") == 1


def test_help_has_every_option(capsys):
    with pytest.raises(SystemExit):
        build_parser().parse_args(["train", "--help"])
    text = capsys.readouterr().out
    for flag in ("--bits", "--groups", "--served", "--images", "--num-images", "--minutes", "--resume", "--no-flip"):
        assert flag in text

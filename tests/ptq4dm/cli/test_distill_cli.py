"""`ptq4dm distill`, and what every other command does with the student: one step, without being told."""

import json
import re
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from diffusers import DDIMPipeline, DDIMScheduler, DDPMPipeline, DiTTransformer2DModel, UNet2DModel
from safetensors.torch import load_file

import ptq4dm
from ptq4dm.cli.main import build_parser, main
from ptq4dm.cli.options import STEPS
from ptq4dm.pipelines.images import load_images, read_metadata
from ptq4dm.pipelines.load import load_pipeline
from ptq4dm.pipelines.pixel_dit import PixelDiTPipeline
from ptq4dm.samplers import DisBackConfig, OneStepScheduler

pytestmark = pytest.mark.usefixtures("one_thread")
SHORT = ["--images", "40", "--batch-size", "4", "--degradation-steps", "2", "--path-points", "2"]
SHORT += ["--switch-every", "2", "--evaluate-every", "16"]


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    AcceleratorState._reset_state()


def unet():
    torch.manual_seed(0)
    return UNet2DModel(
        sample_size=32, layers_per_block=1, block_out_channels=(8,), norm_num_groups=4, dropout=0.5,
        down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",), add_attention=False,
    )  # fmt: skip


def dit():
    torch.manual_seed(0)
    return DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=3, out_channels=6, num_layers=1, sample_size=32,
        patch_size=8, num_embeds_ada_norm=10,
    )  # fmt: skip


TEACHERS = {
    "unet": lambda: DDPMPipeline(unet(), DDIMScheduler()),
    "ddim": lambda: DDIMPipeline(unet(), DDIMScheduler()),
    "dit": lambda: PixelDiTPipeline(dit(), DDIMScheduler()),
}


def run(*arguments):
    return main([str(a) for a in arguments])


def log(folder):
    return [json.loads(line) for line in (Path(folder) / "log.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("kind", TEACHERS)
def test_from_teacher_to_quantized_student(kind, capsys):
    TEACHERS[kind]().save_pretrained("teacher")
    assert run("distill", "--model", "./teacher", "--output", "out/s", *SHORT, "--num-fid", 6) == 0
    assert "one-step student after 40 of 40 images: out/s\n" in capsys.readouterr().out
    assert sorted(p.name for p in Path("out/s").iterdir() if p.is_file()) == [
        "README.md",
        "distillation.json",
        "model_index.json",
    ]
    assert json.loads(Path("out/s/distillation.json").read_text())["model"] == "./teacher"
    curve = [line for line in log("out/s.run") if line["stage"] == "evaluation"]
    assert [line["images"] for line in curve] == [0, 16, 32, 40] and all(line["feature_fid"] > 0 for line in curve)
    assert sorted(p.name for p in Path("out/s.run/samples").iterdir()) == [f"{n:09d}.png" for n in (0, 16, 32, 40)]
    student = load_pipeline("out/s")
    assert type(student.scheduler) is OneStepScheduler and student.scheduler.config.generator_timestep == 440

    few = ["--num-samples", 4, "--batch-size", 2]
    assert run("collect", "--model", "out/s", "--output", "store", *few) == 0
    recorded = ptq4dm.CalibrationStore.load("store").recorded()
    assert set(recorded.timestep.tolist()) == {440}
    assert run("collect", "--model", "out/s", "--output", "grid", "--collector", "solver", *few) == 0
    assert run("quantize", "--model", "out/s", "--output", "q", *few) == 0
    assert run("quantize", "--model", "out/s", "--output", "q2", "--calibration", "store") == 0
    codes = [next(Path(q).rglob("*.safetensors")).read_bytes() for q in ("q", "q2")]
    assert codes[0] == codes[1]
    assert run("generate", "--model", "q", "--num-images", 3, "--output", "i") == 0
    assert len(list(Path("i").iterdir())) == 3
    capsys.readouterr()
    small = ["--num-images", 4, "--num-paired", 2, "--num-heldout", 2, "--output", "e"]
    assert run("evaluate", "--model", "q", *small) == 0
    report = json.loads(Path("e/report.json").read_text())
    assert report["num_inference_steps"] == 1 and report["sampler"]["class"] == "OneStepScheduler"
    assert report["paired"]["psnr_db"] > 20 and report["epsilon_error"]["rows"] == 2
    assert "q against out/s, OneStepScheduler" in capsys.readouterr().out


def test_a_student_takes_one_step_and_no_other_sampler(capsys):
    TEACHERS["unet"]().save_pretrained("teacher")
    assert run("distill", "--model", "./teacher", "--output", "s", *SHORT, "--num-fid", 0, "--no-backtracking") == 0
    assert "degradation" not in {line["stage"] for line in log("s.run")}
    wrong = [
        (["generate", "--steps", 2], "ask for --num-inference-steps 1 (--steps 1), not 2"),
        (["quantize", "--calibration-steps", 20], "ask for num_inference_steps=1"),
        (["evaluate", "--sampler", "deis"], "takes no sampler but its own, so not 'deis'"),
        (["distill"], "a one-step student already"),
    ]
    for arguments, message in wrong:
        capsys.readouterr()
        assert run(*arguments, "--model", "./s") == 2
        assert message in capsys.readouterr().err
    assert run("generate", "--model", "./s", "--steps", 1, "--num-images", 2, "--output", "i") == 0


def test_the_embedded_student_is_quantized_and_sampled_but_not_distilled(capsys):
    name = "unet-cifar10-onestep"
    assert run("distill", "--model", name, "--output", "s") == 2
    assert "this model is a one-step student already; distil its teacher" in capsys.readouterr().err
    assert not Path("s").exists() and not Path("s.run").exists()
    assert run("quantize", "--model", name, "--num-samples", 2, "--batch-size", 2, "--objective", "max") == 0
    assert run("generate", "--num-images", 2) == 0  # finds what quantize made
    assert run("generate", "--model", name, "--num-images", 2, "--output", "full") == 0
    full, quantized = (load_images(sorted(Path(f).iterdir())).float() for f in ("full", "out/images"))
    assert ((quantized - full) / 255).square().mean() < 10**-2.5  # 25 dB
    assert read_metadata("full/000001.png")["num_inference_steps"] == 1


def test_an_interrupted_distillation_resumes(monkeypatch, capsys):
    TEACHERS["unet"]().save_pretrained("teacher")
    command = ["distill", "--model", "./teacher", *SHORT, "--num-fid", 0, "--output"]
    assert run(*command, "straight") == 0
    from ptq4dm.samplers.distillation.run import Run

    show, seen = Run.show, []

    def interrupt(self):
        seen.append(1)
        if len(seen) == 3:
            raise KeyboardInterrupt
        show(self)

    with monkeypatch.context() as patch:
        patch.setattr(Run, "show", interrupt)
        assert run(*command, "parts") == 130
    assert "interrupted; the same command with --resume goes on where it stopped" in capsys.readouterr().err
    assert not Path("parts").exists()
    assert run(*command, "parts", "--resume") == 0
    one, two = (load_file(next(Path(name).rglob("*.safetensors"))) for name in ("straight", "parts"))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_a_call_that_is_out_of_time_says_so(capsys):
    TEACHERS["unet"]().save_pretrained("teacher")
    command = ["distill", "--model", "./teacher", *SHORT, "--num-fid", 0, "--output", "s"]
    assert run(*command, "--minutes", 1e-9) == 0
    assert "one-step student after 0 of 40 images (--resume goes on): s\n" in capsys.readouterr().out
    assert run(*command, "--resume") == 0
    assert "one-step student after 40 of 40 images: s\n" in capsys.readouterr().out


def test_bfloat16_and_options_reach_the_run(monkeypatch):
    TEACHERS["unet"]().save_pretrained("teacher")
    given = {}

    def record(pipe, config, folder, resume):
        given.update(config=config, folder=folder, resume=resume)
        raise KeyboardInterrupt

    monkeypatch.setattr("ptq4dm.samplers.distillation.disback.distill", record)
    Path("s.run").mkdir()
    options = ["--dtype", "bfloat16", "--minutes", 2, "--fake-lr", 0.5, "--compile", "--seed", 3, "--no-backtracking"]
    assert run("distill", "--model", "./teacher", "--output", "s", "--resume", *options) == 130
    expected = DisBackConfig(precision="bf16", minutes=2.0, fake_lr=0.5, compile=True, seed=3, backtracking=False)
    assert given == {"config": expected, "folder": Path("s.run"), "resume": True}


def test_the_help_tells_the_defaults_of_the_config(capsys):
    with pytest.raises(SystemExit):
        build_parser().parse_args(["distill", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    said = dict(re.findall(r"--([a-z-]+) [A-Z_]+ (?:(?!--)[^()])*\((\d[\d.e-]*)\)", text))
    defaults = {f.name.replace("_", "-"): f.default for f in fields(DisBackConfig)}
    assert len(said) >= 12 and all(float(value) == defaults[name] for name, value in said.items())
    assert STEPS == 50

"""`ptq4dm evaluate`: two different models, and flags that would change nothing, are refused before any work."""

from pathlib import Path

import pytest

from ptq4dm.cli import evaluate
from ptq4dm.cli.main import main

UNET, DIT, FLOW, STUDENT = "unet-cifar10", "dit-cifar10", "flow-dit-cifar10", "unet-cifar10-onestep"
LEFT_OUT = "--num-images 4 --num-paired 0 --num-heldout 0"
AS_THEY_ARE = "the images of a folder are measured as they are, so that "
NO_INCEPTION = "metric feature-fid does not use Inception, so that --"


@pytest.fixture
def refused(tmp_path, monkeypatch, capsys):
    """refused("--images pics ..."): the one sentence that a command ends with, before it samples or writes."""
    monkeypatch.chdir(tmp_path)
    for name in ("evaluate", "evaluate_images", "write_reference"):
        monkeypatch.setattr(evaluate, name, lambda *args, **kw: pytest.fail("the work was begun"))

    def said(line, verb="evaluate"):
        assert main([verb, *line.split()]) == 2
        out, err = capsys.readouterr()
        assert out == "" and err.count("\n") == 1 and not list(tmp_path.iterdir())
        return err.strip().removeprefix(f"ptq4dm {verb}: ")

    return said


@pytest.mark.parametrize(
    ("model", "original", "says"),
    [
        (DIT, UNET, f"{DIT} is a PixelDiTPipeline and {UNET} a DDPMPipeline: different models cannot be compared."),
        (FLOW, DIT, f"{FLOW} is another model than {DIT}: their configurations differ in "),
        (STUDENT, UNET, f"{STUDENT} takes 1 and no other, and {UNET} any number of steps; they cannot be compared."),
    ],
)
def test_different_models_are_refused_as_compare_does(model, original, says, refused):
    few = "--metric none --num-paired 2 --num-heldout 2 --output e"
    assert refused(f"--device cpu --model {model} --full-precision {original} {few}").startswith(says)


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("--images pics --reference x.npz --num-paired 4", f"{AS_THEY_ARE}--num-paired would change nothing; leave"),
        (
            "--images pics --num-heldout 5 --steps 7 --seed 3 --batch-size 4 --num-images 5 --sampler ipndm",
            f"{AS_THEY_ARE}--num-inference-steps, --seed, --num-images, --num-heldout, --sampler would change",
        ),
        (
            "--images pics --clip c --output e --dtype float16",
            f"{AS_THEY_ARE}--dtype, --clip, --output would change nothing; leave them out.",
        ),
        ("--images pics --resize clean", f"{NO_INCEPTION}resize would change nothing; leave it out."),
        ("--images pics --metric none", "metric none measures nothing of a folder of images; choose another."),
        (
            "--images pics --write-reference s.npz --reference r.npz",
            "the statistics that are written are of --images alone, so that --reference would change nothing;",
        ),
        (f"--inception-weights nofile {LEFT_OUT}", f"{NO_INCEPTION}inception-weights would change nothing; leave it"),
        (f"{LEFT_OUT} --resize clean", f"{NO_INCEPTION}resize would change nothing; leave it out."),
        (
            "--metric none --full-precision m --reference r.npz",
            "metric none measures no Frechet distance, so that --reference would change nothing; leave it out.",
        ),
        (
            "--metric none --full-precision m --num-images 4",
            "metric none measures no Frechet distance, so that --num-images would change nothing; leave it out.",
        ),
        (
            f"--model {UNET} --num-paired 4 --num-heldout 4",
            f"{UNET} is compared with no other model (--full-precision), so that --num-paired, --num-heldout would",
        ),
        (
            f"--model {UNET} --clip c --num-heldout 4",
            f"{UNET} is compared with no other model (--full-precision), so",
        ),
    ],
)
def test_flags_that_would_change_nothing_are_refused(line, says, refused):
    assert refused(line).startswith(says)


def test_compare_refuses_them_too(refused):
    told = (
        "metric none does not use Inception, so that --inception-weights, --resize would change nothing; leave them"
    )
    assert refused("a b --inception-weights nofile --resize clean", "compare").startswith(told)
    told = "metric none measures no Frechet distance, so that --reference would change nothing; leave it out."
    assert refused("a b --reference r.npz", "compare") == told


def test_flags_of_figures_that_are_left_out_may_be_given(monkeypatch, capsys, tmp_path):
    """0 leaves a figure out; and what the metric or another network looks at changes something."""
    monkeypatch.chdir(tmp_path)

    def loaded(*args):
        raise FileNotFoundError(2, "reached", "the model")

    monkeypatch.setattr(evaluate, "load", loaded)
    for line in (
        f"--model {UNET} {LEFT_OUT}",
        f"--model {UNET} --metric fid --resize clean --inception-weights w",
        f"--model {UNET} --clip c --num-paired 4",
        f"--model {UNET} --metric none --full-precision {UNET} --num-images 0 --num-heldout 2",
    ):
        assert main(["evaluate", *line.split()]) == 2
        assert "reached: the model" in capsys.readouterr().err
    assert not list(Path().iterdir())

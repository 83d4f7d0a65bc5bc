"""Wrong input: one plain line, exit status 2, nothing half-written. TRIED lists what is typed, and the answer.

These need damaged models or long work, and are in the tests of their rooms:

    info --model broken (truncated weights)    .../diffusion_pytorch_model.safetensors is not a whole safetensors file
    quantize --calibration (another model's)   the calibration store was collected from another model ...
    collect --model with-nan-weights           2 of 2 images hold NaN or infinity (first seed 0): ...
    a layer that alone sees NaN                the layer and timestep bin by name
    distill --model with-a-flow-scheduler      DDPMPipeline does not scale its input as a flow's student needs it.
    a distillation that comes to NaN           ... the checkpoint of iteration 12 is kept: resume it with lower ...
"""

from contextlib import suppress
from pathlib import Path

import pytest
import torch

from ptq4dm.cli.main import main

no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to tune on")
TRIED = [
    ("quantize --model unet-cifar11", "'unet-cifar11' is neither an embedded model ("),
    ("quantize --dtype int4", "argument --dtype: invalid choice: 'int4' (choose from"),
    ("quantize --objective best", "objective 'best' is unknown; choose from"),
    ("quantize --modules-to-not-convert nowhere", "'nowhere' in modules_to_not_convert names no layer"),
    ("generate --num-images 0", "0 images asked for; --num-images must be at least 1."),
    ("generate --steps 5000", "5000 steps are more than the 1000 that the model was trained with."),
    ("generate --model unet-cifar10-onestep --steps 2", "this model was distilled to one step;"),
    ("collect --mu 0.2", "the collector uniform has no normal law, as ndtc has, so that --mu would change nothing;"),
    (
        "collect --prompt a --prompt-embeds FILE",
        "--prompt and --prompt-embeds are two ways to give prompts; give one.",
    ),
    ("collect --prompt-embeds none", "there is no file none of prompts' embeddings."),
    ("collect --prompt-embeds FILE", "FILE cannot be read ("),
    ("collect --num-frames 0", "--num-frames must be from 1 to 1000000; got 0."),
    ("collect --height 32", "DDPMPipeline takes no argument 'height'."),
    ("generate --width 32", "DDPMPipeline takes no argument 'width'."),
    (
        "quantize --method rtn --activations dynamic --collector solver --guidance-scale 2",
        "this RTNConfig looks at no calibration, so that --collector, --guidance-scale would change nothing",
    ),
    (
        "quantize --method rtn --activations dynamic --seed 1",
        "this RTNConfig looks at no calibration, so that --seed",
    ),
    ("quantize --calibration FILE --prompt a", "the calls in FILE were made already, so that --prompt would change"),
    ("evaluate --images FILE --steps 3", "the images of a folder are measured as they are, so that --num-inference-"),
    ("personalize --images FILE --class-row 0", "unet-cifar10 has neither text nor classes to personalize; give"),
    ("train --images . --num-images 0", "--num-images must be at least 1; got 0."),
    ("train --images . --dtype float16", "float16 overflows where gradients are; give --dtype bfloat16 or float32."),
    ("train --images . --weight-bits 9", "--weight-bits must be a whole number from 2 to 8; got 9."),
    ("train --images . --bits 16 --served", "--bits 16 trains in floats and leaves no place for --served."),
    (
        "train --images . --bits 16 --weight-bits 4",
        "--bits 16 trains in floats and leaves no place for --weight-bits",
    ),
    ("personalize --images . --first-time 0.5 --last-time 0.4", "--first-time must be before --last-time; got 0.5"),
    ("collect --num-samples 0", "--num-samples must be at least 1; got 0."),
    ("collect --output FILE/x", "cannot make the folder FILE/x: Not a directory."),
    pytest.param("bench tune", "kernels are tuned on the GPU they run on; PyTorch finds none here.", marks=no_gpu),
    ("evaluate --images=", "argument --images: expected a name; got ''"),
    ("generate --output=", "argument --output: expected a name; got ''"),
    ("info --model= --json", "argument --model: expected a name; got ''"),
    ("info --modle x --wings", "unrecognized arguments: --modle x --wings; did you mean '--model'?"),
    ("evaluate --num-heldout=--", "argument --num-heldout: expected an argument; got '--'"),
    ("collect --num-samples", "argument --num-samples: expected one argument"),
    ("generate --seed 1.5 --quiet", "argument --seed: invalid int value: '1.5'"),
    ("bench tune --shapes 16,64,96", "'16,64,96': the kernels take inputs in groups of 64, and K = 96"),
]


@pytest.mark.parametrize("tried, answer", TRIED)
def test_the_answer_is_one_line(tried, answer, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("FILE").write_text("in the way")
    verb, *_ = words = tried.split()
    if verb == "bench":  # as the parser, which has a subject for it
        verb = " ".join(words[:2])
    try:
        status = main(words)
    except SystemExit as leaving:
        status = leaving.code
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("ptq4dm ")]
    assert status == 2
    assert len(lines) == 1 and lines[0].startswith(f"ptq4dm {verb}: {answer}")
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [tmp_path / "FILE"]


@pytest.mark.parametrize(
    "tried, answer",
    [
        ("", "ptq4dm: the following arguments are required: command (choose from collect, quantize,"),
        ("quantise", "ptq4dm: argument command: invalid choice: 'quantise' (choose from"),
        ("--jsn info", "ptq4dm: unrecognized arguments: --jsn; did you mean '--json'?"),
        (
            "bench",
            "ptq4dm bench: the following arguments are required: subject (choose from samplers, tune, hardware)",
        ),
        (
            "bench tunes",
            "ptq4dm bench: argument subject: invalid choice: 'tunes' (choose from samplers, tune, hardware); did you",
        ),
        ("completion csh", "ptq4dm completion: argument shell: invalid choice: 'csh' (choose from bash, zsh, fish)"),
    ],
)
def test_no_verb_or_a_wrong_one(tried, answer, capsys):
    with pytest.raises(SystemExit) as leaving:
        main(tried.split())
    out, err = capsys.readouterr()
    assert leaving.value.code == 2 and out == "" and err.startswith(answer) and err.count("\n") == 1
    near = {"quantise": "'quantize'?", "bench tunes": "'tune'?"}.get(tried, "")
    assert err.rstrip("\n").endswith(near)


def test_a_very_long_value_is_told_in_short(capsys):
    long = "9" * 5000
    for word in (f"--quiet={long}", f"--dtype={long}", f"--device={long}", long):
        with suppress(SystemExit):
            main(["info", word])
        err = capsys.readouterr().err
        assert len(err) < 600 and "9" * 190 in err

"""`ptq4dm personalize`, and what `generate` does with the embedding."""

import json

import pytest
import torch
from accelerate.state import AcceleratorState
from diffusers.utils import logging

import personal
from ptq4dm.cli.main import main
from ptq4dm.pipelines.images import load_images, read_metadata, save_png

pytestmark = pytest.mark.usefixtures("one_thread")
logging.set_verbosity_error()
SHORT = ["--steps", "4", "--batch-size", "2", "--perturbations", "2", "--log-every", "2", "--learning-rate", "0.2"]


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for k, picture in enumerate(personal.pictures(3, 16, 16)):
        (tmp_path / "dog").mkdir(exist_ok=True)
        save_png(picture, tmp_path / "dog" / f"{k}.png", {})
    yield tmp_path
    AcceleratorState._reset_state()


def run(*arguments):
    return main([str(a) for a in arguments])


def generate(model, output, *more):
    assert run("generate", "--model", model, "--num-images", 2, "--steps", 2, "--output", output, *more) == 0
    return load_images([f"{output}/{k:06d}.png" for k in range(2)])


def test_a_class_row_is_learned_and_generated(here, capsys):
    personal.classes().save_pretrained("dit")
    command = ["personalize", "--model", "dit", "--images", "dog", "--class-row", "3", "--output", "row", *SHORT]
    assert run(*command, "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert told["loss"] < told["start_loss"] and [line["step"] for line in told["log"]] == [0, 2, 4]
    assert run(*command, "--resume", "--steps", 6) == 0
    assert "after 6 steps" in capsys.readouterr().out
    labels = ["--class-labels", 3, 4]
    old, new = generate("dit", "old", *labels), generate("dit", "new", *labels, "--embedding", "row")
    assert not torch.equal(old[0], new[0]) and torch.equal(old[1], new[1])
    assert "embedding" in read_metadata("new/000000.png") and "embedding" not in read_metadata("old/000000.png")
    assert (
        run("generate", "--model", "dit", "--num-images", 2, "--steps", 2, "--output", "new", *map(str, labels)) == 2
    )
    assert "other settings" in capsys.readouterr().err  # pictures of one embedding and none are not mixed


def test_a_class_row_that_no_image_is_of_is_told(here, capsys):
    personal.classes().save_pretrained("dit")
    assert run("personalize", "--model", "dit", "--images", "dog", "--class-row", 3, "--output", "row", *SHORT) == 0
    of_two_and_three = ["--num-images", 2, "--steps", 1, "--seed", 2, "--output", "all"]
    assert run("generate", "--model", "dit", "--embedding", "row", *of_two_and_three) == 0
    for more in (["--class-labels", 1, 2], []):
        capsys.readouterr()
        command = ["generate", "--model", "dit", "--num-images", 2, "--embedding", "row", "--output", "idle", *more]
        assert run(*command) == 2
        assert "none of these images is of class 3, so that row would change nothing" in capsys.readouterr().err


def test_a_token_is_learned_and_generated(here, capsys):
    personal.text().save_pretrained("words")
    what = ["--token", "<dog>", "--init", "dog", "--prompts", "a photo of {}"]
    assert run("personalize", "--model", "words", "--images", "dog", *what, "--output", "token", *SHORT) == 0
    assert "learned_embeds.safetensors" in capsys.readouterr().out
    prompt = ["--prompt", "a photo of <dog>"]
    learned = generate("words", "new", *prompt, "--embedding", "token/learned_embeds.safetensors")
    assert not torch.equal(learned, generate("words", "old", "--prompt", "a photo of dog"))
    idle = ["generate", "--model", "words", "--prompt", "a photo of dog", "--embedding", "token", "--output", "idle"]
    assert run(*idle) == 2
    assert "no prompt has '<dog>' in it, so that token would change nothing" in capsys.readouterr().err


@pytest.mark.parametrize(
    "what, sentence",
    [
        ([], "give one"),
        (["--class-row", "11"], "there is no class 11 in this model; it has classes 0 to 9"),
        (["--token", "<dog>", "--init", "dog"], "has no text encoder"),
        (["--class-row", "1", "--images", "nowhere"], "is not a folder of images"),
        (["--class-row", "1", "--subspace", "all"], "invalid choice"),
        (["--class-row", "1", "--resume"], "no checkpoint"),
    ],
)
def test_wrong_input_is_one_line(what, sentence, here, capsys):
    personal.classes().save_pretrained("dit")
    try:
        status = run("personalize", "--model", "dit", "--images", "dog", *what, *SHORT)
    except SystemExit as ended:
        status = ended.code
    told = capsys.readouterr().err.strip()
    assert status == 2 and sentence in told and "\n" not in told


def test_an_embedding_that_is_not_there(here, capsys):
    personal.classes().save_pretrained("dit")
    assert run("generate", "--model", "dit", "--embedding", "nothing") == 2
    assert "there is no embedding at nothing" in capsys.readouterr().err

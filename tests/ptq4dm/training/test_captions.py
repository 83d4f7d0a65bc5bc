"""Models of text learn from pictures with captions: what the network is given, what is learned, what is refused."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

import models
import personal
import ptq4dm
from helpers import same
from ptq4dm import ShiftQuantConfig, UserError
from ptq4dm.files.log import read_lines
from ptq4dm.training import exhibition
from ptq4dm.training import run as run_module
from ptq4dm.training.captions import read_captions
from ptq4dm.training.pictures import read_pictures
from ptq4dm.training.prompted import Prompted

pytest.importorskip("transformers")
pytestmark = pytest.mark.usefixtures("one_thread", "new_accelerate")
SHORT = {
    "images": 16,
    "batch_size": 4,
    "log_every": 2,
    "evaluate_every": 8,
    "held_out": 1,
    "sample_steps": 0,
    "wide": False,
}
ONE_LEVEL = {
    "block_out_channels": (8,), "down_block_types": ("CrossAttnDownBlock2D",), "up_block_types": ("UpBlock2D",),
}  # fmt: skip
TEXTS = ("a photo of a dog", "a cat", "", "a dog", "a cat")


@pytest.fixture
def folder(tmp_path):
    """Ten pictures, the captions in another order, a blank line at the end."""
    folder, random, lines = tmp_path / "pictures", np.random.default_rng(0), []
    (folder / "more").mkdir(parents=True)
    for i in range(10):
        name = f"more/{i}.png" if i % 2 else f"{i}.png"
        Image.fromarray(random.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(folder / name)
        lines.append(json.dumps({"file_name": name, "text": TEXTS[i % 5], "other": i}))
    (folder / "metadata.jsonl").write_text("\n".join(reversed(lines)) + "\n\n")
    return folder


def text():
    """Pictures of 16x16, latents of [4, 8, 8]."""
    pipe = personal.text()
    pipe.unet = models.conditional_unet(cross_attention_dim=32, **ONE_LEVEL)
    return pipe


def text_xl():
    pipe = personal.text_xl()
    pipe.unet = models.added_unet(cross_attention_dim=48, projection_class_embeddings_input_dim=40, **ONE_LEVEL)
    return pipe


def weights(pipe):
    return {name: one.clone() for name, one in pipe.unet.state_dict().items()}


def test_pictures_have_their_captions(folder):
    found = read_pictures(folder, (16, 16), 3, None, captions=True)
    assert found.texts == ["", "a cat", "a dog", "a photo of a dog"]
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.png"))
    numbers = [int(name.removeprefix("more/").removesuffix(".png")) for name in names]
    assert [found.texts[label] for label in found.labels] == [TEXTS[number % 5] for number in numbers]
    assert found.part(torch.tensor([1])).texts == found.texts


@pytest.mark.parametrize("make", [personal.text, personal.text_xl])
def test_the_network_is_given_what_its_pipeline_gives_it(make):
    pipe = make()
    prompts = ["", "a dog", "a photo of a cat"] * 7  # several calls
    prompted = Prompted(pipe, prompts, (4, 8, 8))
    given = prompted(torch.tensor([2, 1, 17]))
    kinds = {"num_images_per_prompt": 1, "do_classifier_free_guidance": False, "device": "cpu"}
    encoded = pipe.encode_prompt(prompt=["a photo of a cat", "a dog", "a photo of a cat"], **kinds)
    torch.testing.assert_close(given["encoder_hidden_states"], encoded[0])
    if make is personal.text_xl:
        torch.testing.assert_close(given["added_cond_kwargs"]["text_embeds"], encoded[2])
        assert given["added_cond_kwargs"]["time_ids"].shape == (3, 6)
    x, t = torch.randn(3, 4, 8, 8), torch.tensor([1, 500, 900])
    with torch.no_grad():
        assert pipe.unet(x, t, return_dict=False, **given)[0].shape == x.shape
    with pytest.raises(UserError, match=r"is called with \[16, 4, 8, 8\] for 16 images \[4, 9, 9\]"):
        Prompted(pipe, prompts, (4, 9, 9))


@pytest.mark.parametrize("make", [text, text_xl])
def test_a_run_and_what_it_leaves(make, folder, tmp_path, monkeypatch):
    monkeypatch.setattr(exhibition, "GRID", 8)
    pipe = make()
    before = weights(pipe)
    trained = ptq4dm.train(
        pipe, folder, ShiftQuantConfig(**SHORT | {"sample_steps": 1, "wide": make is text}), tmp_path / "run"
    )
    assert same(weights(pipe), before) and not same(weights(trained), before)
    assert type(trained) is type(pipe) and trained.text_encoder is pipe.text_encoder
    lines = read_lines(tmp_path / "run" / "log.jsonl")
    assert all(0 < line["loss"] < 5 for line in lines if line["stage"] == "training")
    assert lines[0]["layers"] > 20 and (tmp_path / "run" / "samples" / "000000016.png").exists()


def test_a_resumed_run_gives_the_same_bits(folder, tmp_path, monkeypatch):
    config = ShiftQuantConfig(**SHORT)
    whole = ptq4dm.train(text(), folder, config, tmp_path / "whole")
    batch = run_module.Run.batch

    def interrupted(run, step):
        if step == 3:
            raise KeyboardInterrupt
        return batch(run, step)

    monkeypatch.setattr(run_module.Run, "batch", interrupted)
    with pytest.raises(KeyboardInterrupt):
        ptq4dm.train(text(), folder, config, tmp_path / "parts")
    monkeypatch.setattr(run_module.Run, "batch", batch)
    lines = (folder / "metadata.jsonl").read_text()
    (folder / "metadata.jsonl").write_text(lines.replace('"a cat"', '"a close-up"'))
    with pytest.raises(UserError, match=r"of a run with other settings \(captions\)"):
        ptq4dm.train(text(), folder, config, tmp_path / "parts", resume=True)
    (folder / "metadata.jsonl").write_text(lines)
    resumed = ptq4dm.train(text(), folder, config, tmp_path / "parts", resume=True)
    assert same(weights(whole), weights(resumed))


def test_captions_are_dropped_as_often_as_asked(folder, tmp_path, monkeypatch):
    seen = []
    loss = run_module.Task.loss

    def look(task, net, batch):
        seen.append(batch.labels)
        return loss(task, net, batch)

    monkeypatch.setattr(run_module.Task, "loss", look)
    for share in (0.0, 1.0):
        seen.clear()
        config = ShiftQuantConfig(**SHORT | {"held_out": 0}, drop_captions=share)
        ptq4dm.train(text(), folder, config, tmp_path / f"run {share}")
        empty = torch.cat(seen) == 0
        assert bool(empty.all()) == (share == 1.0) and not (share == 0.0 and empty.float().mean() > 0.5)
    assert "drop_captions" not in ShiftQuantConfig().identity()
    assert ShiftQuantConfig(drop_captions=0.2).identity()["drop_captions"] == 0.2


def test_captions_that_are_refused(folder):
    path = folder / "metadata.jsonl"
    lines, pictures = path.read_text().splitlines(), sorted(folder.rglob("*.png"))
    wrong = {
        "names '4.png' twice": [*lines, lines[5]],
        "has no caption of '4.png' \\(1 pictures": [line for line in lines if '"4.png"' not in line],
        "names '99.png', and there is no such picture": [*lines, '{"file_name": "99.png", "text": "a dog"}'],
        "cannot be read \\(no 'text' in it\\)": ['{"file_name": "4.png"}'],
        "cannot be read \\(its 'text' is 3\\)": ['{"file_name": "4.png", "text": 3}'],
        "cannot be read": ["{"],
    }
    for says, found in wrong.items():
        path.write_text("\n".join(found))
        with pytest.raises(UserError, match=says):
            read_captions(folder, pictures)
    path.unlink()
    with pytest.raises(UserError, match=r"a model of text learns from captions, and .* has no metadata.jsonl"):
        read_captions(folder, pictures)

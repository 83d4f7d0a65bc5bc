"""Personalization as a user calls it: end to end, resumed to the bit, without gradients, with wrong input refused."""

import hashlib
import json
from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler, DDPMPipeline, DiTPipeline, EDMEulerScheduler
from diffusers.utils import logging
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import personal
import ptq4dm
from live_bytes import most_live_bytes
from models import dit, unet
from ptq4dm.errors import DamagedFile, UserError
from ptq4dm.pipelines.images import save_png
from ptq4dm.training.personalization import run as run_module
from ptq4dm.training.personalization.config import PersonalizeConfig
from ptq4dm.training.personalization.problem import ready
from ptq4dm.training.personalization.run import CHECKPOINT, LOG
from ptq4dm.training.personalization.targets import class_target
from ptq4dm.training.personalization.zeroth_order import Tuned

pytestmark = pytest.mark.usefixtures("one_thread")
logging.set_verbosity_error()
SHORT = dict(steps=6, batch_size=2, perturbations=2, log_every=2, checkpoint_every=2, buffer=2, variance=0.2)


def bytes_of(pipe):
    digest = hashlib.sha256()
    for name in ("transformer", "unet", "text_encoder", "vae"):
        network = getattr(pipe, name, None)
        for key, tensor in sorted(network.state_dict().items()) if network is not None else ():
            digest.update(
                f"{name}.{key}".encode() + tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()
            )
    return digest.hexdigest()


def learn(folder, pipe=None, resume=False, **settings):
    pipe = pipe or personal.classes()
    config = PersonalizeConfig(**SHORT | settings)
    return ptq4dm.personalize(pipe, personal.pictures(), config, folder, class_row=3, resume=resume)


def test_a_class_row_is_learned_written_and_used(tmp_path):
    pipe = personal.classes()
    before = bytes_of(pipe)
    done = learn(tmp_path / "out", pipe, steps=30, learning_rate=0.05)
    assert bytes_of(pipe) == before
    assert done.path.name == "class_row.safetensors" and done.log[-1]["loss"] < done.log[0]["loss"]
    lines = [json.loads(line) for line in (tmp_path / "out" / LOG).read_text().splitlines()]
    assert lines == done.log and [line["step"] for line in lines] == list(range(0, 31, 2))
    rows = load_file(done.path)
    assert {tuple(row.shape) for row in rows.values()} == {(16,)} and len(rows) == 2
    conditioning = {"class_labels": [3, 4]}
    old = ptq4dm.sample(pipe, [0, 1], num_inference_steps=2, conditioning=conditioning)
    assert ptq4dm.load_embedding(pipe, done.path) == "3"
    new = ptq4dm.sample(pipe, [0, 1], num_inference_steps=2, conditioning=conditioning)
    assert not torch.equal(new[0], old[0]) and torch.equal(new[1], old[1])
    for name, row in rows.items():
        assert torch.equal(pipe.transformer.get_parameter(f"{name}.weight")[3].detach(), row)


def test_equal_runs_write_equal_files(tmp_path):
    for name in ("one", "two"):
        learn(tmp_path / name, personal.classes())
    files = [{path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in ("one", "two")]
    assert files[0] == files[1] and {"checkpoint.safetensors", "log.jsonl"} < files[0].keys()


def test_the_loss_told_is_of_the_saved_embedding_on_the_fixed_rows(tmp_path):
    """The released code tells the loss of the last perturbation, on whatever the step drew."""
    pipe = personal.classes()
    told = []
    original = run_module.Problem.fixed_loss

    def watch(problem, u, draw):
        told.append((problem, u, draw))
        return original(problem, u, draw)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_module.Problem, "fixed_loss", watch)
        done = learn(tmp_path / "out", pipe)
    problem, u, draw = told[-1]
    assert all(torch.equal(found[2].noise, draw.noise) for found in told)  # the same rows each time
    saved = problem.target.tables.unit([load_file(done.path)[table.name] for table in problem.target.tables.tables])
    torch.testing.assert_close(saved, u)
    with ready(pipe):
        loss = problem.losses(u.expand(len(draw.t), -1), draw.images, draw.t, draw.noise).mean()
    assert done.log[-1]["loss"] == pytest.approx(float(loss), rel=1e-6)


def test_a_token_is_learned_read_by_diffusers_and_used(tmp_path):
    pipe = personal.text()
    before, words = bytes_of(pipe), len(pipe.tokenizer)
    config = PersonalizeConfig(**SHORT | {"steps": 20, "learning_rate": 0.05})
    done = ptq4dm.personalize(
        pipe, personal.pictures(3, 20, 24), config, tmp_path, token="<dog>", init="dog", prompts=["a photo of {}"]
    )
    assert bytes_of(pipe) == before and len(pipe.tokenizer) == words
    assert done.log[-1]["loss"] < done.log[0]["loss"]
    row = load_file(done.path)["<dog>"]
    assert row.shape == (32,) and row.dtype == torch.float32 and done.path.stat().st_size < 1000
    theirs = personal.text()
    theirs.load_textual_inversion(str(tmp_path))  # the folder: its file has diffusers' own name
    assert ptq4dm.load_embedding(pipe, tmp_path) == "<dog>"
    found = {}
    for name, one in (("ours", pipe), ("theirs", theirs)):
        index = one.tokenizer.convert_tokens_to_ids("<dog>")
        torch.testing.assert_close(one.text_encoder.get_input_embeddings().weight[index].detach(), row)
        for word in ("<dog>", "dog"):
            conditioning = {"prompt": [f"a photo of {word}"]}
            found[name, word] = ptq4dm.sample(one, [0], num_inference_steps=2, conditioning=conditioning)
    torch.testing.assert_close(found["ours", "<dog>"], found["theirs", "<dog>"])
    assert not torch.equal(found["ours", "<dog>"], found["ours", "dog"])


def test_two_text_encoders_have_a_row_each(tmp_path):
    pipe = personal.text_xl()
    config = PersonalizeConfig(**SHORT | {"steps": 10, "learning_rate": 0.05})
    done = ptq4dm.personalize(pipe, personal.pictures(3, 16, 16), config, tmp_path, token="<dog>", init="dog")
    assert done.log[-1]["loss"] < done.log[0]["loss"]
    rows = load_file(done.path)
    assert {name: tuple(row.shape) for name, row in rows.items()} == {"clip_l": (32,), "clip_g": (16,)}
    ptq4dm.load_embedding(pipe, done.path)
    for name, encoder, words in (
        ("clip_l", pipe.text_encoder, pipe.tokenizer),
        ("clip_g", pipe.text_encoder_2, pipe.tokenizer_2),
    ):
        index = words.convert_tokens_to_ids("<dog>")
        torch.testing.assert_close(encoder.get_input_embeddings().weight[index].detach(), rows[name])
    conditioning = {"prompt": ["a photo of <dog>"]}
    assert ptq4dm.sample(pipe, [0], num_inference_steps=1, conditioning=conditioning).shape == (1, 3, 16, 16)


def test_a_class_of_a_latent_model_is_learned(tmp_path):
    """diffusers' own DiTPipeline: latents, a learned variance, a null class."""
    pipe = DiTPipeline(dit(), personal.text().vae, DDIMScheduler())
    config = PersonalizeConfig(**SHORT | {"steps": 10, "learning_rate": 0.05})
    done = ptq4dm.personalize(pipe, personal.pictures(2, 16, 16), config, tmp_path, class_row=3)
    assert done.log[-1]["loss"] < done.log[0]["loss"] and ptq4dm.load_embedding(pipe, tmp_path) == "3"


def test_a_dit_in_8_bits(tmp_path):
    pipe = personal.classes()
    ptq4dm.quantize(pipe, ptq4dm.RTNConfig(activations="dynamic"))
    before = bytes_of(pipe)
    config = PersonalizeConfig(steps=3, batch_size=2, perturbations=3, learning_rate=0.1, average=0)
    done = ptq4dm.personalize(pipe, personal.pictures(2), config, tmp_path, class_row=7)
    assert bytes_of(pipe) == before
    assert done.log[-1]["loss"] < done.log[0]["loss"]
    assert sum(row.numel() for row in load_file(done.path).values()) == 2 * 16


# ------------------------------------------------------------------------------------------------------ resuming


def test_a_run_that_was_stopped_goes_on_to_the_same_bits(tmp_path, monkeypatch):
    whole = learn(tmp_path / "whole")
    taken = []

    def stopped(problem, state):
        taken.append(state.step)
        if state.step == 5:
            raise KeyboardInterrupt
        return original(problem, state)

    original = run_module.step_once
    monkeypatch.setattr(run_module, "step_once", stopped)
    torch.manual_seed(5)
    with pytest.raises(KeyboardInterrupt):
        learn(tmp_path / "half")
    monkeypatch.setattr(run_module, "step_once", original)
    torch.manual_seed(6)
    parts = learn(tmp_path / "half", resume=True)
    assert taken[-1] == 5 and parts.path.read_bytes() == whole.path.read_bytes()
    assert [line["loss"] for line in parts.log] == [line["loss"] for line in whole.log]


def test_more_steps_go_on_from_a_run_that_ended(tmp_path):
    learn(tmp_path / "out", steps=4)
    more = learn(tmp_path / "out", resume=True, steps=8)
    assert more.path.read_bytes() == learn(tmp_path / "whole", steps=8).path.read_bytes()
    again = learn(tmp_path / "out", resume=True, steps=8)
    assert again.log[-1]["step"] == 8


def test_a_run_killed_before_its_first_checkpoint_starts_anew(tmp_path):
    (tmp_path / "out").mkdir()
    assert learn(tmp_path / "out", resume=True).path.read_bytes() == learn(tmp_path / "new").path.read_bytes()


def test_a_folder_in_use_and_a_run_of_other_settings_are_refused(tmp_path):
    with pytest.raises(UserError, match="leave --resume out"):
        learn(tmp_path / "none", resume=True)
    learn(tmp_path / "out")
    with pytest.raises(UserError, match="is not empty"):
        learn(tmp_path / "out")
    with pytest.raises(UserError, match="other settings \\(seed\\)"):
        learn(tmp_path / "out", resume=True, seed=1)
    with pytest.raises(UserError, match="other settings \\(model\\)"):
        learn(tmp_path / "out", personal.classes(seed=4), resume=True)
    content = bytearray((tmp_path / "out" / CHECKPOINT).read_bytes())
    content[-3] ^= 4
    (tmp_path / "out" / CHECKPOINT).write_bytes(content)
    with pytest.raises(DamagedFile):
        learn(tmp_path / "out", resume=True)


# -------------------------------------------------------------------------------------------- gradients and memory


class NoGraph(TorchDispatchMode):
    """Counts operations; none of them may have gradients enabled, or give a tensor that wants one."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        assert not torch.is_grad_enabled()
        result = function(*args, **(kwargs or {}))
        assert not any(isinstance(one, torch.Tensor) and one.grad_fn for one in tree_leaves(result))
        self.count += 1
        return result


@pytest.mark.parametrize("kind", ["class", "token"])
def test_no_graph_is_made_even_where_weights_want_gradients(kind, tmp_path, monkeypatch):
    pipe = personal.classes() if kind == "class" else personal.text()
    what = {"class_row": 1} if kind == "class" else {"token": "<dog>", "init": "dog"}
    networks = [part for part in pipe.components.values() if isinstance(part, torch.nn.Module)]
    assert all(parameter.requires_grad for network in networks for parameter in network.parameters())
    monkeypatch.setattr(torch.autograd, "backward", None)
    original, counts = run_module.step_once, []

    def watched(problem, state):
        with NoGraph() as graph:
            original(problem, state)
        counts.append(graph.count)

    monkeypatch.setattr(run_module, "step_once", watched)
    with torch.enable_grad():
        ptq4dm.personalize(pipe, personal.pictures(), PersonalizeConfig(**SHORT), tmp_path, **what)
        assert torch.is_grad_enabled()
    assert len(counts) == 6 and min(counts) > 50
    assert all(parameter.grad is None for network in networks for parameter in network.parameters())


def test_a_step_takes_the_memory_of_sampling(tmp_path):
    """As many rows at once: nothing is kept for a gradient, and the perturbations weigh little beside activations."""
    from ptq4dm.training.personalization.pictures import learned_from
    from ptq4dm.training.personalization.problem import Problem
    from ptq4dm.training.schedule import schedule_of

    pipe = personal.classes(sample_size=16, num_attention_heads=4)
    ptq4dm.quantize(pipe, ptq4dm.RTNConfig(activations="dynamic"))
    pipe.set_progress_bar_config(disable=True)
    target = class_target(pipe, 3)
    config = PersonalizeConfig(batch_size=4, perturbations=3)
    problem = Problem(
        target, learned_from(pipe, list(personal.pictures(4, 16, 16))), schedule_of(pipe, "cpu"), config
    )
    state = Tuned.start(target.start)

    def sampling():
        pipe([3] * 16, num_inference_steps=2, output_type="pt")

    def step():
        with ready(pipe):
            run_module.step_once(problem, state)

    def step_in_parts():
        problem.config = PersonalizeConfig(batch_size=4, perturbations=3, forward_batch=4)
        step()

    sampling(), step()
    reference, found, parts = (most_live_bytes(work) for work in (sampling, step, step_in_parts))
    assert found < 1.1 * reference
    assert parts < 0.5 * reference


# ------------------------------------------------------------------------------------------------- wrong input


def refused(match, tmp_path, pipe, images=None, **what):
    def never(*args):
        raise AssertionError("work was begun")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_module, "step_once", never)
        with pytest.raises(UserError, match=match):
            images = personal.pictures() if images is None else images
            ptq4dm.personalize(pipe, images, PersonalizeConfig(**SHORT), tmp_path / "out", **what)
    assert not (tmp_path / "out").exists()


def test_wrong_input_is_one_sentence_before_any_work(tmp_path):
    dit, words, plain = personal.classes(), personal.text(), DDPMPipeline(unet(), personal.classes().scheduler)
    refused("give one", tmp_path, dit)
    refused("give one", tmp_path, dit, class_row=1, token="<dog>")
    refused("there is no class 10 in this model", tmp_path, dit, class_row=10)
    refused("there is no class -1 in this model", tmp_path, dit, class_row=-1)
    refused("has no text encoder", tmp_path, dit, token="<dog>", init="dog")
    refused("has no classes; give a token", tmp_path, words, class_row=1)
    refused("has no classes", tmp_path, plain, class_row=1)
    refused("has no text encoder", tmp_path, plain, token="<dog>", init="dog")
    refused("from 0 to 9; got 'dog'", tmp_path, dit, class_row=1, init="dog")
    refused("prompts belong to a token", tmp_path, dit, class_row=1, prompts=["a {}"])
    refused("give --init", tmp_path, words, token="<dog>")
    refused("'hotdog' to start at is 2 tokens", tmp_path, words, token="<dog>", init="hotdog")
    refused("'zebra' to start at is unknown", tmp_path, words, token="<dog>", init="zebra")
    refused("'cat' is known to this model", tmp_path, words, token="cat", init="dog")
    marked = personal.text()  # CLIP's tokenizer marks where words end: 'cat</w>' is a piece, and 'cat' is none
    vocabulary = marked.tokenizer.get_vocab
    marked.tokenizer.get_vocab = lambda: {f"{word}</w>": k for word, k in vocabulary().items()}
    refused("'cat' is known to this model", tmp_path, marked, token="cat", init="dog")
    refused("one word without spaces", tmp_path, words, token="my dog", init="dog")
    refused("once, in the place of the token", tmp_path, words, token="<dog>", init="dog", prompts=["a dog"])
    refused("at least one text", tmp_path, words, token="<dog>", init="dog", prompts=[])
    refused("found once", tmp_path, words, token="<dog>", init="dog", prompts=["a photo of {} in the dog"])
    (tmp_path / "empty").mkdir()
    refused("holds no images", tmp_path, dit, tmp_path / "empty", class_row=1)
    refused("is not a folder of images", tmp_path, dit, str(tmp_path / "nowhere"), class_row=1)
    refused("no images to learn from", tmp_path, dit, [], class_row=1)
    for name in ("cats", "dogs"):
        (tmp_path / "classes" / name).mkdir(parents=True)
        save_png(personal.pictures(1)[0], tmp_path / "classes" / name / "0.png", {})
    refused("has images in 2 folders", tmp_path, dit, tmp_path / "classes", class_row=1)
    dit.scheduler = EDMEulerScheduler()
    refused("alpha_bar at whole timesteps", tmp_path, dit, class_row=1)
    dit.scheduler = DDIMScheduler()
    refused("uint8", tmp_path, dit, torch.zeros(1, 3, 8, 8), class_row=1)
    (tmp_path / "broken.png").write_bytes(b"\x89PNG broken")
    refused("broken.png", tmp_path, dit, [tmp_path / "broken.png"], class_row=1)


@pytest.mark.parametrize(
    "settings, match",
    [
        ({"first_time": 0.9, "last_time": 0.5}, "first_time must be before last_time"),
        ({"first_time": 0.9}, "given together"),
        ({"betas": (0.9, 1.0)}, "betas are at least"),
        ({"average": 1.0}, "average is at least"),
        ({"subspace": "all"}, "paper, released, none"),
        ({"perturbation": 0.0}, "perturbation"),
        ({"steps": 0}, "steps"),
        ({"rows": 3}, "has no option rows"),
    ],
)
def test_wrong_settings(settings, match):
    with pytest.raises(UserError, match=match):
        PersonalizeConfig(**settings)


def test_losses_that_come_to_nan_are_told(tmp_path):
    pipe = personal.classes()
    with torch.no_grad():
        pipe.transformer.proj_out_2.weight.fill_(float("nan"))
    with pytest.raises(UserError, match="NaN or infinity by step 0"):
        learn(tmp_path / "out", pipe)


def test_an_embedding_that_is_not_finite_is_never_saved(tmp_path, monkeypatch):
    original = run_module.step_once

    def broken(problem, state):
        original(problem, state)
        if state.step == 4:
            state.u = state.u * float("nan")

    monkeypatch.setattr(run_module, "step_once", broken)
    with pytest.raises(UserError, match="NaN or infinity by step 4"):
        learn(tmp_path / "out", log_every=100)
    monkeypatch.setattr(run_module, "step_once", original)
    assert learn(tmp_path / "out", resume=True, log_every=100).path.is_file()  # from the checkpoint of step 2


def test_a_token_that_a_pipeline_cleans_out_of_prompts_is_refused(tmp_path):
    class Cleaning(type(personal.text())):
        def _text_preprocessing(self, text, clean_caption=False):
            return [text.strip("<>")]

    pipe = personal.text()
    pipe.__class__ = Cleaning
    refused("of '<dog>' 'dog' is left", tmp_path, pipe, token="<dog>", init="dog")


def test_a_pipeline_that_tells_its_network_other_times_is_refused(tmp_path):
    class Shares(type(personal.text())):
        def __call__(self, prompt=None, num_inference_steps=1, generator=None):
            self.scheduler.set_timesteps(num_inference_steps)
            words = self.encode_prompt(prompt, torch.device("cpu"), 1, False)[0]
            return self.unet(torch.zeros(len(prompt), 4, 8, 8), self.scheduler.timesteps[0] / 1000 + 0.5, words)

    pipe = personal.text()
    pipe.__class__ = Shares
    with pytest.raises(UserError, match="other times than its scheduler has"):
        ptq4dm.personalize(pipe, personal.pictures(), PersonalizeConfig(**SHORT), tmp_path, token="<dog>", init="dog")


def test_a_pipeline_whose_network_sees_other_shapes_is_refused(tmp_path):
    class Doubled(type(personal.text())):
        def __call__(self, prompt=None, num_inference_steps=1, generator=None):
            words = self.encode_prompt(prompt, torch.device("cpu"), 1, False)[0]
            return self.unet(torch.zeros(2 * len(prompt), 4, 8, 8), 5, words)

    pipe = personal.text()
    pipe.__class__ = Doubled
    with pytest.raises(UserError, match="personalization is for pipelines that denoise the latents of their VAE"):
        ptq4dm.personalize(pipe, personal.pictures(), PersonalizeConfig(**SHORT), tmp_path, token="<dog>", init="dog")


# ---------------------------------------------------------------------------------------------- embeddings as files


def test_embeddings_that_do_not_fit_are_refused(tmp_path):
    dit = personal.classes()
    done = learn(tmp_path / "out", dit)
    with pytest.raises(UserError, match="has no classes"):
        ptq4dm.load_embedding(personal.text(), done.path)
    with pytest.raises(UserError, match="of another model"):
        ptq4dm.load_embedding(personal.classes(num_attention_heads=4), done.path)
    with pytest.raises(UserError, match="there is no class 3 in this model"):
        ptq4dm.load_embedding(personal.classes(num_embeds_ada_norm=2), done.path)
    with pytest.raises(UserError, match="no embedding"):
        ptq4dm.load_embedding(dit, tmp_path / "nothing.safetensors")
    with pytest.raises(UserError, match="holds no embedding"):
        ptq4dm.load_embedding(dit, tmp_path)
    Path(tmp_path / "cut.safetensors").write_bytes(done.path.read_bytes()[:-9])
    with pytest.raises(DamagedFile, match="give a file that ptq4dm personalize wrote"):
        ptq4dm.load_embedding(dit, tmp_path / "cut.safetensors")


def test_a_token_is_put_in_once(tmp_path):
    from safetensors.torch import save_file

    save_file({"<thing>": torch.ones(1, 32)}, tmp_path / "theirs.safetensors")
    pipe = personal.text()
    assert ptq4dm.load_embedding(pipe, tmp_path / "theirs.safetensors") == "<thing>"
    with pytest.raises(UserError, match="known to this model"):
        ptq4dm.load_embedding(pipe, tmp_path / "theirs.safetensors")

"""Saved pipelines load by themselves in a process where ptq4dm has been imported, and nothing else of it."""

import json

import pytest
import torch
from diffusers import DDIMScheduler as Plain
from diffusers import DDPMPipeline

import fresh
import models
import ptq4dm
from ptq4dm.samplers import DDIMScheduler, DEISScheduler, OneStepScheduler

pytestmark = pytest.mark.usefixtures("one_thread")


def unet_with(scheduler):
    return DDPMPipeline(models.unet(), scheduler)


def quad(kind):
    return kind.from_config(Plain(beta_schedule="scaled_linear").config, timestep_grid="quad")


PLAIN = "pipe(2, random, num_inference_steps=4, output_type='np').images"
# what makes a pipeline, its pictures, what its scheduler remembers
CASES = {
    "deis": (lambda: unet_with(quad(DEISScheduler)), PLAIN, "beta_schedule"),
    "ddim": (lambda: unet_with(quad(DDIMScheduler)), PLAIN, "beta_schedule"),
    "student": (
        lambda: unet_with(OneStepScheduler(generator_timestep=400)),
        "__import__('ptq4dm').sample(pipe, [7], num_inference_steps=1).numpy()", "generator_timestep",
    ),
    "dit": (
        lambda: ptq4dm.PixelDiTPipeline(models.dit(in_channels=3, out_channels=3), Plain()),
        "pipe([4], random, 2, output_type='pt').images.numpy()", "timestep_spacing",
    ),
}  # fmt: skip
FACTS = """
def facts(pipe, pictures, kept):
    pipe.set_progress_bar_config(disable=True)
    images = eval(pictures, {"pipe": pipe, "random": torch.Generator().manual_seed(3)}).astype("float64")
    kinds = [f"{type(one).__module__}.{type(one).__name__}" for one in (pipe, pipe.scheduler)]
    return [*kinds, pipe.scheduler.config[kept], images.shape, images.sum(), (images * images).sum()]
"""
PROGRAM = f"""
import json, sys, torch
import ptq4dm
from diffusers import DiffusionPipeline
torch.set_num_threads(1)
{FACTS}
folder, pictures, kept = sys.argv[1:]
found = facts(DiffusionPipeline.from_pretrained(folder), pictures, kept)
with open(folder + ".json", "w") as file:
    json.dump(found, file)
"""


def test_each_loads_by_itself(tmp_path):
    own = {"torch": torch}
    exec(FACTS, own)
    expected, begun = {}, []
    for name, (make, pictures, kept) in CASES.items():
        pipe = make()
        pipe.save_pretrained(tmp_path / name)
        expected[name] = own["facts"](pipe, pictures, kept)
        begun.append(fresh.begin(PROGRAM, str(tmp_path / name), pictures, kept, said=tmp_path / f"{name}.said"))
    assert [facts[2] for facts in expected.values()] == ["scaled_linear", "scaled_linear", 400, "leading"]
    for process in begun:
        assert process.wait() == 0 and "Expected types" not in process.text(), process.text()[-3000:]
    for name, facts in expected.items():
        found = json.loads((tmp_path / f"{name}.json").read_text())
        assert found[:4] == [*facts[:3], list(facts[3])]
        assert found[4:] == pytest.approx(facts[4:], rel=1e-6)

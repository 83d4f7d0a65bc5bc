"""Saved pipelines load by themselves in a process where ptq4dm has been imported, and nothing else of it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler as Plain
from diffusers import DDPMPipeline

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
# Each folder is the first that its process opens: after the imports of all, the process parts.
PROGRAM = f"""
import json, os, sys, torch
import ptq4dm
from diffusers import DiffusionPipeline
torch.set_num_threads(1)
{FACTS}
for folder, pictures, kept in json.loads(sys.argv[1]):
    if not os.fork():
        found = facts(DiffusionPipeline.from_pretrained(folder), pictures, kept)
        with open(folder + ".json", "w") as file:
            json.dump(found, file)
        sys.exit()
    assert os.waitstatus_to_exitcode(os.wait()[1]) == 0, folder
"""


def test_each_loads_by_itself(tmp_path):
    own = {"torch": torch}
    exec(FACTS, own)
    expected, asked = {}, []
    for name, (make, pictures, kept) in CASES.items():
        pipe = make()
        pipe.save_pretrained(tmp_path / name)
        expected[name] = own["facts"](pipe, pictures, kept)
        asked.append((str(tmp_path / name), pictures, kept))
    assert [facts[2] for facts in expected.values()] == ["scaled_linear", "scaled_linear", 400, "leading"]
    env = os.environ | {"PYTHONPATH": str(Path(ptq4dm.__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, json.dumps(asked)], env=env, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "Expected types" not in done.stderr
    for name, facts in expected.items():
        found = json.loads((tmp_path / f"{name}.json").read_text())
        assert found[:4] == [*facts[:3], list(facts[3])]
        assert found[4:] == pytest.approx(facts[4:], rel=1e-6)

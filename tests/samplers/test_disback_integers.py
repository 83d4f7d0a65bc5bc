"""One-step students that train on integers: they learn, go on to the bit, and are saved with plain layers."""

import pytest
import torch
from torch import nn

import points
from helpers import same
from points import weights
from ptq4dm.errors import UserError
from ptq4dm.layers.shift.layers import ShiftLinear
from ptq4dm.samplers import DisBackConfig, distill
from ptq4dm.samplers.distillation import networks
from ptq4dm.samplers.distillation import run as run_module
from ptq4dm.samplers.distillation.log import read_log
from ptq4dm.samplers.distillation.scores import Diffusion

pytestmark = pytest.mark.usefixtures("one_thread", "new_accelerate")
SHORT = {
    "images": 6 * 8, "batch_size": 8, "degradation_steps": 2, "path_points": 1, "log_every": 2, "student_lr": 1e-3,
    "evaluate_every": 3 * 8, "warmup_steps": 2, "bits": 6,
}  # fmt: skip


@pytest.fixture
def untrained():
    return points.untrained()


def test_the_student_alone_is_on_integers(untrained, tmp_path, monkeypatch):
    seen = []
    before = networks.Networks.descend

    def descend(self, role, *rest):
        seen.append({name: sum(isinstance(m, ShiftLinear) for m in net.modules()) for name, net in self.nets.items()})
        return before(self, role, *rest)

    monkeypatch.setattr(networks.Networks, "descend", descend)
    state = torch.get_rng_state()
    student = distill(untrained, DisBackConfig(**SHORT), tmp_path / "run")
    assert torch.equal(torch.get_rng_state(), state)  # the process's random numbers are not ours
    linear = sum(type(m) is nn.Linear for m in untrained.unet.modules())
    assert linear > 2 and all(one == {"student": linear, "average": linear, "fake": 0, "target": 0} for one in seen)
    assert sum(type(m) is nn.Linear for m in student.unet.modules()) == linear
    assert weights(student).keys() == weights(untrained).keys()
    told = [line["kernels"] for line in read_log(tmp_path / "run" / "log.jsonl") if line["stage"] == "evaluation"]
    assert told and all(sum(kernels.values()) == linear for kernels in told)
    floats = distill(untrained, DisBackConfig(**SHORT | {"bits": 16}), tmp_path / "floats")
    assert not same(weights(student), weights(floats))


def test_a_resumed_run_gives_the_same_bits(untrained, tmp_path, monkeypatch):
    whole = distill(untrained, DisBackConfig(**SHORT), tmp_path / "whole")
    parts = run_module.Run.parts

    def interrupted(run, *key):
        if key == ("student", 5):
            raise KeyboardInterrupt
        return parts(run, *key)

    monkeypatch.setattr(run_module.Run, "parts", interrupted)
    with pytest.raises(KeyboardInterrupt):
        distill(untrained, DisBackConfig(**SHORT), tmp_path / "parts")
    monkeypatch.setattr(run_module.Run, "parts", parts)
    resumed = distill(untrained, DisBackConfig(**SHORT), tmp_path / "parts", resume=True)
    assert same(weights(whole), weights(resumed))


def test_it_learns(tmp_path):
    """The energy distance of one-step samples to the data falls to a third."""
    teacher = points.train_teacher()
    config = DisBackConfig(
        backtracking=False, images=200 * 128, batch_size=128, student_lr=1e-3, fake_lr=4e-3, warmup_steps=20,
        ema_decay=0.98, evaluate_every=10**9, bits=6,
    )  # fmt: skip
    student = distill(teacher, config, tmp_path / "run")
    scheduler, data = student.scheduler, points.draw_points(2000, 1)
    z = torch.randn(2000, 2, 1, 1, generator=torch.Generator().manual_seed(5))
    diffusion = Diffusion(scheduler.alphas, scheduler.sigmas, scheduler.config.generator_timestep, "epsilon", "cpu")
    with torch.no_grad():
        before, after = (
            points.energy_distance(diffusion.generate(pipe.unet, z, None), data) for pipe in (teacher, student)
        )
    assert after < before / 3


def test_which_bits_there_are():
    assert "bits" not in DisBackConfig().identity() and DisBackConfig(bits=6).identity()["bits"] == 6
    for bits in (1, 9, 12, 17):
        with pytest.raises(UserError, match="bits"):
            DisBackConfig(bits=bits)

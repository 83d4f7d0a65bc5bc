"""DisBack on points in the plane: it learns, with and without backtracking; and a stopped run goes on bit by bit."""

import json

import pytest
import torch
from accelerate.state import AcceleratorState
from diffusers import (
    DDIMScheduler,
    DDPMPipeline,
    EDMEulerScheduler,
    FlowMatchEulerDiscreteScheduler,
    UNet2DConditionModel,
)
from safetensors.torch import load_file

import points
import ptq4dm
from helpers import same
from points import weights
from ptq4dm.errors import UserError
from ptq4dm.samplers import DisBackConfig, OneStepScheduler, distill
from ptq4dm.samplers.distillation import disback
from ptq4dm.samplers.distillation.disback import target_of
from ptq4dm.samplers.distillation.networks import Networks
from ptq4dm.samplers.distillation.scores import Chance, Diffusion
from two_processes import two_ranks

pytestmark = pytest.mark.usefixtures("one_thread", "new_accelerate")
SHORT = dict(
    images=20 * 32, batch_size=32, degradation_steps=6, path_points=3, switch_every=3, log_every=2,
    evaluate_every=4 * 32, student_lr=1e-3, fake_lr=1e-3, warmup_steps=2,
)  # fmt: skip


@pytest.fixture(scope="module")
def teacher():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield points.train_teacher()
    torch.set_num_threads(before)


@pytest.fixture
def untrained():
    return points.untrained()


def log(folder):
    """The log without what the clock says."""
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "images_per_second"} for line in lines]


def diffusion_of(scheduler):
    return Diffusion(scheduler.alphas, scheduler.sigmas, scheduler.config.generator_timestep, "epsilon", "cpu")


# --- learning -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backtracking", [True, False])
def test_one_step_samples_approach_the_data(teacher, tmp_path, backtracking):
    """The energy distance to the data falls to a tenth or less: below that of the teacher's 5 DDIM steps."""
    data = points.draw_points(2000, 1)
    z = torch.randn(2000, 2, 1, 1, generator=torch.Generator().manual_seed(5))
    config = DisBackConfig(
        backtracking=backtracking, images=300 * 128, batch_size=128, degradation_steps=80, switch_every=16,
        student_lr=1e-3, fake_lr=4e-3, warmup_steps=20, ema_decay=0.98, evaluate_every=10**9,
    )  # fmt: skip
    student = distill(teacher, config, tmp_path / "run")

    def distance(net):
        with torch.no_grad():
            return points.energy_distance(diffusion_of(student.scheduler).generate(net, z, None), data)

    x, scheduler = z, teacher.scheduler
    scheduler.set_timesteps(5)
    for t in scheduler.timesteps:
        with torch.no_grad():
            x = scheduler.step(teacher.unet(x, t, return_dict=False)[0], t, x).prev_sample
    before, after, five_steps = distance(teacher.unet), distance(student.unet), points.energy_distance(x, data)
    assert after < before / 10 and after < five_steps / 2


def test_degradation_leads_from_the_teacher_to_the_score_of_the_generator(teacher, tmp_path):
    """The path fits G_0's images better than the teacher, and is a way: its end is nearer to the point before."""
    config = DisBackConfig(
        images=1, degradation_steps=300, path_points=3, fake_lr=5e-4, warmup_steps=20, evaluate_every=10**9
    )
    distill(teacher, config, tmp_path / "run")
    net, path = type(teacher.unet).from_config(teacher.unet.config), tmp_path / "run" / "path"
    diffusion = diffusion_of(OneStepScheduler())
    batch = Chance(1, (2, 1, 1), None, (20, 800), "cpu").draw(4000, "held out")
    alpha, sigma = diffusion.levels(batch.t, batch.z)
    with torch.no_grad():
        x = alpha * diffusion.generate(teacher.unet, batch.z, None) + sigma * batch.noise
        predictions = [diffusion.epsilon(teacher.unet, x, batch.t, None)]
        for index in (1, 2, 3):
            net.load_state_dict(load_file(path / f"{index:05d}.safetensors"))
            predictions.append(diffusion.epsilon(net, x, batch.t, None))
    losses = [float((p - batch.noise).square().mean()) for p in predictions]
    to_the_end = [float((p - predictions[3]).square().mean()) for p in predictions]
    assert max(losses[1:]) < 0.9 * losses[0]
    assert to_the_end[2] < 0.5 * to_the_end[0]


def test_the_target_walks_back_and_stays_at_the_teacher():
    config = DisBackConfig(path_points=3, switch_every=10)
    assert [target_of(config, step) for step in (0, 9, 10, 19, 20, 21, 1000)] == [2, 2, 1, 1, 0, 0, 0]
    assert target_of(DisBackConfig(backtracking=False), 0) == 0


# --- the run ------------------------------------------------------------------------------------------------


def test_the_average_is_part_of_no_graph(untrained, tmp_path, monkeypatch):
    averages, follow = [], Networks.follow

    def followed(self, step):
        follow(self, step)
        averages.append(self.nets["average"])

    monkeypatch.setattr(Networks, "follow", followed)
    distill(untrained, DisBackConfig(**SHORT | {"images": 2 * 32, "degradation_steps": 3}), tmp_path / "run")
    assert averages and all(parameter.grad_fn is None for parameter in averages[-1].parameters())


def test_what_a_run_leaves(untrained, tmp_path):
    before = weights(untrained)
    student = distill(untrained, DisBackConfig(**SHORT), tmp_path / "run")
    files = sorted(p.relative_to(tmp_path / "run").as_posix() for p in (tmp_path / "run").rglob("*") if p.is_file())
    assert files == ["checkpoint.safetensors", "log.jsonl", *(f"path/0000{k}.safetensors" for k in (1, 2, 3))]
    lines = log(tmp_path / "run")
    stages = [line["stage"] for line in lines]
    assert stages.count("degradation") == 3 and stages.count("evaluation") == 6
    targets = [line["target"] for line in lines if line["stage"] == "distillation"]
    assert targets == [2, 1, 1, 0, 0, 0, 0, 0, 0, 0]
    assert lines[-1] == {"stage": "evaluation", "step": 20, "images": 640, "degraded_images": 192}
    assert same(weights(untrained), before) and all(p.requires_grad for p in untrained.unet.parameters())
    assert type(student) is DDPMPipeline and type(student.scheduler) is OneStepScheduler
    assert not same(weights(student), before)


def test_without_backtracking_there_is_no_stage_1(untrained, tmp_path):
    distill(untrained, DisBackConfig(**SHORT, backtracking=False), tmp_path / "run")
    lines = log(tmp_path / "run")
    assert not (tmp_path / "run" / "path").exists() and lines[0]["stage"] == "evaluation"
    assert {line["target"] for line in lines if line["stage"] == "distillation"} == {0}


@pytest.mark.parametrize("stop", [4, 11, 17, 33])  # in stage 1; before, at and after the last change of target
@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_stopped_run_goes_on_as_if_it_had_never_stopped(untrained, tmp_path, monkeypatch, stop, accumulation):
    config = DisBackConfig(**SHORT, gradient_accumulation_steps=accumulation)
    straight = distill(untrained, config, tmp_path / "straight")
    calls, parts = [], disback.Run.parts

    def interrupted(self, *key):
        calls.append(key)
        if len(calls) == stop:
            raise KeyboardInterrupt
        return parts(self, *key)

    with monkeypatch.context() as patch:
        patch.setattr(disback.Run, "parts", interrupted)
        with pytest.raises(KeyboardInterrupt):
            distill(untrained, config, tmp_path / "halves")
    resumed = distill(untrained, config, tmp_path / "halves", resume=True)
    assert same(weights(resumed), weights(straight))
    assert log(tmp_path / "halves") == log(tmp_path / "straight")
    one, other = (load_file(tmp_path / name / "checkpoint.safetensors") for name in ("straight", "halves"))
    assert same(one, other)


def test_out_of_time_and_more_images(untrained, tmp_path):
    """A call that stops for its minutes, and one that is given more images later, come to the same weights."""
    straight = distill(untrained, DisBackConfig(**SHORT), tmp_path / "straight")
    early = distill(untrained, DisBackConfig(**SHORT, minutes=1e-9), tmp_path / "parts")
    assert same(weights(early), weights(untrained))  # its time was over in stage 1
    few = DisBackConfig(**{**SHORT, "images": 9 * 32})
    distill(untrained, few, tmp_path / "parts", resume=True)
    assert log(tmp_path / "parts")[-1]["step"] == 9
    assert same(
        weights(distill(untrained, DisBackConfig(**SHORT), tmp_path / "parts", resume=True)),
        weights(straight),
    )


def test_accumulated_gradients_are_those_of_the_whole_batch(untrained, tmp_path):
    whole = distill(untrained, DisBackConfig(**SHORT), tmp_path / "whole")
    parts = distill(untrained, DisBackConfig(**SHORT, gradient_accumulation_steps=4), tmp_path / "parts")
    for name, value in weights(whole).items():
        torch.testing.assert_close(weights(parts)[name], value, rtol=0, atol=2e-4)
    assert not same(weights(whole), weights(untrained))


def test_two_processes_come_to_the_same_student(untrained, tmp_path):
    config = DisBackConfig(**SHORT)
    whole = weights(distill(untrained, config, tmp_path / "one"))
    untrained.unet.save_pretrained(tmp_path / "net")
    script = tmp_path / "script.py"
    script.write_text(
        "import sys, torch\nfrom accelerate import PartialState\nfrom diffusers import DDIMScheduler, DDPMPipeline\n"
        "from points import PointNet\nfrom safetensors.torch import save_file\n"
        "from ptq4dm.samplers import DisBackConfig, distill\n"
        "torch.set_num_threads(1)\nstate = PartialState(cpu=True)\nassert state.num_processes == 2\n"
        "pipe = DDPMPipeline(PointNet.from_pretrained(sys.argv[1] + '/net'), DDIMScheduler())\n"
        f"student = distill(pipe, DisBackConfig(**{SHORT!r}), sys.argv[1] + '/two')\n"
        "save_file(student.unet.state_dict(), f'{sys.argv[1]}/{state.process_index}.safetensors')\n"
        "state.destroy_process_group()\n"
    )
    two_ranks(script, tmp_path)
    one, two = (load_file(tmp_path / f"{rank}.safetensors") for rank in (0, 1))
    assert same(one, two) and len(log(tmp_path / "two")) == len(log(tmp_path / "one"))
    for name, value in whole.items():
        torch.testing.assert_close(one[name], value, rtol=0, atol=2e-4)


def test_bf16_keeps_weights_in_float32(untrained, tmp_path):
    student = distill(untrained, DisBackConfig(**SHORT, precision="bf16"), tmp_path / "run")
    assert {p.dtype for p in student.unet.parameters()} == {torch.float32}
    with pytest.raises(UserError, match="in another precision than 'no'; use a new process"):
        distill(untrained, DisBackConfig(**SHORT), tmp_path / "other")
    AcceleratorState._reset_state()
    full = distill(untrained, DisBackConfig(**SHORT), tmp_path / "full")
    gaps = [(weights(student)[name] - value).abs().max() for name, value in weights(full).items()]
    assert 0 < max(gaps) < 0.05


def test_more_steps_of_the_fake_score_and_no_average(untrained, tmp_path):
    student = distill(untrained, DisBackConfig(**SHORT, fake_steps=3, ema_decay=0.0), tmp_path / "run")
    kept = load_file(tmp_path / "run" / "checkpoint.safetensors")
    assert all(torch.equal(kept[f"student.{name}"], value) for name, value in weights(student).items())
    assert float(kept["fake_optimizer.0.step"]) == 6 + 3 * 20 and float(kept["student_optimizer.0.step"]) == 20


# --- wrong input --------------------------------------------------------------------------------------------


def test_nan_keeps_the_last_good_checkpoint(untrained, tmp_path, monkeypatch):
    config, folder = DisBackConfig(**SHORT), tmp_path / "run"
    difference = Diffusion.score_difference
    calls = []

    def poisoned(self, *args):
        calls.append(1)
        return difference(self, *args) * (float("nan") if len(calls) > 13 else 1.0)

    with monkeypatch.context() as patch:
        patch.setattr(Diffusion, "score_difference", poisoned)
        with pytest.raises(
            UserError, match="NaN or infinity by iteration 14; the checkpoint of iteration 12 is kept"
        ):
            distill(untrained, config, folder)
    kept = load_file(folder / "checkpoint.safetensors")
    assert all(value.isfinite().all() for value in kept.values())
    slower = DisBackConfig(**{**SHORT, "student_lr": 1e-4})
    assert all(v.isfinite().all() for v in weights(distill(untrained, slower, folder, resume=True)).values())


def test_nan_before_any_checkpoint(untrained, tmp_path):
    next(untrained.unet.parameters()).data.fill_(float("nan"))
    with pytest.raises(UserError, match="degradation came to NaN or infinity by iteration 2; start anew"):
        distill(untrained, DisBackConfig(**SHORT), tmp_path / "run")
    assert not (tmp_path / "run" / "checkpoint.safetensors").exists()


def with_scheduler(pipe, scheduler):
    return DDPMPipeline(pipe.unet, scheduler)


def mismatched(pipe):
    scheduler = DDIMScheduler()
    scheduler.alphas_cumprod = scheduler.alphas_cumprod**2
    return with_scheduler(pipe, scheduler)


def text_model(pipe):
    net = UNet2DConditionModel(
        sample_size=8, block_out_channels=(8, 8), layers_per_block=1, norm_num_groups=4, cross_attention_dim=8,
        attention_head_dim=4, down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )  # fmt: skip
    return DDPMPipeline(net, DDIMScheduler())


def latent_model(pipe):
    pipe.vae = pipe.unet
    return pipe


BAD_TEACHERS = [
    (
        lambda p: with_scheduler(p, FlowMatchEulerDiscreteScheduler()),
        "DDPMPipeline does not scale its input",
    ),
    (lambda p: with_scheduler(p, EDMEulerScheduler()), "OneStepScheduler cannot sample this model"),
    (lambda p: with_scheduler(p, OneStepScheduler()), "a one-step student already"),
    (
        lambda p: with_scheduler(p, ptq4dm.samplers.DEISScheduler(beta_schedule="continuous")),
        "discrete DDPM timesteps",
    ),
    (mismatched, "is not the one that its config describes"),
    (text_model, "UNet2DConditionModel needs encoder_hidden_states"),
    (latent_model, "works on latents"),
    (lambda p: p.to(torch.bfloat16), "loaded in torch.bfloat16; load it in float32"),
]


@pytest.mark.parametrize(("change", "message"), BAD_TEACHERS)
def test_teachers_that_cannot_be_distilled(untrained, tmp_path, change, message):
    with pytest.raises(UserError, match=message):
        distill(change(untrained), DisBackConfig(**SHORT), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_teacher_trained_with_other_timesteps(unet, tmp_path):
    net = unet()
    net.register_to_config(num_train_timesteps=500)
    with pytest.raises(UserError, match="trained with 500 timesteps but its scheduler has 1000"):
        distill(DDPMPipeline(net, DDIMScheduler()), DisBackConfig(**SHORT), tmp_path / "run")


def test_a_quantized_teacher(unet, tmp_path):
    pipe = DDPMPipeline(unet(), DDIMScheduler())
    ptq4dm.quantize(pipe, ptq4dm.RTNConfig(activations="dynamic"))
    with pytest.raises(UserError, match="the teacher is quantized"):
        distill(pipe, DisBackConfig(**SHORT), tmp_path / "run")


BAD_CONFIGS = [
    ({"precision": "fp16"}, "must be 'no' or 'bf16', not 'fp16'"),
    ({"images": 0}, "images must be at least 1"),
    ({"student_lr": 0.0}, "student_lr must be positive"),
    ({"fake_lr": float("nan")}, "fake_lr must be positive"),
    ({"minutes": 0}, "minutes must be positive"),
    ({"sigma_range": (0.5, 0.5)}, "must rise from above 0"),
    ({"ema_decay": 1.0}, r"lies in \[0, 1\)"),
    ({"path_points": 9, "degradation_steps": 8}, "8 degradation_steps cannot leave 9 path_points"),
    ({"num_fid": 1}, "at least 2 for a covariance"),
    ({"seed": -1}, "seed must not be negative"),
]


@pytest.mark.parametrize(("options", "message"), BAD_CONFIGS)
def test_configs_that_make_no_sense(options, message):
    with pytest.raises(UserError, match=message):
        DisBackConfig(**options)


def test_folders_and_checkpoints_that_do_not_fit(untrained, tmp_path):
    config, folder = DisBackConfig(**SHORT), tmp_path / "run"
    with pytest.raises(UserError, match="no checkpoint at .* to resume"):
        distill(untrained, config, folder, resume=True)
    with pytest.raises(UserError, match="batch_size 32 does not divide into 3 equal parts"):
        distill(untrained, DisBackConfig(**SHORT, gradient_accumulation_steps=3), folder)
    with pytest.raises(UserError, match="feature-FID is of 32x32 RGB images; this model makes 1x1 with 2 channels"):
        distill(untrained, DisBackConfig(**SHORT, num_fid=10), folder)
    assert not folder.exists()
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError, match="cannot make the folder"):
        distill(untrained, config, tmp_path / "file" / "run")
    distill(untrained, DisBackConfig(**{**SHORT, "images": 4 * 32}), folder)
    before = (folder / "log.jsonl").read_bytes()
    with pytest.raises(UserError, match="is not empty; go on with the run in it"):
        distill(untrained, config, folder)
    for resume in (False, True):  # stopped before its first checkpoint: it starts over, asked to resume or not
        begun = tmp_path / f"begun-{resume}"
        begun.mkdir()
        (begun / "log.jsonl").write_text("")
        distill(untrained, DisBackConfig(**{**SHORT, "images": 4 * 32}), begun, resume=resume)
        assert (begun / "log.jsonl").read_bytes() and (begun / "checkpoint.safetensors").is_file()
    with pytest.raises(UserError, match=r"other settings \(seed\)"):
        distill(untrained, DisBackConfig(**SHORT, seed=1), folder, resume=True)
    torch.manual_seed(1)
    other = DDPMPipeline(points.PointNet(width=16).eval(), DDIMScheduler())
    with pytest.raises(UserError, match=r"other settings \(teacher\)"):
        distill(other, config, folder, resume=True)
    (folder / "path" / "00001.safetensors").unlink()
    with pytest.raises(UserError, match="00001.safetensors, a point of the way back .* is missing"):
        distill(untrained, config, folder, resume=True)
    path = folder / "checkpoint.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(UserError, match="checkpoint.safetensors cannot be read"):
        distill(untrained, config, folder, resume=True)
    assert (folder / "log.jsonl").read_bytes() == before

"""Schedules fitted to a model: the search against all grids, weights against what is known, errors on other seeds."""

import itertools
import json
import shutil

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMPipeline, UNet2DModel
from diffusers.models.unets.unet_2d import UNet2DOutput

import ptq4dm
from analytic import Gaussian, Mixture
from models import plain_unet
from ptq4dm.cli.main import main
from ptq4dm.errors import UserError
from ptq4dm.pipelines.embedded import folder_of
from ptq4dm.quantization.saving import RECORD
from ptq4dm.samplers import DEISScheduler, FitConfig, FittedScheduler, fit
from ptq4dm.samplers.catalog import make_sampler
from ptq4dm.samplers.fitting.fit import endpoint_error
from ptq4dm.samplers.fitting.grid import best_grid, inner_products, local_errors
from ptq4dm.samplers.fitting.trajectories import record
from ptq4dm.samplers.fitting.weights import fit_weights, solve

OPTIONS = {"conditioning": None, "pipeline_kwargs": None}
FACTS = {"num_train_timesteps": 1000, "prediction_type": "epsilon", "start": 1.0}
OTHER = range(5000, 5064)  # seeds that nothing is fitted to
QUICK = {"num_trajectories": 64, "teacher_steps": 30}


class Exact(UNet2DModel):
    """epsilon of a known problem of 16 dimensions, times a factor."""

    problem, factor, calls = None, 1.0, 0

    def forward(self, sample, timestep, class_labels=None, return_dict=True):
        Exact.calls += 1
        a = DDIMScheduler().alphas_cumprod.double()[int(torch.as_tensor(timestep).flatten()[0])].item()
        found = self.problem.epsilon(sample.flatten(1).double(), a).reshape(sample.shape)
        return UNet2DOutput(sample=(self.factor * found).to(sample.dtype))


def pipeline(problem, factor=1.0):
    blocks = {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",), "block_out_channels": (4,)}
    net = Exact(
        sample_size=4,
        in_channels=1,
        out_channels=1,
        layers_per_block=1,
        norm_num_groups=2,
        add_attention=False,
        **blocks,
    )
    net.problem, net.factor = problem, factor
    return DDPMPipeline(net, DDIMScheduler(timestep_spacing="trailing"))


def white(deviation):
    eye = torch.eye(16, dtype=torch.float64)
    return Gaussian(torch.zeros(16, dtype=torch.float64), torch.full((16,), deviation**2, dtype=torch.float64), eye)


@pytest.fixture(scope="module")
def mixture():
    generator = torch.Generator().manual_seed(0)
    means = torch.randn(12, 16, generator=generator, dtype=torch.float64) / 2
    variances = torch.rand(12, 16, generator=generator, dtype=torch.float64) * 0.15**2 + 1e-4
    return Mixture(means, torch.full((12,), 1 / 12, dtype=torch.float64), torch.diag_embed(variances))


def ends(pipe, scheduler, evaluations, seeds=OTHER):
    return record(pipe, scheduler, seeds, evaluations, OPTIONS, len(seeds)).states[-1]


@pytest.fixture(scope="module")
def followed(mixture):
    pipe = pipeline(mixture)
    return record(pipe, DEISScheduler.from_config(pipe.scheduler.config), range(32), 9, OPTIONS, 16)


def test_trajectories_are_those_of_the_sampler(followed, mixture):
    pipe = pipeline(mixture)
    noise = torch.cat([torch.randn(1, 1, 4, 4, generator=torch.Generator().manual_seed(s)) for s in range(32)])
    scheduler = DEISScheduler.from_config(pipe.scheduler.config)
    scheduler.set_timesteps(9)
    x = noise
    for k, t in enumerate(scheduler.timesteps):
        torch.testing.assert_close(followed.states[k], x.flatten(1), rtol=1e-5, atol=1e-5)
        output = pipe.unet(x, t).sample
        torch.testing.assert_close(followed.outputs[k], output.flatten(1), rtol=1e-4, atol=1e-4)
        x = scheduler.step(output, t, x).prev_sample
    torch.testing.assert_close(followed.states[-1], x.flatten(1), rtol=1e-5, atol=1e-5)
    assert followed.times == scheduler.timesteps.tolist() and followed.shape == (1, 4, 4)


def test_local_errors_are_those_of_least_squares(followed):
    inner = inner_products(followed)
    found = local_errors(inner, np.array([[4, 2, 1]]))[0]
    given = [followed.states[4], followed.outputs[4], followed.outputs[2], followed.outputs[1]]
    for n in (5, 7, 9):
        factors = solve(given, followed.states[n], 1e-3)
        left = followed.states[n] - sum(f * part for f, part in zip(factors, given, strict=True))
        # The jitter adds a penalty to what is left: at most a share of 1e-3 of each weighed output.
        penalty = sum(
            (1e-3 * f) ** 2 * part.square().mean().item() for f, part in zip(factors[1:], given[1:], strict=True)
        )
        assert found[n] == pytest.approx((left.square().mean().item() + penalty) ** 0.5, rel=1e-3)


@pytest.mark.parametrize(("history", "sensitivity", "power"), [(1, 0.0, 1.0), (2, 1.0, 1.0), (2, 2.0, 2.0)])
def test_the_grid_is_the_best_of_all(followed, history, sensitivity, power):
    """A state is the last two times, so up to a history of two the search is exact: against all 56 grids."""
    inner = inner_products(followed)

    def cost(grid):
        total = 0.0
        for step in range(len(grid) - 1):
            past = np.array([grid[step::-1][:history]])
            n = grid[step + 1]
            total += (local_errors(inner, past)[0, n] * inner.left[n] ** sensitivity) ** power
        return total

    grids = [[0, *inside, 9] for inside in itertools.combinations(range(1, 9), 3)]
    found = best_grid(inner, 4, history, sensitivity, power)
    assert cost(found) == pytest.approx(min(map(cost, grids)), rel=1e-9) and found in grids
    assert best_grid(inner, 1, history, sensitivity, power) == [0, 9]


def test_of_white_data_one_evaluation_is_exact():
    """The flow of N(0, s^2) is a factor: noise times it. No fixed solver has it; least squares finds it."""
    pipe = pipeline(white(0.5))
    scheduler = fit(pipe, FitConfig(evaluations=[1, 3], num_trajectories=16, teacher_steps=100))
    right = ends(pipe, DEISScheduler.from_config(pipe.scheduler.config), 100)
    for evaluations in (1, 3):
        assert endpoint_error(ends(pipe, scheduler, evaluations), right) < 1e-3
    assert endpoint_error(ends(pipe, DEISScheduler.from_config(pipe.scheduler.config), 3), right) > 0.02


def test_fitted_is_nearer_than_any_fixed_grid_and_random_grids(mixture):
    pipe = pipeline(mixture)
    scheduler = fit(pipe, FitConfig(evaluations=[5, 8], **QUICK))
    right = ends(pipe, DEISScheduler.from_config(pipe.scheduler.config), 200)
    names = [
        f"{solver}/{grid}" for solver in ("ipndm2", "t_ab3", "t_ab2") for grid in ("linear", "quad", "edm", "log")
    ]
    names += ["diffusers/unipc", "diffusers/unipc-karras", "diffusers/dpm++2m-karras"]
    for evaluations in (5, 8):
        mine = endpoint_error(ends(pipe, scheduler, evaluations), right)
        others = [
            endpoint_error(ends(pipe, make_sampler(n, pipe.scheduler.config), evaluations), right) for n in names
        ]
        assert mine < 0.75 * min(others)
        assert mine < 2 * scheduler.config.tables[str(evaluations)]["error"]  # what it says of itself holds

    # The control: the same least squares on grids drawn at random.
    seeds = range(1_000_000, 1_000_064)
    teacher = record(pipe, DEISScheduler.from_config(pipe.scheduler.config), seeds, 30, OPTIONS, 64)
    rng, errors = np.random.default_rng(0), []
    for _ in range(8):
        grid = [0, *sorted(rng.choice(np.arange(1, 30), 4, replace=False).tolist()), 30]
        table, _ = fit_weights(pipe, teacher, grid, seeds, OPTIONS, FACTS, slice(32), 3, 1e-2)
        errors.append(endpoint_error(ends(pipe, FittedScheduler(tables={"5": table}), 5), right))
    assert endpoint_error(ends(pipe, scheduler, 5), right) < 0.5 * np.median(errors)


def test_a_fit_to_another_teacher_undoes_what_was_done_to_the_model(mixture):
    """A model that gives 1.1 times too much: fitted to the right model's trajectories, weights take it back."""
    right, wrong = pipeline(mixture), pipeline(mixture, factor=1.1)
    aim = ends(right, DEISScheduler.from_config(right.scheduler.config), 200)
    config = FitConfig(evaluations=[6], **QUICK)
    plain = endpoint_error(ends(wrong, fit(right, config), 6), aim)
    fitted = endpoint_error(ends(wrong, fit(wrong, config, teacher=right), 6), aim)
    unspoilt = endpoint_error(ends(right, fit(right, config), 6), aim)
    assert plain > 2 * unspoilt and fitted < 1.05 * unspoilt


def test_a_pipeline_keeps_its_scheduler_and_the_same_fit_is_made_again(mixture):
    pipe = pipeline(mixture)
    before, config = pipe.scheduler, FitConfig(evaluations=[3], num_trajectories=8, teacher_steps=12)
    one, other = fit(pipe, config), fit(pipe, config)
    assert pipe.scheduler is before and "step" not in vars(before)
    assert one.config.tables == other.config.tables


def tables():
    rows = {"timesteps": [900, 500, 100], "scale": [1.0, 0.9, 0.8], "weights": [[-0.1], [-0.2, 0.1], [-0.3, 0.2]]}
    return {"3": rows, "1": {"timesteps": [999], "scale": [1.0], "weights": [[-1.0]]}}


def test_steps_are_those_of_the_table_also_for_two_that_take_turns():
    scheduler, g = FittedScheduler(tables=tables()), torch.Generator().manual_seed(0)
    outputs = torch.randn(2, 3, 2, 3, generator=g)
    noise = torch.randn(2, 2, 3, generator=g)
    scheduler.set_timesteps(3)
    x, buffer = [noise[0], noise[1]], torch.empty(2, 3)
    for k, t in enumerate(scheduler.timesteps):
        for one in (0, 1):
            buffer.copy_(outputs[one, k])  # the same buffer for all outputs, as in a CUDA graph
            x[one] = scheduler.step(buffer, t, x[one]).prev_sample
    for one in (0, 1):
        y = outputs[one]
        right = noise[one] - 0.1 * y[0]
        right = 0.9 * right - 0.2 * y[1] + 0.1 * y[0]
        right = 0.8 * right - 0.3 * y[2] + 0.2 * y[1]
        torch.testing.assert_close(x[one], right)


def test_saved_and_loaded(tmp_path):
    unet = plain_unet(sample_size=32)
    scheduler = FittedScheduler(tables=tables())
    pipe = DDPMPipeline(unet, scheduler)
    pipe.save_pretrained(tmp_path)
    loaded = ptq4dm.load_pipeline(tmp_path)
    assert type(loaded.scheduler) is FittedScheduler and loaded.scheduler.fitted_for == [1, 3]
    images = [ptq4dm.sample(p, [0, 1], num_inference_steps=3) for p in (pipe, loaded)]
    torch.testing.assert_close(*images, rtol=0, atol=1e-3)  # a loaded UNet lies in memory another way
    with pytest.raises(UserError, match="not fitted for 4 evaluations, but for: 1, 3; take one of these, or"):
        ptq4dm.sample(loaded, [0], num_inference_steps=4)
    loaded.scheduler.set_timesteps(sigmas=[1.0, 0.5, 0.2], mu=1.0)  # as pipelines of flow models ask
    assert loaded.scheduler.timesteps.tolist() == [900, 500, 100]
    with pytest.raises(UserError, match="begins at its first timestep"):
        loaded.scheduler.step(torch.zeros(1, 2), loaded.scheduler.timesteps[1], torch.zeros(1, 2))


def test_a_fitted_config_is_no_noise_schedule_for_other_samplers(tmp_path):
    """In memory and from a file: betas of their own, or none, would be taken silently."""
    fitted = FittedScheduler(tables=tables())
    fitted.save_pretrained(tmp_path)
    for config in (fitted.config, FittedScheduler.load_config(tmp_path)):
        for name in ("deis", "ddim", "ipndm", "t_ab3/quad", "diffusers/unipc", "diffusers/ddim"):
            with pytest.raises(UserError, match="fitted to the model .* before the fit"):
                make_sampler(name, config)
        assert make_sampler(str(tmp_path), config).fitted_for == [1, 3]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scale": None}, "lacks its scale"),
        ({"timesteps": [1, 2, 3]}, "must decrease"),
        ({"timesteps": [3, 2]}, "must have 3 timesteps"),
        ({"weights": [[1.0, 2.0], [1.0], [1.0]]}, "evaluation i can weigh"),
        ({"weights": [["a"], [1.0], [1.0]]}, "weights"),
    ],
)
def test_wrong_tables_are_told(change, message):
    table = {**tables()["3"], **change}
    with pytest.raises(UserError, match=message):
        FittedScheduler(tables={"3": {k: v for k, v in table.items() if v is not None}})


def test_bench_fits_a_schedule_which_generate_takes(tmp_path, capsys):
    DDPMPipeline(plain_unet(sample_size=32), DDIMScheduler(timestep_spacing="trailing")).save_pretrained(
        tmp_path / "m"
    )
    model, out = ["--model", str(tmp_path / "m")], tmp_path / "bench"
    few = ["--num-images", "4", "--batch-size", "4", "--evaluations", "2", "--samplers", "deis"]
    sizes = ["--num-trajectories", "4", "--teacher-steps", "8"]
    assert main(["bench", "samplers", *model, *few, *sizes, "--output", str(out)]) == 2
    assert "--num-trajectories goes with --fit" in capsys.readouterr().err
    fitted = ["--fit", *sizes]
    assert main(["bench", "samplers", *model, *few, *fitted, "--output", str(out)]) == 0
    told = capsys.readouterr().out
    assert "goes on with" not in told and "fitted before" not in told
    rows = json.loads((out / "samplers.json").read_text())["rows"]
    assert [(row["sampler"], row["evaluations"]) for row in rows] == [("fitted", 2), ("deis", 2)]
    assert main(["bench", "samplers", *model, *few, *fitted, "--output", str(out)]) == 0
    told = capsys.readouterr().out
    assert f"goes on with {out / 'samplers.json'}" in told and f"taken as it is: {out / 'fitted'}" in told
    fitted[-1] = "9"  # another teacher
    assert main(["bench", "samplers", *model, *few, *fitted, "--output", str(out)]) == 2
    assert "fitted with other settings" in capsys.readouterr().err
    fitted[-1] = "8"
    folder = out / "fitted"
    config = json.loads((folder / "scheduler_config.json").read_text())
    assert set(config["tables"]) == {"2"} and config["origin"]["model"] == str(tmp_path / "m")
    assert (config["origin"]["num_trajectories"], config["origin"]["teacher_steps"]) == (4, 8)
    images = ["generate", *model, "--sampler", str(folder), "--steps", "2", "--num-images", "1"]
    assert main([*images, "--output", str(tmp_path / "images")]) == 0
    capsys.readouterr()
    assert main([*images[:-3], "3", "--output", str(tmp_path / "more")]) == 2
    assert "not fitted for 3 evaluations" in capsys.readouterr().err
    few[-1] = "t_ab0/quad"  # another sampler goes into the same file, whoever the schedule follows
    assert main(["bench", "samplers", *model, *few, "--output", str(out)]) == 0
    rows = json.loads((out / "samplers.json").read_text())["rows"]
    assert [row["sampler"] for row in rows] == ["fitted", "deis", "t_ab0/quad"]
    beside = ["generate", *model, "--sampler", "fitted", "--steps", "2", "--output", str(tmp_path / "beside")]
    assert main(beside) == 2 and "no fitted schedule lies beside" in capsys.readouterr().err
    without = [*images[:3], *images[3:5], "--num-images", "1", "--output", str(tmp_path / "without")]
    assert main(without) == 0  # the most that it was fitted for
    told = capsys.readouterr()
    assert "1 image of" in told.out and "was fitted to" not in told.err
    shutil.copytree(tmp_path / "m", tmp_path / "other")
    assert main(["generate", "--model", str(tmp_path / "other"), *without[3:-1], str(tmp_path / "of other")]) == 0
    assert f"was fitted to {tmp_path / 'm'}, not to {tmp_path / 'other'}" in capsys.readouterr().err
    shutil.copytree(folder, tmp_path / "m" / "fitted")
    assert main([*beside, "--num-images", "1"]) == 0
    shutil.copytree(tmp_path / "m", tmp_path / "q", ignore=shutil.ignore_patterns("fitted"))
    (tmp_path / "q" / RECORD).write_text(json.dumps({"model": str(tmp_path / "m")}))  # as if quantized from it
    assert (
        main(["generate", "--model", str(tmp_path / "q"), *beside[3:-1], str(tmp_path / "of q"), "--num-images", "1"])
        == 0
    )
    config["origin"]["model"] = "another"
    (folder / "scheduler_config.json").write_text(json.dumps(config))
    assert main(["bench", "samplers", *model, *few, *fitted, "--output", str(out)]) == 2
    assert "fitted with other settings" in capsys.readouterr().err
    assert main(["bench", "samplers", *model, *few, "--teacher", "x", "--output", str(out)]) == 2


@pytest.mark.parametrize("name", ["unet-cifar10", "dit-cifar10", "flow-dit-cifar10"])
def test_the_schedules_of_the_embedded_models(name):
    """Fitted to it for 4 to 8 evaluations; with 4 they come nearer to 20 than the default sampler does."""
    pipe = ptq4dm.load_reference(name)
    config, images = pipe.scheduler.config, {}
    scheduler = make_sampler(str(folder_of(name) / "fitted"), config)
    assert scheduler.fitted_for == [4, 5, 6, 8] and scheduler.config.origin["model"] == name
    for way, steps in (("fitted", 4), ("deis", 4), ("deis", 20)):
        pipe.scheduler = scheduler if way == "fitted" else make_sampler(way, config)
        images[way, steps] = ptq4dm.sample(pipe, range(2), num_inference_steps=steps)
    near, far = ((images[way, 4] - images["deis", 20]).norm() for way in ("fitted", "deis"))
    assert near < 0.8 * far


def test_wrong_settings_are_told(mixture):
    with pytest.raises(UserError, match="fewer than the teacher's"):
        FitConfig(evaluations=[60])
    with pytest.raises(UserError, match="several evaluations a step"):
        fit(pipeline(mixture), FitConfig(evaluations=[2], teacher="rho_rk", teacher_steps=6, num_trajectories=2))

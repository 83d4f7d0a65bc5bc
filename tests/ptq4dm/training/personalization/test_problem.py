"""What losses are of: the schedule, rows of tables, calls of a pipeline's network; and common random numbers."""

import copy

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, EDMEulerScheduler, FlowMatchEulerDiscreteScheduler
from diffusers.utils import logging

import personal
from helpers import normal
from ptq4dm.errors import UserError
from ptq4dm.samplers import DEISScheduler
from ptq4dm.training.personalization.config import PersonalizeConfig
from ptq4dm.training.personalization.pictures import learned_from, pictures_of
from ptq4dm.training.personalization.problem import Problem, ready
from ptq4dm.training.personalization.targets import class_target, token_target
from ptq4dm.training.personalization.zeroth_order import Tuned, change, gradient, take
from ptq4dm.training.schedule import schedule_of

pytestmark = pytest.mark.usefixtures("one_thread")
logging.set_verbosity_error()


def problem_of(pipe, target, **settings):
    config = PersonalizeConfig(**{"batch_size": 3, "perturbations": 2} | settings)
    pictures = learned_from(pipe, list(personal.pictures(2, *(16, 16) if hasattr(pipe, "vae") else (8, 8))))
    return Problem(target, pictures, schedule_of(pipe, torch.device("cpu")), config)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_noise_and_aim_are_those_of_diffusers(prediction):
    pipe = personal.classes()
    pipe.scheduler = DDPMScheduler(prediction_type=prediction)
    schedule = schedule_of(pipe, torch.device("cpu"))
    x, noise, t = normal(4, 3, 8, 8), normal(4, 3, 8, 8, seed=1), torch.tensor([0, 10, 500, 999])
    torch.testing.assert_close(schedule.noisy(x, noise, t), pipe.scheduler.add_noise(x, noise, t))
    wanted = {"epsilon": noise, "sample": x, "v_prediction": pipe.scheduler.get_velocity(x, noise, t)}
    torch.testing.assert_close(schedule.target(x, noise, t), wanted[prediction])


def test_timesteps_are_those_of_the_range_and_of_no_other():
    pipe = personal.classes()
    problem = problem_of(pipe, class_target(pipe, 1), first_time=0.5, last_time=0.9, batch_size=64)
    assert problem.schedule.times(0.5, 0.9) == (500, 900)
    assert problem.schedule.times() == (100, 500)
    assert schedule_of(personal.text(), torch.device("cpu")).times() == (500, 900)
    assert problem.schedule.times(0.9999, 1.0) == (999, 1000)
    assert problem.schedule.times(0.5, 0.5004) == (500, 501)
    t = torch.cat([problem.draw("step", k).t for k in range(40)])
    assert 500 <= int(t.min()) < 515 and 885 < int(t.max()) < 900
    fixed = problem.fixed().t
    assert int(fixed[0]) == 500 and int(fixed[-1]) < 900 and len(set(fixed.tolist())) == len(fixed)


@pytest.mark.parametrize("ours", [False, True])
def test_a_flow_goes_straight_from_images_to_noise(ours):
    pipe = personal.classes()
    pipe.scheduler = DEISScheduler(prediction_type="flow_prediction") if ours else FlowMatchEulerDiscreteScheduler()
    schedule = schedule_of(pipe, torch.device("cpu"))
    x, noise, t = normal(4, 3, 8, 8), normal(4, 3, 8, 8, seed=1), torch.tensor([0, 10, 500, 999])
    told = schedule.told[t]
    torch.testing.assert_close(schedule.noisy(x, noise, t), pipe.scheduler.scale_noise(x, told, noise))
    # From pure noise one step of the scheduler with the target leads to the image.
    pipe.scheduler.set_timesteps(1)
    step = pipe.scheduler.step(schedule.target(x, noise, t), pipe.scheduler.timesteps[0], noise).prev_sample
    torch.testing.assert_close(step, x, atol=1e-5, rtol=1e-5)


def test_the_range_of_a_flow_has_the_noise_of_stable_diffusion():
    pipe = personal.classes()
    pipe.scheduler = FlowMatchEulerDiscreteScheduler()
    flow = schedule_of(pipe, torch.device("cpu"))
    pipe.scheduler = DDIMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
    theirs = schedule_of(pipe, torch.device("cpu"))
    assert flow.times(0, 1) == (0, 1000)
    for k, t in zip((0, 1), (500, 900), strict=True):
        own = flow.times(0.5, 0.9)[k]
        ratio = float(flow.sigma[own] / flow.alpha[own])
        assert ratio == pytest.approx(float(theirs.sigma[t] / theirs.alpha[t]), rel=0.02)


def test_a_model_with_noise_levels_alone_is_refused():
    pipe = personal.classes()
    pipe.scheduler = EDMEulerScheduler()
    with pytest.raises(UserError, match="alpha_bar at whole timesteps"):
        schedule_of(pipe, torch.device("cpu"))


def test_each_sample_has_its_own_row_and_the_tables_stay():
    pipe = personal.classes()
    target = class_target(pipe, 3)
    before = copy.deepcopy(pipe.transformer.state_dict())
    u = target.start + normal(4, len(target.start), seed=2)
    x, t = normal(4, 3, 8, 8), torch.tensor([5, 100, 500, 900])
    with torch.no_grad():
        with target.tables.given(u):
            together = target.predict(x, t, [0] * 4)
        alone = []
        for k in range(4):
            for table, row in zip(target.tables.tables, target.tables.rows(u[k]), strict=True):
                table.weight[3] = row
            alone.append(pipe.transformer(x[k : k + 1], t[k : k + 1], torch.tensor([3])).sample)
    torch.testing.assert_close(together, torch.cat(alone))
    pipe.transformer.load_state_dict(before)
    with torch.no_grad(), target.tables.given(u):  # another class is as it was
        other = pipe.transformer(x, t, torch.tensor([1, 1, 1, 1])).sample
    with torch.no_grad():
        torch.testing.assert_close(other, pipe.transformer(x, t, torch.tensor([1, 1, 1, 1])).sample)


def test_a_table_that_is_not_looked_up_in_is_told():
    pipe = personal.classes()
    target = class_target(pipe, 3)
    with pytest.raises(UserError, match="looks nothing up"), target.tables.given(target.start[None]):
        pass
    with pytest.raises(UserError, match="not found once"), torch.no_grad(), target.tables.given(target.start[None]):
        pipe.transformer(normal(1, 3, 8, 8), torch.tensor([5]), torch.tensor([4]))


def test_tables_that_share_a_weight_are_one():
    """T5 looks up in another module than the one that it names as its embeddings."""
    pipe = personal.text()
    shared = pipe.text_encoder.get_input_embeddings()
    pipe.text_encoder.other = torch.nn.Embedding(*shared.weight.shape, _weight=torch.zeros_like(shared.weight))
    names = token_target(pipe, "<dog>", "dog").tables.tables[0].names
    pipe.text_encoder.other.weight = shared.weight
    assert len(names) == 1
    assert set(token_target(pipe, "<dog>", "dog").tables.tables[0].names) == {*names, "other"}


def test_a_class_starts_at_the_row_of_no_class_where_there_is_one():
    pipe = personal.classes()
    table = pipe.transformer.transformer_blocks[1].norm1.emb.class_embedder.embedding_table
    null = class_target(pipe, 9)
    torch.testing.assert_close(null.tables.rows(null.start)[1], table.weight[10])
    assert null.facts["init"] == "null" == class_target(pipe, 9, "null").facts["init"]
    for block in pipe.transformer.transformer_blocks:  # as models have it that were trained without guidance
        block.norm1.emb.class_embedder.embedding_table = torch.nn.Embedding(10, 16)
    assert class_target(pipe, 9).facts["init"] == "mean"
    with pytest.raises(UserError, match="has no row of no class"):
        class_target(pipe, 9, "null")


def test_the_start_of_a_class_is_the_mean_of_the_others_or_another_class():
    pipe = personal.classes()
    table = pipe.transformer.transformer_blocks[1].norm1.emb.class_embedder.embedding_table.weight
    mean = class_target(pipe, 9, "mean")
    torch.testing.assert_close(mean.tables.rows(mean.start)[1], table[:9].mean(0))
    four = class_target(pipe, 9, "4")
    torch.testing.assert_close(four.tables.rows(four.start)[1], table[4])


def test_a_prompt_reaches_the_network_as_the_pipeline_embeds_it():
    pipe = personal.text()
    target = token_target(pipe, "<dog>", "dog", ["a photo of {}", "{} in the picture"])
    x, t = normal(3, 4, 8, 8), torch.tensor([5, 100, 900])
    u = target.start + normal(3, 32, seed=1)
    with ready(pipe):
        with target.tables.given(u):
            found = target.predict(x, t, [0, 1, 2])
        table, wanted = target.tables.tables[0], []
        for k, prompt in enumerate(["a photo of dog", "dog in the picture", "a photo of dog"]):
            kept = table.weight[table.index].clone()
            table.weight[table.index] = target.tables.rows(u[k])[0]
            words = pipe.encode_prompt(prompt, torch.device("cpu"), 1, False)[0]
            table.weight[table.index] = kept
            wanted.append(pipe.unet(x[k : k + 1], t[k], words).sample)
    torch.testing.assert_close(found, torch.cat(wanted))


def test_perturbations_share_noise_and_timestep_with_the_embedding_itself():
    pipe = personal.classes()
    problem = problem_of(pipe, class_target(pipe, 1))
    u, draw = problem.target.start, problem.draw("step", 0)
    with ready(pipe):
        losses, directions = problem.pairs(u, draw)
        for k in range(3):
            for i in range(3):
                one = u if i == 0 else u + problem.config.perturbation * draw.directions[k, i - 1]
                alone = problem.losses(one[None], draw.images[k : k + 1], draw.t[k : k + 1], draw.noise[k : k + 1])
                torch.testing.assert_close(losses[k, i], alone[0])
    torch.testing.assert_close(directions, draw.directions, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("most", [1, 4, 9])
def test_rows_of_a_pass_change_no_figure(most):
    pipe = personal.classes()
    whole, parts = (problem_of(pipe, class_target(pipe, 1), forward_batch=n) for n in (None, most))
    with ready(pipe):
        for one, other in zip(*(p.pairs(p.target.start, p.draw("step", 0)) for p in (whole, parts)), strict=True):
            torch.testing.assert_close(one, other)


def test_estimates_follow_the_gradient():
    """On a smooth model in float64 slopes are directional derivatives."""
    pipe = personal.classes()
    pipe.transformer.double()
    problem = problem_of(pipe, class_target(pipe, 1), perturbation=1e-3, perturbations=4)
    u, draw = problem.target.start, problem.draw("step", 0)
    with ready(pipe):
        losses, directions = problem.pairs(u, draw)
    rows = u.expand(3, -1).clone().requires_grad_()
    with torch.enable_grad():
        problem.errors(rows, draw.images, draw.t, draw.noise).sum().backward()
    slopes = torch.einsum("bnd,bd->bn", directions, rows.grad)
    assert float(slopes.abs().max()) > 1e-4
    torch.testing.assert_close((losses[:, 1:] - losses[:, :1]) / 1e-3, slopes, rtol=0.05, atol=2e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_model_in_16_bits_does_not_make_the_embedding_drift(dtype):
    """The released code adds and takes away perturbations in the model's own 16 bits; ours reads a float32 master."""
    pipe = personal.classes()
    pipe.transformer.to(dtype)
    problem = problem_of(pipe, class_target(pipe, 1))
    state, table = Tuned.start(problem.target.start), problem.target.tables.tables[0].weight.clone()
    with ready(pipe):
        for _ in range(5):
            losses, directions = problem.pairs(state.u, problem.draw("step", state.step))
            still = change(state, gradient(losses, directions, problem.config), problem.config)
            take(state, torch.zeros_like(still), problem.config)
    assert state.u.dtype == torch.float32 and torch.equal(state.u, problem.target.start)
    assert torch.equal(problem.target.tables.tables[0].weight, table)
    tables = problem.target.tables
    given = tables.rounded(state.u + problem.config.perturbation * problem.draw("step", 4).directions)
    torch.testing.assert_close(directions, (given - tables.rounded(state.u)) / problem.config.perturbation)
    assert not torch.equal(directions, problem.draw("step", 4).directions)  # but what was really added


def test_random_choices_are_of_seed_and_step_alone():
    """The released code seeds the generator of the process with each perturbation's own seed."""
    pipe = personal.classes()
    torch.manual_seed(1)
    problem = problem_of(pipe, class_target(pipe, 1))
    before = torch.get_rng_state()
    one = problem.draw("step", 7)
    problem.fixed()
    with ready(pipe):
        problem.pairs(problem.target.start, one)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    again = problem_of(pipe, class_target(pipe, 1)).draw("step", 7)
    assert one.images == again.images and torch.equal(one.noise, again.noise)
    assert torch.equal(one.directions, again.directions)
    other = problem_of(pipe, class_target(pipe, 1), seed=1).draw("step", 7)
    for found in (other, problem.draw("step", 8)):
        assert not torch.equal(found.noise, one.noise) and not torch.equal(found.directions, one.directions)
    assert len({float(problem.draw("step", k).noise[0, 0, 0, 0]) for k in range(30)}) == 30


def test_text_draws_from_no_generator_of_the_process():
    pipe = personal.text()
    problem = problem_of(pipe, token_target(pipe, "<dog>", "dog"))
    before = torch.get_rng_state()
    with ready(pipe):
        problem.pairs(problem.target.start, problem.draw("step", 0))
    assert torch.equal(torch.get_rng_state(), before)


def test_pictures_are_cut_to_the_middle_and_resized():
    pipe = personal.classes()
    wide = torch.zeros(1, 3, 16, 48, dtype=torch.uint8)
    wide[..., 16:32] = 200
    found = learned_from(pipe, pictures_of(wide))
    assert found.shape == (1, 3, 8, 8)
    torch.testing.assert_close(found, torch.full_like(found, 200 / 127.5 - 1))
    same = personal.pictures(2)
    torch.testing.assert_close(learned_from(pipe, list(same)), same.float() / 127.5 - 1)


def test_latents_are_scaled_means_of_the_vae():
    pipe = personal.text()
    pictures = personal.pictures(2, 16, 16)
    with torch.no_grad():
        wanted = pipe.vae.encode(pictures.float() / 127.5 - 1).latent_dist.mode() * pipe.vae.config.scaling_factor
    torch.testing.assert_close(learned_from(pipe, list(pictures)), wanted)


def test_a_scheduler_keeps_its_steps():
    """The pipeline that tells the network's call sets its scheduler's timesteps; nobody's own are lost by it."""
    pipe = personal.text()
    pipe.scheduler = DDIMScheduler(clip_sample=False)
    pipe.scheduler.set_timesteps(7)
    problem = problem_of(pipe, token_target(pipe, "<dog>", "dog"))
    with ready(pipe):
        problem.pairs(problem.target.start, problem.draw("step", 0))
    assert isinstance(pipe.scheduler, DDIMScheduler)

"""Plans of cached steps: the search against all ways there are, what trajectories tell, and the file."""

import itertools
import json
from dataclasses import replace

import diffusers
import numpy as np
import pytest
import torch

import models
import ptq4dm
from ptq4dm import DamagedFile, StepPlan, StepPlanConfig, UserError
from ptq4dm.caching.plan_steps import Measured, measured
from ptq4dm.caching.step_ends import PUSH, Ends, Finished
from ptq4dm.caching.step_plan import even_steps, plain_plan
from ptq4dm.caching.step_search import Costs, alike, best_steps, best_weights
from ptq4dm.samplers import DEISScheduler

pytestmark = pytest.mark.usefixtures("one_thread")


# ------------------------------------------------------------------------------------------------- the search


def walk(count=8, seed=0):
    """Products of a deep part that wanders, and factors."""
    rng = np.random.default_rng(seed)
    deep = rng.normal(size=(count, 40)).cumsum(0) + 10
    return deep @ deep.T, rng.uniform(0.5, 2, count)


@pytest.mark.parametrize("history", [1, 2, 3])
@pytest.mark.parametrize("computed", [1, 3, 5, 8])
def test_the_search_finds_the_best_of_all_ways(computed, history):
    products, factors = walk()
    costs, count = Costs(products, factors), len(factors)

    def total(steps):
        rest = [k for k in range(count) if k not in steps]
        return sum(costs.of(tuple([c for c in steps if c < k][::-1][:history]), k) for k in rest)

    every = [(0, *some) for some in itertools.combinations(range(1, count), computed - 1)]
    right = min(every, key=total)
    steps, error = best_steps(costs, computed, history, longest=count)
    assert steps == right and error == pytest.approx(total(right))
    if 1 < computed < count:
        assert total(even_steps(count, computed)) > error


def test_no_run_of_reuse_is_longer_than_asked():
    steps, _ = best_steps(Costs(*walk()), 4, 2, longest=1)
    assert steps == (0, 2, 4, 6) or max(np.diff([*steps, 8])) <= 2
    assert best_steps(Costs(*walk()), 2, 2, longest=1) == ((), np.inf)


def test_weights_continue_a_straight_line():
    deep = np.random.default_rng(0).normal(size=(2, 50))
    line = np.stack([deep[0] + k * deep[1] for k in range(6)])
    weights, left = best_weights(line @ line.T, [3, 1], 5)
    np.testing.assert_allclose(weights, [2, -1], atol=1e-3)
    assert left < 1e-3 * (line[5] @ line[5])
    _, plain = best_weights(line @ line.T, [3], 5)
    assert plain > 100 * left


def test_evaluations_of_another_network_are_never_reused():
    products, factors = walk()
    products[:4, 4:] = products[4:, :4] = np.nan  # as where another network takes over
    steps, _ = best_steps(Costs(products, factors), 4, 2, longest=8)
    assert 4 in steps or 5 in steps
    assert all(np.isfinite(Costs(products, factors).of((c,), c + 1)) for c in (0, 1, 2, 4, 5))
    assert not np.isfinite(Costs(products, factors).of((3,), 4))


def test_a_sum_ends_where_calls_have_other_shapes():
    """As where guidance begins: what was kept before it has another batch."""
    products, factors = walk()
    products[:3, 3:] = products[3:, :3] = np.nan
    costs = Costs(products, factors)
    assert (
        alike(products, (4, 3, 2), 5) == (4, 3)
        and alike(products, (2, 1), 5) == ()
        and alike(products, (1,), 2) == (1,)
    )
    assert costs.of((4, 3, 2), 5) == costs.of((4, 3), 5)
    plan = Measured(0, tuple(range(len(factors))), products, factors, np.ones(len(factors))).plan(0.25, 3)
    assert all(len(row) <= k - 3 for k, row in enumerate(plan.weights) if k >= 3 and row)


# ------------------------------------------------------------------------------------------------- what is measured


@pytest.mark.parametrize(
    "scheduler",
    [DEISScheduler(), diffusers.DDIMScheduler(), diffusers.DDPMScheduler(clip_sample=False),
     diffusers.UniPCMultistepScheduler(),
     diffusers.FlowMatchEulerDiscreteScheduler(), diffusers.EulerAncestralDiscreteScheduler()],
    ids=lambda one: type(one).__name__,
)  # fmt: skip
def test_how_far_an_output_moves_the_end_is_what_the_scheduler_does(scheduler):
    """Against a loop that pushes one output of six, small enough for DDIM's clipping."""

    def run(pushed=None):
        generator = torch.Generator().manual_seed(0)
        scheduler.set_timesteps(6)
        x, outputs = torch.zeros(1, 1, 4, 4), 1e-3 * torch.randn(6, 1, 1, 4, 4, generator=generator)
        takes = "generator" in type(scheduler).step.__code__.co_varnames
        for k, t in enumerate(scheduler.timesteps):
            more = {"generator": generator} if takes else {}
            output = outputs[k] + PUSH * (k == pushed)
            x = scheduler.step(output, t, x, return_dict=False, **more)[0]
        return x

    plain = run()
    right = [float(((run(k) - plain) / PUSH).mean().abs()) for k in range(6)]
    ends = Ends()
    with pytest.raises(Finished), ends.watching(scheduler):
        run()
    np.testing.assert_allclose(ends.moved(), right, rtol=2e-2, atol=1e-3 * max(right))


@pytest.fixture(scope="module")
def flow():
    pipe = ptq4dm.load_reference("flow-dit-cifar10")
    pipe.scheduler = DEISScheduler.from_config(pipe.scheduler.config)
    return pipe


def test_a_plan_comes_nearer_than_random_ones(flow):
    """Eight evaluations of the embedded model, on seeds that the plan has not seen."""
    found = measured(flow, StepPlanConfig(num_inference_steps=8, num_samples=4, batch_size=2), None, None)
    right = ptq4dm.sample(flow, range(2), num_inference_steps=8)

    def error(plan):
        with ptq4dm.cached_steps(flow, plan) as cache:
            images = ptq4dm.sample(flow, range(2), num_inference_steps=8)
        assert cache.computed == 5 and cache.unplanned == 0
        return (images - right).square().mean().sqrt().item()

    plan = found.plan(0.375, 2)
    assert len(plan.computed) == 5 and plan.error > 0 and plan.times == tuple(map(float, flow.scheduler.timesteps))
    planned = error(plan)
    drawn = [found.with_steps(steps, 2) for steps in ((0, 1, 4, 6, 7), (0, 3, 4, 5, 6), (0, 2, 5, 6, 7))]
    assert planned < 0.7 * min(map(error, drawn))
    assert planned < 1.1 * error(found.with_steps(even_steps(8, 5), 2))  # which is as good here
    assert planned < 0.85 * error(plain_plan(8, plan.computed, plan.depth))  # and the weights count, too


def test_the_same_seeds_give_the_same_plan_and_leave_the_pipeline_as_it_was():
    pipe = diffusers.DDPMPipeline(models.unet(), DEISScheduler())
    config = StepPlanConfig(num_inference_steps=6, reuse=0.5, num_samples=3, batch_size=2)
    before = ptq4dm.sample(pipe, [0], num_inference_steps=6)
    plan = ptq4dm.plan_cached_steps(pipe, config)
    assert plan == ptq4dm.plan_cached_steps(pipe, config) and len(plan.computed) == 3
    assert torch.equal(ptq4dm.sample(pipe, [0], num_inference_steps=6), before)
    assert "step" not in vars(pipe.scheduler) and "forward" not in vars(pipe.unet)
    assert not any("_compiled_call_impl" in vars(module) for module in pipe.unet.modules())
    with ptq4dm.cached_steps(pipe, plan) as cache:
        ptq4dm.sample(pipe, [0, 1], num_inference_steps=6)
    assert (cache.computed, cache.reused) == (3, 3)


def test_a_guidance_interval_is_planned_around():
    """Guided and unguided calls have tensors of different shapes: none is planned to reuse the other kind's."""
    pipe = diffusers.DiTPipeline(
        models.dit(num_layers=4, num_embeds_ada_norm=1000),
        diffusers.AutoencoderKL(block_out_channels=(4,), norm_num_groups=1),
        diffusers.DDIMScheduler(),
    )
    more = {"conditioning": {"class_labels": [1, 2]}, "pipeline_kwargs": {"guidance_interval": (0.3, 0.7)}}
    config = StepPlanConfig(num_inference_steps=8, reuse=0.25, num_samples=2, batch_size=2, history=1)
    plan = ptq4dm.plan_cached_steps(pipe, config, **more)
    guided = [300 <= t <= 700 for t in plan.times]
    reusing = [k for k in range(8) if plan.sources(k)]
    assert len(reusing) == 2 and 0 < sum(guided) < 8
    assert all(guided[plan.sources(k)[0]] == guided[k] for k in reusing)


# ------------------------------------------------------------------------------------------------- the file


def test_a_plan_is_the_same_after_saving(tmp_path):
    plan = StepPlan(weights=((), (), (1.5, -0.5)), depth=2, times=(900.0, 500.0, 1.0), error=0.25, origin={"seed": 1})
    plan.save(tmp_path / "deep" / "plan.json")
    assert StepPlan.load(tmp_path / "deep" / "plan.json") == plan
    assert plan.computed == (0, 1) and plan.sources(2) == [1, 0] and plan.sources(1) == [] and plan.history == 2


@pytest.mark.parametrize(
    "change",
    [{"weights": [[1.0]]}, {"weights": []}, {"weights": [[], "a"]}, {"weights": [[], [float("nan")]]}, {"depth": -1},
     {"times": [1.0]}, {"other": 1}, {"weights": [[], [1.0, 1.0]]}, {"depth": "1"}, {"times": ["a", "b"]}],
)  # fmt: skip
def test_a_damaged_plan_is_refused_by_name(change, tmp_path):
    path = tmp_path / "plan.json"
    plain_plan(2, [0], 1).save(path)
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(DamagedFile, match="plan.json"):
        StepPlan.load(path)


def test_wrong_plans_are_refused_in_one_sentence():
    with pytest.raises(UserError, match="evaluation 1 has 2 weights, and 1 were computed"):
        StepPlan(weights=((), (1.0, 1.0)))
    with pytest.raises(UserError, match="1 times for 2 evaluations"):
        StepPlan(weights=((), (1.0,)), times=(1.0,))
    pipe = diffusers.DDPMPipeline(models.unet(), DEISScheduler())
    with pytest.raises(UserError, match="reuse"):
        StepPlanConfig(reuse=0.95)
    with pytest.raises(UserError, match="can be cut at a depth"):
        ptq4dm.plan_cached_steps(pipe, StepPlanConfig(depth=50, num_inference_steps=3))


@pytest.mark.parametrize(("steps", "reuse"), [(20, 0.0), (1, 0.5), (4, 0.2)])
def test_a_share_of_no_evaluation_is_refused_before_any_work(steps, reuse):
    pipe = diffusers.DDPMPipeline(models.unet(), DEISScheduler())
    pipe.unet.forward = None  # nothing is called
    with pytest.raises(UserError, match="is less than one, so that nothing would be reused"):
        ptq4dm.plan_cached_steps(pipe, StepPlanConfig(num_inference_steps=steps, reuse=reuse))


def test_a_sampler_with_other_times_is_told():
    """A shift that follows from the size of the picture moves them, whereas the scheduler's config is the same."""
    pipe = ptq4dm.PixelDiTPipeline(models.pixel_dit(num_layers=3), DEISScheduler(solver="t_ab", order=0))
    plan = ptq4dm.plan_cached_steps(pipe, StepPlanConfig(num_inference_steps=4, reuse=0.25, num_samples=2))
    other = replace(plan, times=tuple(0.9 * t for t in plan.times))
    for one, told in ((plan, False), (other, True), (replace(plan, times=()), False)):
        with ptq4dm.cached_steps(pipe, one) as cache:
            for _ in range(2):
                ptq4dm.sample(pipe, [0], num_inference_steps=4)
        assert (str(cache).count("other times of the sampler") == 1) is told

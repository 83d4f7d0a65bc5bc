"""Steps that reuse a deep part: what they compute, what they leave out, and never what is of another call."""

import copy
import pickle
import threading

import diffusers
import pytest
import torch
from torch.utils import _pytree as pytree

import denoisers
import models
import ptq4dm
from ptq4dm import StepPlan, UserError
from ptq4dm.caching.cut import cut
from ptq4dm.caching.deep_part import DeepPart, Kept
from ptq4dm.caching.step_plan import plain_plan
from ptq4dm.hooks import hooked
from ptq4dm.inference.graphs import Graphed
from ptq4dm.samplers import DEISScheduler
from traced_graphs import TracedGraphs

pytestmark = pytest.mark.usefixtures("one_thread")
WEIGHTS = ((), (), (1.5, -0.5), (), (2.0, -1.0), (2.5, -1.5))  # of six evaluations, three of them computed
PLAN = StepPlan(weights=WEIGHTS, depth=1)
UNETS = {"unet": models.unet, "conditional": models.conditional_unet, "plain": models.plain_unet}


def ddpm(model=None):
    pipe = diffusers.DDPMPipeline(model or models.unet(), DEISScheduler())
    pipe.set_progress_bar_config(disable=True)
    return pipe


def dit_pipe():
    return ptq4dm.PixelDiTPipeline(models.pixel_dit(num_layers=5), DEISScheduler())


def images(pipe, seeds=(0, 1), steps=6, **more):
    return ptq4dm.sample(pipe, list(seeds), num_inference_steps=steps, **more)


def by_hooks(pipe, plan, sampled):
    """The same by hooks on a model that computes everything: the last module of the deep part gives what is due."""
    model = pipe.unet if hasattr(pipe, "unet") else pipe.transformer
    deep = cut(model, plan.depth)
    before, state = [], {"step": 0, "input": None}

    def entered(module, args, kwargs):
        state["input"] = args[0] if args else kwargs["hidden_states"]

    def left(module, args, kwargs, output):
        row = plan.weights[state["step"]]
        base = state["input"] if deep.adds else 0
        state["step"] += 1
        if not row:
            before.insert(0, output - base)
            return None
        return base + sum(w * one for w, one in zip(row, before, strict=False))

    with hooked(model, before={deep.units[0]: entered}, after={deep.units[-1]: left}):
        return sampled(pipe)


# ------------------------------------------------------------------------------------------------- what it computes


@pytest.mark.parametrize("kind", [*UNETS, "dit"])
def test_a_network_is_itself_with_its_own_deep_part_at_every_depth(kind):
    model = models.pixel_dit(num_layers=5) if kind == "dit" else UNETS[kind](layers_per_block=2)
    channels = model.config.in_channels
    x = torch.randn(2, channels, 8, 8)
    more = {"encoder_hidden_states": torch.randn(2, 3, 12)} if kind == "conditional" else {}
    more |= {"class_labels": torch.tensor([1, 2])} if kind == "dit" else {}
    for depth in range(cut(model, 0).deepest + 1):
        part, kept, ran = DeepPart(model, cut(model, depth)), Kept(), []
        with torch.no_grad(), part.put_in():
            right = part.computed(kept, 0, lambda: model(x, torch.tensor([5, 9]), **more).sample)
            counting = {name: lambda *_, ran=ran: ran.append(1) for name in part.cut.units}
            with hooked(model, before=counting):
                found = part.reused(kept, [1.0], lambda: model(x, torch.tensor([5, 9]), **more).sample)
        assert not ran, depth
        torch.testing.assert_close(found, right, rtol=1e-4, atol=1e-5)
    with pytest.raises(UserError, match="can be cut at a depth from 0 to"):
        cut(model, depth + 1)


@pytest.mark.parametrize("history", [1, 3])
def test_a_shallow_layer_is_given_its_input_in_the_order_that_it_had_in_memory(history):
    """Kernels that take channels last would have to turn it around first."""
    model = models.unet().to(memory_format=torch.channels_last)
    part, kept, given = DeepPart(model, cut(model, 0), history), Kept(), []
    x = torch.randn(2, 3, 8, 8).contiguous(memory_format=torch.channels_last)
    count = len(model.up_blocks) - 1, len(model.up_blocks[-1].resnets) - 1
    layer = "up_blocks.{}.resnets.{}".format(*count)
    with torch.no_grad(), part.put_in(), hooked(model, before={layer: lambda _, args, kwargs: given.append(args[0])}):
        part.computed(kept, 0, lambda: model(x, 5))
        part.reused(kept, [1.0], lambda: model(x, 5))
    assert torch.equal(*given) and given[0].stride() == given[1].stride()
    assert given[0].is_contiguous(memory_format=torch.channels_last)


def test_a_unet_with_the_residuals_of_a_controlnet_reuses_too():
    """They are added to what stands for the layers that are left out."""
    model, x, text = models.conditional_unet(), torch.randn(2, 4, 8, 8), torch.randn(2, 3, 12)
    control = diffusers.ControlNetModel.from_unet(model)
    with torch.no_grad():
        down, middle = control(x, 5, text, controlnet_cond=torch.randn(2, 3, 64, 64), return_dict=False)
    more = dict(
        down_block_additional_residuals=[torch.randn_like(one) for one in down],
        mid_block_additional_residual=torch.randn_like(middle),
    )
    for depth in range(cut(model, 0).deepest + 1):
        part, kept = DeepPart(model, cut(model, depth)), Kept()
        with torch.no_grad(), part.put_in():
            right = part.computed(kept, 0, lambda: model(x, 5, text, **more).sample)
            found = part.reused(kept, [1.0], lambda: model(x, 5, text, **more).sample)
        torch.testing.assert_close(found, right, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("make", [ddpm, dit_pipe])
def test_reuse_is_the_weighed_sum_of_what_the_deep_part_gave(make):
    pipe = make()
    right = by_hooks(pipe, PLAN, images)
    with ptq4dm.cached_steps(pipe, PLAN) as cache:
        found = images(pipe)
    torch.testing.assert_close(found, right, rtol=0, atol=2e-5)
    assert (cache.computed, cache.reused, cache.unplanned) == (3, 3, 0) and cache.most_bytes > 0
    assert "3 computed, 3 reused" in str(cache)
    assert (found - images(pipe)).abs().max() > 1e-4  # and it does change pictures


@pytest.mark.parametrize("make", [ddpm, dit_pipe])
def test_pictures_are_the_same_to_the_bit_where_all_is_computed_and_after_the_block(make):
    pipe = make()
    right = images(pipe)
    with ptq4dm.cached_steps(pipe, plain_plan(6, range(6), 1)):
        assert torch.equal(images(pipe), right)
    with ptq4dm.cached_steps(pipe, PLAN):
        images(pipe)
    assert torch.equal(images(pipe), right)
    model = pipe.unet if hasattr(pipe, "unet") else pipe.transformer
    assert not any("_compiled_call_impl" in vars(m) or "forward" in vars(m) for m in model.modules())
    assert "step" not in vars(pipe.scheduler)


@pytest.mark.parametrize("fused", [False, True])
def test_quantized_models_reuse_alike(fused, quantized_unet):
    pipe = ddpm(copy.deepcopy(quantized_unet))
    if fused:
        assert ptq4dm.fuse(pipe)
    right = by_hooks(pipe, PLAN, images)
    with ptq4dm.cached_steps(pipe, PLAN):
        torch.testing.assert_close(images(pipe), right, rtol=0, atol=2e-3)


@pytest.fixture(scope="module")
def quantized_unet():
    pipe = diffusers.DDPMPipeline(models.unet(), diffusers.DDIMScheduler())
    store = ptq4dm.collect(pipe, ptq4dm.CalibrationConfig(num_samples=2, num_inference_steps=2, num_bins=1))
    ptq4dm.quantize(pipe, ptq4dm.PTQ4DMConfig(), store)
    return pipe.unet


def test_a_block_that_was_compiled_stays_so():
    pipe, ran = dit_pipe(), []
    for block in pipe.transformer.transformer_blocks:
        block._compiled_call_impl = lambda *a, block=block, **k: ran.append(block) or block._call_impl(*a, **k)
    with ptq4dm.cached_steps(pipe, PLAN):
        images(pipe)
    assert len(ran) == 3 * 5 + 3 * 2  # all blocks, or the first and the last
    assert all("_compiled_call_impl" in vars(block) for block in pipe.transformer.transformer_blocks)


# -------------------------------------------------------------------------------------------- never of another call


def test_each_call_of_the_pipeline_is_as_in_a_block_of_its_own():
    def alone(**how):
        with ptq4dm.cached_steps(pipe, PLAN):
            return images(pipe, **how)

    pipe = ddpm()
    cases = [{"seeds": (0, 1)}, {"seeds": (5, 6)}, {"seeds": (2,)}, {"seeds": (0, 1)}]
    right = [alone(**case) for case in cases]
    with ptq4dm.cached_steps(pipe, PLAN) as cache:
        assert all(torch.equal(images(pipe, **case), one) for case, one in zip(cases, right, strict=True))
    assert cache.unplanned == 0


def test_a_call_that_was_broken_off_leaves_nothing():
    pipe = ddpm()
    with ptq4dm.cached_steps(pipe, PLAN):
        right = images(pipe)
        with pytest.raises(ZeroDivisionError), hooked(pipe.unet, before={"conv_in": failing(3)}):
            images(pipe, seeds=(8, 9))
        assert torch.equal(images(pipe), right)


def failing(after):
    left = [after]

    def hook(*_):
        left[0] -= 1
        1 / left[0]

    return hook


class Guided(diffusers.DiffusionPipeline):
    """Guided sampling of a text, the halves in one call or each in its own; it may begin in the middle, and change
    the size of its pictures on the way."""

    def __init__(self, unet, scheduler):
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler)

    @torch.no_grad()
    def __call__(self, seed=0, together=True, begin=0, crop=99, steps=6):
        generator = torch.Generator().manual_seed(seed)
        x, text = torch.randn(1, 4, 8, 8, generator=generator), torch.randn(2, 3, 12, generator=generator)
        self.scheduler.set_timesteps(steps)
        for k, t in enumerate(self.scheduler.timesteps[begin:]):
            x = x[..., :4] if k == crop else x
            halves = [(torch.cat([x, x]), text)] if together else [(x, text[:1]), (x, text[1:])]
            found = [self.unet(one, t, encoder_hidden_states=words).sample for one, words in halves]
            without, with_text = torch.cat(found).chunk(2)
            x = self.scheduler.step(without + 3 * (with_text - without), t, x).prev_sample
        return x


def test_the_halves_of_guidance_are_kept_apart():
    pipe = Guided(models.conditional_unet(), diffusers.DDIMScheduler(clip_sample=False))
    with ptq4dm.cached_steps(pipe, PLAN) as cache:
        one = pipe(together=True)
    with ptq4dm.cached_steps(pipe, PLAN) as two_calls:
        torch.testing.assert_close(pipe(together=False), one, rtol=1e-4, atol=1e-4)
    assert (cache.computed, cache.reused) == (3, 3) and (two_calls.computed, two_calls.reused) == (6, 6)


def test_an_image_to_image_begins_in_the_middle_of_the_plan():
    pipe = Guided(models.conditional_unet(), diffusers.DDIMScheduler(clip_sample=False))
    with ptq4dm.cached_steps(pipe, PLAN) as cache:
        pipe(begin=3)
    # 3 computes as planned; 4 and 5 want two deep parts, and there is one: they compute, and 5 has 3's and 4's, not
    # those of the plan
    assert (cache.computed, cache.reused, cache.unplanned) == (3, 0, 2)


def test_tensors_of_another_size_reuse_nothing_of_the_first():
    pipe = Guided(models.conditional_unet(), diffusers.DDIMScheduler(clip_sample=False))
    with ptq4dm.cached_steps(pipe, plain_plan(6, [0, 3], 1)) as cache:
        x = pipe(crop=1)
    assert x.shape[-1] == 4 and x.isfinite().all()
    assert (cache.computed, cache.reused, cache.unplanned) == (4, 2, 2)


def test_a_guidance_interval_goes_with_it():
    pipe = diffusers.DiTPipeline(
        models.dit(num_layers=4, num_embeds_ada_norm=1000),
        diffusers.AutoencoderKL(block_out_channels=(4,), norm_num_groups=1),
        diffusers.DDIMScheduler(),
    )  # fmt: skip
    more = {"conditioning": {"class_labels": [1, 2]}, "pipeline_kwargs": {"guidance_interval": (0.3, 0.6)}}
    with ptq4dm.cached_steps(pipe, plain_plan(6, [0, 3], 1)) as cache:
        assert images(pipe, **more).isfinite().all()
    assert cache.unplanned > 0 and cache.reused > 0  # guided and unguided calls share nothing


def test_other_threads_and_copies_compute_as_ever():
    pipe, found = ddpm(), {}
    x = torch.randn(1, 3, 8, 8)
    with torch.no_grad():
        right = pipe.unet(x, 5).sample

    def elsewhere():
        with torch.no_grad():
            found["thread"] = pipe.unet(x, 5).sample

    def between(*_):
        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join()

    with ptq4dm.cached_steps(pipe, PLAN) as cache, hooked(pipe.unet, before={"conv_in": between}):
        images(pipe)
        other = copy.deepcopy(pipe.unet)
        pickle.dumps(pipe.unet.up_blocks)
    assert torch.equal(found["thread"], right) and cache.reused == 3
    del other.forward  # of the model itself, which a copy takes along
    with torch.no_grad():
        assert torch.equal(other(x, 5).sample, right)


def test_both_kinds_of_calls_have_graphs_of_their_own():
    pipe = ddpm()
    with ptq4dm.cached_steps(pipe, PLAN):
        right = [images(pipe, seeds=(seed,)) for seed in (0, 1, 2)]
    pipe.unet.forward = graphed = Graphed(pipe.unet, TracedGraphs())
    with ptq4dm.cached_steps(pipe, PLAN) as cache:
        for seed, one in zip((0, 1, 2), right, strict=True):
            torch.testing.assert_close(images(pipe, seeds=(seed,)), one, rtol=0, atol=1e-5)
    assert graphed.captures == 2 and graphed.replays == 18 - 2 and cache.reused == 9
    torch.testing.assert_close(images(pipe), images(ddpm()), rtol=0, atol=1e-5)  # none of them serves afterwards


# ------------------------------------------------------------------------------------------------- what is refused


def test_what_cannot_be_served_is_refused_in_one_sentence():
    pipe = ddpm()
    with ptq4dm.cached_steps(pipe, PLAN):
        with pytest.raises(UserError, match="for 6 evaluations, and the sampler has 5"):
            images(pipe, steps=5)
        with pytest.raises(UserError, match="has cached steps already"), ptq4dm.cached_steps(pipe, PLAN):
            pass
        pipe.scheduler.set_timesteps(6)
        with pytest.raises(UserError, match="no_grad"):
            pipe.unet(torch.zeros(1, 3, 8, 8), pipe.scheduler.timesteps[0])
        pipe.unet.is_cache_enabled = True  # by enable_cache of diffusers' transformers
        with pytest.raises(UserError, match="got a cache of diffusers"):
            images(pipe)
        del pipe.unet.is_cache_enabled
        pipe.scheduler = DEISScheduler()
        with pytest.raises(UserError, match="another scheduler"):
            images(pipe)
    deep = StepPlan(weights=WEIGHTS, depth=40)
    with pytest.raises(UserError, match="'unet' can be cut at a depth from 0 to"), ptq4dm.cached_steps(pipe, deep):
        pass
    pipe.unet.forward = lambda *args, **kwargs: models.UNet2DModel  # an engine
    with ptq4dm.cached_steps(pipe, PLAN), pytest.raises(UserError, match="one by one"):
        images(pipe)


def test_a_plan_that_was_made_for_something_else_says_so(quantized_unet):
    plan = ptq4dm.plan_cached_steps(ddpm(), ptq4dm.StepPlanConfig(num_inference_steps=4, num_samples=1))
    others = {
        "": ddpm(),
        "another network (UNet2DModel) and another sampler (DEISScheduler)": dit_pipe(),
        "a network in full precision": ddpm(copy.deepcopy(quantized_unet)),
        "another network (UNet2DModel)": ddpm(models.unet(layers_per_block=2)),
        "another sampler (DEISScheduler)": ddpm(),
    }
    others["another network (UNet2DModel) and another sampler (DEISScheduler)"].scheduler = diffusers.DDIMScheduler()
    others["another sampler (DEISScheduler)"].scheduler = DEISScheduler(solver_order=1)
    for what, pipe in others.items():
        with ptq4dm.cached_steps(pipe, plan) as cache:
            pass
        said = f"its plan was made for {what}: what reuse costs here was not looked at"
        assert str(cache).splitlines()[2:] == ([said] if what else [])
    with ptq4dm.cached_steps(ddpm(), PLAN) as cache:  # it does not say what it is for
        assert not cache.others


def test_a_network_without_a_deep_part_is_refused():
    with pytest.raises(UserError, match="InPlace, has no deep part"):
        cut(models.InPlace(), 1)
    with pytest.raises(UserError, match="has a single block"):
        cut(models.pixel_dit(num_layers=1), 0)


@pytest.mark.parametrize("kind", denoisers.KINDS)
def test_other_denoisers_are_themselves_with_their_own_deep_part(kind):
    torch.manual_seed(0)
    model, shape, arguments = denoisers.KINDS[kind]()
    x, text = torch.randn(2, *shape), torch.randn(2, *denoisers.TEXT)
    part, kept = DeepPart(model.eval(), cut(model, 0)), Kept()

    def call():
        return pytree.tree_leaves(model(x, timestep=torch.tensor([5, 9]), return_dict=False, **arguments(text)))[0]

    with torch.no_grad(), part.put_in():
        right = part.computed(kept, 0, call)
        torch.testing.assert_close(part.reused(kept, [1.0], call), right, rtol=1e-4, atol=1e-5)

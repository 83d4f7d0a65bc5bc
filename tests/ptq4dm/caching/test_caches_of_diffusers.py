"""diffusers' own caches (`enable_cache`) on quantized models do what they do on the float model, fused or not."""

import copy

import diffusers
import pytest
import torch

import denoisers
import ptq4dm
from ptq4dm import UserError
from ptq4dm.caching.step_plan import plain_plan
from ptq4dm.hooks import unhooked
from ptq4dm.inference.watch import hooked

pytestmark = pytest.mark.usefixtures("one_thread")
STEPS = 6
TIMES = torch.linspace(900, 100, STEPS)
now = {}
CACHES = {
    "first block": lambda: diffusers.FirstBlockCacheConfig(threshold=1e3),
    "magnitudes": lambda: diffusers.MagCacheConfig(
        num_inference_steps=STEPS, mag_ratios=torch.ones(STEPS), retention_ratio=0.2
    ),
    "taylor": lambda: diffusers.TaylorSeerCacheConfig(
        cache_interval=2, disable_cache_before_step=2, taylor_factors_dtype=torch.float32
    ),
    "pyramid": lambda: diffusers.PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2, spatial_attention_timestep_skip_range=(0, 1000),
        cross_attention_block_skip_range=2, cross_attention_timestep_skip_range=(0, 1000),
        current_timestep_callback=lambda: now["time"],
    ),
}  # fmt: skip
KINDS = {name: ["flux", "wan"] for name in ("first block", "magnitudes", "pyramid")} | {"taylor": ["flux"]}


@torch.no_grad()
def outputs(kind, model, cache=None):
    """What a model gives in six steps of a sample that changes little."""
    _, shape, arguments = denoisers.KINDS[kind]()
    generator = torch.Generator().manual_seed(0)
    x, more = torch.randn(2, *shape, generator=generator), torch.randn(2, *shape, generator=generator)
    given = arguments(torch.randn(2, *denoisers.TEXT, generator=generator))
    if cache is not None:
        model.enable_cache(cache)
    try:
        found = []
        for k, t in enumerate(TIMES):
            now["time"] = int(t)
            time = (t / 1000 if kind == "flux" else t).expand(2)
            with model.cache_context("cond"):
                found.append(model(x + 0.05 * k * more, timestep=time, return_dict=False, **given)[0])
        return torch.stack(found)
    finally:
        if cache is not None:
            model.disable_cache()


def distance(one, other):
    return ((one - other).norm() / other.norm()).item()


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("name, kind", [(name, kind) for name, kinds in KINDS.items() for kind in kinds])
def test_a_cache_does_on_a_quantized_model_what_it_does_on_the_float_one(name, kind, fused):
    exact, _ = denoisers.pair(kind)
    model = copy.deepcopy(denoisers.quantized(kind)[0])
    if fused:
        ptq4dm.fuse(model)
    plain, right = outputs(kind, model), outputs(kind, exact)
    rounding = distance(plain, right)
    cached, expected = outputs(kind, model, CACHES[name]()), outputs(kind, exact, CACHES[name]())
    effect = distance(expected, right)
    assert effect > 0  # the cache was of use
    assert distance(cached, expected) < 1.5 * rounding + 0.1 * effect
    assert 0.5 * effect < distance(cached, plain) < 2 * effect + 0.1 * rounding
    assert torch.equal(outputs(kind, model), plain)  # and nothing of it stays


@pytest.mark.parametrize("name", CACHES)
def test_a_cache_that_is_taken_off_is_no_hook_any_more(name):
    """So fused modules are fused again, and calls come from graphs."""
    model, _ = denoisers.pair("flux")
    assert hooked(model) == "" and unhooked(*model.modules())
    model.enable_cache(CACHES[name]())
    assert "hook of diffusers" in hooked(model) and not unhooked(*model.modules())
    model.disable_cache()
    assert hooked(model) == "" and unhooked(*model.modules())


def test_two_caches_at_once_are_refused():
    model, _ = denoisers.pair("flux")
    pipe = denoisers.Steps(model, diffusers.DDIMScheduler(), *denoisers.KINDS["flux"]()[1:])
    model.enable_cache(CACHES["first block"]())
    with pytest.raises(UserError, match="cache of diffusers"), ptq4dm.cached_steps(pipe, plain_plan(4, [0, 2], 0)):
        pass

"""Outputs of embedding layers, kept for each step: the same pictures to the bit, and never those of another state."""

import copy

import peft
import pytest
import torch
from diffusers import DDIMScheduler, DDPMPipeline
from torch import nn

import models
import ptq4dm
from ptq4dm import UserError
from ptq4dm.caching import embedding_table
from ptq4dm.caching.dependence import Dependence

pytestmark = pytest.mark.usefixtures("one_thread")
STEPS = 3


@pytest.fixture(params=["dit", "unet"])
def made(request):
    return request.getfixturevalue("dit") if request.param == "dit" else DDPMPipeline(models.unet(), DDIMScheduler())


@pytest.fixture
def dit():
    model = models.pixel_dit(num_layers=2)
    for block in model.transformer_blocks:  # as untrained, its time would hardly count
        nn.init.normal_(block.norm1.linear.weight, std=0.3)
    return ptq4dm.PixelDiTPipeline(model, DDIMScheduler())


def pictures(pipe, steps=STEPS, classes=None, seeds=(0, 1)):
    conditioning = None if classes is None else {"class_labels": list(classes)}
    return ptq4dm.sample(pipe, list(seeds), num_inference_steps=steps, conditioning=conditioning)


def network(pipe):
    return getattr(pipe, "transformer", None) or pipe.unet


def test_the_same_pictures_to_the_bit(made):
    """Layers run in the first call and not in the second, which has other seeds; and after the block as before."""
    classes = (1, 2) if hasattr(made, "transformer") else None
    first, second = pictures(made, classes=classes), pictures(made, classes=classes, seeds=(4, 5))
    with ptq4dm.cached_embeddings(made) as cache:
        assert torch.equal(pictures(made, classes=classes), first)
        layers, computed = cache.layers, cache.made
        assert len(layers) >= 7 and computed >= STEPS * len(layers) and not cache.reused
        assert torch.equal(pictures(made, classes=classes, seeds=(4, 5)), second)
        assert (cache.made, cache.reused) == (computed, computed) and not cache.uncached
    assert torch.equal(pictures(made, classes=classes), first)
    assert f"outputs of {len(layers)} layers: computed {computed} times, reused {computed}" in str(cache)
    assert 0 < cache.most_bytes < sum(p.numel() * 4 for p in network(made).parameters())
    assert not any("forward" in vars(module) for module in network(made).modules())


def test_of_one_picture_to_the_bit(made):
    """Its time is one number, which samplers hand over with a stride of 0."""
    classes = (3,) if hasattr(made, "transformer") else None
    first = pictures(made, classes=classes, seeds=(0,))
    with ptq4dm.cached_embeddings(made) as cache:
        for _ in range(2):
            assert torch.equal(pictures(made, classes=classes, seeds=(0,)), first)
        assert cache.reused


def test_layers_that_are_kept_do_not_run(dit):
    model = dit.transformer
    name = "transformer_blocks.0.norm1.linear"
    count = []
    layer = model.get_submodule(name)
    run = layer.forward
    layer.forward = lambda x: count.append(1) or run(x)
    with ptq4dm.cached_embeddings(dit):
        pictures(dit)
        ran = len(count)
        pictures(dit)
        assert len(count) == ran >= STEPS
    pictures(dit)
    assert len(count) == 2 * ran


def test_which_layers_these_are(made):
    with ptq4dm.cached_embeddings(made) as cache:
        pictures(made, 1)
    names = ("norm1", "proj_out_1", "time_emb")
    linears = {name for name, module in network(made).named_modules() if isinstance(module, nn.Linear)}
    assert set(cache.layers) == {name for name in linears if any(part in name for part in names)}


def test_another_schedule_and_other_classes_are_computed(dit):
    right = {(steps, classes): pictures(dit, steps, classes) for steps in (2, 3) for classes in ((1, 2), (3, 4))}
    with ptq4dm.cached_embeddings(dit) as cache:
        made = [0]
        for key in right:
            assert torch.equal(pictures(dit, *key), right[key])
            made.append(cache.made)
        assert made == sorted(set(made))  # each time more
        for key in right:
            reused = cache.reused
            assert torch.equal(pictures(dit, *key), right[key])
            assert cache.made == made[-1] and cache.reused > reused  # and now none


@pytest.mark.parametrize("change", ["in place", "another tensor", "dtype"])
def test_other_weights_are_computed(dit, change):
    model = dit.transformer
    layer = model.transformer_blocks[0].norm1.emb.timestep_embedder.linear_1
    with ptq4dm.cached_embeddings(dit) as cache:
        before, made = pictures(dit), cache.made
        with torch.no_grad():
            if change == "in place":
                layer.weight *= 1.5
            elif change == "another tensor":
                layer.weight = nn.Parameter(layer.weight * 1.5)
            else:
                model.to(torch.bfloat16)
        found = pictures(dit)
        assert cache.made == 2 * made and not cache.reused
    assert torch.equal(found, pictures(dit)) and not torch.equal(found, before)


def test_an_adapter_before_a_layer_that_is_kept(dit):
    """Its scale changes what later layers are fed: they are computed anew, and so when it is gone."""
    model = dit.transformer
    exact = pictures(dit)
    with ptq4dm.cached_embeddings(dit):
        assert torch.equal(pictures(dit), exact)
        config = peft.LoraConfig(r=2, target_modules=r".*timestep_embedder\.linear_1", init_lora_weights=False)
        peft.inject_adapter_in_model(config, model)
        found = [pictures(dit)]
        scaled = [one for one in model.modules() if isinstance(one, peft.tuners.lora.Linear)]
        assert scaled
        for one in scaled:
            one.scaling["default"] = 3.0
        found.append(pictures(dit))
    right = [pictures(dit)]
    for one in scaled:
        one.scaling["default"] = 1.0 * config.lora_alpha / config.r
    right.insert(0, pictures(dit))
    assert torch.equal(found[0], right[0]) and torch.equal(found[1], right[1])
    assert not torch.equal(found[0], exact) and not torch.equal(found[0], found[1])


def test_quantized_layers_are_kept_too(dit):
    store = ptq4dm.collect(dit, ptq4dm.CalibrationConfig(num_samples=2, num_inference_steps=2))
    ptq4dm.quantize(dit, ptq4dm.LUTGEMMConfig(rest="rtn activations=dynamic"), store)
    right = pictures(dit)
    with ptq4dm.cached_embeddings(dit) as cache:
        assert torch.equal(pictures(dit), right) and torch.equal(pictures(dit), right)
    assert len(cache.layers) == 7 and cache.reused == cache.made > 0


# ---------------------------------------------------------------------------------------------- what is not kept


class Net(nn.Module):
    """x [B, C, H, W] and a time [B]: layers fed the time, the picture, and what comes of the picture in odd ways."""

    def __init__(self, how):
        super().__init__()
        torch.manual_seed(0)
        self.how, self.time, self.odd = how, nn.Linear(1, 4), nn.Linear(4, 4)

    def forward(self, sample, timestep):
        e = self.time(timestep[:, None].float())
        if self.how == "pooled":
            e = e + sample.mean((2, 3))
        elif self.how == "number":
            e = e + float(sample.mean())
        elif self.how == "written":
            e = e.clone()
            e[:, 0].add_(sample.mean())
        elif self.how == "random":
            e = e + torch.rand_like(e)
        elif self.how == "unfilled":
            e = torch.empty_like(e).copy_(e)
        y = self.odd(e)
        if self.how == "overwritten":
            y.mul_(sample.mean())
        return sample * y[:, :, None, None]


@pytest.mark.parametrize("how", ["", "pooled", "number", "written", "random", "unfilled", "overwritten"])
@torch.no_grad()
def test_what_depends_on_the_picture_is_not_kept(how):
    model, time = Net(how), torch.tensor([3, 3])
    inputs = [torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(i)) for i in range(3)]
    with ptq4dm.cached_embeddings(model) as cache:
        for x in inputs:
            torch.manual_seed(7)
            found = model(x, time)
            plain = copy.deepcopy(model)
            for part in plain.modules():
                vars(part).pop("forward", None)
            torch.manual_seed(7)
            assert torch.equal(found, plain(x, time))
    assert cache.layers == (["odd", "time"] if how in ("", "overwritten") else ["time"])


@torch.no_grad()
def test_marks():
    picture, time = torch.randn(2, 3, 4), torch.randn(2)
    with Dependence([picture]) as watch:
        assert watch.of(picture.sum()) and watch.of(picture[0]) and watch.of(time * picture[0, 0, 0])
        assert not watch.of(time) and not watch.of(torch.zeros(3), time.exp().cumsum(0))
        assert watch.of(torch.empty(3)) and watch.of(torch.randn(3))
        room = torch.zeros(2, 3, 4)
        room[0].copy_(picture[0])
        assert watch.of(room) and watch.of(room[1])
        assert not watch.of(torch.arange(4.0))
        bool(picture.sum() > 0)
        assert watch.of(time)  # the host knows


@torch.no_grad()
def test_no_more_steps_than_are_kept(monkeypatch):
    monkeypatch.setattr(embedding_table, "MOST_STEPS", 2)
    model, x = Net(""), torch.randn(1, 4, 2, 2)
    with ptq4dm.cached_embeddings(model) as cache:
        for time in (1, 2, 3, 3, 1):
            model(x, torch.tensor([time]))
        assert len(cache.tables[""].steps) == 2
    assert (cache.made, cache.reused) == (2 * 4, 2) and cache.most_bytes == 2 * 2 * 4 * 4


@torch.no_grad()
def test_hooks_and_unknown_arguments():
    model, x, time = Net(""), torch.randn(1, 4, 2, 2), torch.tensor([1])
    seen = []
    handle = model.time.register_forward_hook(lambda *_: seen.append(1))
    with ptq4dm.cached_embeddings(model) as cache:
        model(x, time), model(x, time)
        assert len(seen) == 2 and cache.uncached == 2 and "2 calls kept nothing" in str(cache)
        handle.remove()
        model(x, time), model(x, time)
        assert cache.reused == 2


def test_where_it_cannot_be():
    model = Net("")
    with ptq4dm.cached_embeddings(model), pytest.raises(UserError, match="torch.no_grad"):
        model(torch.randn(1, 4, 2, 2), torch.tensor([1]))
    with pytest.raises(UserError, match="compiled"), ptq4dm.cached_embeddings(torch.compile(Net(""))):
        pass
    with pytest.raises(UserError, match="no Linear"), ptq4dm.cached_embeddings(nn.Conv2d(1, 1, 1)):
        pass
    with pytest.raises(UserError), ptq4dm.cached_embeddings("a name"):
        pass
    assert "forward" not in vars(model)

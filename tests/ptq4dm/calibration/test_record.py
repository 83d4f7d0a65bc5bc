"""What is recorded is what the model was called with: x_t beside its own t, labels and conditioning."""

import contextlib
import functools

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DDPMPipeline,
    DiffusionPipeline,
    DiTPipeline,
    HeunDiscreteScheduler,
    ImagePipelineOutput,
    PNDMScheduler,
)

import ptq4dm
from ptq4dm.calibration.calls import Calls, calls_of_rows
from ptq4dm.calibration.look import look
from ptq4dm.calibration.record import replay
from ptq4dm.calibration.request import request_of
from ptq4dm.calibration.sampled import record_calls
from ptq4dm.errors import UserError
from ptq4dm.pipelines.pixel_dit import PixelDiTPipeline
from recorded import (
    Guided,
    Positioned,
    WithIds,
    argument,
    sample_of,
    tiny_conditional,
    tiny_dit,
    tiny_unet,
    unet_pipe,
)

pytestmark = pytest.mark.usefixtures("one_thread")


def watched(model):
    """All calls of a model from here on, by a wrapper of its own: [(x, t, output)]."""
    seen, forward = [], model.forward

    @functools.wraps(forward)
    def wrapper(*args, **kwargs):
        output = forward(*args, **kwargs)
        x, t = (*args, kwargs.get("timestep"))[:2]
        seen.append((x.clone(), torch.as_tensor(t).expand(len(x)).clone(), output[0].clone()))
        return output

    model.forward = wrapper
    return seen


def ddim(model, scheduler, x, steps, **arguments):
    """DDIM (eta = 0, no clipping) written out: {t: x_t} and the model's answers {t: eps}."""
    alphas = scheduler.alphas_cumprod  # their square roots are taken in float32, as diffusers does
    scheduler.set_timesteps(steps)
    stride = scheduler.config.num_train_timesteps // steps
    states, answers = {}, {}
    for t in scheduler.timesteps.tolist():
        states[t] = x
        with torch.no_grad():
            eps = model(x, torch.full((len(x),), t), **arguments).sample
        answers[t] = eps
        a, before = alphas[t], alphas[t - stride] if t >= stride else scheduler.final_alpha_cumprod
        x = before.sqrt() * (x - (1 - a).sqrt() * eps) / a.sqrt() + (1 - before).sqrt() * eps
    return states, answers


def noise(seeds, *shape):
    return torch.cat([torch.randn(1, *shape, generator=torch.Generator().manual_seed(s)) for s in seeds]).double()


def rows_by_seed(calls, seeds, asked, grid):
    """seed -> row of `calls`: rows come step by step, and by seed within a step."""
    nearest = [min(grid, key=lambda g: (abs(g - t), -g)) for t in asked]
    order = sorted(range(len(seeds)), key=lambda k: (grid.index(nearest[k]), k))
    return {seeds[k]: (row, nearest[k]) for row, k in enumerate(order)}


def test_pairs_are_those_of_an_independent_ddim_loop():
    pipe, seeds, asked = unet_pipe(), [3, 40, 7, 8], [0, 999, 510, 490]
    calls = record_calls(pipe, seeds, asked, num_inference_steps=5)
    states, answers = ddim(tiny_unet(), DDIMScheduler(), noise(seeds, 3, 8, 8), 5)
    grid = list(states)
    assert grid == [800, 600, 400, 200, 0]
    rows = rows_by_seed(calls, seeds, asked, grid)
    assert sorted(t for _, t in rows.values()) == [0, 400, 600, 800]
    assert len(calls) == 4 and torch.equal(calls.time, calls.timestep / 1000)
    assert calls.call().args[1].dtype == torch.int64
    output = replay(pipe.unet, calls)
    for k, seed in enumerate(seeds):
        row, t = rows[seed]
        assert calls.timestep[row] == t
        torch.testing.assert_close(sample_of(calls)[row], states[t][k], rtol=0, atol=1e-10)
        torch.testing.assert_close(output[row], answers[t][k], rtol=0, atol=1e-10)
    # The trajectories move: a shift of one step would be seen.
    assert (states[400] - states[600]).abs().mean() > 1e-3


def test_pixel_dit_labels_follow_their_seeds():
    pipe = PixelDiTPipeline(tiny_dit(), DDIMScheduler(clip_sample=False))
    seeds, asked = [13, 2, 25], [0, 700, 800]
    calls = record_calls(pipe, seeds, asked, num_inference_steps=5)
    labels = torch.tensor([3, 2, 5])  # seed mod 10 classes
    states, answers = ddim(tiny_dit(), DDIMScheduler(), noise(seeds, 3, 8, 8), 5, class_labels=labels)
    output = replay(pipe.transformer, calls)
    for k, seed in enumerate(seeds):
        row, t = rows_by_seed(calls, seeds, asked, list(states))[seed]
        assert (calls.timestep[row], argument(calls, "class_labels")[row]) == (t, labels[k])
        torch.testing.assert_close(sample_of(calls)[row], states[t][k], rtol=0, atol=1e-10)
        torch.testing.assert_close(output[row], answers[t][k], rtol=0, atol=1e-10)


def test_guidance_gives_two_rows_a_seed():
    transformer = tiny_dit(in_channels=4, out_channels=8, num_embeds_ada_norm=1000)
    torch.manual_seed(0)
    vae = AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, sample_size=8).double().eval()
    pipe = DiTPipeline(transformer, vae, DDIMScheduler())
    asked = dict(
        num_inference_steps=3,
        conditioning={"class_labels": [70, 80, 90]},
        pipeline_kwargs={"guidance_scale": 4.0},
    )
    sampling = look(request_of(pipe, **asked), 0)
    seen = watched(transformer)
    calls = record_calls(pipe, [4, 5, 6], [0, 0, 900], sampling=sampling, **asked)
    first, last = seen[0], seen[2]
    assert len(calls) == 6 and len(seen) == 3
    # Seed 6 (entry 6 mod 3 = 0) leaves at the first step, the others (entries 1 and 2) at the last one.
    assert calls.timestep.tolist() == [666, 666, 0, 0, 0, 0]
    assert argument(calls, "class_labels").tolist() == [70, 1000, 80, 90, 1000, 1000]
    assert torch.equal(sample_of(calls), torch.cat([first[0][[2, 5]], last[0][[0, 1, 3, 4]]]))
    expected = torch.cat([first[2][[2, 5]], last[2][[0, 1, 3, 4]]])[:, :4]  # without the learned variance
    del transformer.forward  # no longer watched
    output = replay(transformer, calls)
    assert output.shape == sample_of(calls).shape
    torch.testing.assert_close(output, expected, rtol=0, atol=1e-10)
    assert not torch.allclose(output[2:4], output[4:])  # the label matters


@pytest.mark.parametrize(("asked", "forwards"), [([800, 800], 1), ([800, 410], 3), ([0, 800], 5)])
def test_sampling_stops_once_all_is_recorded(asked, forwards):
    pipe = unet_pipe()
    sampling = look(request_of(pipe, num_inference_steps=5), 0)
    seen = watched(pipe.unet)
    calls = record_calls(pipe, [0, 1], asked, sampling=sampling, num_inference_steps=5)
    assert len(seen) == forwards and len(calls) == 2
    assert len(seen[0][0]) == 2


def test_leaves_model_and_scheduler_as_they_were():
    pipe = unet_pipe()
    pipe.unet.train()
    pipe.unet.mid_block.eval()

    def untouched():
        assert not pipe.unet._forward_pre_hooks and "step" not in vars(pipe.scheduler)
        assert pipe.unet.training and not pipe.unet.mid_block.training

    for asked in (800, 0):  # stopped early, and run to the end
        record_calls(pipe, [0], [asked], num_inference_steps=2)
        untouched()
    with pytest.raises(ZeroDivisionError):
        pipe.unet.conv_in.register_forward_pre_hook(lambda *_: 1 / 0)
        record_calls(pipe, [0], [0], num_inference_steps=2)
    untouched()


def test_a_step_that_the_user_has_wrapped_stays_wrapped():
    pipe = unet_pipe()
    step, count = pipe.scheduler.step, []
    pipe.scheduler.step = mine = lambda *args, **kwargs: (count.append(1), step(*args, **kwargs))[1]
    record_calls(pipe, [0], [500], num_inference_steps=4)
    assert pipe.scheduler.step is mine and len(count) == 1  # at 750; the step at 500 is not needed


@pytest.mark.parametrize("scheduler", [PNDMScheduler(), PNDMScheduler(skip_prk_steps=True), HeunDiscreteScheduler()])
def test_grids_that_repeat_times_record_the_first_call_of_each(scheduler):
    pipe = PixelDiTPipeline(tiny_dit(), scheduler)
    seen = watched(pipe.transformer)
    seeds = list(range(6))
    calls = record_calls(pipe, seeds, [999, 700, 500, 300, 100, 0], num_inference_steps=6)
    times = [int(t[0]) for _, t, _ in seen]
    assert len(set(times)) < len(times)  # the case at hand
    assert len(calls) == 6
    for row, seed in enumerate(seeds):  # asked from high to low: rows in the order of the seeds
        step = times.index(int(calls.timestep[row]))
        assert torch.equal(sample_of(calls)[row], seen[step][0][seed])


def test_guidance_by_two_calls_and_dict_arguments():
    pipe = Guided(tiny_conditional(), DDIMScheduler())
    embeds = torch.arange(48.0).reshape(2, 3, 8).double() / 48
    calls = record_calls(
        pipe, [0, 1, 2], [0, 500, 500], num_inference_steps=2, conditioning={"prompt_embeds": embeds}
    )  # fmt: skip
    assert calls.timestep.tolist() == [500, 500, 500, 500, 0, 0]
    assert argument(calls, "return_dict") is False and len(argument(calls, "added_cond_kwargs")) == 2
    expected = torch.cat([embeds[[1, 0]], 0 * embeds, embeds[[0]], 0 * embeds[[0]]])
    assert torch.equal(argument(calls, "encoder_hidden_states"), expected)
    assert argument(calls, "added_cond_kwargs")["time_ids"][:, 0].tolist() == [6, 12, 6, 12, 0, 0]
    assert torch.equal(sample_of(calls)[:2], sample_of(calls)[2:4])
    one = calls[2:3]
    more = {"text_embeds": torch.zeros(1, 8).double(), "time_ids": torch.arange(6, 12)[None]}
    with torch.no_grad():
        direct = pipe.unet(sample_of(one), 500, encoder_hidden_states=0 * embeds[:1], added_cond_kwargs=more).sample
    torch.testing.assert_close(replay(pipe.unet, one), direct, rtol=0, atol=1e-12)


def test_arguments_that_all_rows_share():
    pipe = Positioned(WithIds(), DDIMScheduler())
    calls = record_calls(pipe, [0, 1, 2], [0, 500, 500], num_inference_steps=2)
    x, ids, t = calls.call().args
    assert torch.equal(ids, torch.arange(5.0) / 10) and calls.call().kwargs == {"gain": 2.0, "mode": "train"}
    expected = x * 2 + t[:, None, None, None]
    torch.testing.assert_close(replay(pipe.transformer, calls), expected)
    torch.testing.assert_close(replay(pipe.transformer, calls[1:]), expected[1:])


class OneByOne(DDPMPipeline):
    def __call__(self, batch_size=1, generator=None, num_inference_steps=1, output_type="pt"):
        self.scheduler.set_timesteps(num_inference_steps)
        for t in self.scheduler.timesteps:
            for _ in range(batch_size):
                self.unet(torch.zeros(1, 3, 8, 8).double(), t)


def test_pipelines_that_cannot_be_recorded():
    with pytest.raises(UserError, match="one timestep for each seed"):
        record_calls(unet_pipe(), [0, 1], [5], num_inference_steps=2)
    with pytest.raises(UserError, match="has no network 'prior'; it has unet"):
        record_calls(unet_pipe(), [0], [5], component="prior", num_inference_steps=2)

    class Idle(DDPMPipeline):
        def __call__(self, batch_size=1, generator=None, num_inference_steps=1, output_type="pt"): ...

    with pytest.raises(UserError, match="Idle, called like this, calls unet at none"):
        record_calls(Idle(tiny_unet(), DDIMScheduler()), [0], [5], num_inference_steps=2)


def test_calls_that_are_not_rows_of_seeds_are_kept_whole():
    calls = record_calls(OneByOne(tiny_unet(), DDIMScheduler()), [0, 1], [500, 500], num_inference_steps=2)
    assert len(calls) == 2 and repr(calls) == "Calls(2 units: 0 rows, 2 whole calls)"
    assert calls.timestep.tolist() == [500, 500]


@pytest.mark.parametrize(("skip", "asked", "found"), [(2, [999, 0], [250, 0]), (0, [999, 0], [750, 0])])
def test_sampling_that_begins_in_the_middle(skip, asked, found):
    """Image-to-image leaves steps out: times that it never has are recorded at the nearest that it has."""
    pipe = Guided(tiny_conditional(), DDIMScheduler())
    pipe.skip = skip
    embeds = {"prompt_embeds": torch.ones(1, 3, 8).double()}
    calls = record_calls(pipe, [0, 1], asked, num_inference_steps=4, conditioning=embeds)
    assert calls.timestep.tolist() == [found[0]] * 2 + [found[1]] * 2


def test_sampling_that_ends_early():
    """A base model that leaves the last steps to a refiner: its own last step stands for them."""
    pipe = Guided(tiny_conditional(), DDIMScheduler())
    pipe.stop = 2
    embeds = {"prompt_embeds": torch.ones(1, 3, 8).double()}
    calls = record_calls(pipe, [0, 1], [999, 0], num_inference_steps=4, conditioning=embeds)
    assert calls.timestep.tolist() == [750, 750, 500, 500]


def test_calls_are_put_together_only_where_they_agree():
    def calls(length=3, scale=1.0, ids=None):
        shared = {"scale": scale, "ids": torch.arange(3) if ids is None else ids}
        return calls_of_rows(torch.zeros(2, 1), timestep=torch.zeros(2), text=torch.zeros(2, length), shared=shared)

    both = Calls.together([calls(), calls()])
    assert len(both) == 4 and argument(both, "text").shape == (4, 3) and argument(both, "scale") == 1.0
    for other in (calls(4), calls(scale=2.0), calls(ids=torch.ones(3)), calls(scale=1)):
        apart = Calls.together([calls(), other, calls()])
        assert [part.places[:, 0].tolist() for part in apart.batches(9)] == [[0] * 4, [1] * 2]
        assert [len(part) for part in apart.batches(3)] == [3, 1, 2]
        with pytest.raises(ValueError, match="6 units in 2 groups"):
            apart.call()


def test_arguments_that_cannot_be_written_down_are_named():
    class Wrong(Guided):
        def __call__(self, generator=None, num_inference_steps=1, output_type="pt"):
            self.scheduler.set_timesteps(num_inference_steps)
            with contextlib.suppress(ValueError):  # the model has no classes
                self.unet(torch.zeros(1, 3, 8, 8).double(), 3, class_labels=[object()])

    pipe = Wrong(tiny_unet(), DDIMScheduler())
    calls = record_calls(pipe, [0], [0], num_inference_steps=1)  # in memory anything can be kept
    assert type(argument(calls, "class_labels")[0]) is object
    with pytest.raises(UserError, match="called with a object, which cannot be kept in a file"):
        ptq4dm.collect(pipe, ptq4dm.CalibrationConfig(num_samples=1, num_inference_steps=1))


# --- arguments of every shape -------------------------------------------------------------------------------


class Odd(torch.nn.Module):
    """A stand-in for video models: tuples and lists of tensors, nested, and a time of another name."""

    config = {}

    def __init__(self):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(()))

    def forward(self, hidden_states, timesteps, rotary=None, shapes=None, extra=None, return_dict=True):
        (cos, sin), (pooled, words) = rotary, extra["text"]
        assert isinstance(rotary, tuple) and [list(shape) for shape in shapes] == [[1, 2, 3]]
        y = hidden_states * self.scale * cos.sum() + sin.sum() + pooled.sum(1)[:, None] + words.sum()
        return (y + timesteps[:, None] + extra["bias"],)


class OddPipe(DiffusionPipeline):
    def __init__(self, transformer, scheduler):
        super().__init__()
        self.register_modules(transformer=transformer, scheduler=scheduler)

    def __call__(self, generator=None, num_inference_steps=1, output_type="pt"):
        self.scheduler.set_timesteps(num_inference_steps)
        x = torch.cat([torch.randn(1, 5, generator=g) for g in generator])
        pooled = torch.arange(2.0 * len(x)).reshape(len(x), 2)  # of one row each, beside what all rows share
        extra = {"text": [pooled, torch.ones(1, 4)], "bias": 3.0}
        for t in self.scheduler.timesteps:
            rotary = (torch.arange(7.0), torch.arange(4.0))
            eps = self.transformer(x, timesteps=t.expand(len(x)), rotary=rotary, shapes=[(1, 2, 3)], extra=extra)[0]
            x = self.scheduler.step(eps, t, x).prev_sample
        return ImagePipelineOutput(images=torch.zeros(len(x), 3, 2, 2))


def test_tuples_and_lists_of_tensors():
    pipe = OddPipe(Odd(), DDIMScheduler())
    calls = record_calls(pipe, [0, 1, 2], [0, 500, 500], num_inference_steps=2)
    (x,), given = calls.call().args, calls.call().kwargs
    pooled, words = given["extra"]["text"]
    assert isinstance(given["extra"]["text"], list) and isinstance(given["rotary"], tuple)
    assert given["shapes"] == [(1, 2, 3)] and pooled.shape == (3, 2) and words.shape == (1, 4)
    expected = x * 21 + 6 + pooled.sum(1)[:, None] + 4 + 3 + given["timesteps"][:, None]
    torch.testing.assert_close(replay(pipe.transformer, calls), expected)
    torch.testing.assert_close(replay(pipe.transformer, calls[1:]), expected[1:])


def test_lists_of_samples_and_models_without_a_time():
    class Listed(OddPipe):
        def __call__(self, generator=None, num_inference_steps=1, output_type="pt"):
            self.scheduler.set_timesteps(num_inference_steps)
            for t in self.scheduler.timesteps:
                self.transformer([torch.randn(3 + k, generator=g) for k, g in enumerate(generator)], t / 1000)

    class Each(Odd):
        def forward(self, x, t, return_dict=True):
            return ([one * self.scale + t for one in x],)

    pipe = Listed(Each(), DDIMScheduler())
    calls = record_calls(pipe, [0, 1], [999, 0], num_inference_steps=4)
    assert calls.timestep.tolist() == [0.75, 0.0] and all(
        isinstance(one.call().args[0], list) for one in calls.batches(9)
    )
    assert torch.equal(replay(pipe.transformer, calls)[0], calls[0].call().args[0][0] + 0.75)

    class Timeless(Odd):
        def forward(self, hidden_states, return_dict=True):
            return (hidden_states,)

    class Plain(OddPipe):
        def __call__(self, generator=None, num_inference_steps=1, output_type="pt"):
            self.scheduler.set_timesteps(num_inference_steps)
            for t in self.scheduler.timesteps:
                self.transformer(torch.zeros(len(generator), 5))
                self.scheduler.step(torch.zeros(1), t, torch.zeros(1))

    calls = record_calls(Plain(Timeless(), DDIMScheduler()), [0, 1], [999, 0], num_inference_steps=4)
    assert calls.time.tolist() == [0.75, 0.0]  # the sampler's step says when it was

"""What is recorded is what the model was called with: x_t beside its own t, labels and conditioning."""

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

from models import added_unet, pixel_dit, plain_unet
from ptq4dm.calibration.record import predictions
from ptq4dm.calibration.sampled import record_calls
from ptq4dm.errors import UserError
from ptq4dm.pipelines.pixel_dit import PixelDiTPipeline

pytestmark = pytest.mark.usefixtures("one_thread")


def randomized(model):
    """The same weights each time, none of them zero: fresh DiTs answer zero whatever they are fed."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / max(4, parameter[0].numel()) ** 0.5)
    return model.double().eval()


def tiny_unet():
    return randomized(plain_unet())


def tiny_dit(**config):
    return randomized(pixel_dit(**config))


def unet_pipe(scheduler=None):
    return DDPMPipeline(tiny_unet(), scheduler or DDIMScheduler(clip_sample=False))


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


def argument(calls, name):
    """What calls that are one call were given by this name."""
    return calls.call().kwargs[name]


def sample_of(calls):
    """[U, ...] the first arguments of the calls."""
    return torch.cat([part.call().args[0] for part in calls.batches(len(calls))])


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
    assert calls.timestep.dtype == torch.int64 and len(calls) == 4
    output = predictions(pipe.unet, calls)
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
    output = predictions(pipe.transformer, calls)
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
    seen = watched(transformer)
    calls = record_calls(
        pipe, [4, 5, 6], [0, 0, 900], num_inference_steps=3, conditioning={"class_labels": [70, 80, 90]},
        pipeline_kwargs={"guidance_scale": 4.0},
    )  # fmt: skip
    first, last = seen[0], seen[2]
    assert len(calls) == 6 and len(seen) == 3
    # Seed 6 (entry 6 mod 3 = 0) leaves at the first step, the others (entries 1 and 2) at the last one.
    assert calls.timestep.tolist() == [666, 666, 0, 0, 0, 0]
    assert argument(calls, "class_labels").tolist() == [70, 1000, 80, 90, 1000, 1000]
    assert torch.equal(sample_of(calls), torch.cat([first[0][[2, 5]], last[0][[0, 1, 3, 4]]]))
    expected = torch.cat([first[2][[2, 5]], last[2][[0, 1, 3, 4]]])[:, :4]  # without the learned variance
    del transformer.forward  # no longer watched
    output = predictions(transformer, calls)
    assert output.shape == sample_of(calls).shape
    torch.testing.assert_close(output, expected, rtol=0, atol=1e-10)
    assert not torch.allclose(output[2:4], output[4:])  # the label matters


@pytest.mark.parametrize(("asked", "forwards"), [([800, 800], 1), ([800, 410], 3), ([0, 800], 5)])
def test_sampling_stops_once_all_is_recorded(asked, forwards):
    pipe = unet_pipe()
    seen = watched(pipe.unet)
    calls = record_calls(pipe, [0, 1], asked, num_inference_steps=5)
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
    assert pipe.scheduler.step is mine and len(count) == 2  # at 750 and at 500


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


class Guided(DiffusionPipeline):
    """A stand-in for text-to-image pipelines that guide by two calls a step, with dict arguments."""

    skip = 0  # steps left out at the start, as image-to-image pipelines do

    def __init__(self, unet, scheduler):
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler)

    def __call__(self, prompt_embeds=None, generator=None, num_inference_steps=1, output_type="pt", strength=1.0):
        self.scheduler.set_timesteps(num_inference_steps)
        x = torch.cat([torch.randn(1, 4, 8, 8, generator=g) for g in generator]).to(self.unet.dtype)
        ids = torch.arange(len(x) * 6).reshape(len(x), 6)
        for t in self.scheduler.timesteps[self.skip :]:
            eps = 0
            for scale, embeds in ((2.0, prompt_embeds), (-1.0, prompt_embeds * 0)):
                more = {"text_embeds": embeds[:, 0], "time_ids": ids}
                eps = eps + scale * self.unet(
                    x, t, encoder_hidden_states=embeds, added_cond_kwargs=more, return_dict=False
                )[0]  # fmt: skip
            x = self.scheduler.step(eps, t, x, return_dict=False)[0]
        return ImagePipelineOutput(images=x[:, :3])


def tiny_conditional():
    return randomized(added_unet())


def test_guidance_by_two_calls_and_dict_arguments():
    pipe = Guided(tiny_conditional(), DDIMScheduler())
    embeds = torch.arange(48.0).reshape(2, 3, 8).double() / 48
    calls = record_calls(
        pipe, [0, 1, 2], [0, 500, 500], num_inference_steps=2, conditioning={"prompt_embeds": embeds}
    )  # fmt: skip
    assert calls.timestep.tolist() == [500, 500, 500, 500, 0, 0]
    names = {"encoder_hidden_states", "added_cond_kwargs/text_embeds", "added_cond_kwargs/time_ids"}
    assert calls.conditioning.keys() == names
    expected = torch.cat([embeds[[1, 0]], 0 * embeds, embeds[[0]], 0 * embeds[[0]]])
    assert torch.equal(argument(calls, "encoder_hidden_states"), expected)
    assert calls.conditioning["added_cond_kwargs/time_ids"][:, 0].tolist() == [6, 12, 6, 12, 0, 0]
    assert torch.equal(sample_of(calls)[:2], sample_of(calls)[2:4])
    one = calls[2:3]
    more = {"text_embeds": torch.zeros(1, 8).double(), "time_ids": torch.arange(6, 12)[None]}
    with torch.no_grad():
        direct = pipe.unet(one.sample, 500, encoder_hidden_states=0 * embeds[:1], added_cond_kwargs=more).sample
    torch.testing.assert_close(predictions(pipe.unet, one), direct, rtol=0, atol=1e-12)


class WithIds(torch.nn.Module):
    """A stand-in for transformers that take position ids, the same for all rows."""

    config = {}

    def __init__(self):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(()))

    def forward(self, hidden_states, ids=None, timestep=None, gain=1.0, mode=None, return_dict=True):
        assert mode == "train"
        return (hidden_states * self.scale * ids.sum() * gain + timestep[:, None, None, None],)


class Positioned(DiffusionPipeline):
    def __init__(self, transformer, scheduler):
        super().__init__()
        self.register_modules(transformer=transformer, scheduler=scheduler)

    def __call__(self, generator=None, num_inference_steps=1, output_type="pt"):
        self.scheduler.set_timesteps(num_inference_steps)
        x = torch.cat([torch.randn(1, 3, 2, 2, generator=g) for g in generator])
        for t in self.scheduler.timesteps:
            eps = self.transformer(x, torch.arange(5.0) / 10, t.expand(len(x)), gain=2.0, mode="train")[0]
            x = self.scheduler.step(eps, t, x).prev_sample
        return ImagePipelineOutput(images=x)


def test_arguments_that_all_rows_share():
    pipe = Positioned(WithIds(), DDIMScheduler())
    calls = record_calls(pipe, [0, 1, 2], [0, 500, 500], num_inference_steps=2)
    assert torch.equal(calls.shared.pop("ids"), torch.arange(5.0) / 10)
    assert calls.shared == {"gain": 2.0, "mode": "train"} and not calls.conditioning
    calls.shared["ids"] = torch.arange(5.0) / 10
    expected = calls.sample * 2 + calls.timestep[:, None, None, None]
    torch.testing.assert_close(predictions(pipe.transformer, calls), expected)
    torch.testing.assert_close(predictions(pipe.transformer, calls[1:]), expected[1:])


class OneByOne(DDPMPipeline):
    def __call__(self, batch_size=1, generator=None, num_inference_steps=1, output_type="pt"):
        self.scheduler.set_timesteps(num_inference_steps)
        for t in self.scheduler.timesteps:
            for _ in range(batch_size):
                self.unet(torch.zeros(1, 3, 8, 8).double(), t)


def test_pipelines_that_cannot_be_recorded():
    with pytest.raises(UserError, match="one timestep for each seed"):
        record_calls(unet_pipe(), [0, 1], [5], num_inference_steps=2)
    with pytest.raises(UserError, match="1 rows for 2 images"):
        record_calls(OneByOne(tiny_unet(), DDIMScheduler()), [0, 1], [500, 500], num_inference_steps=2)
    pipe = Guided(tiny_conditional(), DDIMScheduler())
    pipe.skip = 2
    with pytest.raises(UserError, match="took 2 steps"):
        record_calls(
            pipe, [0], [0], num_inference_steps=4, conditioning={"prompt_embeds": torch.ones(1, 3, 8).double()}
        )


def test_calls_are_put_together_only_where_they_agree():
    def calls(length=3, scale=1.0, **shared):
        rows = torch.zeros(2, 1)
        return Calls(rows, rows[:, 0].long(), {"text": torch.zeros(2, length)}, {"scale": scale, **shared})

    both = Calls.concatenate([calls(ids=torch.arange(3)), calls(ids=torch.arange(3))])
    assert len(both) == 4 and both.conditioning["text"].shape == (4, 3) and both.shared["scale"] == 1.0
    for other, name in ((calls(4), "text"), (calls(scale=2.0), "scale"), (calls(ids=torch.ones(3)), "ids")):
        with pytest.raises(UserError, match=f"'{name}'"):
            Calls.concatenate([calls(ids=torch.zeros(3)), other])


def test_arguments_that_cannot_be_written_down_are_named():
    class Wrong(Guided):
        def __call__(self, generator=None, num_inference_steps=1, output_type="pt"):
            self.scheduler.set_timesteps(num_inference_steps)
            self.unet(torch.zeros(1, 3, 8, 8).double(), 3, class_labels=[object()])

    with pytest.raises(UserError, match="'class_labels' of type list"):
        record_calls(Wrong(tiny_unet(), DDIMScheduler()), [0], [0], num_inference_steps=1)


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
    assert calls.conditioning.keys() == {"extra/text/0"} and calls.conditioning["extra/text/0"].shape == (3, 2)
    shapes = {name: list(value.shape) for name, value in calls.shared.items() if isinstance(value, torch.Tensor)}
    assert shapes == {"rotary/0": [7], "rotary/1": [4], "extra/text/1": [1, 4]}
    assert calls.plain == {"shapes": [(1, 2, 3)], "extra/bias": 3.0}
    expected = calls.sample * 21 + 6 + calls.conditioning["extra/text/0"].sum(1)[:, None] + 4 + 3
    expected += calls.timestep[:, None]
    torch.testing.assert_close(predictions(pipe.transformer, calls), expected)
    torch.testing.assert_close(predictions(pipe.transformer, calls[1:]), expected[1:])


def test_models_that_cannot_be_recorded():
    class Listed(OddPipe):
        def __call__(self, generator=None, num_inference_steps=1, output_type="pt"):
            self.scheduler.set_timesteps(num_inference_steps)
            self.transformer([torch.zeros(5)], torch.zeros(1))

    with pytest.raises(UserError, match="a list of samples"):
        record_calls(Listed(Odd(), DDIMScheduler()), [0], [0], num_inference_steps=1)

    class Timeless(Odd):
        def forward(self, hidden_states, return_dict=True):
            return (hidden_states,)

    class Plain(OddPipe):
        def __call__(self, generator=None, num_inference_steps=1, output_type="pt"):
            self.scheduler.set_timesteps(num_inference_steps)
            self.transformer(torch.zeros(1, 5))

    with pytest.raises(UserError, match="takes no timestep \\(hidden_states, return_dict\\)"):
        record_calls(Plain(Timeless(), DDIMScheduler()), [0], [0], num_inference_steps=1)

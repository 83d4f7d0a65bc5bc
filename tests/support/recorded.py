"""Stand-ins for pipelines whose calls are recorded: tiny networks, guidance by two calls, ids that all rows share."""

import torch
from diffusers import DDIMScheduler, DDPMPipeline, DiffusionPipeline, ImagePipelineOutput

from models import added_unet, pixel_dit, plain_unet


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


def tiny_conditional():
    return randomized(added_unet())


def unet_pipe(scheduler=None):
    return DDPMPipeline(tiny_unet(), scheduler or DDIMScheduler(clip_sample=False))


def argument(calls, name):
    """What calls that are one call were given by this name."""
    return calls.call().kwargs[name]


def sample_of(calls):
    """[U, ...] the first arguments of the calls."""
    return torch.cat([part.call().args[0] for part in calls.batches(len(calls))])


class Guided(DiffusionPipeline):
    """A stand-in for text-to-image pipelines that guide by two calls a step, with dict arguments."""

    skip, stop = 0, None  # steps left out at the start, as image-to-image pipelines do, and at the end

    def __init__(self, unet, scheduler):
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler)

    def __call__(self, prompt_embeds=None, generator=None, num_inference_steps=1, output_type="pt", strength=1.0):
        self.scheduler.set_timesteps(num_inference_steps)
        x = torch.cat([torch.randn(1, 4, 8, 8, generator=g) for g in generator]).to(self.unet.dtype)
        ids = torch.arange(len(x) * 6).reshape(len(x), 6)
        for t in self.scheduler.timesteps[self.skip : self.stop]:
            eps = 0
            for scale, embeds in ((2.0, prompt_embeds), (-1.0, prompt_embeds * 0)):
                more = {"text_embeds": embeds[:, 0], "time_ids": ids}
                eps = eps + scale * self.unet(
                    x, t, encoder_hidden_states=embeds, added_cond_kwargs=more, return_dict=False
                )[0]  # fmt: skip
            x = self.scheduler.step(eps, t, x, return_dict=False)[0]
        return ImagePipelineOutput(images=x[:, :3])


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

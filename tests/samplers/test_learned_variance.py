"""Models that predict a variance behind the prediction (twice the channels): samplers leave it out."""

import diffusers
import pytest
import torch

from ptq4dm.errors import UserError
from ptq4dm.samplers import DDIMScheduler, DEISScheduler, OneStepScheduler


@pytest.mark.parametrize("kind", [DEISScheduler, DDIMScheduler, OneStepScheduler])
@pytest.mark.parametrize("shape", [(2, 3, 4, 4), (2, 1, 4, 4), (1, 4, 2, 4, 4), (3, 5)])
def test_a_learned_variance_is_left_out(kind, shape):
    config = diffusers.DDPMScheduler(variance_type="learned_range").config
    sampler = kind.from_config(config)
    sampler.set_timesteps(1 if kind is OneStepScheduler else 3)
    x = y = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    for t in sampler.timesteps:
        output = torch.cat([torch.sin(x), torch.full_like(x, 7.0)], 1)
        x = sampler.step(output, t, x).prev_sample
        output.fill_(float("nan"))  # a static buffer that the next call writes over
    for t in sampler.timesteps:
        y = sampler.step(torch.sin(y), t, y).prev_sample
    assert torch.equal(x, y) and x.isfinite().all()
    for wrong in ((shape[0], 3 * shape[1], *shape[2:]), (2 * shape[0], *shape[1:]), (1, *shape[1:], 1)):
        with pytest.raises(UserError, match="they must agree, or the output have twice the channels"):
            sampler.step(torch.zeros(wrong), sampler.timesteps[0], torch.zeros(shape))

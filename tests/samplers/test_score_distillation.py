"""The losses of score distillation against Gaussians, whose scores are known."""

import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
from torch import nn

import ptq4dm
from models import pixel_dit
from ptq4dm.pipelines.pixel_dit import PixelDiTPipeline
from ptq4dm.samplers import DisBackConfig, distill
from ptq4dm.samplers.distillation.scores import Chance, Diffusion

pytestmark = pytest.mark.usefixtures("one_thread")
ALPHAS_CUMPROD = (1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)).cumprod(0)


class GaussianNet(nn.Module):
    """The exact noise prediction for N(mean, deviation^2), pixel by pixel; class k shifts the mean by k."""

    def __init__(self, mean, deviation):
        super().__init__()
        self.mean = nn.Parameter(torch.tensor(mean))
        self.deviation = deviation

    def forward(self, x, t, class_labels=None, return_dict=True):
        a = ALPHAS_CUMPROD[t].float().reshape(-1, 1, 1, 1)
        shift = 0 if class_labels is None else class_labels.reshape(-1, 1, 1, 1)
        away = x - a.sqrt() * (self.mean + shift)
        return ((1 - a).sqrt() * away / (a * self.deviation**2 + 1 - a),)


def problem(classes=None, number=6):
    chance = Chance(0, (3, 4, 4), classes, (20, 800), "cpu")
    return Diffusion(ALPHAS_CUMPROD.sqrt(), (1 - ALPHAS_CUMPROD).sqrt(), 440, "epsilon", "cpu"), chance.draw(
        number, "test"
    )


@pytest.mark.parametrize("classes", [None, 5])
def test_the_pull_is_the_difference_of_denoised_images(classes):
    """D of N(m, s^2) at x_t is the posterior mean (alpha s^2 x_t + sigma^2 m) / (alpha^2 s^2 + sigma^2)."""
    diffusion, batch = problem(classes)
    fake, target = GaussianNet(0.5, 0.4), GaussianNet(-0.3, 0.7)
    x0 = torch.randn(6, 3, 4, 4, generator=torch.Generator().manual_seed(1))
    got = diffusion.score_difference(fake, target, x0, batch)
    a = ALPHAS_CUMPROD[batch.t].reshape(-1, 1, 1, 1)
    x = a.sqrt() * x0 + (1 - a).sqrt() * batch.noise
    shift = 0 if classes is None else batch.labels.reshape(-1, 1, 1, 1)
    denoised = [
        (a.sqrt() * s**2 * x + (1 - a) * (m + shift)) / (a * s**2 + 1 - a) for m, s in ((0.5, 0.4), (-0.3, 0.7))
    ]
    want = (denoised[0] - denoised[1]) / (x0 - denoised[1]).abs().mean((1, 2, 3), keepdim=True)
    torch.testing.assert_close(got.double(), want, rtol=1e-3, atol=1e-4)
    assert not got.requires_grad


def test_equal_scores_do_not_pull():
    diffusion, batch = problem()
    net = GaussianNet(0.5, 0.4)
    assert not diffusion.score_difference(net, net, torch.randn(6, 3, 4, 4), batch).any()


def test_the_denoising_loss_is_least_at_the_true_score():
    diffusion, _ = problem()
    chance = Chance(0, (3, 4, 4), None, (20, 800), "cpu")
    batch = chance.draw(4000, "many")
    x0 = 0.5 + 0.4 * batch.z
    losses = [
        diffusion.denoising_loss(GaussianNet(m, s), x0, batch).item() for m, s in ((0.5, 0.4), (0.4, 0.4), (0.5, 0.5))
    ]
    a = ALPHAS_CUMPROD[batch.t]
    least = (a * 0.4**2 / (a * 0.4**2 + 1 - a)).mean()  # the variance of the noise that x_t leaves open
    assert losses[0] == min(losses) and losses[0] == pytest.approx(float(least), rel=0.02)


def test_the_generator():
    diffusion, batch = problem()
    net = GaussianNet(0.5, 0.4)
    a = ALPHAS_CUMPROD[440]
    want = (a.sqrt() * 0.4**2 * batch.z + (1 - a) * 0.5) / (a * 0.4**2 + 1 - a)  # D at t_*, of pure noise
    got = diffusion.generate(net, batch.z, None)
    torch.testing.assert_close(got.double(), want.double(), rtol=1e-4, atol=1e-5)
    got.sum().backward()
    slope = ((1 - a) / (a * 0.4**2 + 1 - a)) * got.numel()
    assert net.mean.grad.item() == pytest.approx(float(slope), rel=1e-4)


def test_chance_goes_by_its_key_alone():
    chance = Chance(3, (2, 2, 2), 4, (100, 200), "cpu")
    one = chance.draw(50, "student", 7)
    chance.draw(9, "fake", 7, 0)
    again = Chance(3, (2, 2, 2), 4, (100, 200), "cpu").draw(50, "student", 7)
    for name in ("z", "noise", "t", "labels"):
        assert torch.equal(getattr(one, name), getattr(again, name))
    others = [
        chance.draw(50, "student", 8),
        chance.draw(50, "fake", 7),
        Chance(4, (2, 2, 2), 4, (100, 200), "cpu").draw(50, "student", 7),
    ]
    assert not any(torch.equal(one.z, other.z) for other in others) and not torch.equal(one.z, one.noise)
    assert set(one.labels.tolist()) == {0, 1, 2, 3} and int(one.t.min()) >= 100 and int(one.t.max()) < 200
    part = one.rows(slice(10, 20))
    assert torch.equal(part.t, one.t[10:20]) and torch.equal(part.labels, one.labels[10:20]) and len(part.z) == 10


class Predicting(nn.Module):
    """The exact answer for N(mean, deviation^2) at alpha and sigma [T], in the terms of a prediction type."""

    def __init__(self, mean, deviation, alpha, sigma, kind):
        super().__init__()
        self.mean, self.deviation, self.alpha, self.sigma, self.kind = mean, deviation, alpha, sigma, kind

    def forward(self, x, t, return_dict=True):
        alpha, sigma = (levels[t].reshape(-1, 1, 1, 1) for levels in (self.alpha, self.sigma))
        variance = alpha**2 * self.deviation**2 + sigma**2
        noise = sigma * (x.double() - alpha * self.mean) / variance
        data = (alpha * self.deviation**2 * x.double() + sigma**2 * self.mean) / variance
        known = {
            "epsilon": noise,
            "v_prediction": alpha * noise - sigma * data,
            "sample": data,
            "flow_prediction": noise - data,
        }
        return (known[self.kind].float(),)


FLOW_SIGMA = torch.arange(1001, dtype=torch.float64) / 1000


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample", "flow_prediction"])
def test_whatever_a_teacher_predicts(kind):
    """The pull is the difference of posterior means, the least denoising loss is at the true score, and a generator
    that answers for N(m, s^2) gives its posterior mean."""
    flow = kind == "flow_prediction"
    sigma = FLOW_SIGMA if flow else (1 - ALPHAS_CUMPROD).sqrt()
    alpha = 1 - FLOW_SIGMA if flow else ALPHAS_CUMPROD.sqrt()
    diffusion = Diffusion(alpha, sigma, 714 if flow else 440, kind, "cpu")
    fake, target = (Predicting(m, s, alpha, sigma, kind) for m, s in ((0.5, 0.4), (-0.3, 0.7)))
    batch = Chance(0, (3, 4, 4), None, (100, 900), "cpu").draw(6, "test")
    x0 = torch.randn(6, 3, 4, 4, generator=torch.Generator().manual_seed(1))
    a, b = (levels[batch.t].reshape(-1, 1, 1, 1) for levels in (alpha, sigma))
    x = a * x0 + b * batch.noise
    means = [(a * s**2 * x + b**2 * m) / (a**2 * s**2 + b**2) for m, s in ((0.5, 0.4), (-0.3, 0.7))]
    want = (means[0] - means[1]) / (x0 - means[1]).abs().mean((1, 2, 3), keepdim=True)
    torch.testing.assert_close(
        diffusion.score_difference(fake, target, x0, batch).double(), want, rtol=1e-3, atol=1e-4
    )

    many = Chance(0, (3, 4, 4), None, (100, 900), "cpu").draw(4000, "many")
    data = 0.5 + 0.4 * torch.randn(4000, 3, 4, 4, generator=torch.Generator().manual_seed(2))
    others = [Predicting(m, s, alpha, sigma, kind) for m, s in ((0.6, 0.4), (0.5, 0.5), (0.4, 0.3))]
    assert all(diffusion.denoising_loss(fake, data, many) < diffusion.denoising_loss(o, data, many) for o in others)

    a, b = diffusion.alpha_t, diffusion.sigma_t
    z = batch.z * (a**2 + b**2) ** 0.5
    mean = (a * 0.4**2 * z + b**2 * 0.5) / (a**2 * 0.4**2 + b**2)
    torch.testing.assert_close(diffusion.generate(fake, batch.z, None), mean, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    "scheduler",
    [FlowMatchEulerDiscreteScheduler(shift=3.0), DDIMScheduler(prediction_type="v_prediction")],
    ids=["flow", "v"],
)
def test_teachers_of_velocities_are_distilled(scheduler, tmp_path):
    teacher = PixelDiTPipeline(pixel_dit(), scheduler)
    config = DisBackConfig(images=8, batch_size=4, degradation_steps=2, path_points=1, num_fid=0, student_lr=1e-3)
    student = distill(teacher, config, tmp_path / "run")
    student.save_pretrained(tmp_path / "student")
    loaded = ptq4dm.load_pipeline(tmp_path / "student")
    flow = isinstance(scheduler, FlowMatchEulerDiscreteScheduler)
    assert loaded.scheduler.config.prediction_type == ("flow_prediction" if flow else "v_prediction")
    assert loaded.scheduler.config.generator_timestep == (714 if flow else 440)
    image = ptq4dm.sample(loaded, [3], num_inference_steps=1)
    # The same by the mathematics of the distillation, from the same noise and class.
    t, shares = loaded.scheduler.config.generator_timestep, loaded.scheduler
    diffusion = Diffusion(shares.alphas, shares.sigmas, t, loaded.scheduler.config.prediction_type, "cpu")
    z = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        right = diffusion.generate(loaded.transformer, z, torch.tensor([3]))
    torch.testing.assert_close(image, (right / 2 + 0.5).clamp(0, 1), rtol=0, atol=1e-5)
    assert not torch.equal(teacher.transformer.proj_out_2.weight, student.transformer.proj_out_2.weight)

"""The estimate of a gradient from losses, its Adam, and the subspace."""

import pytest
import torch

from helpers import normal
from ptq4dm.training.personalization.config import PersonalizeConfig
from ptq4dm.training.personalization.subspace import noise_axes, without
from ptq4dm.training.personalization.zeroth_order import Tuned, buffer_size, change, gradient, take

D = 24


def quadratic(u):
    """A loss [...] of u [..., D], and its gradient at one point."""
    scales = torch.linspace(0.5, 2, D)
    return (scales * (u - 1).square()).sum(-1) / 2, scales * (u - 1)


def estimate(u, images, perturbations, seed, size=1e-3):
    z = normal(images, perturbations, D, seed=seed).double()
    losses = torch.cat([quadratic(u.expand(images, 1, D))[0], quadratic(u + size * z)[0]], 1)
    return gradient(losses, z, PersonalizeConfig(perturbation=size, weights="size"))


def test_the_mean_of_many_estimates_is_the_gradient_and_their_variance_that_of_the_formula():
    u, draws, n = normal(D).double(), 4000, 2
    exact = quadratic(u)[1]
    found = torch.stack([estimate(u, 1, n, seed) for seed in range(draws)])
    error = found.std(0) / draws**0.5
    assert ((found.mean(0) - exact).abs() < 4 * error).all()
    expected = (D + 1) * exact.square().sum() / n  # E|zz'g - g|^2 of standard normal z
    assert float((found - exact).square().sum(1).mean()) == pytest.approx(float(expected), rel=0.05)


def test_images_of_equal_weight_count_by_the_directions_of_their_losses_alone():
    z, losses = normal(3, 4, D, seed=1), normal(3, 5, seed=2)
    equal, size = (PersonalizeConfig(weights=weights) for weights in ("equal", "size"))
    louder = losses * torch.tensor([[1.0], [50.0], [0.02]])
    torch.testing.assert_close(gradient(louder, z, equal), gradient(losses, z, equal))
    assert not torch.allclose(gradient(louder, z, size), gradient(losses, z, size), rtol=0.1)
    one = gradient(losses[:1], z[:1], size)  # of one image the direction is the same
    torch.testing.assert_close(one / one.norm(), (alone := gradient(losses[:1], z[:1], equal)) / alone.norm())
    assert torch.equal(gradient(torch.ones(3, 5), z, equal), torch.zeros(D))


def test_perturbations_of_each_image_are_averaged():
    u = normal(D).double()
    together = estimate(u, 6, 4, seed=1)
    z = normal(6, 4, D, seed=1).double()
    slopes = (quadratic(u + 1e-3 * z)[0] - quadratic(u)[0]) / 1e-3
    torch.testing.assert_close(together, (slopes[..., None] * z).reshape(24, D).mean(0))


def test_adam_is_that_of_torch():
    config = PersonalizeConfig(learning_rate=0.1, subspace="none", betas=(0.8, 0.95), epsilon=1e-3, average=0)
    state, same = Tuned.start(normal(D)), normal(D).requires_grad_()
    optimizer = torch.optim.Adam([same], 0.1, betas=(0.8, 0.95), eps=1e-3)
    for seed in range(5):
        same.grad = normal(D, seed=seed)
        optimizer.step()
        take(state, change(state, normal(D, seed=seed), config), config)
    torch.testing.assert_close(state.u, same.detach())


def test_where_no_loss_changes_nothing_moves():
    config = PersonalizeConfig(epsilon=0, subspace="none")
    state = Tuned.start(normal(D))
    take(state, change(state, torch.zeros(D), config), config)
    assert torch.equal(state.u, normal(D)) and state.step == 1


def planted(rows=20):
    """Embeddings that move along two directions much, and along all others little."""
    base = torch.linalg.qr(normal(D, 2, seed=1))[0].T
    return normal(rows, 2, seed=2) @ base + 1e-4 * normal(rows, D, seed=3)


def test_axes_are_the_last_principal_axes_of_standardised_columns():
    rows = planted()
    axes = noise_axes(rows, 1e-3)
    standard = (rows - rows.mean(0)) / rows.std(0, correction=0)
    _, s, v = torch.linalg.svd(standard.double(), full_matrices=False)
    shares = (s.square() / s.square().sum()).cumsum(0)
    kept = int((shares > 1 - 1e-3).nonzero()[0]) + 1
    wanted = v[kept : len(rows) - 1].float()  # the mean takes one axis away
    assert axes.shape == wanted.shape and len(axes) > 10
    torch.testing.assert_close(axes @ axes.T, torch.eye(len(axes)), atol=1e-5, rtol=0)
    torch.testing.assert_close(axes.T @ axes, wanted.T @ wanted, atol=1e-4, rtol=0)


def test_the_projection_takes_axes_out_and_leaves_all_else():
    axes = noise_axes(planted(), 1e-3)
    g = normal(D, seed=9)
    left = without(g, axes)
    assert float((axes @ left).abs().max()) < 1e-5
    torch.testing.assert_close(without(left, axes), left)
    outside = normal(D, seed=10)
    outside = outside - (outside @ axes.T) @ axes
    torch.testing.assert_close(without(outside, axes), outside, atol=1e-6, rtol=0)


def test_embeddings_that_never_moved_have_no_axes():
    assert noise_axes(torch.ones(5, D), 1e-3).shape == (0, D)


def test_the_least_number_of_axes_that_hold_more_is_kept():
    rows = torch.zeros(4, 3)
    rows[:, 0] = rows[:, 2] = torch.tensor([1.0, -1, 1, -1])
    rows[:, 1] = torch.tensor([1.0, 1, -1, -1])  # so one axis holds two thirds of the variance
    assert len(noise_axes(rows, 0.5)) == 1 and len(noise_axes(rows, 0.1)) == 0
    torch.testing.assert_close(noise_axes(rows, 0.5).abs(), torch.tensor([[0.0, 1, 0]]))


def test_the_buffer_is_of_the_last_tau_embeddings_after_their_update_and_begins_anew():
    """The released code's list goes round and is never emptied; that the axes are of tau whole steps must hold."""
    config = PersonalizeConfig(buffer=4, learning_rate=0.1, variance=0.2)
    state, seen = Tuned.start(normal(D)), []
    for seed in range(8):
        axes = state.axes
        take(state, change(state, normal(D, seed=seed), config), config)
        seen.append(state.u)
        if seed % 4 < 3:
            assert len(state.embeddings) == seed % 4 + 1 and state.axes is axes
    assert state.embeddings == []
    torch.testing.assert_close(state.axes, noise_axes(torch.stack(seen[4:]), 0.2))


def test_tau_is_at_most_a_sixth_of_the_numbers():
    assert buffer_size(PersonalizeConfig(), 768) == 128
    assert buffer_size(PersonalizeConfig(), 256) == 42


def test_the_released_code_divides_by_the_directions_that_are_left():
    states = {name: Tuned.start(normal(D)) for name in ("paper", "released")}
    for name, state in states.items():
        state.axes = noise_axes(planted(), 1e-3)
        change(state, normal(D, seed=5), PersonalizeConfig(subspace=name, perturbations=3))
    left = D - len(states["paper"].axes)
    torch.testing.assert_close(states["released"].first * ((left + 2) / 3) ** 0.5, states["paper"].first)


def test_the_average_follows_and_zero_is_none():
    state, config = Tuned.start(torch.zeros(D)), PersonalizeConfig(average=0.5)
    for _ in range(200):
        take(state, torch.full((D,), 0.01), config)
    torch.testing.assert_close(state.average, state.u - 0.01, atol=1e-4, rtol=0)
    none = Tuned.start(torch.zeros(D))
    take(none, torch.ones(D), PersonalizeConfig(average=0))
    assert torch.equal(none.average, none.u)

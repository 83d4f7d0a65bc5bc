"""Distribution correction: its closed form is the least of what it says, and where nothing is off it does nothing."""

import pytest
import torch

from helpers import normal
from ptq4dm.calibration.calls import Calls
from ptq4dm.reconstruction import correction
from ptq4dm.reconstruction.correction import corrected

pytestmark = pytest.mark.usefixtures("one_thread")


def batch(*times):
    calls = Calls()
    calls.time = torch.tensor(times, dtype=torch.float64)
    return calls


def moments(rows):
    """(mean, deviation) of each channel of [R, S, C]."""
    flat = rows.double().flatten(0, 1)
    return flat.mean(0), flat.std(0, correction=0)


def objective(new, old, mean, deviation, strength):
    found = new.mean(0), new.std(0, correction=0)
    return ((found[0] - mean) ** 2 + (found[1] - deviation) ** 2 + ((new - old) ** 2).mean(0) / strength).sum()


@pytest.mark.parametrize("strength", [1.0, 3.0])
def test_the_closed_form_is_what_a_minimiser_finds(monkeypatch, strength):
    monkeypatch.setattr(correction, "STRENGTH", strength)
    x = normal(2, 3, 4)  # tuples, tokens, channels
    mean, deviation = torch.linspace(-1, 1, 4).double(), torch.linspace(0.5, 2, 4).double()
    found = corrected([(batch(0.31, 0.38), [x])], {(0, 3): (mean, deviation)})[0][0]
    old = x.double().flatten(0, 1)
    new = old.clone().requires_grad_()
    optimizer = torch.optim.LBFGS([new], max_iter=500, tolerance_grad=1e-12, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = objective(new, old, mean, deviation, strength)
        loss.backward()
        return loss

    optimizer.step(closure)
    assert torch.allclose(found.double().flatten(0, 1), new.detach(), atol=1e-4)
    least = objective(new.detach(), old, mean, deviation, strength)
    assert objective(old, old, mean, deviation, strength) > 1.5 * least


def test_statistics_that_agree_change_nothing():
    x, image = normal(2, 5, 4), normal(2, 3, 4, 4, seed=1)
    channels = image.movedim(1, -1).flatten(1, 2)
    reference = {(0, 0): moments(x), (1, 0): moments(channels)}
    found = corrected([(batch(0.0, 0.05), [x, image])], reference)[0]
    assert torch.allclose(found[0], x, atol=1e-6) and torch.allclose(found[1], image, atol=1e-6)
    assert found[0].dtype == x.dtype and found[1].shape == image.shape


def test_each_timestep_bin_has_statistics_of_its_own():
    x = normal(2, 50, 3)
    reference = {(0, 0): (torch.full((3,), 5.0).double(), torch.ones(3).double())}
    found = corrected([(batch(0.0, 0.95), [x])], reference)[0][0]
    assert torch.equal(found[1], x[1])  # nothing is known of its bin
    own = moments(x[:1])
    half = moments(found[:1])
    assert torch.allclose(half[0], (own[0] + 5) / 2, atol=1e-5) and torch.allclose(
        half[1], (own[1] + 1) / 2, atol=1e-5
    )


def test_a_unit_may_have_several_rows():
    """A call that was recorded whole, of a batch: its rows lie in one bin."""
    x = normal(4, 5, 3)
    reference = {(0, place): (torch.full((3,), 5.0 * place).double(), torch.ones(3).double()) for place in (0, 9)}
    found = corrected([(batch(0.0, 0.95), [x])], reference)[0][0]
    parts = [corrected([(batch(t), [x[rows]])], reference)[0][0] for t, rows in ((0.0, [0, 1]), (0.95, [2, 3]))]
    assert torch.equal(found, torch.cat(parts)) and (found[2:].mean() - x[2:].mean()) > 10


def test_a_constant_channel_and_what_is_no_feature_stay_finite():
    x = torch.full((1, 4, 2), 0.3)
    leaves = [x, torch.tensor([5]), "text", None, normal(1, 8)]  # the last is an embedding
    found = corrected([(batch(0.2), leaves)], {(0, 2): (torch.ones(2).double(), torch.ones(2).double())})[0]
    assert torch.allclose(found[0], torch.full_like(x, 0.65), atol=1e-2)
    assert all(new is old for new, old in zip(found[1:], leaves[1:], strict=True))

"""The embedded feature network, its statistics, and that both are what their model card says."""

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from ptq4dm.errors import UserError
from ptq4dm.evaluation.features import Features, load_features
from ptq4dm.pipelines.embedded import asset_path


@pytest.fixture(scope="module")
def net():
    return load_features()


def noise(number, seed=0):
    return torch.rand(number, 3, 32, 32, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def test_loaded_network_is_float32_in_evaluation_mode(net):
    assert not net.training
    assert {p.dtype for p in net.parameters()} == {torch.float32}
    assert not any(p.requires_grad for p in net.parameters())
    assert sum(p.numel() for p in net.parameters()) == 3_699_514


def test_weights_are_those_of_the_asset(net):
    stored = load_file(asset_path("features-cifar10/model.safetensors"))
    assert stored.keys() == net.state_dict().keys()
    for name, value in net.state_dict().items():
        torch.testing.assert_close(value, stored[name].to(value.dtype), rtol=0, atol=0)


def test_shapes_and_independence_of_the_batch(net):
    x = noise(5)
    features = net.features(x)
    assert features.shape == (5, 384)
    assert net(x).shape == (5, 10)
    torch.testing.assert_close(net.features(x[2:3])[0], features[2], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(net(x), net.head(features) * 0.5)


def test_features_follow_the_formula(net):
    """The network written out a second time with plain functions, from the stored tensors."""
    w = load_file(asset_path("features-cifar10/model.safetensors"))
    w = {k: v.float() for k, v in w.items()}
    F = torch.nn.functional

    def block(x, name):
        x = F.conv2d(x, w[f"{name}.0.weight"], padding=1)
        mean, var = w[f"{name}.1.running_mean"], w[f"{name}.1.running_var"]
        x = F.batch_norm(x, mean, var, w[f"{name}.1.weight"], w[f"{name}.1.bias"])
        return F.gelu(x)

    x = noise(3, seed=1)
    h = F.max_pool2d(block(block(x, "prep"), "l1"), 2)
    h = h + block(block(h, "r1.0"), "r1.1")
    h = F.max_pool2d(block(F.max_pool2d(block(h, "l2"), 2), "l3"), 2)
    h = h + block(block(h, "r3.0"), "r3.1")
    torch.testing.assert_close(net.features(x), h.mean((2, 3)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shape", [(1, 3, 64, 64), (1, 1, 32, 32), (3, 32, 32)])
def test_wrong_shape_is_a_user_error(net, shape):
    with pytest.raises(UserError, match=r"\[N, 3, 32, 32\]"):
        net.features(torch.zeros(shape))


def test_integer_images_are_a_user_error(net):
    with pytest.raises(UserError, match="floating-point"):
        net.features(torch.zeros(1, 3, 32, 32, dtype=torch.uint8))


def test_untrained_network_has_the_same_layout(net):
    fresh = Features().state_dict()
    assert {k: v.shape for k, v in fresh.items()} == {k: v.shape for k, v in net.state_dict().items()}


def test_stored_statistics_are_a_mean_and_a_covariance():
    with np.load(asset_path("features-cifar10/train-statistics.npz"), allow_pickle=False) as stored:
        mu, sigma = stored["mu"], stored["sigma"]
        assert int(stored["n"]) == 50_000
        assert (str(stored["feature"]), str(stored["mode"])) == ("ptq4dm features-cifar10", "none (32x32)")
    assert mu.shape == (384,) and sigma.shape == (384, 384)
    assert mu.dtype == sigma.dtype == np.float64
    np.testing.assert_array_equal(sigma, sigma.T)
    assert np.linalg.eigvalsh(sigma).min() > 0


def test_samples_of_noise_lie_far_from_the_training_set(net):
    """Noise is far from the pictures: every feature distance by means alone is large against their spread."""
    with np.load(asset_path("features-cifar10/train-statistics.npz"), allow_pickle=False) as stored:
        mu, sigma = stored["mu"], stored["sigma"]
    away = net.features(noise(16)).mean(0).double().numpy() - mu
    assert away @ np.linalg.solve(sigma, away) > 10

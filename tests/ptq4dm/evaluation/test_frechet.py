"""Frechet distance against torchmetrics and scipy; moments; statistics files; the Inception path's own parts."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import scipy.linalg
import torch
from PIL import Image

from ptq4dm import UserError
from ptq4dm.evaluation.extractors import (
    Extractor,
    folder_moments,
    frechet_entry,
    load_extractor,
    load_reference_statistics,
)
from ptq4dm.evaluation.frechet import Moments, Statistics, frechet_distance, read_statistics, write_statistics
from ptq4dm.evaluation.inception import InceptionFeatures, load_inception


def features(seed: int, n: int = 400, d: int = 24) -> torch.Tensor:
    """Correlated features with another mean, spread and mixing for each seed."""
    g = torch.Generator().manual_seed(seed)
    mixing = torch.randn(d, d, generator=g, dtype=torch.float64) / d**0.5 + torch.eye(d) * (1 + seed / 10)
    return torch.randn(n, d, generator=g, dtype=torch.float64) @ mixing + seed / 5


def moments_of(x: torch.Tensor, chunk: int = 1000) -> Moments:
    m = Moments(x.shape[1])
    for part in x.split(chunk):
        m.update(part)
    return m


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    a, b = moments_of(a), moments_of(b)
    return frechet_distance(a.mu, a.sigma, b.mu, b.sigma)


def test_moments_are_numpys_mean_and_unbiased_covariance_whatever_the_chunks():
    x = features(1) + 50  # a mean far from zero is what one-pass sums lose digits to
    for chunk in (1, 7, 400):
        m = moments_of(x, chunk)
        np.testing.assert_allclose(m.mu, x.numpy().mean(0), rtol=1e-12)
        np.testing.assert_allclose(m.sigma, np.cov(x.numpy(), rowvar=False), rtol=1e-8, atol=1e-10)
    assert m.count == 400


def test_distance_agrees_with_scipy_sqrtm():
    a, b = features(1), features(2)
    (m1, s1), (m2, s2) = ((x.numpy().mean(0), np.cov(x.numpy(), rowvar=False)) for x in (a, b))
    expected = ((m1 - m2) ** 2).sum() + np.trace(s1 + s2 - 2 * scipy.linalg.sqrtm(s1 @ s2).real)
    assert expected > 0.1
    assert distance(a, b) == pytest.approx(expected, rel=1e-6)


def test_distance_agrees_with_torchmetrics():
    """torchmetrics' public metric, fed the features themselves through an identity network, in float64."""
    from torchmetrics.image.fid import FrechetInceptionDistance

    class Identity(torch.nn.Module):
        num_features = 24

        def forward(self, x):
            return x

    a, b = features(1), features(2)
    metric = FrechetInceptionDistance(feature=Identity()).set_dtype(torch.float64)
    for part in a.split(100):
        metric.update(part, real=True)
    for part in b.split(100):
        metric.update(part, real=False)
    theirs = metric.compute()
    assert theirs.dtype == torch.float64
    assert distance(a, b) == pytest.approx(float(theirs), rel=1e-6)


def test_equal_covariance_leaves_the_squared_mean_distance_and_order_does_not_matter():
    a = features(1)
    assert distance(a, a + 0.5) == pytest.approx(24 * 0.25, rel=1e-9)
    assert distance(a, features(2)) == pytest.approx(distance(features(2), a), rel=1e-9)
    # Diagonal Gaussians: sum (s1 - s2)^2 of the standard deviations.
    got = frechet_distance(torch.zeros(2), torch.diag(torch.tensor([4.0, 9.0])), torch.zeros(2), torch.eye(2))
    assert got == pytest.approx(1 + 4)


def test_fewer_images_than_features_stay_real_and_near_zero_against_themselves():
    a = features(3, n=10)
    assert abs(distance(a, a)) < 1e-5 * float(moments_of(a).sigma.trace())
    assert distance(a, features(2, n=10)) > 1


@pytest.mark.parametrize(
    "spoil", [lambda m, s: (m[:-1], s), lambda m, s: (m * float("nan"), s), lambda m, s: (m, s * float("inf"))]
)
def test_distance_refuses_gaussians_that_mean_nothing(spoil):
    m, s = torch.zeros(3), torch.eye(3)
    with pytest.raises(UserError):
        frechet_distance(m, s, *spoil(m + 1, s + 1))


def test_moments_refuse_nan_features_wrong_widths_and_single_images():
    m = Moments(3)
    with pytest.raises(UserError, match="1 of 2 feature vectors"):
        m.update(torch.tensor([[1.0, 2.0, 3.0], [1.0, float("nan"), 3.0]]))
    with pytest.raises(UserError, match=r"\[N, 3\]"):
        m.update(torch.zeros(2, 4))
    m.update(torch.zeros(1, 3))
    with pytest.raises(UserError, match="at least 2 images"):
        _ = m.sigma


def test_statistics_files_round_trip_and_bare_files_of_others_are_read(tmp_path):
    s = moments_of(features(1)).statistics("none (32x32)", "some network")
    write_statistics(tmp_path / "a.npz", s)
    back = read_statistics(tmp_path / "a.npz")
    assert torch.equal(back.mu, s.mu) and torch.equal(back.sigma, s.sigma)
    assert (back.n, back.mode, back.feature) == (400, "none (32x32)", "some network")
    assert [p.name for p in tmp_path.iterdir()] == ["a.npz"]  # no temporary file left
    np.savez(tmp_path / "b.npz", mu=s.mu.float().numpy(), sigma=s.sigma.float().numpy(), mu_s=np.ones(3))
    bare = read_statistics(tmp_path / "b.npz")
    assert bare.mu.dtype == torch.float64 and (bare.n, bare.mode, bare.feature) == (None, None, None)


def test_unreadable_statistics_files_are_user_errors(tmp_path):
    mu, sigma = np.zeros(3), np.eye(3)
    np.savez(tmp_path / "good.npz", mu=mu, sigma=sigma)
    np.savez(tmp_path / "images.npz", arr_0=np.zeros((2, 8, 8, 3), np.uint8))
    np.savez(tmp_path / "shape.npz", mu=mu, sigma=np.eye(4))
    np.savez(tmp_path / "nan.npz", mu=mu * np.nan, sigma=sigma)
    np.savez(tmp_path / "foreign.npz", weights=mu)
    np.savez(tmp_path / "text.npz", mu=np.array(["a", "b", "c"]), sigma=sigma)
    np.savez(tmp_path / "pickle.npz", mu=np.array([None, {}], dtype=object), sigma=sigma)
    np.save(tmp_path / "array.npy", mu)
    whole = (tmp_path / "good.npz").read_bytes()
    (tmp_path / "cut.npz").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "damaged.npz").write_bytes(whole[:130] + b"\xff" * 16 + whole[146:])
    (tmp_path / "empty.npz").write_bytes(b"")
    for name, message in {
        "images.npz": "arr_0",
        "shape.npz": "do not fit",
        "nan.npz": "NaN",
        "foreign.npz": "no mu and sigma: weights",
        "text.npz": "real numbers",
        "pickle.npz": "pickle.npz cannot be read .*Python objects",
        "array.npy": "array.npy cannot be read .*not a zip file.*give an npz with mu and sigma",
        "cut.npz": "cut.npz cannot be read .*",
        "damaged.npz": "damaged.npz cannot be read .*",
        "empty.npz": "empty.npz cannot be read .*",
        "missing.npz": "no reference statistics",
    }.items():
        with pytest.raises(UserError, match=message):
            read_statistics(tmp_path / name)
    with pytest.raises(UserError, match="cannot write"):
        write_statistics(tmp_path / "no" / "a.npz", Statistics(torch.zeros(1), torch.ones(1, 1)))


def test_statistics_that_are_no_covariance_are_refused(tmp_path):
    mu, sigma = np.zeros(6), np.cov(features(1, d=6).numpy(), rowvar=False)
    for wrong, message in (
        (-np.eye(6), "negative in some direction"),
        (np.diag([1.0, 1, 1, 1, 1, -0.01]), "negative in some direction"),
        (np.triu(sigma), "not symmetric; write the whole matrix"),
        (np.arange(36.0).reshape(6, 6), "not symmetric"),
    ):
        np.savez(tmp_path / "a.npz", mu=mu, sigma=wrong)
        with pytest.raises(UserError, match=f"a.npz: sigma is no covariance, for it is {message}"):
            read_statistics(tmp_path / "a.npz")


@pytest.mark.parametrize("dtype", ["float16", "float32", ">f8", "longdouble", "int64"])
def test_rounding_of_any_dtype_is_allowed(dtype, tmp_path):
    """Of a singular covariance, too: fewer images than features."""
    for n in (400, 10):
        sigma = np.cov(features(1, n=n).numpy(), rowvar=False)
        sigma = (np.diag([4, 0, 9]) if dtype == "int64" else sigma).astype(dtype)
        np.savez(tmp_path / "a.npz", mu=np.zeros(len(sigma), dtype), sigma=sigma)
        back = read_statistics(tmp_path / "a.npz").sigma
        assert back.dtype == torch.float64 and torch.equal(back, back.T)
        np.testing.assert_allclose(back, sigma.astype(np.float64), atol=1e-3 * float(abs(sigma).max()))
    np.savez(tmp_path / "a.npz", mu=np.zeros(3), sigma=np.zeros((3, 3)))  # one picture many times
    assert read_statistics(tmp_path / "a.npz").sigma.abs().max() == 0


def test_statistics_of_no_features_are_refused(tmp_path):
    np.savez(tmp_path / "a.npz", mu=np.zeros(0), sigma=np.zeros((0, 0)))
    with pytest.raises(UserError, match=r"mu \[0\] and sigma \[0, 0\] do not fit"):
        read_statistics(tmp_path / "a.npz")


def test_counts_and_names_of_any_shape(tmp_path):
    common = {"mu": np.zeros(3), "sigma": np.eye(3)}
    for n in (8, [8], [[8]], np.float32(8), np.array([8], np.uint8)):
        np.savez(tmp_path / "a.npz", **common, n=n, mode=["clean"], feature=np.array(b"net"))
        back = read_statistics(tmp_path / "a.npz")
        assert (back.n, back.mode, back.feature) == (8, "clean", "net") and isinstance(back.n, int)
    for n in ([8, 9], [], "8", 8.5, 0, -1, float("nan")):
        np.savez(tmp_path / "a.npz", **common, n=n)
        with pytest.raises(UserError, match="n must be one number|n must be the count of images"):
            read_statistics(tmp_path / "a.npz")


def test_a_reference_made_another_way_is_refused(tmp_path):
    extractor = load_extractor("feature-fid")
    embedded = load_reference_statistics(extractor, None, 1)
    assert embedded.statistics.n == 50000
    for change, message in [({"mode": "clean"}, "mode 'clean'"), ({"feature": "other"}, "feature 'other'")]:
        write_statistics(tmp_path / "s.npz", Statistics(**{**vars(embedded.statistics), **change}))
        with pytest.raises(UserError, match=message):
            load_reference_statistics(extractor, tmp_path / "s.npz", 1)
    np.savez(tmp_path / "inception.npz", mu=np.zeros(2048), sigma=np.eye(2048))
    with pytest.raises(UserError, match="2048 features"):
        load_reference_statistics(extractor, tmp_path / "inception.npz", 1)


def test_a_network_that_resizes_takes_folders_of_mixed_sizes(tmp_path):
    """Each image by itself, in any batch; what is no picture is counted."""
    rng = np.random.default_rng(0)
    pictures = [rng.integers(0, 256, (h, w, 3)).astype(np.uint8) for h, w in [(8, 8), (8, 6), (5, 9), (8, 8), (6, 8)]]
    for k, pixels in enumerate(pictures):
        Image.fromarray(pixels).save(tmp_path / f"{k}.png")
    (tmp_path / "notes.txt").write_text("x")

    def means(images):
        return images.double().mean((2, 3))

    extractor = Extractor("FID", "means", 3, "each by itself", means, torch.device("cpu"), any_size=True)
    expected = np.stack([pixels.reshape(-1, 3).mean(0) for pixels in pictures])
    for batch_size in (1, 3, 5):
        moments, passed_over = folder_moments(tmp_path, extractor, batch_size)
        np.testing.assert_allclose(moments.mu, expected.mean(0), rtol=1e-12)
        np.testing.assert_allclose(moments.sigma, np.cov(expected, rowvar=False), rtol=1e-8)
        assert moments.count == 5 and passed_over.endswith("1 not pictures by their suffix, passed over")
    _, warnings = frechet_entry(extractor, moments, load_reference_statistics(extractor, tmp_path, 2))
    assert any("passed over" in line for line in warnings)
    with pytest.raises(UserError, match="images must share one size"):
        folder_moments(tmp_path, load_extractor("feature-fid"), 2)


class FlatNetwork(torch.nn.Module):
    """Stands where Inception stands: what reaches its first layer comes out, so that the input can be looked at."""

    INPUT_IMAGE_SIZE = 299

    def __init__(self):
        super().__init__()
        self.first, self.last = torch.nn.Identity(), torch.nn.Linear(1, 1)

    def forward(self, x):
        return x.flatten(1)


def test_clean_resize_is_pillows_bicubic_on_float_and_torch_fidelity_gets_raw_pixels():
    x = torch.randint(0, 256, (2, 3, 32, 40), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    clean = InceptionFeatures(FlatNetwork(), "clean", "test")
    assert clean.mode == "clean (bicubic, antialias)"
    got = clean(x).reshape(2, 3, 299, 299) * 128 + 128
    for image, resized in zip(x, got, strict=True):
        for channel, plane in zip(image, resized, strict=True):
            expected = Image.fromarray(channel.float().numpy(), mode="F").resize((299, 299), Image.BICUBIC)
            np.testing.assert_allclose(plane, np.asarray(expected).clip(0, 255), atol=2e-3)
    raw = InceptionFeatures(FlatNetwork(), "torch-fidelity", "test")
    assert torch.equal(raw(x), x.flatten(1)) and raw.mode == "torch-fidelity (TF1 bilinear)"


def test_without_torch_fidelity_fid_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    monkeypatch.setitem(sys.modules, "torch_fidelity.feature_extractor_inceptionv3", None)
    with pytest.raises(UserError, match="pip install torch-fidelity"):
        load_inception()
    with pytest.raises(UserError, match="unknown resize 'bilinear'"):
        load_inception(resize="bilinear")


def inception_with_random_weights():
    """torch-fidelity's own network without its download; the test is skipped where the package does not import."""
    try:
        import torch_fidelity.feature_extractor_inceptionv3 as port
        import torchmetrics.image.fid  # noqa: F401
    except Exception as error:  # noqa: BLE001  (a torchvision built for another torch raises RuntimeError)
        pytest.skip(f"torch-fidelity does not import: {error}")
    torch.manual_seed(0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(port, "load_state_dict_from_url", lambda *a, **k: None)
        patch.setattr(port.FeatureExtractorInceptionV3, "load_state_dict", lambda self, state: None)
        return port.FeatureExtractorInceptionV3("random", ["2048"])


def test_inception_from_a_weights_file_is_torch_fidelitys_network(tmp_path):
    network = inception_with_random_weights()
    torch.save(network.state_dict(), tmp_path / "weights.pth")
    tf1, clean = (load_inception(tmp_path / "weights.pth", resize) for resize in ("torch-fidelity", "clean"))
    g = torch.Generator().manual_seed(1)
    small = torch.randint(0, 256, (1, 3, 32, 32), dtype=torch.uint8, generator=g)
    full = torch.nn.functional.pad(small, (0, 267, 0, 267))  # 299x299: nothing to resize
    features = tf1(small)
    assert features.shape == (1, 2048) and features.abs().max() > 0
    torch.testing.assert_close(features, network(small)[0], rtol=1e-5, atol=0)
    torch.testing.assert_close(tf1(full), clean(full), rtol=1e-4, atol=0)  # so both are the same network
    assert ((features - clean(small)).abs() / features.abs().mean()).max() > 0.01
    assert tf1.feature.startswith("inception-v3 (")  # not the published weights, and not called so
    whole = (tmp_path / "weights.pth").read_bytes()
    (tmp_path / "cut.pth").write_bytes(whole[:50000])
    torch.save({"a": torch.zeros(1)}, tmp_path / "other.pth")
    torch.save(network, tmp_path / "pickled.pth")
    for name, message in {"cut": "cannot be read", "other": "does not hold", "pickled": "cannot be read"}.items():
        with pytest.raises(UserError, match=message):
            load_inception(tmp_path / f"{name}.pth")

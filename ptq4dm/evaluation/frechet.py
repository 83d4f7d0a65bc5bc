"""Frechet distance between two sets of feature vectors, each taken as a Gaussian.

    d^2 = |mu1 - mu2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2))          (Dowson and Landau 1982; Heusel et al. 2017, eq. 6)

All in float64: the one-pass covariance below loses its digits in float32. The trace of the root is taken from two
symmetric eigenproblems, tr (S1 S2)^(1/2) = tr (S1^(1/2) S2 S1^(1/2))^(1/2), which stay real when a covariance is
singular (fewer images than features).
"""

from __future__ import annotations

import os
import textwrap
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..errors import UserError
from ..files.arrays import ArrayFile, read_arrays
from ..files.atomic import replacing


@dataclass
class Statistics:
    """A Gaussian and where it came from: mu [d] and sigma [d, d] (unbiased), float64.

    n: number of images; mode: how they were resized; feature: which network. None where a file does not say.
    """

    mu: Tensor
    sigma: Tensor
    n: int | None = None
    mode: str | None = None
    feature: str | None = None


class Moments:
    """Running float64 sums over feature vectors of width `dim`; the order and size of the chunks do not matter."""

    def __init__(self, dim: int) -> None:
        self.count = 0
        self.sum = torch.zeros(dim, dtype=torch.float64)
        self.outer = torch.zeros(dim, dim, dtype=torch.float64)

    def update(self, features: Tensor) -> None:
        """Add features [N, dim], any floating dtype and device.

        Raises:
            UserError: another width, or NaN or infinity among them.
        """
        if features.ndim != 2 or features.shape[1] != len(self.sum):
            raise UserError(f"expected features of shape [N, {len(self.sum)}], got {list(features.shape)}.")
        x = features.detach().cpu().double()
        bad = int((~x.isfinite()).any(1).sum())
        if bad:
            raise UserError(f"{bad} of {len(x)} feature vectors hold NaN or infinity; look at the images.")
        self.count += len(x)
        self.sum += x.sum(0)
        self.outer += x.T @ x

    def reduced(self) -> Moments:
        """The sum over all processes of an accelerate launch (itself when there is one process)."""
        from accelerate import PartialState
        from accelerate.utils import reduce

        state = PartialState()
        if state.num_processes == 1:
            return self
        d = len(self.sum)
        flat = torch.cat([torch.tensor([self.count], dtype=torch.float64), self.sum, self.outer.flatten()])
        flat = reduce(flat.to(state.device), reduction="sum").cpu()  # NCCL reduces on its own device only
        total = Moments(d)
        total.count = int(flat[0])
        total.sum, total.outer = flat[1 : d + 1], flat[d + 1 :].reshape(d, d)
        return total

    @property
    def mu(self) -> Tensor:
        """[dim] float64 mean."""
        self._need(1)
        return self.sum / self.count

    @property
    def sigma(self) -> Tensor:
        """[dim, dim] float64 covariance, unbiased (divided by n - 1)."""
        self._need(2)
        mu = self.mu
        sigma = (self.outer - self.count * torch.outer(mu, mu)) / (self.count - 1)
        return (sigma + sigma.T) / 2

    def statistics(self, mode: str | None = None, feature: str | None = None) -> Statistics:
        return Statistics(self.mu, self.sigma, self.count, mode, feature)

    def _need(self, n: int) -> None:
        if self.count < n:
            raise UserError(f"a Frechet distance needs at least {n} images on each side, got {self.count}.")


def _symmetric_root(sigma: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(sigma)
    return (vectors * values.clamp_min(0).sqrt()) @ vectors.T


def frechet_distance(mu1, sigma1, mu2, sigma2) -> float:
    """Squared Frechet distance of two Gaussians: mu [d] and sigma [d, d], tensors or arrays, computed in float64.

    Returns the raw figure: two equal Gaussians may give -1e-9 or so; clamp at zero when printing, not before.

    Raises:
        UserError: shapes that do not fit, or NaN or infinity.
    """
    mu1, sigma1, mu2, sigma2 = (torch.as_tensor(x).cpu().double() for x in (mu1, sigma1, mu2, sigma2))
    d = mu1.numel()
    shapes = [tuple(x.shape) for x in (mu1, sigma1, mu2, sigma2)]
    if shapes != [(d,), (d, d)] * 2:
        raise UserError(f"these Gaussians do not fit each other: mu, sigma, mu, sigma have the shapes {shapes}.")
    if not all(bool(x.isfinite().all()) for x in (mu1, sigma1, mu2, sigma2)):
        raise UserError("a mean or covariance holds NaN or infinity; a Frechet distance of it means nothing.")
    root = _symmetric_root(sigma1)
    product = root @ sigma2 @ root
    cross = torch.linalg.eigvalsh((product + product.T) / 2).clamp_min(0).sqrt().sum()
    return float((mu1 - mu2).square().sum() + sigma1.trace() + sigma2.trace() - 2 * cross)


def write_statistics(path: str | os.PathLike, statistics: Statistics) -> None:
    """Write `mu`, `sigma` and, where known, `n`, `mode`, `feature` as npz; the first two are what others read.

    Raises:
        UserError: the file cannot be written.
    """
    arrays = {"mu": statistics.mu.numpy(), "sigma": statistics.sigma.numpy()}
    for key in ("n", "mode", "feature"):
        if getattr(statistics, key) is not None:
            arrays[key] = np.array(getattr(statistics, key))
    # a file object, because savez appends .npz to names
    with replacing(path) as temporary, open(temporary, "wb") as file:
        np.savez(file, **arrays)


def read_statistics(path: str | os.PathLike) -> Statistics:
    """Read reference statistics from npz: `mu` [d] and `sigma` [d, d]; `n`, `mode`, `feature` if there, rest ignored.

    So the files of pytorch-fid, EDM and clean-fid are read, and ADM's where they hold mu and sigma. An ADM file of
    images only (`arr_0`) is refused: its pictures must go through the network as a folder.

    Raises:
        UserError: no such file, truncated, not an npz, no mu and sigma, shapes that do not fit, NaN or infinity, a
            sigma that is no covariance (not symmetric, or negative in some direction), or an n that is no count.
    """
    if not os.path.exists(path):
        raise UserError(f"there are no reference statistics at {path}.")

    def wanted(file: ArrayFile) -> dict[str, np.ndarray]:
        if not {"mu", "sigma"} <= set(file.names):
            if "arr_0" in file.names:
                raise UserError(
                    f"{path} holds images (arr_0), not statistics; save them as PNG files and pass the folder."
                )
            raise UserError(f"{path} holds no mu and sigma: {', '.join(file.names[:9]) or 'it is empty'}.")
        mu, sigma = file.shape("mu"), file.shape("sigma")
        if len(mu) != 1 or not mu[0] or sigma != (mu[0], mu[0]):
            raise UserError(f"{path}: mu {list(mu)} and sigma {list(sigma)} do not fit each other.")
        return {k: file.array(k) for k in ("mu", "sigma", "n", "mode", "feature") if k in file.names}

    arrays = read_arrays(path, wanted, "give an npz with mu and sigma, or a folder of pictures")
    mu, sigma = arrays["mu"], arrays["sigma"]
    if mu.dtype.kind not in "fiu" or sigma.dtype.kind not in "fiu":
        raise UserError(f"{path}: mu and sigma must hold real numbers, not {mu.dtype} and {sigma.dtype}.")
    if not (np.isfinite(mu).all() and np.isfinite(sigma).all()):
        raise UserError(f"{path} holds NaN or infinity.")
    return Statistics(
        torch.from_numpy(mu.astype(np.float64)),
        _covariance(sigma, path),
        _count(arrays["n"], path) if "n" in arrays else None,
        _text(arrays["mode"]) if "mode" in arrays else None,
        _text(arrays["feature"]) if "feature" in arrays else None,
    )


def _covariance(sigma: np.ndarray, path) -> Tensor:
    """[d, d] float64, made symmetric to the last digit. What rounding does in sigma's own dtype is allowed."""
    rounding = float(np.finfo(sigma.dtype).eps) if sigma.dtype.kind == "f" else 0.0
    s = torch.from_numpy(sigma.astype(np.float64))
    if (s - s.T).abs().max() > max(1e-5, 4 * rounding) * s.abs().max():
        raise UserError(f"{path}: sigma is no covariance, for it is not symmetric; write the whole matrix.")
    s = (s + s.T) / 2
    values = torch.linalg.eigvalsh(s)
    if values[0] < -max(1e-4, len(s) ** 0.5 * rounding) * values.abs().max():
        raise UserError(
            f"{path}: sigma is no covariance, for it is negative in some direction (its eigenvalues go from "
            f"{float(values[0]):.3g} to {float(values[-1]):.3g}); make the statistics anew."
        )
    return s


def _count(n: np.ndarray, path) -> int:
    """A number of images, whatever the shape of the array that holds it."""
    if n.size != 1 or n.dtype.kind not in "fiu" or not np.isfinite(n).all():
        raise UserError(f"{path}: n must be one number, the count of images; it is {n.dtype} {list(n.shape)}.")
    count = float(n.reshape(-1)[0])
    if not 1 <= count <= 2**53 or count != int(count):
        raise UserError(f"{path}: n must be the count of images, 1 or more; it is {count:g}.")
    return int(count)


def _text(array: np.ndarray) -> str:
    """A name, whatever the shape of the array that holds it."""
    value = array.reshape(-1)[0] if array.size == 1 else array
    text = value.decode(errors="replace") if isinstance(value, bytes) else str(value)
    return textwrap.shorten(text, 200, placeholder=" ...")

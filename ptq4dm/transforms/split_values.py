"""SplitQuant's split of values (arXiv:2501.12428): a layer becomes three of the same shape, whose sum it is.

    W = lower + middle + upper,    b likewise        y = (lower x + b_l) + (middle x + b_m) + (upper x + b_u)

Weights are clustered by k-means with three centres, over the whole tensor of a Linear and over each output of a
convolution; clusters meet half-way between centres. The authors' code starts k-means at random; here it starts at the
quantiles 1/6, 1/2, 5/6, and at three places evenly between the extremes, and the better of the two is taken.

A model so split has other modules, which no file of its architecture could be loaded into: so this changes one layer,
to look at; models are quantized by a format that has the three in one (layers/split/values.py).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..errors import UserError

ITERATIONS = 100
CLUSTERS = 3
KINDS = (nn.Linear, nn.Conv2d)


class SplitInThree(nn.Module):
    """Three layers whose outputs are added."""

    def __init__(self, lower: nn.Module, middle: nn.Module, upper: nn.Module) -> None:
        super().__init__()
        self.lower, self.middle, self.upper = lower, middle, upper

    def forward(self, x: Tensor) -> Tensor:
        return self.lower(x) + self.middle(x) + self.upper(x)


@torch.no_grad()
def split_in_three(layer: nn.Module) -> SplitInThree:
    """The three layers of a float Linear or Conv2d, with weights and biases in three parts; the layer stays as it is.

    Raises UserError for another layer, or one with fewer outputs than parts, which the paper leaves out.
    """
    if type(layer) not in KINDS or len(layer.weight) < CLUSTERS:
        raise UserError(f"values of a Linear or Conv2d with 3 outputs or more are split; got {layer}.")
    weight, bias = layer.weight.detach(), layer.bias
    ids = clusters(weight.flatten(1), by_output=isinstance(layer, nn.Conv2d)).view(weight.shape)
    biases = None if bias is None else clusters(bias.detach()[None], by_output=True)[0]
    parts = []
    for number in range(CLUSTERS):
        part = _empty_like(layer)
        part.weight = nn.Parameter(torch.where(ids == number, weight, 0.0))
        if biases is not None:
            part.bias = nn.Parameter(torch.where(biases == number, bias.detach(), 0.0))
        parts.append(part.train(layer.training))
    return SplitInThree(*parts)


def clusters(weight: Tensor, by_output: bool, count: int = CLUSTERS) -> Tensor:
    """The cluster of each weight [N, K] float, uint8 [N, K], rising with the value; of all weights alike, or of each
    output by itself."""
    rows = weight.detach().double() if by_output else weight.detach().double().reshape(1, -1)
    bounds = best_bounds(rows, count).contiguous()
    # A weight on the lowest boundary is below it, one on the highest above, as in the authors' code.
    ids = torch.zeros(rows.shape, dtype=torch.uint8, device=weight.device)
    for i in range(count - 1):
        bound = bounds[:, i : i + 1]
        ids += (rows >= bound if i == count - 2 and count > 2 else rows > bound).to(torch.uint8)
    return ids.view(weight.shape)


def best_bounds(rows: Tensor, count: int) -> Tensor:
    """Boundaries [R, count - 1] of `count` clusters of each row [R, n] float64: half-way between k-means' centres."""
    values = rows.sort(1).values
    sums = torch.cat([values.new_zeros(len(values), 1), values.cumsum(1)], 1)
    shares = (torch.arange(count, dtype=torch.float64, device=rows.device) + 0.5) / count
    low, high = values[:, :1], values[:, -1:]
    starts = (values[:, (shares * values.shape[1]).long()], low + (high - low) * shares)
    found = [_means(values, sums, start) for start in starts]
    explained = torch.stack([one[1] for one in found])
    better = (explained[1] > explained[0])[:, None]
    return torch.where(better, found[1][0], found[0][0])


def _means(values: Tensor, sums: Tensor, centres: Tensor) -> tuple[Tensor, Tensor]:
    """(boundaries [R, count - 1], sum of n_c m_c^2 [R], which grows as squared errors fall) from some centres on."""
    rows, n = values.shape
    first, last = (
        torch.zeros(rows, 1, dtype=torch.long, device=values.device),
        torch.full((rows, 1), n, dtype=torch.long, device=values.device),
    )
    cuts = None
    for _ in range(ITERATIONS):
        bounds = ((centres[:, 1:] + centres[:, :-1]) / 2).contiguous()
        new = torch.searchsorted(values, bounds, right=True)
        if cuts is not None and torch.equal(new, cuts):
            break
        cuts = new
        ends = torch.cat([first, cuts, last], 1)
        sizes = ends.diff(dim=1)
        totals = sums.gather(1, ends).diff(dim=1)
        centres = torch.where(sizes > 0, totals / sizes.clamp(min=1), centres)
    return bounds, (sizes * centres.square()).sum(1)


def _empty_like(layer: nn.Module) -> nn.Module:
    """A layer of the same shape, without tensors."""
    if isinstance(layer, nn.Linear):
        return nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None, device="meta")
    assert isinstance(layer, nn.Conv2d)
    return nn.Conv2d(
        layer.in_channels, layer.out_channels, layer.kernel_size, layer.stride, layer.padding, layer.dilation,
        layer.groups, layer.bias is not None, layer.padding_mode, device="meta",
    )  # fmt: skip

"""Nunchaku's tensors, written and read by the index that each element has, and what their layers compute, in float64.

Nothing here is ptq4dm's: the formulas are those of Nunchaku's files.
"""

from dataclasses import dataclass, replace

import torch

E4M3 = torch.float8_e4m3fn
E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6], dtype=torch.float64)
SHIFT = 0.171875


# ------------------------------------------------------------------ where an element of a plain matrix is in a file


def scale_index(groups):
    return lambda n, g: (
        (n // 128) * (groups * 128) + g * 128
        + ((n % 128) // 16) * 16 + ((n % 8) // 2) * 4 + ((n % 16) // 8) * 2 + n % 2
    )  # fmt: skip


def down_index(rank):
    return lambda r, k: (
        ((k // 16) * (rank // 16) + r // 16) * 256
        + (r % 8 * 4 + (k % 8) // 2) * 8 + ((r % 16) // 8) * 4 + ((k % 16) // 8) * 2 + k % 2
    )  # fmt: skip


def up_index(rank):
    return lambda n, r: (
        ((n // 16) * (rank // 16) + r // 16) * 256
        + (n % 8 * 4 + (r % 8) // 2) * 8 + ((n % 16) // 8) * 4 + ((r % 16) // 8) * 2 + r % 2
    )  # fmt: skip


def nvfp4_index(groups):
    return lambda n, s: (
        (n // 128) * groups * 128 + (s // 4) * 512
        + ((n % 8) * 4 + (n % 32) // 8) * 16 + ((n % 128) // 32) * 4 + s % 4
    )  # fmt: skip


def nibble_index(columns):
    """Of qweight, in nibbles, the low one of a byte first."""

    def index(n, k):
        word = (((n // 128) * (columns // 64) + k // 64) * 8 + (n % 128) // 16) * 128
        word = word + ((n % 8) * 4 + (k % 32) // 8) * 4 + ((n % 16) // 8) * 2 + (k % 64) // 32
        return word * 8 + k % 8

    return index


def awq_index(columns):
    """Of AWQ's qweight, in nibbles: four to a 16-bit word."""

    def index(n, k):
        word = (n // 4) * columns + (k // 64) * 64 + (n % 4) * 16 + ((k % 64) // 32) * 8 + k % 8
        return word * 4 + (k % 32) // 8

    return index


def _places(index, rows, columns):
    places = index(torch.arange(rows)[:, None], torch.arange(columns)[None]).expand(rows, columns).reshape(-1)
    assert torch.equal(places.sort().values, torch.arange(rows * columns))  # every place is taken, and once
    return places


def place(plain, index, shape):
    """The elements of a plain matrix, each at index(row, column) of a flat buffer, viewed as `shape`."""
    flat = torch.empty(plain.numel(), dtype=plain.dtype)
    flat.view(torch.uint8 if plain.dtype == E4M3 else plain.dtype)[_places(index, *plain.shape)] = (
        plain.view(torch.uint8) if plain.dtype == E4M3 else plain
    ).reshape(-1)
    return flat.reshape(shape)


def find(buffer, index, rows, columns):
    """The inverse of `place`: the plain matrix."""
    flat = buffer.reshape(-1)
    flat = flat.view(torch.uint8) if buffer.dtype == E4M3 else flat
    return flat[_places(index, rows, columns)].view(buffer.dtype).reshape(rows, columns)


def pack_qweight(codes):
    nibbles = place((codes & 15).to(torch.uint8), nibble_index(codes.shape[1]), (-1, 2))
    return (nibbles[:, 0] | nibbles[:, 1] << 4).view(torch.int8).reshape(len(codes), -1)


def read_qweight(qweight, signed=True):
    n, half = qweight.shape
    data = qweight.reshape(-1).view(torch.uint8)
    codes = find(torch.stack([data & 15, data >> 4], 1), nibble_index(2 * half), n, 2 * half).to(torch.int8)
    return torch.where(codes > 7, codes - 16, codes) if signed else codes


def pack_awq(codes):
    """int16 words [N/4, K]."""
    nibbles = place(codes.int(), awq_index(codes.shape[1]), (-1, 4))
    words = sum(nibbles[:, i] << 4 * i for i in range(4))
    return torch.where(words > 32767, words - 65536, words).to(torch.int16).reshape(len(codes) // 4, -1)


def read_awq(qweight):
    """int32 [N/4, K/2] -> codes [N, K]."""
    words = qweight.view(torch.int16).reshape(-1).int()
    n, k = 4 * len(qweight), 2 * qweight.shape[1]
    return find(torch.stack([words >> 4 * i & 15 for i in range(4)], 1), awq_index(k), n, k)


def vector(plain):
    return place(plain.reshape(-1, 1), scale_index(1), plain.shape)


# ---------------------------------------------------------------------------------------------- layers and models


@dataclass
class Layer:
    """codes [N, K], scales [N, K/G], smooth [K] (None: weight-only), a [R, K], b [N, R], bias [N] or None, and for
    NVFP4 per_tensor [1] and per_row [N]; shift: added to the input, which is unsigned then."""

    codes: torch.Tensor
    scales: torch.Tensor
    smooth: torch.Tensor = None
    a: torch.Tensor = None
    b: torch.Tensor = None
    bias: torch.Tensor = None
    per_tensor: torch.Tensor = None
    per_row: torch.Tensor = None
    shift: float = 0.0

    def rows(self, part):
        cut = {name: getattr(self, name) for name in ("codes", "scales", "b", "bias", "per_row")}
        return replace(self, **{name: value[part] for name, value in cut.items() if value is not None})


def random_layer(n, k, rank=16, dtype=torch.bfloat16, seed=0, kind="int4", bias=True, shift=0.0):
    """kind: int4, nvfp4 or awq."""
    draw = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=draw)

    def positive(*shape):
        return torch.rand(*shape, generator=draw) + 0.5

    layer = Layer(
        torch.randint(-7, 8, (n, k), generator=draw), (positive(n, k // 64) * 0.2 / k**0.5).to(dtype),
        bias=(0.1 * normal(n)).to(dtype) if bias else None, shift=shift,
    )  # fmt: skip
    if kind == "awq":
        return layer
    layer.smooth = positive(k).to(dtype)
    layer.a, layer.b = (normal(rank, k) / k**0.5).to(dtype), (0.3 * normal(n, rank)).to(dtype)
    if kind == "nvfp4":
        layer.codes = torch.randint(0, 16, (n, k), generator=draw)
        layer.scales = (50 * positive(n, k // 16)).to(E4M3)
        layer.per_tensor, layer.per_row = (0.004 * positive(1)).to(dtype), positive(n).to(dtype)
    return layer


def tensors_of(layer):
    """A layer as `nunchaku_lite` has it."""
    (n, k), groups = layer.codes.shape, layer.scales.shape[1]
    if layer.smooth is None:
        scales = layer.scales.T.contiguous()
        found = {"qweight": pack_awq(layer.codes + 7).view(torch.int32), "wscales": scales, "wzeros": -7 * scales}
        return found if layer.bias is None else {**found, "bias": layer.bias}
    rank, index = len(layer.a), scale_index(groups) if layer.per_row is None else nvfp4_index(groups)
    found = {
        "qweight": pack_qweight(layer.codes), "wscales": place(layer.scales, index, (groups, n)),
        "smooth_factor": vector(layer.smooth), "proj_down": place(layer.a, down_index(rank), (k, rank)),
        "proj_up": place(layer.b, up_index(rank), (n, rank)),
    }  # fmt: skip
    if layer.bias is not None:
        found["bias"] = vector(layer.bias)
    if layer.per_row is not None:
        found |= {"wcscales": vector(layer.per_row), "wtscale": layer.per_tensor}
    return found


def layer_of(found):
    """The inverse of `tensors_of`."""
    groups, n = found["wscales"].shape
    bias = found.get("bias")
    if "wzeros" in found:
        scales = found["wscales"].T
        steps = read_awq(found["qweight"]) + (found["wzeros"].T / scales).round().repeat_interleave(64, 1)
        return Layer(steps, scales, bias=bias)
    k, rank = found["proj_down"].shape
    nvfp4 = "wtscale" in found

    def plain(name, length):
        return find(found[name], scale_index(1), length, 1).flatten()

    layer = Layer(
        read_qweight(found["qweight"], not nvfp4),
        find(found["wscales"], nvfp4_index(groups) if nvfp4 else scale_index(groups), n, groups),
        plain("smooth_factor", k),
        find(found["proj_down"], down_index(rank), rank, k),
        find(found["proj_up"], up_index(rank), n, rank),
        None if bias is None else plain("bias", n),
    )
    if nvfp4:
        layer.per_tensor, layer.per_row = found["wtscale"], plain("wcscales", n)
    return layer


def compute(layer, x):
    """x [..., K] -> [..., N] float64, by the formulas alone."""
    x = x.double()
    groups = layer.scales.shape[1]
    codes = layer.codes.double() if layer.per_row is None else E2M1[layer.codes.long()]
    weight = codes.unflatten(1, (groups, -1)) * layer.scales.double()[..., None]
    if layer.smooth is None:
        y = x @ weight.flatten(1).T
    else:
        inputs = ((x + layer.shift) / layer.smooth.double()).unflatten(-1, (groups, -1))
        y = _rounded(inputs, layer).flatten(-2) @ weight.flatten(1).T
        if layer.per_row is not None:
            y = y * layer.per_tensor.double() * layer.per_row.double()
        y = y + x @ layer.a.double().T @ layer.b.double().T
    return y if layer.bias is None else y + layer.bias.double()


def _rounded(groups, layer):
    """What 4-bit activations stand for."""
    peak = groups.amax(-1, keepdim=True) if layer.shift else groups.abs().amax(-1, keepdim=True)
    if layer.per_row is not None:
        scale = (peak / 6).clamp(max=448)
        nearest = ((groups / scale).nan_to_num().abs().unsqueeze(-1) - E2M1[:8]).abs().argmin(-1)
        return groups.sign() * E2M1[:8][nearest] * scale.float().to(E4M3).double()
    scale = peak / (15 if layer.shift else 7)
    return (groups / scale).nan_to_num().round().clamp(0 if layer.shift else -7, 15 if layer.shift else 7) * scale


class Computed(torch.nn.Module):
    """A layer of a model that is computed by the formulas; of several layers each has a range of the inputs."""

    def __init__(self, *layers):
        super().__init__()
        self.layers = layers

    def forward(self, x):
        pieces = x.split([layer.codes.shape[1] for layer in self.layers], -1)
        return sum(compute(layer, piece) for layer, piece in zip(self.layers, pieces, strict=True)).to(x.dtype)


def tiny_flux(dtype=torch.float32):
    """One double and one single block, 128 wide."""
    from diffusers import FluxTransformer2DModel

    torch.manual_seed(0)
    model = FluxTransformer2DModel(
        in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=64, num_attention_heads=2,
        joint_attention_dim=32, pooled_projection_dim=32, axes_dims_rope=(16, 24, 24),
    )  # fmt: skip
    return (model if dtype == torch.float32 else model.to(dtype)).eval()


def flux_call(dtype=torch.float32, seed=0, batch=2):
    """Arguments of one call."""
    draw = torch.Generator().manual_seed(seed)
    ids = torch.stack([torch.zeros(16), torch.arange(16) // 4, torch.arange(16) % 4], 1)
    return {
        "hidden_states": torch.randn(batch, 16, 16, generator=draw).to(dtype),
        "encoder_hidden_states": torch.randn(batch, 6, 32, generator=draw).to(dtype),
        "pooled_projections": torch.randn(batch, 32, generator=draw).to(dtype),
        "timestep": torch.full((batch,), 0.5).to(dtype), "img_ids": ids, "txt_ids": torch.zeros(6, 3),
    }  # fmt: skip


@torch.no_grad()
def run(model, dtype=torch.float32):
    return model(**flux_call(dtype), return_dict=False)[0]


BLOCK_LINEARS = {
    "transformer_blocks.0": [
        "norm1.linear", "norm1_context.linear", "attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0",
        "attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out", "ff.net.0.proj", "ff.net.2",
        "ff_context.net.0.proj", "ff_context.net.2",
    ],
    "single_transformer_blocks.0": [
        "norm.linear", "attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp", "proj_out",
    ],
}  # fmt: skip


def lite_layers(kind="int4", rank=16, dtype=torch.bfloat16):
    """target -> a layer for each Linear in the blocks of `tiny_flux`; those of norms are awq."""
    layers, model = {}, tiny_flux()
    for seed, name in enumerate(f"{block}.{name}" for block, names in BLOCK_LINEARS.items() for name in names):
        linear = model.get_submodule(name)
        kind_of_it = "awq" if "norm" in name else kind
        layers[name] = random_layer(linear.out_features, linear.in_features, rank, dtype, seed, kind_of_it)
    return layers


def computed(model, layers, cuts=None):
    """`model` with the layers in their places, computed by the formulas; cuts: name -> layers over input ranges."""
    for name, parts in {**{name: [layer] for name, layer in layers.items()}, **(cuts or {})}.items():
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, Computed(*parts))
    return model


def rest_of(model, layers):
    """The tensors of a model that are no layer's."""
    replaced = tuple(f"{name}." for name in layers)
    return {name: tensor for name, tensor in model.state_dict().items() if not name.startswith(replaced)}

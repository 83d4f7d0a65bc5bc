"""Nearest codes are the same on any number of threads and on any device; the rest on the same ones."""

import copy

import pytest
import torch
from torch import nn

import ptq4dm
from ptq4dm.layers.base import is_quantized

RECIPES = {
    "int8": ptq4dm.RTNConfig(activations="dynamic"),
    "fp8": ptq4dm.RTNConfig(activations="dynamic", format="fp8"),
    "int4": ptq4dm.RTNConfig(activations="dynamic", weight_bits=4, group_size=32),
    "affine": ptq4dm.RTNConfig(activations="dynamic", weight_bits=4, affine=True),
    "row-mix": ptq4dm.RTNConfig(activations="dynamic", weight_bits=3, average_bits=4.5, importance="magnitude"),
    "progressive": ptq4dm.PTQ4DMConfig(
        activations="dynamic", weight_bits=4, weight_grid="progressive", group_size=32, objective="mse"
    ),
    **{
        objective: ptq4dm.PTQ4DMConfig(activations="dynamic", objective=objective)
        for objective in ("max", "percentile", "mse", "lp")
    },
    "lp, int4": ptq4dm.PTQ4DMConfig(activations="dynamic", weight_bits=4, group_size=64),
}


def model() -> nn.Module:
    generator = torch.Generator().manual_seed(0)
    layers = nn.Sequential(nn.Linear(256, 512), nn.Conv2d(64, 96, 3), nn.Linear(128, 300, bias=False))
    for layer in layers:
        noise = torch.randn(layer.weight.shape, generator=generator)
        layer.weight.data = noise * noise.abs()  # long tails, so that objectives clip
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)
    layers[2].weight.data[:40] = layers[2].weight.data[:40].sign()  # errors that tie
    return layers


def codes(recipe, device: str = "cpu", threads: int = 1) -> dict[str, torch.Tensor]:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        network = model().to(device)
        ptq4dm.quantize(network, copy.deepcopy(recipe))
    finally:
        torch.set_num_threads(before)
    tensors = network.state_dict().items()
    found = {k: v.cpu() for k, v in tensors if is_quantized(network.get_submodule(k.rpartition(".")[0]))}
    return {k: v.view(torch.uint8) if v.ndim and v.element_size() == 1 else v for k, v in found.items()}


def assert_same(one: dict, other: dict) -> None:
    assert one.keys() == other.keys() and any("qweight" in name for name in one)
    different = [name for name in one if not torch.equal(one[name], other[name])]
    assert not different


@pytest.mark.parametrize("name", RECIPES)
def test_nearest_codes_do_not_depend_on_threads(name):
    assert_same(codes(RECIPES[name]), codes(RECIPES[name], threads=2))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("name", RECIPES)
def test_nearest_codes_do_not_depend_on_the_device(name):
    assert_same(codes(RECIPES[name]), codes(RECIPES[name], device="cuda"))


@pytest.mark.parametrize(
    "recipe", [ptq4dm.PTQ4DMConfig(weight_bits=4, group_size=32, rounding="gptq"), ptq4dm.SVDQuantConfig(rank=4)]
)
def test_other_roundings_repeat_themselves(recipe):
    def made() -> dict:
        torch.manual_seed(0)
        network = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
        torch.seed()  # whoever uses the global generator is found out
        with ptq4dm.record(network) as calls:
            network(torch.randn(64, 64, generator=torch.Generator().manual_seed(1)))
        ptq4dm.quantize(network, copy.deepcopy(recipe), calls)
        return network.state_dict()

    assert_same(made(), made())

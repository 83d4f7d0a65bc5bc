"""Names: diffusers' converters do with rows of quantized weights what they do with float weights."""

import diffusers
import pytest
import torch
from torch import nn

from ptq4dm import UserError
from ptq4dm.interchange.names import in_names_of, in_names_of_file
from ptq4dm.interchange.rows import Found, Rows
from ptq4dm.layers.plan import LayerPlan

WIDE = 3072  # diffusers' converter of FLUX.1 knows this width alone


def rows_of(count, first):
    """A weight of one input whose scale is the number of the row."""
    codes = torch.ones(count, 1, dtype=torch.int8)
    return Rows(LayerPlan(), 1, {"qweight": codes, "weight_scale": torch.arange(first, first + count).float()})


class Flux(diffusers.FluxTransformer2DModel):
    """One that has a config and no weights."""

    def __init__(self):
        nn.Module.__init__(self)

    config = {}

    def state_dict(self):
        return {}


def flux_file():
    """Rows of each Linear layer of a FLUX.1 of one block of each kind, by original names."""
    double = {"attn.qkv": 3, "attn.proj": 1, "mlp.0": 4, "mlp.2": 1, "mod.lin": 6}
    layers = {f"double_blocks.0.{s}_{name}": n for s in ("img", "txt") for name, n in double.items()}
    layers |= {f"single_blocks.0.{name}": n for name, n in (("modulation.lin", 3), ("linear1", 7), ("linear2", 1))}
    layers |= {"img_in": 1, "txt_in": 1, "final_layer.adaLN_modulation.1": 2}
    layers |= {f"{one}.{part}_layer": 1 for one in ("time_in", "vector_in") for part in ("in", "out")}
    counts = {f"{name}.weight": n * WIDE for name, n in layers.items()} | {"final_layer.linear.weight": 64}
    weights, first = {}, 0
    for name, count in counts.items():
        weights[name] = rows_of(count, first)
        first += count
    biases = {name.replace(".weight", ".bias"): one.tensors["weight_scale"].clone() for name, one in weights.items()}
    norms = [f"double_blocks.0.{s}_attn.norm" for s in ("img", "txt")] + ["single_blocks.0.norm"]
    scales = {f"{name}.{part}_norm.scale": torch.ones(128) for name in norms for part in ("query", "key")}
    return Found("file", weights, {**biases, **scales})


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_rows_of_flux_go_where_its_biases_go(prefix):
    """A bias that numbers the rows says where they go: q, k, v and the MLP apart, scales before shifts."""
    file = flux_file()
    file.weights = {prefix + name: one for name, one in file.weights.items()}
    file.tensors = {prefix + name: one for name, one in file.tensors.items()}
    if prefix:
        file.tensors["vae.decoder.weight"] = torch.zeros(3, 3)
    found = in_names_of(Flux(), file)
    assert len(found.weights) == 28 and "vae.decoder.weight" not in found.tensors
    for name, one in found.weights.items():
        assert torch.equal(one.tensors["weight_scale"], found.tensors[name.replace(".weight", ".bias")]), name
    mlp = found.weights["single_transformer_blocks.0.proj_mlp.weight"]
    assert mlp.outputs == 4 * WIDE and len(found.weights["norm_out.linear.weight"].tensors["qweight"]) == 2 * WIDE
    scales = found.weights["norm_out.linear.weight"].tensors["weight_scale"]
    assert scales[0] == scales[WIDE] + WIDE


def test_a_file_of_flux_is_made_of_the_model_again():
    file = flux_file()
    found = in_names_of(Flux(), file)
    outputs = {name: one.outputs for name, one in file.weights.items()} | {
        name: len(one) for name, one in file.tensors.items()
    }
    state = {name: torch.empty(one.outputs, 1, device="meta") for name, one in found.weights.items()}
    made = in_names_of_file(Flux(), {**state, **found.tensors}, outputs, "file")
    assert made.keys() == outputs.keys()
    for name, parts in made.items():
        if name in file.weights:
            again = Rows.joined([found.weights[one].pick(rows) for one, rows in parts])
            assert torch.equal(again.tensors["weight_scale"], file.weights[name].tensors["weight_scale"]), name
    assert [one for one, _ in made["double_blocks.0.txt_attn.qkv.weight"]] == [
        f"transformer_blocks.0.attn.add_{x}_proj.weight" for x in "qkv"
    ]


def test_names_of_neither_kind_are_refused():
    strange = Found("a file", {"layer.weight": rows_of(3, 0)}, {})
    with pytest.raises(UserError, match="the names in a file \\('layer.weight' ...\\) are not those of a Flux"):
        in_names_of(Flux(), strange)
    with pytest.raises(UserError, match="a file has other names than Linear, for which diffusers has no converter"):
        in_names_of(nn.Linear(2, 2), strange)


def test_rows_of_several_formats_are_not_joined():
    one, other = rows_of(2, 0), rows_of(2, 0)
    other.plan = LayerPlan(weight_bits=4)
    assert Rows.joined([one, one]).outputs == 4
    with pytest.raises(ValueError, match="several formats"):
        Rows.joined([one, other])
    other = rows_of(2, 0)
    other.tensors["weight_scale"] = other.tensors["weight_scale"].double()
    with pytest.raises(ValueError, match="'weight_scale' of several types"):
        Rows.joined([one, other])
    picked = one.pick(torch.tensor([1, 0]))
    assert picked.tensors["weight_scale"].tolist() == [1, 0]

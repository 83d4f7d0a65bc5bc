"""Names: diffusers' converters do with rows of quantized weights what they do with float weights."""

import re

import diffusers
import pytest
import torch
from torch import nn

import foreign_files as files
from helpers import run
from models import conditional_unet
from ptq4dm import UserError, load_quantized_file
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


def test_a_weight_that_a_converter_leaves_out_is_named():
    file = flux_file()
    file.weights["double_blocks.0.extra.weight"] = rows_of(3, 0)
    with pytest.raises(UserError, match="file has 'double_blocks.0.extra.weight', which the Flux has not"):
        in_names_of(Flux(), file)


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


def test_a_stranger_among_the_models_own_names_is_named_whatever_a_converter_makes_of_them():
    for name in ("extra.weight", "mid_block.attentions.7.proj_in.weight"):
        model, found = unet(), Found("file", {}, dict(unet().state_dict()))
        layer = "mid_block.attentions.0.transformer_blocks.0.attn2.to_k.weight"
        found.weights[layer] = rows_of(len(found.tensors.pop(layer)), 0)
        found.weights[name] = rows_of(3, 0)
        with pytest.raises(UserError, match=f"^file has '{name}', which the UNet2DConditionModel has not[.]$"):
            in_names_of(model, found)


RESNET = {"norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1", "norm2": "out_layers.0",
          "conv2": "out_layers.3", "conv_shortcut": "skip_connection"}  # fmt: skip
PLACES = {
    "down_blocks.0.resnets.0": "input_blocks.1.0", "down_blocks.0.attentions.0": "input_blocks.1.1",
    "mid_block.resnets.0": "middle_block.0", "mid_block.attentions.0": "middle_block.1",
    "mid_block.resnets.1": "middle_block.2", "up_blocks.0.resnets.0": "output_blocks.0.0",
    "up_blocks.0.attentions.0": "output_blocks.0.1", "up_blocks.0.resnets.1": "output_blocks.1.0",
    "up_blocks.0.attentions.1": "output_blocks.1.1", "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2", "conv_in": "input_blocks.0.0", "conv_norm_out": "out.0",
    "conv_out": "out.2",
}  # fmt: skip


def unet(seed=0):
    """A UNet of one level with attention to a text, 32 wide."""
    return conditional_unet(
        seed, block_out_channels=(32,), cross_attention_dim=32, down_block_types=("CrossAttnDownBlock2D",),
        up_block_types=("CrossAttnUpBlock2D",), attention_head_dim=8,
    )  # fmt: skip


def ldm_name(name):
    """The name of a tensor of `unet` in the files of Stable Diffusion."""
    place = next(one for one in PLACES if name.startswith(f"{one}."))
    rest = name.removeprefix(f"{place}.")
    if "resnets" in place:
        rest = re.sub(r"^\w+", lambda found: RESNET[found[0]], rest)
    return f"{PLACES[place]}.{rest}"


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_unets_of_stable_diffusion(prefix, tmp_path):
    """Their converter wants the prefix that files of a UNet alone do not have."""
    state = {prefix + ldm_name(name): one.detach().numpy() for name, one in unet().state_dict().items()}
    chosen = lambda name, value: value.ndim == 2 and value.shape[1] % 32 == 0  # noqa: E731
    files.save_gguf_state(tmp_path / "file", state, files.Q8_0, files.q8_0, chosen)
    model = load_quantized_file(unet(seed=3), tmp_path / "file")
    assert str(model.mid_block.attentions[0].transformer_blocks[0].attn2.to_k.plan) == "W8A16 blocks g32"
    error = (run(model) - run(unet())).norm() / run(unet()).norm()
    assert 0 < error < 0.01

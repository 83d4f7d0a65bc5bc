"""Packed checkpoints that were changed: what their plan, their tensors and their checksums give away at load."""

import json
import math
import shutil

import pytest
import torch
from diffusers import DDIMScheduler, DDPMPipeline, UNet2DModel
from safetensors.torch import load_file, save_file

import denoisers
import ptq4dm
from helpers import same
from models import plain_unet
from ptq4dm import RTNConfig, UserError
from ptq4dm.errors import DamagedFile
from ptq4dm.layers.plan import Int4Plan, LayerPlan
from ptq4dm.layers.progressive import ProgressivePlan
from ptq4dm.layers.row_mix import RowMixPlan
from ptq4dm.quantization import opening

pytestmark = pytest.mark.usefixtures("one_thread")

WEIGHTS = "diffusion_pytorch_model.safetensors"
STATIC, GROUPS = "down_blocks.0.resnets.0.conv1", "mid_block.resnets.0.conv1"
FP8, ROWS, MIX = "mid_block.resnets.0.conv2", "conv_out", "down_blocks.0.resnets.0.conv2"
STEPS = "up_blocks.0.resnets.1.conv1"


def changed_file(folder, tensors=None, plan=None, config=None):
    """Change a saved model's tensors, its plan's layers, its quantization_config."""
    if tensors:
        found = load_file(folder / WEIGHTS)
        tensors(found)
        save_file({name: one.contiguous() for name, one in found.items()}, folder / WEIGHTS, {"format": "pt"})
    data = json.loads((folder / "config.json").read_text())
    if plan:
        plan(data["quantization_config"]["plan"]["layers"])
    if config:
        config(data["quantization_config"])
    (folder / "config.json").write_text(json.dumps(data))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A UNet with layers of all formats that need no store, saved."""
    model = plain_unet(block_out_channels=(32,), norm_num_groups=8)
    plan = ptq4dm.Plan(
        "rtn",
        {
            STATIC: LayerPlan(weight_bits=6, input_scale=0.1, input_zero_point=3),
            GROUPS: Int4Plan(group_size=32, affine=True, input_scale=0.2, input_zero_point=-4),
            FP8: LayerPlan("fp8", input_scale=0.3),
            ROWS: Int4Plan(),
            STEPS: ProgressivePlan(group_size=32, rotation=16),
            MIX: RowMixPlan(weight_bits=3, wide=[1, 4], input_scale=0.1, input_zero_point=2),
        },
    )
    ptq4dm.quantize(model, RTNConfig(plan=plan))
    folder = tmp_path_factory.mktemp("saved") / "unet"
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def copied(saved, tmp_path):
    shutil.copytree(saved, tmp_path / "unet")
    return tmp_path / "unet"


def entry(name, value):
    return lambda tensors: tensors.update({name: value(tensors[name]) if callable(value) else value})


TENSORS = {
    "scale NaN": (entry(f"{STATIC}.input_scale", torch.tensor(float("nan"))), "input_scale.*NaN"),
    "scale 0": (entry(f"{STATIC}.weight_scale", lambda t: t * 0), "weight_scale.*above zero"),
    "scale below 0": (entry(f"{GROUPS}.wscales", lambda t: -t), "wscales.*above zero"),
    "scale infinite": (entry(f"{ROWS}.wscales", lambda t: t / 0), "wscales.*infinity"),
    "scale of integers": (
        entry(f"{STATIC}.weight_scale", lambda t: t.to(torch.int16)),
        "int16 and should be float32",
    ),
    "scale of 16 bits": (entry(f"{ROWS}.wscales", lambda t: t.half()), "float16 and should be float32"),
    "another grid": (entry(f"{GROUPS}.input_scale", torch.tensor(5.0)), "is 5 and in the plan 0.2"),
    "another zero point": (
        entry(f"{STATIC}.input_zero_point", torch.tensor(4, dtype=torch.int32)),
        "is 4 and in the plan 3",
    ),
    "zero points beyond 4 bits": (entry(f"{GROUPS}.wzeros", lambda t: t * 0 + 9), r"wzeros.*9, out of \[-8, 7\]"),
    "codes beyond 6 bits": (entry(f"{STATIC}.qweight", lambda t: t * 0 + 32), r"32, out of \[-31, 31\]"),
    "narrow codes beyond 3 bits": (entry(f"{MIX}.qweight", lambda t: t * 0 + 0x44), r"-4, out of \[-3, 3\]"),
    "wide codes beyond the grid": (entry(f"{MIX}.qweight", lambda t: t * 0), r"-128, out of \[-127, 127\]"),
    "wide scale 0": (entry(f"{MIX}.wscales", lambda t: t * 0), "wscales.*above zero"),
    "other wide rows": (entry(f"{MIX}.wide", lambda t: t.flip(0)), "wide.*other outputs than the plan"),
    "codes NaN": (
        entry(f"{FP8}.qweight", lambda t: (t.view(torch.uint8) | 0x7F).view(torch.float8_e4m3fn)),
        "qweight.*NaN",
    ),
    "codes of another type": (entry(f"{FP8}.qweight", lambda t: t.view(torch.int8)), "int8 and should be float8"),
    "bias NaN": (entry(f"{STATIC}.bias", lambda t: t / 0), "bias.*infinity"),
    "bias of integers": (entry(f"{STATIC}.bias", lambda t: t.to(torch.int32)), "bias.*int32"),
    "a tensor too many": (entry(f"{STATIC}.nonsense", torch.zeros(3)), "1 tensors that its plan does not name"),
    "a tensor beside": (entry("nonsense", torch.zeros(3)), "1 tensors that its plan does not name"),
    "a tensor too few": (lambda tensors: tensors.pop(f"{GROUPS}.wzeros"), "lacks 1 tensor.*wzeros"),
}
PLANS = {
    "no grid": (lambda p: [p[STATIC].pop(key) for key in ("input_scale", "input_zero_point")], "does not name"),
    "half a grid": (lambda p: p[STATIC].pop("input_scale"), "go together"),
    "a grid in fp8": (lambda p: p[FP8].update(input_zero_point=0), "go together"),
    "another grid": (lambda p: p[FP8].update(input_scale=5.0), "input_scale.* in the plan 5"),
    "activation bits": (lambda p: p[ROWS].update(activation_bits=12), "2 to 8 bits"),
    "activation bits that no tensor shows": (lambda p: p[ROWS].update(activation_bits=6), "checksums of 'conv_out'"),
    "inputs as floats": (
        lambda p: p[ROWS].update(activation_bits=16),
        "checksums of 'conv_out'",
    ),
    "weight bits": (lambda p: p[STATIC].update(weight_bits="6"), "weight_bits must be a whole number; got '6'"),
    "bits of fp8": (lambda p: p[FP8].update(weight_bits=4), "fp8 has 8 bits"),
    "bits of int4": (lambda p: p[GROUPS].update(weight_bits=8), "4 bits and less, not 8"),
    "other rows": (lambda p: p[MIX].update(wide=[1, 5]), "wide.*other outputs than the plan"),
    "more rows": (lambda p: p[MIX].update(wide=[1, 4, 5]), r"wide.*has shape \[2\]"),
    "rows that are not there": (lambda p: p[MIX].update(wide=[1, 99]), "names output 99"),
    "zero point": (lambda p: p[STATIC].update(input_zero_point=1000), "lies in"),
    "group size": (lambda p: p[GROUPS].update(group_size=48), "group_size is none"),
    "no groups": (lambda p: p[GROUPS].update(group_size=None), "wscales.*float16 and should be float32"),
    "not affine": (lambda p: p[GROUPS].update(affine=False), "does not name"),
    "affine": (lambda p: p[ROWS].update(affine=True), "lacks 1 tensor"),
    "objective": (lambda p: p[STATIC].update(objective="magic"), "objective 'magic' is unknown"),
    "rounding": (lambda p: p[STATIC].update(rounding=["gptq"]), "rounding must be a text"),
    "a layer dropped": (lambda p: p.pop(STATIC), "lacks 1 tensor.*weight"),
    "a layer of another format": (lambda p: p[STATIC].update(format="fp8"), "8 bits"),
    "no choices": (lambda p: p.update({STATIC: 5}), "no object but 5"),
}


@pytest.mark.parametrize("kind", TENSORS)
def test_tensors_that_the_plan_does_not_have(kind, copied):
    change, words = TENSORS[kind]
    changed_file(copied, tensors=change)
    with pytest.raises(DamagedFile, match=words):
        UNet2DModel.from_pretrained(copied)


@pytest.mark.parametrize("kind", PLANS)
def test_plans_that_the_tensors_do_not_have(kind, copied):
    change, words = PLANS[kind]
    changed_file(copied, plan=change)
    with pytest.raises(UserError, match=words):
        UNet2DModel.from_pretrained(copied)


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda q: q.update(plan=7), "plan is a Plan"),
        (lambda q: q["plan"].update(layers=None), "'layers' is None"),
        (lambda q: q["plan"].update(transforms={}), "'transforms' is dict"),
        (lambda q: q.update(weight_bits=[8]), "weight_bits"),
        (lambda q: q.update(seed=2.5), "seed must be"),
        (lambda q: q.update(modules_to_not_convert=5), "modules_to_not_convert must be"),
        (lambda q: q.update(checksums=5), "cannot be read"),
        (lambda q: q["checksums"].update(rest="x"), "'rest' is 'x'"),
        (lambda q: q["checksums"]["layers"].update({STATIC: [1]}), "two numbers"),
        (lambda q: q["checksums"]["layers"].pop(STATIC), f"checksums of '{STATIC}'"),
    ],
)
def test_recipes_of_a_damaged_config(change, words, copied):
    changed_file(copied, config=change)
    with pytest.raises(UserError, match=words):
        UNet2DModel.from_pretrained(copied)


# --- checksums ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [f"{STATIC}.qweight", f"{GROUPS}.qweight", f"{FP8}.weight_scale", "conv_in.weight"])
def test_one_flipped_bit_is_found(name, copied):
    with open(copied / WEIGHTS, "r+b") as file:
        size = int.from_bytes(file.read(8), "little")
        start = json.loads(file.read(size))[name]["data_offsets"][0]
        file.seek(8 + size + start)
        byte = file.read(1)[0]
        file.seek(8 + size + start)
        file.write(bytes([byte ^ 1]))
    layer = name.rpartition(".")[0]
    words = "layers that are not quantized" if layer == "conv_in" else layer
    with pytest.raises(DamagedFile, match=words):
        UNet2DModel.from_pretrained(copied)
    with pytest.raises(DamagedFile, match=f"changed: .*{words}"):
        ptq4dm.verify(copied)


@pytest.mark.parametrize(
    "change", [{"rounding": math.nan}, {"objective": "maxx"}, {"input_zero_point": 0.5}, {"weight_bits": 9}]
)
def test_what_verify_says_of_a_plan_names_its_file(change, copied):
    changed_file(copied, config=lambda q: q["plan"]["layers"][STATIC].update(change))
    with pytest.raises(DamagedFile, match=f"{copied / 'config.json'}: layer '{STATIC}' of the plan"):
        ptq4dm.verify(copied)


def test_codes_of_a_large_file_are_left_to_verify(copied, monkeypatch):
    """What is small is looked at in any case."""
    monkeypatch.setattr(opening, "READ_AT_LOAD", (0, 0))
    changed_file(copied, tensors=entry(f"{ROWS}.qweight", lambda t: t ^ 1))
    UNet2DModel.from_pretrained(copied)
    with pytest.raises(DamagedFile, match=ROWS):
        ptq4dm.verify(copied)
    changed_file(copied, tensors=entry(f"{ROWS}.wscales", lambda t: t * 2))
    with pytest.raises(DamagedFile, match=f"checksums of '{ROWS}'"):
        UNet2DModel.from_pretrained(copied)


def test_every_way_to_save_leaves_checksums_that_hold(saved, tmp_path):
    """In shards, in another dtype and memory format, and once more what was loaded."""
    model = UNet2DModel.from_pretrained(saved)
    pipe = DDPMPipeline(model, DDIMScheduler())
    pipe.save_pretrained(tmp_path / "pipe", max_shard_size="10KB")
    assert len(list((tmp_path / "pipe" / "unet").glob("*.safetensors"))) > 2
    assert ptq4dm.verify(tmp_path / "pipe") == {"unet": 6}
    again = ptq4dm.load_pipeline(tmp_path / "pipe", torch.bfloat16)  # in channels_last
    again.save_pretrained(tmp_path / "half")
    assert ptq4dm.verify(tmp_path / "half") == {"unet": 6}
    assert same(ptq4dm.load_pipeline(tmp_path / "half", torch.bfloat16).unet, again.unet)
    model.save_pretrained(tmp_path / "variant", variant="ours")
    assert ptq4dm.verify(tmp_path / "variant") == {"": 6}


def test_files_without_checksums_load_and_cannot_be_verified(copied):
    changed_file(copied, config=lambda q: q.pop("checksums"))
    before = UNet2DModel.from_pretrained(copied)
    with pytest.raises(UserError, match="without checksums.*save it again"):
        ptq4dm.verify(copied)
    before.save_pretrained(copied)
    assert ptq4dm.verify(copied) == {"": 6}
    plain_unet().save_pretrained(copied.parent / "plain")
    with pytest.raises(UserError, match="nothing to verify"):
        ptq4dm.verify(copied.parent / "plain")


def test_pickled_weights_are_looked_at_too(saved, tmp_path):
    model = UNet2DModel.from_pretrained(saved)
    model.save_pretrained(tmp_path, safe_serialization=False)
    assert same(UNet2DModel.from_pretrained(tmp_path, use_safetensors=False), model)
    path = tmp_path / "diffusion_pytorch_model.bin"
    state = torch.load(path)
    state[f"{STATIC}.weight_scale"].neg_()
    torch.save(state, path)
    with pytest.raises(DamagedFile, match="above zero"):
        UNet2DModel.from_pretrained(tmp_path, use_safetensors=False)


# --- layers that belong together ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def svdq(tmp_path_factory):
    model = denoisers.quantized("dit")[0]
    folder = tmp_path_factory.mktemp("svdq") / "dit"
    model.save_pretrained(folder)
    return type(model), folder


QUERY, KEY = "transformer_blocks.0.attn1.to_q", "transformer_blocks.0.attn1.to_k"


@pytest.mark.parametrize(
    "tensors, plan, words",
    [
        (None, lambda p: p[QUERY].update(rank=0), "does not name|lacks"),
        (None, lambda p: p[QUERY].update(rank=4), "another branch|shape"),
        (None, lambda p: p[KEY].update(lender=""), "lacks 1 tensor.*down"),
        (None, lambda p: p[KEY].update(lender="nowhere"), "nothing to lend"),
        (None, lambda p: p[KEY].update(lender=KEY), f"checksums of '{KEY}'"),
        (None, lambda p: p[KEY].update(activation="none"), "does not name"),
        (None, lambda p: p[KEY].update(activation="int3"), "activation is one of"),
        (None, lambda p: p[KEY].update(activation="int8"), f"checksums of '{KEY}'"),
        (None, lambda p: p[KEY].update(group_size=48), "do not divide"),
        (None, lambda p: p[KEY].update(adapters={"style": [0, 1.0]}), "no rank with a strength"),
        (None, lambda p: p[KEY].update(adapters={"style": [4, 1.0]}), "lacks 2 tensors"),
        (None, lambda p: p[KEY].update(shift=-1.0), "shift is 0 or more"),
        (entry(f"{QUERY}.smooth", lambda t: t * 0), None, "smooth.*divided by"),
        (entry(f"{QUERY}.wscales", lambda t: -t), None, "wscales.*above zero"),
        (entry(f"{QUERY}.down", lambda t: t / 0), None, "down.*infinity|down.*NaN"),
        (entry(f"{QUERY}.up", lambda t: t.float()), None, "up.*float32 and should be float16 or bfloat16"),
        (entry(f"{QUERY}.up", lambda t: t.bfloat16()), None, f"checksums of '{QUERY}'"),
    ],
)
def test_svdquant_layers(tensors, plan, words, svdq, tmp_path):
    kind, folder = svdq
    shutil.copytree(folder, tmp_path / "dit")
    changed_file(tmp_path / "dit", tensors, plan)
    with pytest.raises(DamagedFile, match=words):
        kind.from_pretrained(tmp_path / "dit")

"""The driver that packs for all methods: block by block, evidence on demand, resumable; the model stays as it is."""

import copy
import json
from dataclasses import replace

import pytest
import torch
from torch import nn

import denoisers
import ptq4dm
from ptq4dm import Plan, PTQ4DMConfig, RTNConfig, UserError
from ptq4dm.calibration.evidence import Evidence, calibration_batches
from ptq4dm.calibration.record import replay
from ptq4dm.layers.plan import Int4Plan, LayerPlan
from ptq4dm.quantization import checkpoint, packing
from ptq4dm.quantization.checkpoint import BlockCheckpoint, check_folder, folder_of
from ptq4dm.quantization.components import component_of, load_plans, quantized_plans
from ptq4dm.quantization.packing import PackingOptions, blocks_of, pack_plan
from ptq4dm.quantization.planning import make_plan
from ptq4dm.quantization.saving import save_quantized
from ptq4dm.rounding import ROUNDERS

pytestmark = pytest.mark.usefixtures("one_thread")

GPTQ = RTNConfig(weight_bits=4, activations="dynamic", rounding="gptq", num_tuples=4)


@pytest.fixture
def dit():
    """(a model in full precision, its store)"""
    return denoisers.pair("dit")


def codes(layers):
    return {name: layer.state_dict() for name, layer in layers.items()}


def equal(one, other):
    return one.keys() == other.keys() and all(
        a.keys() == other[name].keys() and all(torch.equal(a[key], other[name][key]) for key in a)
        for name, a in one.items()
    )


def test_the_model_and_the_plan_stay_as_they_are(dit):
    model, store = dit
    weights, plan = copy.deepcopy(model.state_dict()), make_plan(model, denoisers.CONFIG, store)
    before = json.dumps(plan.to_dict())
    layers, completed = denoisers.CONFIG.pack(model, plan, store)
    assert json.dumps(plan.to_dict()) == before != json.dumps(completed.to_dict())
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert list(layers) == list(completed.layers) == list(plan.layers)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_a_plan_of_the_users_is_not_written_into(dit):
    model, store = dit
    plan = make_plan(model, denoisers.CONFIG, store)
    before = json.dumps(plan.to_dict())
    ptq4dm.quantize(model, replace(denoisers.CONFIG, plan=plan), store)
    assert json.dumps(plan.to_dict()) == before


@pytest.mark.parametrize("kind", ["dit", "sdxl"])
@pytest.mark.parametrize("bits", [8, 4])
def test_hessian_rounding_lifts_layers_of_every_method(kind, bits):
    """Linear and convolutions, 3x3 too: mean output SQNR on the calibration calls rises, at the same grid."""
    mean = {}
    for rounding in ("nearest", "gptq"):
        model, store = denoisers.pair(kind)
        config = RTNConfig(weight_bits=bits, activations="dynamic", rounding=rounding, num_tuples=4)
        report = ptq4dm.quantize(model, config, store)
        rows = [row for row in report.layers if "W4A8" in row["format"] or bits == 8]
        kinds = {isinstance(model.get_submodule(row["layer"]), nn.Conv2d) for row in rows}
        mean[rounding] = sum(row["sqnr"] for row in rows) / len(rows)
        assert rows and (kind == "dit" or len(kinds) == 2)
    assert mean["gptq"] > mean["nearest"] + (3 if bits == 4 else 0.05)


def test_the_plan_says_how_codes_were_rounded(dit):
    """Following the plan of one run gives the codes of that run; the same codes twice."""
    model, store = dit
    again, third = copy.deepcopy(model), copy.deepcopy(model)
    ptq4dm.quantize(model, GPTQ, store)
    ptq4dm.quantize(third, GPTQ, store)
    plan = Plan.from_dict(json.loads(json.dumps(ptq4dm.quantization_config(model).plan.to_dict())))
    assert {layer.rounding for layer in plan.layers.values()} == {"gptq"}
    ptq4dm.quantize(again, RTNConfig(plan=plan, num_tuples=4), store)
    for other in (again, third):
        assert all(torch.equal(value, other.state_dict()[name]) for name, value in model.state_dict().items())


def test_evidence_is_captured_only_where_a_plan_asks(dit, monkeypatch):
    model, store = dit
    monkeypatch.setattr(packing, "Evidence", lambda *_: pytest.fail("nobody asked"))
    layers, _ = pack_plan(model, make_plan(model, RTNConfig(activations="dynamic")), None)
    assert layers
    with pytest.raises(UserError, match="rtn needs a calibration store here, also to follow a plan"):
        pack_plan(model, Plan("rtn", {"proj_out_1": LayerPlan(rounding="gptq")}))


def test_a_quantized_prefix_is_what_later_blocks_are_fed(dit, monkeypatch):
    """prefix="quantized": evidence of the second block comes from the model with the first block's layers in it."""
    model, store = dit
    plan = make_plan(model, GPTQ, store)
    fed = {}

    class Spy(Evidence):
        def of(self, name):
            fed.setdefault(name, (super().of(name).rows, dict(self.before)))
            return super().of(name)

    monkeypatch.setattr(packing, "Evidence", Spy)
    exact, _ = pack_plan(model, plan, store, PackingOptions(4))
    first = fed.copy()
    fed.clear()
    layers, _ = pack_plan(model, plan, store, PackingOptions(4, prefix="quantized"))
    early, late = "transformer_blocks.0.attn1.to_q", "transformer_blocks.1.attn1.to_q"
    assert not torch.equal(first[late][0], fed[late][0]) and late not in fed[late][1]
    swapped = copy.deepcopy(model)
    for name in fed[late][1]:
        parent, _, child = name.rpartition(".")
        setattr(swapped.get_submodule(parent), child, layers[name]) if not child.isdigit() else (
            swapped.get_submodule(parent).__setitem__(int(child), layers[name])
        )
    expected = Evidence(swapped, [late], [], calibration_batches(store.calls, 4)).of(late).rows
    assert early in fed[late][1] and torch.equal(fed[late][0], expected)
    assert not equal(codes(exact), codes(layers))
    with pytest.raises(UserError, match="prefix must be one of exact, quantized"):
        PackingOptions(prefix="half")


class Interrupted(Exception):
    pass


@pytest.mark.parametrize("config", [GPTQ, denoisers.CONFIG], ids=["gptq", "svdquant"])
def test_an_interrupted_quantization_goes_on_from_its_checkpoint(dit, config, tmp_path, monkeypatch):
    model, store = dit
    whole, before, folder = copy.deepcopy(model), copy.deepcopy(model.state_dict()), tmp_path / "blocks"
    ptq4dm.quantize(whole, config, store)
    save, captures = packing.BlockCheckpoint.save, []

    def save_two(self, block, layers):
        save(self, block, layers)
        if len(list(folder.glob("*.safetensors"))) == 2:
            raise Interrupted

    class Counted(Evidence):
        def __init__(self, *args):
            captures.append(args[1])
            super().__init__(*args)

    monkeypatch.setattr(packing.BlockCheckpoint, "save", save_two)
    with pytest.raises(Interrupted):
        ptq4dm.quantize(model, config, store, checkpoint=folder)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    monkeypatch.setattr(packing.BlockCheckpoint, "save", save)
    blocks = len(blocks_of(model, make_plan(model, config, store)))
    monkeypatch.setattr(packing, "Evidence", Counted)
    ptq4dm.quantize(model, config, store, checkpoint=folder)
    assert blocks >= 2 and len(captures) <= blocks - 2 and len(list(folder.glob("*.safetensors"))) == blocks
    assert all(torch.equal(value, whole.state_dict()[name]) for name, value in model.state_dict().items())
    assert ptq4dm.quantization_config(model).plan == ptq4dm.quantization_config(whole).plan
    x = store.calls[:1]
    assert torch.equal(replay(model, x), replay(whole, x))  # lent branches are tied again


def test_a_checkpoint_of_another_quantization_is_refused(dit, tmp_path):
    model, store = dit
    folder = tmp_path / "blocks"
    ptq4dm.quantize(copy.deepcopy(model), GPTQ, store, checkpoint=folder)
    with pytest.raises(UserError, match="holds the blocks of another quantization"):
        ptq4dm.quantize(copy.deepcopy(model), replace(GPTQ, num_tuples=3), store, checkpoint=folder)
    plain = ptq4dm.RTNConfig(activations="dynamic")  # without a store nothing but the weights tells models apart
    ptq4dm.quantize(copy.deepcopy(model), plain, checkpoint=tmp_path / "plain")
    with pytest.raises(UserError, match="holds the blocks of another quantization"):
        ptq4dm.quantize(copy.deepcopy(model), replace(plain, transforms=("rotate",)), checkpoint=tmp_path / "plain")
    damaged = next(folder.glob("*.safetensors"))
    whole = damaged.read_bytes()
    damaged.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(UserError, match="not as it was saved.*delete it"):
        ptq4dm.quantize(copy.deepcopy(model), GPTQ, store, checkpoint=folder)
    damaged.write_bytes(damaged.read_bytes()[:100])
    with pytest.raises(UserError, match="cannot be read.*delete it"):
        ptq4dm.quantize(copy.deepcopy(model), GPTQ, store, checkpoint=folder)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "letter.txt").write_text("mine")
    with pytest.raises(UserError, match="holds other files"):
        ptq4dm.quantize(copy.deepcopy(model), GPTQ, store, checkpoint=tmp_path / "other")


def test_ranges_by_output_error_lower_the_error_of_outputs(dit):
    """Static inputs and weights: the objective that looks at outputs beats the whole range, on outputs."""
    sums = {}
    for objective in ("max", "output"):
        model, store = denoisers.pair("dit")
        config = PTQ4DMConfig(weight_bits=4, activation_bits=4, objective=objective, num_tuples=4, first_last="same")
        report = ptq4dm.quantize(model, config, store)
        sums[objective] = sum(row["sqnr"] for row in report.layers) / len(report.layers)
    assert sums["output"] > sums["max"] + 1


def test_transforms_of_a_recipe_are_in_the_plan_and_the_plan_can_be_followed(dit, tmp_path):
    model, store = dit
    again, plain = copy.deepcopy(model), copy.deepcopy(model)
    config = RTNConfig(activations="static", transforms=("smooth", "reorder"))
    ptq4dm.quantize(model, config, store)
    ptq4dm.quantize(plain, RTNConfig(activations="static"), store)
    plan = ptq4dm.quantization_config(model).plan
    assert {transform.kind for transform in plan.transforms} <= {"smooth", "reorder"} and plan.transforms
    plan.save(tmp_path / "plan.json")
    read = Plan.load(tmp_path / "plan.json")
    assert read.transforms == plan.transforms
    ptq4dm.quantize(again, RTNConfig(plan=read), store)
    ours, theirs, other = model.state_dict(), again.state_dict(), plain.state_dict()
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())
    assert any(not torch.equal(value, other[name]) for name, value in ours.items())
    (tmp_path / "plan.safetensors").unlink()
    with pytest.raises(UserError, match="lacks its tensor"):
        Plan.load(tmp_path / "plan.json")


def test_a_failure_gives_the_untransformed_weights_back(dit, monkeypatch):
    model, store = dit
    before = copy.deepcopy(model.state_dict())
    config = RTNConfig(activations="dynamic", transforms=("smooth",))
    monkeypatch.setattr(RTNConfig, "pack", lambda *_: (_ for _ in ()).throw(Interrupted))
    with pytest.raises(Interrupted):
        ptq4dm.quantize(model, config, store)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_format_without_such_a_layer_says_so():
    with pytest.raises(UserError, match="format 'nvfp4' has no Conv2d"):
        pack_plan(nn.Sequential(nn.Conv2d(3, 4, 1)), Plan("x", {"0": packing.FORMATS["nvfp4"].plan()}))
    layers, _ = pack_plan(nn.Sequential(nn.Linear(3, 4)), Plan("x", {"0": Int4Plan()}))
    assert layers["0"].plan == Int4Plan()


def test_networks_beside_the_denoiser(tmp_path):
    """Another network by its name; both plans in one file, and both load again."""
    from diffusers import AutoencoderKL, DDIMScheduler, DiffusionPipeline, DiTPipeline

    torch.manual_seed(0)
    sizes = {"block_out_channels": (8,), "norm_num_groups": 4, "layers_per_block": 1, "latent_channels": 4}
    vae = AutoencoderKL(**sizes, down_block_types=("DownEncoderBlock2D",), up_block_types=("UpDecoderBlock2D",))
    pipe = DiTPipeline(denoisers.pair("dit")[0], vae, DDIMScheduler())
    for component, word in (("vea", "has no network 'vea'; it has"), ("scheduler", "has no network 'scheduler'")):
        with pytest.raises(UserError, match=word):
            ptq4dm.quantize(pipe, RTNConfig(activations="dynamic"), component=component)
    ptq4dm.quantize(pipe, RTNConfig(activations="dynamic"))
    ptq4dm.quantize(pipe, RTNConfig(weight_bits=4, activations="dynamic"), component="vae")
    save_quantized(pipe, {"model": "tiny", "method": "rtn"}, tmp_path / "saved")
    plans = load_plans(tmp_path / "saved" / "plan.json")
    assert set(plans) == {"transformer", "vae"} == set(quantized_plans(pipe))
    again = DiffusionPipeline.from_pretrained(tmp_path / "saved")
    assert quantized_plans(again) == plans == quantized_plans(pipe)
    with pytest.raises(UserError, match="holds the plans of several networks"):
        Plan.load(tmp_path / "saved" / "plan.json")
    pipe.vae = nn.Linear(2, 2)
    with pytest.raises(UserError, match="'vae' is a Linear, which neither diffusers nor transformers loads"):
        component_of(pipe, "vae")


def test_a_rounder_that_does_not_serve_a_grid_is_refused_before_any_work(dit, monkeypatch):
    model, _ = dit
    monkeypatch.setattr(ROUNDERS["nearest"], "grids", ("uniform",))
    with pytest.raises(UserError, match="^rounding 'nearest' does not serve format 'fp8'"):
        RTNConfig(format="fp8", activations="dynamic")
    plan = Plan("rtn", {"transformer_blocks.0.attn1.to_q": LayerPlan("fp8")})
    with pytest.raises(UserError, match="layer '.*': rounding 'nearest' does not serve format 'fp8'"):
        ptq4dm.quantize(model, RTNConfig(plan=plan))
    with pytest.raises(UserError, match="QuantConfig is what all recipes share"):
        ptq4dm.QuantConfig()


def test_a_recipe_that_reads_weights_cannot_pack_while_a_model_loads(dit, tmp_path, monkeypatch):
    model, _ = dit
    model.save_pretrained(tmp_path)
    monkeypatch.setattr(
        RTNConfig, "resolve", lambda self, model, views, store: {views[0].name: views[0].weight.sum().item()}
    )
    with pytest.raises(UserError, match="load it in full precision, then call ptq4dm.quantize"):
        type(model).from_pretrained(tmp_path, quantization_config=RTNConfig(activations="dynamic"))


@pytest.mark.parametrize(
    "call, word",
    [
        (lambda model: ptq4dm.quantize(model, {"method": "rtn"}), "config is a recipe, .*; got dict"),
        (lambda model: ptq4dm.quantize(model, RTNConfig(), "a/folder"), "store is a CalibrationStore, .*; got str"),
        (lambda model: RTNConfig(plan="plan.json"), "plan is a Plan, .*; got str"),
        (lambda model: RTNConfig(transforms="smooth"), "are tuples of names"),
        (lambda model: ptq4dm.quantize(model, RTNConfig()), "store .* or choose activations='dynamic'"),
        (lambda model: ptq4dm.quantize(model, RTNConfig(rounding="gptq")), r"store from ptq4dm.collect\(pipe\)\.$"),
    ],
    ids=["dict", "folder", "plan", "transforms", "static", "gptq"],
)
def test_wrong_kinds_of_arguments(dit, call, word):
    with pytest.raises(UserError, match=word):
        call(dit[0])


def test_a_checkpoint_of_several_networks_has_a_folder_for_each(tmp_path):
    names = ("transformer", "transformer_2")
    folders = [folder_of(tmp_path / "a", name, names) for name in names]
    assert folders == [tmp_path / "a" / name for name in names] and folder_of(None, "unet", names) is None
    assert folder_of(tmp_path / "a", "unet", ["unet"]) == tmp_path / "a"
    for folder in folders:
        BlockCheckpoint(folder, {"plan": 1})
        check_folder(tmp_path / "a")  # the same command goes on
    (tmp_path / "a" / "thesis.txt").touch()
    with pytest.raises(UserError, match="holds other files"):
        check_folder(tmp_path / "a")


def test_a_header_that_another_run_writes_meanwhile_is_no_other_file(tmp_path, monkeypatch):
    BlockCheckpoint(tmp_path / "a", {"plan": 1})
    look, seen = checkpoint._holds_blocks, []

    def too_early(path):
        seen.append(path)
        return len(seen) > 2 and look(path)  # the header comes after the first look at the folder

    monkeypatch.setattr(checkpoint, "_holds_blocks", too_early)
    check_folder(tmp_path / "a")
    assert len(seen) == 3


def test_one_checkpoint_is_of_one_run_at_a_time(tmp_path):
    with checkpoint.block_checkpoint(tmp_path / "a", {"plan": 1}) as kept:
        assert kept.load("block", torch.nn.Linear(1, 1)) is None
        check_folder(tmp_path / "a")  # the lock in it is nobody's file
        with (
            pytest.raises(UserError, match="another run with other settings"),
            checkpoint.block_checkpoint(tmp_path / "a", {"plan": 2}),
        ):
            pytest.fail("two runs at once")
    with (
        pytest.raises(UserError, match="another quantization"),
        checkpoint.block_checkpoint(tmp_path / "a", {"plan": 2}),
    ):
        pytest.fail("another quantization's blocks")

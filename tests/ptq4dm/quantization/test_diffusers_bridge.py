"""The bridge to diffusers: every way to save, load, quantize while loading, adapt and compile gives the same bits."""

import copy
import json
import shutil
import warnings
from dataclasses import replace

import pytest
import torch
from diffusers import (
    AutoModel,
    DDIMScheduler,
    DDPMPipeline,
    DiffusionPipeline,
    DiTTransformer2DModel,
    Flux2Transformer2DModel,
    PipelineQuantizationConfig,
    UNet2DModel,
)
from diffusers.utils import logging as diffusers_logging
from safetensors.torch import load_file, save_file
from torch import nn

import ptq4dm
from helpers import run, same
from models import plain_unet
from ptq4dm import CalibrationConfig, CalibrationStore, PTQ4DMConfig, RTNConfig, UserError
from ptq4dm.calibration.store import fingerprint
from ptq4dm.layers.base import is_quantized
from ptq4dm.layers.sizes import stored_bytes
from ptq4dm.layers.w8a8 import Int8Conv2d, Int8Linear
from ptq4dm.pipelines.load import load_pipeline
from ptq4dm.quantization.diffusers_bridge import quantization_config

WEIGHTS = "diffusion_pytorch_model.safetensors"
SHARD = "60KB"


def pipeline(model):
    pipe = DDPMPipeline(unet=model, scheduler=DDIMScheduler(num_train_timesteps=100))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def one_model(a, b):
    """Two models hold the same tensors, bit for bit, and give the same answer."""
    return same(a, b) and torch.equal(run(a), run(b))


@pytest.fixture(scope="module")
def folders(tmp_path_factory, unet):
    """plain/ and sharded/: a model in full precision; store/: its calibration; pipe/: a pipeline of it."""
    root = tmp_path_factory.mktemp("models")
    model = unet()
    model.save_pretrained(root / "plain")
    model.save_pretrained(root / "sharded", max_shard_size=SHARD)
    assert len(list((root / "sharded").glob("*.safetensors"))) > 3
    config = CalibrationConfig(num_samples=6, num_inference_steps=3, num_bins=2, batch_size=6)
    pipe = pipeline(model)
    ptq4dm.collect(pipe, config, root / "store")
    pipe.save_pretrained(root / "pipe")
    return root


@pytest.fixture(scope="module")
def recipe(folders):
    return RTNConfig(calibration=str(folders / "store"), weight_bits=6)


@pytest.fixture(scope="module")
def quantized(recipe, unet):
    """Quantized after loading. Tests must not change it."""
    model = unet()
    ptq4dm.quantize(model, replace(recipe))
    return model


@pytest.fixture(scope="module")
def saved(quantized, tmp_path_factory):
    """A quantized pipeline's folder."""
    folder = tmp_path_factory.mktemp("saved")
    pipeline(quantized).save_pretrained(folder)
    return folder


@pytest.fixture
def messages():
    """What diffusers warns of."""
    records = []

    class Keep(diffusers_logging.logging.Handler):
        def emit(self, record):
            if record.levelno >= diffusers_logging.logging.WARNING:
                records.append(record.getMessage())

    handler = Keep()
    logger = diffusers_logging.get_logger("diffusers")
    logger.addHandler(handler)
    yield records
    logger.removeHandler(handler)


# --- save and load ------------------------------------------------------------------------------------------


def test_model_there_and_back(quantized, tmp_path, messages):
    quantized.save_pretrained(tmp_path)
    again = UNet2DModel.from_pretrained(tmp_path)
    assert one_model(again, quantized) and messages == []
    assert (tmp_path / WEIGHTS).stat().st_size < 1.6 * stored_bytes(quantized)  # no float copy; names take room
    found = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert found["quant_method"] == "ptq4dm" and found["method"] == "rtn" and found["calibration"] is None


def test_config_of_a_loaded_model(quantized, saved, unet):
    again = UNet2DModel.from_pretrained(saved / "unet")
    config = quantization_config(again)
    assert config == quantization_config(quantized) and config.weight_bits == 6
    assert "weight_bits" in repr(config) and "ptq4dm" in repr(again.config)
    assert again.is_quantized and again.hf_quantizer.is_serializable and not again.training
    assert quantization_config(unet()) is None and quantization_config(nn.Linear(2, 2)) is None


def test_pipeline_there_and_back(quantized, saved, messages):
    pipe = DiffusionPipeline.from_pretrained(saved)
    assert one_model(pipe.unet, quantized) and messages == []
    generator = torch.Generator().manual_seed(0)
    image = pipe(generator=generator, num_inference_steps=2, output_type="np").images
    assert image.shape == (1, 8, 8, 3)


def test_load_pipeline(quantized, saved):
    answer = run(load_pipeline(saved).unet)  # in channels_last: floating-point layers sum in another order
    assert (answer - run(quantized)).abs().max() < 1e-4


def test_a_loaded_model_is_saved_again(quantized, saved, tmp_path):
    again = load_pipeline(saved)
    again.save_pretrained(tmp_path / "a")
    UNet2DModel.from_pretrained(tmp_path / "a" / "unet").save_pretrained(tmp_path / "b")
    third = UNet2DModel.from_pretrained(tmp_path / "b")
    assert one_model(third, quantized) and quantization_config(third) == quantization_config(quantized)


def test_sharded(quantized, tmp_path, messages):
    quantized.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert one_model(UNet2DModel.from_pretrained(tmp_path), quantized) and messages == []


@pytest.mark.parametrize("device_map", ["cpu", {"": "cpu"}], ids=str)
def test_device_map(quantized, saved, device_map):
    assert one_model(UNet2DModel.from_pretrained(saved / "unet", device_map=device_map), quantized)


def test_auto_model(quantized, saved):
    again = AutoModel.from_pretrained(str(saved / "unet"))
    assert type(again) is UNet2DModel and one_model(again, quantized)


def test_copy_of_a_loaded_model(quantized, saved):
    again = copy.deepcopy(UNet2DModel.from_pretrained(saved / "unet"))
    assert one_model(again, quantized) and again.is_quantized


def test_bfloat16(saved, quantized, tmp_path):
    model = UNet2DModel.from_pretrained(saved / "unet", dtype=torch.bfloat16)
    assert model.dtype == torch.bfloat16 and model.conv_in.bias.dtype == torch.bfloat16
    scales = [m for m in model.modules() if is_quantized(m)]
    assert all(m.weight_scale.dtype == m.input_scale.dtype == torch.float32 for m in scales)
    assert torch.equal(model.conv_in.weight_scale, quantized.conv_in.weight_scale)
    answer = run(model)
    assert (answer.float() - run(quantized)).norm() < 0.05 * run(quantized).norm()
    model.save_pretrained(tmp_path)
    again = UNet2DModel.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert one_model(again, model) and torch.equal(run(again), answer)


def test_dequantize(quantized, saved, tmp_path):
    model = UNet2DModel.from_pretrained(saved / "unet")
    model.dequantize()
    assert not any(is_quantized(m) for m in model.modules()) and "Conv2d(3, 8" in repr(model)
    assert torch.equal(model.conv_in.weight, quantized.conv_in.dequantized_weight())
    assert (run(model) - run(quantized)).norm() < 0.1 * run(quantized).norm()
    assert quantization_config(model) is None and not model.is_quantized
    model.save_pretrained(tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    again = UNet2DModel.from_pretrained(tmp_path)
    assert type(again.conv_in) is nn.Conv2d and one_model(again, model)
    ptq4dm.quantize(again, RTNConfig(plan=quantization_config(quantized).plan))  # and it can be quantized anew
    assert is_quantized(again.conv_in)


def test_layers_without_bias(tmp_path):
    torch.manual_seed(0)
    model = DiTTransformer2DModel(2, 12, in_channels=4, num_layers=1, sample_size=8, attention_bias=False)
    ptq4dm.quantize(model, RTNConfig(activations="dynamic"))
    model.save_pretrained(tmp_path)
    again = DiTTransformer2DModel.from_pretrained(tmp_path, dtype=torch.bfloat16)
    layer = again.transformer_blocks[0].attn1.to_q
    assert layer.bias is None and again.dtype == torch.bfloat16
    again.dequantize()
    assert {p.dtype for p in again.parameters()} == {torch.bfloat16}
    x = torch.randn(1, 4, 8, 8, dtype=torch.bfloat16)
    assert again(x, torch.tensor([3]), torch.tensor([1])).sample.isfinite().all()


def unbiased_flux2():
    torch.manual_seed(0)
    return Flux2Transformer2DModel(
        patch_size=1, in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=32, num_attention_heads=2,
        joint_attention_dim=64, timestep_guidance_channels=32, axes_dims_rope=(8, 8, 8, 8),
    ).to(torch.bfloat16)  # fmt: skip


ROW_MIX = {"weight_bits": 4, "average_bits": 5.0, "importance": "magnitude"}

STEPS = {"weight_bits": 4, "group_size": 32, "weight_grid": "progressive"}


@pytest.mark.parametrize(
    "options",
    [{}, {"format": "fp8"}, {"weight_bits": 4}, ROW_MIX, STEPS],
    ids=["int8", "fp8", "int4", "row-mix", "steps"],
)
def test_dtype_of_a_model_without_any_bias(options, tmp_path):
    model = unbiased_flux2()
    assert not any(name.endswith("bias") for name, _ in model.named_parameters())
    ptq4dm.quantize(model, RTNConfig(activations="dynamic", **options))
    assert model.dtype == torch.bfloat16
    model.save_pretrained(tmp_path)
    again = Flux2Transformer2DModel.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert again.dtype == torch.bfloat16 and same(again, model)
    assert Flux2Transformer2DModel.from_pretrained(tmp_path, dtype=torch.float16).dtype == torch.float16
    tensors = load_file(tmp_path / WEIGHTS)
    older = {name: tensor for name, tensor in tensors.items() if not name.endswith(".like")}
    assert len(older) < len(tensors)
    save_file(older, tmp_path / WEIGHTS, {"format": "pt"})  # as the version before wrote it
    assert same(Flux2Transformer2DModel.from_pretrained(tmp_path, dtype=torch.bfloat16), model)
    loaded = Flux2Transformer2DModel.from_pretrained(
        tmp_path, dtype=torch.bfloat16, device_map={"": "disk"}, offload_folder=tmp_path / "offloaded"
    )
    assert loaded.transformer_blocks[0].attn.to_q.like is None
    again.dequantize()
    assert {tensor.dtype for tensor in again.parameters()} == {torch.bfloat16} and again.dtype == torch.bfloat16


def test_packed_while_loading_without_a_bias(tmp_path):
    unbiased_flux2().save_pretrained(tmp_path)
    config = RTNConfig(activations="dynamic")
    model = Flux2Transformer2DModel.from_pretrained(tmp_path, dtype=torch.bfloat16, quantization_config=config)
    other = unbiased_flux2()
    ptq4dm.quantize(other, config)
    assert same(model, other) and model.dtype == torch.bfloat16
    assert not any(tensor.is_meta for tensor in model.parameters())


# --- quantizing while loading -------------------------------------------------------------------------------


@pytest.mark.parametrize("source", ["plain", "sharded"])
def test_while_loading_equals_after_loading(folders, recipe, quantized, source, messages):
    config = replace(recipe)
    model = UNet2DModel.from_pretrained(folders / source, quantization_config=config)
    assert one_model(model, quantized) and messages == []
    assert quantization_config(model) == quantization_config(quantized)
    assert config.plan is None  # the caller's recipe serves for the next model too


def test_while_loading_searches_like_after_loading(folders, monkeypatch, unet):
    monkeypatch.setattr("ptq4dm.ranges.clipping.ACTIVATION_STEPS", 6)  # a coarser search is as good a test
    config = PTQ4DMConfig(calibration=str(folders / "store"))
    model = unet()
    ptq4dm.quantize(model, replace(config))
    assert one_model(UNet2DModel.from_pretrained(folders / "plain", quantization_config=config), model)


def test_while_loading_without_calibration(folders, tmp_path, messages, unet):
    config = RTNConfig(activations="dynamic", modules_to_not_convert=("mid_block",))
    model = UNet2DModel.from_pretrained(folders / "plain", quantization_config=config)
    after = unet()
    ptq4dm.quantize(after, replace(config))
    assert one_model(model, after) and is_quantized(model.conv_in)
    assert not any(is_quantized(m) for m in model.mid_block.modules())
    model.save_pretrained(tmp_path)
    assert one_model(UNet2DModel.from_pretrained(tmp_path), model) and messages == []


def test_while_loading_by_a_plan(folders, quantized):
    plan = quantization_config(quantized).plan
    model = UNet2DModel.from_pretrained(folders / "plain", quantization_config=RTNConfig(plan=plan))
    assert one_model(model, quantized)


def test_while_loading_by_a_dict(folders, recipe, quantized):
    config = {"quant_method": "ptq4dm", "method": "rtn", "calibration": recipe.calibration, "weight_bits": 6}
    assert one_model(UNet2DModel.from_pretrained(folders / "plain", quantization_config=config), quantized)


def test_while_loading_a_pipeline(folders, recipe, quantized):
    config = PipelineQuantizationConfig(quant_mapping={"unet": replace(recipe)})
    pipe = DiffusionPipeline.from_pretrained(folders / "pipe", quantization_config=config)
    assert one_model(pipe.unet, quantized)


def test_while_loading_in_bfloat16(folders, recipe):
    after = UNet2DModel.from_pretrained(folders / "plain", dtype=torch.bfloat16)
    ptq4dm.quantize(after, replace(recipe))
    model = UNet2DModel.from_pretrained(folders / "plain", dtype=torch.bfloat16, quantization_config=replace(recipe))
    assert one_model(model, after)


def test_while_loading_on_threads(folders, recipe, quantized, monkeypatch):
    """Biases may arrive while their layers are packed: shards are then read one after another."""
    monkeypatch.setattr("diffusers.models.modeling_utils.HF_ENABLE_PARALLEL_LOADING", True)
    model = UNet2DModel.from_pretrained(folders / "sharded", quantization_config=replace(recipe))
    assert not model.hf_quantizer.supports_parallel_loading and one_model(model, quantized)


def test_while_loading_needs_what_after_loading_needs(folders):
    with pytest.raises(UserError, match="calibration"):
        UNet2DModel.from_pretrained(folders / "plain", quantization_config=PTQ4DMConfig())


def test_while_loading_names_broken_layers(folders, tmp_path):
    shutil.copytree(folders / "plain", tmp_path / "nan")
    tensors = load_file(tmp_path / "nan" / WEIGHTS)
    tensors["mid_block.resnets.0.conv2.weight"][0, 0, 0, 0] = float("nan")
    save_file(tensors, tmp_path / "nan" / WEIGHTS, {"format": "pt"})
    with pytest.raises(UserError, match=r"mid_block\.resnets\.0\.conv2"):
        UNet2DModel.from_pretrained(tmp_path / "nan", quantization_config=RTNConfig(activations="dynamic"))


def test_store_of_other_weights(recipe, tmp_path, unet):
    unet(seed=1).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="another model"):
        UNet2DModel.from_pretrained(tmp_path, quantization_config=replace(recipe))


def test_store_of_another_architecture(recipe, folders, tmp_path, unet):
    config = {**unet().config, "block_out_channels": (8, 8)}
    UNet2DModel.from_config(config).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="another model"):
        UNet2DModel.from_pretrained(tmp_path, quantization_config=replace(recipe))
    UNet2DModel.from_config({**config, "layers_per_block": 2}).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="another model"):
        UNet2DModel.from_pretrained(tmp_path, quantization_config=replace(recipe))


def test_fingerprints_know_weights(folders, unet):
    store = CalibrationStore.load(folders / "store")
    model = unet()
    store.check_model(model)
    store.check_model(model.to(torch.bfloat16))  # the same weights in fewer bits
    changed = unet()
    with torch.no_grad():
        changed.conv_out.weight.mul_(1.1)
    with pytest.raises(UserError, match="another model"):
        store.check_model(changed)


def test_weights_stored_in_float16_have_one_fingerprint(unet):
    """Those of the embedded models are."""
    dtypes = (torch.float16, torch.bfloat16, torch.float32)
    half, *others = [fingerprint(unet().half().to(dtype)) for dtype in dtypes]
    assert others == [half, half] and half != fingerprint(unet(seed=1).half())


def test_a_packed_checkpoint_keeps_its_own_recipe(saved, quantized):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = UNet2DModel.from_pretrained(saved / "unet", quantization_config=RTNConfig(activations="dynamic"))
    assert any("already has" in str(w.message) for w in caught) and one_model(model, quantized)


# --- broken folders -----------------------------------------------------------------------------------------


def damage(kind, path, other):
    if kind == "missing":
        path.unlink()
    elif kind == "truncated":
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    elif kind == "no safetensors":
        path.write_text("version https://git-lfs.github.com/spec/v1\n")
    elif kind == "full precision":
        shutil.copy(other, path)
    elif kind == "lacks a tensor":
        tensors = load_file(path)
        del tensors["mid_block.resnets.0.conv1.qweight"]
        save_file(tensors, path, {"format": "pt"})
    elif kind == "lacks a norm":
        tensors = load_file(path)
        del tensors["conv_norm_out.weight"]
        save_file(tensors, path, {"format": "pt"})
    elif kind == "codes of another shape":
        tensors = load_file(path)
        tensors["conv_in.qweight"] = torch.zeros(8, 3, 1, 1, dtype=torch.int8)
        save_file(tensors, path, {"format": "pt"})
    elif kind == "scales of another shape":
        tensors = load_file(path)
        tensors["conv_in.weight_scale"] = torch.ones(7)
        save_file(tensors, path, {"format": "pt"})


DAMAGE = {  # what is wrong -> what the message speaks of
    "missing": "safetensors|no file",
    "truncated": "safetensors",
    "no safetensors": "safetensors",
    "full precision": "lacks|expected shape",
    "lacks a tensor": "lacks 1 tensor.*mid_block.resnets.0.conv1.qweight",
    "lacks a norm": "lacks 1 tensor.*conv_norm_out.weight",
    "codes of another shape": "conv_in.qweight",
    "scales of another shape": "conv_in.weight_scale",
}


@pytest.mark.parametrize("device_map", [None, "cpu"])
@pytest.mark.parametrize("kind", DAMAGE)
def test_damaged_checkpoints(kind, device_map, saved, folders, tmp_path):
    shutil.copytree(saved, tmp_path / "pipe")
    damage(kind, tmp_path / "pipe" / "unet" / WEIGHTS, folders / "plain" / WEIGHTS)
    if device_map is None:
        with pytest.raises(UserError, match=DAMAGE[kind]) as caught:
            load_pipeline(tmp_path / "pipe")
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 500
    with pytest.raises((OSError, ValueError), match=f"{DAMAGE[kind]}|{WEIGHTS}|checkpoint|git-lfs"):
        UNet2DModel.from_pretrained(tmp_path / "pipe" / "unet", device_map=device_map)


@pytest.mark.parametrize(
    "change, word",
    [
        (lambda q: q.update(method="magic"), "magic"),
        (lambda q: q.update(colour="blue"), "colour"),
        (lambda q: q.update(plan=None), "no plan"),
        (lambda q: q["plan"]["layers"].update(nowhere=q["plan"]["layers"]["conv_in"]), "another model.*nowhere"),
        (lambda q: q["plan"]["layers"]["conv_in"].update(format="int3"), "format 'int3' is unknown"),
    ],
)
def test_damaged_config(change, word, saved, tmp_path):
    shutil.copytree(saved, tmp_path / "pipe")
    path = tmp_path / "pipe" / "unet" / "config.json"
    config = json.loads(path.read_text())
    change(config["quantization_config"])
    path.write_text(json.dumps(config))
    with pytest.raises(UserError, match=word):
        load_pipeline(tmp_path / "pipe")


# --- other tools --------------------------------------------------------------------------------------------


def test_lora_adapter(quantized, saved):
    peft = pytest.importorskip("peft")
    model = UNet2DModel.from_pretrained(saved / "unet")
    lora = peft.LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False)
    model.add_adapter(lora) if hasattr(model, "add_adapter") else peft.inject_adapter_in_model(lora, model)
    adapted = run(model)
    layer = model.mid_block.attentions[0].to_q
    assert isinstance(layer.base_layer, Int8Linear)
    x = torch.randn(3, 16, generator=torch.Generator().manual_seed(0))
    delta = layer.lora_B["default"](layer.lora_A["default"](x)) * layer.scaling["default"]
    assert torch.allclose(layer(x), layer.base_layer(x) + delta, atol=1e-6) and delta.abs().max() > 0
    assert not torch.equal(adapted, run(quantized))
    for module in model.modules():
        if isinstance(module, peft.tuners.tuners_utils.BaseTunerLayer):
            module.enable_adapters(False)
    assert torch.equal(run(model), run(quantized))


def test_layerwise_casting_leaves_packed_layers_alone(quantized, saved):
    model = UNet2DModel.from_pretrained(saved / "unet")
    model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    assert torch.equal(run(model), run(quantized)) and torch.equal(run(model), run(quantized))
    assert model.conv_in.weight_scale.dtype == torch.float32


@pytest.mark.parametrize("source", ["loaded", "quantized here"])
def test_model_casts_are_refused_by_diffusers(saved, quantized, source):
    model = UNet2DModel.from_pretrained(saved / "unet") if source == "loaded" else copy.deepcopy(quantized)
    for cast in (model.half, lambda: model.to(torch.float16)):
        with pytest.raises(ValueError, match="quantized"):
            cast()
    assert model.to("cpu") is model


@pytest.mark.filterwarnings("ignore")
class TestCompile:
    """Inductor with fullgraph=True: one graph, and the answer of the uncompiled model."""

    @pytest.fixture(autouse=True)
    def fresh(self):
        torch._dynamo.reset()
        yield
        torch._dynamo.reset()

    backend = "inductor" if shutil.which("g++") or shutil.which("clang++") else "aot_eager"

    @pytest.mark.parametrize("activations", ["static", "dynamic"])
    @pytest.mark.parametrize(
        "layer, shape",
        [
            (nn.Linear(12, 20), (2, 5, 12)),
            (nn.Linear(12, 1), (1, 12)),
            (nn.Conv2d(3, 8, 3, padding=1, stride=2), (2, 3, 9, 7)),
            (nn.Conv2d(4, 1, 3), (1, 4, 3, 3)),  # one channel and one pixel: strides are ambiguous
        ],
        ids=["linear", "one output", "conv2d", "one pixel"],
    )
    def test_layers(self, layer, shape, activations):
        plan = {"input_scale": 0.03, "input_zero_point": 4} if activations == "static" else {}
        model = nn.Sequential(copy.deepcopy(layer), nn.SiLU())
        ptq4dm.quantize(model, RTNConfig(plan=ptq4dm.Plan("rtn", {"0": ptq4dm.layers.plan.LayerPlan(**plan)})))
        assert isinstance(model[0], (Int8Linear, Int8Conv2d))
        x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            expected = model(x)
            answer = torch.compile(model, backend=self.backend, fullgraph=True)(x)
        assert torch.allclose(answer, expected, atol=1e-5)

    def test_unet(self):
        model = plain_unet()
        exact = run(model)
        ptq4dm.quantize(model, RTNConfig(activations="dynamic"))
        expected = run(model)
        answer = run(torch.compile(model, backend=self.backend, fullgraph=True))
        # Fused arithmetic rounds elsewhere; a code that lies on a tie may then fall to the other side, which in
        # so small a model moves the answer by as much as quantization does.
        assert (answer - expected).norm() < 1.5 * (expected - exact).norm()


def test_networks_of_transformers_were_not_quantized_here():
    """Text encoders lie beside a denoiser; their configs are no mappings."""
    transformers = pytest.importorskip("transformers")
    sizes = dict(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    assert ptq4dm.quantization_config(transformers.CLIPTextModel(transformers.CLIPTextConfig(**sizes))) is None

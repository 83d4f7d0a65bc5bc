"""`quantize(pipe, components=[...])`: text encoders and autoencoders beside denoisers, each by its recipe."""

import copy

import accelerate
import pytest
import torch
from diffusers import DiffusionPipeline
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict

import personal
import ptq4dm
from helpers import distance
from ptq4dm import PTQ4DMConfig, RTNConfig, UserError
from ptq4dm.layers.base import holds_quantized, is_quantized
from ptq4dm.layers.sizes import full_bytes, stored_bytes
from ptq4dm.quantization.components import load_plans, quantized_plans, save_plans
from ptq4dm.quantization.diffusers_bridge import quantization_config
from ptq4dm.quantization.report import memory_of

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore")]
ALL = ["text_encoder", "text_encoder_2", "vae", "unet"]
DYNAMIC = RTNConfig(activations="dynamic")
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """(a pipeline all of whose networks are quantized, its folder)"""
    pipe, folder = personal.text_xl(), tmp_path_factory.mktemp("pipeline")
    ptq4dm.quantize(pipe, components=ALL)
    pipe.save_pretrained(folder)
    return pipe, folder


def images(pipe):
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    return pipe("a dog", num_inference_steps=2, output_type="pt", generator=generator).images


def formats(network):
    return {str(module.plan) for module in network.modules() if is_quantized(module)}


def test_each_kind_has_a_recipe(folder):
    pipe = personal.text_xl()
    before, held = images(pipe), memory_of(pipe)
    report = ptq4dm.quantize(pipe, components=ALL)
    assert formats(pipe.text_encoder) == formats(pipe.text_encoder_2) == {"W4A16"}  # of 32 and 16 inputs: no groups
    assert formats(pipe.vae) == formats(pipe.unet) == {"W8A8 dynamic"}
    assert {type(pipe.vae.encoder.conv_in), type(pipe.vae.decoder.conv_out)} == {torch.nn.Conv2d}
    assert is_quantized(pipe.unet.conv_in) and is_quantized(pipe.vae.decoder.conv_in)
    assert 0 < distance(images(pipe), before) < 0.1
    assert report.networks == ALL and report.left == []
    assert report.memory == {name: [held[name], count] for name, count in memory_of(pipe).items()}
    assert (report.bytes_before, report.bytes_after) == tuple(map(sum, zip(*report.memory.values(), strict=True)))
    assert report.recipes["text_encoder"] | {"method": ""} == dict(
        method="", weight_bits=4, activation_bits=16, group_size=64, activations="dynamic"
    )
    lines = report.table().splitlines()
    assert lines[-1].startswith("all networks") and "%" in lines[-1] and lines[-5].startswith("vae  ")


def test_what_is_saved_loads_to_the_bit(folder, tmp_path):
    pipe, place = folder
    expected = images(pipe)
    assert torch.equal(images(DiffusionPipeline.from_pretrained(place)), expected)
    again = ptq4dm.load_pipeline(place)
    assert torch.equal(images(again), expected) and memory_of(again) == memory_of(pipe)
    assert ptq4dm.verify(place) == {"text_encoder": 12, "text_encoder_2": 13, "unet": 85, "vae": 34}
    save_plans(again, tmp_path / "plan.json")
    plans = load_plans(tmp_path / "plan.json")
    assert plans == quantized_plans(pipe) and set(plans) == set(ALL)
    followed = personal.text_xl()
    config = {name: RTNConfig(plan=plan) for name, plan in plans.items()}
    ptq4dm.quantize(followed, components=config)
    assert torch.equal(images(followed), expected)


def test_a_recipe_for_each():
    pipe = personal.text_xl()
    four = RTNConfig(weight_bits=4, activations="dynamic")
    left = RTNConfig(activations="dynamic", modules_to_not_convert=("*.fc1",))
    report = ptq4dm.quantize(pipe, four, components={"text_encoder": left, "vae": None, "unet": None})
    assert formats(pipe.text_encoder) == {"W8A8 dynamic"} and formats(pipe.vae) == {"W8A8 dynamic"}
    assert formats(pipe.unet) == {"W4A8 dynamic", "W8A8 dynamic"} and not holds_quantized(pipe.text_encoder_2)
    assert type(pipe.text_encoder.encoder.layers[0].mlp.fc1) is torch.nn.Linear
    assert report.method["weight_bits"] == 4 and report.left == ["text_encoder_2"]
    assert quantization_config(pipe.vae).first_last == "keep"


def test_a_store_of_the_denoiser_serves_the_denoiser_alone():
    pipe = personal.text()
    config = ptq4dm.CalibrationConfig(num_samples=2, num_inference_steps=2, num_bins=1)
    store = ptq4dm.collect(pipe, config, conditioning={"prompt": ["a dog"]})
    report = ptq4dm.quantize(pipe, PTQ4DMConfig(), store, components=["text_encoder", "unet"])
    assert "W8A8 static" in formats(pipe.unet) and formats(pipe.text_encoder) == {"W4A16"}
    basis = {row["layer"].partition(".")[0]: row["basis"] for row in report.layers}
    assert basis == {"unet": "output", "text_encoder": "weight"}
    other = personal.text(seed=1)
    with pytest.raises(UserError, match="collected from another model"):
        ptq4dm.quantize(other, PTQ4DMConfig(), store, components=["text_encoder", "unet"])
    assert not any(map(holds_quantized, (other.unet, other.text_encoder)))


def test_latents_that_were_decoded_calibrate_an_autoencoder(tmp_path):
    pipe = personal.text()
    with ptq4dm.record(pipe.vae) as calls:
        before = images(pipe)
        pipe.vae.decode(torch.ones(2, 4, 8, 8), generator=torch.Generator())
    images(pipe)
    assert len(calls) == 2 and not {"decode", "forward"} & vars(pipe.vae).keys()
    report = ptq4dm.quantize(pipe, PTQ4DMConfig(first_last="keep"), calls, component="vae")
    assert "forward" not in vars(pipe.vae)
    inside = {row["format"] for row in report.layers if row["layer"].startswith("decoder.")}
    outside = {row["format"] for row in report.layers if row["layer"].startswith("encoder.")}
    assert inside == {"W8A8 static"} and outside == {"W8A8 dynamic"}
    after = images(pipe)
    assert 0 < distance(after, before) < 0.05
    pipe.save_pretrained(tmp_path)
    assert torch.equal(images(DiffusionPipeline.from_pretrained(tmp_path)), after)


def test_an_autoencoder_of_float16_can_decode_in_float32(folder):
    """Pipelines of SDXL do so: the pipeline's own call is `vae.to(float32)`, which diffusers refuses of others."""
    pipe = copy.deepcopy(folder[0])
    codes = {name: p.clone() for name, p in pipe.vae.named_parameters() if name.endswith(("qweight", "weight_scale"))}
    pipe.vae.to(torch.float16)
    assert pipe.vae.dtype == torch.float16 and pipe.vae.is_quantized
    pipe.vae.to(torch.float32)
    assert pipe.vae.dtype == torch.float32
    state = dict(pipe.vae.named_parameters())
    assert len(codes) == 68 and all(torch.equal(state[name], one) for name, one in codes.items())
    with pytest.raises(ValueError, match="unsupported"):
        pipe.unet.to(torch.float16)


def by_model(pipe, folder):
    pipe.enable_model_cpu_offload(device="cpu")


def by_leaf(pipe, folder):
    pipe.enable_group_offload(onload_device=CPU, offload_type="leaf_level")


def by_block(pipe, folder):
    pipe.enable_group_offload(onload_device=CPU, offload_type="block_level", num_blocks_per_group=1)


def on_disk(pipe, folder):
    pipe.enable_group_offload(onload_device=CPU, offload_type="leaf_level", offload_to_disk_path=str(folder))


def by_layer(pipe, folder):
    """What `enable_sequential_cpu_offload` does, which takes no CPU to compute on."""
    for name in ALL:
        accelerate.cpu_offload(getattr(pipe, name), execution_device=CPU)


@pytest.mark.parametrize("offload", [by_model, by_leaf, by_block, on_disk, by_layer])
def test_offloaded_it_gives_the_same(offload, folder, tmp_path):
    pipe, place = folder
    loaded = DiffusionPipeline.from_pretrained(place)
    offload(loaded, tmp_path)
    expected = images(pipe)
    assert torch.equal(images(loaded), expected) and torch.equal(images(loaded), expected)
    assert memory_of(loaded) == memory_of(pipe)


def test_bytes_as_floats(folder):
    pipe, _ = folder
    original = personal.text_xl()
    assert {name: full_bytes(getattr(pipe, name)) for name in ALL} == {
        name: stored_bytes(getattr(original, name)) for name in ALL
    }


def test_a_token_is_learned_by_a_quantized_encoder(tmp_path):
    pipe = personal.text()
    ptq4dm.quantize(pipe, components=["text_encoder", "vae"])  # 8-bit inputs of a denoiser would hide so small a step
    codes = {name: p.clone() for name, p in pipe.text_encoder.named_parameters()}
    config = ptq4dm.PersonalizeConfig(
        steps=20, learning_rate=0.2, batch_size=2, perturbations=2, log_every=2, buffer=2, variance=0.2
    )
    done = ptq4dm.personalize(pipe, personal.pictures(3, 20, 24), config, tmp_path, token="<dog>", init="dog")
    losses = [row["loss"] for row in done.log]
    assert losses[-1] == min(losses) < losses[0]
    assert all(torch.equal(p, codes[name]) for name, p in pipe.text_encoder.named_parameters())
    assert ptq4dm.load_embedding(pipe, done.path) == "<dog>"
    made = [
        ptq4dm.sample(pipe, [0], num_inference_steps=2, conditioning={"prompt": [f"a photo of {word}"]})
        for word in ("<dog>", "dog")
    ]
    assert not torch.equal(*made)


@pytest.fixture
def lora(tmp_path, monkeypatch):
    """A folder of adapters on a text encoder; transformers' wish for a newer peft is let be."""
    monkeypatch.setattr("transformers.integrations.peft.check_peft_version", lambda **_: None)
    encoder = personal.text().text_encoder
    torch.manual_seed(1)
    encoder.add_adapter(LoraConfig(r=4, target_modules=["q_proj", "fc1"], init_lora_weights=False))
    names = {"lora_A": "lora_linear_layer.down", "lora_B": "lora_linear_layer.up"}
    layers = get_peft_model_state_dict(encoder)
    for old, new in names.items():
        layers = {name.replace(old, new): tensor for name, tensor in layers.items()}
    type(personal.text()).save_lora_weights(tmp_path, text_encoder_lora_layers=layers)
    return tmp_path


def test_adapters_lie_beside_a_quantized_encoder(lora):
    plain, adapted, pipe = personal.text(), personal.text(), personal.text()
    adapted.load_lora_weights(lora)
    ptq4dm.quantize(pipe, RTNConfig(activations="dynamic"), component="text_encoder")
    without = images(pipe)
    pipe.load_lora_weights(lora)
    change = distance(images(adapted), images(plain))
    assert change > 0.01 and distance(images(pipe), images(adapted)) < 0.3 * change
    with pytest.raises(UserError, match="kept as codes and cannot be computed with or changed"):
        pipe.fuse_lora(components=["text_encoder"])
    with pytest.raises(UserError, match="adapters are on the model"):
        pipe.text_encoder.save_pretrained(lora / "out")
    pipe.unload_lora_weights()
    assert torch.equal(images(pipe), without)
    with pytest.raises(UserError, match="adapters are on the model"):
        ptq4dm.quantize(adapted, components=["text_encoder"])


ENCODER = {"text_encoder": None}


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (dict(components=["text_encoder", "nothing"]), "has no network 'nothing'; it has "),
        (dict(components=["tokenizer"]), "has no network 'tokenizer'"),
        (dict(components=[]), "components are names of networks, or name -> recipe; got an empty list"),
        (dict(components="vae"), "components are names of networks, or name -> recipe; got 'vae'"),
        (dict(components=[3]), "components are names of networks, such as 'text_encoder'; got 3"),
        (dict(components=["vae", "vae"]), "components names 'vae' twice"),
        (dict(components={"vae": 3}), "the recipe of 'vae' is one such as RTNConfig\\(\\), or None; got 3"),
        (dict(components=["vae"], component="unet"), "give one of the two"),
        (
            dict(components=["vae"], config=DYNAMIC),
            "config is the recipe of denoisers, and components names none \\(vae",
        ),
        (dict(components={"vae": PTQ4DMConfig()}), "PTQ4DMConfig needs calibration"),
        (dict(), "config is a recipe, such as PTQ4DMConfig\\(\\); got NoneType"),
        (
            dict(components={"vae": RTNConfig(activations="dynamic", modules_to_not_convert=("x",))}),
            "'x' in modules_to_not_convert names no layer",
        ),
    ],
)
def test_wrong_components(given, words):
    pipe = personal.text()
    with pytest.raises(UserError, match=words):
        ptq4dm.quantize(pipe, **given)
    assert not any(holds_quantized(getattr(pipe, name)) for name in ("vae", "text_encoder", "unet"))


def test_all_or_none():
    pipe = personal.text()
    ptq4dm.quantize(pipe, components=["vae"])
    with pytest.raises(UserError, match="'vae' is quantized already"):
        ptq4dm.quantize(pipe, components=["text_encoder", "vae"])
    assert not holds_quantized(pipe.text_encoder)
    with pytest.raises(UserError, match="a UNet2DConditionModel is one network and has no components"):
        ptq4dm.quantize(pipe.unet, components=["unet"])
    pipe.text_encoder.encoder.layers = torch.nn.ModuleList()
    with pytest.raises(UserError, match="'text_encoder' has no Linear or Conv2d that can be quantized; leave it out"):
        ptq4dm.quantize(pipe, components=["text_encoder", "unet"])
    assert not holds_quantized(pipe.unet)
    plan = quantized_plans(pipe)["vae"]
    with pytest.raises(UserError, match="a plan is of one network"):
        ptq4dm.quantize(personal.text(), components=dict.fromkeys(["vae", "unet"], RTNConfig(plan=plan)))

"""LoRA adapters that peft puts on top of SVDQuant layers: what works, and what says that it does not."""

import copy

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    StableDiffusion3Pipeline,
    StableDiffusionXLPipeline,
)

import denoisers
import ptq4dm
from helpers import arguments
from ptq4dm import SVDQuantConfig
from ptq4dm.calibration.record import replay
from ptq4dm.errors import UserError
from ptq4dm.layers.w8a8 import Int8Conv2d
from ptq4dm.svdquant import fuse_lora, unfuse_lora
from ptq4dm.svdquant.layers.svdq import SVDQConv2d, SVDQLinear

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.usefixtures("one_thread")

Q = "transformer_blocks.0.attn.to_q"
TARGETS = {  # of all kinds of layers: with a branch, without one of their own, shifted, weight-only, convolutions
    "sd3": ["to_q", "to_v", "add_k_proj"],
    "flux": ["to_q", "to_v", "net.2", "proj_mlp", "norm1.linear"],
    "sana": ["to_q", "conv_inverted"],
}


def adapters(rank, targets):
    return peft.LoraConfig(r=rank, target_modules=targets, init_lora_weights=False)


@pytest.fixture
def flux():
    """(a quantized model to put adapters on, its calls, its answer to them)"""
    model, store, _ = denoisers.quantized("flux")
    return copy.deepcopy(model), store.calls, replay(model, store.calls)


@pytest.mark.parametrize("kind", TARGETS)
def test_an_adapter_on_top_and_off_again(kind):
    quantized, store, _ = denoisers.quantized(kind)
    model, before = copy.deepcopy(quantized), replay(quantized, store.calls)
    torch.manual_seed(0)
    model.add_adapter(adapters(4, TARGETS[kind]))
    wrapped = [module for module in model.modules() if isinstance(module, peft.tuners.lora.LoraLayer)]
    assert len(wrapped) > 3 and all(isinstance(w.base_layer, (SVDQLinear, SVDQConv2d)) for w in wrapped)
    assert (replay(model, store.calls) - before).norm() > 0.05 * before.norm()
    model.disable_adapters()
    assert torch.equal(replay(model, store.calls), before)
    model.enable_adapters()
    assert not torch.equal(replay(model, store.calls), before)
    model.delete_adapters("default")
    assert torch.equal(replay(model, store.calls), before)
    model.unload_lora()
    assert not any(isinstance(module, peft.tuners.lora.LoraLayer) for module in model.modules())
    assert torch.equal(replay(model, store.calls), before)


def test_models_for_which_diffusers_has_no_adapters():
    """DiT and PixArt: peft itself puts them in."""
    quantized, store, _ = denoisers.quantized("dit")
    model, before = copy.deepcopy(quantized), replay(quantized, store.calls)
    assert not hasattr(model, "add_adapter")
    torch.manual_seed(0)
    peft.inject_adapter_in_model(adapters(4, ["to_q", "to_v", "net.2"]), model)
    wrapped = [module for module in model.modules() if isinstance(module, peft.tuners.lora.LoraLayer)]
    assert len(wrapped) == 6 and (replay(model, store.calls) - before).norm() > 0.05 * before.norm()
    for undo in (lambda w: w.set_scale("default", 0), lambda w: w.enable_adapters(False)):
        for layer in wrapped:
            undo(layer)
        assert torch.equal(replay(model, store.calls), before)
        for layer in wrapped:
            layer.set_scale("default", 1)
            layer.enable_adapters(True)
    for layer in wrapped:
        layer.delete_adapter("default")
    assert torch.equal(replay(model, store.calls), before)


@pytest.mark.filterwarnings("ignore:Already found a `peft_config`")
def test_two_adapters_and_their_strengths(flux):
    model, calls, before = flux
    torch.manual_seed(0)
    model.add_adapter(adapters(4, ["to_q", "to_v"]), adapter_name="one")
    model.add_adapter(adapters(2, ["to_q", "net.2"]), adapter_name="two")
    layer, x = model.get_submodule(Q), torch.randn(3, 64)

    def delta(name):
        up, down = layer.lora_B[name].weight, layer.lora_A[name].weight
        return 8 / len(down) * x @ down.T @ up.T  # peft's alpha is 8

    for one, two in ((1.0, 0.0), (0.5, 2.0), (0.0, 0.0)):
        model.set_adapters(["one", "two"], [one, two])
        expected = layer.base_layer(x) + one * delta("one") + two * delta("two")
        assert torch.allclose(layer(x), expected, atol=1e-4)
    assert torch.equal(replay(model, calls), before)  # of strength 0
    model.set_adapters("two", 1.0)
    assert torch.allclose(layer(x), layer.base_layer(x) + delta("two"), atol=1e-4)
    model.delete_adapters(["one", "two"])
    assert torch.equal(replay(model, calls), before)


def test_a_lender_with_an_adapter_still_lends(flux):
    """The adapter is on the layer's output: the down projection that others share is untouched."""
    model, calls, _ = flux
    values = model.get_submodule(Q.replace("to_q", "to_v"))
    words = arguments(model, calls)["encoder_hidden_states"]
    before = values(words)
    torch.manual_seed(0)
    model.add_adapter(adapters(4, ["attn.to_q"]))
    assert values.branch[0] is model.get_submodule(Q).base_layer.down
    assert torch.equal(values(words), before)


def test_adapters_take_part_in_a_16_bit_model(flux, tmp_path):
    model, calls, _ = flux
    model.save_pretrained(tmp_path)
    model = type(model).from_pretrained(tmp_path, dtype=torch.bfloat16)
    before = replay(model, calls)
    torch.manual_seed(0)
    model.add_adapter(adapters(4, ["to_q", "to_v"]))
    after = replay(model, calls)
    assert after.dtype == torch.bfloat16 and (after - before).norm() > 0.05 * before.norm()
    model.disable_adapters()
    assert torch.equal(replay(model, calls), before)


# --- adapters trained on the original, loaded through its pipeline -------------------------------------------


def parts(**more):
    return dict(vae=None, text_encoder=None, tokenizer=None, text_encoder_2=None, tokenizer_2=None, **more)


def sd3_pipeline(model):
    more = parts(text_encoder_3=None, tokenizer_3=None, transformer=model)
    return StableDiffusion3Pipeline(scheduler=FlowMatchEulerDiscreteScheduler(), **more)


def sdxl_pipeline(model):
    return StableDiffusionXLPipeline(scheduler=DDIMScheduler(), **parts(unet=model))


def flux_pipeline(model):
    return FluxPipeline(scheduler=FlowMatchEulerDiscreteScheduler(), **parts(transformer=model))


def trained(original, targets):
    """The tensors of an adapter of the original model; the original gets it, too."""
    torch.manual_seed(0)
    original.add_adapter(adapters(4, targets))
    return peft.get_peft_model_state_dict(original)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "kind, pipeline, prefix, targets",
    [
        ("sd3", sd3_pipeline, "transformer", ["to_q", "to_v", "net.2"]),
        ("sdxl", sdxl_pipeline, "unet", ["to_q", "to_v", "conv1", "conv_shortcut", "time_emb_proj"]),
    ],
)
def test_pipelines_load_adapters(kind, pipeline, prefix, targets):
    original, store = denoisers.pair(kind)
    model = denoisers.pair(kind)[0]
    quick = {"rank": 8, "num_tuples": 4, "smoothing": 0.5, "refinements": 0, "activations": "int8"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ptq4dm.ranges.clipping.ACTIVATION_STEPS", 6)
        ptq4dm.quantize(model, SVDQuantConfig(**quick), store)
    exact, before = replay(original, store.calls), replay(model, store.calls)
    tensors = trained(original, targets)
    moved = replay(original, store.calls) - exact
    pipe = pipeline(model)
    pipe.load_lora_weights({f"{prefix}.{name}": tensor for name, tensor in tensors.items()}, adapter_name="style")
    assert pipe.get_active_adapters() == ["style"]
    on_top = replay(model, store.calls) - before
    assert (on_top - moved).norm() < 0.75 * moved.norm()  # it does to this model what it does to the original
    if kind == "sdxl":
        kinds = {type(m.base_layer) for m in model.modules() if isinstance(m, peft.tuners.lora.LoraLayer)}
        assert {SVDQConv2d, Int8Conv2d} < kinds
    pipe.set_adapters("style", 0.0)
    assert torch.equal(replay(model, store.calls), before)
    pipe.set_adapters("style", 1.0)
    pipe.disable_lora()
    assert torch.equal(replay(model, store.calls), before)
    with pytest.raises(UserError, match="ptq4dm.svdquant.fuse_lora"):  # codes cannot take it in
        pipe.fuse_lora()
    pipe.unload_lora_weights()
    assert torch.equal(replay(model, store.calls), before)


@pytest.mark.parametrize("own", ["pipeline", "transformer"])
def test_flux_takes_adapters(flux, own):
    """Its loader reads the shapes of weights off the model's tensors, of a second adapter, too."""
    model, calls, before = flux
    tensors = trained(denoisers.pair("flux")[0], ["to_q", "to_v", "net.2", "proj_mlp"])
    tensors = {f"transformer.{name}": tensor for name, tensor in tensors.items()}
    pipe = flux_pipeline(model)
    for name in ("style", "other"):
        if own == "pipeline":
            pipe.load_lora_weights(dict(tensors), adapter_name=name)
        else:
            model.load_lora_adapter(dict(tensors), prefix="transformer", adapter_name=name)
    pipe.set_adapters("style")
    assert pipe.get_active_adapters() == ["style"]
    assert (replay(model, calls) - before).norm() > 0.05 * before.norm()
    pipe.set_adapters("style", 0.0)
    assert torch.equal(replay(model, calls), before)
    pipe.unload_lora_weights()
    assert torch.equal(replay(model, calls), before)


def test_a_partly_fused_adapter_is_taken_off_whole_or_not_at_all(flux, tmp_path):
    """Fused into the layers with a branch, beside a layer without one: no call may leave one half of it."""
    model, calls, before = flux
    torch.manual_seed(0)
    model.add_adapter(adapters(4, ["attn.to_q", "x_embedder"]), "style")
    beside = replay(model, calls)
    elsewhere = [name for name, one in model.named_modules() if hasattr(one, "base_layer")]
    counts = fuse_lora(model)
    assert 0 < counts["style"] < len(elsewhere)
    assert (replay(model, calls) - beside).norm() < 0.2 * (beside - before).norm()
    message = "adapter 'style' is fused into some layers and beside others .*unfuse_lora before you "
    for call in (model.unload_lora, lambda: model.delete_adapters("style")):
        with pytest.raises(UserError, match=message + "take it off"):
            call()
    with pytest.raises(UserError, match=message + "save the model"):
        model.save_pretrained(tmp_path / "a")
    unfuse_lora(model)
    model.unload_lora()
    assert torch.equal(replay(model, calls), before)
    model.save_pretrained(tmp_path / "b")

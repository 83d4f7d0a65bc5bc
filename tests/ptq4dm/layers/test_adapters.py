"""LoRA and DoRA beside layers of all formats, by diffusers' own calls: as on the model in full precision."""

import copy

import peft
import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler, FluxPipeline, StableDiffusionXLPipeline

import denoisers
import ptq4dm
from helpers import distance, normal
from ptq4dm import RTNConfig
from ptq4dm.calibration.record import replay
from ptq4dm.layers.base import is_quantized

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore")]
RECIPES = {
    "int8": RTNConfig(activations="dynamic"),
    "fp8": RTNConfig(activations="dynamic", format="fp8"),
    "int4": RTNConfig(activations="dynamic", weight_bits=4, group_size=64),
    "row-mix": RTNConfig(activations="dynamic", weight_bits=4, average_bits=5.0, importance="magnitude"),
}
PARTS = dict(vae=None, text_encoder=None, tokenizer=None, text_encoder_2=None, tokenizer_2=None)
PIPELINES = {
    "flux": lambda model: FluxPipeline(scheduler=FlowMatchEulerDiscreteScheduler(), transformer=model, **PARTS),
    "sdxl": lambda model: StableDiffusionXLPipeline(scheduler=DDIMScheduler(), unet=model, **PARTS),
}


def adapter(model, prefix, rank, dora, seed):
    """The file of a trained adapter of a model in full precision."""
    model = copy.deepcopy(model)
    targets = ["to_q", "to_v", "to_out.0"] + (["conv1"] if prefix == "unet" else [])
    model.add_adapter(peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=targets, use_dora=dora))
    for number, (name, tensor) in enumerate(model.named_parameters()):
        if "lora_B" in name:
            tensor.data = normal(*tensor.shape, seed=seed + number, scale=0.2)
    return {f"{prefix}.{name}": tensor.clone() for name, tensor in peft.get_peft_model_state_dict(model).items()}


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES.keys())
@pytest.mark.parametrize("kind", PIPELINES)
def test_adapters_do_what_they_do_in_full_precision(kind, recipe, dora):
    original, store = denoisers.pair(kind)
    model, prefix = copy.deepcopy(original), "unet" if kind == "sdxl" else "transformer"
    one, two = (adapter(original, prefix, rank, dora, seed) for rank, seed in ((4, 100), (3, 500)))
    ptq4dm.quantize(model, recipe)
    exact, before = replay(original, store.calls), replay(model, store.calls)
    bound = 1.3 * distance(before, exact) + 0.01  # without an adapter
    pipes = [PIPELINES[kind](one) for one in (original, model)]
    for pipe in pipes:
        pipe.load_lora_weights(dict(one), adapter_name="one")
        pipe.load_lora_weights(dict(two), adapter_name="two")
    beside = [tensor for name, tensor in model.named_parameters() if "lora_" in name]
    assert beside and {tensor.dtype for tensor in beside} == {torch.float32}
    for names, weights in ((["one"], [1.0]), (["one", "two"], [0.5, 1.0])):
        for pipe in pipes:
            pipe.set_adapters(names, weights)
        expected = replay(original, store.calls)
        assert distance(expected, exact) > 0.05
        assert distance(replay(model, store.calls), expected) < bound
    pipes[1].disable_lora()
    assert torch.equal(replay(model, store.calls), before)
    pipes[1].enable_lora()
    for pipe in pipes:
        pipe.delete_adapters("two")
    assert distance(replay(model, store.calls), replay(original, store.calls)) < bound
    pipes[1].unload_lora_weights()
    assert torch.equal(replay(model, store.calls), before) and not hasattr(model, "peft_config")


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES.keys())
def test_the_weight_of_an_adapted_layer_is_no_code(recipe):
    model, _ = denoisers.pair("flux")
    model = model.to(torch.bfloat16)
    ptq4dm.quantize(model, recipe)
    model.add_adapter(peft.LoraConfig(r=4, target_modules=["to_q"]))
    wrapper = model.transformer_blocks[0].attn.to_q
    assert is_quantized(wrapper.base_layer) and wrapper.weight.dtype == torch.bfloat16
    assert wrapper.weight.shape == (64, 64) and wrapper.lora_A["default"].weight.dtype == torch.bfloat16

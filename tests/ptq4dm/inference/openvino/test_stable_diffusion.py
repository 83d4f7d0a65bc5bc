"""A tiny Stable Diffusion through OpenVINO: guidance, texts, adapters that come, go and are switched off."""

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline
from peft import LoraConfig

import models
import ptq4dm
from helpers import distance, needs_vnni

pytest.importorskip("openvino")
pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore")]


SMALL = {
    "block_out_channels": (12,), "down_block_types": ("CrossAttnDownBlock2D",), "mid_block_type": None,
    "up_block_types": ("UpBlock2D",),
}  # fmt: skip


@pytest.fixture
def pipe():
    unet = models.conditional_unet(**SMALL)
    vae = AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, sample_size=8)
    parts = {"text_encoder": None, "tokenizer": None, "safety_checker": None, "feature_extractor": None}
    pipe = StableDiffusionPipeline(vae, unet=unet, scheduler=DDIMScheduler(), requires_safety_checker=False, **parts)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def latents(pipe):
    random = torch.Generator().manual_seed(0)
    texts = {name: torch.randn(1, 5, 12, generator=random) for name in ("prompt_embeds", "negative_prompt_embeds")}
    options = {"num_inference_steps": 3, "height": 8, "width": 8, "output_type": "latent"}
    return pipe(**texts, **options, generator=random).images


def through(pipe):
    report = ptq4dm.optimize(pipe, engine="openvino", precision="float32")
    return report, pipe.unet.forward


def test_guided_pictures_and_adapters(pipe):
    plain = latents(pipe)
    pipe.unet.add_adapter(LoraConfig(r=4, target_modules=["to_q", "to_v"], init_lora_weights=False))
    adapted = latents(pipe)
    assert distance(adapted, plain) > 0.01
    report, engine = through(pipe)
    assert distance(latents(pipe), adapted) < 1e-4 and engine.replays == 3 and not engine.plain
    pipe.unet.disable_adapters()
    assert distance(latents(pipe), plain) < 1e-4
    converted = engine.converted
    assert 1 < converted < 4 and distance(latents(pipe), plain) < 1e-4 and engine.converted == converted
    pipe.unet.enable_adapters()
    assert distance(latents(pipe), adapted) < 1e-4
    pipe.unet.delete_adapters("default")
    assert distance(latents(pipe), plain) < 1e-4
    report.undo()
    assert torch.equal(latents(pipe), plain)


@needs_vnni
def test_quantized_with_an_adapter(pipe):
    pipe.unet = models.conditional_unet()
    with ptq4dm.record(pipe) as calls:
        latents(pipe)
    ptq4dm.quantize(pipe, ptq4dm.PTQ4DMConfig(), calls)
    pipe.unet.add_adapter(LoraConfig(r=4, target_modules=["to_q", "to_v"], init_lora_weights=False))
    expected = latents(pipe)
    report, engine = through(pipe)
    assert distance(latents(pipe), expected) < 0.03 and engine.replays == 3
    assert "quantized layers in products of int8" in str(report)


def test_calls_that_it_does_not_serve_are_told(pipe):
    pipe.unet.train()
    report, _ = through(pipe)
    latents(pipe)
    assert "3 calls as they are: the model is in training" in str(report) and "converted at its first call" in str(
        report
    )

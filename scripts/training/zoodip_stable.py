"""Memory of personalization where weights are most of it: a token of a model of the shape of Stable Diffusion 1.5.

    python scripts/training/zoodip_stable.py --output out/zoodip-stable.jsonl --device cuda

Weights are random, for bytes and seconds do not depend on them. Compared are a step on the packed model in bfloat16,
as a GPU serves it; sampling of as many rows with it; and textual inversion by back-propagation through the model in
float32, one picture a step. Bytes are the allocator's peak, with all that lies on the device.
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from rows_file import RowsFile
from zoodip_arms import BACK, MODELS
from zoodip_memory import measured

import ptq4dm
from ptq4dm.errors import run
from ptq4dm.pipelines.devices import check_device
from ptq4dm.training.personalization.pictures import learned_from
from ptq4dm.training.personalization.problem import Problem, ready
from ptq4dm.training.personalization.run import step_once
from ptq4dm.training.personalization.targets import PROMPTS, token_target
from ptq4dm.training.personalization.zeroth_order import Tuned
from ptq4dm.training.pictures import image_size
from ptq4dm.training.schedule import schedule_of

WORD, TOKEN = "dog", "<it>"
DOWN, UP = ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",), ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3


def pipeline(device: torch.device, dtype: torch.dtype, tiny: bool = False) -> StableDiffusionPipeline:
    """Random weights in the shapes of Stable Diffusion 1.5; tiny: narrow ones, for a test."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import CLIPTextConfig, CLIPTextModel, PreTrainedTokenizerFast

    words = sorted({word for text in PROMPTS for word in text.replace("{}", WORD).replace(",", " ,").split()})
    known = {word: k for k, word in enumerate(["<pad>", "<s>", "</s>", "<unk>", *words, "close", "-", "up"])}
    inner = Tokenizer(models.WordLevel(known, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    ends = [("<s>", 1), ("</s>", 2)]
    inner.post_processor = processors.TemplateProcessing(single=["<s>", "$A", "</s>"], special_tokens=ends)
    names = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    width, blocks = (32, (8, 8, 8, 8)) if tiny else (768, (320, 640, 1280, 1280))
    coder = (8, 8, 8, 8) if tiny else (128, 256, 512, 512)
    text = CLIPTextConfig(
        vocab_size=49408,
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=12,
        num_attention_heads=width // 16 if tiny else 12,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    with torch.device(device):
        unet = UNet2DConditionModel(
            sample_size=16 if tiny else 64,
            block_out_channels=blocks,
            cross_attention_dim=width,
            norm_num_groups=8 if tiny else 32,
            down_block_types=DOWN,
            up_block_types=UP,
        )
        vae = AutoencoderKL(
            block_out_channels=coder,
            latent_channels=4,
            layers_per_block=2,
            norm_num_groups=8 if tiny else 32,
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
        )
        encoder = CLIPTextModel(text)
    pipe = StableDiffusionPipeline(
        vae=vae.to(dtype).eval(),
        text_encoder=encoder.to(dtype).eval(),
        tokenizer=PreTrainedTokenizerFast(tokenizer_object=inner, model_max_length=77, **names),
        unet=unet.to(dtype).eval(),
        scheduler=DDIMScheduler(clip_sample=False, steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    return pipe.to(device)


def back_propagated(pipe: StableDiffusionPipeline, problem: Problem) -> None:
    """One step of textual inversion: the embedding's gradient, through text encoder and UNet, and Adam."""
    u = problem.target.start.clone().requires_grad_()
    optimizer = torch.optim.Adam([u], 5e-3)
    draw = problem.draw("step", 0)
    text = PROMPTS[draw.images[0] % len(PROMPTS)].replace("{}", WORD)
    tokens = pipe.tokenizer([text], padding="max_length", truncation=True, return_tensors="pt").input_ids
    for network in (pipe.unet, pipe.text_encoder):
        network.requires_grad_(False)
    with torch.enable_grad(), problem.target.tables.given(u[None]):
        states = pipe.text_encoder(tokens.to(u.device))[0]
        x = problem.images[draw.images]
        noisy = problem.schedule.noisy(x, draw.noise, draw.t)
        said = pipe.unet(noisy, draw.t, encoder_hidden_states=states).sample
        loss = (said - problem.schedule.target(x, draw.noise, draw.t)).square().mean()
        loss.backward()
    optimizer.step()


def works_of(model: str, device: torch.device, tiny: bool) -> dict:
    """Name -> a function that does it once."""
    make = MODELS[model]
    pipe = pipeline(device, torch.bfloat16 if make else torch.float32, tiny)
    if make:
        ptq4dm.quantize(pipe, make())
    with ready(pipe):
        picture = torch.zeros(3, *image_size(pipe), dtype=torch.uint8)
        images = learned_from(pipe, [picture])
    config = ptq4dm.PersonalizeConfig(batch_size=1, perturbations=2)
    problem = Problem(token_target(pipe, TOKEN, WORD), images, schedule_of(pipe, device), config)
    state, prompts = Tuned.start(problem.target.start), [f"a photo of {WORD}"] * (1 + config.perturbations)

    def sampling() -> None:
        pipe(prompts, num_inference_steps=1, guidance_scale=1.0, output_type="latent")

    works = {"step": partial(step_once, problem, state), "sampling": sampling}
    works["encoding"] = partial(learned_from, pipe, [picture])
    if make is None:
        works[BACK] = partial(back_propagated, pipe, problem)
    return {name: (pipe, work) for name, work in works.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("out/zoodip-stable.jsonl"))
    parser.add_argument("--models", nargs="+", default=[*MODELS], choices=[*MODELS])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--timed-seconds", type=float, default=2.0, help="of each speed")
    parser.add_argument("--tiny", action="store_true", help="narrow networks, for a test")
    args = parser.parse_args()
    device = check_device(args.device)
    rows = RowsFile(args.output, device)
    for model in args.models:
        key = {"row": f"SD1.5 {model} memory", "model": f"SD1.5 {model}", "arm": "memory", "tiny": args.tiny}
        if rows.has(**key):
            continue
        found = {}
        for name, (pipe, work) in works_of(model, device, args.tiny).items():
            with ready(pipe):
                found[f"one image: {name}"] = measured(work, device, args.timed_seconds)
        rows.add(**key, **found)


if __name__ == "__main__":
    run(main)

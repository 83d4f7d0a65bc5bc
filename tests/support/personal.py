"""Tiny pipelines to personalize: a pixel DiT of ten classes, and a text model with its own tokenizer."""

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)

from models import pixel_dit
from ptq4dm.pipelines.pixel_dit import PixelDiTPipeline

WORDS = ["a", "photo", "of", "picture", "close-up", "in", "the", "one", "photographed", "dog", "cat", "close", "up"]


def classes(seed=0, **config):
    """A pixel DiT, [B, 3, 8, 8], two blocks, so two tables of 16 numbers for each class."""
    return PixelDiTPipeline(pixel_dit(seed, num_layers=2, **config), DDIMScheduler())


def tokenizer(length=16):
    """Whole words, between BOS and EOS, padded; "hotdog" is two tokens."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    ends = ["<pad>", "<s>", "</s>", "<unk>"]
    vocabulary = {word: k for k, word in enumerate([*ends, *WORDS, "hot", "##dog", ",", "-"])}
    inner = Tokenizer(models.WordPiece(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    tokens = [("<s>", 1), ("</s>", 2)]
    inner.post_processor = processors.TemplateProcessing(single=["<s>", "$A", "</s>"], special_tokens=tokens)
    names = dict(pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    return PreTrainedTokenizerFast(tokenizer_object=inner, model_max_length=length, **names)


def text(seed=0, prediction="epsilon"):
    """A StableDiffusionPipeline of random weights: pictures of 16x16, latents of [4, 8, 8], tokens of 32 numbers."""
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(seed)
    words = tokenizer()
    config = CLIPTextConfig(
        vocab_size=len(words), hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=16, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    unet = UNet2DConditionModel(
        sample_size=8, layers_per_block=1, block_out_channels=(8, 16), norm_num_groups=4, attention_head_dim=4,
        cross_attention_dim=32, down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    vae = AutoencoderKL(
        block_out_channels=(8, 8), norm_num_groups=4, latent_channels=4, layers_per_block=1,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
    )  # fmt: skip
    pipe = StableDiffusionPipeline(
        vae=vae, text_encoder=CLIPTextModel(config).eval(), tokenizer=words, unet=unet.eval(),
        scheduler=DDIMScheduler(prediction_type=prediction, clip_sample=False, steps_offset=1),
        safety_checker=None, feature_extractor=None,
        requires_safety_checker=False,
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    return pipe


def text_xl():
    """A StableDiffusionXLPipeline of the same parts, with two text encoders."""
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    pipe = text()
    other = CLIPTextConfig(**pipe.text_encoder.config.to_dict() | {"hidden_size": 16, "projection_dim": 16})
    unet = UNet2DConditionModel(
        sample_size=8, layers_per_block=1, block_out_channels=(8, 16), norm_num_groups=4, attention_head_dim=4,
        cross_attention_dim=48, down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), addition_embed_type="text_time",
        addition_time_embed_dim=4, projection_class_embeddings_input_dim=6 * 4 + 16,
    )  # fmt: skip
    made = StableDiffusionXLPipeline(
        vae=pipe.vae, text_encoder=pipe.text_encoder, text_encoder_2=CLIPTextModelWithProjection(other).eval(),
        tokenizer=pipe.tokenizer, tokenizer_2=tokenizer(), unet=unet.eval(), scheduler=pipe.scheduler,
    )  # fmt: skip
    made.set_progress_bar_config(disable=True)
    return made


def pictures(number=3, height=8, width=8, seed=0):
    """uint8 [number, 3, height, width]."""
    g = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (number, 3, height, width), generator=g, dtype=torch.uint8)

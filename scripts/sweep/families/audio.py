"""Sound: AudioLDM 2, MusicLDM, Stable Audio, ACE-Step, LongCat-Audio."""

from __future__ import annotations

import diffusers as d
import transformers as tr
from families import standins
from families.base import EULER, PROMPTS, Builders, Case, make, normal, prompted, tiny, vae
from families.stable_diffusion import UNET, scheduler

HIFI = {
    "sampling_rate": 16000,
    "upsample_initial_channel": 16,
    "upsample_rates": [2, 2],
    "upsample_kernel_sizes": [4, 4],
    "resblock_kernel_sizes": [3, 7],
    "resblock_dilation_sizes": [[1, 3, 5], [1, 3, 5]],
    "normalize_before": False,
}


def vocoder():
    return standins.random(tr.SpeechT5HifiGan, tr.SpeechT5HifiGanConfig(model_in_dim=8, **HIFI))


def clap():
    """CLAP, which reads prompts and hears sounds."""
    text = {
        "hidden_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "intermediate_size": 16,
        "projection_dim": 16,
    }
    heard = {
        "window_size": 4,
        "num_mel_bins": 8,
        "spec_size": 8,
        "patch_size": 2,
        "patch_stride": 2,
        "depths": [1, 1],
    }
    heard |= {"num_attention_heads": [1, 1], "num_hidden_layers": 1, "hidden_size": 192, "projection_dim": 16}
    config = tr.ClapConfig(
        text_config=text | standins.TOKENS | {"max_position_embeddings": 514},
        audio_config=heard | {"patch_embeds_hidden_size": 96},
        projection_dim=16,
    )
    return standins.random(tr.ClapModel, config)


def audioldm2() -> Case:
    halves = {"sample_size": 8, "block_out_channels": (8, 16), "norm_num_groups": 4, "layers_per_block": 1}
    halves |= {"down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D")}
    halves |= {"up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"), "cross_attention_dim": (8, 16)}
    language = tr.GPT2Config(n_embd=16, n_head=1, n_layer=1, n_positions=128, **standins.TOKENS)
    pipe = make(
        d.AudioLDM2Pipeline,
        unet=tiny(d.AudioLDM2UNet2DConditionModel, **halves),
        scheduler=scheduler(),
        vae=vae(in_channels=1, out_channels=1),
        text_encoder=clap(),
        text_encoder_2=standins.t5(),
        tokenizer=standins.tokenizer(77),
        tokenizer_2=standins.tokenizer(77),
        feature_extractor=tr.ClapFeatureExtractor(hop_length=7900),
        language_model=standins.random(tr.GPT2LMHeadModel, language),
        projection_model=tiny(
            d.AudioLDM2ProjectionModel, text_encoder_dim=16, text_encoder_1_dim=32, langauge_model_dim=16
        ),
        vocoder=vocoder(),
    )
    # Tokenizers that are not RoBERTa's or T5's own are given the transcription instead of the prompt.
    return Case(pipe, prompted(transcription=list(PROMPTS)), {"max_new_tokens": 4, "audio_length_in_s": 0.02})


def musicldm() -> Case:
    own = {"class_embed_type": "simple_projection", "projection_class_embeddings_input_dim": 16}
    own |= {"class_embeddings_concat": True, "cross_attention_dim": (16, 32)}
    pipe = make(
        d.MusicLDMPipeline,
        unet=tiny(d.UNet2DConditionModel, **UNET | own),
        scheduler=scheduler(),
        vae=vae(in_channels=1, out_channels=1),
        text_encoder=clap(),
        tokenizer=standins.tokenizer(77),
        feature_extractor=tr.ClapFeatureExtractor(hop_length=7900),
        vocoder=vocoder(),
    )
    embedded = {"prompt_embeds": normal(2, 16), "negative_prompt_embeds": normal(2, 16)}  # CLAP's output has changed
    return Case(pipe, embedded, {"audio_length_in_s": 0.02})


def oobleck(channels: int):
    own = {"downsampling_ratios": [1, 2], "channel_multiples": [2, 4], "decoder_channels": 3, "sampling_rate": 4}
    return tiny(d.AutoencoderOobleck, encoder_hidden_size=6, decoder_input_channels=channels, audio_channels=2, **own)


def stable_audio() -> Case:
    """With a sampler that does not want torchsde, as the pipeline's own does."""
    config = {"sample_size": 4, "in_channels": 4, "out_channels": 4, "num_layers": 2, "attention_head_dim": 8}
    config |= {"num_attention_heads": 4, "num_key_value_attention_heads": 2, "cross_attention_dim": 16}
    config |= {"time_proj_dim": 8, "global_states_input_dim": 32, "cross_attention_input_dim": 16}
    pipe = make(
        d.StableAudioPipeline,
        transformer=tiny(d.StableAudioDiTModel, **config),
        scheduler=d.EDMDPMSolverMultistepScheduler(prediction_type="v_prediction", sigma_data=1.0),
        vae=oobleck(4),
        text_encoder=standins.t5(),
        tokenizer=standins.tokenizer(25),
        projection_model=tiny(
            d.StableAudioProjectionModel, text_encoder_dim=32, conditioning_dim=16, min_value=0, max_value=32
        ),
    )
    return Case(pipe)


ACE = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "sliding_window": 16,
}


def ace_step() -> Case:
    more = {"text_hidden_dim": 32, "timbre_hidden_dim": 8}
    more |= {"num_lyric_encoder_hidden_layers": 2, "num_timbre_encoder_hidden_layers": 2}
    heard = ACE | {"audio_acoustic_hidden_dim": 8, "pool_window_size": 2, "num_attention_pooler_hidden_layers": 1}
    pipe = make(
        d.AceStepPipeline,
        transformer=tiny(
            d.AceStepTransformer1DModel, num_hidden_layers=2, in_channels=24, audio_acoustic_hidden_dim=8, **ACE
        ),
        condition_encoder=tiny(d.AceStepConditionEncoder, **ACE | more),
        vae=oobleck(8),
        text_encoder=standins.decoder(tr.Qwen3Model, tr.Qwen3Config, width=32),
        tokenizer=standins.tokenizer(512, ends=False),
        scheduler=EULER(num_train_timesteps=1),
        audio_tokenizer=tiny(d.AceStepAudioTokenizer, fsq_dim=32, fsq_input_levels=[4, 4, 4], **heard),
        audio_token_detokenizer=tiny(d.AceStepAudioTokenDetokenizer, **heard),
    )
    lyrics = ["[verse]\nsoft notes", "[verse]\nloud drums"]
    return Case(pipe, prompted(lyrics=lyrics), {"audio_duration": 0.4, "max_text_length": 32})


def longcat_audio() -> Case:
    config = {"dit_dim": 64, "dit_depth": 2, "dit_heads": 4, "dit_text_dim": 32, "latent_dim": 8, "text_conv": False}
    coder = {"in_channels": 1, "channels": 16, "c_mults": [1, 2], "strides": [2], "latent_dim": 8}
    coder |= {"encoder_latent_dim": 16, "downsampling_ratio": 2, "sample_rate": 24000}
    pipe = make(
        d.LongCatAudioDiTPipeline,
        vae=tiny(d.LongCatAudioDiTVae, **coder),
        text_encoder=standins.umt5(),
        tokenizer=standins.tokenizer(),
        transformer=tiny(d.LongCatAudioDiTTransformer, **config),
    )
    return Case(pipe, prompted(), {"audio_duration_s": 0.01})


PIPELINES: Builders = {
    "AudioLDM2Pipeline": audioldm2,
    "MusicLDMPipeline": musicldm,
    "StableAudioPipeline": stable_audio,
    "AceStepPipeline": ace_step,
    "LongCatAudioDiTPipeline": longcat_audio,
}

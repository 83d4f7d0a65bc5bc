"""Small denoisers of diffusers with random weights, and their calibration. Widths are multiples of 64."""

import copy

import diffusers
import torch

import ptq4dm

CONFIG = ptq4dm.SVDQuantConfig(rank=8, num_tuples=3, unsigned=True)
HEADS = {"num_attention_heads": 2, "attention_head_dim": 32}
TEXT = (8, 64)  # tokens, width


class Doubled(torch.nn.Module):
    """Around a layer, as an adapter is."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return 2 * self.layer(x)


class Steps(diffusers.DiffusionPipeline):
    """A stand-in for a model's own pipeline: calls it as that would, and paints nothing."""

    def __init__(self, transformer, scheduler, shape, arguments):
        super().__init__()
        self.register_modules(transformer=transformer, scheduler=scheduler)
        self.shape, self.arguments = shape, arguments
        self.unit_time = isinstance(transformer, diffusers.FluxTransformer2DModel)
        self.set_progress_bar_config(disable=True)

    def __call__(self, generator=None, num_inference_steps=1, output_type="pt"):
        self.scheduler.set_timesteps(num_inference_steps)
        x = torch.cat([torch.randn(1, *self.shape, generator=one) for one in generator])
        words = torch.stack([torch.randn(*TEXT, generator=one) for one in generator])
        for t in self.scheduler.timesteps:
            time = (t / 1000 if self.unit_time else t).expand(len(x))
            noise = self.transformer(x, timestep=time, return_dict=False, **self.arguments(words))[0]
            x = self.scheduler.step(noise[:, : x.shape[1]], t, x, return_dict=False)[0]
        return diffusers.ImagePipelineOutput(images=torch.zeros(len(x), 3, 2, 2))


def dit():
    model = diffusers.DiTTransformer2DModel(
        **HEADS, in_channels=4, out_channels=8, num_layers=2, sample_size=16, num_embeds_ada_norm=10
    )
    return model, (4, 16, 16), lambda words: {"class_labels": (words[:, 0, 0] > 0).long()}


def pixart():
    model = diffusers.PixArtTransformer2DModel(
        **HEADS, in_channels=4, num_layers=2, sample_size=16, cross_attention_dim=64, caption_channels=64
    )
    sizes = {"resolution": None, "aspect_ratio": None}
    return model, (4, 16, 16), lambda words: {"encoder_hidden_states": words, "added_cond_kwargs": sizes}


def sd3():
    model = diffusers.SD3Transformer2DModel(
        **HEADS, sample_size=16, in_channels=4, out_channels=4, num_layers=2, pos_embed_max_size=8,
        joint_attention_dim=64, caption_projection_dim=64, pooled_projection_dim=64, qk_norm="rms_norm",
    )  # fmt: skip
    return model, (4, 16, 16), lambda words: {"encoder_hidden_states": words, "pooled_projections": words[:, 0]}


def flux():
    model = diffusers.FluxTransformer2DModel(
        **HEADS, in_channels=16, num_layers=1, num_single_layers=1, joint_attention_dim=64, pooled_projection_dim=64,
        guidance_embeds=True, axes_dims_rope=(8, 12, 12),
    )  # fmt: skip
    place = torch.arange(64)
    ids = torch.stack([0 * place, place // 8, place % 8], 1).float()
    return model, (64, 16), lambda words: {
        "encoder_hidden_states": words, "pooled_projections": words[:, 0], "guidance": torch.full((len(words),), 3.5),
        "img_ids": ids, "txt_ids": torch.zeros(8, 3), "joint_attention_kwargs": {},
    }  # fmt: skip


def sana():
    model = diffusers.SanaTransformer2DModel(
        **HEADS, in_channels=4, out_channels=4, num_layers=2, sample_size=8, patch_size=1, mlp_ratio=2.0,
        num_cross_attention_heads=2, cross_attention_head_dim=32, cross_attention_dim=64, caption_channels=64,
    )  # fmt: skip
    return model, (4, 8, 8), lambda words: {
        "encoder_hidden_states": words, "encoder_attention_mask": torch.ones(words.shape[:2]),
    }  # fmt: skip


def sdxl():
    """A UNet laid out like that of SDXL."""
    model = diffusers.UNet2DConditionModel(
        sample_size=8, layers_per_block=1, block_out_channels=(32, 64), norm_num_groups=8, attention_head_dim=(1, 2),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=1, cross_attention_dim=64, use_linear_projection=True,
        addition_embed_type="text_time", addition_time_embed_dim=8, projection_class_embeddings_input_dim=64 + 6 * 8,
    )  # fmt: skip
    return (
        model,
        (4, 8, 8),
        lambda words: {
            "encoder_hidden_states": words,
            "added_cond_kwargs": {"text_embeds": words[:, 0], "time_ids": torch.full((len(words), 6), 16.0)},
        },
    )


def cogvideox():
    model = diffusers.CogVideoXTransformer3DModel(
        **HEADS, in_channels=4, out_channels=4, num_layers=2, time_embed_dim=64, text_embed_dim=64, sample_width=8,
        sample_height=8, sample_frames=5, max_text_seq_length=8, use_rotary_positional_embeddings=True,
    )  # fmt: skip
    angles = torch.outer(torch.arange(32.0), torch.arange(32.0) / 32)
    rotary = (angles.cos(), angles.sin())
    return model, (2, 4, 8, 8), lambda words: {"encoder_hidden_states": words, "image_rotary_emb": rotary}


def wan():
    model = diffusers.WanTransformer3DModel(
        **HEADS, in_channels=4, out_channels=4, num_layers=2, text_dim=64, freq_dim=64, ffn_dim=128,
        rope_max_seq_len=32,
    )  # fmt: skip
    return model, (4, 2, 8, 8), lambda words: {"encoder_hidden_states": words}


def ltx():
    model = diffusers.LTXVideoTransformer3DModel(
        **HEADS, in_channels=8, out_channels=8, num_layers=2, cross_attention_dim=64, caption_channels=64
    )
    return model, (2 * 4 * 4, 8), lambda words: {
        "encoder_hidden_states": words, "encoder_attention_mask": torch.ones(words.shape[:2]),
        "num_frames": 2, "height": 4, "width": 4, "rope_interpolation_scale": (0.04, 32.0, 32.0),
    }  # fmt: skip


KINDS = {build.__name__: build for build in (dit, pixart, sd3, flux, sana, sdxl, cogvideox, wan, ltx)}
_made: dict = {}


def pair(kind):
    """(a fresh copy of the model of a kind, its calibration store of 4 tuples)."""
    if kind not in _made:
        torch.manual_seed(0)
        model, shape, arguments = KINDS[kind]()
        _spread(model.eval())
        config = ptq4dm.CalibrationConfig(num_samples=4, num_inference_steps=2, num_bins=1, batch_size=4)
        pipe = Steps(model, diffusers.DDIMScheduler(clip_sample=False), shape, arguments)
        _made[kind] = model, ptq4dm.collect(pipe, config)
    model, store = _made[kind]
    return copy.deepcopy(model), store


def quantized(kind):
    """(the model of a kind quantized with CONFIG, its store, the report), made once."""
    if ("quantized", kind) not in _made:
        model, store = pair(kind)
        _made["quantized", kind] = model, store, ptq4dm.quantize(model, CONFIG, store)
    return _made["quantized", kind]


@torch.no_grad()
def _spread(model):
    """Weights as trained ones are: no zeros, inputs of unequal weight, so that blocks matter and 4 bits hurt."""
    for parameter in model.parameters():
        if parameter.ndim > 1:
            fan_in = parameter[0].numel()
            parameter.normal_(0, fan_in**-0.5).mul_(torch.empty_like(parameter[:1]).log_normal_(0, 0.5))

"""What fixes the reference models: their networks, optimizers, schedules and losses."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from cifar10 import random_flip, random_shift
from diffusers import DDIMScheduler, DiTTransformer2DModel, FlowMatchEulerDiscreteScheduler, UNet2DModel
from diffusers.models.embeddings import LabelEmbedding
from torch import nn
from torch.nn import functional as F

from ptq4dm.evaluation.features import Features

FEATURES_EPOCHS = 60
FEATURES_PEAK_LR = 0.4
MINUTES = {"unet": 14.0, "dit": 8.6, "flow-dit": 7.0, "flow-dit-large": 8.6}
PEAK_LR = {"unet": 6e-4, "dit": 1e-3, "flow-dit": 2e-3, "flow-dit-large": 1e-3}
SMALL = {"num_layers": 6, "num_attention_heads": 4, "attention_head_dim": 32}  # flow-dit: 2.1 million parameters
# Of log(sigma / (1 - sigma)) while a flow model is trained: a logit-normal law (Esser et al. 2024, arXiv:2403.03206,
# section 3.1), moved from its middle towards little noise, where pixels are decided (Karras et al. 2022, table 1).
LOGIT_MEAN, LOGIT_DEVIATION = -0.5, 1.2
LABELS_DROPPED = 0.1  # the share of images that a flow model sees without their class, for guidance
WARMUP_STEPS = 1000
TRAIN_STEPS = 1000  # of the diffusion, not of the optimizer


def is_flow(kind: str) -> bool:
    return kind.startswith("flow-")


def build_scheduler(kind: str = "dit") -> DDIMScheduler | FlowMatchEulerDiscreteScheduler:
    """The noise schedule: of unet and dit beta linear from 1e-4 to 0.02 in 1000 steps, epsilon prediction; of the
    flow models the straight path x_t = (1 - sigma) x_0 + sigma n, not shifted."""
    if is_flow(kind):
        return FlowMatchEulerDiscreteScheduler(num_train_timesteps=TRAIN_STEPS, shift=1.0)
    return DDIMScheduler(
        num_train_timesteps=TRAIN_STEPS,
        beta_start=1e-4,
        beta_end=0.02,
        beta_schedule="linear",
        prediction_type="epsilon",
        clip_sample=True,
        clip_sample_range=1.0,
        set_alpha_to_one=True,
        steps_offset=0,
        timestep_spacing="trailing",
    )


def build_network(kind: str, tiny: bool = False) -> nn.Module:
    """The network of one kind; `tiny` is a small stand-in to try the script out with."""
    if kind == "features":
        return Features()
    if kind == "unet":
        return UNet2DModel(
            sample_size=32,
            in_channels=3,
            out_channels=3,
            block_out_channels=(32, 32, 32) if tiny else (128, 128, 128),
            layers_per_block=1 if tiny else 2,
            attention_head_dim=16 if tiny else 64,
            down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
            dropout=0.1,
        )
    size = SMALL if kind == "flow-dit" else {"num_layers": 8, "num_attention_heads": 4, "attention_head_dim": 64}
    if tiny:
        size = {"num_layers": 1, "num_attention_heads": 2, "attention_head_dim": 16}
    net = DiTTransformer2DModel(
        in_channels=3, out_channels=3, sample_size=32, patch_size=2, num_embeds_ada_norm=10, dropout=0.0, **size
    )
    if is_flow(kind):  # diffusers drops labels in each block by itself; guidance needs them dropped in all at once
        for part in net.modules():
            if isinstance(part, LabelEmbedding):
                part.dropout_prob = 0.0
    return net


def build_optimizer(kind: str, net: nn.Module) -> torch.optim.Optimizer:
    if kind == "features":
        return torch.optim.SGD(net.parameters(), lr=0.0, momentum=0.9, nesterov=True, weight_decay=5e-4)
    decay = 0.0 if kind == "unet" else 0.01
    return torch.optim.AdamW(net.parameters(), lr=0.0, betas=(0.9, 0.99), weight_decay=decay, fused=True)


def set_schedule(kind: str, optimizer: torch.optim.Optimizer, step: int, done: float) -> None:
    """Set learning rate and momentum for a step; `done` is the share of the run that lies behind, 0 to 1."""
    (group,) = optimizer.param_groups
    if kind == "features":  # one cycle: up over the first fifth, down over the rest, momentum the other way
        turn = 0.2
        rise = 0.5 - 0.5 * math.cos(math.pi * done / turn)
        fall = 0.5 + 0.5 * math.cos(math.pi * (done - turn) / (1 - turn))
        height, floor = (rise, 1 / 25) if done < turn else (fall, 1 / 25e4)
        group["lr"] = FEATURES_PEAK_LR * (floor + (1 - floor) * height)
        group["momentum"] = 0.95 - 0.1 * height
    else:  # linear warm-up, flat for the first 30 % of the time, then a cosine to zero
        warm = min(1.0, (step + 1) / WARMUP_STEPS)
        fall = 0.5 + 0.5 * math.cos(math.pi * min(1.0, max(0.0, done - 0.3) / 0.7))
        group["lr"] = PEAK_LR[kind] * warm * fall


def features_loss(net: Callable, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Cross-entropy with label smoothing on flipped and shifted images [N, 3, 32, 32] in [-1, 1]."""
    images = random_shift(random_flip(images)).contiguous(memory_format=torch.channels_last)
    return F.cross_entropy(net(images), labels, label_smoothing=0.1)


def diffusion_loss(kind: str, device: torch.device) -> Callable:
    """The loss of a diffusion model: a function of (net, images [N, 3, 32, 32] in [-1, 1], labels [N]) -> scalar."""
    return flow_loss if is_flow(kind) else epsilon_loss(kind, build_scheduler(kind), device)


def flow_loss(net: Callable, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """||n - x_0 - v_theta(x_t, 1000 sigma)||^2 at x_t = (1 - sigma) x_0 + sigma n (Lipman et al. 2022,
    arXiv:2210.02747, eq. 23, with noise at sigma = 1); log(sigma / (1 - sigma)) is normal."""
    x0 = random_flip(images)
    noise = torch.randn_like(x0)
    sigma = torch.sigmoid(LOGIT_MEAN + LOGIT_DEVIATION * torch.randn(len(x0), device=x0.device))
    null = int(net.config.num_embeds_ada_norm)
    labels = torch.where(torch.rand(len(x0), device=x0.device) < LABELS_DROPPED, null, labels)
    xt = torch.lerp(x0, noise, sigma[:, None, None, None])
    velocity = net(xt, TRAIN_STEPS * sigma, class_labels=labels, return_dict=False)[0]
    return F.mse_loss(velocity.float(), noise - x0)


def epsilon_loss(kind: str, scheduler: DDIMScheduler, device: torch.device) -> Callable:
    """The loss ||epsilon - epsilon_theta(x_t, t)||^2 of DDPM (Ho et al. 2020, eq. 14), t uniform.

    Returns a function of (net, images [N, 3, 32, 32] in [-1, 1], labels [N]) that gives a scalar, float32.
    """
    alphas_cumprod = scheduler.alphas_cumprod.to(device)

    def loss(net: Callable, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        x0 = random_flip(images)
        t = torch.randint(0, TRAIN_STEPS, (len(x0),), device=device)
        noise = torch.randn_like(x0)
        signal = alphas_cumprod[t][:, None, None, None]
        xt = signal.sqrt() * x0 + (1 - signal).sqrt() * noise
        if kind == "unet":
            predicted = net(xt.contiguous(memory_format=torch.channels_last), t, return_dict=False)[0]
        else:
            predicted = net(xt, t, class_labels=labels, return_dict=False)[0]
        return F.mse_loss(predicted.float(), noise)

    return loss

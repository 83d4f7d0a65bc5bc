"""Small models whose blocks are trained, and how their quantized forms are compared."""

import json
import math

import torch
from torch import nn

import models
import ptq4dm
from helpers import distance, normal, run  # noqa: F401  # for those who take them from here
from ptq4dm.layers.base import is_quantized

FEW = {
    "num_tuples": 4, "steps": 8, "step_tuples": 2, "first_last": "same", "learning_rate": 0.01, "start": "nearest",
}  # fmt: skip
OF_ROUNDING = ("learning_rate", "start")  # of FEW, what is refused where rounding is not trained
UNTRAINED = {name: FEW[name] for name in ("num_tuples", "first_last")}  # of FEW, what is there without training
SD = {
    "block_out_channels": (12,), "down_block_types": ("CrossAttnDownBlock2D",), "mid_block_type": None,
    "up_block_types": ("CrossAttnUpBlock2D",),
}  # fmt: skip
KINDS = {
    "dit": models.dit, "small": lambda: models.dit(num_layers=1), "unet": models.plain_unet,
    "shallow": lambda: models.plain_unet(mid_block_type=None), "sd": lambda: models.conditional_unet(**SD),
}  # fmt: skip


def spread(model):
    """Weights of which none is zero: a fresh DiT answers zero."""
    with torch.no_grad():
        for seed, parameter in enumerate(model.parameters()):
            parameter.add_(normal(*parameter.shape, seed=seed, scale=0.1))
    return model


def model_of(kind="dit", dtype=torch.float32):
    model = spread(KINDS[kind]())
    return model if dtype is torch.float32 else model.to(dtype)


def calls_of(model, count=6):
    """Recorded calls of a denoiser, each a unit."""
    with ptq4dm.record(model) as calls, torch.no_grad():
        for seed in range(count):
            run(model, seed=seed)
    return calls


def trained(model, calls, **options):
    """(report, state of the quantized layers) after GradPTQ with few steps; W4A8, static."""
    left = () if "rounding" in options.get("train", ("rounding",)) else OF_ROUNDING
    few = {name: value for name, value in FEW.items() if name not in left}
    report = ptq4dm.quantize(model, ptq4dm.GradPTQConfig(**few | options), calls)
    return report, codes(model)


def codes(model):
    layers = [(name, module) for name, module in model.named_modules() if is_quantized(module)]
    return {f"{name}.{key}": value for name, layer in layers for key, value in layer.state_dict().items()}


def plan_of(model):
    """The completed plan of a quantized model, as its file holds it."""
    plan = ptq4dm.Plan.from_dict(json.loads(json.dumps(ptq4dm.quantization_config(model).plan.to_dict())))
    plan.check()
    return plan


def blocks(report):
    """(error, error with nearest) of each trained block."""
    return {(row["block_error"], row["block_error_nearest"]) for row in report.layers}


def gain(report):
    """The error of blocks over that of nearest, a geometric mean."""
    logs = [math.log(error / nearest) for error, nearest in blocks(report)]
    return math.exp(sum(logs) / len(logs))


class Experts(nn.Module):
    """Two experts: tokens of large numbers go to the second, which a few calls never reach."""

    config = {}

    def __init__(self):
        super().__init__()
        self.before = nn.Linear(8, 8)
        self.experts = nn.ModuleList([nn.Sequential(nn.Linear(8, 16), nn.SiLU(), nn.Linear(16, 8)) for _ in range(2)])

    def forward(self, x, timestep=None):
        x, large = self.before(x), x[:, 0] > 50
        found = torch.zeros_like(x)
        for place, expert in zip((~large, large), self.experts, strict=True):
            if place.any():
                found[place] = expert(x[place])
        return found

"""How an embedding is moved: by ZOODiP's two ideas or without them, by controls, by gradients; and from where."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial

import torch

import ptq4dm
from ptq4dm.progress import progress_bar
from ptq4dm.training.personalization.problem import Problem
from ptq4dm.training.personalization.run import chosen
from ptq4dm.training.personalization.zeroth_order import Tuned, change, gradient, take

MODELS = {
    "float32": None,
    "W8A8": partial(ptq4dm.RTNConfig, activations="dynamic"),
    "W4A8": partial(ptq4dm.RTNConfig, weight_bits=4, group_size=64, activations="dynamic"),
}
WHOLE = {"first_time": 0.0, "last_time": 1.0}
PAPER = {"first_time": 0.5, "last_time": 0.9}
BACK, OWN, START, MEMORY = "back-propagation", "own row", "start", "memory"


@dataclass(frozen=True)
class Arm:
    """settings: of PersonalizeConfig; weights are "size", as in the paper, unless given. once: of one seed.
    by: what decides a step: "losses", "shuffled" losses, a "walk", gradients."""

    settings: dict = field(default_factory=dict)
    by: str = "losses"
    once: bool = False


IDEAS = {
    "both": Arm(),
    "subspace": Arm(WHOLE),
    "partial": Arm({"subspace": "none"}),
    "neither": Arm(WHOLE | {"subspace": "none"}),
    "paper's times": Arm(PAPER, once=True),
    "released": Arm({"subspace": "released"}, once=True),
    "equal": Arm({"weights": "equal"}),
    "walk": Arm(by="walk"),
    "shuffled": Arm(by="shuffled"),
    "equal, shuffled": Arm({"weights": "equal"}, by="shuffled"),
}
BACKS = {BACK: Arm(WHOLE, BACK)}
INITS = ("", ", near", ", null")  # ends of names: where an arm starts
KNOWN = {name + init: arm for init in INITS for name, arm in (IDEAS | BACKS).items()}
STARTS = tuple(START + init for init in INITS)
ONCE = (*STARTS, OWN, MEMORY)  # no seed decides anything in them


def init_of(arm: str) -> str:
    """The end of an arm's name."""
    return next(init for init in reversed(INITS) if arm.endswith(init))


def rows_of(first: int, seeds: int) -> Iterator[tuple[str, str, int]]:
    """(model, arm, seed) of every row, the long ones first."""
    numbers = range(first, first + seeds)
    for name, arm in KNOWN.items():
        everywhere = arm in (Arm(), IDEAS["equal"])
        of = ["float32"] if arm.by == BACK else [*MODELS] if everywhere else [m for m in MODELS if MODELS[m]]
        yield from ((model, name, seed) for model in of for seed in (numbers[:1] if arm.once else numbers))
    yield from ((model, name, first) for model in MODELS for name in ONCE)


def name_of(model: str, arm: str, seed: int) -> str:
    return f"{model} {arm}" if arm in ONCE else f"{model} {arm} {seed}"


def tuned(problem: Problem, by: str) -> torch.Tensor:
    """The embedding [d] that losses, or a control, come to."""
    config, state = problem.config, Tuned.start(problem.target.start)
    control = torch.Generator().manual_seed(config.seed + 2**34)
    for _ in progress_bar(range(config.steps), desc=by):
        losses, directions = problem.pairs(state.u, problem.draw("step", state.step))
        if by == "shuffled":
            rises = (losses[:, 1:] - losses[:, :1]).flatten()
            dealt = rises[torch.randperm(len(rises), generator=control).to(rises.device)]
            losses = torch.cat([torch.zeros_like(losses[:, :1]), dealt.view_as(losses[:, 1:])], 1)
        step = change(state, gradient(losses, directions, config), config)
        if by == "walk":
            other = torch.randn(len(step), generator=control).to(step)
            step = other * (step.norm() / other.norm())
        take(state, step, config)
    return chosen(state, config)


def back_propagated(problem: Problem, steps: int, learning_rate: float) -> torch.Tensor:
    """The same by gradients: Adam on the loss of batches as large, on all timesteps."""
    u = problem.target.start.clone().requires_grad_()
    optimizer = torch.optim.Adam([u], learning_rate)
    problem.target.tables.tables[0].network.requires_grad_(False)
    for step in progress_bar(range(steps), desc=BACK):
        draw = problem.draw("step", step)
        with torch.enable_grad():
            loss = problem.errors(u.expand(len(draw.t), -1), draw.images, draw.t, draw.noise).mean()
            optimizer.zero_grad()
            loss.backward()
        optimizer.step()
    return u.detach()

"""Settings of training on integers."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from ..checks import check_fields, named_options
from ..errors import UserError
from ..layers.shift.widths import Widths
from ..options import option
from .precision import precision_of

# These may change when a run is resumed, and nothing else.
FREE = ("images", "minutes", "learning_rate", "graph")
DROPPED = 0.1  # share of captions that are left empty where nothing is said
LATER = {
    "drop_captions": DROPPED,
    "norm": "same",
    "wide": False,
}  # options that runs of earlier versions lack, and what they did
MOST = 10**12  # images or steps


@named_options
@dataclass(frozen=True)
class ShiftQuantConfig:
    """Training whose products are of integers, forward and backward.

    bits: of weights, inputs and gradients, 2 to 8; 16 trains in floats. The layers at the model's ends have 8.
    weight_bits, activation_bits, gradient_bits: of one of the three; None: `bits`.
    groups: how many steps, powers of two apart, a tensor's rows and columns each may have; 1 is one for the tensor.
        Where bits and groups are more than 9 together, as many as go with the bits.
    served: weights and inputs have the grids that `RTNConfig(activations="dynamic")` of these widths serves:
        quantization-aware training.
    norm: "l1" puts L1 normalization on 8-bit codes in the place of GroupNorm and LayerNorm, with ratios measured on
        the first batch. The model is saved with it, and is another function under the same parameters; "same": not.
    wide: whether the layers that lose most by so few bits have 8 for weights and inputs: measured on the first batch,
        at most a tenth of them, until they have two thirds of the error. None: where `bits` are below 16 and the
        grids not as served; True is refused elsewhere.
    images: that the model learns from, in all, pictures counted as often as they are shown.
    minutes: of learning, by the clock on the wall, after which this call stops, wherever it is; opening the model,
        held-out losses, sample grids and saving come on top. None: no limit.
    batch_size: images of a step, over all processes.
    learning_rate, betas, weight_decay, warmup_steps, gradient_clip: AdamW on float32 weights, constant after a
        warm-up.
    ema_decay: moving average of the weights, which is the result; reached slowly, (1 + step) / (10 + step) at first.
    flip: whether pictures are mirrored half of the time.
    drop_captions: share of captions that are left empty, for models of text: what guidance needs. None: a tenth;
        a number is refused for a model that has no captions.
    held_out: pictures that are not trained on, evenly from the folder, at most a tenth of them: their loss is logged.
    precision: "bf16" (autocast of what is not on integers) or "no"; torch.bfloat16, torch.float32 and their names
        mean the same.
    compile: torch.compile the network; it then takes minutes to start and less time for each step.
    graph: whether a step is one CUDA graph, which takes the host's part out of it: on one GPU, for models that are
        not compiled and not of text.
    log_every: steps between two lines of the log, at which the loss is looked at.
    evaluate_every: images between two checkpoints, sample grids and held-out losses.
    sample_steps: of the model's own sampler for the grids; 0: no grids.
    seed: decides all noise, and which pictures are seen when.
    """

    bits: int = option(6, "of weights, inputs and gradients: 2 to 8; 16 trains in floats", low=2, high=16)
    weight_bits: int | None = option(None, "of weights alone", low=2, high=8)
    activation_bits: int | None = option(None, "of inputs alone", low=2, high=8)
    gradient_bits: int | None = option(None, "of gradients alone", low=2, high=8)
    groups: int = option(
        4,
        "steps a power of two apart, along rows and columns, at most 9 less the bits; 1: one a tensor",
        low=1,
        high=7,
    )
    served: bool = option(False, "on the grids of weights and inputs that quantize makes: quantization-aware")
    wide: bool | None = option(
        None, "8 bits in the layers that lose most by fewer, at most a tenth (yes below 16 bits)"
    )
    norm: str = option("same", "l1: norms by the mean magnitude, on codes", choices=("same", "l1"))
    images: int = option(500_000, "that the model learns from, in all", low=1, high=MOST)
    minutes: float | None = option(None, "of learning, opening and saving apart; goes on with --resume", finite=False)
    batch_size: int = option(128, "over all processes", low=1, high=MOST)
    learning_rate: float = option(1e-4, "of AdamW; --resume may change it", finite=False)
    betas: tuple[float, float] = option((0.9, 0.99), low=0)
    weight_decay: float = option(0.0, "of AdamW", low=0)
    warmup_steps: int = option(100, low=1, high=MOST)
    gradient_clip: float = option(1.0, finite=False)
    ema_decay: float = option(0.999, "moving average of the weights")
    flip: bool = option(True, "mirror pictures half of the time")
    drop_captions: float | None = option(None, "share of captions left empty, for guidance (0.1)", low=0, high=1)
    held_out: int = option(256, "pictures that are not trained on", low=0, high=MOST)
    precision: str = "no"
    compile: bool = option(False, "torch.compile: pays in runs of many minutes")
    graph: bool = option(False, "each step as one CUDA graph, on one GPU; not for models of text")
    log_every: int = option(50, low=1, high=MOST)
    evaluate_every: int = option(50_000, "images between checkpoints and grids", low=1, high=MOST)
    sample_steps: int = option(20, "of the sampler for grids; 0: no grids", low=0, high=1000)
    seed: int = option(0, "of all noise", low=0)

    def __post_init__(self) -> None:
        object.__setattr__(self, "precision", precision_of(self.precision))
        check_fields(self, "ShiftQuantConfig")
        if self.precision not in ("no", "bf16"):
            raise UserError(f"precision must be 'no' or 'bf16', not '{self.precision}': fp16 overflows.")
        if 8 < self.bits < 16:
            raise UserError(f"bits must be from 2 to 8, or 16 for floats; got {self.bits}.")
        for name in ("weight_bits", "activation_bits", "gradient_bits", "served", "wide"):
            if self.bits == 16 and getattr(self, name):
                raise UserError(f"bits=16 trains in floats and leaves no place for {name}={getattr(self, name)}.")
        if self.served and self.wide:
            raise UserError("served=True trains on the grids that quantize makes and leaves no place for wide=True.")
        for name in ("learning_rate", "gradient_clip"):
            if not 0 < getattr(self, name) < float("inf"):
                raise UserError(f"{name} must be positive; got {getattr(self, name)}.")
        if self.graph and self.compile:
            raise UserError("graph=True and compile=True do not go together; choose one of them.")
        if self.minutes is not None and not self.minutes > 0:
            raise UserError(f"minutes must be positive; got {self.minutes:g}.")
        if not 0 <= self.ema_decay < 1:
            raise UserError(f"ema_decay is at least 0 and below 1; got {self.ema_decay:g}.")
        if max(self.betas) >= 1:
            raise UserError(f"betas lie in [0, 1); got {self.betas[0]:g} and {self.betas[1]:g}.")

    @property
    def widths(self) -> Widths | None:
        """Of the layers; None for floats."""
        if self.bits == 16:
            return None
        one, two, three = (
            self.bits if bits is None else bits
            for bits in (self.weight_bits, self.activation_bits, self.gradient_bits)
        )
        return Widths(one, two, three, self.groups, served=self.served)

    @property
    def widens(self) -> bool:
        """Whether layers that lose most are looked for, where layers have few bits."""
        return not self.served and self.wide is not False

    @property
    def dropped(self) -> float:
        """The share of captions that are left empty."""
        return DROPPED if self.drop_captions is None else self.drop_captions

    def identity(self) -> dict:
        """Settings that have to be the same for a run to go on, as plain JSON values."""
        values = {**asdict(self), "wide": self.wide is not False, "drop_captions": self.dropped}
        values = {name: value for name, value in values.items() if name not in FREE}
        values = {name: value for name, value in values.items() if name not in LATER or value != LATER[name]}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}

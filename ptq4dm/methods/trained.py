"""What GradPTQ and PD-Quant share: blocks that are trained where rounding is "learned"."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

from ..errors import UserError
from ..options import is_given
from ..rounding.learned import Learning
from .eight_bit import IntegerConfig

FEW_BITS = 4  # of inputs: Hessian rounding fits exact ones, which these are far from
OF_ROUNDING = ("variable", "moves", "optimizer", "learning_rate", "start")


@dataclass(repr=False)
class TrainedConfig(IntegerConfig, Learning):
    """Options of IntegerConfig and, with rounding="learned", of Learning.

    Raises UserError for options of training that change nothing: any where no block is trained; those of rounding
    where it is not trained; ranges alone where inputs have none.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        Learning.check(self)
        if self.plan is None:  # a plan has settled all of it, and options tell how it was made
            self._check_used()

    def _check_used(self) -> None:
        learned = self.rounding == "learned"
        unused = () if learned and "rounding" in self.train else OF_ROUNDING
        names = unused if learned else [item.name for item in fields(Learning)]
        if idle := [name for name in names if is_given(self, name)]:
            why = "train has no 'rounding'" if learned else f"rounding='{self.rounding}' trains no block"
            other = "train rounding too" if learned else "take rounding='learned'"
            them = "them" if idle[1:] else "it"
            raise UserError(f"{why}, so that {', '.join(idle)} would change nothing; leave {them} out, or {other}.")
        if learned and set(self.train) == {"ranges"} and self.activations == "dynamic":
            raise UserError(
                "'ranges' alone trains the ranges of static inputs, and activations='dynamic' has none; train "
                "rounding, scales or biases too, or take activations='static'."
            )

    @property
    def origin(self) -> str:
        """The rounding that trained codes begin at: by our tables nearest where inputs have few bits, else gptq."""
        return "nearest" if self.start is None and self.activation_bits <= FEW_BITS else super().origin

    def learning(self) -> Learning | None:
        return replace(Learning.of(self), start=self.origin) if self.rounding == "learned" else None

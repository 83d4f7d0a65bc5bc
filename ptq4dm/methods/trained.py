"""What GradPTQ and PD-Quant share: blocks that are trained where rounding is "learned"."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

from ..errors import UserError
from ..rounding.learned import Learning
from .eight_bit import IntegerConfig

FEW_BITS = 4  # of inputs: Hessian rounding fits exact ones, which these are far from


@dataclass(repr=False)
class TrainedConfig(IntegerConfig, Learning):
    """Options of IntegerConfig and, with rounding="learned", of Learning.

    Raises UserError for options of training that change nothing: any where no block is trained; ranges alone where
    inputs have none.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        Learning.check(self)
        if self.plan is None:  # a plan has settled all of it, and options tell how it was made
            self._check_used()

    def _check_used(self) -> None:
        if self.rounding != "learned":
            own = {item.name: item.default for item in fields(self)}
            idle = [item.name for item in fields(Learning) if getattr(self, item.name) != own[item.name]]
            if idle:
                raise UserError(
                    f"rounding='{self.rounding}' trains no block, so that {', '.join(idle)} would change nothing; "
                    f"leave {'them' if idle[1:] else 'it'} out, or take rounding='learned'."
                )
        elif set(self.train) == {"ranges"} and self.activations == "dynamic":
            raise UserError(
                "train=('ranges',) trains the ranges of static inputs, and activations='dynamic' has none; train "
                "rounding, scales or biases too, or take activations='static'."
            )

    @property
    def origin(self) -> str:
        """The rounding that trained codes begin at: by our tables nearest where inputs have few bits, else gptq."""
        return "nearest" if self.start is None and self.activation_bits <= FEW_BITS else super().origin

    def learning(self) -> Learning | None:
        return replace(Learning.of(self), start=self.origin) if self.rounding == "learned" else None

"""How wide the codes of a layer are that trains on integers."""

from __future__ import annotations

from dataclasses import dataclass, replace

from ...errors import UserError
from ...kernels.formats.shift import groups_of

EDGES = 8  # bits at the model's ends: the layers that read its input channels and write its output channels


@dataclass(frozen=True)
class Widths:
    """Bits of weights, inputs and gradients, 2 to 8, and groups: how many steps, powers of two apart, each may have.

    Where b + groups > 9, as many groups are taken as go with b bits: one with 8.
    tokens: a row of a Linear layer's input is a token, which may have other steps than the next; False: a sample.
    served: weights and inputs have the grids that a quantized model will have, one scale an output and one a token
        (of a Conv2d a sample), as RTNConfig(activations="dynamic") makes them; groups are of gradients alone.
    fine: on served grids, what rounding an input leaves is rounded once more: two codes of so many bits each.
    """

    weight: int = 6
    input: int = 6
    gradient: int = 6
    groups: int = 4
    tokens: bool = True
    served: bool = False
    fine: bool = False

    def __post_init__(self) -> None:
        for name in ("weight", "input", "gradient"):
            bits = getattr(self, name)
            if not 2 <= bits <= 8:
                raise UserError(f"{name} bits must be between 2 and 8, not {bits}.")
        if not 1 <= self.groups <= 7:
            raise UserError(f"groups must be between 1 and 7, not {self.groups}.")

    def at_the_ends(self, first: bool) -> Widths:
        """Those of the layers at the model's ends: at least 8 bits, and a scale of its own for each sample.

        8 bits leave no place for groups, and an image without noise, whose range is a fifth of pure noise's, would
        have steps as wide as the noise that is to be found in it. Even so 8 bits of the model's input are too few:
        at the first times noise is 0.01 to 0.1, and half a step 0.004. So what the `first` layer reads has two codes,
        unless the model will be served with one.
        """
        wider = {name: max(EDGES, getattr(self, name)) for name in ("weight", "input", "gradient")}
        return replace(self, served=True, fine=first and not self.served, **wider)

    def beside_the_ends(self) -> Widths:
        """Those of the layers that read what the first layers wrote: at least 8 bits of weights and inputs. Unless
        grids are as served."""
        wider = {name: max(EDGES, getattr(self, name)) for name in ("weight", "input")}
        return self if self.served else replace(self, **wider)

    def groups_of(self, bits: int) -> int:
        return groups_of(bits, self.groups)

    def __str__(self) -> str:
        more = (", grids as served" if self.served else "") + (", fine inputs" if self.fine else "")
        more += "" if self.tokens else ", samples"
        return f"{self.weight}/{self.input}/{self.gradient}, {self.groups} groups{more}"

"""A model's attention in 8 bits where that was measured to be faster: what `optimize(attention="auto")` does."""

from __future__ import annotations

from torch import nn

from ..kernels.attention.layer8 import REFERENCE, kernel_name
from ..layers.attention.faster import lines_of
from ..layers.attention.planned import attention_modules, attention_of
from ..layers.attention.processors import in_8_bits, plain_processor
from ..layers.attention.state import Attention8
from .eight_bits import why_left

WIDTH = 128  # of heads, to ask whether a kernel serves at all


class FasterAttention:
    """Processors of a model that race both ways for each size of operands; `undo` puts back what they were."""

    def __init__(self, model: nn.Module, kind: str = "int8") -> None:
        """Raises ValueError, with the reason, where there is nothing to choose from."""
        self.device = next(model.parameters()).device
        if attention_of(model) is not None:
            raise ValueError("its plan, or a block around this, says which attention is in 8 bits")
        if kernel_name(self.device, WIDTH) == REFERENCE:
            raise ValueError(f"no kernel of 8-bit attention serves {self.device}")
        self.state = Attention8(kind)
        self.state.faster = True
        self.found = {name: one for name, one in attention_modules(model).items() if not why_left(one, False)}
        if not self.found:
            raise ValueError("the model has no self-attention that could be in 8 bits")
        self.state.layers = list(self.found)
        for name, attn in self.found.items():
            attn.processor = in_8_bits(attn.processor, self.state, name)

    def undo(self) -> None:
        """Attention as it was."""
        for attn in self.found.values():
            attn.processor = plain_processor(attn.processor)

    def lines(self) -> list[str]:
        """What is said of it."""
        first = f"attention of {len(self.found)} layers in 8 bits where that is faster"
        measured = lines_of(self.device, self.state.kind)
        return [first + (":" if measured else "; nothing was measured yet"), *(f"  {line}" for line in measured)]

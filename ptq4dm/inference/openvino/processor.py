"""Whether OpenVINO's products of bytes hold on this processor what a model's layers add.

x86 without VNNI and AMX multiplies bytes in pairs: two products of an unsigned and a signed byte are added in 16 bits
(vpmaddubsw), and a sum that does not fit is cut off. With codes of up to 64 all sums fit, for 2 * 255 * 64 < 2^15:
those of weights of 7 bits or fewer. OpenVINO's documentation calls it the saturation issue, and says the same of
7 bits. One call cannot show it: what is cut off depends on the inputs, and the first may have few such sums.

Of other processors, as ARM, nothing is known here: for them the comparison at the first call is all there is.
"""

from __future__ import annotations

import platform

import torch

from ...errors import UserError
from .tracing import Layers

X86 = ("x86_64", "amd64", "i386", "i686")
WHOLE_SUMS = ("avx512_vnni", "avx_vnni", "amx_int8")  # names of torch.cpu.get_capabilities
LARGEST = (2**15 - 1) // (2 * 255)


def sums_fit() -> bool:
    """Whether this processor adds products of bytes in 32 bits; True where it is no x86."""
    if platform.machine().lower() not in X86 or torch.cpu._is_vnni_supported():
        return True
    has: dict = getattr(torch.cpu, "get_capabilities", dict)()  # where torch has it
    return any(has.get(name, False) for name in WHOLE_SUMS)


def check_sums(layers: Layers) -> None:
    """Raises UserError, naming the first layer, where sums of products of 8-bit integers can overflow here."""
    if sums_fit():
        return
    wide = [name for name, (_, form) in layers.items() if form.integer and form.weight.largest() > LARGEST]
    if wide:
        more = f", and {len(wide) - 1} more" if len(wide) > 1 else ""
        raise UserError(
            "OpenVINO cannot serve this model on this processor, which has none of AVX512-VNNI, AVX-VNNI and AMX: "
            f"without them products with weights in 8 bits overflow (those of '{wide[0]}'{more}); leave the engine "
            "out, or give it the model in full precision."
        )

"""A model of accelerators for few bits (MixPE): modelled cycles and energy of layers, nothing measured."""

from typing import TYPE_CHECKING

from ..lazy import lazy_names

if TYPE_CHECKING:  # for editors; at run time, each when it is first used
    from .comparison import compare
    from .costs import AUTHORS_28NM, HOROWITZ_45NM
    from .designs import DESIGNS, Design
    from .element import group_product, shift_add, shift_add_float
    from .known import works_of_known
    from .nets import works_of_net
    from .simulator import simulate
    from .switches import CORRECTED, PUBLISHED, Switches
    from .traced import works_of_call, works_of_pipeline
    from .work import Work

__all__ = [
    "AUTHORS_28NM",
    "CORRECTED",
    "DESIGNS",
    "Design",
    "HOROWITZ_45NM",
    "PUBLISHED",
    "Switches",
    "Work",
    "compare",
    "group_product",
    "shift_add",
    "shift_add_float",
    "simulate",
    "works_of_call",
    "works_of_known",
    "works_of_net",
    "works_of_pipeline",
]

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "AUTHORS_28NM": "costs",
        "CORRECTED": "switches",
        "DESIGNS": "designs",
        "Design": "designs",
        "HOROWITZ_45NM": "costs",
        "PUBLISHED": "switches",
        "Switches": "switches",
        "Work": "work",
        "compare": "comparison",
        "group_product": "element",
        "shift_add": "element",
        "shift_add_float": "element",
        "simulate": "simulator",
        "works_of_call": "traced",
        "works_of_known": "known",
        "works_of_net": "nets",
        "works_of_pipeline": "traced",
    },
)

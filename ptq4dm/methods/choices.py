"""Which options of IntegerConfig go together; `config` is one."""

from __future__ import annotations

from typing import Any

from ..allocation.importance import IMPORTANCE
from ..errors import UserError
from ..layers.registry import FORMATS
from ..quantization.packing import PackingOptions
from ..ranges.registry import OBJECTIVES
from ..rounding.registry import ROUNDERS

NUMBER_FORMATS = ("int8", "fp8")
FIRST_LAST = ("int8", "same", "keep")
ACTIVATIONS = ("static", "dynamic")
GROUP_SIZES = (None, 32, 64, 128)
GRIDS = ("uniform", "power", "progressive")


def check_options(config: Any) -> None:
    """Raises UserError where options of a recipe do not go together, or change nothing."""
    if config.format not in NUMBER_FORMATS:
        raise UserError(f"format must be 'int8' or 'fp8'; got '{config.format}'.")
    _check_rounding(config)
    if config.format == "fp8" and (config.weight_bits, config.activation_bits) != (8, 8):
        raise UserError(
            "format='fp8' has 8 bits: give weight_bits=8 and activation_bits=8 with it, or take format='int8'; "
            f"got {config.weight_bits} and {config.activation_bits}."
        )
    if config.group_size not in GROUP_SIZES:
        raise UserError(f"group_size must be None, 32, 64 or 128; got {config.group_size!r}.")
    if config.weight_bits > 4 and (config.group_size is not None or config.affine):
        raise UserError(
            "group_size and affine are choices of weights in 4 bits; give weight_bits=4 (or 2, 3) with them."
        )
    _check_grid(config)
    _check_average_bits(config)
    if config.activations not in ACTIVATIONS:
        raise UserError(f"activations must be 'static' or 'dynamic'; got '{config.activations}'.")
    if config.first_last not in FIRST_LAST:
        raise UserError(f"first_last must be one of {', '.join(FIRST_LAST)}; got '{config.first_last}'.")
    PackingOptions(config.num_tuples, config.seed, config.prefix)  # refuses what is none


def _check_rounding(config: Any) -> None:
    grid = FORMATS.find(config.format).grid
    if grid in ROUNDERS.find(config.rounding).grids:
        return
    serve = ", ".join(name for name, one in sorted(ROUNDERS.items()) if grid in one.grids)
    raise UserError(
        f"rounding '{config.rounding}' does not serve format '{config.format}'; take format='int8', or, with "
        f"weight_bits=8 and activation_bits=8, one of the roundings {serve}."
    )


def _check_grid(config: Any) -> None:
    if config.rotate_inputs and (config.weight_grid, config.activations) != ("progressive", "dynamic"):
        raise UserError("rotate_inputs goes with weight_grid='progressive' and activations='dynamic'.")
    if config.weight_grid not in GRIDS:
        raise UserError(f"weight_grid must be one of {', '.join(GRIDS)}; got '{config.weight_grid}'.")
    if config.weight_grid == "uniform":
        return
    if config.weight_grid == "progressive":
        _check_progressive(config)
        return
    if config.format != "int8" or config.group_size is not None or config.affine:
        raise UserError("weight_grid='power' goes with format='int8', without group_size and affine.")
    objective = config.ranges()[0]
    if OBJECTIVES.find(objective).needs:
        raise UserError(
            f"weight_grid='power' has scales of transformed weights, of which the objective '{objective}' knows "
            "nothing; choose another objective."
        )


def _check_progressive(config: Any) -> None:
    if (config.format, config.weight_bits, config.affine) != ("int8", 4, False):
        raise UserError(
            "weight_grid='progressive' goes with format='int8' and weight_bits=4; it has zero points, without affine."
        )
    learning = config.learning()
    if learning is not None and "scales" in learning.train:
        raise UserError(
            "weight_grid='progressive' has scales that are whole steps, which training cannot change; leave "
            "'scales' out of train."
        )
    if learning is not None and config.rotate_inputs:
        raise UserError("blocks whose inputs are turned in every call cannot be trained; leave rotate_inputs out.")


def _check_average_bits(config: Any) -> None:
    IMPORTANCE.find(config.importance)
    if config.average_bits is None:
        # Of a plan that is there, options tell how it was made.
        if config.plan is None and not config.ranks_rows and config.importance != type(config).importance:
            raise UserError(
                f"importance='{config.importance}' ranks rows that get 8 bits, and no row is to get them by rank; "
                f"give {'rows between 0 and 1' if hasattr(config, 'rows') else 'average_bits'} too, or leave it out."
            )
        return
    if config.weight_bits > 4 or config.group_size is not None or config.affine or config.weight_grid != "uniform":
        raise UserError(
            "average_bits is a choice of weights in 4 bits with one scale an output; give weight_bits=4 (2, 3), "
            "and no group_size, affine or other grid, with it."
        )
    if not config.weight_bits < config.average_bits < 8:
        raise UserError(
            f"average_bits lies between weight_bits ({config.weight_bits}) and 8; got {config.average_bits:g}."
        )

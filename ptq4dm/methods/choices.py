"""Which options of IntegerConfig go together; `config` is one."""

from __future__ import annotations

from typing import Any

from ..allocation.importance import IMPORTANCE
from ..errors import UserError
from ..layers.plan import BITS, FLOAT_INPUTS
from ..layers.registry import FORMATS
from ..options import has_option, is_given
from ..quantization.packing import PackingOptions
from ..ranges.registry import OBJECTIVES
from ..rounding.registry import ROUNDERS

NUMBER_FORMATS = ("int8", "fp8")
FIRST_LAST = ("int8", "same", "keep")
ACTIVATIONS = ("static", "dynamic")
GROUP_SIZES = (None, 32, 64, 128)
GRIDS = ("uniform", "power", "progressive", "codebook")
OF_FLOAT_INPUTS = ("uniform", "codebook")  # grids of weights whose inputs may stay floats
INPUT_WIDTHS = (*BITS, FLOAT_INPUTS)


def check_options(config: Any) -> None:
    """Raises UserError where options of a recipe do not go together, or change nothing.

    What it advises is an option of the recipe: those that a method has fixed (`option(fixed=True)`) do not get here.
    """
    _check_rounding(config)
    if config.format == "fp8" and (wanted := _other(config, weight_bits=8, activation_bits=8)):
        raise UserError(f"format='fp8' has 8 bits; give {wanted} with it, or take format='int8'.")
    if config.weight_bits > 4 and (config.group_size is not None or config.affine):
        raise UserError(
            "group_size and affine are choices of weights in 4 bits; give weight_bits=4 (or 2, 3) with them."
        )
    _check_float_inputs(config)
    _check_grid(config)
    _check_average_bits(config)
    _check_split(config)
    _check_rotated(config)
    PackingOptions(config.num_tuples, config.seed, config.prefix)  # refuses what is none
    if config.plan is None:  # of a plan that is there, options tell how it was made
        _check_idle(config)


def _check_rotated(config: Any) -> None:
    """Raises UserError where inputs are rotated in every call, and another option knows nothing of it."""
    if not config.rotates or config.plan is not None:  # of a plan that is there, options tell how it was made
        return
    objective = config.ranges()[0]
    if config.activations == "static" and config.format == "int8" and OBJECTIVES.find(objective).needs:
        raise UserError(
            f"transforms rotate inputs, and the objective '{objective}' chooses static grids by inputs that are not; "
            "take activations='dynamic', or an objective that looks at ranges alone."
        )
    other = {
        "blocks that are trained": config.learning() is not None,
        "split_inputs=True": config.split_inputs,
        "rotate_inputs=True, which rotates too": config.rotate_inputs,
        "rows of two widths": config.ranks_rows or bool(getattr(config, "rows", 0)),
        "weight_grid='power'": config.weight_grid == "power",
    }
    if found := next((what for what, there in other.items() if there), None):
        raise UserError(f"transforms that rotate inputs do not go with {found}; leave one of them out.")


def _check_idle(config: Any) -> None:
    """Raises UserError where grids of inputs, or what blocks are fed, are given and not used."""
    bits = 8 if config.activation_bits == FLOAT_INPUTS else config.activation_bits
    if config.symmetric and (wanted := _other(config, activations="static", format="int8", activation_bits=bits)):
        raise UserError(
            "symmetric is of static grids of integers, which inputs do not have here, and would change nothing; "
            f"leave it out, or give {wanted} with it."
        )
    if is_given(config, "prefix") and not config.looks:
        raise UserError(
            f"nothing looks at what blocks are fed where rounding='{config.rounding}', so that prefix would change "
            "nothing; leave it out, or take rounding='gptq'."
        )


def _check_float_inputs(config: Any) -> None:
    """Raises UserError where inputs stay floats and an option says something else of them, or of their weights."""
    if config.activation_bits != FLOAT_INPUTS:
        return
    grid = config.weight_grid if config.weight_grid in OF_FLOAT_INPUTS else "uniform"
    plain = {"weight_grid": grid, "rotate_inputs": False, "average_bits": None, "activations": "dynamic"}
    if wanted := _other(config, format="int8", weight_bits=min(config.weight_bits, 4), **plain):
        raise UserError(
            "inputs of 16 bits stay floats and have no grid; weights under them have at most 4 bits, of a uniform "
            f"grid or of a codebook: give {wanted} with activation_bits=16."
        )


def _check_rounding(config: Any) -> None:
    grid = FORMATS.find(config.format).grid
    if grid in ROUNDERS.find(config.rounding).grids:
        return
    serve = ", ".join(name for name, one in sorted(ROUNDERS.items()) if grid in one.grids)
    raise UserError(
        f"rounding '{config.rounding}' does not serve format '{config.format}'; take format='int8', or, with "
        f"weight_bits=8 and activation_bits=8, one of the roundings {serve}."
    )


def _other(config: Any, **wanted: Any) -> str:
    """What a user would have to write for a recipe to be as wanted: "weight_bits=4 and affine=False", "" for nothing.

    An option that the method has fixed as it is wanted is never named.
    """
    return " and ".join(f"{name}={value!r}" for name, value in wanted.items() if getattr(config, name) != value)


def _check_grid(config: Any) -> None:
    if config.rotate_inputs and config.learning() is not None:
        raise UserError("blocks whose inputs are turned in every call cannot be trained; leave rotate_inputs out.")
    turned = {"format": "int8", "weight_bits": 4, "affine": False, "weight_grid": "progressive"}
    if config.rotate_inputs and (wanted := _other(config, activations="dynamic", **turned)):
        raise UserError(f"rotate_inputs goes with other options; give {wanted} with it, or leave it out.")
    if is_given(config, "codebook_of") and config.weight_grid != "codebook":
        wanted = _other(config, **_codebook(config), weight_grid="codebook")
        raise UserError(f"codebook_of says whose levels a codebook has; give {wanted} with it, or leave it out.")
    if config.weight_grid == "uniform":
        return
    if config.weight_grid == "codebook":
        if wanted := _other(config, **_codebook(config)):
            raise UserError(f"weight_grid='codebook' goes with other options; give {wanted} with it.")
        return
    if config.weight_grid == "progressive":
        _check_progressive(config)
        return
    if wanted := _other(config, format="int8", group_size=None, affine=False):
        raise UserError(f"weight_grid='power' goes with other options; give {wanted} with it.")
    objective = config.ranges()[0]
    if OBJECTIVES.find(objective).needs:
        known = ", ".join(name for name, one in sorted(OBJECTIVES.items()) if not one.needs)
        other = f"one of the objectives {known}" if has_option(type(config), "objective") else "another weight_grid"
        raise UserError(
            f"weight_grid='power' has scales of transformed weights, of which the objective '{objective}' knows "
            f"nothing; take {other}."
        )


def _codebook(config: Any) -> dict[str, Any]:
    """The options that levels of a codebook go with."""
    other = {} if "codebook" in ROUNDERS.find(config.rounding).grids else {"rounding": "gptq"}
    return {"format": "int8", "weight_bits": 4, "affine": False, "split_inputs": False} | other


def _check_progressive(config: Any) -> None:
    if wanted := _other(config, format="int8", weight_bits=4, affine=False):
        raise UserError(f"weight_grid='progressive' goes with other options; give {wanted} with it.")
    learning = config.learning()
    if learning is not None and "scales" in learning.train:
        raise UserError(
            "weight_grid='progressive' has scales that are whole steps, which training cannot change; leave "
            "'scales' out of train."
        )


def _check_average_bits(config: Any) -> None:
    IMPORTANCE.find(config.importance)
    if config.average_bits is None:
        # Of a plan that is there, options tell how it was made.
        if config.plan is None and not config.ranks_rows and is_given(config, "importance"):
            raise UserError(
                f"importance='{config.importance}' ranks rows that get 8 bits, and no row is to get them by rank; "
                f"give {'rows between 0 and 1' if hasattr(config, 'rows') else 'average_bits'} too, or leave it out."
            )
        return
    bits = min(config.weight_bits, 4)
    if not bits < config.average_bits < 8:
        raise UserError(f"average_bits lies between weight_bits ({bits}) and 8; got {config.average_bits:g}.")
    if wanted := _other(config, weight_bits=bits, group_size=None, affine=False, weight_grid="uniform"):
        raise UserError(
            f"average_bits is a choice of weights in 4 bits with one scale an output; give {wanted} with it."
        )


def _check_split(config: Any) -> None:
    if not config.split_inputs or config.plan is not None:  # of a plan that is there, options tell how it was made
        return
    if config.activations != "static" or config.format != "int8":
        given = "format='fp8'" if config.format == "fp8" else f"activations='{config.activations}'"
        raise UserError(
            f"split_inputs=True gives static int8 grids to the parts of inputs, and {given} has none; take "
            "activations='static' and format='int8' with it, or leave it out."
        )
    if config.ranks_rows or getattr(config, "rows", 0):
        raise UserError(
            "split_inputs=True does not go with rows of two widths, whose layers have whole inputs (average_bits, "
            "rows); leave one of them out."
        )

"""The recipes that the options of `ptq4dm quantize` make."""

from __future__ import annotations

from typing import Any

from ..budgets.candidates import recipe_of
from ..errors import UserError
from ..layers.registry import needs_of
from ..options import saying, whole_or_row
from ..pipelines.parts import DENOISER, kind_of
from ..quantization import recipe
from ..quantization.components import load_plans, networks_to_quantize
from ..quantization.components import recipes_of as recipes_of_networks
from ..quantization.recipe import QuantConfig
from .flags import flag_of, options_of

METHOD = __name__.partition(".")[0]  # where none is named, the one that gave the package its name


def methods() -> dict[str, type[QuantConfig]]:
    """The methods that quantize, by name; others stand for models of other libraries."""
    return {name: kind for name, kind in sorted(recipe.METHODS.items()) if not kind.loaded_only}


def components_of(args) -> dict[str, QuantConfig | None] | None:
    """What --components says: network -> recipe, None where it says none. Raises UserError, also beside --plan."""
    if args.components is None:
        return None
    others = {"--component": args.component, "--plan": args.plan, "--plot": args.plot}
    if other := next((flag for flag, value in others.items() if value is not None), ""):
        raise UserError(
            f"{other} is of all networks alike, and --components has a choice for each; give one of them."
        )
    parts = [text.partition("=") for text in args.components]
    if twice := next((name for name, *_ in parts if [one for one, *_ in parts].count(name) > 1), None):
        raise UserError(f"--components names '{twice}' twice.")
    return {name: recipe_of(text, "recipe") if equals else None for name, equals, text in parts}


def chosen_recipes(
    args, pipe: Any, config: QuantConfig, own: dict[str, QuantConfig | None]
) -> dict[str, QuantConfig]:
    """Network -> recipe, of what --components names: its own, `config` of denoisers, or that of its kind.

    Raises UserError where there is no such network, where --method is of none of them, or where one wants calls that
    a pipeline's sampler does not make by itself.
    """
    networks = networks_to_quantize(pipe, None, components=own)
    shared = [name for name, one in own.items() if one is None and kind_of(pipe, name) == DENOISER]
    said = [name for name in options_of(type(config)) if hasattr(args, name)]
    if not shared and (args.method or said):
        given = "--method" if args.method else flag_of(said[0])
        raise UserError(
            f"{given} is of denoisers without a recipe of their own, and --components names none; leave it out, or "
            "write NAME='METHOD option=value ...'."
        )
    found = recipes_of_networks(pipe, networks, config if shared else None, own)
    for name, one in found.items():
        if kind_of(pipe, name) != DENOISER and wants_store(one):
            raise UserError(
                f"the recipe of '{name}' wants calibration, which `ptq4dm collect` makes of denoisers alone; choose "
                "activations=dynamic and rounding=nearest, or record its calls in Python (ptq4dm.record)."
            )
    return found


def recipes_of(args) -> dict[str, QuantConfig]:
    """The recipe that the options make, or the plans of a file: network -> recipe, "" of all that there are.

    Raises:
        UserError: an option that the method does not have or that changes nothing, or any option beside a plan.
    """
    names = sorted({name for kind in methods().values() for name in options_of(kind)})
    options = {name: getattr(args, name) for name in names if hasattr(args, name)}
    if args.plan is None:
        _check_words(methods().get(args.method or METHOD), options)
        with saying(options):
            config = QuantConfig.from_dict({"method": args.method or METHOD, **options})
        if "num_tuples" in options and not config.looks_at_tuples:
            raise UserError(
                f"nothing of this {type(config).__name__} looks at calibration tuples, so that --num-tuples would "
                "change nothing; leave it out, or take a rounding that does, such as --rounding gptq."
            )
        return {args.component or "": config}
    options |= {} if args.method is None else {"method": args.method}
    if options:
        raise UserError(
            f"--plan has settled every choice of the method; leave out {', '.join(map(flag_of, options))}."
        )
    plans = load_plans(args.plan)
    if args.component is not None:
        if args.component not in plans and list(plans) != [""]:
            raise UserError(f"{args.plan} has no plan of '{args.component}'; it has those of {', '.join(plans)}.")
        plans = {args.component: plans[args.component if args.component in plans else ""]}
    return {name: QuantConfig.from_dict({"method": plan.method, "plan": plan}) for name, plan in plans.items()}


def _check_words(kind: type[QuantConfig] | None, options: dict[str, Any]) -> None:
    """Raises UserError where "row" was said of groups, and the method has none of one scale an output."""
    own = {} if kind is None else options_of(kind)
    for name, value in options.items():
        if value is None and name in own and own[name].metadata.get("parse") is not whole_or_row:
            known = ", ".join(str(one) for one in own[name].metadata["choices"] if one is not None)
            raise UserError(f"{flag_of(name)} must be one of {known}; got 'row'.")


def wants_store(config: QuantConfig) -> bool:
    """Whether a recipe has to see calibration; one that follows a plan, for the codes alone."""
    if config.plan is None:
        return config.needs_calibration
    return any(needs_of(choice) for choice in config.plan.layers.values())

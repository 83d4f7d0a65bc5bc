"""What a refusal advises can be taken: each option that it names is one of that recipe, and taken it helps."""

import ast
import itertools
import re
from dataclasses import fields

import pytest

import ptq4dm
from ptq4dm.errors import UserError
from ptq4dm.options import has_option
from ptq4dm.quantization.recipe import METHODS

VALUES = {
    "format": ["int8", "fp8"],
    "weight_bits": [4, 8, 5],
    "activation_bits": [8, 4, 16],
    "group_size": [None, 32, 16],
    "affine": [True, False],
    "weight_grid": ["uniform", "progressive", "power", "codebook"],
    "codebook_of": ["row"],
    "rotate_inputs": [True],
    "average_bits": [5.0, 9.0],
    "importance": ["random"],
    "activations": ["static", "dynamic", "int8"],
    "symmetric": [True],
    "first_last": ["same", "keep"],
    "rounding": ["nearest", "gptq", "learned"],
    "prefix": ["quantized", "exact"],
    "objective": ["max", "output", "prediction"],
    "objective_parameter": [3.0],
    "train": [("scales",), ("ranges",)],
    "optimizer": ["sgd"],
    "moves": ["wide"],
    "rows": [0.0, 0.3],
    "variant": ["channel", "group"],
    "rotation": ["inputs", "values"],
    "clip": ["output"],
    "unsigned": [True],
    "rank": [0],
    "refinements": [3],
    "latency": [None, 0.5],
    "bytes": [None, -1.0],
    "sensitivity": ["direct", "none"],
    "share": [0.3, 0.0],
    "scale": ["outputs"],
    "bits": [2, 5],
    "planes": ["uniform", "even"],
    "emphasis": [2.0],
    "clusters": [1, 4],
    "form": ["literal", "packed"],
    "granularity": ["output", "all"],
}
KINDS = {name: kind for name, kind in METHODS.items() if not kind.loaded_only}
NAMES = {item.name for kind in KINDS.values() for item in fields(kind)}
WORDS = {"smooth_attention"}


def given(kind):
    """Up to two options of a recipe with values, every pair of VALUES."""
    own = {item.name for item in fields(kind)}
    pairs = [(name, value) for name, values in VALUES.items() if name in own for value in values]
    for size in (1, 2):
        for chosen in itertools.combinations(pairs, size):
            if len(dict(chosen)) == size:
                yield dict(chosen)


def complaint(kind, options):
    try:
        kind(**options)
    except UserError as error:
        return str(error)
    return ""


def named(text):
    """The options that a message names: as `name=...`, or by a name that is no plain word."""
    words = set(re.findall(r"\b[a-z]+_[a-z_]+\b", text)) - WORDS
    return words | set(re.findall(r"\b([a-z_]+)=", text))


def advised(text):
    """What a message offers to take: sets of {option: value} that are written out, each set an alternative."""
    offers = re.split(r", or |; ", text.partition("; ")[2])
    for offer in offers:
        taken = {}
        for name, value in re.findall(r"\b([a-z_]+)=('[^']*'|\d+)", offer):
            taken[name] = ast.literal_eval(value)
        if taken and re.search(r"\b(take|give|leave)\b", offer):
            yield taken


@pytest.mark.parametrize("name", sorted(KINDS))
def test_every_option_that_a_refusal_names_is_one_of_the_recipe(name):
    kind, messages = KINDS[name], {}
    for options in given(kind):
        if text := complaint(kind, options):
            messages.setdefault(text, options)
    assert len(messages) > 2
    for text, options in messages.items():
        foreign = {one for one in named(text) if one not in NAMES or not has_option(kind, one)}
        assert not foreign - set(options), (options, text)


@pytest.mark.parametrize("name", sorted(KINDS))
def test_advice_that_is_taken_is_not_given_again(name):
    kind, taken = KINDS[name], 0
    for options in given(kind):
        text = complaint(kind, options)
        for change in advised(text):
            again = complaint(kind, {**options, **change})
            assert again != text, (options, change, text)
            assert again == "" or len(options) > 1, (options, change, text, again)
            taken += 1
    assert taken or name in ("lutgemm", "ohq", "splitquant", "svdquant")


@pytest.mark.parametrize("name", sorted(KINDS))
def test_options_that_a_method_has_fixed_name_the_methods_that_have_them(name):
    kind = KINDS[name]
    fixed = [item for item in fields(kind) if item.metadata.get("fixed")]
    assert bool(fixed) == (name in ("mixllm", "mixpe", "pdquant", "qoq"))
    for item in fixed:
        other = next(value for value in VALUES[item.name] if value != item.default)
        text = complaint(kind, {item.name: other})
        assert text.startswith(f"{item.name} is no choice of {kind.__name__}"), text
        methods = text.rpartition(": ")[2].rstrip(".").split(", ")
        assert methods and all(has_option(KINDS[one], item.name) for one in methods)
        assert complaint(kind, {item.name: item.default}) == ""


@pytest.mark.parametrize("name", sorted(KINDS))
def test_unknown_options_are_answered_with_options_that_there_are(name):
    kind = KINDS[name]
    for made in (kind, lambda **options: ptq4dm.QuantConfig.from_dict({"method": name, **options})):
        with pytest.raises(UserError) as found:
            made(zzzzzzzz=1)
        offered = str(found.value).partition("; it has ")[2].rstrip(".").split(", ")
        assert {"plan", "transforms"} <= set(offered)
        fixed = {item.name for item in fields(kind) if item.metadata.get("fixed")}
        assert not fixed & set(offered)


@pytest.mark.parametrize("name", ["mixllm", "ohq"])
def test_there_is_no_outcome_before_quantizing(name):
    with pytest.raises(UserError, match="has no outcome: nothing was quantized with it yet"):
        KINDS[name]().outcome  # noqa: B018


def test_rows_without_a_choice_have_no_outcome():
    with pytest.raises(UserError, match="rows=0 leaves no rows to choose"):
        ptq4dm.MixLLMConfig(rows=0).outcome  # noqa: B018


def test_data_free_svdquant_takes_no_transform_that_calibrates():
    with pytest.raises(UserError, match="looks at no calibration, and the transform 'smooth:alpha=0.3' does"):
        ptq4dm.SVDQuantConfig(evidence="none", transforms=("rotate", "smooth:alpha=0.3"))
    assert not ptq4dm.SVDQuantConfig(evidence="none", transforms=("rotate",)).needs_calibration


def test_the_cases_that_users_met():
    text = complaint(ptq4dm.MixLLMConfig, {"average_bits": 5.0})
    assert text.startswith("average_bits is no choice of MixLLMConfig, which takes none; leave it out")
    for kind in (ptq4dm.MixPEConfig, ptq4dm.QoQConfig):
        for options in ({"average_bits": 5.0}, {"format": "fp8"}, {"importance": "random"}):
            assert "take a method that has it: gradptq" in complaint(kind, options)
    assert "must be one of uniform, progressive" in complaint(ptq4dm.PDQuantConfig, {"weight_grid": "power"})
    text = complaint(ptq4dm.PTQ4DMConfig, {"weight_grid": "power", "objective": "output"})
    assert text.endswith("one of the objectives lp, max, mse, percentile.")

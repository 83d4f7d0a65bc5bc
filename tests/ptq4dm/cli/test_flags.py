"""Flags from dataclasses: what a new method brings to the command line, and whose option it is."""

import argparse
import copy
import json
import re
from dataclasses import dataclass
from pathlib import Path

import pytest
from diffusers import DDIMScheduler, DiTTransformer2DModel

import ptq4dm
from ptq4dm import RTNConfig, UserError
from ptq4dm.budgets.candidates import recipe_of
from ptq4dm.cli import flags
from ptq4dm.cli.main import build_parser, main
from ptq4dm.options import option
from ptq4dm.quantization import recipe
from ptq4dm.samplers.catalog import DIFFUSERS

ROOT = Path(ptq4dm.__file__).parents[1]


def half(text):
    return float(text) / 2


def arguments_of(parser):
    """(command, argument) of a parser and all that it leads to."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                yield from arguments_of(command)
        else:
            yield parser.prog, action


def test_every_argument_has_a_help():
    """argparse shows a default only beside a text."""
    assert [(prog, one.dest) for prog, one in arguments_of(build_parser()) if not one.help] == []


def test_help_names_every_sampler_of_diffusers():
    helps = [one.help for _, one in arguments_of(build_parser(["generate"])) if one.dest == "sampler"]
    assert helps and all(set(DIFFUSERS) <= set(re.findall(r"[\w+]+", text)) for text in helps)


@pytest.fixture
def shifty(monkeypatch):
    """A method of its own with options of its own, registered as a new file would."""
    monkeypatch.setattr(recipe, "METHODS", copy.copy(recipe.METHODS))

    @recipe.register("shifty")
    @dataclass(repr=False)
    class ShiftyConfig(RTNConfig):
        far_left: int = option(3, "how far, in 100% of cases", choices=(3, 5))
        really: bool = option(False, "whether to")
        gently: bool = option(True, "whether with care")
        halved: float = option(1.0, "twice the value", parse=half)
        names: tuple[str, ...] = option((), "what to shift")
        limit: int | None = option(None, "at most")
        symmetric: str = option("often", "how often")
        secret: str = option("", "no flag", flag=False)
        unsaid: int = 5

    return ShiftyConfig


def quantize_help(capsys):
    with pytest.raises(SystemExit) as end:
        main(["quantize", "--help"])
    assert end.value.code == 0
    return " ".join(capsys.readouterr().out.split())


def test_a_new_method_shows_its_options(shifty, capsys):
    text = quantize_help(capsys)
    assert re.search(r"--method METHOD [^-]*\bshifty\b", text)
    assert "--far-left FAR_LEFT how far, in 100% of cases: 3 or 5 (shifty: 3)" in text
    assert "--really whether to (shifty)" in text
    assert "--gently, --no-gently whether with care (shifty)" in text
    assert "--limit LIMIT at most (shifty)" in text and "--halved HALVED twice the value (shifty: 1)" in text
    assert "--secret" not in text and "--unsaid" not in text
    assert re.search(r"--format FORMAT [^-]* \(gradptq, ptq4dm, rtn, shifty: int8\)", text)
    shared = "gradptq, mixllm, mixpe, pdquant, ptq4dm, qoq, rtn"
    assert f"static inputs without a zero point ({shared}); how often (shifty: often)" in text


def test_options_reach_the_recipe(shifty):
    from ptq4dm.cli.quantize import recipes_of

    def made(*arguments):
        return recipes_of(build_parser(["quantize"]).parse_args(["quantize", *arguments]))[""]

    said = ["--method", "shifty", "--far-left", "5", "--really", "--no-gently", "--halved", "3", "--names", "a", "b*"]
    config = made(*said, "--limit", "7", "--symmetric", "seldom", "--modules-to-not-convert", "x", "y")
    assert type(config) is shifty and (config.far_left, config.really, config.gently) == (5, True, False)
    assert (config.halved, config.names, config.limit, config.symmetric) == (1.5, ["a", "b*"], 7, "seldom")
    assert config.modules_to_not_convert == ("x", "y")
    assert made("--method", "shifty").far_left == 3 and made("--method", "rtn", "--symmetric").symmetric is True
    with pytest.raises(UserError, match="RTNConfig has no option far_left"):
        made("--method", "rtn", "--far-left", "3")
    with pytest.raises(UserError, match="far_left must be one of 3, 5; got 4."):
        made("--method", "shifty", "--far-left", "4")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--method svdquant --evidence none --num-calls 4", "num_calls is of calls that are waited for"),
        ("--method rtn --codebook-of tensor", "codebook_of says whose levels a codebook has"),
        ("--method rtn --prefix exact", "prefix would change nothing"),
        ("--method rtn --importance integrated", "importance='integrated' ranks rows"),
        ("--method mixpe --codebook-of tensor", "codebook_of is no choice of MixPEConfig"),
        ("--method gradptq --rounding nearest --steps 300", "so that steps would change nothing"),
    ],
)
def test_an_option_that_changes_nothing_is_refused_also_at_its_default(words, message):
    """The command line knows what was given; a recipe in Python, or in a saved file, has defaults beside the rest."""
    from ptq4dm.cli.quantize import recipes_of
    from ptq4dm.quantization.recipe import QuantConfig

    with pytest.raises(UserError, match=message):
        recipes_of(build_parser(["quantize"]).parse_args(["quantize", *words.split()]))
    _, method, *rest = words.split()
    given = {"method": method} | ({"evidence": "none"} if "--evidence" in rest else {})
    given |= {"rounding": "nearest"} if "--rounding" in rest else {}
    made = QuantConfig.from_dict(given)
    assert QuantConfig.from_dict(made.to_dict()).to_dict() == made.to_dict()


def test_an_option_of_another_method_names_the_methods_that_have_it():
    from ptq4dm.cli.quantize import recipes_of

    with pytest.raises(
        UserError, match="^PTQ4DMConfig has no option evidence; take a method that has it: svdquant.$"
    ):
        recipes_of(build_parser(["quantize"]).parse_args(["quantize", "--components", "vae", "--evidence", "none"]))
    with pytest.raises(UserError, match="^RTNConfig has no option evidence; take a method that has it: svdquant.$"):
        RTNConfig(evidence="none")


@pytest.mark.parametrize("method", ["rtn", "lutgemm"])
def test_one_scale_an_output_has_a_word(method, capsys):
    from ptq4dm.cli.quantize import recipes_of

    def group_size(*words, of=method):
        return recipes_of(build_parser(["quantize"]).parse_args(["quantize", "--method", of, *words]))[""].group_size

    bits = ["--weight-bits", "4"] if method == "rtn" else []
    assert [group_size(*bits, "--group-size", word) for word in ("row", "32")] == [None, 32]
    assert "row: one an output" in quantize_help(capsys)
    assert recipe_of(f"{method} group_size=row").group_size is None
    for other in ("qoq", "mixllm", "mixpe", "svdquant"):  # whose None is another, or that have none
        with pytest.raises(UserError, match="^--group-size must be one of .*; got 'row'"):
            group_size("--group-size", "row", of=other)
    with pytest.raises(UserError, match="group_size must be a whole number"):
        recipe_of("qoq group_size=row")


def test_wrong_values_are_told_by_the_parser(shifty, capsys):
    for arguments, message in (
        (["--far-left", "x"], "argument --far-left: invalid int value: 'x'"),
        (["--halved", "x"], "argument --halved: invalid half value: 'x'"),
        (["--secret", "x"], "unrecognized arguments: --secret x"),
    ):
        with pytest.raises(SystemExit) as end:
            main(["quantize", "--method", "shifty", *arguments])
        assert end.value.code == 2 and message in capsys.readouterr().err


@pytest.mark.parametrize("flag", ["--time", "--calibration-s", "--jso"])
def test_the_start_of_a_flag_is_no_flag(flag, capsys):
    """`allocate --time` was --timed-batch, where a budget of time was meant."""
    with pytest.raises(SystemExit) as ended:
        build_parser().parse_args(["allocate", flag, "5"])
    assert ended.value.code == 2 and f"unrecognized arguments: {flag}" in capsys.readouterr().err


def test_a_value_that_methods_read_differently():
    @dataclass
    class Whole:
        size: int = option(1, "size")
        mode: bool = option(False, "mode")

    @dataclass
    class Words:
        size: str = option("big", "size")
        mode: float = option(0.5, "mode")

    parser = argparse.ArgumentParser()
    flags.add_union(parser, {"whole": Whole, "words": Words})
    assert vars(parser.parse_args(["--size", "12", "--mode"])) == {"size": 12, "mode": True}
    assert vars(parser.parse_args(["--size", "12cm", "--mode", "0.25"])) == {"size": "12cm", "mode": 0.25}
    assert vars(parser.parse_args([])) == {}
    assert "size (whole: 1; words: big)" in " ".join(parser.format_help().split())


def test_the_command_line_names_no_method():
    named = sorted(set(recipe.METHODS) - {"ptq4dm"})  # the package has its name from one of them
    assert len(named) >= 2
    files = sorted((ROOT / "ptq4dm" / "cli").rglob("*.py"))
    files = [f for f in files if f.name != "__init__.py" and f.parent.name != "training"]
    assert len(files) > 8
    texts = {f.name: f.read_text() for f in files}
    for name in ("bench.py", "hardware.py"):
        texts[name] = texts[name].replace("MixPE", "")  # an accelerator, whose arithmetic is a method of that name
    found = [name for name, text in texts.items() if re.search(rf"\b({'|'.join(named)})\b", text, re.IGNORECASE)]
    assert not found


def test_verbs_are_files_with_add_and_run():
    from ptq4dm.cli.main import VERBS, verb_module

    for name in VERBS:
        module = verb_module(name)
        assert callable(module.add) and callable(module.run) and f"`ptq4dm {name}" in module.__doc__


# --- the picture of a plan ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A tiny transformer, its calibration, and what two methods made of it."""
    root = tmp_path_factory.mktemp("made")
    dit = DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=3, out_channels=3, num_layers=1, sample_size=8,
        patch_size=4, num_embeds_ada_norm=10,
    )  # fmt: skip
    ptq4dm.PixelDiTPipeline(dit, DDIMScheduler()).save_pretrained(root / "dit")
    few = ["--num-samples", "2", "--calibration-steps", "2"]
    assert main(["collect", "--model", f"{root}/dit", "--output", f"{root}/store", *few]) == 0
    common = ["quantize", "--model", f"{root}/dit", "--calibration", f"{root}/store"]
    quick = ["--rank", "2", "--group-size", "16", "--num-tuples", "2", "--smoothing", "0.5", "--rounding", "nearest"]
    assert main([*common, "--method", "svdquant", *quick, "--output", f"{root}/four"]) == 0
    assert main([*common, "--method", "rtn", "--output", f"{root}/eight"]) == 0
    return root


def test_a_plan_with_branches_is_drawn(made, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    common = ["quantize", "--model", f"{made}/dit", "--calibration", f"{made}/store"]
    assert main([*common, "--plan", f"{made}/four/plan.json", "--plot", "p.png", "--output", "q"]) == 0
    assert Path("p.png").read_bytes()[:4] == b"\x89PNG" and "picture: p.png" in capsys.readouterr().out
    name = "transformer/diffusion_pytorch_model.safetensors"
    assert Path("q", name).read_bytes() == (made / "four" / name).read_bytes()


def test_what_cannot_be_drawn_is_refused_before_any_work(made, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    layers = json.loads((made / "four" / "plan.json").read_text())
    for layer in layers["layers"].values():
        if layer["format"] == "svdq":
            layer["rank"] = 0
    Path("bare.json").write_text(json.dumps(layers))
    draws = "--plot draws a low-rank branch, which"
    common = ["quantize", "--plot", "p.png", "--calibration", "nowhere", "--model", "nowhere"]
    for arguments, message in (
        (
            [],
            "--plot has nothing to draw of the method 'ptq4dm'; it draws rows of 8 bits over time (mixllm), "
            "a low-rank branch (svdquant).",
        ),
        (["--plan", f"{made}/eight/plan.json"], "--plot has nothing to draw of the method 'rtn'"),
        (["--method", "svdquant", "--rank", "0"], f"{draws} no layer of this recipe has."),
        (["--plan", "bare.json"], f"{draws} no layer of this recipe has."),
    ):
        assert main([*common, *arguments]) == 2
        assert message in capsys.readouterr().err
    named = ["--plan", f"{made}/four/plan.json", "--calibration", f"{made}/store", "--model", f"{made}/dit"]
    assert main([*common, *named, "--plot-layer", "pos_embed.proj", "--output", "q"]) == 2
    assert f"{draws} 'pos_embed.proj' has." in capsys.readouterr().err
    assert not Path("p.png").exists() and not Path("q").exists()

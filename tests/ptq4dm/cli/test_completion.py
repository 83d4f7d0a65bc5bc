"""Completion: what it offers is what the parser takes, and it comes without PyTorch."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import ptq4dm
from ptq4dm.cli import completion
from ptq4dm.cli.main import main
from ptq4dm.cli.verbs import VERBS, build_parser

DRIVER = """
source {script}
COMP_WORDS=("$@")
COMP_CWORD=$(($# - 1))
_ptq4dm
printf '%s\\n' "${{COMPREPLY[@]}}"
"""


def test_the_words_are_the_parsers():
    """Where this fails: python -m ptq4dm.cli.completion"""
    found, kept = completion.words_of(build_parser()), json.loads(completion.WORDS.read_text())
    assert found == kept
    assert set(kept) == {"", "bench hardware", "bench samplers", "bench tune", *VERBS}
    assert all({"--quiet", "--json", "--help"} <= set(one["flags"]) for one in kept.values())


@pytest.fixture
def complete(tmp_path, capsys, monkeypatch):
    """complete("ptq4dm", "qu") -> what bash offers for the last word."""
    assert main(["completion", "bash"]) == 0
    script, driver = tmp_path / "script.bash", tmp_path / "driver.bash"
    script.write_text(capsys.readouterr().out)
    driver.write_text(DRIVER.format(script=script))
    here = tmp_path / "here"
    here.mkdir()
    (here / "plan with spaces.json").write_text("")
    (here / "unet-mine").mkdir()

    def call(*words):
        done = subprocess.run(
            ["bash", "--norc", driver, *words], cwd=here, capture_output=True, text=True, check=True, timeout=60
        )
        assert done.stderr == ""
        return [line for line in done.stdout.split("\n") if line]

    return call


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash here")
def test_in_bash(complete):
    assert complete("ptq4dm", "qu") == ["quantize"]
    assert set(VERBS) <= set(complete("ptq4dm", ""))
    assert complete("ptq4dm", "bench", "t") == ["tune"]
    assert complete("ptq4dm", "--quiet", "bench", "tune", "--k") == ["--kernels"]
    assert complete("ptq4dm", "quantize", "--dtype", "") == ["float32", "bfloat16", "float16"]
    assert complete("ptq4dm", "quantize", "--dtype", "=", "b") == ["bfloat16"]
    assert complete("ptq4dm", "quantize", "--dtype", "=") == ["float32", "bfloat16", "float16"]
    assert complete("ptq4dm", "quantize", "--plan", "p") == ["plan with spaces.json"]
    assert complete("ptq4dm", "generate", "--model", "un") == ["unet-cifar10", "unet-cifar10-onestep", "unet-mine"]
    assert complete("ptq4dm", "generate", "--seed", "") == []  # a number: nothing to offer
    assert complete("ptq4dm", "generate", "--seed", "3", "--num-i") == ["--num-images", "--num-inference-steps"]
    assert "--resume" in complete("ptq4dm", "distill", "--compile", "")  # a switch has no value
    assert "w4a16" in complete("ptq4dm", "bench", "tune", "--kernels", "w8a8", "w")  # several values
    assert complete("ptq4dm", "info", "--device", "cpu", "--so") == []
    assert complete("ptq4dm", "completion", "z") == ["zsh"]


@pytest.mark.parametrize("shell", completion.SHELLS)
def test_the_script_is_one_of_that_shell(shell, tmp_path, capsys):
    assert main(["completion", shell]) == 0
    text = capsys.readouterr().out
    kept = json.loads(completion.WORDS.read_text())
    flags = {flag for one in kept.values() for flag in one["flags"]}
    assert len(flags) > 60 and all((f"-l {f[2:]}" if shell == "fish" else f) in text for f in flags)
    if shutil.which(shell):
        (tmp_path / "script").write_text(text)
        subprocess.run([shell, "-n", tmp_path / "script"], check=True)


def test_nothing_heavy_is_imported():
    code = (
        "import sys\nfrom ptq4dm.cli.main import main\nassert main(['completion', 'fish', '--json']) == 0\n"
        "print({'torch', 'diffusers', 'accelerate', 'tqdm', 'numpy'} & set(sys.modules), file=sys.stderr)"
    )
    env = os.environ | {"PYTHONPATH": str(Path(ptq4dm.__file__).parents[1])}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    assert done.stderr == "set()\n" and json.loads(done.stdout)["script"].startswith(
        "# Completion of ptq4dm for fish"
    )

"""Wrong input that is told before PyTorch is imported: in the words of the whole parser, and none that is right."""

import subprocess
import sys

import pytest

from ptq4dm.cli.main import main
from ptq4dm.cli.verbs import refuse
from ptq4dm.errors import UserError

WRONG = [
    "quantize --modle x",
    "quantize --model nowhere",
    "quantize --model ./nowhere",
    "generate --model nowhere",
    "info --model a/b/c",
    "quantize --method rtnn",
    "quantize --calibration nothing",
    "allocate --num-tuples many",
    "allocate --calibration nothing",
    "quantize --dtype float",
    "quantize --output",
    "quantize --output=",
    "collect --num-samples 1.5",
    "bench samplers --model nowhere",
    "bench nothing",
    "compare",
    "bench",
    "generate --seed 1 two",
]
RIGHT = [
    "quantize --method rtn --weight-bits 4 --activations dynamic --model dit-cifar10",
    "quantize --method rtn --batch-size 4 --quiet",
    "quantize --model someone/something --split-inputs",
    "--json allocate --bytes 0.4 --candidates one two",
    "bench tune --quiet",
    "bench hardware --model dit-cifar10",
    "completion bash",
    "compare out/quantized out/other --output out/comparison",
    "quantize --nothing --help",
]


def told(call):
    """What a refusal says on stderr, or None."""
    try:
        call()
    except UserError as error:
        return str(error)
    except SystemExit as end:
        return end.code
    return None


@pytest.mark.parametrize("line", WRONG)
def test_wrong_input_is_refused_as_the_command_itself_does(line, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    early = told(lambda: refuse(line.split()))
    said = capsys.readouterr().err or f"{early}\n"
    assert early is not None
    assert told(lambda: main(line.split())) in (None, 2)
    whole = capsys.readouterr().err
    assert whole.endswith(said) and whole.count("\n") == 1


@pytest.mark.parametrize("line", RIGHT)
def test_what_is_right_passes(line):
    assert told(lambda: refuse(line.split())) is None


def test_torch_is_not_imported_for_it(tmp_path):
    code = "import sys; from ptq4dm.cli.main import main; print(main(sys.argv[1:]), 'torch' in sys.modules)"
    words = [sys.executable, "-c", code, "quantize", "--model", "nowhere"]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.stdout.split() == ["2", "False"] and "'nowhere' is neither" in done.stderr

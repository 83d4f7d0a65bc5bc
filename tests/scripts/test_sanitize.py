"""compute-sanitizer over the kernels' tests, by a stand-in: what runs under it, and what counts as an answer."""

import importlib
import json
import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[2] / "scripts" / "benchmarks"
SUMMARY = 'print("========= ERROR SUMMARY: 0 errors", flush=True)'
PASSES = """
import os, subprocess, sys

command = sys.argv[sys.argv.index(sys.executable):]
status = subprocess.call(command, env={name: value for name, value in os.environ.items() if value})
"""  # as compute-sanitizer does, it hands on no variable that is empty
TESTS = """
import pytest

@pytest.mark.gpu
@pytest.mark.parametrize("case", range(9))
def test_on_hopper(case):
    pass

@pytest.mark.gpu
def test_other():
    pass

@pytest.mark.gpu
def test_in_a_graph():
    with torch.cuda.graph(graph):
        pass

def test_of_a_cpu():
    pass
"""


@pytest.fixture
def sanitize(monkeypatch, tmp_path):
    """Runs the script with a tool of these lines: (exit status, rows of its file)."""
    monkeypatch.syspath_prepend(str(SCRIPTS))
    script = importlib.import_module("sanitize")

    def ran(tool: str, *words: str) -> tuple[object, list[dict]]:
        place, output = tmp_path / "tool", tmp_path / "lines.jsonl"
        place.write_text(f"#!{sys.executable}\n{tool}")
        place.chmod(0o755)
        monkeypatch.setattr(sys, "argv", ["sanitize.py", "--sanitizer", str(place), "--output", str(output), *words])
        with pytest.raises(SystemExit) as ended:
            script.main()
        return ended.value.code, [json.loads(line) for line in output.read_text().splitlines()]

    ran.wrong = script.wrong
    return ran


def test_chosen_tests_run_under_the_tool_though_it_drops_empty_variables(sanitize, tmp_path):
    tests = tmp_path / "test_kernels.py"
    tests.write_text(TESTS)
    status, (row,) = sanitize(f"{PASSES}{SUMMARY}\nsys.exit(status)", "--tests", str(tests))
    names = [name.rpartition("::")[2] for name in row["passed"]]
    assert (status, names) == (0, ["test_on_hopper[2]", "test_on_hopper[6]", "test_other"])
    assert row["summary"] == "0 errors" and "wrong" not in row


@pytest.mark.parametrize("end", [3, 0])
def test_a_tool_under_which_no_test_ran_has_found_nothing_out(sanitize, end, capsys):
    status, (row,) = sanitize(f"import sys\n{SUMMARY}\nsys.exit({end})")
    assert status == 1 and row["passed"] == [] and row["status"] == end
    assert f"memcheck: no test passed under it: it did not run (exit status {end})" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({}, ""),
        ({"problems": 1}, "found something: 0 errors"),
        ({"status": 86, "summary": None}, "found something: it was stopped before it summed up"),
        ({"status": 1}, "not all tests passed under it (exit status 1); those that did: 1"),
        ({"status": "stopped after 9 s", "summary": None}, "not all tests passed under it (stopped after 9 s); "),
        ({"summary": None}, "it did not sum up"),
    ],
)
def test_what_is_no_proof_is_told(sanitize, changed, reason):
    told = sanitize.wrong({"summary": "0 errors", "problems": 0, "status": 0, "passed": ["a"]} | changed)
    assert told.startswith(reason) and bool(told) == bool(reason)

"""The sweep: its catalogue is whole, a few very different classes pass, and its rows and tables are what they say."""

import importlib
import json
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from ptq4dm.errors import UserError

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"


@pytest.fixture(scope="module")
def script():
    """The script as a module; it puts its folders on the path for itself."""
    before = list(sys.path)
    sys.path.insert(0, str(SCRIPTS))
    yield importlib.import_module("sweep_models")
    sys.path[:] = before


@pytest.fixture(scope="module")
def sweep(script):
    """A function: name of a file in scripts/sweep -> the module."""
    return lambda name: importlib.import_module(f"sweep.{name}")


@pytest.fixture(autouse=True)
def one_thread_for_tiny_nets():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_the_catalogue_has_every_denoiser_class_of_diffusers(sweep):
    found, excluded = set(sweep("classes.discover").denoisers()), sweep("classes.discover").EXCLUDED
    covered = {case.name for case in sweep("classes.catalogue").CASES.values()}
    assert len(found) > 90  # those of diffusers 0.41: the search finds something
    assert found - covered - set(excluded) == set(), "write a case, or exclude it with a reason"
    assert set(excluded) <= found and not covered & set(excluded)
    assert all(len(reason) > 20 for reason in excluded.values())


# A list of latents, a UNet, video with sound, a ControlNet, a time for each token, two times.
DIFFERENT = [
    "ZImageTransformer2DModel",
    "UNet2DModel",
    "LTX2VideoTransformer3DModel",
    "FluxControlNetModel",
    "WanTransformer3DModel (a time for each token)",
    "RFD4ProteinaTransformer",
]


@pytest.mark.parametrize("label", DIFFERENT)
def test_different_classes_are_recorded_quantized_saved_and_loaded(sweep, tmp_path, label):
    subject = sweep("subject").Subject(sweep("classes.catalogue").CASES[label], tmp_path)
    for name in ("record", "W8A8", "save", "load"):
        done = sweep("cells").cell(subject, sweep("columns").columns()[name])
        assert done["result"] == "ok", (name, done["reason"])
    layers = [module for module in subject.model("W8A8").modules() if hasattr(module, "qweight")]
    assert len(layers) > 10 and all(layer.qweight.dtype == torch.int8 for layer in layers)


@pytest.mark.parametrize("label", ["FluxTransformer2DModel", "WanTransformer3DModel"])
def test_svdquant_adapters_and_offloading_pass_for_two_classes(sweep, tmp_path, label):
    subject = sweep("subject").Subject(sweep("classes.catalogue").CASES[label], tmp_path)
    for name in ("SVDQuant W4A8", "LoRA", "group offload", "offload"):
        done = sweep("cells").cell(subject, sweep("columns").columns()[name])
        assert done["result"] == "ok", (name, done["reason"])
        assert done["figures"] or "offload" in name


def broken(sweep, tmp_path, forward):
    """A subject whose model does what `forward` says."""

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(64, 64)

    Model.forward = forward
    case = sweep("classes.case").Case("Model", "", Model, lambda batch, seed: ((torch.ones(batch, 64),), {}))
    return sweep("subject").Subject(case, tmp_path)


def test_a_cell_that_float_fails_is_not_applicable_with_floats_error(sweep, tmp_path):
    def forward(self, x):
        raise RuntimeError("no such kernel")

    for name, column in sweep("columns").columns().items():
        done = sweep("cells").cell(broken(sweep, tmp_path, forward), column)
        assert done["result"] == "n/a" and done["reason"].startswith("float: "), name
        assert "no such kernel" in done["reason"] or name in ("save", "load", "LoRA", "group offload"), name


def test_outputs_that_are_not_finite_do_not_pass(sweep):
    found = sweep("subject")
    with pytest.raises(found.Wrong, match="not finite"):
        found.outputs({"sample": torch.tensor([1.0, float("nan")])})
    with pytest.raises(found.Wrong, match="no tensor"):
        found.outputs(None)


def test_a_format_whose_error_is_above_the_bound_fails_with_both_numbers(sweep, tmp_path, monkeypatch):
    subject = sweep("subject").Subject(sweep("classes.catalogue").CASES["PriorTransformer"], tmp_path)
    monkeypatch.setitem(sweep("columns").BOUNDS, "W8A8", 1e-9)
    done = sweep("cells").cell(subject, sweep("columns").columns()["W8A8"])
    assert done["result"] == "fails" and "above 1e-09" in done["reason"]


def test_distance_is_of_the_worst_output_and_shapes_must_agree(sweep):
    one = [torch.ones(4), torch.ones(2)]
    assert sweep("subject").distance([torch.ones(4), torch.tensor([1.0, 2.0])], one) == pytest.approx(0.5**0.5)
    with pytest.raises(sweep("subject").Wrong, match="shapes"):
        sweep("subject").distance([torch.ones(4), torch.ones(3)], one)


def test_tables_alone_go_into_a_page_and_nothing_is_run(script, sweep, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(script, "sweep", lambda *args: pytest.fail("a cell was run"))
    rows, page = tmp_path / "rows.jsonl", tmp_path / "page.md"
    page.write_text(f"head\n{sweep('report').BEGIN}{sweep('report').END}tail\n")
    assert script.main(["--table", "--output", str(rows), "--page", str(page)]) == 0
    assert page.read_text().startswith("head\n") and page.read_text().endswith("tail\n")
    assert capsys.readouterr().out == ""
    with pytest.raises(UserError, match="--table writes the tables into a page; name it with --page"):
        script.main(["--table", "--output", str(rows)])


def test_a_run_goes_on_where_it_stopped_and_writes_the_tables(script, sweep, tmp_path, monkeypatch):
    monkeypatch.setattr(script, "quiet", lambda: None)
    monkeypatch.setattr(script, "commit", lambda: "0" * 40)
    rows, page = tmp_path / "rows.jsonl", tmp_path / "page.md"
    page.write_text(f"head\n{sweep('report').BEGIN}{sweep('report').END}tail\n")
    arguments = [
        "--only",
        "PriorTransformer",
        "--columns",
        "record",
        "save",
        "--output",
        str(rows),
        "--page",
        str(page),
    ]
    assert script.main(arguments) == 0
    made = [json.loads(line) for line in rows.read_text().splitlines()]
    assert len(made) == 4 and {row["result"] for row in made} == {"ok"}  # two configurations
    assert {"commit", "versions", "seed", "seconds", "figures", "variant"} <= made[0].keys()

    lines = rows.read_text().splitlines(keepends=True)
    rows.write_text("".join(lines[:-1]) + lines[-1][:20])  # stopped in the middle of a row
    ran = []
    failing = {"result": "fails", "reason": "why", "figures": {}, "seconds": 1.0}
    monkeypatch.setattr(script, "cell", lambda subject, column: ran.append(column) or failing)
    assert script.main(arguments) == 1 and len(ran) == 1
    text = page.read_text()
    assert text.startswith("head\n") and text.endswith("tail\n")
    assert "1 classes, 2 configurations" in text and "| 2 of 2 (100 %) |" in text
    assert "| 0 of 1 (0 %) | 1 of 2 (50 %) |" in text and ": why: PriorTransformer" in text


def test_a_file_that_is_no_sweep_is_refused(sweep, tmp_path):
    (tmp_path / "rows.jsonl").write_text("hello\nworld\n")
    with pytest.raises(UserError, match="line 1 of .* is no row"):
        sweep("lines").Lines(tmp_path / "rows.jsonl")


def test_a_page_without_the_marks_and_an_unknown_column_are_refused_before_any_work(script, tmp_path, monkeypatch):
    monkeypatch.setattr(script, "cell", lambda subject, column: pytest.fail("a cell was run"))
    page, rows = tmp_path / "page.md", tmp_path / "rows.jsonl"
    for wrong, message in ((["--page", str(page)], "must be a page"), (["--columns", "WRONG"], "no column 'WRONG'")):
        with pytest.raises(UserError, match=message):
            script.main(["--output", str(rows), *wrong])
    assert not rows.exists()


def test_answers_of_pipelines_become_cells(sweep):
    answered = sweep("cells").answered
    assert answered("ok") == {"result": "ok", "reason": "", "figures": {}}
    assert answered("ok 0.013")["figures"] == {"error": 0.013}
    assert answered("ok unet 4")["figures"] == {}
    assert answered("FAIL unet is off by 0.300") == {
        "result": "fails",
        "reason": "unet is off by 0.300",
        "figures": {},
    }
    assert answered("n/a no such thing")["result"] == "n/a"
    assert answered("-")["result"] == "fails"

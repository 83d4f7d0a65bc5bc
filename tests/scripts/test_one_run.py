"""The tables of one run: each row was measured, and the pages have what the script prints."""

import importlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts" / "comparisons"))
    return importlib.import_module


def test_every_row_was_measured_on_a_model(script):
    one_run = script("one_run")
    known = {name for model in one_run.MODELS for name in one_run.rows_of(model)}
    pairs = [pair for pairs in one_run.GAINS.values() for pair in pairs]
    groups = [*one_run.PAPERS.values(), *one_run.EVIDENCE.values(), *one_run.CONTROLS, *pairs]
    assert len(known) > 300 and {name for names in groups for name in names} - known == set()


def test_every_control_is_held_against_a_row(script):
    one_run, alone = script("one_run"), script("one_run_rows").ALONE
    dealt = {
        name for model in one_run.MODELS for name, row in one_run.rows_of(model).items() if row["kind"] == "shuffled"
    }
    held = [control for control, _, _ in one_run.CONTROLS]
    assert len(dealt) > 50 and sorted(dealt) == sorted([*held, *alone])


def test_pages_have_what_is_printed(script, capsys):
    one_run = script("one_run")
    results, svdquant = (ROOT / name / "README.md" for name in ("scripts/results", "svdquant"))
    for table, page in (("gains", results), ("papers", results), ("verdicts", results), ("evidence", svdquant)):
        one_run.main([table])
        assert capsys.readouterr().out in page.read_text()


def test_the_first_page_has_shares_of_this_run(script):
    """Of the papers whose line tells error beside a baseline of the same bytes, in the order of GAINS."""
    one_run = script("one_run")
    told = {"PTQ4DM": 1, "GradPTQ": 2, "QoQ": 1, "MixPE": 1, "MixLLM": 2, "LUT-GEMM": 1, "OHQ": 1}
    page = (ROOT / "README.md").read_text().partition("## Fourteen papers")[2].splitlines()
    for paper, count in told.items():
        [line] = [line for line in page if line.startswith((f"| {paper}", f"| [{paper}"))]
        for name, beside in one_run.GAINS[paper][:count]:
            shares = [one_run.gain(rows[name], rows[beside])[0] for rows in map(one_run.rows_of, one_run.MODELS)]
            assert re.search(rf"{shares[0]}( \(U\))?, {shares[1]}\b", line), (paper, name, shares)


def test_what_does_not_stand_is_said(script):
    one_run = script("one_run")
    rows = {
        name: {"row": name, "kind": kind, "of": of, "eps_error": error, "bytes": size}
        for name, kind, of, error, size in (
            ("PTQ4DM W8A8", "method", "", 2e-4, 100), ("RTN W8A8", "baseline", "PTQ4DM W8A8", 1e-4, 101),
            ("large", "baseline", "PTQ4DM W8A8", 1e-5, 103), ("PTQ4DM W6A6", "method", "", 1e-4, 100),
            ("RTN W6A6", "baseline", "PTQ4DM W6A6", 5e-4, 100),
            ("PTQ4DM W6A6, ranges shuffled", "shuffled", "PTQ4DM W6A6", 2e-4, 100),
        )
    }  # fmt: skip
    beaten = ("PTQ4DM W8A8", "RTN W8A8", "")
    kept = ("PTQ4DM W6A6, ranges shuffled", "RTN W6A6", "75 %")
    assert one_run.verdicts(rows) == [beaten, kept]
    assert one_run.counted(rows, "U") == (
        "U: of 1 controls 0 keep a tenth of the gain at most, 1 keep more, and 0 have no gain to keep."
    )
    rows["PTQ4DM W6A6, ranges shuffled"]["eps_error"] = 6e-4
    assert one_run.verdicts(rows) == [beaten]
    rows["RTN W6A6"]["eps_error"] = 1.009e-4  # a gain below a percent is none
    rows["PTQ4DM W6A6, ranges shuffled"]["eps_error"] = 1e-4
    assert one_run.verdicts(rows) == [beaten]
    assert one_run.counted(rows, "U").endswith("0 keep more, and 1 have no gain to keep.")

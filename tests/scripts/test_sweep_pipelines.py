"""The catalogue of tiny pipelines: all of diffusers or why not; its pipelines run, and pass the columns."""

import importlib
import re
from pathlib import Path

import diffusers
import pytest
import torch

SWEEP = Path(__file__).resolve().parents[2] / "scripts" / "sweep"
FOLDER = Path(diffusers.__file__).parent / "pipelines"
# One of each kind: a U-Net, unconditional; a transformer; two transformers; prompts of two lengths in lists; a prior.
COLUMNS = [
    "DDPMPipeline",
    "FluxPipeline",
    "WanPipeline, two transformers",
    "ZImagePipeline",
    "KandinskyV22PriorPipeline",
]
FLOAT = ["StableDiffusionXLControlNetPipeline", "LTX2Pipeline", "QwenImageEditPipeline", "StableAudioPipeline"]


@pytest.fixture
def sweep(monkeypatch):
    """Imports a file of scripts/sweep."""
    monkeypatch.syspath_prepend(str(SWEEP))
    return importlib.import_module


def pipeline_folders() -> set[str]:
    """Folders below diffusers.pipelines, dotted, with a class that is a pipeline."""
    found = set()
    for file in FOLDER.rglob("pipeline*.py"):
        if file.parent != FOLDER and re.search(r"^class \w+Pipeline\w*\(", file.read_text(), re.MULTILINE):
            found.add(".".join(file.parent.relative_to(FOLDER).parts))
    return found


def test_every_folder_of_pipelines_has_a_case_or_a_reason(sweep):
    catalogue = sweep("pipelines")
    classes = {getattr(diffusers, name.partition(",")[0]) for name in catalogue.PIPELINES}
    covered = {kind.__module__.removeprefix("diffusers.pipelines.").rpartition(".")[0] for kind in classes}
    folders, left = pipeline_folders(), set(catalogue.LEFT_OUT)
    assert len(folders) > 100 and len(classes) > 150
    assert not folders - covered - left, "neither a case nor a reason"
    assert not left - folders, "reasons for what is not there"
    assert not left & covered, "reasons for what is covered"
    assert all(len(reason) > 10 for reason in catalogue.LEFT_OUT.values())


@pytest.mark.parametrize("name", FLOAT)
def test_pipelines_of_the_catalogue_run(name, sweep, one_thread):
    catalogue = sweep("pipelines")
    assert catalogue.float_column(catalogue.PIPELINES[name]()) == "ok"


def test_a_case_that_fails_in_float_says_how(sweep, one_thread):
    catalogue = sweep("pipelines")
    case = catalogue.PIPELINES["DDIMPipeline"]()
    case.pipe.unet.conv_in.weight.data.fill_(float("nan"))
    assert catalogue.float_column(case) == "not finite for 1 seeds"


@pytest.mark.parametrize("name", COLUMNS)
def test_columns_pass(name, sweep, one_thread):
    columns = sweep("pipeline_columns")
    cells = columns.columns(sweep("pipelines").PIPELINES[name]())
    assert set(cells) == set(columns.COLUMNS)
    assert all(cell.startswith("ok") for cell in cells.values()), cells


def test_columns_see_what_is_wrong(sweep, one_thread, monkeypatch):
    """A transformer that is left in full precision, and outputs that are off."""
    columns, case = sweep("pipeline_columns"), sweep("pipelines").PIPELINES["DDPMPipeline"]()
    with pytest.raises(columns.Failure, match="left in full precision: unet"):
        columns.complete(case)
    assert columns.distance([torch.tensor([3.0, 0.0])], [torch.tensor([3.0, 4.0])]) == pytest.approx(0.8)

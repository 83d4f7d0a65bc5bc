"""The files of measured settings."""

import json

import pytest
import torch

import ptq4dm  # noqa: F401
from ptq4dm.kernels.runtime import settings as tuning
from ptq4dm.kernels.w8a8 import configs as w8a8_configs
from ptq4dm.kernels.w8a8.window import Window


@pytest.fixture
def gpu(tmp_path, monkeypatch):
    """A GPU that is not there, and an empty folder of settings."""
    monkeypatch.setattr(tuning, "FOLDER", tmp_path)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "Some GPU-9000 (PCIe)")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    tuning.forget()
    yield torch.device("cuda", 0)
    monkeypatch.undo()
    tuning.forget()


def test_what_is_recorded_is_used(gpu, tmp_path):
    general = {"device": "sm_90", "k": [[64, 64, 64, {"BM": 1}]]}
    (tmp_path / "sm_90.json").write_text(json.dumps(general))
    assert tuning.best_config("k", gpu, 5, 5, 5) == {"BM": 1}
    tuning.record("k", [128, 128, 128], {"BM": 2})
    tuning.record("k", [4096, 128, 128], {"BM": 3})
    tuning.record("k", [128, 128, 128], {"BM": 4})  # in the place of the first
    assert tuning.best_config("k", gpu, 100, 100, 100) == {"BM": 4}
    assert tuning.best_config("k", gpu, 9999, 100, 100) == {"BM": 3}
    assert tuning.tuned_file().name == "some_gpu_9000_pcie.json"
    assert json.loads(tuning.tuned_file().read_text()) == {
        "device": "Some GPU-9000 (PCIe)",
        "k": [[4096, 128, 128, {"BM": 3}], [128, 128, 128, {"BM": 4}]],
    }


def test_a_gpu_that_was_tuned_for_many_rows_takes_the_general_settings_of_few(gpu, tmp_path):
    """As an H200, on which QoQ's layers were measured from 1024 rows on, has them for the one row of a time."""
    general = {"device": "sm_90", "k": [[rows, 64, 64, {"general": rows}] for rows in (16, 512, 1024, 99999)]}
    (tmp_path / "sm_90.json").write_text(json.dumps(general))
    for rows in (1024, 4096):
        tuning.record("k", [rows, 64, 64], {"own": rows})
    found = {rows: tuning.best_config("k", gpu, rows, 64, 64) for rows in (1, 500, 1024, 5000, 10**6)}
    assert found == {
        1: {"general": 16}, 500: {"general": 512}, 1024: {"own": 1024}, 5000: {"own": 4096},
        10**6: {"general": 99999},
    }  # fmt: skip


def test_a_shape_class_has_its_own_tile(gpu):
    window = Window(256, 32, 32, (3, 3), (1, 1), (1, 1))
    arguments = (torch.int8, window, 128, 128, gpu, False)
    assert w8a8_configs.choose(*arguments) == w8a8_configs.default(torch.int8, window, 128, 128, (9, 0), False)
    measured = {"mode": "gather", "bm": 64, "bn": 32, "bk": 32, "warps": 4, "stages": 2}
    tuning.record("w8a8", w8a8_configs.shape_class(torch.int8, window, 128, 128), measured)
    assert w8a8_configs.choose(*arguments) == w8a8_configs.Config(**measured)
    assert w8a8_configs.choose(torch.int8, window, 256, 128, gpu, False).bm == 128


def test_what_is_added_to_a_product_keeps_it_from_hoppers_kernel(gpu):
    """Of 1x1 windows of codes with one scale, or one a row: there it is the default, and may be what was measured."""
    rows = Window(4096, 1, 1)
    linear = (torch.int8, rows, 1024, 1024, gpu, False)
    assert w8a8_configs.choose(*linear) == w8a8_configs.GLUON
    assert w8a8_configs.choose(*linear, False).mode == "gather"
    tuning.record(
        "w8a8", w8a8_configs.shape_class(torch.int8, rows, 1024, 1024), vars(w8a8_configs.GLUON) | {"band": 4}
    )
    assert w8a8_configs.choose(*linear).band == 4 and w8a8_configs.choose(*linear, False).mode == "gather"
    for window in (Window(4096, 1, 1, padding=(1, 0)), Window(64, 16, 16, stride=(2, 2)), Window(64, 1, 1)):
        assert w8a8_configs.default(torch.int8, window, 1024, 1024, (9, 0), False).mode == "gather"
    assert w8a8_configs.default(torch.int8, rows, 1024, 1024, (8, 9), False).mode == "gather"


@pytest.mark.parametrize("batch, bm", [(128, 64), (512, 64), (64, 128), (1024, 128)])
def test_twice_or_half_the_rows_take_the_tile_that_was_measured(gpu, batch, bm):
    window = Window(256, 32, 32, (3, 3), (1, 1), (1, 1))
    measured = {"mode": "gather", "bm": 64, "bn": 32, "bk": 32, "warps": 4, "stages": 2}
    tuning.record("w8a8", w8a8_configs.shape_class(torch.int8, window, 128, 128), measured)
    other = Window(batch, 32, 32, (3, 3), (1, 1), (1, 1))
    assert w8a8_configs.choose(torch.int8, other, 128, 128, gpu, False).bm == bm


def test_files_keep_one_entry_to_a_line():
    table = {"device": "x", "a": [[1, 2, 3, {"BM": 1}]], "b": {"z": {"bm": 1}, "y": {"bm": 2}}}
    text = tuning.formatted(table)
    assert json.loads(text) == table and len(text.splitlines()) == 10


@pytest.mark.parametrize(
    "text",
    [
        "", "[]", "{", "3", '{"k": []}', '{"device": 3}', "[" * 100_000, '{"device": "x", "k": 3}', "\udcff",
        '{"device": "x", "k": [3]}', '{"device": "x", "k": [[1, 2, 3]]}',
        '{"device": "x", "k": [[0, 2, 3, {}]]}',
        '{"device": "x", "k": [[1, 2, 3, {"BM": 1e9}]]}', '{"device": "x", "k": [[1, 2, 3, {"BM": 99999999}]]}',
        '{"device": "x", "k": [[1, 2, 3, {"BM": -1}]]}', '{"device": "x", "w8a8": {"a": 3}}',
        '{"device": ' + "9" * 5000,
    ],
)  # fmt: skip
def test_files_that_hold_no_settings(tmp_path, text):
    path = tmp_path / "gpu.json"
    path.write_text(text, encoding="utf-8", errors="surrogateescape")
    with pytest.raises(
        tuning.DamagedSettings, match="gpu.json (is|holds) no .*; delete it and measure anew."
    ) as caught:
        tuning.settings_in(path)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 600


def test_the_files_of_the_package_are_settings():
    paths = sorted(tuning.FOLDER.glob("*.json"))
    assert len(paths) > 4 and all(tuning.settings_in(path) for path in paths)

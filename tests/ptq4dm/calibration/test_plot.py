"""The picture of a layer's input over timesteps."""

import sys

import pytest
import torch
from PIL import Image

from ptq4dm.calibration.input_statistics import InputStatistics
from ptq4dm.calibration.plot import QUANTILES, layer_ranges, plot_ranges
from ptq4dm.calibration.store import CalibrationStore
from ptq4dm.errors import UserError


def store():
    """Two layers, ten bins; "b" sees N(0, (bin + 1)^2) in bins 0, 3 and 9."""
    statistics = InputStatistics(2, 10)
    generator = torch.Generator().manual_seed(0)
    for k in (0, 3, 9):
        statistics.update(1, k, torch.randn(200_000, generator=generator) * (k + 1))
    return CalibrationStore({"num_bins": 10}, {"a": "1", "b": "2"}, 1000, statistics=statistics)


def test_ranges_follow_the_values():
    rows = layer_ranges(store(), "b")
    assert [(row["from"], row["to"]) for row in rows] == [(0, 100), (300, 400), (900, 1000)]
    expected = torch.distributions.Normal(0, 1).icdf(torch.tensor(QUANTILES))
    for row, deviation in zip(rows, (1, 4, 10), strict=True):
        assert row["low"] <= row["quantiles"][0] and row["quantiles"][-1] <= row["high"]
        torch.testing.assert_close(torch.tensor(row["quantiles"]) / deviation, expected, rtol=0, atol=0.1)
        assert -6 < row["low"] / deviation < -3.5 and 3.5 < row["high"] / deviation < 6
    assert layer_ranges(store(), "a") == []


def test_a_png_is_written_and_nothing_else(tmp_path):
    plot_ranges(store(), "b", tmp_path / "new" / "ranges.png")
    assert [p.name for p in tmp_path.rglob("*")] == ["new", "ranges.png"]
    with Image.open(tmp_path / "new" / "ranges.png") as picture:
        assert picture.format == "PNG" and min(picture.size) > 300
        assert len(picture.convert("RGB").getcolors(2**24)) > 20  # something is drawn


def test_wrong_input(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="no layer 'c'.*info"):
        plot_ranges(store(), "c", tmp_path / "ranges.png")
    with pytest.raises(UserError, match="layer 'a' was fed nothing"):
        plot_ranges(store(), "a", tmp_path / "ranges.png")
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    for path in (tmp_path / "file" / "ranges.png", tmp_path / "folder"):
        with pytest.raises(UserError, match=f"cannot write {path}"):
            plot_ranges(store(), "b", path)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(UserError, match=r"pip install ptq4dm\[plot\]"):
        plot_ranges(store(), "b", tmp_path / "ranges.png")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "folder"]

"""Figures of layers: the broken are the worst, and are told from the perfect."""

import json
import math

import pytest
import torch
from torch import nn

import ptq4dm
from ptq4dm.errors import UserError
from ptq4dm.quantization.report import QuantizationReport, badness
from ptq4dm.reconstruction.layer_errors import Ratio

NAN, INF = math.nan, math.inf


def rows(**sqnr):
    shared = {"format": "W8A8", "kernel": "none", "bytes": 1, "basis": "output"}
    return [{"layer": name, **shared, "sqnr": value} for name, value in sqnr.items()]


@pytest.mark.parametrize(
    ("exact", "approximate", "decibel"),
    [
        ([3.0, 4.0], [3.0, 3.5], 20.0),
        ([3.0, 4.0], [3.0, 4.0], INF),
        ([0.0, 0.0], [0.0, 0.0], INF),
        ([3.0, 4.0], [3.0, NAN], NAN),
        ([3.0, 4.0], [3.0, INF], NAN),
        ([3.0, INF], [3.0, 4.0], NAN),
        ([NAN, 4.0], [NAN, 4.0], NAN),
        ([INF, 4.0], [INF, 4.0], NAN),
        ([0.0, 0.0], [1e150, 0.0], -6000.0),
    ],
)
def test_the_ratio_of_numbers_that_are_none_is_none(exact, approximate, decibel):
    found = Ratio.between(*(torch.tensor(x, dtype=torch.float64) for x in (exact, approximate))).decibel
    assert math.isnan(found) if math.isnan(decibel) else found == pytest.approx(decibel)


def test_broken_layers_come_first_and_are_told_apart_from_perfect_ones(tmp_path):
    order = sorted(rows(good=40.0, perfect=INF, broken=NAN, bad=-3.0, worse=NAN), key=badness)
    assert [row["layer"] for row in order] == ["broken", "worse", "bad", "good", "perfect"]
    report = QuantizationReport({}, 100, 50, order, ["unet"])
    report.layers[0]["sqnr_final"] = NAN  # a stage of a method
    report.save(tmp_path / "report.json")

    def refuse(constant):
        pytest.fail(f"{constant} is no JSON")

    saved = json.loads((tmp_path / "report.json").read_text(), parse_constant=refuse)["layers"]
    assert [row["sqnr"] for row in saved] == ["nan", "nan", -3.0, 40.0, None]
    assert saved[0]["sqnr_final"] == "nan"
    table = report.table(worst=2)
    assert "2 of 5 layers give NaN or infinity, the first broken" in table and table.count("nan") == 2
    assert "NaN" not in QuantizationReport({}, 100, 50, rows(good=40.0)).table()


def test_together_sorts_broken_layers_first():
    parts = [
        QuantizationReport({}, 1, 1, rows(**one), [name]) for name, one in (("a", {"x": 9.0}), ("b", {"y": NAN}))
    ]
    assert [row["layer"] for row in QuantizationReport.together(parts).layers] == ["b.y", "a.x"]


class TwoLayers(nn.Module):
    """The second layer overflows in full precision where the input is large."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        return self.second(self.first(x))


def test_a_layer_that_is_broken_by_quantization_is_the_worst(monkeypatch):
    torch.manual_seed(0)
    model = TwoLayers().eval()
    with ptq4dm.record(model) as calls:
        model(torch.randn(8, 4))
    from ptq4dm.layers.w8a8 import Int8Linear

    forward = Int8Linear.forward
    overflow = lambda self, x: forward(self, x) * (INF if self.bias[0] == model.first.bias[0] else 1)  # noqa: E731
    monkeypatch.setattr(Int8Linear, "forward", overflow)
    report = ptq4dm.quantize(model, ptq4dm.RTNConfig(first_last="same"), calls)
    assert report.layers[0]["layer"] == "first" and math.isnan(report.layers[0]["sqnr"])
    assert report.layers[1]["sqnr"] > 20


def test_calibration_data_that_holds_infinity_is_a_sentence_and_the_model_stays():
    torch.manual_seed(0)
    model = TwoLayers().eval()
    with ptq4dm.record(model) as calls:
        with pytest.raises(UserError, match="given NaN in 'x'"):
            model(torch.full((8, 4), NAN))
        model(torch.full((8, 4), INF))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for config in (ptq4dm.RTNConfig(), ptq4dm.RTNConfig(activations="dynamic")):
        with pytest.raises(UserError, match="NaN or infinity"):
            ptq4dm.quantize(model, config, calls)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert type(model.first) is nn.Linear


def test_the_table_says_what_training_did():
    def trained(flips, error, nearest):
        start = {"block_error_start": 2 * error}
        return {"flips": flips, "block_error": error, "block_error_nearest": nearest, **start}

    found = rows(a=20.0, b=21.0, c=22.0, d=23.0)
    assert "trained" not in QuantizationReport({}, 100, 50, found).table()
    assert QuantizationReport({}, 100, 50, found).to_dict()["trained"] is None
    for row, figures in zip(found[:3], [(0.1, 1.0, 2.0), (0.3, 1.0, 2.0), (0.2, 1.0, 8.0)], strict=True):
        row |= trained(*figures)  # two layers of one block, and another block: 1/2 and 1/8
    last = "trained: 20.0% of a layer's codes are not the nearest; a block's error is 0.250 times that of nearest"
    last += ", 0.500 times that of where training began"
    report = QuantizationReport({}, 100, 50, found)
    assert last in report.table(worst=1)
    assert report.to_dict()["trained"] == pytest.approx({"flips": 0.2, "of_nearest": 0.25, "of_start": 0.5})
    found[0] |= trained(0.5, 0.0, 0.0)
    assert "0.250 times" in QuantizationReport({}, 100, 50, found).table()  # a block without any error has no ratio
    report = QuantizationReport({}, 100, 50, found[:1])
    table = report.table()
    assert json.loads(json.dumps(report.to_dict()))["trained"] == {"flips": 0.5, "of_nearest": None, "of_start": None}
    assert "trained: 50.0% of a layer's codes are not the nearest" in table and "block's error" not in table

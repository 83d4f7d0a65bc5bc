"""Salience of rows: kept apart by time, sorted over all layers, told by type of layer."""

import json

import pytest
import torch
from torch import nn

import ptq4dm
from helpers import normal
from ptq4dm import UserError
from ptq4dm.allocation.row_report import ChosenRows, layer_type
from ptq4dm.allocation.row_task import RowTask
from ptq4dm.allocation.salient_rows import Salience, chosen_rows, predicted_error, salience
from ptq4dm.calibration.calls import calls_of_rows
from ptq4dm.layers.view import find_layers

pytestmark = pytest.mark.usefixtures("one_thread")


class Timed(nn.Module):
    """Two layers: the first counts late in time, the second early."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.early, self.late = nn.Linear(16, 6, bias=False), nn.Linear(16, 6, bias=False)

    def forward(self, x, timestep):
        share = timestep.view(-1, 1) / 1000
        return share * self.late(x) + (1 - share) * self.early(x)


def timed_task(times=(50.0, 950.0, 900.0, 960.0)):
    model = Timed()
    calls = calls_of_rows(x=normal(len(times), 16), timestep=torch.tensor(times))
    return RowTask(model, find_layers(model), 4, calls=calls)


def test_scores_are_kept_apart_by_time_and_add_up():
    found = salience(timed_task(), "gauss-newton", 4)
    assert found.tuples == [1, 0, 0, 3] and found.edges == [0, 0.25, 0.5, 0.75, 1]
    assert all(score.shape == (4, 6) and not score[1:3].any() for score in found.scores.values())
    parts = found.by_layer()
    assert parts["late"][3] > 0.9 and parts["early"][0] > 0.9 and parts["late"][1] == 0.0
    assert parts["late"][3] + parts["early"][3] == pytest.approx(1)
    assert torch.equal(found.total["late"], found.scores["late"].sum(0))
    assert found.overlap(0.5)[1] == [0, 0, 0, 0]
    assert found.overlap(0.5)[0][0] == 1 and found.overlap(0.5)[0][3] < 0.4


def test_one_time_alone_gives_its_own_scores():
    """Bins are of the calls' own time: the last three tuples by themselves are what the last bin has."""
    whole, alone = salience(timed_task(), "magnitude", 4), salience(timed_task((950.0, 900.0, 960.0)), "magnitude", 4)
    assert whole.edges == [0.0, 1.0] and torch.equal(whole.total["late"], alone.total["late"])
    exact = salience(timed_task((50.0, 60.0)), "gauss-newton", 2)
    assert exact.tuples == [2, 0] and not exact.scores["late"][1].any()


def test_rows_are_sorted_over_all_layers_and_counted_alike():
    scores = {"a": torch.tensor([5.0, 1.0, 4.0]), "b": torch.tensor([3.0, 9.0, 0.0, 2.0, 1.0, 0.0, 0.0])}
    assert chosen_rows(scores, 0.3) == {"a": [0, 2], "b": [1]}
    assert chosen_rows(scores, 0.39) == chosen_rows(scores, 0.3)  # floor
    assert chosen_rows(scores, 0.0) == {"a": [], "b": []}
    assert [len(rows) for rows in chosen_rows(scores, 1.0).values()] == [3, 7]
    ties = {"a": torch.ones(2), "b": torch.ones(2)}
    assert chosen_rows(ties, 0.75) == {"a": [0, 1], "b": [0]}
    # 0.1 of 30 is 3.0000000000000004 rows of floats, 0.7 of 10 6.999...
    assert sum(map(len, chosen_rows({"a": torch.arange(30)}, 0.1).values())) == 3
    assert sum(map(len, chosen_rows({"a": torch.arange(10)}, 0.7).values())) == 7


def test_what_is_left_is_predicted():
    scores = {"a": torch.tensor([5.0, 1.0, 4.0]), "b": torch.tensor([3.0])}
    assert predicted_error(scores, {}) == 13 and predicted_error(scores, {"a": [0, 2], "b": []}) == 4


def test_types_of_layers_are_their_names_without_numbers():
    names = {
        "transformer_blocks.3.attn1.to_v": "attn1.to_v", "transformer_blocks.0.ff.net.0.proj": "net.proj",
        "down_blocks.1.resnets.0.conv1": "resnets.conv1", "conv_in": "conv_in",
    }  # fmt: skip
    assert {name: layer_type(name) for name in names} == names


def outcome():
    scores = {
        "blocks.0.to_q": torch.tensor([[1.0, 2.0], [0.0, 1.0]]),
        "blocks.1.to_q": torch.tensor([[0.0, 0.0], [7.0, 0.0]]),
        "blocks.0.to_v": torch.tensor([[5.0, 4.0], [1.0, 1.0]]),
    }  # fmt: skip
    scores = {name: score.double() for name, score in scores.items()}
    found = Salience("gauss-newton", [0.0, 0.5, 1.0], [3, 3], scores)
    return ChosenRows(found, chosen_rows(found.total, 0.5), 0.5, 0.5, 6.0)


def test_shares_by_type_are_told():
    chosen = outcome()
    assert chosen.rows == {"blocks.0.to_q": [], "blocks.1.to_q": [0], "blocks.0.to_v": [0, 1]}
    assert chosen.shares() == {
        "blocks.to_v": {"layers": 1, "rows": 2, "wide": 2, "share": 1.0},
        "blocks.to_q": {"layers": 2, "rows": 4, "wide": 1, "share": 0.25},
    }
    assert chosen.error_left == pytest.approx(4 / 22)
    assert chosen.text() == (
        "rows of 8 bits: 3 of 6 (50.0%), 50.0% of the weights, 6.00 bits a weight, by gauss-newton: blocks.to_v 100%"
        ", blocks.to_q 25%"
    )


def test_it_is_json_and_a_picture(tmp_path):
    chosen = outcome()
    chosen.save(tmp_path / "rows.json")
    found = json.loads((tmp_path / "rows.json").read_text())
    assert found["rows"]["blocks.0.to_v"] == [0, 1] and found["overlap"] == [[1.0, 2 / 3], [2 / 3, 1.0]]
    assert found["salience"]["scores"]["blocks.1.to_q"] == [[0, 0], [7, 0]] and found["by_layer"][
        "blocks.0.to_v"
    ] == [
        0.75,
        0.2,
    ]
    pytest.importorskip("matplotlib")
    chosen.draw(tmp_path / "rows.png")
    assert (tmp_path / "rows.png").read_bytes()[:4] == b"\x89PNG"


def test_scores_without_numbers_and_without_calls_are_refused():
    task = timed_task()
    task.model.late.weight.data[0, 0] = float("nan")
    with pytest.raises(UserError, match="salience of rows is NaN or infinite"):
        salience(RowTask(task.model, task.views, 4, calls=task.calls), "magnitude", 3)
    with pytest.raises(UserError, match="looks at calibration calls"):
        salience(RowTask(Timed(), find_layers(Timed()), 4), "fisher", 3)
    assert ptq4dm.MixLLMConfig().rows == 0.10

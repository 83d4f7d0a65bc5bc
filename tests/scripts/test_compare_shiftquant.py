"""The experiment on training with integers at toy size: its lines, what is not made again, and where it goes on."""

import importlib
import json
import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open

from ptq4dm.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


@pytest.fixture(scope="module")
def script():
    """The script as a module, on one thread: sums come in one order."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "scripts" / "training"))
        yield importlib.import_module("compare_shiftquant")
    torch.set_num_threads(threads)


@pytest.fixture
def data(tmp_path):
    random = np.random.default_rng(0)
    for split in ("train", "test"):
        for name in CLASSES:
            folder = tmp_path / "data" / split / name
            folder.mkdir(parents=True)
            for i in range(2):
                Image.fromarray(random.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(folder / f"{i}.jpg")
    return tmp_path / "data"


SMALL = ["--seeds", "0", "--steps", "2", "--batch-size", "2", "--held-out", "10", "--num-fid", "0", "--tiny"]


def test_rows_are_lines_and_are_made_once(script, data, tmp_path, capsys):
    output = tmp_path / "rows.jsonl"
    command = ["--data", str(data), "--output", str(output), "--device", "cpu", *SMALL]
    command += ["--rows", "unet bf16", "unet 6/6/6 L1"]
    script.main(command)
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert [row["row"] for row in rows] == ["unet bf16", "unet 6/6/6 L1"]
    for row in rows:
        assert {"card", "commit", "seed", "held_out", "held_out_float", "losses", "seconds"} <= row.keys()
        assert row["card"] == "cpu" and len(row["held_out_bins"]) == 10 and 0.5 < row["held_out"] < 2
    assert rows[0]["held_out"] == rows[0]["held_out_float"] and rows[1]["held_out"] != rows[1]["held_out_float"]
    script.main(command)
    assert len(output.read_text().splitlines()) == 2
    with pytest.raises(UserError, match="no row is called 'unet 5/5'; there are: unet bf16; unet 6/6/6"):
        script.main([*command, "--rows", "unet 5/5"])
    with pytest.raises(UserError, match="--graph needs a GPU"):
        script.main([*command, "--graph"])


def test_a_row_that_is_stopped_goes_on(script, data, tmp_path, monkeypatch):
    output = tmp_path / "rows.jsonl"
    command = ["--data", str(data), "--output", str(output), "--device", "cpu", *SMALL, "--rows", "unet 6/6/6"]
    monkeypatch.setattr(importlib.import_module("shiftquant_steps"), "FIRST", 1)
    for _ in range(2):  # one step each; all are done too late to be measured
        script.main([*command, "--minutes", "0"])
        assert not output.exists() and len(list(tmp_path.glob("rows.*.safetensors"))) == 1
    script.main([*command, "--minutes", "0"])
    (row,) = [json.loads(line) for line in output.read_text().splitlines()]
    assert row["resumed_at"] == 2 and len(row["losses"]) == 2 and not list(tmp_path.glob("rows.*.safetensors"))


def test_a_row_that_is_terminated_goes_on_to_the_same_losses(script, data, tmp_path, monkeypatch):
    steps = importlib.import_module("shiftquant_steps")
    trainer = importlib.import_module("fast_steps").Trainer
    command = ["--data", str(data), "--device", "cpu", *SMALL, "--steps", "4", "--rows", "unet bf16", "--output"]
    before, sent = trainer.run, []

    def run(self, until):
        if self.step == 2 and not sent:
            sent.append(until)
            os.kill(os.getpid(), signal.SIGTERM)  # in the middle of a step, which is ended first
        before(self, until)

    monkeypatch.setattr(trainer, "run", run)
    with pytest.raises(KeyboardInterrupt):
        script.main([*command, str(tmp_path / "rows.jsonl")])
    (path,) = tmp_path.glob("rows.*.safetensors")
    with safe_open(path, "pt") as file:
        progress = json.loads(file.metadata()["progress"])
    assert progress["step"] == 3 and progress["looked"] == 0 and 2 < progress["total"] < 5
    monkeypatch.setattr(steps, "AT_RISK", 0.0)  # a checkpoint at each turn changes nothing
    script.main([*command, str(tmp_path / "rows.jsonl")])
    script.main([*command, str(tmp_path / "whole.jsonl")])
    rows = [json.loads((tmp_path / name).read_text()) for name in ("rows.jsonl", "whole.jsonl")]
    assert [row["resumed_at"] for row in rows] == [3, 0] and [len(row["losses"]) for row in rows] == [1, 1]
    assert rows[0]["losses"] == pytest.approx(rows[1]["losses"], rel=0.3)  # the last step has other noise


def test_a_resumed_optimizer_keeps_the_tensors_that_a_graph_has(script):
    fast = importlib.import_module("fast_steps")
    trainer = fast.Trainer(
        torch.nn.Linear(2, 2), fast.Recipe(9, 2, 0.1, 0.0), torch.ones(4, 2), torch.zeros(4),
        lambda net, images, labels: net(images).square().mean(), False, False,
    )  # fmt: skip
    trainer.run(3)
    moments = [value for state in trainer.optimizer.state.values() for value in state.values()]
    places, rate = [value.data_ptr() for value in moments], trainer.optimizer.param_groups[0]
    other = trainer.new_optimizer()
    trainer.net(torch.ones(1, 2)).sum().backward()
    other.step()
    expected = [value.clone() for state in other.state.values() for value in state.values()]
    trainer.take(other)
    assert [value.data_ptr() for value in moments] == places and trainer.optimizer.param_groups[0] is rate
    assert all(torch.equal(a, b) for a, b in zip(moments, expected, strict=True)) and moments[0] == 1


def test_noise_of_gradients_by_layer(script, data):
    noise = importlib.import_module("shiftquant_noise")
    net = importlib.import_module("reference_recipes").build_network("dit", tiny=True)
    for module in net.modules():  # as it begins, an adaptive block is no function of its input
        if hasattr(module, "weight") and isinstance(module, torch.nn.Linear):
            torch.nn.init.normal_(module.weight, std=0.1)
    split = importlib.import_module("cifar10").read_cifar10(data)[0]
    rows = noise.noise_rows(net, split, 8)
    assert [(row["times"], row["bits"]) for row in rows] == [("mixed", 4), ("mixed", 6), ("equal", 4), ("equal", 6)]
    for row in rows:
        assert row["layers"] > 5 and 0 < row["groups"]["geometric_mean"] < 1
        assert row["groups over exact samples"]["geometric_mean"] < 1.3
        assert row["exact tokens"]["geometric_mean"] < row["exact samples"]["geometric_mean"] < 1
    rows = noise.bias_rows(net.eval(), split, 200)
    assert len(rows) == 8 and all(0.7 < row["z_rms"] < 1.4 and row["beyond_3"] < 0.03 for row in rows)
    assert all(abs(row["along"]) < 4 and row["entries"] > 10 and row["draws"] == 200 for row in rows)


def test_half_a_line_of_a_killed_process_is_no_row(script, tmp_path, capsys):
    rows = importlib.import_module("rows_file")
    path = tmp_path / "new" / "rows.jsonl"
    output = rows.RowsFile(path, torch.device("cpu"))
    assert not output.has(row="a")
    output.add(row="a", seed=1)
    path.write_text(path.read_text() + '{"row": "b", "se')
    assert output.has(row="a", seed=1) and not output.has(row="a", seed=2) and not output.has(row="b")
    (row,) = rows.read_rows(path)
    assert row["commit"] and row["card"] == "cpu" and json.loads(capsys.readouterr().out) == row


def test_rows_say_what_they_are(script):
    rows = importlib.import_module("shiftquant_rows")
    assert all(rows.row_of(name).name == name for name in rows.ROWS)
    row = rows.row_of("dit 6/5/8 G=2 samples L1")
    assert (row.network, row.norms, row.trained) == ("dit", True, True)
    assert row.widths == rows.Widths(6, 5, 8, 2, tokens=False)
    assert rows.row_of("unet L1").widths is None and rows.row_of("unet L1").norms
    assert rows.row_of("unet 6/6/6 served").widths.served and not rows.row_of("unet bf16").norms
    for name in ("unet", "unet 6/6", "unet 9/9/9", "unet 6/6/6 G=8", "unet 6/6/6 more", "unet bf16 L1", "net bf16"):
        with pytest.raises(UserError, match=f"no row is called '{name}'"):
            rows.row_of(name)

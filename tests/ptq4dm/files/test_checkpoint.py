"""Training states: what was written comes back, and nothing else is taken."""

import json
import math
from dataclasses import dataclass

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from ptq4dm.errors import DamagedFile
from ptq4dm.files.checkpoint import load_checkpoint, progress_as, save_checkpoint


@dataclass
class Progress:
    step: int = 0
    seconds: float = 0.0


def training(seed):
    torch.manual_seed(seed)
    net = nn.Linear(3, 2)
    return net, torch.optim.AdamW(net.parameters())


@pytest.fixture
def saved(tmp_path):
    net, optimizer = training(0)
    net(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    save_checkpoint(
        tmp_path / "c", {"net": net}, {"optimizer": optimizer}, {"step": 1}, {"lr": 1}, {"more": torch.ones(2)}
    )
    return tmp_path / "c", net, optimizer


def load(path, net, optimizer, more=("more",)):
    return load_checkpoint(path, {"net": net}, {"optimizer": optimizer}, {"lr": 1}, more)


def rewrite(path, change, header=None, checks=True):
    with safe_open(path, "pt") as file:
        tensors, metadata = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118
    change(tensors)
    metadata |= header or {}
    if not checks:
        del metadata["checks"]
    save_file(tensors, path, metadata)


@pytest.mark.parametrize("checks", [True, False])
def test_what_was_written_comes_back(saved, checks):
    path, net, optimizer = saved
    rewrite(path, lambda tensors: None, checks=checks)
    other, others = training(1)
    progress, tensors = load(path, other, others)
    assert progress == {"step": 1} and torch.equal(tensors["more"], torch.ones(2))
    assert torch.equal(other.weight, net.weight)
    assert torch.equal(others.state[other.bias]["exp_avg"], optimizer.state[net.bias]["exp_avg"])


@pytest.mark.parametrize("checks", [True, False])
@pytest.mark.parametrize(
    "change",
    [
        lambda t: t.pop("net.weight"),
        lambda t: t.update({"net.weight": torch.zeros(2, 4)}),
        lambda t: t.update({"net.weight": torch.zeros(2, 3, dtype=torch.float64)}),
        lambda t: t["net.weight"].fill_(math.nan),
        lambda t: t["optimizer.0.exp_avg"].fill_(math.inf),
        lambda t: t.pop("optimizer.0.exp_avg"),
        lambda t: t.update({"optimizer.0.exp_avg": torch.zeros(4)}),
        lambda t: t.update({"optimizer.0.exp_avg": t["optimizer.0.exp_avg"].half()}),
        lambda t: t.update({"optimizer.0.exp_avg": t["optimizer.0.exp_avg"].view(torch.int32)}),  # the same bytes
        lambda t: t.update({"optimizer.0.step": t["optimizer.0.step"].view(torch.int32)}),
        lambda t: t.update({"optimizer.9.exp_avg": torch.zeros(2, 3)}),
        lambda t: t.update({"optimizer.x": torch.zeros(1)}),
        lambda t: t.update({"net.more": torch.zeros(1)}),
        lambda t: t.update({"stranger": torch.zeros(1)}),
    ],
)
def test_other_tensors_change_nothing(saved, change, checks):
    path, _, _ = saved
    rewrite(path, change, checks=checks)
    net, optimizer = training(1)
    before = net.weight.clone()
    with pytest.raises(DamagedFile, match="c cannot be read .*start a new run in another folder"):
        load(path, net, optimizer)
    assert torch.equal(net.weight, before) and not optimizer.state


def test_checksums_find_what_looks_right(saved):
    path, net, optimizer = saved
    rewrite(path, lambda tensors: tensors["net.weight"].mul_(0.5))
    with pytest.raises(DamagedFile, match="'net.weight' is not what was written"):
        load(path, net, optimizer)


@pytest.mark.parametrize("text", ["{", "[]", "3", "[" * 100_000, '{"a": ' + "9" * 5000 + "}"])
@pytest.mark.parametrize("name", ["recipe", "progress", "checks"])
def test_headers_that_are_none(saved, name, text):
    path, net, optimizer = saved
    rewrite(path, lambda tensors: None, {name: text})
    with pytest.raises(DamagedFile, match="c cannot be read") as caught:
        load(path, net, optimizer)
    assert len(str(caught.value)) < 600


def test_files_without_a_header(tmp_path):
    for metadata in (None, {"x": "y"}):
        save_file({"a": torch.zeros(1)}, tmp_path / "c", metadata)
        with pytest.raises(DamagedFile, match="no 'recipe' in its header"):
            load_checkpoint(tmp_path / "c", {}, {}, {})


def test_progress_is_of_its_kind():
    assert progress_as(Progress, {"step": 3, "seconds": 2}, "c") == Progress(3, 2)
    for wrong in ({}, {"step": 1}, {"step": 1, "seconds": 1, "more": 1}):
        with pytest.raises(DamagedFile, match="progress tells of"):
            progress_as(Progress, wrong, "c")
    for wrong in (
        {"step": -1},
        {"step": 1.0},
        {"step": True},
        {"step": 10**30},
        {"seconds": math.nan},
        {"seconds": "1"},
    ):
        with pytest.raises(DamagedFile, match=f"says .* for '{next(iter(wrong))}'"):
            progress_as(Progress, {"step": 1, "seconds": 1.0, **wrong}, "c")


def test_json_of_the_recipe_is_compared(saved):
    path, net, optimizer = saved
    rewrite(path, lambda tensors: None, {"recipe": json.dumps({"lr": 1})})
    load(path, net, optimizer)

"""Bytes by one definition: what a file holds, in its types and in 16 bits, of reports, budgets and `info` alike."""

import json

import pytest
import torch
from torch import nn

import models
import ptq4dm
from ptq4dm import RTNConfig, SplitQuantConfig, SVDQuantConfig
from ptq4dm.cli.main import main
from ptq4dm.layers.sizes import bytes_in_16_bits, full_bytes, stored_bytes

RECIPES = {
    "int8": RTNConfig(activations="dynamic"),
    "int4": RTNConfig(activations="dynamic", weight_bits=4, group_size=64, affine=True),
    "split": SplitQuantConfig(form="literal"),
    "svdquant": SVDQuantConfig(rank=8, evidence="none"),
}


def tensors_of(folder):
    """Bytes of the tensors in a safetensors file, by its header."""
    data = next(folder.glob("*.safetensors")).read_bytes()
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    return sum(b - a for a, b in (one["data_offsets"] for name, one in header.items() if name != "__metadata__"))


@pytest.mark.parametrize("name", RECIPES)
def test_bytes_of_a_report_are_those_of_the_file(name, tmp_path):
    """Of a DiT, whose table of positions is in no file."""
    model = models.dit(attention_head_dim=64)
    assert sum(one.nbytes for one in model.buffers()) > 0
    full = bytes_in_16_bits(model)
    report = ptq4dm.quantize(model, RECIPES[name])
    model.save_pretrained(tmp_path)
    assert report.bytes_after == stored_bytes(model) == tensors_of(tmp_path)
    assert report.full_in_16_bits == full == full_bytes(model, sixteen=True)
    assert report.bytes_before == full_bytes(model)
    assert report.in_16_bits == stored_bytes(nn.Module.to(model, torch.float16))
    assert f"{report.in_16_bits / full:.3f} of the full-precision model's" in report.table()


def test_info_says_the_same_share(tmp_path, capsys):
    pipe = ptq4dm.load_reference("dit-cifar10")
    report = ptq4dm.quantize(pipe, RECIPES["int4"])
    pipe.save_pretrained(tmp_path / "four")
    assert main(["info", "--model", str(tmp_path / "four"), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    sizes = report.bytes_after, report.in_16_bits, report.full_in_16_bits
    assert (told["bytes"], told["bytes_in_16_bits"], told["full_bytes_in_16_bits"]) == sizes

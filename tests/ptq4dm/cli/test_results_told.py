"""Results are told before they are written, and a disk without room is told before the work."""

import os
from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler, DDPMPipeline

from models import plain_unet
from ptq4dm.cli.main import main
from ptq4dm.errors import UserError
from ptq4dm.files.rows import Rows
from ptq4dm.methods.rtn import RTNConfig
from ptq4dm.quantization.quantize import quantize
from ptq4dm.quantization.saving import bytes_at_least

pytestmark = pytest.mark.usefixtures("one_thread")
QUANTIZE = ["quantize", "--model", "./model", "--output", "q", "--method", "rtn", "--activations", "dynamic"]


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def pipeline():
    return DDPMPipeline(plain_unet(), DDIMScheduler())


def disk(monkeypatch, free):
    monkeypatch.setattr("ptq4dm.files.places.shutil.disk_usage", lambda _: type("usage", (), {"free": free}))


def test_a_disk_without_room_for_the_quantized_pipeline(monkeypatch, capsys):
    pipeline().save_pretrained("model")
    need = bytes_at_least(pipeline(), {"": RTNConfig()})
    disk(monkeypatch, need - 1)
    assert main(QUANTIZE) == 2
    assert "the quantized pipeline takes at least" in capsys.readouterr().err and not Path("q").exists()
    disk(monkeypatch, need)
    assert main(QUANTIZE) == 0
    assert need <= sum(path.stat().st_size for path in Path("q").rglob("*.safetensors"))


def test_networks_that_are_not_quantized_count_as_they_are():
    pipe = pipeline()
    whole = sum(one.numel() * one.element_size() for one in pipe.unet.state_dict().values())
    assert whole // 40 < bytes_at_least(pipe, {"": RTNConfig()}) < whole // 2
    pipe.register_modules(other=plain_unet(1))
    assert bytes_at_least(pipe, {"unet": RTNConfig()}) == bytes_at_least(pipeline(), {"": RTNConfig()}) + whole
    quantize(pipe, RTNConfig(activations="dynamic"), component="unet")
    tied = torch.nn.Module()
    tied.a = tied.b = torch.nn.Linear(100, 100)
    pipe.register_modules(other=tied)
    before = bytes_at_least(pipe, {"unet": RTNConfig()})
    tied.b = torch.nn.Linear(100, 100)
    assert bytes_at_least(pipe, {"unet": RTNConfig()}) == before + 4 * 10_100


WRITERS = {"ptq4dm.cli.quantize.save_quantized": ["--sampler", "ddim"], "ptq4dm.streaming.folder.save_plans": []}


@pytest.mark.parametrize("writer", WRITERS)  # of a whole pipeline, and of one that was never whole in memory
def test_the_table_of_a_quantization_that_cannot_be_saved(writer, monkeypatch, capsys):
    pipeline().save_pretrained("model")

    def full(*_):
        raise UserError("cannot write q: No space left on device.")

    monkeypatch.setattr(writer, full)
    assert main([*QUANTIZE, *WRITERS[writer]]) == 2
    told = capsys.readouterr()
    assert "21 layers on" in told.out and "cannot write q: No space left on device." in told.err


def test_a_row_that_cannot_be_written(tmp_path, monkeypatch, capsys):
    rows = Rows(tmp_path / "rows.json", {})
    rows.add({"a": 1})
    before = (tmp_path / "rows.json").read_bytes()

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("ptq4dm.kernels.runtime.atomic.os.replace", full)
    with pytest.raises(UserError, match="No space left on device"):
        rows.add({"a": 2})
    assert '{"a": 2}' in capsys.readouterr().out and (tmp_path / "rows.json").read_bytes() == before
    assert os.listdir(tmp_path) == ["rows.json"]

"""What version 0.1.0 saved, before its files moved into rooms, loads to the bit (tests/data/v0.1.0.tar.xz)."""

import json
import tarfile
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline, DiTTransformer2DModel, UNet2DModel
from safetensors.torch import load_file

import ptq4dm
from ptq4dm import CalibrationStore, Plan, PTQ4DMConfig

pytestmark = pytest.mark.usefixtures("one_thread")

ARCHIVE = Path(__file__).parents[1] / "data" / "v0.1.0.tar.xz"
WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(folder, **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))
    return folder / "v0.1.0"


def is_file(model, path):
    """Whether a model's tensors are those of the file, all of them, bit for bit."""
    tensors, state = load_file(path), model.state_dict()
    assert tensors.keys() == state.keys() and len(tensors) > 10
    return all(torch.equal(tensors[name], state[name]) for name in tensors)


def test_a_pipeline_with_w8a8_layers_and_a_deis_scheduler(saved):
    pipe = DiffusionPipeline.from_pretrained(saved / "w8a8")
    assert json.loads((saved / "w8a8" / "model_index.json").read_text())["scheduler"][0] == "ptq4dm.samplers.deis"
    assert type(pipe.scheduler) is ptq4dm.samplers.DEISScheduler
    assert is_file(pipe.unet, saved / "w8a8" / "unet" / WEIGHTS)
    config = ptq4dm.quantization_config(pipe.unet)
    assert type(config) is PTQ4DMConfig and config.plan == Plan.load(saved / "plan.json")
    assert len(ptq4dm.sample(pipe, [0], num_inference_steps=3)) == 1


def test_an_svdquant_model(saved):
    model = DiTTransformer2DModel.from_pretrained(saved / "svdq")
    assert is_file(model, saved / "svdq" / WEIGHTS)
    plan = ptq4dm.quantization_config(model).plan
    assert {layer.format for layer in plan.layers.values()} >= {"svdq"}
    borrowed = [name for name, layer in plan.layers.items() if getattr(layer, "lender", "")]
    assert borrowed  # their branches are tied again: they compute
    with torch.no_grad():
        y = model(torch.randn(1, 4, 8, 8), torch.tensor([5]), class_labels=torch.tensor([1])).sample
    assert y.isfinite().all()


def test_a_store_and_a_plan_give_the_codes_that_they_gave(saved):
    """The recipe resolves to the saved plan, and both give the saved codes."""
    store, plan = CalibrationStore.load(saved / "store"), Plan.load(saved / "plan.json")
    for config in (PTQ4DMConfig(), PTQ4DMConfig(plan=plan)):
        model = UNet2DModel.from_pretrained(saved / "unet")
        ptq4dm.quantize(model, config, store)
        assert ptq4dm.quantization_config(model).plan == plan
        assert is_file(model, saved / "w8a8" / "unet" / WEIGHTS)

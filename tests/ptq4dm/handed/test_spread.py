"""A quantized, fused model spread by accelerate: over devices, the CPU and a disk, the answers of one that is not."""

import copy

import pytest
import torch
from accelerate import dispatch_model
from accelerate.hooks import remove_hook_from_submodules

import denoisers
import ptq4dm
from ptq4dm.calibration.record import replay
from ptq4dm.handed import norms as NORMS

CUDA = torch.cuda.device_count()
RECIPES = {
    "svdq": lambda: ptq4dm.SVDQuantConfig(rank=8, num_tuples=2, smoothing=0.5, rounding="nearest", refinements=0),
    "w8a8": lambda: ptq4dm.RTNConfig(activations="dynamic"),
    "progressive": lambda: ptq4dm.QoQConfig(rounding="nearest", group_size=32, rotation=None, smoothing="none"),
}
BLOCKS = ("transformer_blocks", "single_transformer_blocks")
pytestmark = pytest.mark.usefixtures("one_thread")
_made = {}


def quantized(recipe):
    if recipe not in _made:
        model, store = denoisers.pair("flux")
        ptq4dm.quantize(model, RECIPES[recipe](), store)
        _made[recipe] = model, store.calls
    model, calls = _made[recipe]
    return copy.deepcopy(model), calls


def spread(model, *places):
    """Its blocks in turn on these places, the rest on the first."""
    names = [name for name, _ in model.named_children() if name not in BLOCKS]
    blocks = [f"{name}.{i}" for name in BLOCKS for i in range(len(getattr(model, name)))]
    return dict.fromkeys(names, places[0]) | {name: places[-1 - i % 2] for i, name in enumerate(blocks)}


@pytest.mark.parametrize("recipe", list(RECIPES))
def test_parts_on_the_cpu_and_on_disk(recipe, tmp_path, monkeypatch):
    """A module whose weights come and go has hooks, and is called as it is written."""
    model, calls = quantized(recipe)
    before = replay(model, calls)
    ptq4dm.fuse(model)
    monkeypatch.setattr(NORMS, "on_kernels", lambda _: True)
    fused = replay(model, calls)
    assert (fused - before).norm() < 0.02 * before.norm()
    model = dispatch_model(model, spread(model, "cpu", "disk"), main_device="cpu", offload_dir=tmp_path)
    assert any(parameter.is_meta for parameter in model.parameters())
    assert torch.equal(replay(model, calls), before)
    remove_hook_from_submodules(model)


@pytest.mark.gpu
@pytest.mark.skipif(CUDA < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize("recipe", list(RECIPES))
def test_parts_on_two_gpus(recipe):
    model, calls = quantized(recipe)
    torch.nn.Module.bfloat16(model).cuda()
    ptq4dm.fuse(model)
    before = replay(model, calls).cpu()
    model = dispatch_model(model, spread(model, 0, 1))
    assert {p.device.index for p in model.parameters()} == {0, 1}
    assert torch.equal(replay(model, calls).cpu(), before)
    assert torch.equal(replay(model, calls).cpu(), before)  # from recordings of its launches

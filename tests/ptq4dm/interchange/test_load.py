"""Whole files of other tools into a model: its weights are those of the codes, its outputs those of such weights."""

import copy

import numpy as np
import pytest
import torch

import foreign_files as files
from helpers import distance
from ptq4dm import load_quantized_file
from ptq4dm.interchange.names import in_names_of
from ptq4dm.interchange.rows import Found
from ptq4dm.layers.base import is_quantized

PACKERS = {
    "comfy fp8": (files.comfy_fp8, "FP8 dynamic", 0.05),
    "bfl fp8r": (files.bfl_fp8r, "FP8 dynamic", 0.05),
    "comfy int8": (files.comfy_int8, "W8A8 dynamic", 0.02),
    "comfy int8 convrot": (files.comfy_int8_convrot, "W8A8 hadamard 64 dynamic", 0.02),
    "comfy int4 convrot": (files.comfy_int4_convrot, "W4A8 hadamard 256 dynamic", 0.02),
    "comfy nvfp4": (files.comfy_nvfp4, "W4A4 nvfp4", 0.3),
    "bfl nvfp4": (files.bfl_nvfp4, "W4A4 nvfp4", 0.3),
    "comfy awq": (files.comfy_awq, "W4A16 blocks g64 offsets", 1e-5),
}
GGUF = {
    "Q8_0": (files.Q8_0, files.q8_0, "W8A16 blocks g32"),
    "Q4_K": (files.Q4_K, files.q4_k, "W4A16 blocks g32 offsets nested"),
}


@pytest.fixture(scope="module")
def model():
    return files.flux2()


def of(exact, model):
    """A float copy of the model with the weights [original name -> float64] of a file."""
    found = Found(
        "here", {}, {name: torch.from_numpy(np.ascontiguousarray(one)).float() for name, one in exact.items()}
    )
    state = in_names_of(model, found).tensors
    twin = copy.deepcopy(model)
    twin.load_state_dict(state)
    return twin


def check(loaded, exact, model, plan, bound):
    """Weights are the file's, all layers that were packed have the plan, outputs are near those of the float twin."""
    twin = of(exact, model)
    layers = {name: one for name, one in loaded.named_modules() if is_quantized(one)}
    packed = sum(files.matrices(name, one) for name, one in exact.items())
    assert len(layers) == packed + 4 and {str(one.plan) for one in layers.values()} == {plan}  # two qkv become six
    for name, one in layers.items():
        right = twin.get_submodule(name).weight
        assert distance(one.dequantized_weight(), right) < 1e-6, name
    assert torch.equal(loaded.x_embedder.weight, twin.x_embedder.weight)
    error = distance(files.run_flux2(loaded), files.run_flux2(twin))
    assert error < bound and distance(files.run_flux2(loaded), files.run_flux2(model)) > 1e-4
    return error


@pytest.mark.parametrize("metadata", ["layer", "header"])
@pytest.mark.parametrize("kind", PACKERS)
def test_safetensors(kind, metadata, model, tmp_path):
    packer, plan, bound = PACKERS[kind]
    exact = files.save_comfy(
        tmp_path / "file", files.original_names(model), packer, files.matrices, metadata, "model.diffusion_model."
    )
    loaded = load_quantized_file(files.flux2(seed=9), tmp_path / "file")
    check(loaded, exact, model, plan, bound)


@pytest.mark.parametrize("kind", GGUF)
def test_gguf(kind, model, tmp_path):
    number, packer, plan = GGUF[kind]
    exact = files.save_gguf_state(tmp_path / "file.gguf", files.original_names(model), number, packer)
    loaded = load_quantized_file(files.flux2(seed=9), tmp_path / "file.gguf")
    check(loaded, exact, model, plan, 1e-5)

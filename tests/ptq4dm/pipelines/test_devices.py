"""Devices and dtypes, as text or as PyTorch's own."""

import pytest
import torch

import ptq4dm
from ptq4dm.errors import UserError
from ptq4dm.pipelines.devices import DTYPES, check_device, dtype_of
from ptq4dm.samplers import DisBackConfig


@pytest.mark.parametrize("name", DTYPES)
def test_a_dtype_has_three_names(name):
    assert {dtype_of(given) for given in (name, f"torch.{name}", getattr(torch, name))} == {getattr(torch, name)}


@pytest.mark.parametrize(
    "dtype",
    ["fp16", "float64", "int8", "", "torch", "nn", "Tensor", 16, None, True, float, torch.int8, torch.complex64],
)
def test_other_dtypes_are_refused_by_a_list_of_those_there_are(dtype):
    for call in (dtype_of, lambda dtype: ptq4dm.load_reference(dtype=dtype)):
        with pytest.raises(UserError, match="dtype must be "):
            call(dtype)


def test_a_pipeline_takes_the_name_of_a_dtype():
    assert ptq4dm.load_reference(dtype="torch.float16").unet.dtype == torch.float16
    assert ptq4dm.load_pipeline("unet-cifar10", torch_dtype="bfloat16").unet.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("given", "precision"),
    [("no", "no"), ("bf16", "bf16"), (torch.bfloat16, "bf16"), ("torch.bfloat16", "bf16"), ("float32", "no")],
)
def test_the_precision_of_a_distillation_has_the_same_names(given, precision):
    assert DisBackConfig(precision=given).precision == precision


@pytest.mark.parametrize("dtype", ["float16", torch.float64, "fp16", 5, None])
def test_and_no_others(dtype):
    with pytest.raises(UserError, match="precision must be"):
        DisBackConfig(precision=dtype)


@pytest.mark.parametrize("device", ["cpu", "cpu:0", torch.device("cpu")])
def test_a_device_that_is_there(device):
    assert check_device(device) == torch.device(device)


@pytest.mark.parametrize("device", ["meta", torch.device("meta"), "meta:0"])
def test_a_device_without_values_is_refused(device):
    with pytest.raises(UserError, match="holds shapes and no values"):
        check_device(device)
    with pytest.raises(UserError, match="holds shapes and no values"):
        ptq4dm.load_reference(device=device)


@pytest.mark.parametrize(
    "device",
    [
        "",
        "gpu",
        "cuda:-1",
        "cuda:99",
        "cpu\0",
        "hpu",
        "vulkan",
        "xla",
        "privateuseone",
        99,
        -1,
        10**30,
        1.5,
        None,
        True,
    ],
)
def test_a_device_that_is_not_there_is_a_sentence(device):
    with pytest.raises(UserError, match="^device "):
        check_device(device)

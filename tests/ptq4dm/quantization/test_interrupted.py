"""Ctrl-C in the middle of a verb: the model is as it was, to the bit, or all of it is done."""

import importlib

import pytest
import torch
from diffusers import DDIMScheduler, DDPMPipeline

import ptq4dm
from models import dit, plain_unet, unet
from ptq4dm.layers.base import holds_quantized
from ptq4dm.layers.fusing.fuse import unfuse
from ptq4dm.pipelines.sampling import sample
from states import interrupted_at, lines_of, state_of

pytestmark = pytest.mark.usefixtures("one_thread")
CALIBRATION = ptq4dm.CalibrationConfig(num_samples=2, num_inference_steps=2, num_bins=2, batch_size=2)
MAX = ptq4dm.PTQ4DMConfig(objective="max")
quantize_module = importlib.import_module("ptq4dm.quantization.quantize")


def pipeline():
    return DDPMPipeline(unet().train(), DDIMScheduler())


@pytest.fixture(scope="module")
def store():
    return ptq4dm.collect(pipeline(), CALIBRATION)


def check(make, work, tries=8):
    """Interrupt work(pipeline) at lines from its first to its last."""
    work(make())  # what is imported or kept at the first call is not of the second
    done = make()
    lines, interrupted = lines_of(lambda: work(done)), 0
    model, before = None, None
    for number in torch.linspace(1, lines - 1, tries).long().tolist():
        if model is None:
            pipe = make()
            model, before = pipe.unet, state_of(pipe.unet)
        interrupted += interrupted_at(number, lambda pipe=pipe: work(pipe))
        if (after := state_of(model)) != before:
            assert {k: type(v) for k, v in after.items()} == {k: type(v) for k, v in state_of(done.unet).items()}
            assert all(torch.equal(a, b) for a, b in zip(model.parameters(), done.unet.parameters(), strict=True))
            model = None
    assert interrupted >= tries - 1


def test_quantize():
    check(pipeline, lambda pipe: ptq4dm.quantize(pipe, ptq4dm.RTNConfig(activations="dynamic")))


def test_quantize_with_transforms(store):
    config = ptq4dm.PTQ4DMConfig(objective="max", transforms=("smooth",))
    check(pipeline, lambda pipe: ptq4dm.quantize(pipe, config, store))


def test_collect():
    check(pipeline, lambda pipe: ptq4dm.collect(pipe, CALIBRATION))


def test_sample():
    check(pipeline, lambda pipe: sample(pipe, [0], num_inference_steps=2))


def test_fuse_and_back(store):
    def quantized():
        pipe = pipeline()
        ptq4dm.quantize(pipe, MAX, store)
        return pipe

    def fused():
        pipe = quantized()
        ptq4dm.fuse(pipe)
        return pipe

    check(quantized, ptq4dm.fuse, 6)
    check(fused, unfuse, 6)
    check(quantized, lambda pipe: pipe.unet.dequantize(), 6)


class Two(DDPMPipeline):
    """A pipeline of two networks."""

    def __init__(self, unet, transformer_2, scheduler):
        super().__init__(unet, scheduler)
        self.register_modules(transformer_2=transformer_2)


@pytest.mark.parametrize("place", ["replace_module", "link_layers", "mark_quantized"])
def test_all_networks_of_a_pipeline_or_none(monkeypatch, place):
    pipe = Two(plain_unet(), dit(num_layers=1), DDIMScheduler())
    networks = [pipe.unet, pipe.transformer_2]
    before = [state_of(network) for network in networks]
    own, calls = getattr(quantize_module, place), []
    config = ptq4dm.RTNConfig(activations="dynamic")

    def stop_at(number):
        def call(*args):
            calls.append(args)
            if len(calls) == number:
                raise KeyboardInterrupt
            return own(*args)

        return call

    number = 1
    while True:
        calls.clear()
        monkeypatch.setattr(quantize_module, place, stop_at(number))
        try:
            ptq4dm.quantize(pipe, config)
        except KeyboardInterrupt:
            assert [state_of(network) for network in networks] == before
            number += 1
            continue
        break
    assert number > 2 and all(map(holds_quantized, networks))

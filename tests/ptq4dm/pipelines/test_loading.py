"""Loading beside threads that quantize and sample: diffusers changes the process's defaults while it loads."""

import threading
import warnings
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from diffusers import DDIMScheduler, DDPMPipeline

import ptq4dm
from models import plain_unet
from ptq4dm.kernels.formats.int8 import quantize_activation_uint8
from ptq4dm.pipelines.loading import loading, not_while_loading
from ptq4dm.pipelines.sampling import sample

pytestmark = pytest.mark.usefixtures("one_thread")
DYNAMIC = ptq4dm.RTNConfig(activations="dynamic")


def test_two_threads_load_while_others_quantize_and_sample(tmp_path):
    made = [DDPMPipeline(plain_unet(), DDIMScheduler()) for _ in range(12)]
    made[0].save_pretrained(tmp_path)
    image = sample(made[0], [3], num_inference_steps=2)
    ptq4dm.quantize(made[0], DYNAMIC)
    expected, stop = list(made[0].unet.parameters()), threading.Event()

    def load():
        number = 0
        while not stop.is_set():
            pipe = ptq4dm.load_pipeline(tmp_path, dtype=torch.float16)
            assert {(p.dtype, p.device.type) for p in pipe.unet.parameters()} == {(torch.float16, "cpu")}
            number += 1
        return number

    with ThreadPoolExecutor(2) as pool:
        loads = [pool.submit(load) for _ in range(2)]
        try:
            for pipe in made[1:]:
                assert torch.equal(sample(pipe, [3], num_inference_steps=2), image)
                ptq4dm.quantize(pipe, DYNAMIC)
                assert all(torch.equal(a, b) for a, b in zip(pipe.unet.parameters(), expected, strict=True))
        finally:
            stop.set()
        assert all(load.result() for load in loads)
    assert torch.get_default_dtype() is torch.float32
    assert torch.nn.Linear(1, 1).weight.device.type == "cpu"


def test_who_works_may_load():
    with not_while_loading(), loading(), not_while_loading(), loading():
        pass


def test_work_waits_for_a_load_and_a_load_for_work():
    order, inside = [], threading.Event()

    def other(door, word):
        inside.set()
        with door():
            order.append(word)

    for mine, theirs in ((loading, not_while_loading), (not_while_loading, loading)):
        order.clear()
        inside.clear()
        with ThreadPoolExecutor(1) as pool:
            with mine():
                waiting = pool.submit(other, theirs, "theirs")
                assert inside.wait(60)
                order.append("mine")
            waiting.result(60)
        assert order == ["mine", "theirs"]


def test_kernels_leave_the_filters_of_warnings_alone():
    """They are the whole process's, and threads that change them put back each other's."""
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        quantize_activation_uint8(torch.ones(2, 4), 0.1, 0)  # what torch says once is heard here, at the latest
        filters, version = warnings.filters, list(warnings.filters)
        quantize_activation_uint8(torch.ones(2, 4), 0.1, 0)
        assert warnings.filters is filters and filters == version
    assert not seen

"""Threads: what each samples, collects or quantizes alone, it does beside others, to the bit."""

import functools
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from diffusers import DDIMScheduler, DDPMPipeline, DDPMScheduler, ImagePipelineOutput
from diffusers.utils.torch_utils import randn_tensor

import ptq4dm
from models import unet
from ptq4dm.calibration.sampled import record_calls
from ptq4dm.errors import UserError
from ptq4dm.layers.base import holds_quantized
from ptq4dm.pipelines.denoiser import turn_at
from ptq4dm.pipelines.sampling import sample

pytestmark = pytest.mark.usefixtures("one_thread")
CALIBRATION = ptq4dm.CalibrationConfig(num_samples=4, num_inference_steps=3, num_bins=2, batch_size=2)
DYNAMIC = ptq4dm.RTNConfig(activations="dynamic")


def pipeline(seed=0, scheduler=None):
    pipe = DDPMPipeline(unet(seed), scheduler or DDPMScheduler())
    pipe.set_progress_bar_config(disable=True)
    return pipe


def plain(pipe, seed):
    """The pipeline called by its user, without this library."""
    return pipe(generator=[torch.Generator().manual_seed(seed)], num_inference_steps=4, output_type="pt").images


class Waiting(DDPMPipeline):
    """Float16 noise of a size where it is not the rounded float32 noise; stops before it draws."""

    def __call__(self, generator=None, num_inference_steps=1, output_type="pt"):
        self.arrived.set()
        assert self.go_on.wait(60)
        return ImagePipelineOutput(images=self.drawn(generator))

    def drawn(self, generator):
        return randn_tensor((len(generator), 3, 5, 5), generator=generator, dtype=torch.float16)


@pytest.fixture
def waiting():
    pipe = Waiting(unet(), DDIMScheduler())
    pipe.arrived, pipe.go_on = threading.Event(), threading.Event()
    return pipe


def test_nothing_of_the_process_changes_while_a_pipeline_samples(waiting):
    module, here = sys.modules[DDPMPipeline.__module__], sys.modules[__name__]
    before = module.randn_tensor, here.randn_tensor, dict(vars(DDPMPipeline)), dict(vars(Waiting))
    with ThreadPoolExecutor(1) as pool:
        ours = pool.submit(sample, waiting, [7], num_inference_steps=1)
        assert waiting.arrived.wait(60)
        now = module.randn_tensor, here.randn_tensor, dict(vars(DDPMPipeline)), dict(vars(Waiting))
        assert now == before
        generator = [torch.Generator().manual_seed(7)]
        theirs = waiting.drawn(generator)  # of the same pipeline, by its user, in another thread
        waiting.go_on.set()
    exact = torch.randn(1, 3, 5, 5, generator=torch.Generator().manual_seed(7))
    own = torch.randn(1, 3, 5, 5, generator=torch.Generator().manual_seed(7), dtype=torch.float16)
    assert not torch.equal(own, exact.half())
    assert torch.equal(theirs, own)
    assert torch.equal(ours.result(), exact.half().float().clamp(0, 1))
    assert type(waiting) is Waiting and type(waiting.scheduler) is DDIMScheduler


def test_whatever_is_raised_the_pipeline_is_itself_again():
    class Interrupted(DDPMPipeline):
        def __call__(self, generator=None, num_inference_steps=1, output_type="pt"):
            randn_tensor((1,), generator=generator)
            raise KeyboardInterrupt

    pipe = Interrupted(unet().train(), DDPMScheduler())
    before, scheduler = dict(vars(pipe)), dict(vars(pipe.scheduler))
    with pytest.raises(KeyboardInterrupt):
        sample(pipe, [0], num_inference_steps=2)
    assert type(pipe) is Interrupted and vars(pipe) == before and vars(pipe.scheduler) == scheduler
    assert all(module.training for module in pipe.unet.modules())


class Combined(DDPMPipeline):
    """A pipeline that calls another one, as diffusers' combined pipelines do."""

    def __init__(self, unet, scheduler, inner):
        super().__init__(unet, scheduler)
        self.inner = inner

    def __call__(self, generator=None, num_inference_steps=1, output_type="pt"):
        return ImagePipelineOutput(images=self.inner.drawn(generator))


def test_pipelines_within_a_pipeline_draw_as_it_does(waiting):
    images = sample(Combined(waiting.unet, waiting.scheduler, waiting), [7], num_inference_steps=1)
    exact = torch.randn(1, 3, 5, 5, generator=torch.Generator().manual_seed(7))
    assert torch.equal(images, exact.half().float().clamp(0, 1)) and type(waiting) is Waiting


def test_two_pipelines_of_one_scheduler_or_one_network():
    shared, network = DDPMScheduler(), unet(3)
    pipes = [pipeline(0, shared), pipeline(1, shared), DDPMPipeline(network, DDIMScheduler()),
             DDPMPipeline(network, DDPMScheduler())]  # fmt: skip

    def work(number):
        return torch.cat([sample(pipes[number], [k], num_inference_steps=2 + (k + number) % 3) for k in range(5)])

    alone = [work(number) for number in range(4)]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(work, range(4)))
    assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))


def statistics(store):
    return {name: value for name, value in vars(store.statistics).items() if isinstance(value, torch.Tensor)}


@pytest.mark.parametrize("same", [True, False], ids=["of the same pipeline", "of another pipeline"])
def test_sampling_beside_collect(same):
    pipe = pipeline()
    other = pipe if same else pipeline(1)
    image, store = sample(other, [5, 6], num_inference_steps=6), ptq4dm.collect(pipe, CALIBRATION)
    stop, images = threading.Event(), []

    def keep_sampling():
        while not stop.is_set():
            images.append(sample(other, [5, 6], num_inference_steps=6))
            time.sleep(0)

    with ThreadPoolExecutor(1) as pool:
        sampling = pool.submit(keep_sampling)
        try:
            again = ptq4dm.collect(pipe, CALIBRATION)
        finally:
            stop.set()
        sampling.result()
    assert all(torch.equal(one, image) for one in images)
    found, expected = statistics(again), statistics(store)
    assert found and all(torch.equal(found[name], expected[name]) for name in expected)


def test_sampling_while_the_pipeline_is_quantized():
    """Pictures of the float model, then of the quantized one, and no others."""
    pipe, twin = pipeline(), pipeline()
    before = sample(pipe, [5], num_inference_steps=3)
    ptq4dm.quantize(twin, DYNAMIC)
    after = sample(twin, [5], num_inference_steps=3)
    assert not torch.equal(before, after)
    with ThreadPoolExecutor(1) as pool:
        made = pool.submit(lambda: [sample(pipe, [5], num_inference_steps=3) for _ in range(20)])
        ptq4dm.quantize(pipe, DYNAMIC)
    kinds = [0 if torch.equal(one, before) else 1 if torch.equal(one, after) else 2 for one in made.result()]
    assert 2 not in kinds and kinds == sorted(kinds)


def test_two_threads_quantize_one_pipeline_once():
    pipe = pipeline()

    def work(_):
        try:
            return ptq4dm.quantize(pipe, DYNAMIC)
        except UserError as error:
            return str(error)

    with ThreadPoolExecutor(2) as pool:
        results = list(pool.map(work, range(2)))
    assert sum(isinstance(one, str) and "quantized already" in one for one in results) == 1
    assert holds_quantized(pipe.unet)


def test_calls_of_other_threads_are_not_recorded():
    model = unet()
    x = torch.randn(1, 3, 8, 8)
    with ptq4dm.record(model) as calls, ThreadPoolExecutor(1) as pool:
        model(x, 10)
        pool.submit(model, x, 20).result()
        model(x, 30)
    assert calls.timestep.tolist() == [10, 30]


def test_a_users_own_call_beside_recording_is_left_alone():
    """It is neither recorded nor stopped at the last step that is recorded."""
    pipe, user = pipeline(), pipeline(0)
    user.unet = pipe.unet
    expected = plain(user, 3)
    own, images = pipe.unet.forward, []

    @functools.wraps(own)
    def forward(*args, **kwargs):
        if threading.current_thread() is threading.main_thread() and not images:
            images.append(None)
            with ThreadPoolExecutor(1) as pool:
                images[0] = pool.submit(plain, user, 3).result()
        return own(*args, **kwargs)

    alone = record_calls(pipe, [1], [500.0], num_inference_steps=4)
    pipe.unet.forward = forward
    try:
        beside = record_calls(pipe, [1], [500.0], num_inference_steps=4)
    finally:
        del pipe.unet.forward
    assert torch.equal(images[0], expected)
    assert beside.timestep.tolist() == alone.timestep.tolist() and len(beside) == 1


def test_turns_are_taken_in_one_order():
    """Each takes what the other has, in another order: none waits for ever."""
    one, other = pipeline(0), pipeline(1)

    def work(pipes):
        for _ in range(200):
            with turn_at(*pipes), turn_at(pipes[1]):
                pass
        return True

    with ThreadPoolExecutor(2) as pool:
        assert all(pool.map(work, [(one, other), (other, one)], timeout=60))

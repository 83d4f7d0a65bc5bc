"""On a GPU: no step waits for the device, and a whole generation fits into a CUDA graph."""

import pytest
import torch

from ptq4dm.samplers import DDIMScheduler, DEISScheduler
from ptq4dm.samplers.choices import DEFAULTS
from ptq4dm.samplers.maths.coefficients import RUNGE_KUTTA

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

MAKERS = {
    "ddim": lambda: DDIMScheduler(timestep_grid="quad"),
    **{solver: lambda solver=solver: DEISScheduler(solver=solver) for solver in DEFAULTS if solver != "rho_rk"},
    **{method: lambda method=method: DEISScheduler(solver="rho_rk", rk_method=method) for method in RUNGE_KUTTA},
}


@pytest.fixture
def model():
    """A tiny denoiser of samples [B, 8] that looks at the timestep, too."""
    torch.manual_seed(0)
    layer = torch.nn.Linear(8, 8, device="cuda").requires_grad_(False)
    return lambda x, t: layer(x.float() + 1e-3 * t.float()).to(x.dtype)


def generate(scheduler, model, x, times):
    for t in times:
        x = scheduler.step(model(x, t), t, x).prev_sample
    return x


def noise(seed, dtype=torch.float32):
    return torch.randn(4, 8, generator=torch.Generator().manual_seed(seed)).to("cuda", dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("first", [0, 4], ids=["from noise", "from the middle"])
@pytest.mark.parametrize("name", MAKERS)
def test_no_step_waits_for_the_device(name, first, dtype, model):
    scheduler = MAKERS[name]()
    scheduler.set_timesteps(5, device="cuda")
    x, times = noise(0, dtype), scheduler.timesteps[first * scheduler.order :]
    generate(scheduler, model, x, times)  # the first use of a kernel may load it
    torch.cuda.synchronize()
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        y = generate(scheduler, model, x, times)
    finally:
        torch.cuda.set_sync_debug_mode(before)
    assert y.device.type == "cuda" and y.dtype == dtype and y.isfinite().all()


@pytest.mark.parametrize("name", MAKERS)
def test_agrees_with_the_cpu(name):
    def model(x, t):
        return torch.sin(1.5 * x) + 0.3 * x

    outputs = []
    for device in ("cpu", "cuda"):
        scheduler = MAKERS[name]()
        scheduler.set_timesteps(5, device=device)
        x = noise(0).to(device, torch.float64)
        outputs.append(generate(scheduler, model, x, scheduler.timesteps).cpu())
    assert torch.allclose(*outputs, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("name", MAKERS)
def test_a_generation_in_a_cuda_graph(name, model):
    scheduler = MAKERS[name]()
    scheduler.set_timesteps(5, device="cuda")
    start = noise(0)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # a warm-up aside, as capture asks for
        for _ in range(2):
            generate(scheduler, model, start, scheduler.timesteps)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        end = generate(scheduler, model, start, scheduler.timesteps)
    for seed in (1, 2):
        start.copy_(noise(seed))
        graph.replay()
        expected = generate(scheduler, model, noise(seed), scheduler.timesteps)
        assert torch.allclose(end, expected, rtol=1e-5, atol=1e-5)

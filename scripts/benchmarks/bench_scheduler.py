"""What a scheduler costs beside its model: the time of one step, in percent of one UNet forward.

    python scripts/benchmarks/bench_scheduler.py [--device cpu] [--batch-size 16] [--steps 20]

unet-cifar10, in float32 on a CPU and float16 on a GPU. Forwards and whole generations of each scheduler (without the
model) alternate in one run, in turning order, so that whatever else the machine does falls on all; the figures are
medians. On a GPU `host` is the time until the calls return, which delays the launch of the next forward; elsewhere it
is the same. `set` is set_timesteps, once for any number of generations of ours.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch

from ptq4dm.errors import run
from ptq4dm.pipelines.denoiser import denoiser
from ptq4dm.pipelines.devices import check_device
from ptq4dm.pipelines.load import load_reference
from ptq4dm.samplers.catalog import make_sampler

SAMPLERS = (
    "ddim",
    "ipndm",
    "t_ab",
    "rho_ab",
    "log_rho",
    "rho_rk",
    "diffusers/ddim",
    "diffusers/deis",
    "diffusers/dpm++2m",
    "diffusers/unipc",
)


def timed(function, device: torch.device) -> tuple[float, float]:
    """Milliseconds until the call returns, and until the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    begin = time.perf_counter()
    function()
    returned = time.perf_counter()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return (returned - begin) * 1e3, (time.perf_counter() - begin) * 1e3


def generation(scheduler, x: torch.Tensor, output: torch.Tensor):
    """All steps of one generation, with the model's output made beforehand."""
    for t in scheduler.timesteps:
        x = scheduler.step(output, t, x).prev_sample
    return x


@torch.no_grad()
def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    device = check_device(args.device)
    dtype = torch.float16 if device.type == "cuda" else torch.float32
    pipe = load_reference("unet-cifar10", dtype=dtype, device=device)
    model = denoiser(pipe).eval()
    x = torch.randn(args.batch_size, 3, 32, 32, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    t = torch.full((args.batch_size,), 500, device=device)

    schedulers = {name: make_sampler(name, pipe.scheduler.config) for name in SAMPLERS}
    forward, steps, sets = [], {name: [] for name in SAMPLERS}, {name: [] for name in SAMPLERS}
    for turn in range(args.rounds + 2):  # the first two to warm up
        forward.append(timed(lambda: model(x, t).sample, device)[1])
        for k in range(len(SAMPLERS)):
            name = SAMPLERS[(turn + k) % len(SAMPLERS)]
            scheduler = schedulers[name]
            sets[name].append(timed(lambda s=scheduler: s.set_timesteps(args.steps, device=device), device)[1])
            host, whole = timed(lambda s=scheduler: generation(s, x, x), device)
            steps[name].append((host / len(scheduler.timesteps), whole / len(scheduler.timesteps)))
    unet = statistics.median(forward[2:])
    print(f"unet-cifar10, batch {args.batch_size}, {dtype}, {device}: {unet:.1f} ms a forward; {args.steps} steps")
    print(f"{'scheduler':20} {'step':>8} {'of a forward':>13} {'host':>8} {'set':>9}")
    for name in SAMPLERS:
        host, whole = (statistics.median(column) for column in zip(*steps[name][2:], strict=True))
        print(
            f"{name:20} {whole * 1e3:5.0f} us {whole / unet:13.3%} {host * 1e3:5.0f} us "
            f"{statistics.median(sets[name][2:]):6.1f} ms"
        )


if __name__ == "__main__":
    run(main)

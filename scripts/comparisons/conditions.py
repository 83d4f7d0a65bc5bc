"""What stands beside a figure: bytes as float16 has them, seconds and memory of a step of work, card and commit."""

from __future__ import annotations

import copy
import gc
import subprocess
import time
from contextlib import contextmanager
from pathlib import Path

import torch

from ptq4dm import __version__
from ptq4dm.layers.sizes import stored_bytes

REPOSITORY = Path(__file__).resolve().parents[2]


def in_dtype(model: torch.nn.Module, dtype: torch.dtype) -> torch.nn.Module:
    """A copy of a model in another dtype; codes stay what they are, and scales that a layer keeps."""
    return torch.nn.Module.to(copy.deepcopy(model), dtype)  # diffusers' own refuses quantized models


def bytes_of_float16(model: torch.nn.Module) -> int:
    """Bytes of all tensors of a float32 model, were it one of float16."""
    return stored_bytes(in_dtype(model, torch.float16))


@contextmanager
def tensor_float32(on: bool):
    """Matrix products of float32 in TF32: ten thousand images in half the time; no paired figure is made so."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = on
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


@contextmanager
def watched(device: str):
    """A dict that holds, once the block is left, "seconds" and "peak_memory": bytes beyond what was taken before.

    On a GPU those are of torch's allocator; on a CPU the process's, None where the system does not tell (no Linux).
    """
    cost: dict = {}
    cuda = torch.device(device).type == "cuda"
    if cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    else:
        before = _resident(reset=True)
    start = time.perf_counter()
    yield cost
    if cuda:
        torch.cuda.synchronize()
    cost["seconds"] = round(time.perf_counter() - start, 2)
    after = torch.cuda.max_memory_allocated() if cuda else _resident()
    cost["peak_memory"] = None if before is None or after is None else max(after - before, 0)


def _resident(reset: bool = False) -> int | None:
    """The largest resident memory of this process, in bytes, since the last reset."""
    try:
        if reset:
            Path("/proc/self/clear_refs").write_text("5")
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))
    except (OSError, StopIteration):
        return None


def free_memory(device: str) -> None:
    """Give back what the last row left behind."""
    gc.collect()
    if torch.device(device).type == "cuda":
        torch.cuda.empty_cache()


def device_name(device: str) -> str:
    """The GPU's name; of a CPU what it can compute, and with how many threads."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU ({torch.backends.cpu.get_cpu_capability()}), {torch.get_num_threads()} threads"


def commit() -> str | None:
    """The commit that is checked out, with "+" where files differ from it; None without git."""

    def git(*words: str) -> str:
        done = subprocess.run(["git", "-C", str(REPOSITORY), *words], capture_output=True, text=True, check=True)
        return done.stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def stores_of(args) -> Path:
    """The folder of calibrations and of blocks that are kept: args.stores, or one beside args.output."""
    return args.stores or args.output.with_name(f"{args.output.stem}-calibration")


def calibration_folder(args, model: str, law: str, config) -> Path:
    """Where a calibration is kept for all processes and later commands: args.stores, or beside args.output."""
    name = f"{model}-{law}-{config.num_samples}-of-{config.num_inference_steps}-steps-seed-{config.seed}"
    return stores_of(args) / name.replace("/", "-").replace(" ", "-")


def made_on(device: str) -> dict:
    """The card, the commit and the version that figures were made with."""
    return {"device": device_name(device), "commit": commit(), "version": __version__}

"""Building the kernels of a CPU: whatever goes wrong ends in a kernel that reports name, and in its numbers."""

import os
import re
import signal
import stat
import time
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fresh
from ptq4dm.kernels.cpu import library
from ptq4dm.kernels.runtime import settings
from ptq4dm.kernels.w8a8 import layer as w8a8
from ptq4dm.layers.plan import Int4Plan
from ptq4dm.layers.registry import quantized_copy

ROOT = Path(__file__).resolve().parents[3]
compiled = pytest.mark.usefixtures("compiled")
ASK = "from ptq4dm.kernels.cpu import library; print(library.status(), library.available(), library.status())"


@pytest.fixture
def anew(monkeypatch, tmp_path):
    """An empty folder for what is built; kernels are asked for again, here and after the test."""

    def forget():
        library.forget()
        settings.forget()

    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "extensions"))
    forget()
    yield monkeypatch, tmp_path
    monkeypatch.undo()
    forget()


def layers():
    torch.manual_seed(0)
    layer = nn.Linear(128, 24)
    return [quantized_copy(layer, Int4Plan(group_size=size), "layer") for size in (None, 64)]


def a_compiler(folder: Path, does: str) -> Path:
    """A script that is called as a compiler is; $OUT is what it should make."""
    path = folder / "compiler"
    output = 'while [ $# -gt 0 ]; do [ "$1" = -o ] && OUT=$2; shift; done'
    path.write_text(f'#!/bin/sh\n{output}\n[ "$OUT" ] || exit 0\n{does}\n')
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


@pytest.fixture
def built_before(compiled) -> Path:
    """The library in its usual place: a quick compiler copies it."""
    return library.build(library.capability())


def switched_off(patch, folder):
    patch.setenv(library.SWITCH, "0")
    return "PTQ4DM_CPU_KERNELS=0"


def another_cpu(patch, folder):
    patch.setattr(library, "capability", lambda: None)
    return "for x86 CPUs with AVX2"


def no_folder(patch, folder):
    (folder / "file").touch()
    patch.setenv("TORCH_EXTENSIONS_DIR", str(folder / "file" / "below"))
    return "Not a directory"


def no_compiler(patch, folder):
    patch.setenv("CXX", str(folder / "none"))
    return ""


def no_ninja(patch, folder):
    patch.setenv("PATH", str(folder))
    return "[Nn]inja"


def failing_compiler(patch, folder):
    patch.setenv("CXX", str(a_compiler(folder, "echo 'w4a8.cpp:1: error: no such machine'; exit 1")))
    return "error: no such machine"


def compiler_of_rubbish(patch, folder):
    patch.setenv("CXX", str(a_compiler(folder, "echo rubbish > $OUT")))
    return ""


@pytest.mark.parametrize(
    "wrong", [switched_off, another_cpu, no_folder, no_compiler, no_ninja, failing_compiler, compiler_of_rubbish]
)
@pytest.mark.parametrize("vnni", [True, False])
def test_without_the_kernels_another_one_is_named_and_runs(wrong, vnni, anew):
    patch, folder = anew
    x, quantized = torch.randn(5, 128), layers()
    step = x.abs().amax(1, keepdim=True) / 127
    right = [F.linear((x / step).round() * step, layer.dequantized_weight(), layer.bias) for layer in quantized]
    says = wrong(patch, folder)
    if not vnni:
        patch.setattr(w8a8, "kernel_name", lambda *_: w8a8.REFERENCE)
    rows, groups = (layer.kernel_name() for layer in quantized)
    served = w8a8.kernel_name(torch.device("cpu")) == w8a8.ONEDNN
    assert groups == "reference" and rows == ("onednn-int8 on an int8 copy" if served else "reference")
    assert not library.available() and library.status().startswith("not compiled: ")
    assert re.search(says, library.status())
    for layer, y in zip(quantized, right, strict=True):
        assert (layer(x) - y).abs().max() < 1e-4 * y.abs().max()
    left = list(folder.rglob("*.ptq4dm"))
    assert not left, "a build that failed leaves nothing behind"


def test_nothing_is_built_or_asked_for_by_importing_or_on_other_devices(anew):
    from ptq4dm.kernels.cpu import w4a8

    patch, folder = anew
    assert not w4a8.serves(torch.device("cuda")) and not w4a8.serves(torch.device("meta"))
    assert library.status() is None
    code = f"import ptq4dm, ptq4dm.layers.int4; {ASK.replace('library.available()', '1')}"
    said = fresh.printed(code, said=folder / "said", TORCH_EXTENSIONS_DIR=str(folder))
    assert said.split() == ["None", "1", "None"]
    assert not list(folder.glob("*/*"))


@compiled
def test_the_kernel_is_named_where_it_serves():
    assert [layer.kernel_name() for layer in layers()] == ["cpu-w4a8"] * 2
    assert library.status() == f"compiled for {library.capability()} in {library.build(library.capability())}"


def test_instructions_that_a_cpu_does_not_have(monkeypatch):
    monkeypatch.setattr(library, "capability", lambda: "avx2")
    with pytest.raises(ValueError, match="does not have avx512-vnni"):
        library.use("avx512-vnni")


def test_a_damaged_file_is_made_again(built_before, anew):
    patch, folder = anew
    patch.setenv("CXX", str(a_compiler(folder, f"cp {built_before} $OUT")))
    path = library.build(library.capability())
    right = path.read_bytes()
    path.unlink()  # it may be loaded, and is not to change under this process
    path.write_bytes(right[:100])
    assert library.available() and path.read_bytes() == right


def test_two_processes_build_once_and_a_killed_one_holds_nobody_up(built_before, anew):
    """The compiler writes a line for each call: the one that is killed gets as far as its first."""
    _, folder = anew
    log = folder / "log"
    slow = a_compiler(folder, f"echo $OUT >> {log}; [ -e {folder}/quick ] || sleep 60; cp {built_before} $OUT")
    place = {"TORCH_EXTENSIONS_DIR": str(folder / "new"), "CXX": str(slow)}
    first = fresh.begin(ASK, said=folder / "first", **place)
    until(lambda: log.exists() and log.read_text())
    os.killpg(first.pid, signal.SIGKILL)
    assert first.wait() == -signal.SIGKILL
    assert list((folder / "new" / "ptq4dm").glob(".*")), "it was killed in its work"
    (folder / "quick").touch()
    log.unlink()
    both = [fresh.begin(ASK, said=folder / name, **place) for name in ("one", "other")]
    assert [one.wait() for one in both] == [0, 0]
    outputs = [one.text().splitlines()[-1] for one in both]
    assert all(text.startswith("None True compiled for") for text in outputs), outputs
    assert log.read_text().count(".so") == 1, "one linked, the other waited"
    assert [path.suffix for path in sorted((folder / "new" / "ptq4dm").iterdir())] == [".lock", ".so"]


def until(done, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < end
        time.sleep(0.05)

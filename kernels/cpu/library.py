"""The compiled kernels of this CPU: built at their first use, kept on disk, or the reason why there are none.

    available()     whether they are there; the first to ask builds them, in ten seconds or a minute
    status()        a sentence for reports: where they were compiled, or why not; None while nobody has asked

PyTorch's own loader of extensions builds them, with `c++` or $CXX and ninja, in its folder ($TORCH_EXTENSIONS_DIR,
else torch_extensions in the user's folder for caches). A file is named by a hash of its sources, the flags and the
version of PyTorch, and is made in a hidden folder beside it that becomes its own by one rename: it is whole at any
time. Processes wait for the one that builds; where that one dies, the next builds. PTQ4DM_CPU_KERNELS=0 in the
environment refuses them.

Served are x86 CPUs with AVX-512 VNNI, or with AVX2. Where there are no compiled kernels, for whatever reason,
`serves` of the kernels is False, and reports name the kernel that runs instead.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import torch

from ..runtime.atomic import hidden_folder, sweep

try:
    import fcntl
except ImportError:  # Windows, where nothing is built
    fcntl = None  # type: ignore[assignment]

SOURCES = tuple(
    Path(__file__).with_name(name) for name in ("codes.cpp", "l1.cpp", "lut.cpp", "w4_ends.cpp", "w4a8.cpp")
)
HEADERS = tuple(Path(__file__).with_name(name) for name in ("room.h", "vectors.h"))
SWITCH = "PTQ4DM_CPU_KERNELS"
FLAGS = {
    "avx512-vnni": "-mavx512f -mavx512bw -mavx512dq -mavx512vl -mavx512vnni -mavx2 -mfma -mf16c",
    "avx2": "-mavx2 -mfma -mf16c",
}


@dataclass(frozen=True)
class Found:
    """kernels: the library of them, or None; text: where it is, or why there is none."""

    kernels: ctypes.CDLL | None
    text: str


_found: Found | None = None
_guard = threading.Lock()


def available() -> bool:
    """Whether the kernels are compiled and loaded."""
    return found().kernels is not None


def status() -> str | None:
    """A sentence on the kernels of this process; None while nobody has asked for them."""
    return None if _found is None else _found.text


def found() -> Found:
    """The library, built if need be; asked once in a process."""
    global _found
    if _found is None:
        with _guard:  # of several threads one builds
            if _found is None:
                _found = _find()
    return _found


def use(instructions: str) -> None:
    """Load the kernels for these instructions, a key of FLAGS, in the place of those that are best here.

    Raises ValueError where this CPU does not have them; what `build` raises.
    """
    global _found
    if instructions != capability() and not (instructions == "avx2" and torch.cpu._is_avx2_supported()):
        raise ValueError(f"this CPU does not have {instructions}.")
    path = build(instructions)
    _found = Found(load(path), f"compiled for {instructions} in {path}")


@contextmanager
def switched_off() -> Iterator[None]:
    """No kernels in this block, as if there were no compiler; for layers that ask in each call, as SVDQuant's do."""
    global _found
    before = found()
    _found = Found(None, "not compiled: switched off")
    try:
        yield
    finally:
        _found = before


def forget() -> None:
    """Ask again at the next call."""
    global _found
    _found = None


def capability() -> str | None:
    """The instructions that this CPU has for the kernels, a key of FLAGS; None where it has neither."""
    if torch.cpu._is_avx512_supported() and torch.cpu._is_vnni_supported():
        return "avx512-vnni"
    return "avx2" if torch.cpu._is_avx2_supported() else None


def build(instructions: str, folder: Path | None = None) -> Path:
    """The file of the kernels for these instructions, in `folder` or PyTorch's own; made if it is not there.

    Raises what a failed build raises: OSError, RuntimeError, ImportError and others.
    """
    folder = _folder() if folder is None else folder
    flags = ["-O3", "-fno-trapping-math", *FLAGS[instructions].split()]
    made_of = [source.read_bytes() for source in (*SOURCES, *HEADERS)]
    made_of += [torch.__version__.encode(), " ".join(flags).encode()]
    key = hashlib.sha256(b"\0".join(made_of)).hexdigest()[:16]
    name = f"kernels_{instructions.replace('-', '_')}_{key}"
    path = folder / f"{name}.so"
    if path.is_file():
        return path
    folder.mkdir(parents=True, exist_ok=True)
    sweep(folder)  # what a build left that was killed
    with _alone(folder / f"{name}.lock"):
        if not path.is_file():
            with hidden_folder(path) as beside:
                inside = beside / "build"  # PyTorch keeps a lock of its own there, which a killed build leaves
                inside.mkdir()
                _compile(name, flags, inside)
                (made,) = inside.glob("*.so")  # PyTorch adds a number to the name when a process builds twice
                os.replace(made, path)
    return path


def load(path: Path) -> ctypes.CDLL:
    """The library in this file. Raises OSError where it is none."""
    library = ctypes.CDLL(str(path))
    pointer, size, number = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32
    library.ptq4dm_w4a8.argtypes = (
        [pointer] * 3 + [number] + [pointer] * 4 + [size] * 4 + [ctypes.c_float, number, number]
    )
    library.ptq4dm_w4a8.restype = ctypes.c_int
    library.ptq4dm_w4_of_codes.argtypes = (
        [pointer] * 2 + [number] + [pointer] * 2 + [number] + [pointer] * 2 + [size] * 4
    )
    library.ptq4dm_w4_of_codes.restype = ctypes.c_int
    library.ptq4dm_inputs.argtypes = [pointer] * 2 + [ctypes.c_float] + [pointer] * 2 + [size] * 3 + [number] * 2
    library.ptq4dm_inputs.restype = ctypes.c_int
    library.ptq4dm_gelu_tanh.argtypes = [pointer, size]
    library.ptq4dm_gelu_tanh.restype = None
    library.ptq4dm_w4a8_conv.argtypes = (
        [pointer] * 3 + [number] + [pointer] * 5 + [size] * 2 + [pointer, number, number]
    )
    library.ptq4dm_w4a8_conv.restype = ctypes.c_int
    library.ptq4dm_lut.argtypes = [pointer] * 4 + [ctypes.c_int] + [pointer] * 2 + [size] * 5
    library.ptq4dm_lut.restype = ctypes.c_int
    library.ptq4dm_l1_norm.argtypes = [pointer] * 6 + [size] * 4 + [ctypes.c_float] * 2
    library.ptq4dm_l1_norm.restype = ctypes.c_int
    library.ptq4dm_l1_gradient.argtypes = [pointer] * 4 + [size] + [pointer] * 2 + [size] * 5
    library.ptq4dm_l1_gradient.restype = ctypes.c_int
    real, grid = ctypes.c_float, [number] + [ctypes.c_float] * 4
    library.ptq4dm_group_norm.argtypes = [pointer, number] + [pointer] * 4 + [size] * 4 + [real, number, *grid]
    library.ptq4dm_group_norm.restype = ctypes.c_int
    library.ptq4dm_layer_norm.argtypes = [pointer] * 2 + [number] + [pointer] * 5 + [size] * 3 + [real, *grid]
    library.ptq4dm_layer_norm.restype = ctypes.c_int
    library.ptq4dm_codes.argtypes = [pointer, number, pointer, size] + [real] * 4
    library.ptq4dm_codes.restype = None
    return library


def _find() -> Found:
    if os.environ.get(SWITCH) == "0":
        return Found(None, f"not compiled: {SWITCH}=0 in the environment")
    instructions = capability()
    if fcntl is None or instructions is None:
        return Found(None, "not compiled: they are for x86 CPUs with AVX2 or more, on Linux and macOS")
    try:
        path = build(instructions)
        try:
            library = load(path)
        except OSError:  # no library, say of a disk that was full: once more
            path.unlink()
            path = build(instructions)
            library = load(path)
    except Exception as error:  # whatever a compiler, a disk or a version of PyTorch may do: it is told, and named
        return Found(None, f"not compiled: {_reason(error)}")
    return Found(library, f"compiled for {instructions} in {path}")


def _folder() -> Path:
    if named := os.environ.get("TORCH_EXTENSIONS_DIR"):
        return Path(os.path.expanduser(named)) / "ptq4dm"
    from torch.utils import cpp_extension  # late: it takes a while

    return Path(cpp_extension.get_default_build_root()) / "ptq4dm"


def _compile(name: str, flags: list[str], folder: Path) -> None:
    from torch.utils import cpp_extension

    cpp_extension.load(
        name, [str(source) for source in SOURCES], flags, build_directory=str(folder), is_python_module=False
    )


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Wait for other processes in this block; a dead one holds nobody up."""
    with open(path, "wb") as file:
        with suppress(OSError):  # a file system without locks: each process builds its own, and the last stays
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _reason(error: Exception) -> str:
    """The line of an error that says most, at most 300 characters."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return next((line for line in lines if "error:" in line.lower()), lines[0])[:300]

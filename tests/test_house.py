"""The house's rules: who may import whom, no circles, no method named outside of its own files."""

import ast
import functools
from collections import defaultdict
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ROOMS = {
    "ptq4dm": "ptq4dm",
    "svdquant": "ptq4dm.svdquant",
    "samplers": "ptq4dm.samplers",
    "kernels": "ptq4dm.kernels",
}

# From the ground up. A folder imports from folders on lines above its own, and from itself; folders on one line are
# neighbours that do not know each other.
FLOORS = """
kernels/formats
kernels/runtime
kernels/cpu
kernels/w4/products
kernels/w8a8  kernels/w4  kernels/attention  kernels/lut
kernels/shift  kernels/tuning  kernels/blocks
kernels
ptq4dm/errors  ptq4dm/version  ptq4dm/lazy  ptq4dm/starting  ptq4dm/tables
ptq4dm/annotations
ptq4dm/checks  ptq4dm/interrupts
ptq4dm/registry  ptq4dm/evidence  ptq4dm/options  ptq4dm/hooks  ptq4dm/undo  ptq4dm/progress
ptq4dm/files
ptq4dm/pipelines
ptq4dm/ranges  ptq4dm/rounding  ptq4dm/transforms  ptq4dm/handed
ptq4dm/layers
ptq4dm/layers/binary  ptq4dm/layers/split  ptq4dm/layers/rotated  ptq4dm/layers/shift  ptq4dm/layers/attention
ptq4dm/layers/fusing  ptq4dm/layers/blocks
ptq4dm/calibration
ptq4dm/allocation  ptq4dm/walk  ptq4dm/seams  ptq4dm/awaited
ptq4dm/reconstruction
ptq4dm/quantization
ptq4dm/budgets  ptq4dm/evaluation  ptq4dm/streaming
ptq4dm/methods  ptq4dm/hardware  ptq4dm/caching  ptq4dm/attention  ptq4dm/comparing
ptq4dm/training  ptq4dm/inference
ptq4dm/training/personalization  ptq4dm/inference/openvino
svdquant/layers
svdquant/nunchaku
svdquant  samplers/maths  ptq4dm/interchange
samplers
samplers/distillation  samplers/comparison  samplers/fitting
ptq4dm/cli
ptq4dm/cli/training  ptq4dm/cli/conversion  ptq4dm/cli/benches
ptq4dm
"""
LEVEL = {folder: i for i, line in enumerate(FLOORS.split("\n")) for folder in line.split()}
FRONT_DOORS = {
    "svdquant/__init__",
    "samplers/__init__",
}  # they show what lies in their folders


def package_of(path: Path) -> str:
    """The dotted name of a file, of a folder for its __init__."""
    room, *rest = path.relative_to(ROOT).with_suffix("").parts
    parts = [ROOMS[room], *(part for part in rest if part != "__init__")]
    return ".".join(parts)


FILES = {package_of(p): p for room in ROOMS for p in sorted((ROOT / room).rglob("*.py"))}


def imports_of(name: str, path: Path):
    """(imported module of ours, line, lazily?) of one file."""
    tree = ast.parse(path.read_text())
    inside = {id(n) for f in ast.walk(tree) if isinstance(f, ast.FunctionDef) for n in ast.walk(f)}
    package = name if path.stem == "__init__" else name.rpartition(".")[0]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*base, *([node.module] if node.module else [])])
            found = [f"{base}.{a.name}" if f"{base}.{a.name}" in FILES else base for a in node.names]
        else:
            continue
        for target in found:
            if target in FILES:
                yield target, node.lineno, id(node) in inside


def folder_of(name: str) -> str:
    """ptq4dm.kernels.w4.layer -> kernels/w4; files at the top of a room stand for the room."""
    where = FILES[name].relative_to(ROOT)
    if where.with_suffix("").as_posix() in LEVEL:
        return where.with_suffix("").as_posix()
    return where.parent.as_posix()


@functools.cache
def edges() -> list[tuple]:
    """(file, what it imports, line, lazily?) of all; made when a test asks, not while tests are collected."""
    return [(name, *edge) for name, path in FILES.items() for edge in imports_of(name, path)]


def test_every_folder_has_a_floor():
    assert {folder_of(name) for name in FILES} == set(LEVEL)


def test_imports_point_down():
    wrong = [
        f"{FILES[name].relative_to(ROOT)}:{line} imports {target}"
        for name, target, line, _ in edges()
        if folder_of(name) != folder_of(target)
        and LEVEL[folder_of(target)] >= LEVEL[folder_of(name)]
        and FILES[name].relative_to(ROOT).with_suffix("").as_posix() not in FRONT_DOORS
    ]
    assert not wrong, "\n".join(wrong)


def test_no_circles():
    """Between files, lazy imports included: a circle that is broken by a late import is still a circle."""
    after = defaultdict(set)
    for name, target, _, _ in edges():
        if target != "ptq4dm":
            after[name].add(target)
    state: dict[str, int] = {}

    def visit(name: str, path: list[str]) -> None:
        state[name] = 1
        for target in after[name]:
            if state.get(target) == 1:
                pytest.fail("a circle: " + " -> ".join([*path[path.index(target) :], target]))
            if target not in state:
                visit(target, [*path, target])
        state[name] = 2

    for name in FILES:
        if name not in state:
            visit(name, [name])


def test_methods_do_not_know_each_other():
    def method(name: str) -> str | None:
        where = FILES[name].relative_to(ROOT).parts
        return name if where[:2] == ("ptq4dm", "methods") else "svdquant" if where[0] == "svdquant" else None

    bases = {f"ptq4dm.methods.{name}" for name in ("choices", "eight_bit", "trained")}
    wrong = [
        f"{FILES[name].relative_to(ROOT)}:{line} imports {target}"
        for name, target, line, _ in edges()
        if method(name) and method(target) and method(name) != method(target) and target not in bases
    ]
    assert not wrong, "\n".join(wrong)


def texts_of(tree: ast.AST):
    """(text, line) of every string in a file that is not a docstring."""
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    docstrings = {id(node.body[0].value) for node in ast.walk(tree) if isinstance(node, documented) and stated(node)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
            yield node.value, node.lineno


def stated(node) -> bool:
    return bool(node.body) and isinstance(node.body[0], ast.Expr) and ast.get_docstring(node, clean=False) is not None


READERS = {"json.load", "json.loads", "np.load", "torch.load", "Image.open", "safe_open", "load_file"}
# Who else reads, and why.
MAY_READ = {
    "ptq4dm.files.outside",
    "ptq4dm.files.pictures",
    "ptq4dm.kernels.runtime.settings",  # says it in a sentence of its own
    "ptq4dm.pipelines.load",  # asks each file of weights for its header, before diffusers reads it
    "ptq4dm.cli.parser",  # a file of the package's own, before PyTorch is there
    "ptq4dm.pipelines.generate",  # a round trip through JSON, of our own values; the next two as well
    "ptq4dm.quantization.packing",
    "ptq4dm.svdquant.nunchaku.export",
    "ptq4dm.svdquant.layers.lender",  # what accelerate has just offloaded
}


LOOKED_THROUGH = ("calibration", "files", "evaluation", "pipelines", "samplers", "kernels", "cli", "layers")


@pytest.mark.parametrize(
    "room", [*LOOKED_THROUGH, "hardware", "interchange", "quantization", "svdquant", "transforms"]
)
def test_data_from_outside_is_read_in_one_place(room):
    """Its errors are sentences, and its size is looked at first: so no file decodes data by itself."""
    wrong = []
    for name, path in FILES.items():
        if name in MAY_READ or f"ptq4dm.{room}." not in f"{name}.":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in READERS:
                wrong.append(f"{path.relative_to(ROOT)}:{node.lineno} calls {ast.unparse(node.func)}")
    assert not wrong, "\n".join(wrong)


@pytest.fixture(scope="module")
def methods() -> dict[str, type]:
    """The methods that register themselves in our rooms; tests and examples add others to the same registry."""
    from ptq4dm.quantization.recipe import METHODS

    return {name: kind for name, kind in METHODS.items() if kind.__module__ in FILES}


def test_methods_are_not_named_below_them_nor_on_the_command_line(methods):
    """Who adds a method adds a file: nobody else has a list of methods, or a special case for one."""
    modules, classes = {kind.__module__ for kind in methods.values()}, {kind.__name__ for kind in methods.values()}
    names = set(methods) - {"ptq4dm"}  # the package's own name says nothing of the method
    assert len(names) >= 2 and len(modules) == len(methods)
    strangers = {
        name: path
        for name, path in FILES.items()
        if LEVEL[folder_of(name)] < LEVEL["ptq4dm/methods"] or folder_of(name) == "ptq4dm/cli"
    }
    assert {"ptq4dm/cli", "ptq4dm/quantization", "ptq4dm/layers", "kernels/w4"} <= set(map(folder_of, strangers))
    wrong = [
        f"{FILES[name].relative_to(ROOT)}:{line} imports {target}"
        for name, target, line, _ in edges()
        if name in strangers and target in modules
    ]
    for path in strangers.values():
        tree = ast.parse(path.read_text())
        where = path.relative_to(ROOT)
        wrong += [f"{where}:{line} names '{text}'" for text, line in texts_of(tree) if text in names]
        wrong += [
            f"{where}:{node.lineno} imports {alias.name}"
            for node in ast.walk(tree)
            if isinstance(node, ast.ImportFrom)
            for alias in node.names
            if alias.name in classes
        ]
    assert not wrong, "\n".join(wrong)


def test_every_folder_says_in_one_line_what_it_is():
    inits = {path for path in FILES.values() if path.stem == "__init__"}
    assert len(inits) > 20
    for path in inits:
        first, *rest = (ast.get_docstring(ast.parse(path.read_text()), clean=False) or "").split("\n")
        assert path.read_text().startswith('"""') and first.strip(), f"{path.relative_to(ROOT)} has no docstring"
        assert first.endswith(".") and (not rest or not rest[0].strip()), f"{path.relative_to(ROOT)}: {first}"


def test_what_takes_a_gpu_where_there_is_one_is_marked_so():
    """Or `pytest -m gpu`, and compute-sanitizer, would pass it by."""
    taking = [path for path in (ROOT / "tests").rglob("test_*.py") if '"cuda" if' in path.read_text()]
    taking.remove(Path(__file__))
    assert len(taking) > 5 and not [path.name for path in taking if "pytest.mark.gpu" not in path.read_text()]


@pytest.mark.parametrize("room", ROOMS)
def test_no_folder_is_a_heap(room):
    heaps = {
        folder.relative_to(ROOT).as_posix(): len(list(folder.glob("*.py")))
        for folder in (ROOT / room).rglob("*")
        if folder.is_dir() and len(list(folder.glob("*.py"))) > 20
    }
    assert not heaps
    assert all(len(p.relative_to(ROOT).parts) <= 4 for p in (ROOT / room).rglob("*.py"))

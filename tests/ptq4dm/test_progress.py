"""Progress bars are shown where somebody looks, and nowhere else; all of ours are made in one place."""

import ast
import io
import sys
from pathlib import Path

import pytest
from tqdm.auto import tqdm

from ptq4dm import progress
from ptq4dm.pipelines.sampling import _quiet

ROOT = Path(__file__).resolve().parents[2]


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def stderr(monkeypatch):
    def put(stream):
        monkeypatch.setattr(sys, "stderr", stream)
        return stream

    return put


def drawn(**more):
    """What is written while three steps go by."""
    assert list(progress.progress_bar(range(3), desc="work", **more)) == [0, 1, 2]
    return "" if sys.stderr is None else sys.stderr.getvalue()


def test_in_a_terminal(stderr):
    stderr(Terminal())
    assert "work: 100%" in drawn()
    stderr(Terminal())
    assert drawn(hidden=True) == ""


@pytest.mark.parametrize("stream", [io.StringIO(), None])
def test_nowhere_else(stderr, stream):
    stderr(stream)
    assert drawn() == "" and not progress.shown()


def test_in_a_notebook(stderr, monkeypatch):
    monkeypatch.setattr(progress, "in_notebook", lambda: True)
    stderr(io.StringIO())
    assert "work: 100%" in drawn()
    with progress.quiet():
        assert not progress.shown()


def test_quiet_blocks(stderr):
    stream = stderr(Terminal())
    with progress.quiet():
        with progress.quiet():
            progress.note("waiting")
        assert drawn() == ""
    progress.note("waiting")
    assert stream.getvalue() == "waiting\n" and "100%" in drawn()


def test_the_switch_of_tqdm(stderr, monkeypatch):
    stderr(Terminal())
    found = {}
    init = tqdm.__init__

    def spy(self, *args, **kwargs):
        found.update(kwargs)
        init(self, *args, **kwargs)

    monkeypatch.setattr(tqdm, "__init__", spy)
    progress.progress_bar(range(3)).close()
    assert "disable" not in found  # so TQDM_DISABLE decides, which tqdm reads where nothing is said
    progress.progress_bar(range(3), hidden=True).close()
    assert found["disable"] is True


def test_the_bar_of_a_pipeline(stderr):
    class Pipe:
        _progress_bar_config = {"leave": False}  # noqa: RUF012
        components = {}  # noqa: RUF012

    pipe = Pipe()
    for stream, config in ((Terminal(), {"leave": False}), (io.StringIO(), {"leave": False, "disable": True})):
        stderr(stream)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("ptq4dm.pipelines.sampling.denoiser_names", lambda pipe: [])
            with _quiet(pipe, True):
                assert pipe._progress_bar_config == config
        assert pipe._progress_bar_config == {"leave": False}


def test_nobody_else_makes_bars():
    rooms = ("ptq4dm", "kernels", "svdquant", "samplers", "scripts")
    files = [path for room in rooms for path in (ROOT / room).rglob("*.py")]
    assert len(files) > 100
    makers = []
    for path in files:
        for node in ast.walk(ast.parse(path.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            if any(name.partition(".")[0] == "tqdm" for name in names):
                makers.append(path.relative_to(ROOT).as_posix())
    assert set(makers) == {"ptq4dm/progress.py", "scripts/stress/process.py"}  # the latter looks after tqdm's lock

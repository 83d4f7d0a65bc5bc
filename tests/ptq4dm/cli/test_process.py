"""The command as a process: closed pipes, full disks, other encodings, interrupts at any time; one line or none."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import ptq4dm

ROOT = str(Path(ptq4dm.__file__).parents[1])
pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="signals and pipes of POSIX")
# A verb stands for all: it comes without PyTorch, so these tests take a tenth of a second each.
VERB = """
import os, sys, time
from pathlib import Path
from ptq4dm.cli import completion, process
from ptq4dm.cli.main import main
from ptq4dm.cli.output import result, say

def run(args):
    WORK

completion.run = run
sys.argv[1:] = ["completion", "bash", *sys.argv[1:]]
sys.exit(main())
"""
STARTED = "Path('started').touch(); time.sleep(30)"
CLEANED = """try:
        Path('temporary').touch()
        STARTED
    finally:
        time.sleep(0.5)
        Path('temporary').unlink()""".replace("STARTED", STARTED)


@pytest.fixture
def start(tmp_path):
    """start(arguments of python, ...) -> the process, in an empty folder."""
    begun = []

    def call(*arguments, **more):
        env = os.environ | {"PYTHONPATH": os.pathsep.join([more.pop("first", ROOT), ROOT])} | more.pop("env", {})
        heard = {"preexec_fn": lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL)}  # tests may run under nohup
        options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **heard, **more}
        begun.append(subprocess.Popen([sys.executable, *arguments], cwd=tmp_path, env=env, **options))
        return begun[-1]

    yield call
    for process in begun:
        process.kill()
        process.communicate()


def verb(work):
    return ["-c", VERB.replace("WORK", work)]


def wait_for(path, process, seconds=60):
    end = time.monotonic() + seconds
    while not path.exists():
        assert process.poll() is None and time.monotonic() < end, process.communicate()
        time.sleep(0.01)


def ended(process):
    out, err = process.communicate(timeout=60)
    return process.returncode, out, err


# --- streams ------------------------------------------------------------------------------------------------


def closed_pipe():
    """The writing end of a pipe that nobody reads."""
    reading, writing = os.pipe()
    os.close(reading)
    return writing


@pytest.mark.parametrize("arguments", ["--help", "--version", "completion bash", "completion zsh --json"])
def test_nobody_reads_what_is_printed(start, arguments):
    pipe = closed_pipe()
    assert ended(start("-m", "ptq4dm", *arguments.split(), stdout=pipe)) == (141, None, b"")
    os.close(pipe)


def test_a_reader_who_leaves_ends_no_work(start, tmp_path):
    """More than a pipe holds is printed, then the work goes on to its end."""
    work = "[say('x' * 1000) for _ in range(200)]; Path('done').touch()"
    process = start(*verb(work))
    assert process.stdout.read(10) == b"x" * 10
    process.stdout.close()
    assert process.wait(60) == 141 and process.stderr.read() == b"" and (tmp_path / "done").exists()


def test_nobody_reads_the_errors(start):
    pipe = closed_pipe()
    assert ended(start("-m", "ptq4dm", "magic", stderr=pipe)) == (2, b"", None)
    work = "print('bar', end='\\r', file=sys.stderr); say('well')"
    assert ended(start(*verb(work), stderr=pipe)) == (0, b"well\n", None)
    os.close(pipe)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full here")
def test_a_full_disk(start):
    with open("/dev/full", "wb") as full:
        status, _, err = ended(start("-m", "ptq4dm", "completion", "bash", stdout=full))
    assert status == 1 and err == b"ptq4dm: cannot write to stdout: No space left on device.\n"


def test_streams_that_are_closed(start, tmp_path):
    """The first file that is opened must not take the place of stdout."""
    work = "Path('file').write_text('mine'); print('lost'); say('lost')"
    shell = f'exec "$0" "$@" >&-; exec "{sys.executable}"'
    command = ["-c", "import subprocess, sys; sys.exit(subprocess.run(['sh', '-c', *sys.argv[1:]]).returncode)"]
    assert ended(start(*command, shell, sys.executable, *verb(work)))[::2] == (0, b"")
    assert (tmp_path / "file").read_text() == "mine"


def test_any_name_can_be_printed(start):
    """In an encoding that has no such letter, and of a name that is no UTF-8."""
    env = {"PYTHONIOENCODING": "ascii"}
    work = "say('é ' + 'caf\\udce9')"
    assert ended(start(*verb(work), env=env)) == (0, b"\\xe9 caf\\udce9\n", b"")
    assert ended(start(*verb(work), env={"PYTHONIOENCODING": "utf-8"})) == (0, b"\xc3\xa9 caf\\udce9\n", b"")
    status, out, err = ended(start("-m", "ptq4dm", b"caf\xe9\n\x1b[31m", env=env))
    assert status == 2 and out == b"" and err.count(b"\n") == 1 and b"\x1b" not in err and b"caf" in err


# --- interrupts ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_while_starting(start, tmp_path, number):
    """In the import of PyTorch, which takes seconds: one stands for it here that takes longer."""
    (tmp_path / "torch.py").write_text("from pathlib import Path\nimport time\n" + STARTED)
    process = start("-m", "ptq4dm", "info", first=str(tmp_path))
    wait_for(tmp_path / "started", process)
    process.send_signal(number)
    assert ended(process) == (130, b"", b"interrupted\n")


def test_in_the_first_imports(start, tmp_path):
    """Of the package itself, and of what it takes from Python; the file is what pip makes of an entry point."""
    (tmp_path / "pkgutil.py").write_text("from pathlib import Path\nimport time\n" + STARTED)
    (tmp_path / "ptq4dm").write_text("import sys\nfrom ptq4dm.cli.main import main\nsys.exit(main())\n")
    process = start("ptq4dm", "info")
    wait_for(tmp_path / "started", process)
    process.send_signal(signal.SIGINT)
    assert ended(process) == (130, b"", b"interrupted\n")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_at_work(start, tmp_path, number):
    process = start(*verb(CLEANED))
    wait_for(tmp_path / "started", process)
    process.send_signal(number)
    assert ended(process) == (130, b"", b"interrupted\n") and not (tmp_path / "temporary").exists()


def test_a_second_interrupt_waits_for_the_clean_up_and_a_third_does_not(start, tmp_path):
    for further, left in ((1, False), (2, True)):
        process = start(*verb(CLEANED))
        wait_for(tmp_path / "started", process)
        for _ in range(1 + further):
            process.send_signal(signal.SIGINT)
            time.sleep(0.1)
        assert ended(process) == (130, b"", b"interrupted\n")
        assert (tmp_path / "temporary").exists() == left
        (tmp_path / "started").unlink()


def test_an_interrupt_that_python_drops_comes_again(start, tmp_path):
    """An exception in a destructor goes no further; the interrupt would be lost."""
    work = """class Slow:
        def __del__(self):
            Path('started').touch()
            time.sleep(0.5)
            for _ in range(1000000): pass
    Slow()
    time.sleep(30)"""
    process = start(*verb(work))
    wait_for(tmp_path / "started", process)
    process.send_signal(signal.SIGINT)
    assert ended(process) == (130, b"", b"interrupted\n")


@pytest.mark.parametrize("error", ["ValueError('a storage has no shape')", "UserError('x is damaged.')"])
def test_an_interrupt_that_a_library_made_an_error_of(start, tmp_path, error):
    work = f"""from ptq4dm.errors import UserError
    try:
        {STARTED}
    except KeyboardInterrupt:
        raise {error}"""
    process = start(*verb(work))
    wait_for(tmp_path / "started", process)
    process.send_signal(signal.SIGINT)
    assert ended(process) == (130, b"", b"interrupted\n")


def test_nohup(start, tmp_path):
    """A signal that whoever started us had ignored stays ignored."""
    process = start(
        *verb("Path('started').touch(); time.sleep(1); say('done')"),
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN),
    )
    wait_for(tmp_path / "started", process)
    process.send_signal(signal.SIGHUP)
    assert ended(process) == (0, b"done\n", b"")


def test_a_bug_is_a_traceback(start):
    status, out, err = ended(start(*verb("say('so far'); {}['key']")))
    assert status == 1 and out == b"so far\n" and err.startswith(b"Traceback") and err.endswith(b"KeyError: 'key'\n")


def test_a_program_that_imports_us_keeps_its_own_way(start):
    code = (
        "import signal, sys\nimport ptq4dm, ptq4dm.cli.main, ptq4dm.cli.process\nfrom ptq4dm.cli.main import main\n"
        "before = sys.stdout\nassert main(['completion', 'bash', '--quiet']) == 0\n"
        "print(signal.getsignal(signal.SIGINT) is signal.default_int_handler, sys.stdout is before)"
    )
    assert ended(start("-c", code)) == (0, b"True True\n", b"")


def test_the_version_is_quick(start):
    """A tenth of a second on a machine with nothing else to do; half as often as not there is something."""
    best = 1e9
    for _ in range(5):
        began = time.monotonic()
        assert ended(start("-m", "ptq4dm", "--version")) == (0, f"ptq4dm {ptq4dm.__version__}\n".encode(), b"")
        best = min(best, time.monotonic() - began)
    bare = 1e9
    for _ in range(5):
        began = time.monotonic()
        assert ended(start("-c", "import argparse"))[0] == 0
        bare = min(bare, time.monotonic() - began)
    assert best < 0.1 or best < 3 * bare

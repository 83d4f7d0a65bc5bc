"""`ptq4dm bench tune`: what is tried, what is recorded, what the kernels then read; on GPUs that are not there."""

import functools
import json

import pytest
import torch

from ptq4dm import UserError
from ptq4dm.cli.benches import tune
from ptq4dm.cli.main import main
from ptq4dm.kernels.runtime import settings as tuning
from ptq4dm.kernels.tuning import search, stopwatch, workers

search_svdq = pytest.importorskip("ptq4dm.kernels.tuning.launches_w4", reason="needs Triton", exc_type=ImportError)
from ptq4dm.kernels.tuning import cases as w8a8_cases  # noqa: E402
from ptq4dm.kernels.tuning import launches_w8a8 as search_w8a8  # noqa: E402
from ptq4dm.kernels.tuning.cases import Case, cases_of  # noqa: E402
from ptq4dm.kernels.w4 import layer as svdq_linear  # noqa: E402
from ptq4dm.kernels.w8a8.window import Window  # noqa: E402

CPU_ONLY = pytest.mark.skipif(torch.cuda.is_available(), reason="fakes a GPU, and there is one")
pytestmark = [CPU_ONLY, pytest.mark.usefixtures("one_thread")]


@pytest.fixture
def gpu(tmp_path, monkeypatch):
    """A Hopper GPU that is not there, with the settings of its compute capability and none of its own."""
    shipped = tmp_path / "shipped"
    shipped.mkdir()
    (shipped / "sm_90.json").write_text((tuning.FOLDER / "sm_90.json").read_text())
    monkeypatch.setattr(tuning, "FOLDER", shipped)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("PTQ4DM_TUNED", raising=False)
    for name, value in {
        "is_available": True,
        "get_device_name": "Some GPU-9000",
        "get_device_capability": (9, 0),
        "current_device": 0,
        "mem_get_info": (1 << 40, 1 << 40),
        "synchronize": None,
    }.items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, value=value: value)
    monkeypatch.setattr(torch.cuda, "set_device", chosen_device)
    monkeypatch.setattr(search_w8a8, "shared_memory", lambda: 232448)
    tuning.forget()
    yield
    monkeypatch.undo()
    tuning.forget()


def chosen_device(device):
    """As torch.cuda.set_device, which takes no device without a number."""
    if not isinstance(device, int) and device.index is None:
        raise ValueError(f"expected a device with an index, got {device}")


class InThisProcess:
    """What Workers does, without processes."""

    def __init__(self, function, count):
        self.function = function

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def answers(self, jobs):
        yield from reversed([(place, self.function(job)) for place, job in enumerate(jobs)])


class Fake:
    """A launch whose setting {"x": v} takes |v - 3| + 1 microseconds; 5 does not compile, 7 fails on large inputs."""

    kernel = "fake"

    def __init__(self, key, values=(1, 2, 4, 5, 7), current=None):
        self.key, self.values, self.now, self.tried = key, values, current, []

    def settings(self):
        return [{"x": value} for value in self.values]

    def current(self):
        return self.now

    def compiled_as(self, setting):
        return setting["x"]

    def attempt(self, setting):
        self.tried.append(setting["x"])
        if setting["x"] == 5:
            raise ValueError("too much shared memory\nand a page more")

    def calls(self):
        return lambda setting: [functools.partial(dict, setting)]


def fake_race(candidates, rounds=11):
    values = {name: calls[0]()["x"] for name, calls in candidates.items()}
    if 7 in values.values():
        raise RuntimeError("out of memory")
    return {name: abs(value - 3) + 1.0 for name, value in values.items()}


@pytest.fixture
def faked(gpu, monkeypatch):
    monkeypatch.setattr(search, "Workers", InThisProcess)
    monkeypatch.setattr(stopwatch, "race", fake_race)


def test_the_best_is_recorded_and_read(faked, capsys):
    launches = [Fake([64, 64, 64]), Fake("a class", (1, 9), current={"x": 3}), Fake("another", (5, 7))]
    launches[1].kernel = launches[2].kernel = "classes"
    first, second, third = tune.tune(launches)
    assert sorted(launches[0].tried) == [1, 2, 4, 5, 7]
    assert sorted(launches[1].tried) == [3, 9] and launches[2].tried == []  # compiled alike: not tried again
    assert [spent for spent, _ in first.times] == [2, 2, 3] and first.times[0][1] in ({"x": 2}, {"x": 4})
    assert [(reason, setting["x"]) for reason, setting in first.left_out] == [
        ("ValueError: too much shared memory", 5),
        ("RuntimeError: out of memory", 7),
    ]
    assert second.times[0] == (1, {"x": 3}) and second.before == 1 and first.before is None
    assert third.times == []
    table = json.loads(tuning.tuned_file().read_text())
    assert table == {
        "device": "Some GPU-9000",
        "fake": [[64, 64, 64, first.times[0][1]]],
        "classes": {"a class": {"x": 3}},
    }
    assert tuning.best_config("fake", torch.device("cuda", 0), 60, 60, 60) == first.times[0][1]
    out = capsys.readouterr().out
    assert "left out 2: ValueError: too much shared memory  such as fake 64,64,64" in out
    assert "classes another: no setting ran" in out and "2 of 3 launches tuned" in out
    assert "1.0 us (until now 1.0)" in out and str(tuning.tuned_file()) in out


def test_nothing_that_runs_is_an_error_and_leaves_no_file(faked):
    with pytest.raises(UserError, match="no setting of any kernel ran on this GPU; the first: ValueError: too much"):
        tune.tune([Fake("a", (5,))])
    assert not tuning.tuned_file().exists()


def test_a_search_that_is_cut_short_keeps_what_it_found(faked, monkeypatch, capsys):
    monkeypatch.setattr(search, "PER_PROCESS", 0)  # a group for each launch
    clock = iter(range(100))
    monkeypatch.setattr(search.time, "monotonic", lambda: next(clock))
    found = tune.tune([Fake("a"), Fake("b"), Fake("c")], seconds=3)
    assert [one.launch.key for one in found] == ["a"]
    assert list(json.loads(tuning.tuned_file().read_text())["fake"]) == ["a"]
    assert "out of time; the rest keeps what it had" in capsys.readouterr().out

    class Stop(Fake):
        def calls(self):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tune.tune([Fake("b"), Stop("c")])
    assert list(json.loads(tuning.tuned_file().read_text())["fake"]) == ["a", "b"]
    assert "1 of 2 launches tuned" in capsys.readouterr().out


def test_where_settings_go(faked, tmp_path, monkeypatch):
    """Beside the code; where that is read-only, or a user says so, into the user's folder, which is read first."""
    device, name = torch.device("cuda", 0), "some_gpu_9000.json"
    assert tuning.tuned_file() == tuning.FOLDER / name
    tune.tune([Fake([64, 64, 64]), Fake([8, 8, 8])])
    monkeypatch.setattr(tuning.os, "access", lambda path, mode: path != tuning.FOLDER)
    users = tmp_path / "cache" / "ptq4dm" / "tuned" / name
    assert tuning.tuned_file() == users
    tune.tune([Fake([64, 64, 64], (1,))])
    assert tuning.best_config("fake", device, 64, 64, 64) == {"x": 1}
    assert tuning.best_config("fake", device, 8, 8, 8)["x"] in (2, 4)  # measured in the other file alone


def test_a_user_names_the_folder_or_the_file(faked, tmp_path, monkeypatch):
    monkeypatch.setenv("PTQ4DM_TUNED", str(tmp_path / "mine"))
    tune.tune([Fake([64, 64, 64], (1,))])
    assert (tmp_path / "mine" / "some_gpu_9000.json").is_file()
    tune.tune([Fake([64, 64, 64], (2,))], tmp_path / "elsewhere" / "file.json")
    assert tuning.best_config("fake", torch.device("cuda", 0), 64, 64, 64) == {"x": 1}
    assert json.loads((tmp_path / "elsewhere" / "file.json").read_text())["fake"] == [[64, 64, 64, {"x": 2}]]
    assert [path.name for path in (tmp_path / "elsewhere").iterdir()] == ["file.json"]


def test_files_that_cannot_be_written_or_read_are_told_before_the_search(faked, tmp_path):
    launch = Fake([64, 64, 64])
    (tmp_path / "file").write_text("{")
    with pytest.raises(UserError, match="cannot write .*file/x.json"):
        tune.tune([launch], tmp_path / "file" / "x.json")
    for text in ("{", "[]"):
        (tmp_path / "file").write_text(text)
        with pytest.raises(UserError, match="is no file of settings.*; delete it and measure anew"):
            tune.tune([launch], tmp_path / "file")
        assert (tmp_path / "file").read_text() == text
    assert launch.tried == []


def test_a_file_is_whole_at_any_time(gpu, monkeypatch):
    tuning.record("k", "a", {"x": 1})
    before = tuning.tuned_file().read_text()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tuning.os, "replace", full)
    with pytest.raises(OSError):
        tuning.record("k", "a", {"x": 2})
    assert tuning.tuned_file().read_text() == before
    assert {path.name for path in tuning.FOLDER.iterdir()} == {"sm_90.json", "some_gpu_9000.json"}


# --- processes ----------------------------------------------------------------------------------------------


def test_a_job_that_dies_or_hangs_costs_no_other_job():
    """Each start of a process imports the package, so there are few."""
    with workers.Workers(eval, 2, limit=1.0) as pool:
        answers = dict(pool.answers(["__import__('os')._exit(7)", "None", "__import__('time').sleep(60)", "'told'"]))
        assert dict(pool.answers(["str(__import__('os').getpid())"])).keys() == {0}
    assert answers == {0: "its process died (exit status 7)", 1: None, 2: "took over 1 s", 3: "told"}


def test_a_process_that_raised_is_not_used_again(monkeypatch):
    class Pipe:
        jobs, sent = ["None", "1 / 0", "None"], []

        def recv(self):
            return self.jobs.pop(0)

        def send(self, message):
            self.sent.append(message)

    def ended(status):
        raise EOFError(status)

    monkeypatch.setattr(workers.signal, "signal", lambda *_: None)
    monkeypatch.setattr(workers.os, "_exit", ended)
    with pytest.raises(EOFError):
        workers._serve(eval, Pipe())
    assert Pipe.sent == [workers.READY, (None, True), ("ZeroDivisionError: division by zero", False)]


def test_an_attempt_tells_what_went_wrong_unless_the_gpu_is_lost(gpu, monkeypatch):
    launch = Fake("a")
    assert search.attempt((0, launch, {"x": 1})) is None
    assert search.attempt((0, launch, {"x": 5})) == "ValueError: too much shared memory"

    def lost():
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "synchronize", lost)
    with pytest.raises(ValueError, match="too much shared memory"):
        search.attempt((0, launch, {"x": 5}))


# --- launches -----------------------------------------------------------------------------------------------


def names(launches):
    return [f"{one.kernel} {one.key if isinstance(one.key, str) else one.key[0]}" for one in launches]


def test_what_usually_serves_a_shape_is_tuned(gpu, monkeypatch):
    many, few, cases = (4096, 128, 64), (16, 128, 64), [Case(Window(4096, 1, 1), 64, 256)]
    usual = ["fp8.prepare 4096", "fp8.product 4096", "int4.prepare 4096", "int4.product 4096", "none.short 16"]
    wanted = [*usual, "w8a8 int8 1x1/1 C64 N256 M2^12", "w8a8 fp8 1x1/1 C64 N256 M2^12"]
    assert names(tune.plan(None, [many, few], cases)) == wanted
    assert names(tune.plan(["w4a16"], [many, few, many], cases)) == ["none.unpack 4096", "none.short 16"]
    assert names(tune.plan(["w4a8-fp8"], [few], [])) == ["fp8.activation 16", "fp8.short 16"]
    with pytest.raises(UserError, match="no layer that these kernels serve"):
        tune.plan(["w8a8"], [many], [])
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (8, 0))
    tuning.forget()
    found = names(tune.plan(None, [many], cases))
    assert found == ["int8.prepare 4096", "int8.product 4096", *usual[2:4], "w8a8 int8 1x1/1 C64 N256 M2^12"]
    with pytest.raises(UserError, match="Some GPU-9000 does not multiply fp8; choose w4a8-int8"):
        tune.plan(["w4a8-fp8"], [many], [])


def test_settings_of_a_launch_hold_what_is_used_today(gpu):
    launches = tune.plan(None, tune.known_shapes(), tune.linear_cases([(2**18, 128, 128), (64, 512, 128)]))
    assert len({(one.kernel, str(one.key)) for one in launches}) == len(launches)
    for one in launches:
        settings = search.candidates(one)
        assert one.current() in settings and len(settings) > 5
        assert len({one.compiled_as(setting) for setting in settings}) == len(settings)


def test_linears_of_a_transformer_are_tuned_in_little_time(gpu):
    """Each class has programs that work off many tiles, as many as fit; what is compiled once is not tried again."""
    shapes = [(65536, 256, 256), (65536, 1024, 256), (65536, 12, 256), (256, 1536, 256), (256, 256, 256)]
    launches = search_w8a8.launches(tune.linear_cases(shapes))
    assert [one.key for one in launches if one.form == "int8"] == [
        "int8 1x1/1 C256 N256 M2^16",
        "int8 1x1/1 C256 N1024 M2^16",
        "int8 on-load C256 N12 M2^16",
        "int8 1x1/1 C256 N12 M2^16",
        "int8 1x1/1 C256 N1536 M2^8",
        "int8 1x1/1 C256 N256 M2^8",
    ]
    tried = [{one.compiled_as(setting) for setting in search.candidates(one)} for one in launches]
    assert len(launches) == 12 and max(map(len, tried)) <= 20 and len(set().union(*tried)) <= 150
    by_key = {one.key: settings for one, settings in zip(launches, tried, strict=True)}
    for form in ("int8", "fp8"):
        assert by_key[f"{form} 1x1/1 C256 N256 M2^16"] == by_key[f"{form} 1x1/1 C256 N1024 M2^16"]
        assert by_key[f"{form} 1x1/1 C256 N256 M2^8"] == by_key[f"{form} 1x1/1 C256 N1536 M2^8"]
    for one in launches:
        many = [search_w8a8.Config(**setting) for setting in one.settings() if setting["programs"]]
        assert all(c.programs * search_w8a8._shared(c) <= 233472 for c in many)  # of a multiprocessor
        assert bool(many) == (one.key.endswith("M2^16") and not one.on_load)


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.grouped = torch.nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.linear = torch.nn.Linear(8, 64)
        self.again = torch.nn.Linear(64, 64)

    def forward(self, x):
        x = self.grouped(self.conv(x)).flatten(2).transpose(1, 2)
        return self.again(self.again(self.linear(x)))


def test_cases_of_a_model():
    model = Model()
    cases = cases_of(model, lambda: model(torch.zeros(2, 3, 16, 16)), 5)
    assert {(case.name, case.rows, case.count) for case in cases} == {
        ("3->8 3x3/2 at 16x16", 640, 1),
        ("8->64 640 rows", 640, 1),
        ("64->64 640 rows", 640, 2),
    }
    assert tune.linear_shapes(cases) == [(640, 64, 64)]
    assert not model.conv._forward_hooks


def test_cases_of_a_pipeline(unet):
    from diffusers import DDIMScheduler, DDPMPipeline

    cases = tune.cases_of_pipeline(DDPMPipeline(unet(), DDIMScheduler()), 32)
    first = next(case for case in cases if case.channels == 3)
    assert (first.window.batch, first.rows, first.outputs) == (32, 32 * 64, 8)
    assert any(case.linear and case.rows == 32 for case in cases)  # the time embedding


@pytest.mark.parametrize("mode, rank", [("none", 0), ("int8", 0), ("int4", 0)])
def test_launches_of_a_layer_run(monkeypatch, mode, rank):
    """In Triton's interpreter, which multiplies no bf16: without a branch."""
    monkeypatch.setattr(search_svdq, "DEVICE", "cpu")
    name = search_svdq.NAMES[mode]
    one = search_svdq.operands(80, 32, 64, rank, 0)
    state = search_svdq.state_for(one, mode)
    small = dict(BM=16, BK=64, STAGES=2, ROWS=4, STEP=64, UNPACK_BYTES=1024, num_warps=4)
    small |= dict(TMA=False) if mode != "none" else {}
    product = dict(BM=32, BN=32, BK=64, BAND=2, PER_SM=1, num_stages=2, num_warps=4, TMA=False)
    for step in svdq_linear.steps(name, 80):
        setting = product if step == "product" else small
        if step != "cublas":
            launch = search_svdq.SVDQLaunch(80, 32, 64, rank, mode, step)
            launch.attempt(setting)
            assert all(call() is None for call in launch.calls()(setting)[:1])
        search_svdq.run(step, one, setting, state)
    if mode != "none":
        expected = (one.x.float() / one.smooth.float()) @ one.weight.float().T + one.bias.float()
        error = (state.out.float() - expected).norm() / expected.norm()
        assert error < (0.35 if mode == "int4" else 0.2)


@pytest.mark.parametrize("kernel, on_load", [(1, False), (1, True), (3, False)])
def test_launches_of_a_convolution_run(monkeypatch, kernel, on_load):
    monkeypatch.setattr(w8a8_cases, "DEVICE", "cpu")
    monkeypatch.setattr(w8a8_cases, "COLD", 1)
    case = Case(Window(20, 4, 4, (kernel, kernel), padding=(kernel // 2, kernel // 2)), 32, 16)
    launch = search_w8a8.W8A8Launch(case, "int8", on_load)
    setting = dict(mode="on-load" if on_load else "gather", bm=64, bn=16, bk=32, warps=4, stages=2)
    launch.attempt(setting)
    calls = launch.calls()(setting)
    assert len(calls) == 2  # two inputs, at the least
    operands = w8a8_cases.Operands.of(case)
    x, weight = operands.inputs[0].float(), operands.weight
    expected = torch.nn.functional.conv2d(x, weight, operands.bias.float(), padding=kernel // 2).permute(0, 2, 3, 1)
    assert ((calls[0]().float() - expected).norm() / expected.norm()) < 0.02


def test_the_stopwatch_takes_the_median_of_one_call(monkeypatch):
    """Graphs of at least 12 calls, in turns; what the first rounds take is not counted."""

    class Graph:
        def __init__(self, calls):
            self.replay, self.count = self, len(calls)

    order, spent = [], iter([900.0, 90.0, 900.0, 90.0, 24.0, 15.0, 48.0, 45.0, 36.0, 30.0])

    def elapsed(graph):
        order.append(graph.count)
        return next(spent)

    monkeypatch.setattr(stopwatch, "graph_of", lambda calls: (Graph(calls), None))
    monkeypatch.setattr(stopwatch, "elapsed", elapsed)
    assert stopwatch.race({"a": [print], "b": [print] * 5}, rounds=3) == {"a": 3.0, "b": 2.0}
    assert order == [12, 15] * 5


# --- command line -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "kernels are tuned on the GPU they run on; PyTorch finds none here."),
        (["--shapes", "16,64"], "'16,64' is no shape; write M,N,K (rows, outputs, inputs), such as 4608,3072,3072."),
        (["--shapes", "0,64,64"], "'0,64,64' is no shape: each of M,N,K must be at least 1 and less than 2^31."),
        (["--shapes", "16,64,96"], "'16,64,96': the kernels take inputs in groups of 64, and K = 96 is no multiple"),
        (["--shapes", "16,64,64", "--model", "unet-cifar10"], "give one of --shapes and --model."),
        (["--minutes", "0"], "--minutes must be above 0; got 0.0."),
        (["--batch-size", "0"], "--batch-size must be at least 1; got 0."),
        (["--kernels", "w2a2"], "argument --kernels: invalid choice: 'w2a2'"),
    ],
)
def test_wrong_input(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    try:
        status = main(["bench", "tune", *arguments])
    except SystemExit as stop:
        status = stop.code
    out, err = capsys.readouterr()
    assert status == 2 and out == "" and len(err.splitlines()) == 1 and message in err
    assert list(tmp_path.iterdir()) == []


def test_a_gpu_that_is_too_old(gpu, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (7, 5))
    with pytest.raises(UserError, match="the kernels need compute capability 8.0; Some GPU-9000 has 7.5."):
        tune.check_gpu()


def test_the_command_tunes_what_it_is_asked_for(gpu, monkeypatch, capsys, tmp_path):
    from ptq4dm.cli.benches import bench

    asked = {}
    monkeypatch.setattr(
        tune, "tune", lambda launches, path, seconds: asked.update(launches=launches, path=path, seconds=seconds)
    )
    monkeypatch.setattr(bench, "device_of", lambda args: torch.device("cuda"))  # what accelerate says of one GPU
    monkeypatch.setattr(bench, "one_process", lambda args: None)  # accelerate would keep the fake
    shapes = ["--shapes", "4096,128,64", "16,128,64", "--kernels", "w4a16", "w8a8"]
    assert main(["bench", "tune", *shapes, "--minutes", "2", "--output", str(tmp_path / "x.json")]) == 0
    assert (asked["path"], asked["seconds"]) == (tmp_path / "x.json", 120)
    assert names(asked["launches"])[:2] == ["none.unpack 4096", "none.short 16"]
    assert {one.kernel for one in asked["launches"]} == {"none.unpack", "none.short", "w8a8"}
    assert f"to use it, copy it to {tuning.tuned_file()}" in capsys.readouterr().out
    assert main(["bench", "tune", "--kernels", "w4a4"]) == 0
    assert names(asked["launches"])[0] == "int4.prepare 4608" and asked["path"] is None and asked["seconds"] is None


def test_names_on_the_command_line_are_those_of_the_kernels(capsys):
    from ptq4dm.cli.main import build_parser

    with pytest.raises(SystemExit):
        build_parser().parse_args(["bench", "tune", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert f"{', '.join(tune.KERNELS)}; what serves" in text and f"w4a16 up to {tune.SHORT} rows" in text

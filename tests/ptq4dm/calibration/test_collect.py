"""Calibration: laws of the timesteps, statistics against brute force, the same bits after any interruption."""

import dataclasses
import importlib
import json
import math
import os
import re
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMPipeline,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    ImagePipelineOutput,
    PNDMScheduler,
)
from torch import nn

import ptq4dm
from models import added_unet, plain_unet
from ptq4dm.calibration.call_files import load_calls, save_calls
from ptq4dm.calibration.calls import calls_of_rows
from ptq4dm.calibration.clock import Span
from ptq4dm.calibration.collect import CalibrationConfig, collect, draw_timesteps
from ptq4dm.calibration.input_statistics import InputStatistics
from ptq4dm.calibration.measure import timestep_bins
from ptq4dm.calibration.record import replay
from ptq4dm.calibration.store import CalibrationStore
from ptq4dm.errors import UserError
from ptq4dm.files.claim import CLAIM
from ptq4dm.methods.rtn import RTNConfig
from ptq4dm.pipelines.sampling import sample

COLLECT = importlib.import_module("ptq4dm.calibration.collect")  # ptq4dm.collect is the function
MEASURE = importlib.import_module("ptq4dm.calibration.measure")
FILES = importlib.import_module("ptq4dm.files.tensors")


pytestmark = pytest.mark.usefixtures("one_thread")


def tiny_pipe(seed=0, dtype=torch.float32, scheduler=None, **config):
    unet = plain_unet(seed, **config)
    return DDPMPipeline(unet.to(dtype), scheduler or DDIMScheduler(timestep_spacing="trailing"))


CONFIG = CalibrationConfig(num_samples=9, num_inference_steps=4, num_bins=4, batch_size=2, seed=3)


def files(folder):
    return {p.name: p.read_bytes() for p in folder.iterdir()}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A finished store of CONFIG: (folder, its bytes)."""
    folder = tmp_path_factory.mktemp("whole") / "store"
    torch.set_num_threads(1)
    collect(tiny_pipe(), CONFIG, folder)
    return folder, files(folder)


@pytest.fixture
def copy(whole, tmp_path):
    folder = tmp_path / "copy"
    folder.mkdir()
    for name, data in whole[1].items():
        (folder / name).write_bytes(data)
    return folder


# --- what is collected --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_statistics_equal_brute_force(dtype, tmp_path):
    """Every input of every layer, caught by hooks of our own. batch_size=1: the same kernels in both."""
    pipe = tiny_pipe(dtype=dtype)
    store = collect(pipe, dataclasses.replace(CONFIG, batch_size=1))
    caught = {name: [[] for _ in range(4)] for name in store.fingerprint}
    layers = [n for n, m in pipe.unet.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d))]
    assert list(store.fingerprint) == layers and len(layers) > 10
    current = 0
    for name in layers:
        hook = lambda module, args, name=name: caught[name][current].append(args[0].float().flatten())  # noqa: E731
        pipe.unet.get_submodule(name).register_forward_pre_hook(hook)
    for row in range(len(store.calls)):
        current = int(store.calls.timestep[row]) * 4 // 1000
        with torch.no_grad():
            call = store.calls[row].call()
            pipe.unet(*call.args, **call.kwargs)
    assert len({len(parts) for parts in caught["conv_in"]}) > 1
    for name, bins in caught.items():
        expected = InputStatistics(1, 4)
        for index, parts in enumerate(bins):
            if parts:
                expected.update(0, index, torch.cat(parts))
        for some in ([0], [1], [2], [3], [1, 3], None):
            histogram, *rest = store.input_of(name, some)
            expected_histogram, *expected_rest = expected.merged(0, some)
            assert torch.equal(histogram, expected_histogram) and rest == expected_rest
        values = torch.cat([v for parts in bins for v in parts])
        histogram, limit, low, high = store.input_of(name)
        assert (low, high) == (float(values.min()), float(values.max())) and int(histogram.sum()) == len(values)
    with pytest.raises(UserError, match="no statistics of layer 'conv_99'"):
        store.input_of("conv_99")


def test_collecting_beside_a_thread_that_samples(whole, tmp_path):
    """Both use one pipeline: they take turns, and what the other feeds the model is not measured."""
    pipe, stop, images = tiny_pipe(), threading.Event(), []

    def keep_sampling():
        while not stop.is_set() or not images:
            images.append(sample(pipe, [5, 6], num_inference_steps=6))

    with ThreadPoolExecutor(2) as pool:
        other = pool.submit(keep_sampling)
        try:
            pool.submit(collect, pipe, CONFIG, tmp_path / "store").result()
        finally:
            stop.set()
        other.result()
    assert files(tmp_path / "store") == whole[1]
    assert all(torch.equal(one, images[0]) for one in images)


@pytest.mark.parametrize("collector", ["uniform", "ndtc", "solver"])
def test_recorded_times_lie_on_the_sampling_grid(collector):
    config = dataclasses.replace(CONFIG, collector=collector, num_inference_steps=5)
    pipe = tiny_pipe()
    store = collect(pipe, config)
    grid = [999, 799, 599, 399, 199]
    times = store.calls.timestep.tolist()
    assert len(times) == 9 and set(times) <= set(grid) and len(set(times)) > 1
    assert times == sorted(times, reverse=True)
    wanted = draw_timesteps(config, Span(0.0, 1000.0, True), grid).tolist()
    assert times == sorted((min(grid, key=lambda g: abs(g - t)) for t in wanted), reverse=True)


def test_batch_size_does_not_change_what_is_recorded():
    pipe = tiny_pipe(dtype=torch.float64)  # so that the order of summation is far below the tolerance
    one, other = (collect(pipe, dataclasses.replace(CONFIG, batch_size=size)).calls for size in (2, 4))
    assert torch.equal(one.timestep, other.timestep)
    torch.testing.assert_close(one.call().args[0], other.call().args[0], rtol=0, atol=1e-9)


def test_laws_of_the_timesteps():
    def draw(**options):
        config = CalibrationConfig(num_samples=20000, **options)
        return draw_timesteps(config, span, [900.0, 500.0, 500.0, 100.0])

    span = Span(0.0, 1000.0, True)

    uniform = draw()
    assert uniform.min() >= 0 and uniform.max() <= 999
    assert abs(uniform.mean() - 499.5) < 8 and abs(uniform.std() - 999 / math.sqrt(12)) < 5
    normal = draw(collector="ndtc", mu=0.4, sigma=0.05)
    assert abs(normal.mean() - 400) < 2 and abs(normal.std() - 50) < 1
    wide = draw(collector="ndtc", mu=0.4, sigma=0.4)
    assert wide.min() == 0 and wide.max() == 999
    assert abs((wide == 0).double().mean() - 0.1587) < 0.01  # P(N < -1): clamped, not drawn again
    assert abs((wide == 999).double().mean() - 0.0668) < 0.01  # P(N > 1.5)
    assert draw(collector="ndtc", mu=0.3, sigma=0).unique().tolist() == [300]
    times, counts = draw(collector="solver").unique(return_counts=True)
    assert times.tolist() == [100, 500, 900] and counts.max() - counts.min() <= 1
    for parts in (2, 3, 10):  # conditions that are dealt to seeds in turn meet each time about as often
        shares = [(draw(collector="solver")[i::parts] == 500).double().mean() for i in range(parts)]
        assert max(abs(share - 1 / 3) for share in shares) < 0.05
    assert torch.equal(draw(), uniform) and not torch.equal(draw(seed=1), uniform)
    span = Span(-1.5, 1.0)  # the logarithms that EDM's schedulers count
    assert draw().min() < -1.49 and 0.99 < draw().max() <= 1.0
    assert abs(draw(collector="ndtc", mu=0.4, sigma=0.05).mean() + 0.5) < 0.01


def test_trajectory_i_starts_from_the_noise_of_seed_plus_i():
    calls = collect(tiny_pipe(), dataclasses.replace(CONFIG, collector="ndtc", mu=1.0, sigma=0)).calls
    assert calls.timestep.unique().tolist() == [999]  # the first step
    for i, x in enumerate(calls.call().args[0]):
        assert torch.equal(x, torch.randn(3, 8, 8, generator=torch.Generator().manual_seed(3 + i)))


def test_a_single_timestep_fills_a_single_bin():
    store = collect(tiny_pipe(), dataclasses.replace(CONFIG, collector="ndtc", mu=0.6, sigma=0))
    assert store.calls.timestep.unique().tolist() == [499]  # nearest to 600 on the grid 249, 499, 749, 999
    assert (store.statistics.counts.sum(-1) > 0).any(0).tolist() == [False, True, False, False]


def test_solver_with_repeated_times():
    pipe = tiny_pipe(scheduler=PNDMScheduler())
    store = collect(pipe, dataclasses.replace(CONFIG, collector="solver", num_inference_steps=10, num_samples=33))
    pipe.scheduler.set_timesteps(10)
    grid = pipe.scheduler.timesteps
    times, counts = store.calls.timestep.unique(return_counts=True)
    assert len(grid.unique()) < len(grid) and torch.equal(times, grid.unique())
    assert counts.max() - counts.min() <= 1


def test_timestep_bins():
    assert timestep_bins(torch.tensor([0.0, 0.249, 0.25, 0.999, 1.0]), 4).tolist() == [0, 0, 1, 3, 3]
    for bins in (3, 7, 10, 100):  # an edge belongs to the bin above, whatever its quotient rounds to
        edges = torch.arange(bins) * 1000 // bins * bins
        exact = [int(t) * bins // 1000 for t in range(1000)]
        assert timestep_bins(torch.arange(1000) / 1000, bins).tolist() == exact and len(edges) == bins


class Flow(DiffusionPipeline):
    """A stand-in for flow-matching pipelines: times in (0, 1], embeddings, dict arguments, guidance as one call."""

    def __init__(self, unet, scheduler):
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler)

    def __call__(self, prompt_embeds=None, generator=None, num_inference_steps=1, output_type="pt", scale=1.0):
        self.scheduler.set_timesteps(num_inference_steps)
        x = torch.cat([torch.randn(1, 4, 8, 8, generator=g) for g in generator])
        embeds = torch.cat([prompt_embeds, 0 * prompt_embeds])
        more = {"text_embeds": embeds[:, 0], "time_ids": torch.ones(len(embeds), 6).long()}
        for t in self.scheduler.timesteps:
            v = self.unet(
                torch.cat([x, x]), t / 1000, encoder_hidden_states=embeds, added_cond_kwargs=more,
                encoder_attention_mask=None, return_dict=False,
            )[0]  # fmt: skip
            with_text, without = v.chunk(2)
            x = self.scheduler.step(without + scale * (with_text - without), t, x, return_dict=False)[0]
        return ImagePipelineOutput(images=x[:, :3])


def flow_pipe():
    return Flow(added_unet(), FlowMatchEulerDiscreteScheduler())


def test_conditioning_and_float_times_go_through_the_disk(tmp_path):
    pipe = flow_pipe()
    seen = []
    pipe.unet.register_forward_hook(
        lambda _, args, kwargs, output: seen.append((args, kwargs, output)), with_kwargs=True
    )
    embeds = torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(0))
    config = CalibrationConfig(num_samples=3, num_inference_steps=4, num_bins=4, batch_size=3, collector="solver")
    options = dict(conditioning={"prompt_embeds": embeds}, pipeline_kwargs={"scale": 3.0})
    store = collect(pipe, config, tmp_path / "store", **options)
    again = CalibrationStore.load(tmp_path / "store")
    sampled = seen[2:5]  # after the question whether it takes a time a row; then the measurement
    for calls in (store.calls, again.calls):
        assert len(calls) == 6 and calls.timestep.max() == 1 and torch.equal(calls.time, calls.timestep)
        (x, t), given = calls.call().args, calls.call().kwargs
        names = {"encoder_hidden_states", "added_cond_kwargs", "encoder_attention_mask", "return_dict"}
        assert given.keys() == names and given["encoder_attention_mask"] is None and given["return_dict"] is False
        assert given["added_cond_kwargs"]["time_ids"].dtype == torch.int64 and t.dtype == torch.float32
        output = replay(pipe.unet, calls)
        for seed, (args, kwargs, answer) in enumerate(sampled):  # seed k leaves at step k
            for row, copy in ((2 * seed, seed), (2 * seed + 1, 3 + seed)):
                assert torch.equal(x[row], args[0][copy]) and t[row] == args[1]
                text = given["encoder_hidden_states"][row]
                assert torch.equal(text, kwargs["encoder_hidden_states"][copy])
                torch.testing.assert_close(output[row], answer[0][copy], rtol=0, atol=1e-5)
    filled = (again.statistics.counts.sum(-1) > 0).any(0)
    expected = torch.zeros(4, dtype=torch.bool)
    expected[[min(int(float(args[1]) * 4), 3) for args, *_ in sampled]] = True
    assert torch.equal(filled, expected) and filled.sum() > 1
    with pytest.raises(UserError, match="differs in conditioning, pipeline_kwargs;"):
        collect(pipe, config, tmp_path / "store", conditioning={"prompt_embeds": embeds[:2]})


def test_shared_arguments_go_through_the_disk(tmp_path):
    shared = {
        "ids": torch.arange(6).reshape(2, 3),
        "flag": True,
        "nothing": None,
        "empty": {},
        "sizes": {0: [[1, 2]], 1: (3.5, "a")},
        "dtype": torch.bfloat16,
    }
    calls = calls_of_rows(torch.randn(4, 1), timestep=torch.arange(4), text=[torch.ones(4, 2).half()], shared=shared)
    save_calls(tmp_path / "a.safetensors", {"unet": calls})
    again = load_calls(tmp_path / "a.safetensors")["unet"]
    assert torch.equal(again.timestep, calls.timestep) and torch.equal(again.time, calls.time)
    for units in (slice(None), slice(1, 3), torch.tensor([3, 0])):
        (one,), found = calls[units].call().args, again[units].call()
        assert torch.equal(found.args[0], one) and torch.equal(found.kwargs["timestep"], calls.timestep[units].long())
    assert isinstance(found.kwargs["text"], list) and found.kwargs["text"][0].dtype == torch.float16
    assert torch.equal(found.kwargs.pop("ids"), shared.pop("ids"))
    assert {name: found.kwargs[name] for name in shared} == shared
    assert found.kwargs["sizes"][1] == (3.5, "a")
    with pytest.raises(UserError, match="with a Generator, which cannot be kept in a file"):
        save_calls(
            tmp_path / "b.safetensors", {"unet": calls_of_rows(torch.ones(1), shared={"g": torch.Generator()})}
        )


# --- the same bits, whatever happens ------------------------------------------------------------------------


def test_same_seed_same_bits_other_seed_other_bits(whole, tmp_path):
    collect(tiny_pipe(), CONFIG, tmp_path / "again")
    assert files(tmp_path / "again") == whole[1]
    assert sorted(whole[1]) == [
        *(f"batch-0000{i}.safetensors" for i in range(5)),
        "statistics.safetensors",
        "store.json",
    ]
    collect(tiny_pipe(), dataclasses.replace(CONFIG, seed=4), tmp_path / "other")
    other = files(tmp_path / "other")
    assert other.keys() == whole[1].keys() and all(other[name] != data for name, data in whole[1].items())


def interrupt_at(monkeypatch, module, name, count, error=KeyboardInterrupt):
    """The count-th call (from 1) of module.name raises instead."""
    original, calls = getattr(module, name), []

    def interrupted(*args, **kwargs):
        calls.append(1)
        if len(calls) == count:
            if name == "save_file":
                args[1].write_bytes(b"half")
            raise error
        return original(*args, **kwargs)

    monkeypatch.setattr(module, name, interrupted)
    return calls


@pytest.mark.parametrize(
    ("module", "name", "count", "recorded", "measured"),
    [
        (COLLECT, "record_components", 1, 5, 5),
        (COLLECT, "record_components", 4, 2, 5),
        (COLLECT, "save_calls", 2, 4, 5),
        (FILES, "save_file", 3, 3, 5),
        (MEASURE, "answers", 1, 0, 5),
        (MEASURE, "answers", 4, 0, 3),
        (COLLECT, "save_statistics", 2, 0, 3),
    ],
)
def test_goes_on_where_it_was_interrupted(whole, tmp_path, monkeypatch, module, name, count, recorded, measured):
    monkeypatch.setattr(COLLECT, "SAVE_EVERY", 2)
    pipe = tiny_pipe()
    with monkeypatch.context() as patch:
        interrupt_at(patch, module, name, count)
        with pytest.raises(KeyboardInterrupt):
            collect(pipe, CONFIG, tmp_path / "store")
    assert not [p for p in tmp_path.rglob("*") if p.suffix in (".part", ".tmp")]
    assert not any(m._forward_pre_hooks for m in pipe.unet.modules())
    nothing = (name, count) == ("record_components", 1)
    with pytest.raises(UserError, match="no store.json" if nothing else "not finished.*run the same"):
        CalibrationStore.load(tmp_path / "store")
    with monkeypatch.context() as patch:
        steps = ((COLLECT, "record_components"), (MEASURE, "answers"))
        again = [interrupt_at(patch, module, step, 0) for module, step in steps]
        collect(pipe, CONFIG, tmp_path / "store")
    assert [len(calls) for calls in again] == [recorded, measured]
    assert files(tmp_path / "store") == whole[1]


def test_shared_arguments_outlive_an_interruption(tmp_path, monkeypatch):
    options = dict(conditioning={"prompt_embeds": torch.ones(2, 3, 8)})
    config = dataclasses.replace(CONFIG, num_samples=3)
    collect(flow_pipe(), config, tmp_path / "whole", **options)
    with monkeypatch.context() as patch:
        interrupt_at(patch, MEASURE, "answers", 1)
        with pytest.raises(KeyboardInterrupt):
            collect(flow_pipe(), config, tmp_path / "store", **options)
    store = collect(flow_pipe(), config, tmp_path / "store", **options)
    assert store.calls.call().kwargs["encoder_attention_mask"] is None
    assert files(tmp_path / "store") == files(tmp_path / "whole")


def test_a_finished_store_is_only_loaded(whole, copy, monkeypatch):
    monkeypatch.setattr(COLLECT, "record_components", None)
    monkeypatch.setattr(MEASURE, "answers", None)
    (copy / CLAIM).touch()  # what is left of a run that was killed as it was done
    (copy / ".store.json.abcd1234.ptq4dm").mkdir()
    store = collect(tiny_pipe(), CONFIG, copy)
    assert len(store.calls) == 9 and files(copy) == whole[1]


def test_files_follow_the_umask(tmp_path):
    before = os.umask(0o027)
    try:
        collect(tiny_pipe(), dataclasses.replace(CONFIG, num_samples=2), tmp_path / "store")
    finally:
        os.umask(before)
    modes = {p.name: p.stat().st_mode & 0o777 for p in (tmp_path / "store").iterdir()}
    assert modes == dict.fromkeys(["store.json", "batch-00000.safetensors", "statistics.safetensors"], 0o640)


@pytest.mark.parametrize("finished", [True, False])
@pytest.mark.parametrize(
    ("different", "options"),
    [
        ("config", {"config": dataclasses.replace(CONFIG, num_samples=8)}),
        ("config", {"config": dataclasses.replace(CONFIG, collector="solver")}),
        ("scheduler", {"scheduler": DDIMScheduler()}),  # another spacing
        ("fingerprint", {"seed": 1}),
        ("dtype", {"dtype": torch.bfloat16}),
    ],
)
def test_another_store_in_the_folder_stays_as_it_is(copy, finished, different, options):
    if not finished:
        (copy / "statistics.safetensors").unlink()
        meta = json.loads((copy / "store.json").read_text())
        (copy / "store.json").write_text(json.dumps({**meta, "complete": False}))
    before = files(copy)
    config, other = options.get("config", CONFIG), {k: v for k, v in options.items() if k != "config"}
    with pytest.raises(UserError, match=f"already holds a calibration store that differs in {different}; give"):
        collect(tiny_pipe(**other), config, copy)
    assert files(copy) == before


def test_leaves_the_pipeline_as_it_was():
    pipe = tiny_pipe()
    pipe.unet.train()
    pipe.unet.mid_block.eval()
    weights = {k: v.clone() for k, v in pipe.unet.state_dict().items()}
    scheduler, settings = pipe.scheduler, dict(pipe.scheduler.config)
    collect(pipe, CONFIG)
    assert pipe.unet.training and pipe.unet.conv_in.training
    assert not any(m.training for m in pipe.unet.mid_block.modules())
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in pipe.unet.modules())
    assert all(torch.equal(v, weights[k]) for k, v in pipe.unet.state_dict().items())
    assert pipe.scheduler is scheduler and dict(scheduler.config) == settings and "step" not in vars(scheduler)


def test_dropout_plays_no_part(whole, tmp_path):
    pipe = tiny_pipe(dropout=0.5)
    pipe.unet.train()
    collect(pipe, CONFIG, tmp_path / "store")
    assert files(tmp_path / "store") == whole[1]


# --- wrong input --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"collector": "magic"}, "'magic' is unknown; choose from uniform, ndtc, solver"),
        ({"num_samples": 0}, "num_samples must be at least 1; got 0"),
        ({"num_inference_steps": -2}, "num_inference_steps must be at least 1"),
        ({"num_bins": 0}, "num_bins"),
        ({"batch_size": 0}, "batch_size"),
        ({"seed": -1}, "seed must not be negative"),
        ({"mu": 1.5}, "mu lies in"),
        ({"mu": math.nan}, "mu lies in"),
        ({"sigma": -0.1}, "sigma is not negative"),
        ({"sigma": math.nan}, "sigma is not negative"),
    ],
)
def test_wrong_settings(options, message):
    with pytest.raises(UserError, match=message):
        CalibrationConfig(**options)


def test_nan_is_named_by_layer_and_bin(tmp_path):
    config = dataclasses.replace(CONFIG, collector="ndtc", mu=0.9, sigma=0)  # at the first step: x is still finite
    pipe = tiny_pipe()
    with torch.no_grad():
        pipe.unet.mid_block.resnets[0].conv1.weight[0, 0, 0, 0] = math.nan
    with pytest.raises(UserError, match=r"^layer 'mid_block.resnets.0.conv2', timestep bin 3: its input holds NaN"):
        collect(pipe, config, tmp_path / "nan")
    assert not any(m._forward_pre_hooks for m in pipe.unet.modules())
    pipe = tiny_pipe()
    pipe.unet.conv_norm_out.register_forward_hook(lambda *_: torch.full((1, 8, 8, 8), math.inf))
    with pytest.raises(UserError, match=r"layer 'conv_out', timestep bin 3: its input holds NaN or infinity"):
        collect(pipe, config, tmp_path / "inf")


def test_what_fails_before_anything_is_written_leaves_no_folder(tmp_path):
    with pytest.raises(UserError):
        collect(tiny_pipe(), CONFIG, tmp_path / "new" / "store", conditioning={"prompt": ["a UNet takes none"]})
    assert list(tmp_path.iterdir()) == []


def test_folders_that_cannot_be_used(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    for path in (tmp_path / "file", tmp_path / "file" / "store"):
        with pytest.raises(UserError, match=f"cannot make the folder {path}"):
            collect(tiny_pipe(), CONFIG, path)
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match="not empty and is no calibration store"):
        collect(tiny_pipe(), CONFIG, tmp_path / "foreign")
    assert files(tmp_path / "foreign") == {"thesis.txt": b"mine"}
    with pytest.raises(UserError, match="no store.json.*ptq4dm collect"):
        CalibrationStore.load(tmp_path / "foreign")
    pipe = tiny_pipe()
    with pytest.raises(UserError, match="takes no 'prompt'"):
        collect(pipe, CONFIG, tmp_path / "mistake", conditioning={"prompt": ["a"]})
    collect(pipe, CONFIG, tmp_path / "mistake")  # the folder is still free
    interrupt_at(monkeypatch, FILES, "save_file", 2, OSError(28, "No space left on device"))
    with pytest.raises(UserError, match="cannot write .*batch-00001.*: No space left on device"):
        collect(tiny_pipe(), CONFIG, tmp_path / "full")
    assert sorted(files(tmp_path / "full")) == ["batch-00000.safetensors", "store.json"]


def damage(path, how):
    data = path.read_bytes()
    if how == "missing":
        path.unlink()
    else:
        path.write_bytes({"truncated": data[: len(data) // 2], "empty": b"", "binary": b"\xff\xfe\x00"}.get(how, how))


@pytest.mark.parametrize("how", ["missing", "truncated", "empty", "binary"])
@pytest.mark.parametrize("name", ["statistics.safetensors", "batch-00002.safetensors", "store.json"])
def test_damaged_files_give_one_sentence(copy, name, how):
    damage(copy / name, how)
    with pytest.raises(UserError, match=re.escape(name)) as caught:
        CalibrationStore.load(copy)
    assert "\n" not in str(caught.value) and str(caught.value).endswith(".") and "collect" in str(caught.value)


def test_files_of_another_kind(copy, whole):
    for text in ("[]", "{}", "3", '{"config": {}}'):
        (copy / "store.json").write_text(text)
        for use in (CalibrationStore.load, lambda folder: collect(tiny_pipe(), CONFIG, folder)):
            with pytest.raises(UserError, match="store.json .*not written by ptq4dm collect"):
                use(copy)
    (copy / "store.json").write_bytes(whole[1]["store.json"])
    for name in ("statistics.safetensors", "batch-00001.safetensors"):
        other = "batch-00000.safetensors" if name.startswith("stat") else "statistics.safetensors"
        (copy / name).write_bytes(whole[1][other])
        with pytest.raises(UserError, match=f"{name} cannot be read"):
            CalibrationStore.load(copy)
        (copy / name).write_bytes(whole[1][name])
    CalibrationStore.load(copy)


def test_a_damaged_unfinished_store_is_named_too(copy):
    meta = json.loads((copy / "store.json").read_text())
    (copy / "store.json").write_text(json.dumps({**meta, "complete": False}))
    for name in ("statistics.safetensors", "batch-00000.safetensors"):
        damage(copy / name, "truncated")
        with pytest.raises(UserError, match=f"{name} cannot be read"):
            collect(tiny_pipe(), CONFIG, copy)


def test_a_store_knows_its_model(whole):
    store = CalibrationStore.load(whole[0])
    store.check_model(tiny_pipe().unet)
    store.check_model(tiny_pipe(dtype=torch.bfloat16).unet)
    with torch.device("meta"):
        store.check_model(tiny_pipe().unet)
    changed = tiny_pipe().unet
    with torch.no_grad():
        changed.conv_out.weight[0, 0, 0, 0] += 1
    for other in (tiny_pipe(seed=1).unet, changed, flow_pipe().unet):
        with pytest.raises(UserError, match="from another model.*ptq4dm collect"):
            store.check_model(other)


def test_quantized_models_are_refused():
    pipe = tiny_pipe()
    ptq4dm.quantize(pipe, RTNConfig(activations="dynamic", first_last="keep"))
    with pytest.raises(UserError, match="full precision"):
        collect(pipe, CONFIG)


def test_the_grid_is_the_one_that_the_pipeline_samples():
    """Also where it depends on the picture's size, which only the pipeline knows."""

    class Shifted(Flow):
        def __call__(self, prompt_embeds=None, generator=None, num_inference_steps=1):
            set_timesteps = self.scheduler.set_timesteps
            self.scheduler.set_timesteps = lambda steps: set_timesteps(steps, mu=0.9)
            try:
                return super().__call__(prompt_embeds, generator, num_inference_steps)
            finally:
                del self.scheduler.set_timesteps

    pipe = Shifted(added_unet(), FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True))
    embeds = {"prompt_embeds": torch.randn(1, 5, 8)}
    config = dataclasses.replace(CONFIG, collector="solver", num_samples=4)
    calls = collect(pipe, config, conditioning=embeds).calls
    pipe.scheduler.set_timesteps(4, mu=0.9)
    assert calls.timestep[::2].tolist() == pytest.approx((pipe.scheduler.timesteps / 1000).tolist())


def test_a_store_that_lacks_a_part_says_which():
    statistics = CalibrationStore({}, {"a": "1"}, 1000, statistics=InputStatistics(1, 1))
    with pytest.raises(UserError, match="no recorded calls, only statistics"):
        statistics.recorded()
    calls = calls_of_rows(torch.zeros(1, 3, 8, 8), timestep=torch.zeros(1))
    store = CalibrationStore({}, {"a": "1"}, 1000, calls)
    assert store.recorded() is calls
    with pytest.raises(UserError, match="no statistics, only recorded calls"):
        store.input_of("a")

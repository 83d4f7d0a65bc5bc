"""A calibration store that is not as it was written is refused in one sentence, whatever is wrong with it."""

import json
import math
import os
import re

import pytest
import torch
from diffusers import DDIMScheduler, DDPMPipeline
from safetensors import safe_open
from safetensors.torch import save_file

from models import plain_unet
from ptq4dm.calibration.call_files import checked
from ptq4dm.calibration.collect import CalibrationConfig, collect
from ptq4dm.calibration.input_statistics import InputStatistics
from ptq4dm.calibration.store import CalibrationStore
from ptq4dm.calibration.structures import read_leaf, read_structure
from ptq4dm.errors import DamagedFile, UserError
from ptq4dm.files.claim import CLAIM, claimed

pytestmark = pytest.mark.usefixtures("one_thread")

CONFIG = CalibrationConfig(num_samples=4, num_inference_steps=4, num_bins=2, batch_size=2)
BATCH, STATISTICS = "batch-00001.safetensors", "statistics.safetensors"


def tiny_pipe():
    return DDPMPipeline(plain_unet(), DDIMScheduler(timestep_spacing="trailing"))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "store"
    collect(tiny_pipe(), CONFIG, folder)
    return {p.name: p.read_bytes() for p in folder.iterdir()}


@pytest.fixture
def store(whole, tmp_path):
    for name, data in whole.items():
        (tmp_path / name).write_bytes(data)
    return tmp_path


def opened(path):
    with safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        return tensors, {name: json.loads(text) for name, text in file.metadata().items()}


def write(path, tensors, header):
    save_file(tensors, path, {name: json.dumps(value) for name, value in header.items()})


def rewrite(path, change, checks=True):
    """Change tensors and what the header says; without `checks` as a store of before, that had no checksums."""
    tensors, header = opened(path)
    change(tensors, header["calls"]["unet"] if "calls" in header else header["about"])
    write(path, tensors, header)
    if not checks:
        for file in path.parent.glob("*.safetensors"):
            tensors, header = opened(file)
            for one in header.get("calls", {}).values():
                for name in ("checks", "kinds", "run", "file"):
                    one.pop(name, None)
            header.pop("about", None)
            write(file, tensors, header)
        meta = json.loads((path.parent / "store.json").read_text())
        meta.pop("run", None)
        (path.parent / "store.json").write_text(json.dumps(meta))


def refused(store, name, message):
    def use():
        calls = CalibrationStore.load(store).recorded()
        return [part.call() for part in calls.batches(4)]

    with pytest.raises(DamagedFile, match=f"{re.escape(str(store / name))} cannot be read .*{message}") as caught:
        use()
    text = str(caught.value)
    assert "\n" not in text and text.endswith("collect again into an empty folder.")


def put(name, value):
    return lambda tensors, _: tensors.update({name: value(tensors[name]).contiguous()})


def first(value):
    def change(tensor):
        tensor = tensor.clone()
        tensor.view(-1)[0] = value
        return tensor

    return change


def group(**values):
    return lambda tensors, described: described["groups"][0].update(values)


def tree(text):
    """The structure of a call with one argument, of this kind."""
    leaf = {"type": None, "context": None, "children_spec": []}
    args = {
        "type": "builtins.tuple",
        "context": "null",
        "children_spec": [json.loads(text) | {"children_spec": [leaf]}],
    }
    kwargs = {"type": "builtins.dict", "context": "[]", "children_spec": []}
    return json.dumps([1, {"type": "builtins.tuple", "context": "null", "children_spec": [args, kwargs]}])


@pytest.mark.parametrize("checks", [True, False])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (put("unet/timestep", lambda t: t[1:]), "not of one length|not those that were written"),
        (put("unet/time", lambda t: torch.cat([t, t])), "not of one length|not those"),
        (put("unet/groups", lambda t: t[:1]), "not of one length|not those"),
        (put("unet/timestep", first(math.nan)), "timestep of 'unet' is NaN|NaN or infinity|not those"),
        (put("unet/timestep", first(5000.0)), "beyond 1010|not those"),
        (put("unet/time", first(1.5)), r"not in \[0, 1\]|not those"),
        (put("unet/time", first(-0.1)), r"not in \[0, 1\]|not those"),
        (put("unet/groups", first(7)), "go beyond|not those"),
        (put("unet/groups", first(-1)), "go beyond|not those"),
        (put("unet/groups", lambda t: t.double()), "another dtype|not those"),
        (put("unet/0/0", lambda t: t[:1]), "2 units are recorded"),
        (put("unet/0/0", first(math.nan)), "NaN or infinity|not those"),
        (put("unet/0/0", first(math.inf)), "NaN or infinity|not those"),
        (lambda t, _: t.pop("unet/0/0"), "no 'unet/0/0'"),
        (lambda t, _: t.update(more=torch.zeros(1)), "'more' is not told of"),
        (group(units=1), "2 units, not 1"),
        (group(own=[0, 9]), "values that it does not have"),
        (group(own=[0, 0]), "values that it does not have"),
        (group(leaves=[]), "values that it does not have"),
        (group(joined="yes"), "its 'joined' is 'yes'"),
        (group(structure=tree('{"type": "os.system", "context": "null"}')), "no plain container"),
        (lambda _, d: d.update(dtype="nn"), "'nn' is no dtype"),
        (lambda _, d: d.update(groups={}), "its 'groups' is dict"),
    ],
)
def test_calls(store, checks, change, message):
    rewrite(store / BATCH, change, checks)
    refused(store, BATCH, message)


@pytest.mark.parametrize("change", [lambda t: t[..., None], lambda t: t.flatten(1), lambda t: t.view(torch.int32)])
def test_the_same_bytes_of_another_shape_or_dtype(store, change):
    """Their checksums are the same, and the model would be called with them."""
    rewrite(store / BATCH, put("unet/0/0", change))
    refused(store, BATCH, "'unet/0/0' is of another shape or dtype than was written")


def test_a_batch_in_the_place_of_another(store):
    (store / BATCH).write_bytes((store / "batch-00000.safetensors").read_bytes())
    refused(store, BATCH, "another of the store's files, in this one's place")


def test_batches_that_do_not_tell_their_shapes_and_names(store):
    """Those of earlier versions are taken."""
    before = CalibrationStore.load(store).recorded()
    for name in (BATCH, "batch-00000.safetensors"):
        rewrite(store / name, lambda _, described: [described.pop(key) for key in ("kinds", "file")])
    after = CalibrationStore.load(store).recorded()
    assert torch.equal(before.call().args[0], after.call().args[0])


def test_checksums_find_what_looks_right(store):
    for name in ("unet/timestep", "unet/time", "unet/0/0"):
        rewrite(store / BATCH, put(name, lambda t: t * 0.5))
        refused(store, BATCH, f"the values of '{name}' are not those that were written")
        rewrite(store / BATCH, put(name, lambda t: t * 2))
    CalibrationStore.load(store)


@pytest.mark.parametrize("checks", [True, False])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (put("high", first(math.inf)), "range holds infinity|range goes beyond|not those"),
        (put("high", first(math.nan)), "a range is empty|not those"),
        (put("low", lambda t: -t), "a range|not those"),
        (put("low", first(-math.inf)), "range|not those"),
        (put("counts", first(-1)), "negative counts|not those"),
        (put("counts", lambda t: t.fill_(-1000)), "negative counts|not those"),
        (put("counts", torch.zeros_like), "a range is empty where|not those"),
        (put("counts", lambda t: t.roll(1000, -1)), "not of the same values|not those"),
        (put("counts", lambda t: t[:, :, :8]), "its histograms are"),
        (put("counts", lambda t: t[:, :1]), "its histograms are"),
        (put("exponent", lambda t: t - 3), "beyond its histogram|not those"),
        (put("exponent", lambda t: t.fill_(1000)), "out of range|not those"),
        (put("exponent", lambda t: t.long()), "another dtype|not those"),
        (put("progress", lambda t: t - 100), "-[0-9]* batches were measured|not those"),
        (put("progress", lambda t: torch.zeros(2)), "[Oo]nly one element|converted to|not those"),
        (lambda t, _: t.pop("low"), "'low' is missing"),
        (lambda t, _: t.update(more=torch.zeros(1)), "'more' is missing in it, or does not belong"),
    ],
)
def test_statistics(store, checks, change, message):
    rewrite(store / STATISTICS, change, checks)
    refused(store, STATISTICS, message)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(version=3), "of version 3"),
        (dict(num_batches="2"), "its 'num_batches' is '2'"),
        (dict(num_batches=True), "its 'num_batches' is True"),
        (dict(num_batches=1), "1 batches cannot be all of 4 samples"),
        (dict(num_batches=10**30), "its 'num_batches' is 1000"),
        (dict(num_train_timesteps=0), "its 'num_train_timesteps' is 0"),
        (dict(num_train_timesteps=999), "'num_train_timesteps' is that of none of its schedulers"),
        (dict(complete="yes"), "its 'complete' is 'yes'"),
        (dict(config=[]), "its 'config' is list"),
        (dict(config={"num_bins": 2}), "no 'collector' in it"),
        (dict(fingerprint={"../../etc": {"a": "b"}}), "is no name of a network"),
        (dict(fingerprint={"unet": {}}), "fingerprint of 'unet' is damaged"),
        (dict(fingerprint={"unet": {"conv_in": 3}}), "fingerprint of 'unet' is damaged"),
        (dict(fingerprint={}), "no network"),
        (dict(run=7), "not those of the run that wrote it"),
        (dict(conditioning="other"), "not those of the run that wrote it"),
    ],
)
def test_the_header_of_a_store(store, change, message):
    meta = json.loads((store / "store.json").read_text())
    (store / "store.json").write_text(json.dumps({**meta, **change}))
    refused(store, "store.json", message)


def test_files_of_another_run_are_not_taken(store, tmp_path_factory):
    other = tmp_path_factory.mktemp("other") / "store"
    collect(tiny_pipe(), CalibrationConfig(**{**vars(CONFIG), "seed": 99}), other)
    for name in (BATCH, STATISTICS):
        mine = (store / name).read_bytes()
        (store / name).write_bytes((other / name).read_bytes())
        refused(store, name, "a run with other settings than the store's")
        (store / name).write_bytes(mine)
    CalibrationStore.load(store)


def test_masks_may_hold_minus_infinity():
    mask = torch.tensor([0.0, -math.inf])
    assert checked(mask, "mask", None) is mask
    for wrong in ([1.0, -math.inf], [math.nan, 0.0], [math.inf, 0.0]):
        with pytest.raises(ValueError, match="NaN or infinity"):
            checked(torch.tensor(wrong), "x", None)


FACTORY = (
    '{"type": "collections.defaultdict", "context": '
    '{"default_factory_module": "%s", "default_factory_name": "%s", "dict_context": ["a"]}}'
)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"type": "collections.defaultdict", "context": %s}' % (FACTORY % ("os", "getcwd")), "no plain container"),
        (
            '{"type": "collections.defaultdict", "context": %s}' % (FACTORY % ("builtins", "eval")),
            "no plain container",
        ),
        ('{"type": "collections.namedtuple", "context": "Point"}', "no plain container"),
        ('{"type": "builtins.dict", "context": "[{\\"__enum__\\": true, \\"fqn\\": \\"os:x\\"}]"}', "do not fit"),
        ('{"type": "builtins.dict", "context": "[\\"a\\", \\"b\\"]"}', "do not fit"),
        ('{"type": "builtins.tuple", "context": "3"}', "damaged"),
        ('{"type": null, "context": null}', "damaged"),
        ('{"type": "builtins.dict"}', "damaged"),
        ('{"type": ["builtins.dict"], "context": "[]"}', "."),
    ],
)
def test_structures_build_plain_containers_only(text, message):
    with pytest.raises((ValueError, TypeError), match=message):
        read_structure(tree(text), 1)


def test_containers_that_are_plain():
    for text in (
        '{"type": "builtins.list", "context": "null"}',
        '{"type": "collections.deque", "context": "null"}',
        '{"type": "collections.OrderedDict", "context": "[\\"a\\"]"}',
        FACTORY % ("builtins", "list"),
    ):
        assert read_structure(tree(text), 1).num_leaves == 1
    with pytest.raises(ValueError, match="places for 1 values, and 2 are there"):
        read_structure(tree(text), 2)
    for value in ({"dtype": "nn"}, {"size": [-1]}, {"device": 3}, {"os": "x"}, [1], {}):
        with pytest.raises(ValueError):
            read_leaf(value)


def test_statistics_of_any_values_are_taken():
    """Small and large, one-sided, zero, never called, denormal."""
    for values in ([0.0], [1e-38, -1e-38], [1e-42], [-5.0, -4.0], [3e38, -1e-5], [65504.0], [2.0], [-2.0]):
        statistics = InputStatistics(2, 2)
        for value in values:
            statistics.update(0, 1, torch.tensor([value]))
        again = InputStatistics.from_tensors(statistics.tensors()).tensors()
        assert all(torch.equal(again[name], tensor) for name, tensor in statistics.tensors().items())


# --- two runs at once, and disks that are full ---------------------------------------------------------------


def test_a_second_run_with_other_settings_is_refused_before_it_works(tmp_path, monkeypatch):
    folder, seen = tmp_path / "store", []
    pipe = tiny_pipe()

    def during(*_):
        if not seen:
            seen.append(True)
            with pytest.raises(UserError, match="another run with other settings is writing into"):
                collect(tiny_pipe(), CalibrationConfig(**{**vars(CONFIG), "seed": 99}), tmp_path / "store")

    pipe.unet.register_forward_pre_hook(during)
    collect(pipe, CONFIG, folder)
    assert seen and CLAIM not in os.listdir(folder)
    assert CalibrationStore.load(folder).config["seed"] == 0


def test_the_lock_of_a_killed_run_is_no_file_of_somebody(tmp_path):
    (tmp_path / CLAIM).write_text("of a dead process")
    collect(tiny_pipe(), CONFIG, tmp_path)
    assert CLAIM not in os.listdir(tmp_path)


def test_a_finished_store_is_read_where_nothing_can_be_written(store, monkeypatch):
    def refused(**_):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr("ptq4dm.files.places.tempfile.TemporaryFile", refused)
    with claimed(store, "somebody reads it too"):
        assert len(collect(tiny_pipe(), CONFIG, store).recorded()) == 4


def test_a_disk_without_room_is_told_after_the_first_batch(tmp_path, monkeypatch):
    calls = []
    pipe = tiny_pipe()

    def usage(path):
        size = (tmp_path / "s" / "batch-00000.safetensors").stat().st_size if calls else 10**9
        calls.append(path)
        return type("usage", (), {"free": size if len(calls) > 1 else 10**9})

    monkeypatch.setattr("ptq4dm.files.places.shutil.disk_usage", usage)
    config = CalibrationConfig(**{**vars(CONFIG), "num_samples": 20})
    with pytest.raises(UserError, match="the rest of a calibration store takes at least .* MB .* make room"):
        collect(pipe, config, tmp_path / "s")
    assert sorted(os.listdir(tmp_path / "s")) == ["batch-00000.safetensors", "store.json"]
    monkeypatch.undo()
    assert len(collect(tiny_pipe(), config, tmp_path / "s").recorded()) == 20  # and goes on

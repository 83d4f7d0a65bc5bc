"""Folders that are damaged, lead out of themselves or would run code: one sentence, and nothing of them runs."""

import inspect
import json
import math
import pickle
import shutil
import sys
import types

import diffusers
import pytest
from diffusers import DDIMScheduler, DDPMPipeline
from safetensors.torch import load_file, save_file

import ptq4dm
from models import plain_unet
from ptq4dm import RTNConfig
from ptq4dm.errors import DamagedFile
from ptq4dm.pipelines import folder as folder_checks
from ptq4dm.pipelines.folder import check_folder

pytestmark = pytest.mark.usefixtures("one_thread")

INDEX = "model_index.json"
WEIGHTS = "diffusion_pytorch_model.safetensors"
MAP = f"unet/{WEIGHTS}.index.json"
TEXTS = ("", "null", "[]", "[" * 100000, '{"a":' * 50000, '{"a": ' + "9" * 5000 + "}", "\ufeff{}", '{"a": 1, "a": 2}')


def pipeline(model):
    return DDPMPipeline(model, DDIMScheduler())


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved") / "pipe"
    model = plain_unet()
    ptq4dm.quantize(model, RTNConfig(activations="dynamic"))
    pipeline(model).save_pretrained(folder, max_shard_size="10KB")
    assert (folder / MAP).is_file()
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    shutil.copytree(saved, tmp_path / "pipe")
    return tmp_path / "pipe"


def change(path, **entries):
    path.write_text(json.dumps({**json.loads(path.read_text()), **entries}))


@pytest.fixture
def trap(tmp_path):
    """The text of a module that leaves a trace where it runs, and whether it has run."""
    trace = tmp_path / "trace"
    yield f"open({str(trace)!r}, 'w').close()\nclass Evil: pass\n"
    assert not trace.exists()


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("name", [INDEX, "unet/config.json", "scheduler/scheduler_config.json", MAP])
def test_damaged_json(name, text, folder):
    (folder / name).write_text(text, encoding="utf-8")
    with pytest.raises(DamagedFile, match=name) as caught:
        ptq4dm.load_pipeline(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "entries",
    [
        {"unet": ["evil_module", "Evil"]},
        {"unet": ["os", "system"]},
        {"unet": ["subprocess", "Popen"]},
        {"unet": ["antigravity", "Evil"]},
        {"unet": ["diffusers", "NoSuchModel"]},
        {"unet": ["diffusers", "__builtins__"]},
        {"unet": [3, 4]},
        {"unet": "x"},
        {"../outside": ["diffusers", "UNet2DModel"]},
        {"/outside": ["diffusers", "UNet2DModel"]},
        {"_class_name": ["pipeline", "Evil"]},
        {"_class_name": "os"},
        {"_class_name": 5},
        {"number": 2**70},
    ],
)
def test_entries_of_model_index(entries, folder):
    change(folder / INDEX, **entries)
    with pytest.raises(DamagedFile):
        ptq4dm.load_pipeline(folder)


def test_code_in_a_folder_never_runs(folder, trap, monkeypatch):
    """Of a component's module, of the pipeline's, of auto_map, and of a module that the path would find."""
    for place in (folder / "unet" / "evil.py", folder / "evil.py", folder / "pipeline.py"):
        place.write_text(trap)
    monkeypatch.syspath_prepend(folder)
    original = (folder / INDEX).read_text()
    for entries in ({"unet": ["evil", "Evil"]}, {"_class_name": ["pipeline", "Evil"]}):
        change(folder / INDEX, **entries)
        with pytest.raises(DamagedFile):
            ptq4dm.load_pipeline(folder)
        (folder / INDEX).write_text(original)
    change(folder / "unet" / "config.json", auto_map={"AutoModel": "evil.Evil"})
    with pytest.raises(DamagedFile, match="auto_map"):
        ptq4dm.load_pipeline(folder)
    assert "evil" not in sys.modules


def test_pickles_are_never_opened(folder, tmp_path):
    class Evil:
        def __reduce__(self):
            return open, (str(tmp_path / "trace"), "w")

    for path in (folder / "unet").glob("*.safetensors*"):
        path.unlink()
    (folder / "unet" / "diffusion_pytorch_model.bin").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(DamagedFile, match="pickled"):
        ptq4dm.load_pipeline(folder)
    assert not (tmp_path / "trace").exists()


@pytest.mark.parametrize(
    "file, words",
    [
        ("../outside.safetensors", "leads out"),
        ("/etc/passwd", "leads out"),
        ("..", "leads out"),
        ("a\\b.safetensors", "leads out"),
        (5, "leads out"),
        (None, "leads out"),
        ("missing.safetensors", "not beside it"),
        ("config.json", "no safetensors"),
        ("diffusion_pytorch_model-00002-of", "no safetensors"),
    ],
)
def test_an_index_that_leads_astray(file, words, folder):
    names = json.loads((folder / MAP).read_text())["weight_map"]
    change(folder / MAP, weight_map={**names, "conv_in.qweight": file})
    with pytest.raises(DamagedFile, match=words):
        ptq4dm.load_pipeline(folder)


def test_an_index_that_its_files_contradict(folder):
    names = json.loads((folder / MAP).read_text())["weight_map"]
    other = next(file for file in names.values() if file != names["conv_in.qweight"])
    change(folder / MAP, weight_map={**names, "conv_in.qweight": other})
    with pytest.raises(DamagedFile, match="lacks 'conv_in.qweight'"):
        ptq4dm.load_pipeline(folder)
    names.pop("conv_in.qweight")
    change(folder / MAP, weight_map=names)
    with pytest.raises(DamagedFile, match="conv_in.qweight"):
        ptq4dm.load_pipeline(folder)


def test_an_index_of_a_variant_that_was_not_downloaded_is_no_matter(folder):
    names = json.loads((folder / MAP).read_text())["weight_map"]
    other = {"metadata": {}, "weight_map": dict.fromkeys(names, "model.fp16-00001-of-00001.safetensors")}
    (folder / "unet" / f"{WEIGHTS}.index.fp16.json").write_text(json.dumps(other))
    ptq4dm.load_pipeline(folder)


@pytest.mark.parametrize(
    "entries",
    [
        {"in_channels": "x"},
        {"block_out_channels": None},
        {"block_out_channels": [2**62, 2**62]},
        {"down_block_types": ["Evil"]},
        {"_class_name": 5},
        {"quantization_config": None},  # its codes would be passed over
        {"quantization_config": {"quant_method": "evil"}},
        {"quantization_config": 5},
    ],
)
def test_a_damaged_configuration(entries, folder):
    change(folder / "unet" / "config.json", **entries)
    with pytest.raises(DamagedFile) as caught:
        ptq4dm.load_pipeline(folder)
    assert "\n" not in str(caught.value)


def test_what_honest_folders_hold(folder, tmp_path, monkeypatch):
    """Links, as a hub's cache has them; python files that nothing names; a scheduler of the caller's own module."""
    (folder / "unet" / "example.py").write_text("raise SystemExit")
    (folder / "unet" / "notes.json").write_text("no JSON")
    blobs = tmp_path / "blobs"
    blobs.mkdir()
    for number, path in enumerate(sorted((folder / "unet").glob("*.safetensors"))):
        path.rename(blobs / str(number))
        path.symlink_to(blobs / str(number))
    (folder / "unet").rename(tmp_path / "unet")
    (folder / "unet").symlink_to(tmp_path / "unet")
    module = types.ModuleType("my_schedulers")
    module.MyScheduler = type("MyScheduler", (DDIMScheduler,), {"__module__": "my_schedulers"})
    module.SchedulerMixin = DDIMScheduler.__mro__[1]
    change(folder / INDEX, scheduler=["my_schedulers", "MyScheduler"])
    with pytest.raises(DamagedFile, match="my_schedulers"):
        ptq4dm.load_pipeline(folder)
    monkeypatch.setitem(sys.modules, "my_schedulers", module)
    assert type(ptq4dm.load_pipeline(folder).scheduler) is module.MyScheduler


def test_a_component_that_the_caller_gives_is_not_looked_at(folder):
    model = ptq4dm.load_pipeline(folder).unet
    for path in (folder / "unet").glob("*.safetensors*"):
        path.unlink()
    (folder / "unet" / "diffusion_pytorch_model.bin").write_bytes(b"")
    assert ptq4dm.load_pipeline(folder, unet=model).unet is model


def test_headers_of_overlapping_tensors(folder):
    path = next((folder / "unet").glob("*.safetensors"))
    name = next(iter(load_file(path)))
    save_file(load_file(path), path)
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    header[name]["data_offsets"] = [0, 2**60]
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + size :])
    with pytest.raises(DamagedFile, match=path.name):
        ptq4dm.load_pipeline(folder)


WRONG = [
    {"timestep_spacing": -7.25}, {"set_alpha_to_one": "yes"}, {"steps_offset": "1"}, {"prediction_type": True},
    {"beta_start": [0.1, "x"], "beta_schedule": ["linear"]}, {"trained_betas": math.nan}, {"beta_end": math.nan},
]  # fmt: skip


@pytest.mark.parametrize("entries", WRONG)
def test_a_scheduler_that_would_count_otherwise(entries, folder):
    change(folder / "scheduler" / "scheduler_config.json", **entries)
    with pytest.raises(DamagedFile, match="scheduler_config.json cannot be read .*(its '|NaN)"):
        ptq4dm.load_pipeline(folder)


@pytest.mark.parametrize("name", sorted(name for name in dir(diffusers) if name.endswith("Scheduler")))
def test_schedulers_of_diffusers_are_taken_as_they_are_saved(name, folder):
    kind = getattr(diffusers, name)
    try:
        scheduler = kind()
    except (TypeError, ImportError):
        pytest.skip("it has no defaults, or needs a package that is not here")
    scheduler.save_pretrained(folder / "scheduler")
    check_folder(folder, {})


def test_numbers_that_stand_for_each_other_are_taken(folder):
    change(
        folder / "scheduler" / "scheduler_config.json",
        clip_sample=1, num_train_timesteps=1000.0, steps_offset=None, sample_max_value=math.inf, further="entry",
    )  # fmt: skip
    check_folder(folder, {})


@pytest.mark.parametrize(
    ("place", "entries", "words"),
    [
        ("unet/config.json", {"norm_eps": "7"}, "its 'norm_eps' is '7'"),
        ("unet/config.json", {"sample_size": "7"}, "its 'sample_size' is '7'"),
        ("scheduler/scheduler_config.json", {"beta_start": -1}, "its 'beta_start' is -1, and lies between 0 and 1"),
        ("scheduler/scheduler_config.json", {"beta_end": float("inf")}, "its 'beta_end' is inf"),
        ("scheduler/scheduler_config.json", {"beta_start": True}, None),
    ],
)
def test_configurations_that_would_fail_as_they_sample(place, entries, words, folder):
    change(folder / place, **entries)
    with pytest.raises(DamagedFile, match=words or "beta_start"):
        ptq4dm.load_pipeline(folder)


def test_networks_of_diffusers_are_taken_as_they_are_saved():
    """No default of any network is a text where its annotation wants a number, or the reverse."""
    kinds = [kind for name in dir(diffusers) if isinstance(kind := getattr(diffusers, name, None), type)]
    networks = [kind for kind in kinds if issubclass(kind, diffusers.ModelMixin) and "__init__" in vars(kind)]
    assert len(networks) > 50
    for kind in networks:
        known = inspect.signature(inspect.unwrap(vars(kind)["__init__"])).parameters.values()
        plain = {one.name: one.default for one in known if one.default is not one.empty}
        folder_checks._check_texts(json.loads(json.dumps({"_class_name": kind.__name__, **plain}, default=str)))


def test_weights_that_a_network_lacks(tmp_path):
    pipeline(plain_unet()).save_pretrained(tmp_path / "pipe")
    config = json.loads((tmp_path / "pipe/unet/config.json").read_text())
    change(tmp_path / "pipe/unet/config.json", layers_per_block=config["layers_per_block"] + 1)
    with pytest.raises(DamagedFile, match="'unet' lacks [0-9]+ of its tensors"):
        ptq4dm.load_pipeline(tmp_path / "pipe")

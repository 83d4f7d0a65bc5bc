"""Every public name, called with values of every wrong kind: a sentence comes out, and never a traceback.

What may come out beside UserError is Python's own TypeError for a missing argument, or an unknown one of a function.
"""

import inspect
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMPipeline

import models
import ptq4dm
import ptq4dm.samplers
import ptq4dm.svdquant
from ptq4dm import UserError
from ptq4dm.quantization.recipe import METHODS


class Odd:
    """Nothing that anybody expects."""


WRONG = [
    *(None, True, False, 5, -1, 0, 10**400, 1.5, math.nan, math.inf, 1j),
    *("abc", "", "8", b"x", "a\0b", "x" * 300, "\ud800", Path("nowhere")),
    *([], [1.5], ["a"], [None], ["abc", 5], (), (1, 2, 3), {1}, {}, {"a": 1}, {3: 4}, range(0)),
    *(object(), Odd, Odd(), len, ptq4dm.CalibrationConfig, ptq4dm.RTNConfig(), torch.nn.Linear(2, 2)),
    *(torch.zeros(()), torch.zeros(2, 3), torch.zeros(2, device="meta"), torch.float64, torch.device("meta")),
    *(np.zeros(3), np.float32("nan")),
]
ROOMS = (ptq4dm, ptq4dm.samplers, ptq4dm.svdquant)
ERRORS = ("UserError", "DamagedFile")
CALLED = ("show", "call", "load")
NAMES = sorted({(room.__name__, name) for room in ROOMS for name in room.__all__ if name not in ERRORS})


def pipeline():
    return DDPMPipeline(models.plain_unet(), DDIMScheduler(clip_sample=True))


def right(name: str, folder: Path) -> dict:
    """Arguments that a public name takes, so that one at a time can be wrong."""
    pipe, unet = pipeline(), models.plain_unet()
    few = ptq4dm.CalibrationConfig(num_samples=1, num_inference_steps=1, num_bins=1)
    quick = {"metric": "none", "num_paired": 0, "num_heldout": 1, "timed_steps": 0, "num_inference_steps": 1}
    tiny = {"images": 1, "batch_size": 1, "degradation_steps": 1, "path_points": 1, "num_fid": 0}
    arguments = {
        "CalibrationStore": {"config": {}, "fingerprint": {}, "num_train_timesteps": 1000},
        "PixelDiTPipeline": {"transformer": None, "scheduler": None},
        "Plan": {"method": "rtn"},
        "attention_errors": {"target": models.conditional_unet(), "call": lambda: None},
        "attention_in_8_bits": {"target": models.conditional_unet()},
        "cached_steps": {"target": pipe, "plan": ptq4dm.StepPlan(depth=0)},
        "cached_text": {"target": models.conditional_unet()},
        "collect": {"pipe": pipe, "config": few},
        "compare": {
            "models": ["one", "other"],
            "full_precision": "original",
            "config": ptq4dm.CompareConfig(num_images=1, num_heldout=0, timed_steps=0, num_inference_steps=1),
            "output": folder / "compared",
            "load": lambda name: pipe,
        },
        "distill": {"pipe": pipe, "config": ptq4dm.samplers.DisBackConfig(**tiny), "folder": folder},
        "evaluate": {"pipe": pipe, "full_precision": pipe, "config": ptq4dm.EvaluateConfig(**quick)},
        "export_comfy": {"target": unet, "file": folder / "comfy.safetensors"},
        "export_nunchaku_lite": {"model": unet, "folder": folder / "lite"},
        "fit": {
            "pipe": pipe,
            "config": ptq4dm.samplers.FitConfig(evaluations=[1], num_trajectories=2, teacher_steps=2),
            "teacher": pipe,
        },
        "fuse": {"target": unet},
        "fuse_lora": {"target": unet},
        "generate": {"pipe": pipe, "seeds": [0], "output": folder / "images", "num_inference_steps": 1},
        "load_embedding": {"pipe": pipe, "path": folder / "embedding.safetensors"},
        "load_nunchaku_flux": {"file": folder / "file"},
        "load_nunchaku_lite": {"source": folder / "file"},
        "load_pipeline": {"model": folder},
        "load_quantized_file": {"target": unet, "file": folder / "file"},
        "load_reference": {"name": "no model"},
        "optimize": {"target": unet},
        "personalize": {
            "pipe": ptq4dm.PixelDiTPipeline(models.pixel_dit(), DDIMScheduler()),
            "images": torch.zeros(1, 3, 8, 8, dtype=torch.uint8),
            "config": ptq4dm.PersonalizeConfig(steps=1, batch_size=1, perturbations=1),
            "folder": folder / "personalized",
            "class_row": 1,
        },
        "plan_attention": {"target": unet},
        "plan_cached_steps": {
            "pipe": pipe,
            "config": ptq4dm.StepPlanConfig(num_inference_steps=2, reuse=0.5, num_samples=1),
        },
        "quantization_config": {"model": unet},
        "quantize": {"target": torch.nn.Linear(2, 2), "config": ptq4dm.SVDQuantConfig()},
        "record": {"target": unet},
        "sample": {"pipe": pipe, "seeds": [0], "num_inference_steps": 1},
        "scale_lora": {"target": unet, "scales": {}},
        "train": {
            "pipe": pipe,
            "images": folder,
            "config": ptq4dm.ShiftQuantConfig(images=1, batch_size=1, sample_steps=0),
            "folder": folder / "trained",
        },
        "unfuse": {"target": unet},
        "unoptimize": {"target": unet},
        "unfuse_lora": {"target": unet},
    }
    return arguments.get(name, {})


def refused(call, arguments: dict) -> bool:
    """Whether a call ends in one sentence. Anything else that it raises fails the test, with what it was given."""
    try:
        found = call(**arguments)
        if hasattr(found, "__enter__"):
            with found:
                pass
        return False
    except UserError as error:
        assert len(str(error).splitlines()) == 1 and len(str(error)) < 1000, str(error)
        return True
    except Exception as error:
        pytest.fail(f"{type(error).__name__}: {error} from {arguments}")


@pytest.mark.parametrize(("room", "name"), NAMES)
def test_no_wrong_value_is_a_traceback(room, name, tmp_path, monkeypatch, one_thread):
    """Of each argument some values are right; most are not, whatever the argument."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    (tmp_path / "in use").touch()
    call = getattr(ptq4dm if room == "ptq4dm" else getattr(ptq4dm, room.rpartition(".")[2]), name)
    given, results = right(name, tmp_path), []
    for parameter in inspect.signature(call).parameters.values():
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD) or parameter.name in CALLED:
            continue  # a function of the caller's, whose errors are the caller's
        for wrong in WRONG:
            if wrong is not None or parameter.default is not None:  # else it is the default
                results.append(refused(call, {**given, parameter.name: wrong}))
    free = {"CalibrationStore": 0.6}.get(name, 0.7)  # it keeps what nobody asks about: any dict of settings
    assert sum(results) > free * len(results) and len(results) >= len(WRONG) - 1


@pytest.mark.parametrize(
    "call",
    [
        ptq4dm.Plan.load,
        ptq4dm.Plan.from_dict,
        ptq4dm.CalibrationStore.load,
        ptq4dm.RTNConfig.from_dict,
        ptq4dm.samplers.DDIMScheduler.from_config,
        ptq4dm.samplers.DEISScheduler.from_config,
        ptq4dm.samplers.OneStepScheduler.from_config,
    ],
)
def test_nor_is_any_given_to_what_loads(call, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    name = next(iter(inspect.signature(call).parameters))
    results = [refused(call, {name: wrong}) for wrong in WRONG]
    assert sum(results) >= len(WRONG) - 3  # an empty config stands for the defaults


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda pipe: ptq4dm.quantize(5, ptq4dm.RTNConfig()), "must be a diffusers pipeline.*got 5"),
        (lambda pipe: ptq4dm.quantize(pipe, "svdquant"), "config is a recipe, such as PTQ4DMConfig"),
        (lambda pipe: ptq4dm.collect("pipe"), "'pipe' is a name; give the pipeline itself"),
        (lambda pipe: ptq4dm.collect(pipe, {}), "config must be a CalibrationConfig or None; got an empty dict"),
        (lambda pipe: ptq4dm.collect(pipe.unet), "UNet2DModel is a model by itself"),
        (lambda pipe: ptq4dm.generate(pipe, "abc", "out"), "seeds must be a list of whole numbers; got 'abc'"),
        (lambda pipe: ptq4dm.generate(pipe, [0], output=5), "output must be a text or a path; got 5"),
        (lambda pipe: ptq4dm.sample(pipe, 3, num_inference_steps=1), "seeds must be .*; got 3"),
        (lambda pipe: ptq4dm.sample(pipe, [0], num_inference_steps="4"), "num_inference_steps must be .*; got '4'"),
        (lambda pipe: ptq4dm.sample(pipe, [1.5], num_inference_steps=1), "a seed must be a whole number"),
        (lambda pipe: ptq4dm.sample(pipe, [True], num_inference_steps=1), "a seed must be a whole number"),
        (
            lambda pipe: ptq4dm.sample(pipe, [2**63], num_inference_steps=1),
            "a seed must be .* to 9223372036854775807",
        ),
        (lambda pipe: ptq4dm.CalibrationConfig(seed=2**63 - 5), "leaves no room for 129 seeds"),
        (lambda pipe: ptq4dm.EvaluateConfig(heldout_seed=2**63 - 5), "heldout_seed .* leaves no room for 64 seeds"),
        (lambda pipe: ptq4dm.record(5).__enter__(), "must be a diffusers pipeline"),
        (lambda pipe: ptq4dm.Plan.load(5), "path must be a text or a path; got 5"),
        (lambda pipe: ptq4dm.SVDQuantConfig(rank="8"), "SVDQuantConfig: rank must be a whole number from 0 to 1024"),
    ],
)
def test_the_sentence_says_what_is_wanted(call, message):
    with pytest.raises(UserError, match=message):
        call(pipeline())


CONFIGS = sorted(
    {getattr(room, name) for room in ROOMS for name in room.__all__ if name.endswith("Config")}
    | {kind for kind in METHODS.values()},
    key=lambda kind: kind.__name__,
)


@pytest.mark.parametrize("kind", CONFIGS, ids=lambda kind: kind.__name__)
def test_a_typing_error_in_an_option_names_what_was_meant(kind):
    names = list(inspect.signature(kind).parameters)
    assert len(names) > 3 and "kwargs" not in names
    with pytest.raises(
        UserError, match=f"^{kind.__name__} has no option qqqqqq; it has {min(names)}, .*[.]$"
    ) as error:
        kind(qqqqqq=1)
    told = str(error.value).partition("; it has ")[2].rstrip(".").split(", ")
    assert len(told) > 3 and set(told) <= set(names)  # fields that a method fixes are no options
    for name in told:
        with pytest.raises(UserError, match=f"^{kind.__name__} has no option {name}x; did you mean '.*'") as error:
            kind(**{f"{name}x": 1})
        assert isinstance(error.value, TypeError) and str(error.value).endswith(f"'{name}'?")


def test_the_near_match_is_named_where_a_dict_gives_the_option():
    with pytest.raises(TypeError, match="QoQConfig has no option roundin; did you mean 'rounding'[?]"):
        ptq4dm.QoQConfig(roundin="gptq")
    with pytest.raises(UserError, match="QoQConfig has no option roundin; did you mean 'rounding'[?]"):
        ptq4dm.QuantConfig.from_dict({"method": "qoq", "roundin": "gptq"})


@pytest.mark.parametrize("seeds", [range(3, 5), (3, 4), np.array([3, 4]), torch.tensor([3, 4]), [np.int32(3), 4]])
def test_seeds_of_every_honest_kind_give_the_same_images(seeds):
    expected = ptq4dm.sample(pipeline(), [3, 4], num_inference_steps=1)
    assert torch.equal(ptq4dm.sample(pipeline(), seeds, num_inference_steps=np.int64(1)), expected)


def test_the_largest_seed_is_a_seed():
    assert ptq4dm.sample(pipeline(), [2**63 - 1], num_inference_steps=1).isfinite().all()


def test_conditioning_that_does_not_fit_is_a_sentence(tmp_path):
    pipe = ptq4dm.PixelDiTPipeline(models.pixel_dit(), DDIMScheduler())
    for labels in (5, {"a": 1}, torch.tensor(3), ["a"], [1.5], torch.zeros(2, 2, dtype=torch.int64), [10**400]):
        with pytest.raises(UserError, match="class.label"):
            ptq4dm.sample(pipe, [0], num_inference_steps=1, conditioning={"class_labels": labels})
    with pytest.raises(UserError, match="PixelDiTPipeline cannot be called with this class_labels, eta: "):
        chosen = {"conditioning": {"class_labels": [1]}, "pipeline_kwargs": {"eta": "much"}}
        ptq4dm.sample(pipe, [0], num_inference_steps=2, **chosen)
    with pytest.raises(UserError, match="eta must be .*not NaN or infinity"):
        ptq4dm.generate(pipe, [0], tmp_path / "out", pipeline_kwargs={"eta": math.nan})
    assert not (tmp_path / "out").exists()


def test_a_pipeline_without_values_is_refused_before_anything_is_written(tmp_path):
    pipe = pipeline()
    pipe.unet.to("meta")
    few = ptq4dm.CalibrationConfig(num_samples=1, num_inference_steps=1)
    for call in (
        lambda: ptq4dm.sample(pipe, [0], num_inference_steps=1),
        lambda: ptq4dm.generate(pipe, [0], tmp_path / "out", num_inference_steps=1),
        lambda: ptq4dm.collect(pipe, few, tmp_path / "out"),
        lambda: ptq4dm.evaluate(pipe, pipeline(), output=tmp_path / "out"),
        lambda: ptq4dm.evaluate(pipeline(), pipe, output=tmp_path / "out"),
    ):
        with pytest.raises(UserError, match="is on device 'meta'"):
            call()
    assert not (tmp_path / "out").exists()

"""evaluate and evaluate_images on tiny random pipelines: figures that can be checked by hand, and refusals."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler, DDPMPipeline
from PIL import Image
from torchmetrics.functional.image import structural_similarity_index_measure

import models
import ptq4dm
from ptq4dm import UserError
from ptq4dm.calibration.calls import calls_of_rows
from ptq4dm.calibration.record import replay
from ptq4dm.calibration.sampled import record_calls
from ptq4dm.evaluation.compare import heldout_timesteps
from ptq4dm.evaluation.evaluate import EvaluateConfig, evaluate, evaluate_images, write_reference
from ptq4dm.evaluation.feature_fid import FeatureFID
from ptq4dm.evaluation.frechet import read_statistics
from ptq4dm.evaluation.measures import summarized
from ptq4dm.evaluation.paired import EpsilonError, image_errors, paired_psnr, psnr
from ptq4dm.evaluation.published import directions
from ptq4dm.evaluation.report import check_places, format_report
from ptq4dm.evaluation.same import check_same
from ptq4dm.layers.sizes import stored_bytes
from ptq4dm.pipelines.images import save_png, to_uint8
from ptq4dm.pipelines.pixel_dit import PixelDiTPipeline
from ptq4dm.pipelines.sampling import sample
from ptq4dm.samplers import FittedScheduler
from two_processes import two_ranks

SMALL = {"num_images": 6, "num_inference_steps": 2, "batch_size": 4, "num_paired": 3, "num_heldout": 6}
SMALL |= {"num_bins": 2, "warmup_steps": 0, "timed_steps": 1}


def pipeline(size: int = 32, noise: float = 0.0) -> DDPMPipeline:
    """A UNet of 4,000 random parameters, the same on every call; `noise` is added to its weights."""
    unet = models.plain_unet(sample_size=size)
    with torch.no_grad():
        for p in unet.parameters():
            p += noise * torch.randn_like(p)
    return DDPMPipeline(unet, DDIMScheduler(timestep_spacing="trailing"))


def save_pngs(images: torch.Tensor, folder: Path) -> Path:
    folder.mkdir()
    for k, image in enumerate(to_uint8(images)):
        save_png(image, folder / f"{k:06d}.png", {})
    return folder


def test_a_pipeline_and_its_saved_pictures_give_the_same_figure(tmp_path):
    pipe, config = pipeline(), EvaluateConfig(**SMALL)
    report = evaluate(pipe, config=config)
    seeds = ([0, 1, 2, 3], [4, 5])
    images = torch.cat([sample(pipe, s, num_inference_steps=2) for s in seeds])
    folder = save_pngs(images, tmp_path / "pngs")
    again = evaluate_images(folder, EvaluateConfig(batch_size=5))
    assert report["frechet"]["value"] == pytest.approx(again["frechet"]["value"], rel=1e-4)
    assert report["frechet"]["value"] > 1
    measure = FeatureFID()
    for batches in ([images], [images[:2], to_uint8(images[2:])]):
        assert measure(batches) == pytest.approx(report["frechet"]["value"], rel=1e-4)
    conditions = {k: report["frechet"][k] for k in ("label", "num_images", "resize", "seed", "num_inference_steps")}
    assert conditions == {
        "label": "feature-FID",
        "num_images": 6,
        "resize": "none (32x32)",
        "seed": 0,
        "num_inference_steps": 2,
    }
    told = {"frechet", "bytes", "memory", "networks", "sampler", "num_inference_steps", "settings", "warnings"}
    assert set(report) == told
    assert report["networks"] == {"quantized": [], "full_precision": ["unet"]}
    assert "biased upwards" in report["warnings"][0] and "biased upwards" in format_report(report)
    # Against themselves they are at no distance; folder against folder and against the folder's npz agree.
    other = save_pngs(images.flip(2) * 0.5, tmp_path / "other")
    assert abs(evaluate_images(folder, EvaluateConfig(reference=folder))["frechet"]["value"]) < 1e-4
    by_folder = evaluate_images(folder, EvaluateConfig(reference=other))["frechet"]
    assert write_reference(other, tmp_path / "other.npz") == 6
    by_file = evaluate_images(folder, EvaluateConfig(reference=tmp_path / "other.npz"))["frechet"]
    assert by_file["value"] == pytest.approx(by_folder["value"]) and by_file["value"] > 0.1
    assert read_statistics(tmp_path / "other.npz").n == by_file["reference_images"] == 6
    (folder / "notes.txt").write_text("x")
    (other / ".hidden.png").write_text("x")
    text = format_report(evaluate_images(folder, EvaluateConfig(reference=other)))
    assert f"{folder}: 1 not pictures by their suffix, passed over" in text and f"{other}: 1 hidden" in text


def test_comparison_with_the_original_agrees_with_its_definitions(tmp_path):
    pipe, original, config = pipeline(noise=0.02), pipeline(), EvaluateConfig(**SMALL, metric="none")
    known = {"reuse": {"weights": [[], [1.0]], "depth": 1}}
    report = evaluate(pipe, original, config, tmp_path / "out", metadata=known)
    assert report["metadata"] == known
    a, b = (sample(p, [0, 1, 2], num_inference_steps=2) for p in (pipe, original))
    mse = (a - b).square().mean((1, 2, 3))
    assert report["paired"]["mse"] == pytest.approx(float(mse.mean()), rel=1e-4)
    assert report["paired"]["psnr_db"] == pytest.approx(float((-10 * mse.log10()).mean()), rel=1e-4)
    assert report["paired"]["identical"] == 0 and report["paired"]["num_images"] == 3
    torchs = structural_similarity_index_measure(a, b, data_range=1.0)
    assert report["paired"]["ssim"]["mean"] == pytest.approx(float(torchs), rel=1e-4)

    timesteps = heldout_timesteps(6, 1000)
    assert timesteps == sorted(timesteps, reverse=True) and sum(t < 500 for t in timesteps) == 3
    calls = record_calls(original, range(10**6, 10**6 + 6), timesteps, num_inference_steps=2)
    e_q, e_fp = (replay(p.unet, calls) for p in (pipe, original))
    ratio = float((e_q - e_fp).square().sum() / e_fp.square().sum())
    epsilon = report["epsilon_error"]
    assert epsilon["overall"] == pytest.approx(ratio, rel=1e-4) and 0 < ratio < 2
    high = calls.timestep >= 500
    ratio = float((e_q - e_fp)[high].square().sum() / e_fp[high].square().sum())
    assert epsilon["bins"][1]["error"] == pytest.approx(ratio, rel=1e-4)
    assert sum(b["rows"] for b in epsilon["bins"]) == epsilon["rows"] == 6

    size = stored_bytes(original.unet)
    assert report["bytes"] == {"model": size, "full_precision": size, "ratio": 1.0}
    assert report["step_time"]["speedup"] > 0 and "milliseconds" not in report["step_time"]
    assert json.loads((tmp_path / "out" / "report.json").read_text()) == report
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["report.json", "samples.png"]
    with Image.open(tmp_path / "out" / "samples.png") as picture:  # two rows of three, 3x, and room for labels
        assert picture.width > 3 * 96 and 2 * 96 < picture.height < 3 * 96
    text = format_report(report)
    for word in ("same-seed PSNR", "epsilon error", "500 to 1000", "as large as full precision"):
        assert word in text


@pytest.mark.parametrize(
    ("ratio", "speed", "size"),
    [
        (1.24, "1.24 times faster than full precision: 3.000 ms", "1.24 times smaller than full precision, 1,240"),
        (0.5, "2.00 times slower than full precision: 3.000 ms", "2.00 times larger than full precision, 1,240"),
        (0.998, "as fast as full precision: 3.000 ms", "as large as full precision, 1,240"),
    ],
)
def test_a_ratio_says_which_way_and_of_what(ratio, speed, size):
    timed = {"speedup": ratio, "milliseconds": 3.0, "device": "cpu", "batch_size": 1, "timed_steps": 3}
    text = format_report({"step_time": timed, "bytes": {"model": 1000, "full_precision": 1240, "ratio": ratio}})
    assert speed in text and size in text and not re.search(r"\d x|\dx", text)


def test_a_model_compared_with_itself_loses_nothing():
    report = evaluate(pipeline(), pipeline(), EvaluateConfig(**SMALL, metric="none"))
    paired = {"num_images": 3, "seed": 0, "psnr_db": 120.0, "psnr_stderr": 0.0, "psnr_interval": [120.0, 120.0]}
    alike = report["paired"].pop("ssim")
    assert [alike["mean"], *alike["interval"]] == pytest.approx([1.0] * 3) and alike["stderr"] < 1e-9
    assert report["paired"] == {**paired, "mse": 0.0, "identical": 3}
    assert "3 identical (counted as 120 dB)" in format_report(report)
    assert report["epsilon_error"]["overall"] == 0.0


def test_half_as_many_bytes_are_counted():
    half = pipeline()
    half.unet.to(torch.float16).to(torch.bfloat16)
    config = EvaluateConfig(**SMALL | {"num_paired": 0, "num_heldout": 0, "timed_steps": 0}, metric="none")
    report = evaluate(half, pipeline(), config)
    assert report["bytes"]["ratio"] == 2.0 and set(report) == {
        "bytes",
        "memory",
        "networks",
        "sampler",
        "num_inference_steps",
        "settings",
        "warnings",
    }


def test_whatever_changes_the_images_stands_in_the_report(tmp_path):
    """Two runs of another guidance, classes or schedule are told apart by their reports alone."""
    table = {"timesteps": [900, 500], "scale": [1.0, 0.9], "weights": [[-0.1], [-0.2, 0.1]]}
    scheduler = FittedScheduler(tables={"2": table}, origin={"model": "mine"})
    pipe = PixelDiTPipeline(models.pixel_dit(sample_size=32), scheduler)
    small = {"num_images": 2, "num_paired": 0, "num_heldout": 0, "timed_steps": 0, "num_inference_steps": 2}
    guided = {"guidance_scale": 2.0, "guidance_interval": (0.2, 0.8)}
    config = EvaluateConfig(**small, pipeline_kwargs=guided, conditioning={"class_labels": [3, 4]})
    report = evaluate(pipe, config=config, output=tmp_path)
    assert json.loads((tmp_path / "report.json").read_text()) == report
    found = report["settings"]
    assert found["pipeline_kwargs"] == {"guidance_scale": 2.0, "guidance_interval": [0.2, 0.8]}
    assert found["conditioning"] == {"class_labels": [3, 4]} and found["dtype"] == "float32"
    assert found["scheduler"]["tables"]["2"] == table and found["scheduler"]["origin"] == {"model": "mine"}


def test_nan_in_samples_is_an_error_that_names_the_seeds():
    pipe = pipeline()
    with torch.no_grad():
        pipe.unet.conv_out.bias[0] = float("nan")
    with pytest.raises(UserError, match="4 of 4 images hold NaN or infinity.*first seed 7"):
        evaluate(pipe, config=EvaluateConfig(**SMALL, seed=7))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"num_images": 0}, "zero images"),
        ({"num_images": 1}, r"1 image\(s\)"),
        ({"metric": "FID"}, "metric must be one of feature-fid, fid, none"),
        ({"metric": "none"}, "nothing to measure"),
        ({"batch_size": 0}, "batch_size"),
        ({"num_paired": -1}, "num_paired"),
        ({"reference": "nowhere.npz"}, "no reference statistics at nowhere.npz"),
    ],
)
def test_settings_that_measure_nothing_are_refused(change, message):
    with pytest.raises(UserError, match=message):
        evaluate(pipeline(), config=EvaluateConfig(**SMALL | change))


def test_pictures_that_do_not_fit_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"\[N, 3, 32, 32\]"):
        evaluate(pipeline(size=16), config=EvaluateConfig(**SMALL))
    folder = save_pngs(torch.rand(3, 3, 32, 32), tmp_path / "mixed")
    save_png(torch.zeros(3, 32, 24, dtype=torch.uint8), folder / "z.png", {})
    with pytest.raises(UserError, match="24x32 but .* is 32x32"):
        evaluate_images(folder, EvaluateConfig(batch_size=1))
    with pytest.raises(UserError, match="at least 2"):
        evaluate_images(save_pngs(torch.rand(1, 3, 32, 32), tmp_path / "one"))
    with pytest.raises(UserError, match="not a folder"):
        evaluate_images(tmp_path / "none")
    with pytest.raises(UserError, match="different shapes"):
        image_errors(torch.zeros(2, 3, 32, 32), torch.zeros(2, 3, 16, 16))
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot make the folder"):
        evaluate(pipeline(), config=EvaluateConfig(**SMALL), output=tmp_path / "file")


def test_different_models_are_refused_before_any_work(tmp_path, monkeypatch):
    one_step = pipeline()
    one_step.scheduler = ptq4dm.samplers.OneStepScheduler()
    dit = PixelDiTPipeline(models.pixel_dit(sample_size=32), DDIMScheduler())
    monkeypatch.setattr("ptq4dm.evaluation.pictures.sample", lambda *args, **kw: pytest.fail("a picture was made"))
    for pipe, told in (
        (dit, "pipe is a PixelDiTPipeline and full_precision a DDPMPipeline: different models cannot be compared"),
        (pipeline(size=16), "pipe is another model than full_precision: .* differ in sample_size"),
        (one_step, "pipe takes 1 and no other, and full_precision any number of steps"),
    ):
        with pytest.raises(UserError, match=told):
            evaluate(pipe, pipeline(), EvaluateConfig(**SMALL), tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_one_model_is_known_in_other_layers_dtypes_and_wrappers():
    quantized, half, compiled = pipeline(), pipeline(), pipeline()
    ptq4dm.quantize(quantized, ptq4dm.RTNConfig(activations="dynamic"))
    half.unet.to(torch.bfloat16)
    compiled.unet = torch.compile(compiled.unet)
    for pipe in (quantized, half, compiled):
        check_same(pipe, pipeline(), "pipe", "full_precision")


def test_a_failure_leaves_no_empty_folder_behind(tmp_path, monkeypatch):
    (tmp_path / "before").mkdir()
    for output in ("before", "new/out"):
        with pytest.raises(UserError, match="no reference"):
            evaluate(pipeline(), config=EvaluateConfig(**SMALL, reference="no.npz"), output=tmp_path / output)
    assert [p.name for p in tmp_path.rglob("*")] == ["before"]

    def fail(*_):
        raise UserError("disk full")

    monkeypatch.setattr("ptq4dm.evaluation.report.save_picture", fail)
    with pytest.raises(UserError, match="disk full"):
        evaluate(pipeline(), config=EvaluateConfig(**SMALL), output=tmp_path / "new" / "out")
    assert [p.name for p in (tmp_path / "new" / "out").iterdir()] == ["report.json"]


def test_errors_by_hand():
    a = torch.zeros(2, 3, 4, 4)
    assert image_errors(a, a + torch.tensor([0.1, 0.5]).reshape(2, 1, 1, 1)) == pytest.approx([0.01, 0.25])
    assert psnr(0.01) == pytest.approx(20.0) and psnr(0.0) == pytest.approx(120.0)

    class Constant(torch.nn.Module):
        def __init__(self, value):
            super().__init__()
            self.value = torch.nn.Parameter(torch.tensor(float(value)))

        def forward(self, sample, timestep, return_dict=True):
            return (torch.ones_like(sample) * self.value * (1 + timestep.reshape(-1, 1, 1, 1)),)

    error = EpsilonError(num_bins=2, num_train_timesteps=10)
    error.update(
        Constant(3), Constant(2), calls_of_rows(torch.zeros(3, 3, 2, 2), timestep=torch.tensor([0, 0.4, 0.9]))
    )
    result = error.result()
    assert result["overall"] == pytest.approx(0.25)
    assert [(b["from"], b["to"], b["rows"]) for b in result["bins"]] == [(0, 5, 2), (5, 10, 1)]
    error.update(
        Constant(float("inf")), Constant(2), calls_of_rows(torch.zeros(1, 3, 2, 2), timestep=torch.tensor([0.1]))
    )
    with pytest.raises(UserError, match="overflowed"):
        error.result()


def test_the_interval_of_a_psnr_is_students():
    figures = paired_psnr([1e-2, 1e-3, 1e-4])  # 20, 30, 40 dB: standard deviation 10
    assert figures["psnr_db"] == pytest.approx(30) and figures["psnr_stderr"] == pytest.approx(10 / 3**0.5)
    reach = 4.302653 * 10 / 3**0.5  # Student's law with two degrees of freedom, 97.5 %
    assert figures["psnr_interval"] == pytest.approx([30 - reach, 30 + reach])
    assert figures["mse"] == pytest.approx(0.0037) and figures["identical"] == 0
    alone = paired_psnr([0.0])
    assert (alone["psnr_db"], alone["psnr_interval"], alone["identical"]) == (120, None, 1)


def test_intervals_hold_nothing_that_a_figure_cannot_be():
    """Of two seeds Student's interval reaches 12.7 standard errors."""
    assert paired_psnr([1e-4, 1e-1])["psnr_interval"] == [0, 120]  # 40 and 10 dB
    figures = summarized({"ssim": [0.94, 0.86], "lpips": [0.01, 0.2], "clip": [99.0, 20.0], "image_reward": [1, -1]})
    reach = 12.7062 * 0.04
    assert figures["ssim"]["interval"] == pytest.approx([0.9 - reach, 1.0], abs=1e-4)
    assert figures["ssim"]["stderr"] == pytest.approx(0.04)
    assert figures["lpips"]["interval"] == pytest.approx([0.0, 0.105 + 12.7062 * 0.095], abs=1e-3)
    assert figures["clip"]["interval"] == [0.0, 100.0]
    assert figures["image_reward"]["interval"] == pytest.approx([-12.7062, 12.7062], abs=1e-3)
    exact = summarized({"ssim": [1 + 1e-9, 1 + 1e-9]})["ssim"]  # what sums in floats may give
    assert exact["interval"][0] <= exact["mean"] <= exact["interval"][1]


def test_few_seeds_are_said_to_be_few():
    rows = {"ours": {"ssim": {"mean": 0.9, "interval": [0.4, 1.0]}}}
    assert directions(rows, 2).endswith("within what a figure can be; of 2 seeds it reaches 12.7 standard errors to "
                                        "either side: give more")  # fmt: skip
    assert directions(rows, 5).endswith("within what a figure can be")
    assert directions({"ours": {"ssim": {"mean": 0.9, "interval": None}}}, 1).endswith(
        "one seed has no interval: give more"
    )
    assert "interval" not in directions({"ours": {"frechet": {"mean": 3.0}}}, 0)


def test_errors_of_whole_calls_count_all_that_was_answered():
    """Models that take lists of samples, of several sizes."""

    class Lists(torch.nn.Module):
        def __init__(self, value):
            super().__init__()
            self.value = torch.nn.Parameter(torch.tensor(float(value)))

        def forward(self, x, t):
            return ([one * self.value for one in x],)

    exact, error = Lists(2), EpsilonError(num_bins=2, num_train_timesteps=10)
    with ptq4dm.record(exact) as calls:
        for t in (0.9, 0.2):
            exact([torch.ones(2), torch.ones(1, 3)], t)
    error.update(Lists(3), exact, calls)
    result = error.result()
    assert result["overall"] == pytest.approx(0.25) and result["rows"] == 2
    assert [(b["from"], b["rows"]) for b in result["bins"]] == [(0, 1), (5, 1)]


LAUNCHED = """
import json, sys
sys.path.insert(0, sys.argv[1])
from accelerate import PartialState
from test_evaluate import SMALL, pipeline
from ptq4dm.evaluation.evaluate import EvaluateConfig, evaluate
state = PartialState(cpu=True)
assert state.num_processes == 2
config = EvaluateConfig(**SMALL | {"batch_size": 1})
report = evaluate(pipeline(noise=0.02), pipeline(), config, sys.argv[2])
with open(f"{sys.argv[2]}/rank{state.process_index}.json", "w") as file:
    json.dump(report, file)
state.destroy_process_group()
"""


def test_two_processes_give_the_figures_of_one(tmp_path):
    (tmp_path / "launched.py").write_text(LAUNCHED)
    two_ranks(tmp_path / "launched.py", Path(__file__).parent, tmp_path)
    first, second, written = (
        json.loads((tmp_path / f"{name}.json").read_text()) for name in ("rank0", "rank1", "report")
    )
    assert first == second == written
    one = evaluate(pipeline(noise=0.02), pipeline(), EvaluateConfig(**SMALL | {"batch_size": 1}))
    assert first["frechet"]["num_images"] == 6 and first["paired"]["num_images"] == 3
    assert first["frechet"]["value"] == pytest.approx(one["frechet"]["value"], rel=1e-4)
    assert first["paired"]["mse"] == pytest.approx(one["paired"]["mse"], rel=1e-4)
    assert first["epsilon_error"]["overall"] == pytest.approx(one["epsilon_error"]["overall"], rel=1e-4)
    assert first["epsilon_error"]["rows"] == 6


def test_figures_are_told_before_they_are_written(tmp_path, monkeypatch, capsys):
    """So a disk that is full by then loses none."""

    def full(*_):
        raise UserError("cannot write report.json: No space left on device.")

    monkeypatch.setattr("ptq4dm.evaluation.evaluate.write_report", full)
    shown = []
    with pytest.raises(UserError, match="No space left"):
        evaluate(pipeline(), config=EvaluateConfig(**SMALL), output=tmp_path / "a", show=shown.append)
    assert shown[0]["frechet"]["num_images"] == 6 and not capsys.readouterr().out
    with pytest.raises(UserError, match="No space left"):
        evaluate(pipeline(), config=EvaluateConfig(**SMALL), output=tmp_path / "a")
    assert "feature-FID" in capsys.readouterr().out


def test_two_evaluations_at_once(tmp_path):
    pipe, seen = pipeline(), []

    def during(*_):
        if not seen:
            seen.append(True)
            with pytest.raises(UserError, match="another run with other settings is writing into"):
                evaluate(pipeline(), config=EvaluateConfig(**{**SMALL, "seed": 5}), output=tmp_path)

    pipe.unet.register_forward_pre_hook(during)
    evaluate(pipe, config=EvaluateConfig(**SMALL), output=tmp_path)
    assert seen and sorted(os.listdir(tmp_path)) == ["report.json", "samples.png"]


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [("samples.png", "mine", "another kind of file"), ("report.json", "mine", "is no report"),
     ("report.json", '{"my": 1}', "is no report")],
)  # fmt: skip
def test_files_of_somebody_else_are_not_replaced(name, text, words, tmp_path):
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=words):
        check_places(tmp_path)
    (tmp_path / name).unlink()
    (tmp_path / "report.json").write_text('{"bytes": {}}')
    check_places(tmp_path)

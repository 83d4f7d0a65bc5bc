"""compare on a tiny UNet and two quantized folders of it: figures by hand, what is kept, and refusals."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler, DDPMPipeline, DDPMScheduler
from PIL import Image

import models
import personal
import ptq4dm
from ptq4dm import CompareConfig, UserError, compare
from ptq4dm.cli.main import main
from ptq4dm.comparing import compare as module
from ptq4dm.comparing.candidates import labelled, worst_layers
from ptq4dm.comparing.report import format_comparison
from ptq4dm.comparing.rows import costs
from ptq4dm.errors import DamagedFile
from ptq4dm.evaluation.compare import compare_denoisers
from ptq4dm.layers.sizes import stored_bytes
from ptq4dm.pipelines.denoiser import networks_of
from ptq4dm.pipelines.images import load_images, to_uint8
from ptq4dm.pipelines.sampling import sample
from ptq4dm.quantization.saving import save_quantized

pytestmark = pytest.mark.usefixtures("one_thread")
FEW = {"num_images": 3, "num_inference_steps": 2, "num_heldout": 2, "timed_steps": 1, "warmup_steps": 0}


def pipeline(**config):
    return DDPMPipeline(models.unet(**config), DDIMScheduler(clip_sample=True))


def quantized(folder: Path, original: str, pipe=None, **options) -> None:
    pipe = pipe or pipeline()
    report = ptq4dm.quantize(pipe, ptq4dm.RTNConfig(activations="dynamic", **options))
    pipe.scheduler = DDPMScheduler()  # which is not what it is compared with
    save_quantized(pipe, {"model": original, **report.to_dict()}, folder)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """m in full precision; w8 and w4 quantized from it."""
    place = tmp_path_factory.mktemp("compare")
    pipeline().save_pretrained(place / "m")
    quantized(place / "w8", str(place / "m"))
    quantized(place / "w4", str(place / "m"), weight_bits=4)
    return place


@pytest.fixture(scope="module")
def compared(folders):
    """(report, folder) of w8 and w4."""
    output = folders / "both"
    return compare([folders / "w8", folders / "w4"], config=CompareConfig(**FEW), output=output), output


def test_figures_are_those_of_same_seed_pictures(compared, folders):
    report, output = compared
    assert list(report["models"]) == ["m", "w8", "w4"] and report["full_precision"] == "m"
    exact, coarse = (ptq4dm.load_pipeline(folders / name) for name in ("m", "w4"))
    coarse.scheduler = exact.scheduler
    a, b = (to_uint8(sample(one, [0, 1, 2], num_inference_steps=2)).double() / 255 for one in (exact, coarse))
    wanted = -10 * (a - b).square().mean((1, 2, 3)).log10()
    assert report["models"]["w4"]["seeds"]["psnr"] == pytest.approx(wanted.tolist(), abs=0.1)
    assert report["models"]["w4"]["figures"]["psnr"]["mean"] == pytest.approx(float(wanted.mean()), abs=0.1)
    assert report["models"]["m"]["figures"] == {} and "epsilon_error" not in report["models"]["m"]
    errors = [report["models"][name]["epsilon_error"]["overall"] for name in ("w8", "w4")]
    assert 0 < errors[0] < errors[1] / 4
    size = report["models"]["w4"]["bytes"]
    assert size["model"] == stored_bytes(coarse.unet) and size["full_precision"] == stored_bytes(exact.unet)
    assert report["models"]["w4"]["step_time"]["speedup"] > 0
    assert report["not_measured"].keys() == {"lpips", "clip", "image_reward", "frechet"}


def test_what_it_leaves_says_the_same(compared, folders):
    report, output = compared
    assert sorted(p.name for p in output.iterdir()) == [
        "comparison.json", "comparison.png", "costs", "images", "index.html"
    ]  # fmt: skip
    assert json.loads((output / "comparison.json").read_text()) == report
    with Image.open(output / "comparison.png") as picture:  # three rows of three, and room for labels
        assert 3 * 96 < picture.width < 4 * 96 + 100 and 3 * 96 < picture.height < 4 * 96
    record = json.loads((folders / "w4" / "quantization.json").read_text())
    assert [row["layer"] for row in report["models"]["w4"]["worst"]] == [
        row["layer"] for row in record["layers"][:10]
    ]
    text = format_comparison(report)
    row = next(line for line in text.splitlines() if line.startswith("| w4") and line.count("|") == 8)
    figure = report["models"]["w4"]["figures"]["psnr"]
    assert row.split("|")[6].strip() == "{:.2f} ({:.2f} to {:.2f})".format(figure["mean"], *figure["interval"])
    assert "LPIPS (--lpips-weights FILE)" in text and "times full precision, cpu, batch 16" in text


def test_one_more_model_makes_only_what_is_new(folders, monkeypatch):
    measured = []

    def counted(pipe, original, config):
        measured.append(pipe)
        return compare_denoisers(pipe, original, config)

    monkeypatch.setattr(module, "compare_denoisers", counted)
    output, config = folders / "grows", CompareConfig(**FEW)
    first = compare([folders / "w8"], config=config, output=output)
    stamps = {path: path.stat().st_mtime_ns for path in output.rglob("*/*.*")}
    assert len(measured) == 1 and len(stamps) == 2 * 3 + 1
    both = compare([folders / "w8", folders / "w4"], config=config, output=output)
    assert len(measured) == 2 and both["models"]["w8"] == first["models"]["w8"]
    assert {path: path.stat().st_mtime_ns for path in stamps} == stamps
    compare([folders / "w8"], config=CompareConfig(**{**FEW, "num_heldout": 3}), output=output)
    assert len(measured) == 3  # other conditions: measured again
    pictures = load_images(sorted((output / "images" / "w8").iterdir()))
    with pytest.raises(UserError, match="images made with other settings.*num_inference_steps"):
        compare([folders / "w8"], config=CompareConfig(**{**FEW, "num_inference_steps": 3}), output=output)
    assert torch.equal(load_images(sorted((output / "images" / "w8").iterdir())), pictures)


def test_different_models_are_refused(folders, tmp_path):
    config = CompareConfig(**FEW)
    quantized(tmp_path / "wide", "another", pipeline(block_out_channels=(8, 24)))
    both = [folders / "w8", tmp_path / "wide"]
    with pytest.raises(UserError, match=r"was quantized from .*m and .*wide from another: different models"):
        compare(both, config=config, output=tmp_path / "out")
    with pytest.raises(UserError, match="another model than .*differ in block_out_channels"):
        compare(both, folders / "m", config, tmp_path / "out")
    assert not (tmp_path / "out").exists()  # before any work
    with pytest.raises(UserError, match="none of these models says"):
        compare([folders / "m"], config=config, output=tmp_path / "out")
    with pytest.raises(UserError, match="nothing to compare"):
        compare([folders / "m"], folders / "m", config, tmp_path / "out")
    with pytest.raises(UserError, match="models must be a list"):
        compare(str(folders / "m"))
    dit = ptq4dm.PixelDiTPipeline(models.pixel_dit(), DDIMScheduler())
    pipes = {"m": pipeline(), "dit": dit}
    with pytest.raises(UserError, match="dit is a PixelDiTPipeline and m a DDPMPipeline"):
        compare(["dit"], "m", config, tmp_path / "out", load=pipes.get)
    one_step = pipeline()
    one_step.scheduler = ptq4dm.samplers.OneStepScheduler()
    with pytest.raises(UserError, match="student takes 1 and no other, and m any number of steps"):
        compare(["student"], "m", config, tmp_path / "out", load={"m": pipeline(), "student": one_step}.get)


def test_files_of_others_are_left_alone(folders, tmp_path):
    for name, text in (("index.html", "<p>mine</p>"), ("comparison.json", "{}"), ("comparison.png", "no picture")):
        folder = tmp_path / name
        folder.mkdir()
        (folder / name).write_text(text)
        (folder / "unfinished.txt").touch()  # the folder is ours, the file is not
        with pytest.raises(UserError, match=re.escape(str(folder / name))):
            compare([folders / "w8"], config=CompareConfig(**FEW), output=folder)
        assert (folder / name).read_text() == text


def test_labels_tell_models_apart(tmp_path):
    assert [one.label for one in labelled(["a/w8", "b/w8"])] == ["a-w8", "b-w8"]
    assert [one.label for one in labelled(["hub/<b>&", "x"])] == ["-b--".lstrip("-"), "x"]
    with pytest.raises(UserError, match="^a/w8 is given twice; name each model once"):
        labelled(["a/w8", "a/w8"])
    with pytest.raises(UserError, match=f"{tmp_path} and {tmp_path}/. are one model"):
        labelled([str(tmp_path), f"{tmp_path}/."])
    with pytest.raises(UserError, match="the names of hub/a:b and hub/a-b end alike"):
        labelled(["hub/a:b", "hub/a-b"])


def test_bytes_are_those_of_all_networks(tmp_path):
    pipes = {name: personal.text() for name in ("m", "packed")}
    recipe = ptq4dm.RTNConfig(activations="dynamic")
    ptq4dm.quantize(pipes["packed"], components={"text_encoder": recipe})
    config = CompareConfig(num_images=1, num_inference_steps=1, num_heldout=0, timed_steps=0)
    config.conditioning = {"prompt": ["a dog"]}
    report = compare(["packed"], "m", config, tmp_path / "out", load=pipes.get)
    before, after = (sum(map(stored_bytes, networks_of(pipe).values())) for pipe in pipes.values())
    entry = report["models"]["packed"]
    assert entry["bytes"]["model"] == entry["bytes"]["full_precision"] and after < before
    assert costs(entry)[:2] == [
        ("MB, all networks", f"{after / 1e6:.2f}"),
        ("share of bytes", f"{after / before:.1%}"),
    ]
    assert "bytes are of all networks: " in format_comparison(report)
    assert ", ".join(networks_of(pipes["m"])) in (tmp_path / "out" / "index.html").read_text()


def test_wrong_input_is_found_before_any_image(folders, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(module, "generate", lambda *args, **kw: pytest.fail("an image was made"))
    (tmp_path / "notes").mkdir()
    wrong: list[tuple[dict, str]] = [
        ({"lpips_weights": tmp_path / "no.pth"}, "no.pth"),
        ({"clip": tmp_path / "nowhere"}, "nowhere is no folder of a CLIP model"),
        ({"image_reward": tmp_path / "nowhere"}, "ImageReward.pt is missing"),
        ({"metric": "feature-fid", "reference": tmp_path / "no.npz"}, "no.npz"),
    ]
    for options, told in wrong:
        with pytest.raises(UserError, match=told):
            compare([folders / "w8"], config=CompareConfig(**FEW, **options), output=tmp_path / "out")
    for model, told in (
        (str(tmp_path / "absent"), "neither an embedded model"),
        (tmp_path / "notes", "no model_index"),
    ):
        with pytest.raises(UserError, match=told):
            compare([folders / "w8", model], config=CompareConfig(**FEW), output=tmp_path / "out")
        assert main(["compare", str(folders / "w8"), str(model), "--output", str(tmp_path / "out")]) != 0
        assert told in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["notes"]


def test_what_did_not_end_is_no_result_and_is_gone_on_with(folders, tmp_path, monkeypatch):
    config, output = CompareConfig(**{**FEW, "num_heldout": 0, "timed_steps": 0}), tmp_path / "out"
    with monkeypatch.context() as broken:
        broken.setattr(module, "add_figures", lambda *args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            compare([folders / "w8"], config=config, output=output)
    assert sorted(path.name for path in output.iterdir()) == ["costs", "images", "unfinished.txt"]
    compare([folders / "w8"], config=config, output=output)
    assert (output / "index.html").is_file() and not (output / "unfinished.txt").exists()
    with pytest.raises(UserError, match="takes images of shape"):  # told after the first model's pictures
        compare([folders / "w8"], config=replace(config, metric="feature-fid"), output=output)


def test_folders_of_others_are_refused(folders, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match=f"{tmp_path} exists and was not written by ptq4dm compare; choose another"):
        compare([folders / "w8"], config=CompareConfig(**FEW), output=tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
    before = sorted((folders / "w8").rglob("*"))
    with pytest.raises(UserError, match="w8 is the folder of a model"):
        compare([folders / "w8"], config=CompareConfig(**FEW), output=folders / "w8")
    assert sorted((folders / "w8").rglob("*")) == before


def test_a_damaged_report_is_told(tmp_path):
    (tmp_path / "quantization.json").write_text('{"layers": [{"layer": 5}]}')
    with pytest.raises(DamagedFile, match=r"quantization\.json"):
        worst_layers(str(tmp_path))
    assert worst_layers(str(tmp_path / "none")) == []
    row = {"layer": "a", "format": "b", "kernel": "c"}
    (tmp_path / "quantization.json").write_text(json.dumps({"layers": [row, row | {"basis": "weight"}]}))
    with pytest.raises(DamagedFile, match=r"quantization\.json .*no 'basis' in it"):
        worst_layers(str(tmp_path))
    (tmp_path / "quantization.json").write_text(json.dumps({"layers": [row, row]}))  # read from a file
    assert worst_layers(str(tmp_path)) == []

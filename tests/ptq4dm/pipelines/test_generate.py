"""Seed-named PNGs: the same for any batch size and number of processes, resumed, never mixed."""

import os
from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler, DDPMPipeline, DEISMultistepScheduler

import ptq4dm
from models import unet
from ptq4dm.errors import UserError
from ptq4dm.files.claim import CLAIM
from ptq4dm.pipelines.generate import fingerprint, generate, save_grid
from ptq4dm.pipelines.images import load_images, read_metadata
from ptq4dm.pipelines.picture_files import find_images
from two_processes import two_ranks

SEEDS = [7, 0, 123, 3, 4]


pytestmark = pytest.mark.usefixtures("one_thread")


def tiny(scheduler=DDIMScheduler, seed=0, dtype=torch.float64):
    # float64: the order of summation, which changes with the batch, cannot reach a grey level.
    net = unet(seed, block_out_channels=(8, 8))
    return DDPMPipeline(net.to(dtype), scheduler())


def files(folder):
    return {p.name: p.read_bytes() for p in Path(folder).iterdir()}


@pytest.fixture
def whole(tmp_path):
    paths = generate(tiny(), SEEDS, tmp_path / "whole", num_inference_steps=2, batch_size=3)
    assert [p.name for p in paths] == ["000007.png", "000000.png", "000123.png", "000003.png", "000004.png"]
    return files(tmp_path / "whole")


def test_any_batch_size_and_order_gives_the_same_files(tmp_path, whole):
    assert len(whole) == 5 and len(set(whole.values())) == 5
    for size in (1, 4):
        generate(tiny(), SEEDS[::-1], tmp_path / str(size), num_inference_steps=2, batch_size=size)
        assert files(tmp_path / str(size)) == whole


def test_float32_agrees_to_one_grey_level(tmp_path):
    one, four = (
        load_images(generate(tiny(dtype=torch.float32), range(8), tmp_path / str(b), num_inference_steps=3, batch_size=b))  # noqa: E501
        for b in (1, 4)
    )  # fmt: skip
    moved = (one.int() - four.int()).abs()
    assert moved.max() <= 1 and (moved > 0).float().mean() < 0.01


def test_two_processes_give_the_same_files(tmp_path, whole):
    """Five seeds on two processes: an uneven share, and uneven last batches."""
    tiny().save_pretrained(tmp_path / "model")
    script = tmp_path / "run.py"
    script.write_text(
        "import sys, torch\n"
        "from accelerate import PartialState\n"
        "from diffusers import DDPMPipeline\n"
        "from ptq4dm.pipelines.generate import generate\n"
        "pipe = DDPMPipeline.from_pretrained(sys.argv[1], dtype=torch.float64)\n"
        f"paths = generate(pipe, {SEEDS}, sys.argv[2], num_inference_steps=2, batch_size=2)\n"
        "state = PartialState()\n"
        "assert state.num_processes == 2 and len(paths) == 5 and all(p.exists() for p in paths)\n"
        "state.destroy_process_group()\n"
    )
    two_ranks(script, tmp_path / "model", tmp_path / "two")
    assert files(tmp_path / "two") == whole


def test_resumes_with_what_is_missing(tmp_path, whole):
    folder = tmp_path / "whole"
    kept = folder / "000000.png"
    for name in ("000003.png", "000123.png"):
        (folder / name).unlink()
    os.utime(kept, (1, 1))
    generate(tiny(), [*SEEDS, 3], folder, num_inference_steps=2, batch_size=2)
    assert files(folder) == whole
    assert kept.stat().st_mtime == 1  # not made again
    generate(tiny(), [9], folder, num_inference_steps=2)
    assert len(files(folder)) == 6


@pytest.mark.parametrize(
    ("pipe", "options", "named"),
    [
        (tiny(), {"num_inference_steps": 3}, "num_inference_steps"),
        (tiny(DEISMultistepScheduler), {}, "scheduler"),
        (tiny(seed=1), {}, "weights"),
        (tiny(dtype=torch.float32), {}, "dtype, weights"),
        (tiny(), {"metadata": {"model": "another"}}, "model"),
    ],
)
def test_other_settings_need_another_folder(tmp_path, whole, pipe, options, named):
    with pytest.raises(UserError, match=rf"other settings .*differs in {named}\).*another --output"):
        generate(pipe, [50], tmp_path / "whole", **{"num_inference_steps": 2, **options})
    assert files(tmp_path / "whole") == whole


def test_pictures_carry_their_settings(tmp_path):
    pipe = tiny()
    pipe.unet.register_to_config(quantization_config={"quant_method": "rtn", "bits": 4, "plan": {"a": 1}})
    (path,) = generate(pipe, [5], tmp_path, num_inference_steps=2, metadata={"model": "tiny"})
    found = read_metadata(path)
    assert found["seed"] == 5 and found["num_inference_steps"] == 2 and found["model"] == "tiny"
    assert found["quantization"] == {"quant_method": "rtn", "bits": 4}
    assert found["scheduler"]["class"] == "DDIMScheduler"
    assert found["scheduler"]["timestep_spacing"] == "leading"
    assert found["dtype"] == "float64" and found["weights"] == fingerprint(pipe)
    assert found["versions"]["ptq4dm"] == ptq4dm.__version__ and "torch" in found["versions"]


def test_fingerprint_sees_weights_and_dtype_only():
    assert fingerprint(tiny()) == fingerprint(tiny(DEISMultistepScheduler))
    changed = tiny()
    with torch.no_grad():
        changed.unet.conv_out.bias[1] += 1e-9
    marks = {fingerprint(p) for p in (tiny(), changed, tiny(seed=1), tiny(dtype=torch.float32))}
    assert len(marks) == 4


def test_foreign_pictures_are_refused_but_other_names_ignored(tmp_path):
    save_grid(torch.zeros(1, 3, 4, 4, dtype=torch.uint8), tmp_path / "grid.png")
    generate(tiny(), [1], tmp_path, num_inference_steps=2)
    save_grid(torch.zeros(1, 3, 4, 4, dtype=torch.uint8), tmp_path / "000002.png")
    with pytest.raises(UserError, match="000002.png carries no ptq4dm metadata.*another --output"):
        generate(tiny(), [1], tmp_path, num_inference_steps=2)


def test_a_truth_value_in_a_number_s_place_is_another_setting(tmp_path):
    generate(tiny(), [1], tmp_path, num_inference_steps=2, metadata={"a": 1, "b": [0.0, {"c": False}]})
    generate(tiny(), [1], tmp_path, num_inference_steps=2, metadata={"a": 1.0, "b": [0, {"c": False}]})
    for metadata in ({"a": True, "b": [0, {"c": False}]}, {"a": 1, "b": [0, {"c": 0}]}):
        with pytest.raises(UserError, match="differs in [ab]"):
            generate(tiny(), [1], tmp_path, num_inference_steps=2, metadata=metadata)


def test_wrong_input(tmp_path):
    wrong = (([], 1, "at least one seed"), ([-1], 1, "must not be negative"), ([0], 0, "must be at least 1"))
    for seeds, size, words in wrong:
        with pytest.raises(UserError, match=words):
            generate(tiny(), seeds, tmp_path / "out", batch_size=size)
    assert not (tmp_path / "out").exists()
    (tmp_path / "file").write_text("")
    for output in (tmp_path / "file", tmp_path / "file" / "out"):
        with pytest.raises(UserError, match="cannot make the folder"):
            generate(tiny(), [0], output)


def test_grid_of_generated_files(tmp_path):
    paths = generate(tiny(), [0, 1, 2], tmp_path / "a", num_inference_steps=2)
    save_grid(paths, tmp_path / "grid.png", columns=2, scale=3)
    grid = load_images([tmp_path / "grid.png"])
    assert grid.shape == (1, 3, 48, 48)
    assert torch.equal(grid[0, :, 1:24:3, 25:48:3], load_images(paths)[1])
    with pytest.raises(UserError, match="no images"):
        save_grid([], tmp_path / "none.png")


def test_a_failure_leaves_no_empty_folder_behind(tmp_path):
    with pytest.raises(UserError, match="at least one step"):
        generate(tiny(), [0], tmp_path / "a" / "b", num_inference_steps=0)
    assert not (tmp_path / "a").exists()


def test_two_calls_at_once(tmp_path):
    """Other settings are refused before they work; the same ones, with other seeds, share the folder."""
    pipe, seen = tiny(), []

    def during(*_):
        if not seen:
            seen.append(True)
            with pytest.raises(UserError, match="another run with other settings is writing into"):
                generate(tiny(), [1], tmp_path, num_inference_steps=3)
            generate(tiny(), [9], tmp_path, num_inference_steps=2)

    pipe.unet.register_forward_pre_hook(during)
    generate(pipe, [1, 2], tmp_path, num_inference_steps=2)
    assert seen and sorted(os.listdir(tmp_path)) == ["000001.png", "000002.png", "000009.png"]


def test_the_lock_of_a_killed_run_is_no_picture_and_no_file_of_somebody(tmp_path, whole):
    (tmp_path / "whole" / CLAIM).write_text("of a dead process")
    assert not find_images(tmp_path / "whole").passed_over
    generate(tiny(), SEEDS, tmp_path / "whole", num_inference_steps=2, batch_size=3)
    assert files(tmp_path / "whole") == whole


def test_a_picture_that_is_cut_short_is_not_taken_for_done(tmp_path, whole):
    path = tmp_path / "whole" / "000007.png"
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(UserError, match="000007.png cannot be read .*Choose another --output"):
        generate(tiny(), SEEDS, tmp_path / "whole", num_inference_steps=2)


def test_finished_pictures_in_a_read_only_folder_are_found(tmp_path, whole, monkeypatch):
    def refuse(*_, **__):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr("ptq4dm.files.places.tempfile.TemporaryFile", refuse)
    monkeypatch.setattr("ptq4dm.files.claim.os.open", refuse)
    assert len(generate(tiny(), SEEDS, tmp_path / "whole", num_inference_steps=2)) == 5
    with pytest.raises(UserError, match="cannot write into .*Read-only file system"):
        generate(tiny(), [*SEEDS, 99], tmp_path / "whole", num_inference_steps=2)
    assert files(tmp_path / "whole") == whole

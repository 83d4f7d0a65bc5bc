"""The folder of a distillation: killed at any moment it goes on, nothing of somebody else's is lost or believed."""

import json
import math
import os

import pytest
import torch
from safetensors.torch import load_file, save_file

import points
from helpers import same
from ptq4dm.errors import DamagedFile, UserError
from ptq4dm.files.claim import CLAIM
from ptq4dm.samplers import DisBackConfig, distill
from ptq4dm.samplers.distillation import disback
from ptq4dm.samplers.distillation.log import read_log

pytestmark = pytest.mark.usefixtures("one_thread", "new_accelerate")
CONFIG = DisBackConfig(
    images=6 * 32, batch_size=32, degradation_steps=4, path_points=2, switch_every=2, log_every=2,
    evaluate_every=4 * 32, student_lr=1e-3, fake_lr=1e-3, warmup_steps=2, num_fid=0,
)  # fmt: skip


@pytest.fixture
def teacher():
    return points.untrained()


def stopped(teacher, folder, monkeypatch, name, count, config=CONFIG):
    """A run that is killed as it calls a method of Run for the count-th time."""
    calls, real = [], getattr(disback.Run, name)

    def kill(self, *args):
        calls.append(args)
        if len(calls) == count:
            raise KeyboardInterrupt
        return real(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(disback.Run, name, kill)
        with pytest.raises(KeyboardInterrupt):
            distill(teacher, config, folder)


def tree(folder):
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.mark.parametrize("resume", [True, False])
def test_stopped_before_its_first_checkpoint_it_starts_over(teacher, tmp_path, monkeypatch, resume):
    straight = distill(teacher, CONFIG, tmp_path / "straight")
    stopped(teacher, tmp_path / "run", monkeypatch, "save", 1)  # a point of the path is there, and no checkpoint
    (tmp_path / "run" / CLAIM).touch()  # as kill -9 leaves it
    assert sorted(tree(tmp_path / "run")) == [CLAIM, "log.jsonl", "path/00001.safetensors"]
    again = distill(teacher, CONFIG, tmp_path / "run", resume=resume)
    assert same(again.unet, straight.unet)
    assert sorted(tree(tmp_path / "run")) == sorted(tree(tmp_path / "straight"))


@pytest.mark.parametrize("resume", [True, False])
@pytest.mark.parametrize(
    "left", [[], [CLAIM], [".log.jsonl.abcd1234.ptq4dm/lock", "samples/.a.png.abcd1234.ptq4dm/"]]
)
def test_stopped_before_it_wrote_anything_it_starts_over(teacher, tmp_path, left, resume):
    tmp_path.joinpath("run").mkdir()
    for name in left:
        path = tmp_path / "run" / name
        (path if name.endswith("/") else path.parent).mkdir(parents=True, exist_ok=True)
        if not name.endswith("/"):
            path.touch()
    distill(teacher, CONFIG, tmp_path / "run", resume=resume)
    assert (tmp_path / "run" / "checkpoint.safetensors").is_file() and not list(tmp_path.rglob(".*"))


def test_samples_without_a_checkpoint_are_made_again(teacher, tmp_path, monkeypatch):
    config = DisBackConfig(**{**vars(CONFIG), "backtracking": False})
    stopped(teacher, tmp_path, monkeypatch, "save", 1, config)
    (tmp_path / "samples").mkdir()
    for images in (0, 128):
        (tmp_path / "samples" / f"{images:09d}.png").write_bytes(b"")
    distill(teacher, config, tmp_path)
    assert (tmp_path / "checkpoint.safetensors").is_file()


def test_killed_between_a_point_of_the_path_and_its_checkpoint(teacher, tmp_path, monkeypatch):
    straight = distill(teacher, CONFIG, tmp_path / "straight")
    stopped(teacher, tmp_path / "run", monkeypatch, "save", 2)
    assert (tmp_path / "run" / "path" / "00002.safetensors").is_file()
    again = distill(teacher, CONFIG, tmp_path / "run", resume=True)
    assert same(again.unet, straight.unet)
    one, other = (load_file(tmp_path / name / "path" / "00002.safetensors") for name in ("straight", "run"))
    assert same(one, other)


STRANGERS = ["thesis.txt", "path/notes", "path/00002.safetensors", "samples/a.png", "more/x", "empty"]


@pytest.mark.parametrize("resume", [True, False])
@pytest.mark.parametrize("name", STRANGERS)
def test_what_a_run_did_not_leave_is_not_touched(teacher, tmp_path, name, resume):
    (tmp_path / "log.jsonl").write_text("")
    if name == "empty":
        (tmp_path / name).mkdir()
    else:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("mine")
    before = tree(tmp_path)
    with pytest.raises(UserError, match="no checkpoint at .* to resume" if resume else "is not empty"):
        distill(teacher, CONFIG, tmp_path, resume=resume)
    assert tree(tmp_path) == before


def test_a_log_of_somebody_else_is_kept(teacher, tmp_path):
    (tmp_path / "log.jsonl").write_text("my own notes\n")
    with pytest.raises(DamagedFile, match="log.jsonl cannot be read"):
        distill(teacher, CONFIG, tmp_path)
    assert (tmp_path / "log.jsonl").read_text() == "my own notes\n"


@pytest.fixture
def half(teacher, tmp_path, monkeypatch):
    """A run that was stopped in stage 2."""
    stopped(teacher, tmp_path / "run", monkeypatch, "show", 2)
    return tmp_path / "run"


@pytest.mark.parametrize(
    "change",
    [
        lambda t: t.pop(next(iter(t))),
        lambda t: t.update(more=torch.zeros(1)),
        lambda t: next(iter(t.values())).fill_(float("nan")),
        lambda t: t.update({next(iter(t)): torch.zeros(1)}),
    ],
)
def test_damaged_points_of_the_path(teacher, half, change):
    path = half / "path" / "00001.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)
    with pytest.raises(DamagedFile, match="00001.safetensors cannot be read .*; start anew"):
        distill(teacher, CONFIG, half, resume=True)
    path.write_bytes(b"junk")
    with pytest.raises(DamagedFile, match="00001.safetensors cannot be read"):
        distill(teacher, CONFIG, half, resume=True)


def test_points_without_a_checksum_are_read(teacher, half):
    path = half / "path" / "00001.safetensors"
    save_file(load_file(path), path)
    distill(teacher, CONFIG, half, resume=True)


@pytest.mark.parametrize(
    "text", [None, "", "[]\n" * 9, '{"stage": 3}\n' * 9, "{\n" * 9, "[" * 100_000 + "\n", "\udcff\n"]
)
def test_damaged_logs(teacher, half, text):
    path = half / "log.jsonl"
    path.unlink()
    if text is not None:
        path.write_text(text, errors="surrogateescape")
    with pytest.raises(DamagedFile, match="log.jsonl .*bring back the log of the run"):
        distill(teacher, CONFIG, half, resume=True)


def test_half_a_line_at_the_end_does_not_count(tmp_path):
    (tmp_path / "log").write_text('{"stage": "degradation"}\n{"sta')
    assert read_log(tmp_path / "log") == [{"stage": "degradation"}]
    (tmp_path / "log").write_text('{"stage": "evaluation", "step": 3}\n')
    with pytest.raises(DamagedFile, match="no 'images'"):
        read_log(tmp_path / "log")


NO_COUNTS = (None, -1, 1.5, True, "3", math.nan, math.inf, 10**30)
NO_FIGURES = (True, "3", math.nan, -math.inf, 10**30, [3.0])


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *((name, value) for name in ("step", "images", "num_images", "target") for value in NO_COUNTS),
        *(("feature_fid", value) for value in (*NO_FIGURES, None)),
        *((name, value) for name in ("student_loss", "seconds") for value in (math.nan, math.inf, -math.inf)),
    ],
)
def test_lines_whose_numbers_nobody_measured(name, value, tmp_path):
    whole = {"stage": "evaluation", "step": 2, "images": 64, "feature_fid": 3.5, "num_images": 10}
    (tmp_path / "log").write_text(json.dumps(whole) + "\n")
    assert read_log(tmp_path / "log") == [whole]
    (tmp_path / "log").write_text(json.dumps({**whole, name: value}) + "\n")
    with pytest.raises(DamagedFile, match=f"log cannot be read .*'{name}'.* bring back the log"):
        read_log(tmp_path / "log")


def test_a_second_run_with_other_settings_is_refused_before_it_works(teacher, tmp_path, monkeypatch):
    seen, real = [], disback.Run.parts

    def during(self, *key):
        if not seen:
            seen.append(True)
            other = DisBackConfig(**{**vars(CONFIG), "seed": 1})
            with pytest.raises(UserError, match="another run with other settings is writing into"):
                distill(teacher, other, tmp_path / "run")
        return real(self, *key)

    monkeypatch.setattr(disback.Run, "parts", during)
    distill(teacher, CONFIG, tmp_path / "run")
    assert seen and CLAIM not in os.listdir(tmp_path / "run")


def test_a_disk_without_room_is_told_before_the_work(teacher, tmp_path, monkeypatch):
    net = sum(p.numel() * 4 for p in teacher.unet.parameters())
    need = net * (3 + 4 + CONFIG.path_points)  # three networks, the moments of two optimizers, the path
    free = [need - 1]
    monkeypatch.setattr("ptq4dm.files.places.shutil.disk_usage", lambda _: type("usage", (), {"free": free[0]}))
    with pytest.raises(UserError, match="a distillation run takes at least .* make room"):
        distill(teacher, CONFIG, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    free[0] = need
    distill(teacher, CONFIG, tmp_path / "run")

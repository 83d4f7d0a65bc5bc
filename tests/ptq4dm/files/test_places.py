"""Places for results are looked at before the work."""

import os
from pathlib import Path

import pytest

from ptq4dm.errors import UserError
from ptq4dm.files import places
from ptq4dm.files.places import check_own, check_room, empty_taken_back, make_parent, output_folder
from ptq4dm.files.result_folder import check_replaceable, foreign_files, result_folder


def test_the_folder_of_a_model_takes_no_other_results(tmp_path):
    (tmp_path / "model_index.json").write_text("{}")
    refused = pytest.raises(UserError, match=f"{tmp_path} is the folder of a model, and no other results go into it")
    with refused, output_folder(tmp_path):
        pytest.fail("it was opened")
    (tmp_path / "model_index.json").unlink()
    with output_folder(tmp_path):
        pass
    check_own(tmp_path, ["report"], "compare")
    (tmp_path / "notes.txt").touch()
    with pytest.raises(UserError, match=f"{tmp_path} exists and was not written by ptq4dm compare"):
        check_own(tmp_path, ["report"], "compare")
    check_own(tmp_path, ["report", "notes.txt"], "compare")
    check_own(tmp_path / "new", ["report"], "compare")


def test_output_folders_come_and_go(tmp_path):
    with pytest.raises(ZeroDivisionError), output_folder(tmp_path / "a/b"):
        raise ZeroDivisionError
    assert not os.listdir(tmp_path)
    with output_folder(tmp_path / "a/b") as folder:
        (folder / "x").touch()
    (tmp_path / "file").touch()
    for path in (tmp_path / "file", tmp_path / "file/a"):
        with pytest.raises(UserError, match="cannot make the folder"), output_folder(path):
            pass


def test_a_read_only_place_is_told_before_the_work(tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(places.tempfile, "TemporaryFile", refuse)
    for look in (lambda p: make_parent(p / "x"), lambda p: output_folder(p).__enter__()):
        with pytest.raises(UserError, match="Read-only file system; give another place"):
            look(tmp_path)


def test_a_device_is_no_place_for_a_file():
    with pytest.raises(UserError, match="no plain file"):
        make_parent("/dev/null")


def test_room(tmp_path):
    check_room(tmp_path / "not/yet", 1, "this")
    with pytest.raises(UserError, match=r"this takes at least \d+ MB and the disk of .* has \d+ MB left"):
        check_room(tmp_path / "not/yet", 1 << 60, "this")


def write(folder, **files):
    with result_folder(folder, "record.json", {"model": "x"}) as new:
        for name, text in files.items():
            (new / name).write_text(text)


def test_what_the_earlier_run_did_not_write_is_refused(tmp_path):
    folder = tmp_path / "q"
    check_replaceable(folder, "record.json", "quantize")
    folder.mkdir()
    check_replaceable(folder, "record.json", "quantize")
    write(folder, a="1", b="2")
    check_replaceable(folder, "record.json", "quantize")
    assert foreign_files(folder, "record.json") == []
    (folder / "sub").mkdir()
    assert foreign_files(folder, "record.json") == ["sub"]
    (folder / "a").write_text("3")
    (folder / "link").symlink_to("a")
    assert foreign_files(folder, "record.json") == ["a", "link", "sub"]
    with pytest.raises(UserError, match=r"\(a, link, sub\); choose another"):
        check_replaceable(folder, "record.json", "quantize")


def test_what_comes_during_the_work_is_kept(tmp_path):
    folder = tmp_path / "q"
    write(folder, a="1")
    with result_folder(folder, "record.json", {}) as new:
        (new / "a").write_text("2")
        (folder / "mine").write_text("mine")
    assert (folder / "a").read_text() == "2" and (tmp_path / "q.before/mine").read_text() == "mine"
    assert sorted(os.listdir(tmp_path)) == ["q", "q.before"]


def test_mount_points_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(os.path, "ismount", lambda path: Path(path) == tmp_path)
    with pytest.raises(UserError, match="mount point"):
        check_replaceable(tmp_path, "record.json", "quantize")


def test_a_picture_replaces_pictures_only(tmp_path):
    thesis, folder, old = tmp_path / "thesis.txt", tmp_path / "folder", tmp_path / "old.png"
    thesis.write_text("mine")
    folder.mkdir()
    old.write_bytes(places.PNG + b"...")
    for path, words in ((thesis, "another kind of file"), (folder, "it is a folder")):
        with pytest.raises(UserError, match=words):
            places.picture_place(path)
    for path in (old, tmp_path / "new.png"):
        places.picture_place(path)


def test_names_of_other_kinds_of_files_are_refused(tmp_path):
    for name in ("a.json", "a.GGUF", "a.pth"):
        with pytest.raises(
            UserError, match=f"{name} would be a .png file, and its name says {name[1:].lower()}; give it"
        ):
            places.picture_place(tmp_path / "new" / name)
    assert not (tmp_path / "new").exists()
    for name in ("a.png", "a.PNG", "a", "v1.2", "a.model"):
        places.picture_place(tmp_path / "new" / name)


def test_folders_of_what_fails_go_again_where_they_are_empty(tmp_path):
    (tmp_path / "there").mkdir()
    with pytest.raises(ZeroDivisionError), empty_taken_back():
        make_parent(tmp_path / "a/b/x")
        make_parent(tmp_path / "there/x")
        make_parent(tmp_path / "full/new/x")
        (tmp_path / "full/file").touch()
        raise ZeroDivisionError
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["file", "full", "there"]
    with empty_taken_back():
        make_parent(tmp_path / "a/b/x")
    assert (tmp_path / "a/b").is_dir()


def test_an_output_folder_may_be_a_link_to_a_new_one(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "disk/folder")
    with output_folder(tmp_path / "link") as folder:
        (folder / "x").touch()
    assert (tmp_path / "disk/folder/x").is_file() and (tmp_path / "link").is_symlink()


def test_a_link_in_a_circle_is_told_before_the_work(tmp_path):
    (tmp_path / "loop").symlink_to("loop")
    for look in (make_parent, lambda path: output_folder(path).__enter__()):
        with pytest.raises(UserError, match="leads back to itself"):
            look(tmp_path / "loop")

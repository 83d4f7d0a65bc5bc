"""Two runs at once in one folder: other settings are refused, the same ones share or wait."""

import os
import threading

import pytest

from ptq4dm.errors import UserError
from ptq4dm.files.claim import CLAIM, claimed, claimed_whole, sweep_claims
from ptq4dm.files.places import lying_in


def test_other_settings_are_refused_and_nothing_is_left(tmp_path):
    for share in (False, True):
        with claimed(tmp_path, {"seed": 0}, share=share):
            refused = pytest.raises(UserError, match=f"another run with other settings .*process {os.getpid()}")
            with refused, claimed(tmp_path, {"seed": 1}, share=share):
                pytest.fail("two runs at once")
            assert os.listdir(tmp_path) == [CLAIM]
        assert not os.listdir(tmp_path)
    with claimed(tmp_path, {"seed": 1}):
        pass


def test_the_same_settings_share(tmp_path):
    with claimed(tmp_path, {"seed": 0}, share=True):
        with claimed(tmp_path, {"seed": 0}, share=True), pytest.raises(UserError), claimed(tmp_path, 1, share=True):
            pass
        with pytest.raises(UserError), claimed(tmp_path, 1, share=True):
            pass
    assert not os.listdir(tmp_path)


def test_the_same_settings_wait(tmp_path, capfd):
    order, inside = [], threading.Event()

    def second():
        inside.wait()
        with claimed(tmp_path, {"seed": 0}):
            order.append("second")

    thread = threading.Thread(target=second)
    thread.start()
    with claimed(tmp_path, {"seed": 0}):
        inside.set()
        thread.join(0.2)
        order.append("first")
    thread.join()
    assert order == ["first", "second"] and not os.listdir(tmp_path)
    assert "waiting for another run" in capfd.readouterr().err


def test_the_claim_of_a_dead_run_does_not_count(tmp_path):
    child = os.fork()
    if not child:
        with claimed(tmp_path, {"seed": 0}):
            os._exit(0)
    os.waitpid(child, 0)
    assert os.listdir(tmp_path) == [CLAIM]
    with claimed(tmp_path, {"seed": 1}):
        pass
    assert not os.listdir(tmp_path)


def test_a_file_or_a_folder_that_is_replaced_is_claimed_from_beside(tmp_path):
    place, link = tmp_path / "q", tmp_path / "link"
    link.symlink_to(place)
    with claimed_whole(place, {"seed": 0}):
        place.mkdir()  # another folder in its place changes nothing
        with claimed_whole(link, {"seed": 0}):  # this thread has it already
            pass
        assert sorted(os.listdir(tmp_path)) == [f".q{CLAIM}", "link", "q"]
        assert lying_in(tmp_path) == [link, place]
        for path in (place, link):
            with pytest.raises(UserError, match=f"is writing into {path} "), claimed_whole(path, {"seed": 1}):
                pytest.fail("two runs at once")
        with claimed_whole(tmp_path / "other", {"seed": 1}):
            pass
    assert sorted(os.listdir(tmp_path)) == ["link", "q"]


def test_locks_of_the_dead_are_swept_and_those_of_the_living_stay(tmp_path):
    dead = [tmp_path / CLAIM, tmp_path / f".q{CLAIM}"]
    for path in dead:
        path.write_text("0123456789abcdef 1")
    with claimed_whole(tmp_path / "file", 1), claimed(tmp_path, 2):
        sweep_claims(tmp_path)
        assert sorted(os.listdir(tmp_path)) == [f".file{CLAIM}", CLAIM]
    assert not os.listdir(tmp_path)

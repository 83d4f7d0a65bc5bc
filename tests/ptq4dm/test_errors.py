"""Errors of users: the message is one line that can be printed, whatever file or name it tells of."""

import copy
import pickle

import pytest

from ptq4dm.errors import DamagedFile, UserError
from ptq4dm.files.outside import naming


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("'\ud800' is no layer.", r"'\ud800' is no layer."),
        ("x\udc80.safetensors is damaged.", r"x\udc80.safetensors is damaged."),
        ("got 'a\nb'.", "got 'a b'."),
        ("a\x1b[2Jb\0c\u202ed", r"a\x1b[2Jb\x00c\u202ed"),
        ("é, 数, a b", "é, 数, a b"),
        (f"'{'x' * 5000}' is unknown.", f"'{'x' * 299} ... is unknown."),
        (f"/{'/'.join(['n' * 255] * 8)} is missing.", f"/{'/'.join(['n' * 255] * 8)} is missing."),  # a path stays
    ],
)
@pytest.mark.parametrize("kind", [UserError, DamagedFile])
def test_a_message_is_one_line_that_can_be_printed(kind, text, message):
    error = kind(text)
    assert str(error) == message
    str(error).encode()
    assert str(kind(str(error))) == message  # said again it is the same
    assert [str(one) for one in (copy.copy(error), pickle.loads(pickle.dumps(error)))] == [message] * 2


def test_what_is_no_text_stays_as_it_is():
    assert UserError().args == () and UserError(3, None).args == (3, None)


def test_a_file_whose_name_cannot_be_printed_is_named_once():
    for message in ("x\udc80/config.json is damaged.", "it is damaged."):
        with pytest.raises(DamagedFile if "config" not in message else UserError) as caught, naming("x\udc80"):
            raise UserError(message)
        assert str(caught.value).count(r"x\udc80") == 1

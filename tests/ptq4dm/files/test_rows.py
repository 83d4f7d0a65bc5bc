"""The file of rows of a long measurement."""

import json

import pytest

from ptq4dm.errors import UserError
from ptq4dm.files.rows import Rows


def test_rows_are_kept_and_other_settings_refused(tmp_path):
    path = tmp_path / "new" / "rows.json"
    rows = Rows(path, {"steps": 5}, curves=[1])
    assert rows == [] and not path.exists()
    rows.add({"a": 1})
    rows.add({"a": 2})
    assert json.loads(path.read_text()) == {"settings": {"steps": 5}, "rows": [{"a": 1}, {"a": 2}], "curves": [1]}
    again = Rows(path, {"steps": 5})
    assert again == [{"a": 1}, {"a": 2}]
    with pytest.raises(UserError, match="made with other settings"):
        Rows(path, {"steps": 6})
    assert [p.name for p in path.parent.iterdir()] == ["rows.json"]

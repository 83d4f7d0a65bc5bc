"""The file of rows of a long measurement."""

import json

import pytest

from ptq4dm.errors import DamagedFile, UserError
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


@pytest.mark.parametrize(
    "text", ["", "[]", "7", '{"rows": []}', '{"settings": 3, "rows": []}', "\ufeff{}", "[" * 100_000]
)
def test_files_of_another_kind(tmp_path, text):
    path = tmp_path / "rows.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(DamagedFile, match="rows.json cannot be read .*give another --output, or delete it"):
        Rows(path, {})
    assert path.read_text(encoding="utf-8") == text


def test_rows_have_what_they_should(tmp_path):
    path = tmp_path / "rows.json"
    for row in (3, {}, {"figure": "1"}, {"figure": float("nan")}, {"figure": True}):
        path.write_text(json.dumps({"settings": {}, "rows": [row]}))
        with pytest.raises(DamagedFile):
            Rows(path, {}, {"figure": (int, float)})
    path.write_text(json.dumps({"settings": {}, "rows": [{"figure": 1.5}]}))
    assert Rows(path, {}, {"figure": (int, float)}) == [{"figure": 1.5}]

"""Modules that are imported at their first use."""

import sys
import types

import pytest

from ptq4dm.kernels.runtime.late import late


@pytest.fixture
def package(tmp_path, monkeypatch):
    (tmp_path / "late_package").mkdir()
    (tmp_path / "late_package" / "tool.py").write_text("value = 3\n")
    (tmp_path / "late_package" / "broken.py").write_text("import no_such_module_anywhere\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    yield types.ModuleType("late_package.reader")
    for name in [name for name in sys.modules if name.startswith("late_package")]:
        del sys.modules[name]


def test_the_module_takes_its_place_at_the_first_use(package):
    names = vars(package) | {"__package__": "late_package"}
    late(names, "tool", renamed="tool")
    assert "late_package.tool" not in sys.modules
    assert names["tool"].value == 3
    assert names["tool"] is sys.modules["late_package.tool"] is not names["renamed"]
    assert names["renamed"].value == 3 and names["renamed"] is names["tool"]
    with pytest.raises(AttributeError, match="no_such_name"):
        names["tool"].no_such_name  # noqa: B018


def test_a_module_that_cannot_be_imported_says_so_each_time(package):
    names = vars(package) | {"__package__": "late_package"}
    late(names, "broken")
    for _ in range(2):
        with pytest.raises(ModuleNotFoundError, match="no_such_module_anywhere"):
            names["broken"].value  # noqa: B018

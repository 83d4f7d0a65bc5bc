"""The project in one picture: drawn from the results that are kept; a model without both tables is refused."""

import importlib
from pathlib import Path

import pytest
from PIL import Image

from ptq4dm.errors import UserError

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts" / "comparisons"


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    return importlib.import_module("draw_overview")


def test_the_picture_has_three_panels_with_what_the_tables_hold(script, tmp_path, monkeypatch):
    drawn, save = [], script.save_figure
    monkeypatch.setattr(script, "save_figure", lambda figure, path: drawn.append(figure) or save(figure, path))
    path = tmp_path / "overview.png"
    script.main(["--output", str(path)])
    left, middle, right, _ = drawn[0].axes
    points = [
        point for point in script.points_of("dit-cifar10") if point.kind in script.LARGE and not point.simulated
    ]
    assert len(left.lines) == len(points) + 1 and 10 < len(middle.lines) < len(left.lines)
    curves = {line.get_label(): list(line.get_ydata()) for line in right.lines}
    assert list(curves) == [label for label, _ in script.CURVES.values()]
    fitted, ours, others = curves.values()
    assert len(ours) == len(others) == len(script.BUDGETS) and fitted[0] < ours[0] < others[0]
    with Image.open(path) as image:
        assert image.width > 1000


def test_a_model_that_no_table_of_methods_has_is_refused(script, tmp_path):
    with pytest.raises(UserError, match="has no methods of flow-dit-cifar10"):
        script.draw(tmp_path / "overview.png", "flow-dit-cifar10")
    assert not any(tmp_path.iterdir())

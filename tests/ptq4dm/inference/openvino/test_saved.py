"""Conversions on disk: what is damaged is told, and made anew."""

import pytest
import torch

pytest.importorskip("openvino")

from ptq4dm.inference.openvino.engine import ThroughOpenVINO  # noqa: E402
from ptq4dm.inference.openvino.saved import count_saved  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")


def flip_last(path):
    data = bytearray(path.read_bytes())
    data[-100] ^= 1
    path.write_bytes(data)


DAMAGES = {
    "cut xml": lambda place: (place / "model.xml").write_text("<net"),
    "a bit of the weights": lambda place: flip_last(place / "model.bin"),
    "no checksums": lambda place: (place / "checksums.json").unlink(),
    "checksums of nothing": lambda place: (place / "checksums.json").write_text('{"crc32": {}}'),
}


def test_damaged_conversions_are_told_and_made_anew(tmp_path, capsys):
    torch.manual_seed(0)
    model, x = torch.nn.Sequential(torch.nn.Linear(64, 32)).eval(), torch.randn(2, 64)

    def again():
        with torch.no_grad():
            engine = ThroughOpenVINO(model, "float32", tmp_path)
            assert torch.allclose(engine(x), model(x), atol=1e-6)
        return engine

    assert again().converted == 1
    (place,) = tmp_path.iterdir()
    for name, damage in DAMAGES.items():
        damage(place)
        assert count_saved(tmp_path) == (1, 1), name
        engine = again()
        assert (engine.converted, engine.loaded, engine.damaged) == (1, 0, 1), name
        assert "1 damaged and made anew" in str(engine.lines())
        assert "The conversion is made anew." in capsys.readouterr().err
        assert count_saved(tmp_path) == (1, 0), name
    engine = again()
    assert (engine.converted, engine.loaded) == (0, 1) and "damaged" not in str(engine.lines())
    assert not capsys.readouterr().err

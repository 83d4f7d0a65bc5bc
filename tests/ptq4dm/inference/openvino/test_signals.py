"""Ctrl-C after engines have come and gone: OpenVINO frees the stack on which the thread meets signals."""

import pytest

import fresh

pytest.importorskip("openvino")

PROGRAM = """
import faulthandler, gc, signal, torch
import models, ptq4dm

def engine(seed):
    model = models.plain_unet(seed)
    report = ptq4dm.optimize(model, engine="openvino", precision="float32")
    with torch.no_grad():
        model(torch.randn(1, 3, 8, 8), torch.tensor([3]))
    return model, report

BEFORE
made = [engine(seed) for seed in range(2)]
while made:
    made.pop(0)[1].undo()
    gc.collect()
try:
    signal.raise_signal(signal.SIGINT)
except KeyboardInterrupt:
    print("interrupted")
"""


@pytest.mark.parametrize("before", ["", "faulthandler.enable()"])
def test_ctrl_c_is_met_after_the_last_engine_is_gone(before, tmp_path):
    paths = f"{fresh.ROOT}:{fresh.HERE}"
    said = fresh.printed(PROGRAM.replace("BEFORE", before), said=tmp_path / "said", PYTHONPATH=paths)
    assert said.splitlines()[-1] == "interrupted"

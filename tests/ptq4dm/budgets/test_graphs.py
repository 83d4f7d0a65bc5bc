"""Times of layers on a GPU, in CUDA graphs; predicted step times against the graph of the whole mixed model."""

import pytest
import torch
from torch import nn

import ptq4dm
from helpers import normal
from ptq4dm import RTNConfig
from ptq4dm.budgets.costs import costs
from ptq4dm.budgets.graphs import time_steps
from ptq4dm.calibration.calls import Call
from ptq4dm.calibration.evidence import substituted
from ptq4dm.quantization.planning import make_plan

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
WIDTH, ROWS = 2048, 4096


def wide_model(layers=6):
    """Layers large enough that a launch is little beside them, in bfloat16."""
    torch.manual_seed(0)
    parts = [part for _ in range(layers) for part in (nn.Linear(WIDTH, WIDTH), nn.SiLU())]
    return nn.Sequential(*parts).cuda().bfloat16()


def packed(model, **options):
    config = RTNConfig(activations="dynamic", **options)
    return config.pack(model, make_plan(model, config), None)[0]


def test_layers_and_steps_are_timed_in_graphs(tmp_path):
    model = wide_model()
    call = Call((normal(ROWS, WIDTH).cuda().bfloat16(),), {})
    formats = {"keep": {}, "w8": packed(model), "w4": packed(model, weight_bits=4, group_size=128)}
    found = costs(model, call, formats, 5, tmp_path)
    assert found.fresh and found.where == torch.cuda.get_device_name()
    for label in formats:
        assert len(set(found.layers[label].values())) == 1  # one kind, one measurement
        assert 1 < found.layers[label]["0"].median < found.steps[label].median
    assert not costs(model, call, formats, 5, tmp_path).fresh


def test_a_mixed_plan_takes_the_time_that_is_predicted():
    model = wide_model()
    call = Call((normal(ROWS, WIDTH).cuda().bfloat16(),), {})
    formats = {"keep": {}, "w8": packed(model)}
    found = costs(model, call, formats, 11, "")
    for count in (2, 4, 6):
        some = dict(list(formats["w8"].items())[:count])
        predicted = found.outside + sum(
            found.layers["w8" if name in some else "keep"][name].median for name in found.layers["keep"]
        )
        measured = time_steps(model, call, {"mixed": some}, 11)["mixed"].median
        assert predicted == pytest.approx(measured, rel=0.1)
    with torch.no_grad(), substituted(model, formats["w8"]):
        assert model(*call.args).isfinite().all()


def test_the_recipe_chooses_on_a_gpu(unet):
    model = unet(block_out_channels=(64, 64)).cuda().bfloat16()
    with ptq4dm.record(model) as recorded, torch.no_grad():
        for seed in range(2):
            model(normal(2, 3, 8, 8, seed=seed).cuda().bfloat16(), 200 * seed + 20)
    recipe = ptq4dm.OHQConfig(num_tuples=2, draws=2, rounds=2, timed_batch=2, costs="", bytes=0.4)
    ptq4dm.quantize(model, recipe, recorded)
    assert recipe.outcome.table.labels[-1].startswith("rtn format=fp8") and recipe.outcome.allocation.bytes <= 0.4

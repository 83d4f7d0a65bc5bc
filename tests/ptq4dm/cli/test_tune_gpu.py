"""`ptq4dm bench tune` on a GPU: real kernels in real processes, by the real stopwatch; small shapes, few settings."""

import json

import pytest
import torch

from ptq4dm.cli.benches import tune

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def test_a_gpu_is_tuned(tmp_path, monkeypatch):
    from ptq4dm.kernels.tuning import launches_integer as search_integer
    from ptq4dm.kernels.tuning import launches_w4 as search_svdq
    from ptq4dm.kernels.tuning import launches_w8a8 as search_w8a8
    from ptq4dm.kernels.tuning.cases import Case
    from ptq4dm.kernels.w8a8.window import Window

    tune.check_gpu()
    large = dict(TMA=False, BM=256, BN=256, BK=128, BAND=8, num_warps=8, num_stages=8)  # 512 KB of shared memory
    settings = search_svdq.SVDQLaunch.settings

    def few(launch):
        return [*settings(launch)[:2], *[large] * (launch.step == "product")]

    monkeypatch.setattr(search_svdq.SVDQLaunch, "settings", few)
    every = search_w8a8.W8A8Launch.settings
    monkeypatch.setattr(search_w8a8.W8A8Launch, "settings", lambda launch: every(launch)[:2])
    launches = search_svdq.launches(256, 512, 256, 32, "int8") + search_svdq.launches(16, 512, 256, 0, "none")
    four = search_integer.IntegerLaunch.settings
    monkeypatch.setattr(search_integer.IntegerLaunch, "settings", lambda launch: four(launch)[:2])
    launches += [one for mode in ("progressive", "grouped") for one in search_integer.launches(256, 512, 256, mode)]
    launches += search_w8a8.launches([Case(Window(64, 8, 8, (3, 3), (1, 1), (1, 1)), 64, 64)])
    found = tune.tune(launches, tmp_path / "settings.json")
    assert [one.launch for one in found] == launches
    assert all(one.times and one.times[0][0] > 0 and one.before for one in found)
    product = next(one for one in found if one.launch.kernel == "int8.product")
    assert any("OutOfResources" in reason for reason, setting in product.left_out if setting == large)
    table = json.loads((tmp_path / "settings.json").read_text())
    named = {"device", "int8.prepare", "int8.product", "none.short", "progressive.product", "grouped.product", "w8a8"}
    assert set(table) == named
    assert table["int8.product"] == [[256, 512, 256, product.times[0][1]]]

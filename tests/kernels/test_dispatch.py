"""Which kernel serves a layer, asked of GPUs that are not here too, and timing what serves it."""

import itertools

import pytest
import torch

from ptq4dm.kernels import dispatch
from ptq4dm.kernels.attention import layer as attention
from ptq4dm.kernels.attention import layer8 as attention8
from ptq4dm.kernels.blocks import layer as blocks
from ptq4dm.kernels.cpu import lut as cpu_lut
from ptq4dm.kernels.cpu import w4a8 as cpu
from ptq4dm.kernels.dispatch import Query
from ptq4dm.kernels.lut import layer as lut
from ptq4dm.kernels.runtime import settings
from ptq4dm.kernels.tuning import latency
from ptq4dm.kernels.w4 import layer as w4
from ptq4dm.kernels.w8a8 import layer as w8a8
from ptq4dm.layers import row_mix_ops
from ptq4dm.layers.registry import quantized_copy
from ptq4dm.layers.row_mix import RowMixPlan

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
HERE = torch.cuda.is_available()
SPLIT = {"rows <= 32": "triton-w4a16", "more": "unpack + cublas"}


def on_gpu(capability, **query):
    with settings.target(settings.Target(capability, 132, lambda *_: None)):
        return dispatch.report(Query(**query, device=CUDA))


@pytest.mark.parametrize("capability", [(7, 5), (8, 0), (8, 9), (9, 0), (12, 0)], ids=str)
def test_layers_with_a_branch(capability):
    modern, served = capability >= (8, 9), capability >= (8, 0)
    right = {
        "fp8": "triton-w4a8-fp8" if modern else "triton-w4a8-int8",
        "int8": "triton-w4a8-int8",
        "int4": "triton-w4a4",
    }
    for activation, name in right.items():
        query = dict(weight="int4", activation=activation, branch=True)
        got = on_gpu(capability, **query, group_size=64)
        assert got == {"all rows": name if served else "reference"}
        for other in (dict(group_size=32), dict(), dict(group_size=64, zeros=True), dict(group_size=64, static=True)):
            assert on_gpu(capability, **query, **other) == {"all rows": "reference"}
    got = on_gpu(capability, weight="int4", activation="none", branch=True, group_size=64)
    assert got == (SPLIT if served else {"all rows": "reference"})


def test_few_rows_are_those_that_the_layer_does_not_unpack():
    """The limit in the report is the one that chooses the launches."""
    assert w4.steps(w4.WEIGHT_ONLY, 32) == ("short",) and w4.steps(w4.WEIGHT_ONLY, 33) == ("unpack", "cublas")
    query = dict(weight="int4", activation="none", group_size=64, branch=True, device=CUDA)
    with settings.target(settings.Target((9, 0), 132, lambda *_: None)):
        names = {rows: dispatch.find(Query(**query, rows=rows)).name for rows in (1, 32, 33, None)}
    assert names == {1: "triton-w4a16", 32: "triton-w4a16", 33: "unpack + cublas", None: "unpack + cublas"}


def test_no_kernel_serves_gpus_before_ampere():
    """For them Triton compiles no product of 8-bit codes, and there are no settings."""
    names = {}
    for capability in ((7, 5), (8, 0)):
        asked = itertools.product(dispatch.WEIGHTS, dispatch.ACTIVATIONS, (True, False))
        queries = [dict(weight=weight, activation=a, linear=linear) for weight, a, linear in asked]
        queries += [dict(weight="int4", activation=a, group_size=64) for a in dispatch.ACTIVATIONS]
        names[capability] = {name for query in queries for name in on_gpu(capability, **query).values()}
    assert names[7, 5] == {"reference"} and len(names[8, 0]) > 8


@pytest.mark.parametrize("groups", [1, 4])
def test_eight_bit_layers(groups):
    for weight, capability, name in [
        ("int8", (8, 0), "triton-int8"),
        ("int8", (9, 0), "triton-int8"),
        ("fp8", (8, 0), "reference"),
        ("fp8", (8, 9), "triton-fp8"),
    ]:
        got = on_gpu(capability, weight=weight, activation=weight, groups=groups)
        assert got == {"all rows": name if groups == 1 else "reference"}
    assert on_gpu((9, 0), weight="int8", activation="fp8") == {"all rows": "reference"}
    assert on_gpu((9, 0), weight="fp8", activation="none") == {"all rows": "reference"}


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("vnni", [True, False])
def test_on_a_cpu(vnni, compiled, monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: vnni)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    monkeypatch.setattr(cpu.library, "available", lambda: compiled)

    def name(*query, **more):
        return dispatch.find(Query(*query, **more, device=CPU)).name

    assert name("int8", "int8") == name("int8", "int8", groups=4) == ("onednn-int8" if vnni else "reference")
    copy = "onednn-int8 on an int8 copy" if vnni else "reference"
    assert name("int4", "int8", zeros=True) == ("cpu-w4a8" if compiled else copy)
    assert name("int4", "int8", zeros=True, linear=False) == ("cpu-w4a8" if compiled else copy)
    assert name("int4", "int8", zeros=True, linear=False, groups=2) == copy
    assert name("int4", "int8", inputs=1 << 16) == copy
    assert name("int4", "int8", 128, progressive=True) == ("cpu-w4a8" if compiled else copy)
    windows = dict(progressive=True, linear=False)
    assert name("int4", "int8", 128, **windows, inputs=1152) == ("cpu-w4a8" if compiled else copy)
    assert name("int4", "int8", 128, **windows, inputs=2304) == ("cpu-w4a8" if compiled and not vnni else copy)
    for more in ({}, {"zeros": True}, {"static": True}):
        assert name("int4", "int8", 64, **more) == ("cpu-w4a8" if compiled else "reference")
        assert name("int4", "int8", 64, linear=False, **more) == ("cpu-w4a8" if compiled else "reference")
        assert name("int4", "int8", 64, linear=False, groups=2, **more) == "reference"
    for query, more in [
        (("fp8", "fp8"), {}),
        (("int4", "none"), {}),
        (("int4", "fp8", 64), dict(branch=True)),
        (("int4", "int8", 32), dict(branch=True)),
    ]:
        assert name(*query, **more) == "reference"
    for activation, kernel in (("int8", "cpu-w4a8"), ("int4", "cpu-w4a4")):
        assert name("int4", activation, 64, branch=True) == (kernel if compiled else "reference")


def test_plain_4_bit_weights_on_a_gpu():
    """Linear layers under scales per token: groups without zero points go to the kernels of branched layers, if whole
    runs are, groups with them and single scales to those that sum whole numbers; all else is unpacked."""
    direct, unpacked = {"all rows": "triton-w4a8-int8"}, {"all rows": "unpack + triton-int8"}
    for group_size in (None, 32, 64, 128):
        for zeros in (True, False):
            query = dict(weight="int4", group_size=group_size, zeros=zeros, activation="int8")
            exact = {"all rows": f"triton-w4a8-{'grouped' if group_size else 'channel'}"}
            exact = exact if zeros or group_size is None else unpacked
            assert on_gpu((8, 0), **query) == (direct if group_size in (64, 128) and not zeros else exact)
            assert on_gpu((8, 0), **query, inputs=96) == exact
            for more in (dict(static=True), dict(linear=False)):
                assert on_gpu((8, 0), **query, **more) == unpacked
            assert on_gpu((7, 5), **query) == {"all rows": "reference"}
            for activation in ("fp8", "int4"):
                assert on_gpu((9, 0), **query | {"activation": activation}) == {"all rows": "reference"}
    assert on_gpu((9, 0), weight="int4", activation="int8", groups=2) == {"all rows": "reference"}


def test_progressive_weights(monkeypatch):
    """Widened in the product under scales per token; else their exact int8 form goes where int8 weights go."""
    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: True)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    monkeypatch.setattr(cpu.library, "available", lambda: False)
    for group_size in (None, 32, 64, 128):
        query = dict(weight="int4", activation="int8", group_size=group_size, zeros=True, progressive=True)
        assert on_gpu((8, 0), **query) == {"all rows": "triton-w4a8-progressive"}
        for more in (dict(static=True), dict(linear=False)):
            assert on_gpu((8, 0), **query, **more) == {"all rows": "unpack + triton-int8"}
        assert on_gpu((8, 0), **query, groups=2) == {"all rows": "reference"}
        assert dispatch.find(Query(**query, device=CPU)).name == "onednn-int8 on an int8 copy"
    with pytest.raises(ValueError, match="no branch"):
        Query("int4", "int8", 64, progressive=True, branch=True)


@pytest.mark.parametrize("vnni", [True, False])
def test_rows_of_two_widths_and_codebooks(vnni, monkeypatch):
    """Rows of two widths are operands of the 8-bit product, and what it is called says so; codebooks have none."""
    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: vnni)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    compiled = "cpu-w4a8" if cpu.serves(CPU) else "reference"
    copy = "onednn-int8 on an int8 copy" if vnni else "reference"
    assert row_mix_ops.kernel_name(CPU, True, 64) == dispatch.find(Query("row-mix", "int8", device=CPU)).name == copy
    assert dispatch.find(Query("row-mix", "int8", 64, device=CPU, inputs=1 << 16)).name == "reference"
    for capability in [(8, 0), (9, 0)]:
        assert on_gpu(capability, weight="row-mix", activation="int8") == {"all rows": "unpack + triton-int8"}
        for size in (32, 64, 128):
            query = dict(weight="row-mix", activation="int8", group_size=size)
            assert on_gpu(capability, **query) == {"all rows": "triton-w4a8-row-mix"}
            for more in (dict(static=True), dict(linear=False)):
                assert on_gpu(capability, **query, **more) == {"all rows": "unpack + triton-int8"}
            assert dispatch.find(Query(**query, device=CPU)).name == compiled
        for weight, activation in (("row-mix", "int4"), ("row-mix", "none"), ("power", "int8"), ("power", "none")):
            assert on_gpu(capability, weight=weight, activation=activation) == {"all rows": "reference"}
    assert dispatch.find(Query("power", "int8", device=CPU)).name == "reference"
    for size in (None, 64):
        query = dict(weight="codebook", group_size=size)
        assert dispatch.find(Query(**query, activation="int8", device=CPU)).name == ("reference" if size else copy)
        assert dispatch.find(Query(**query, activation="none", device=CPU)).name == "reference"
        for capability in [(8, 0), (9, 0)]:
            assert on_gpu(capability, **query, activation="int8") == {"all rows": "triton-w4a8-codebook"}
            few = {"rows <= 32": "triton-w4a16", "more": "unpack + cublas"}
            right = few if size else {"all rows": "unpack + cublas"}
            assert on_gpu(capability, **query, activation="none") == right
            for more in (dict(static=True), dict(linear=False)):
                assert on_gpu(capability, **query, activation="int8", **more) == {"all rows": "unpack + triton-int8"}
            assert on_gpu(capability, **query, activation="none", linear=False) == {"all rows": "unpack + cudnn"}


def test_rows_of_two_widths_go_through_the_kernel_that_is_named(monkeypatch):
    layer, x = torch.nn.Linear(32, 6), torch.randn(3, 32, generator=torch.Generator().manual_seed(0))
    mixed = quantized_copy(layer, RowMixPlan(wide=[1, 4]), "layer")
    called, product = [], w8a8._LINEAR[w8a8.kernel_name(CPU)]
    monkeypatch.setitem(w8a8._LINEAR, w8a8.kernel_name(CPU), lambda *a: called.append(a[1].dtype) or product(*a))
    with torch.no_grad():
        mixed(x)
    assert called == [torch.int8]


def test_what_find_says_is_what_the_layers_ask():
    """One table: `find` and the `kernel_name` of each room agree for every format on every device."""
    for capability in [(7, 5), (8, 0), (8, 9), (9, 0), (10, 0)]:
        with settings.target(settings.Target(capability, 132, lambda *_: None)):
            for device in (CPU, CUDA):
                for form, dtype in (("int8", torch.int8), ("fp8", torch.float8_e4m3fn)):
                    found = dispatch.find(Query(form, form, device=device)).name
                    assert found == w8a8.kernel_name(device, 8, 1, dtype)
                for activation in dispatch.ACTIVATIONS:
                    query = Query("int4", activation, 64, rows=1, branch=True, device=device)
                    assert dispatch.find(query).name == w4.kernel_name(device, activation, 64)
                for rows in (1, 2, 16, 17, None):
                    found = dispatch.find(Query("bcq", "none", 128, rows=rows, device=device)).name
                    assert found == lut.kernel_name(device, rows)
                assert dispatch.find(Query("blocks", "none", device=device)).name == blocks.kernel_name(device)
                assert dispatch.find(Query("blocks", "int8", device=device)).name == "reference"
                found = dispatch.find(Query("kv4", "none", device=device)).name
                assert found == attention.kernel_name(device)
                assert dispatch.find(Query("kv4", "int8", device=device)).name == "reference"
                for inputs in (None, 32, 512):
                    found = dispatch.find(Query("attention8", "int8", device=device, inputs=inputs)).name
                    assert found == attention8.kernel_name(device, inputs or 128)
                assert dispatch.find(Query("attention8", "none", device=device)).name == "reference"


def test_binary_coded_weights(monkeypatch):
    """One row is looked up, few are multiplied by planes, many by an unpacked weight."""
    query = dict(weight="bcq", activation="none", group_size=128)
    names = {"rows <= 16": "triton-sign-planes", "more": "unpack + cublas"}
    assert on_gpu((9, 0), **query) == on_gpu((8, 0), **query, zeros=True) == names
    assert on_gpu((7, 5), **query) == {"all rows": "reference"}
    assert dispatch.find(Query("bcq", "int8", device=CPU)).name == "reference"
    monkeypatch.setattr(cpu_lut, "serves", lambda device: device.type == "cpu")
    assert dispatch.report(Query(**query, device=CPU)) == {"all rows": "cpu-lut"}
    monkeypatch.setattr(cpu_lut, "serves", lambda device: False)
    assert dispatch.report(Query(**query, device=CPU)) == {"all rows": "reference"}
    assert dispatch.time(Query(**query, rows=1), 64, 256) > 0


def test_the_list():
    names = [kernel.name for kernel in dispatch.KERNELS]
    assert len(set(names)) == len(names) and names[-1] == "reference"
    assert set(names) >= {
        w4.FP8,
        w4.INT8,
        w4.INT4,
        w4.WEIGHT_ONLY,
        w8a8.TRITON,
        w8a8.TRITON_FP8,
        w8a8.ONEDNN,
        attention.TRITON,
        attention8.GLUON,
        attention8.TRITON,
    }
    modes = {mode for mode in dispatch.tunable().values() if mode}
    assert (
        modes == {*w4.MODES.values(), "progressive", "grouped", "look-up", "planes"}
        and list(dispatch.tunable())[-1] == "w8a8"
    )
    tables = [settings.settings_in(settings.FOLDER / f"{name}.json") for name in ("nvidia_h200", "sm_80")]
    modes |= {"w8a8", "kv4"}  # attention's settings are guesses, which nothing searches
    assert modes == {name.partition(".")[0] for table in tables for name in table if name != "device"}


@pytest.mark.parametrize(
    "query, says",
    [
        (
            dict(weight="int3", activation="int8"),
            "weight is one of int8, fp8, int4, row-mix, codebook, power, kv4, attention8, bcq, blocks, not 'int3'",
        ),
        (dict(weight="int8", activation="bf16"), "activation is one of"),
        (dict(weight="int8", activation="int8", group_size=64), "only int4"),
        (dict(weight="fp8", activation="fp8", branch=True), "only int4"),
    ],
)
def test_words_that_are_not_known(query, says):
    with pytest.raises(ValueError, match=says):
        Query(**query)


@pytest.mark.parametrize(
    "query",
    [
        Query("int8", "int8", rows=3),
        Query("int8", "int8", rows=3, static=True),
        Query("fp8", "fp8", rows=3, static=True),
        Query("int4", "int8", rows=3, zeros=True),
        Query("int4", "int8", 64, rows=3, static=True),
        Query("int4", "int8", 64, rows=3, zeros=True, progressive=True),
        Query("int4", "none", rows=3),
        Query("int4", "int4", 32, rows=3, branch=True),
    ],
    ids=str,
)
def test_times(query, monkeypatch):
    """The call that is timed is the layer: its output is near the float product, of the right shape."""
    timed = []
    monkeypatch.setattr(latency.stopwatch, "on_cpu", lambda calls: timed.extend(calls) or 12.5)
    assert dispatch.time(query, 40, 128) == 12.5
    (call,) = timed
    y = call()
    assert y.shape == (3, 40) and y.isfinite().all()
    x, weight, bias = latency._float_layer(3, 40, 128, CPU, 0)
    right = x @ weight.T + bias
    if not query.branch:  # else a random branch is added
        assert (y - right).norm() < (0.25 if query.weight == "int4" else 0.05) * right.norm()


def test_the_stopwatch_of_a_cpu():
    spent = dispatch.time(Query("int8", "int8", rows=4), 16, 32)
    assert 0 < spent < 1e6


def test_what_cannot_be_timed():
    for query, k, says in [
        (Query("int8", "int8"), 64, "give `rows`"),
        (Query("int8", "int8", rows=4, groups=2), 64, "no groups"),
        (Query("int4", "int8", 32, rows=4), 40, "groups of 32"),
        (Query("int8", "none", rows=4), 64, "no layer of int8 weights and none"),
        (Query("row-mix", "int8", rows=4), 64, "no layer of row-mix weights and int8 activations is timed here"),
        (Query("kv4", "none", rows=4), 64, "no layer of kv4 weights"),
    ]:
        with pytest.raises(ValueError, match=says):
            dispatch.time(query, 8, k)


@pytest.mark.gpu
@pytest.mark.skipif(not HERE, reason="needs a CUDA device")
@pytest.mark.parametrize("rows", [16, 256])
def test_times_on_the_gpu(rows):
    for query in [
        Query("int8", "int8", rows=rows, device=CUDA, static=True),
        Query("int4", "int8", rows=rows, device=CUDA),
        Query("int4", "int8", 64, rows=rows, device=CUDA, zeros=True),
        Query("int4", "int8", 64, rows=rows, device=CUDA, zeros=True, progressive=True),
        Query("int4", "int8", 64, rows=rows, device=CUDA, branch=True),
        Query("int4", "none", 64, rows=rows, device=CUDA, branch=True),
    ]:
        assert 0 < dispatch.time(query, 1152, 1152) < 1e4


def test_layers_report_the_kernels_of_few_rows_and_of_more():
    """A weight-only layer: above 32 rows cuBLAS multiplies, and the report says so."""
    from ptq4dm.layers.registry import empty_quantized
    from ptq4dm.svdquant.layers.plan import SVDQPlan

    layer = empty_quantized(torch.nn.Linear(64, 8), SVDQPlan(rank=0, activation="none"), "meta")
    assert layer.kernels_text() == "reference"
    with settings.target(settings.Target((9, 0), 132, lambda *_: None)):
        query = Query("int4", "none", 64, branch=True, device=CUDA)
        assert dispatch.report(query) == SPLIT
        layer.kernels = lambda: dispatch.report(query)
        assert layer.kernels_text() == "triton-w4a16 (rows <= 32), unpack + cublas (more)"

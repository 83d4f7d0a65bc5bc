"""Tables whose columns hold whatever names come."""

from ptq4dm.quantization.report import QuantizationReport
from ptq4dm.tables import aligned

LONG = "W4A8 g128 affine + 1024 rows W8 in a format of a very long name"


def rows(*formats, kernel="cpu-w4a8", **more):
    return [{"layer": f"layer.{i}", "format": one, "kernel": kernel, "sqnr": 1.0, "basis": "weight", **more}
            for i, one in enumerate(formats)]  # fmt: skip


def test_columns_are_as_wide_as_what_is_in_them():
    lines = aligned([["1", "short", "end"], ["22,000", LONG, "another end"]], right=(0,))
    assert lines == [f"     1  {'short':<{len(LONG)}}  end", f"22,000  {LONG}  another end"]


def test_a_report_with_long_formats_stays_a_table():
    text = QuantizationReport({}, 100, 10, rows("W8A8", LONG), in_16_bits=5, full_in_16_bits=50).table()
    head, *layers = text.splitlines()[:3]
    assert {line.index("cpu-w4a8") for line in layers} == {head.index("kernel")}
    assert "0.100 of the full-precision model's" in text


def test_layers_without_a_kernel_and_inputs_in_parts_are_counted():
    plain = QuantizationReport({}, 100, 10, rows("W8A8", LONG), in_16_bits=5, full_in_16_bits=50).table()
    assert "no kernel" not in plain and "parts" not in plain
    slow = rows("W8A8") + rows(LONG, LONG, kernel="reference", parts=2) + rows("W8", kernel="reference", parts=3)
    text = QuantizationReport({}, 100, 10, slow, in_16_bits=5, full_in_16_bits=50).table()
    assert f"no kernel serves 3 of 4 layers on this device (2 of {LONG}, 1 of W8; the first is layer.0)" in text
    assert "inputs with a grid for each part: of 3 of 4 layers (2 in 2, 1 in 3 parts)" in text
    alone = QuantizationReport({}, 100, 10, rows("W8", kernel="reference"), in_16_bits=5, full_in_16_bits=50).table()
    assert "no kernel serves 1 of 1 layers on this device (W8; the first is layer.0)" in alone


def test_a_rank_that_layers_do_not_have_is_told():
    def told(asked, *ranks):
        found = [row | {"rank": rank} for row, rank in zip(rows("W4A4"), ranks, strict=False)]
        return QuantizationReport({"rank": asked}, 100, 10, found + rows("W8A8")).table()

    assert "rank 300 is more than 1 of 2 layers have: their branch has 256, the whole weight" in told(300, 256)
    assert "is more than" not in told(256, 256)

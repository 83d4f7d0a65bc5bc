"""Tilings: the counts of the released simulator's file of layers to the bit; what must hold of any tiling."""

from dataclasses import replace

import pytest

from ptq4dm.errors import UserError
from ptq4dm.hardware.costs import AUTHORS_28NM
from ptq4dm.hardware.machine import Machine, SearchCosts, Shape
from ptq4dm.hardware.tiling import best_tiling

COSTS = SearchCosts(
    AUTHORS_28NM.inputs, AUTHORS_28NM.weights, AUTHORS_28NM.outputs, AUTHORS_28NM.search_dram, 1024 * 0.56
)
MACHINE = Machine(32, 32, (32, 32), (262144, 131072, 131072), 1024)
# (batch, side, channels, outputs, kernel and stride, bits) -> a row of the released results/mix_int_os.csv:
# cycles, waits, bits of weights read and written, of outputs, of inputs, of DRAM. Where it tags 6 bits, so do we.
RELEASED = {
    (64, 14, 3, 768, 16, 8): (7225536, 192, 59190018048, 924844032, 924844032, 462422016, 59190018048, 77070336,
                              1001914368, 462422016),
    (64, 1, 768, 2304, 1, 6): (110616, 24, 679477248, 42467328, 228851712, 226492416, 679477248, 42467328,
                               84934656, 2359296),
    (64, 1, 768, 18, 1, 8): (1986, 450, 7077888, 442368, 1787904, 1769472, 7077888, 1572864, 2015232, 18432),
    (64, 1, 768, 768, 1, 6): (36888, 24, 226492416, 14155776, 76283904, 75497472, 226492416, 14155776,
                              28311552, 786432),
    (64, 1, 768, 6, 1, 8): (1696, 160, 2359296, 147456, 595968, 589824, 2359296, 1572864, 1720320, 6144),
    (64, 1, 768, 3072, 1, 6): (147480, 24, 905969664, 56623104, 305135616, 301989888, 905969664, 56623104,
                               113246208, 3145728),
    (64, 1, 768, 24, 1, 8): (2064, 528, 9437184, 147456, 49152, 24576, 9437184, 393216, 540672, 24576),
    (64, 1, 3072, 768, 1, 6): (147468, 12, 905969664, 56623104, 151781376, 150994944, 905969664, 56623104,
                               113246208, 786432),
    (64, 1, 3072, 6, 1, 8): (6304, 160, 9437184, 147456, 595968, 589824, 9437184, 1572864, 1720320, 6144),
    (64, 14, 3, 1280, 16, 8): (12042432, 192, 98650030080, 1541406720, 1541406720, 770703360, 98650030080, 77070336,
                               1618477056, 770703360),
    (64, 1, 1280, 3840, 1, 6): (307224, 24, 1887436800, 117964800, 633077760, 629145600, 1887436800, 117964800,
                                235929600, 3932160),
    (64, 1, 1280, 30, 1, 8): (2584, 24, 19660800, 614400, 2488320, 2457600, 19660800, 1310720, 1925120, 30720),
    (64, 1, 5120, 1280, 1, 6): (409612, 12, 2516582400, 157286400, 420741120, 419430400, 2516582400, 157286400,
                                314572800, 1310720),
    (64, 1, 5120, 10, 1, 8): (10251, 11, 26214400, 1638400, 3287040, 3276800, 26214400, 5242880, 6881280, 10240),
}  # fmt: skip


@pytest.mark.parametrize("layer", RELEASED, ids=lambda layer: "-".join(map(str, layer)))
def test_counts_are_those_of_the_released_simulator(layer):
    batch, side, channels, outputs, kernel, bits = layer
    square = (kernel, kernel)
    found = best_tiling(Shape(batch, side, side, channels, outputs, square, square, bits, bits), MACHINE, COSTS)
    counts = [found.cycles, found.stalls]
    for name in ("weights", "outputs", "inputs"):
        counts += [found.buffer_read[name], found.buffer_write[name]]
    assert (*counts, found.dram_read, found.dram_write) == RELEASED[layer]


CONV = Shape(4, 16, 16, 48, 80, (3, 3), (1, 1), 8, 4)
LINEAR = Shape(1000, 1, 1, 300, 70, (1, 1), (1, 1), 8, 4)


@pytest.mark.parametrize("shape", [CONV, LINEAR], ids=["conv", "linear"])
@pytest.mark.parametrize("unbounded", [True, False])
def test_no_tiling_is_better_than_can_be(shape, unbounded):
    shape = replace(shape, unfolded=False, unbounded=unbounded)
    found = best_tiling(shape, MACHINE, COSTS)
    taps = shape.kernel[0] * shape.kernel[1]
    pixels = shape.batch * shape.height * shape.width
    products = pixels * shape.outputs * shape.channels * taps
    assert found.dram_read >= shape.channels * (pixels * 8 + taps * shape.outputs * 4)
    assert found.dram_write >= pixels * shape.outputs * 16
    assert found.cycles - found.stalls >= products / (32 * 32)
    assert found.buffer_read["inputs"] >= products * 8 and found.buffer_read["weights"] >= products * 4


def test_a_wider_port_or_larger_buffers_never_cost_cycles():
    for shape in (CONV, LINEAR):
        cycles = [best_tiling(shape, replace(MACHINE, port=port), COSTS).cycles for port in (16, 64, 256, 1024)]
        assert cycles == sorted(cycles, reverse=True) and cycles[0] > cycles[-1]
        small = best_tiling(shape, replace(MACHINE, buffers=(2048, 2048, 2048), port=64), COSTS)
        assert small.cycles > best_tiling(shape, replace(MACHINE, port=64), COSTS).cycles


def test_overlapping_windows_are_read_once_where_they_are_not_copied_out():
    copied, once = (best_tiling(replace(CONV, unfolded=unfolded), MACHINE, COSTS) for unfolded in (True, False))
    assert copied.buffer_write["inputs"] > 5 * once.buffer_write["inputs"]
    patches = replace(CONV, kernel=(4, 4), stride=(4, 4))  # nothing overlaps: the same
    assert best_tiling(patches, MACHINE, COSTS) == best_tiling(replace(patches, unfolded=False), MACHINE, COSTS)


def test_outputs_that_must_fit_their_buffer_leave_it_at_the_end():
    published, bounded = (best_tiling(replace(LINEAR, unbounded=free), MACHINE, COSTS) for free in (True, False))
    assert bounded.cycles > published.cycles


def test_what_fits_no_buffer_is_told():
    with pytest.raises(UserError, match="no tile of a layer with kernel"):
        best_tiling(replace(CONV, kernel=(999, 999)), MACHINE, COSTS)

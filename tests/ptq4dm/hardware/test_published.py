"""The four nets of the authors' results: all times and parts of energies, as modelled, round to the published."""

import math

import pytest

from ptq4dm.hardware import CORRECTED, DESIGNS, PUBLISHED, published
from ptq4dm.hardware.comparison import mean_over, ratios
from ptq4dm.hardware.costs import HOROWITZ_45NM
from ptq4dm.hardware.designs import side_by_side, widths_of
from ptq4dm.hardware.nets import NETS, works_of_net
from ptq4dm.hardware.simulator import PARTS, simulate
from ptq4dm.hardware.switches import LABELS, turned

ROUNDING = 0.0051  # of figures with two digits


@pytest.fixture(scope="module")
def modelled():
    return {net: published.totals_of_net(net, PUBLISHED) for net in NETS}


@pytest.mark.parametrize("net", NETS)
def test_times_are_the_published(modelled, net):
    found = [time for time, _ in ratios(modelled[net]).values()]
    assert len(found) == len(published.TIMES[net]) == 6
    for one, other in zip(found, published.TIMES[net], strict=True):
        assert abs(one - other) <= max(0.03 * other, 0.006)  # what was asked for
        assert abs(one - other) <= ROUNDING


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("net", NETS)
def test_energies_are_the_published(modelled, net, part):
    found = published.part_ratios(modelled[net], part)
    assert found == pytest.approx(published.ENERGIES[part][net], abs=ROUNDING)


def test_means_are_the_published_with_their_faults(modelled):
    times = [[time for time, _ in ratios(totals).values()] for totals in modelled.values()]
    assert mean_over(times, PUBLISHED, energy=False) == pytest.approx(published.MEAN_TIMES, abs=ROUNDING)
    means = published.mean_parts(modelled, PUBLISHED)
    for part in PARTS:
        assert means[part] == pytest.approx(published.MEAN_ENERGIES[part], abs=ROUNDING)
    whole = mean_over([[1.0, 4.0], [4.0, 1.0]], CORRECTED, energy=True)
    assert whole == pytest.approx([2.0, 2.0])


@pytest.mark.parametrize("net", NETS)
def test_the_older_section_has_w4a8_twice_as_slow(net):
    time, _ = ratios(published.totals_of_net(net, turned(PUBLISHED, "T7")))["MixPE-W4A8"]
    assert time == pytest.approx(published.SUPERSEDED_W4A8[net], abs=2 * ROUNDING)


@pytest.mark.parametrize("net", ["opt-6.7b", "llama2-13b"])
def test_compute_cycles_are_the_closed_form(net):
    works = works_of_net(net, 64, PUBLISHED)
    blocks = list(dict.fromkeys(work.block for work in works))
    for design in DESIGNS:
        cycles = 0
        for work in works:
            widths = widths_of(design, work, blocks, PUBLISHED)
            products = [(work.channels, work.outputs, widths.inputs, widths.weights)]
            if design.mixes == "all":
                products.append((work.channels // 8, work.outputs // 128, design.high, design.high))
            else:
                products.append((work.channels, work.outputs // 8, design.high, design.high))
            for inputs, outputs, input_bits, weight_bits in products:
                rows = math.ceil(64 / (design.rows * side_by_side(design, input_bits)))
                cycles += rows * math.ceil(outputs / (design.columns * side_by_side(design, weight_bits))) * inputs
        found = simulate(works, design, HOROWITZ_45NM, PUBLISHED)
        computing = sum(one.cycles - one.stalls for one in found)
        assert cycles <= computing <= 1.03 * cycles  # tiles of a power of two leave columns of 28 and of 40 idle


# --- what each fault changes ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def each():
    """Label -> net -> totals, with one switch turned from the published."""
    return {label: {net: published.totals_of_net(net, turned(PUBLISHED, label)) for net in NETS} for label in LABELS}


CHANGED = {
    "T1": {"MixPE-W4A8", "MixPE-W4A16"},
    "T2": {"MixPE-W4A8", "MixPE-W4A16"},
    "T3": {"MixPE-W4A8", "MixPE-W4A16"},
    "T4": set(),
    "T7": {"MixPE-W4A8"},
    "T9": set(),
    "T10": {"ANT", "BitFusion", "INT8", "FP16"},
}


@pytest.mark.parametrize("label", CHANGED)
def test_a_fault_changes_the_designs_that_it_is_about(each, modelled, label):
    changed = {
        design
        for net in NETS
        for design, total in each[label][net].items()
        if total.energy != pytest.approx(modelled[net][design].energy, rel=1e-9)
    }
    assert changed == CHANGED[label]


def test_what_a_fault_changes_is_what_it_says(each, modelled):
    def of(label, design, net="opt-6.7b"):
        return each[label][net][design].time / modelled[net][design].time

    assert of("T1", "MixPE-W4A16") == pytest.approx(2, rel=0.01)  # half as many inputs side by side
    assert of("T1", "MixPE-W4A8") == pytest.approx(1, rel=0.01)  # 64 rows fill what is left, so time hides it
    assert of("T6", "MixPE-W4A8") == pytest.approx(0.5, rel=0.02)
    assert all(of("T6", design) == pytest.approx(1, rel=0.01) for design in ("ANT", "INT8", "FP16"))
    assert all(of(label, design.name) == 1 for label in ("T3", "T4", "T8", "T9") for design in DESIGNS)
    assert of("T8", "FP16", "llama2-13b") == pytest.approx((4 + 3 * 13824 / 5120) / 12, rel=0.01)


def test_corrected_ant_overtakes_w4a16():
    """The order of at least one pair of designs changes; this one does on both language models."""
    for net in ("opt-6.7b", "llama2-13b"):
        before, after = (published.totals_of_net(net, switches) for switches in (PUBLISHED, CORRECTED))
        for what in ("time", "energy"):
            old, new = ({name: getattr(one, what) for name, one in totals.items()} for totals in (before, after))
            assert old["MixPE-W4A16"] < old["ANT"] and new["ANT"] < new["MixPE-W4A16"]


def test_every_line_of_the_report_says_modelled():
    lines = [line for line in published.report().splitlines() if line and not set(line) <= set("|-")]
    assert len(lines) > 30 and all("modelled" in line for line in lines)

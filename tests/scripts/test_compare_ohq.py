"""OHQ's comparison on a tiny model: every stage has its figures, and what is kept is not measured again."""

import importlib
import json
import time
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler

import ptq4dm
from models import pixel_dit
from ptq4dm.errors import UserError

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts" / "benchmarks"
W8, W4 = "rtn activations=dynamic", "rtn weight_bits=4 activations=dynamic"
SMALL = ["--tuples", "4", "--draws", "2", "--batch", "2", "--rounds", "2", "--plans", "2", "--random", "3"]
SMALL += ["--permuted", "1", "--points", "2", "--steps", "2", "--threads", "1", "--candidates", W8, W4]
SMALL += ["--output", "ohq.json"]


def tiny(*_):
    pipe = ptq4dm.PixelDiTPipeline(transformer=pixel_dit(), scheduler=DDIMScheduler())
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def compare(tmp_path, monkeypatch, one_thread):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(ptq4dm, "load_pipeline", tiny)
    return importlib.import_module("compare_ohq")


def test_all_stages_have_their_figures_and_are_kept(compare, monkeypatch, capsys):
    compare.main(SMALL)
    facts = json.loads(Path("ohq.json").read_text())
    assert json.loads(capsys.readouterr().out) == facts
    for way in ("masked, weights", "direct"):
        one, at = facts["sensitivity"][way], facts["budget"][way]
        assert set(one["halves"]) == set(one["spearman"]) == {W8, W4, "mean"}
        assert at["bytes"]["chosen"] <= at["bytes"]["budget"] * 1.00001 and at["random"]["count"] == 3
        assert at["predicted"]["chosen"] <= at["greedy"]["predicted"] * (1 + 1e-9)
        low, high = at["random"]["chosen_over_least"]
        assert 0 <= low <= high
    masked, direct = (facts["sensitivity"][way]["forwards"] for way in ("masked, weights", "direct"))
    layers = masked / 4 - 1
    assert direct == 4 * (1 + 2 * layers) and facts["sensitivity"]["direct"]["spearman"]["mean"] == pytest.approx(1)
    plans = [one["plan"] for one in facts["times"]]
    assert {"0", "1", W8, W4, "chosen, direct", "greedy, direct"} <= set(plans) and len(set(plans)) == len(plans)
    assert all(one["measured"] > 0 and one["ratio"] > 0 for one in facts["times"])
    assert facts["uniform"]["keep"]["error"] == 0 < facts["uniform"][W8]["error"] < facts["uniform"][W4]["error"]
    assert {one["budget"] for one in facts["fronts"]} == {"bytes", "latency"}

    for name in ("measured_costs", "step_times"):
        monkeypatch.setattr(compare, name, lambda *_: pytest.fail("it is there already"))
    compare.main(SMALL)
    again = json.loads(Path("ohq.json").read_text())
    assert {**again, "seconds": 0} == {**facts, "seconds": 0}
    with pytest.raises(UserError, match="made with other settings"):
        compare.main([*SMALL, "--seed", "1"])
    monkeypatch.setattr(compare, "device_words", lambda device: "another card")
    with pytest.raises(UserError, match="made with other settings"):
        compare.main(SMALL)


def test_held_out_errors_are_those_of_the_mixed_model(compare):
    """The interval lies around the error, and a ratio to itself is one; full precision has none."""
    from ohq_bench.held_out import HeldOut
    from ohq_bench.kept import Kept
    from ohq_bench.subject import subject_of

    args = compare.arguments().parse_args(SMALL)
    args.error_batch = 2
    subject = subject_of(args, "cpu", "float32", 4, 2)

    class Table:
        layers = subject.names

    truth = HeldOut(subject, Table, 2, Kept(Path("kept.json"), {}))
    picks = np.full(len(subject.names), 2)
    low, high = truth.interval(picks)
    assert truth.errors(picks).shape == (4, 2) and low <= truth.error(picks) <= high
    assert truth.interval(picks, picks) == [1, 1] and truth.error(np.zeros_like(picks)) == 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--draws", "3"], "--draws is an even number"),
        (["--tuples", "1"], "--tuples must be 2 or more"),
        (["--draws", "8"], "at most --tuples"),
        (["--share", "1"], "--share is a part"),
        (["--thread-time", "--threads", "2"], "give --threads 1"),
        (["--rounds", "0"], "--rounds must be 1 or more"),
    ],
)
def test_numbers_that_measure_nothing_are_refused(compare, words, message):
    with pytest.raises(UserError, match=message):
        compare.main([*SMALL, *words])


def test_plans_are_predicted_from_layers_by_themselves(compare, monkeypatch):
    """On a GPU, where graphs tell the time; here all of them take the same, so that no format adds anything."""
    from ohq_bench.steps import by_themselves, mixtures, step_times
    from ohq_bench.subject import subject_of

    from ptq4dm.budgets import graphs
    from ptq4dm.budgets.costs import costs
    from ptq4dm.budgets.masking import Sensitivity
    from ptq4dm.budgets.measure import table_of, timed_call_of
    from ptq4dm.kernels.tuning import stopwatch

    class Graph:
        def __init__(self, calls):
            self.calls = [call() for call in calls]

        def pool(self):
            return "pool"

        def replay(self):
            return 10.0 * len(self.calls)

    monkeypatch.setattr(stopwatch, "graph_of", lambda calls, pool=None: (Graph(calls), None))
    monkeypatch.setattr(stopwatch, "elapsed", lambda replay: replay())
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    args = compare.arguments().parse_args(SMALL)
    args.error_batch = 2
    subject = subject_of(args, "cpu", "float32", 2, 2)
    formats = {"keep": {}, **subject.formats}
    call = timed_call_of(subject.model, subject.calls, 2)
    found = costs(subject.model, call, formats, 1, "")
    errors = {name: {label: 1.0 for label in subject.formats} for name in subject.names}
    table = table_of(subject.model, subject.views, subject.candidates, subject.calls, found, Sensitivity(errors))
    plans = mixtures(table, 2)
    steps = graphs.time_steps(subject.model, call, formats, 2)
    assert {label: figure.median for label, figure in steps.items()} == pytest.approx(dict.fromkeys(formats, 10.0))
    times = step_times(subject, table, plans, args, time.perf_counter)
    told = by_themselves(subject, table, plans, times, args)
    measured = {one["plan"]: one["measured"] for one in times}
    for way in ("cold", "warm"):
        assert told[way] == pytest.approx({plan: 1 / measured[plan] for plan in plans})
    rows = [row for kind in told["added"].values() for row in kind.values()]
    assert len(rows) >= 6 and all(row["cold"] == row["warm"] == pytest.approx(0) for row in rows)
    assert all("in place" in row for row in rows)

"""`ptq4dm bench hardware`: what it prints and writes, each line of which says that it is modelled."""

import json

import pytest
from diffusers import DDIMScheduler, DDPMPipeline
from PIL import Image

from models import unet
from ptq4dm.cli.main import main
from ptq4dm.hardware import DESIGNS, PUBLISHED, published
from ptq4dm.hardware.switches import LABELS


@pytest.fixture(scope="module")
def desk(tmp_path_factory):
    root = tmp_path_factory.mktemp("desk")
    DDPMPipeline(unet(), DDIMScheduler()).save_pretrained(root / "model")
    return root


@pytest.fixture(autouse=True)
def here(desk, monkeypatch):
    monkeypatch.chdir(desk)


def lines_of(capsys):
    lines = [line for line in capsys.readouterr().out.splitlines() if not set(line) <= set("|-")]
    assert lines and all("modelled" in line for line in lines), [line for line in lines if "modelled" not in line]
    return lines


def test_a_model_gives_a_table_a_file_and_a_picture(desk, capsys):
    assert (
        main(
            [
                "bench",
                "hardware",
                "--model",
                "model",
                "--num-inference-steps",
                "3",
                "--batch-size",
                "2",
                "--output",
                "out",
            ]
        )
        == 0
    )
    lines = lines_of(capsys)
    assert [design.name for design in DESIGNS] == [
        line.split("|")[1].split(": ")[1].strip() for line in lines if line.startswith("| modelled: ")
    ][1:]
    found = json.loads((desk / "out/model.json").read_text())
    assert found["steps"] == 3 and found["batch_size"] == 2 and "measurement" in found["note"]
    for mode in ("published", "corrected"):
        totals = found["modelled"][mode]
        assert totals["FP16"]["time_over_fp16"] == 1 and list(totals) == [design.name for design in DESIGNS]
        for one in totals.values():
            assert sum(one["modelled_ms_by_type"].values()) == pytest.approx(one["modelled_ms"])
            assert sum(one["modelled_mj_by_type"].values()) == pytest.approx(one["modelled_mj"])
            assert sum(one["modelled_mj_by_part"].values()) == pytest.approx(one["modelled_mj"])
    for design in DESIGNS:
        layers = [row["designs"][design.name] for row in found["layers"]]
        for key in ("modelled_ms", "modelled_mj"):
            assert sum(row[key] for row in layers) == pytest.approx(found["modelled"]["corrected"][design.name][key])
    with Image.open(desk / "out/model.png") as picture:
        assert picture.width > 800


def test_the_authors_net_is_their_result_and_each_fault_is_told(desk, capsys):
    assert main(["bench", "hardware", "--model", "opt-6.7b", "--each", "--output", "out"]) == 0
    lines = lines_of(capsys)
    found = json.loads((desk / "out/opt-6.7b.json").read_text())
    times = [one["time_over_fp16"] for one in found["modelled"]["published"].values()]
    assert times == pytest.approx(published.TIMES["opt-6.7b"], abs=0.0051)
    assert list(found["each"]) == list(LABELS)
    assert any("ANT is now faster than MixPE-W4A16" in line for line in lines)
    assert sum(line.startswith("modelled: T10") for line in lines) == 3


def test_costs_per_operation_change_energies_alone(desk, capsys):
    for costs in ("28nm", "45nm"):
        assert main(f"bench hardware --model vit-b --costs {costs} --output {costs} --json".split()) == 0
        found = json.loads(capsys.readouterr().out)
        assert found["costs"] == costs and "layers" not in found
        totals = found["modelled"]["published"]
        wanted = published.totals_of_net("vit-b", PUBLISHED)
        assert totals["ANT"]["modelled_ms"] == pytest.approx(wanted["ANT"].time)
        assert (totals["ANT"]["modelled_mj"] == pytest.approx(wanted["ANT"].energy)) is (costs == "28nm")


@pytest.mark.parametrize(
    "flags, says",
    [
        ("--model model --batch-size 0", "--batch-size must be from 1 to"),
        ("--model model --steps 0", "--num-inference-steps (or --steps) must be from 1 to"),
        ("--model vit-b --num-inference-steps 5", "takes no steps"),
        (
            "--model flux --guidance-scale 5",
            "'flux' is modelled by its shapes alone, so that --guidance-scale would",
        ),
        ("--model opt-6.7b --prompt x", "--prompt would change nothing"),
        ("--model sdxx", "; did you mean 'sdxl'?"),
        ("--model unet-cifar", "; did you mean 'unet-cifar10'?"),
        ("--model vit", "is none of the models unet-cifar10"),
        ("--model nobody", "nor a hub id (owner/name)."),
        ("--costs 7nm", "choose from 28nm, 45nm"),
    ],
)
def test_wrong_input_is_one_line_and_leaves_nothing(flags, says, desk, capsys):
    try:
        status = main(["bench", "hardware", *flags.split(), "--output", "nothing"])
    except SystemExit as error:
        status = error.code
    out, err = capsys.readouterr()
    assert status == 2 and out == "" and says in err and err.count("\n") == 1
    assert not list(desk.glob("nothing/*.json"))

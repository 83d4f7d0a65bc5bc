"""`bench samplers` and the choice of a sampler on the command line, on a tiny 32x32 model."""

import json
import threading
import time

import pytest
import torch
from diffusers import DDIMScheduler, DDPMPipeline, DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler

from models import plain_unet
from ptq4dm.cli.main import main
from ptq4dm.errors import UserError
from ptq4dm.samplers import DDIMScheduler as OurDDIM
from ptq4dm.samplers import DEISScheduler
from ptq4dm.samplers.catalog import make_sampler
from ptq4dm.samplers.comparison import compare
from ptq4dm.samplers.comparison.compare import SamplerBench, set_budget, usual_samplers
from ptq4dm.samplers.comparison.table import table

CONFIG = DDIMScheduler(timestep_spacing="trailing").config


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    unet = plain_unet(sample_size=32)
    path = tmp_path_factory.mktemp("model")
    DDPMPipeline(unet, DDIMScheduler(timestep_spacing="trailing")).save_pretrained(path)
    return str(path)


FIGURES = {"evaluations": 2, "feature_fid": 1.0, "seconds": 1.0, "device": "cpu"}


def bench(folder, output, *arguments):
    few = ["--num-images", "4", "--batch-size", "2", "--evaluations", "2", "3"]
    return main(["bench", "samplers", "--model", folder, "--output", str(output), *few, *arguments])


def test_bench_measures_resumes_and_refuses_other_settings(folder, tmp_path, capsys):
    names = ["--samplers", "deis", "diffusers/heun"]
    assert bench(folder, tmp_path, *names) == 0
    printed = capsys.readouterr().out
    assert "| deis |" in printed and "| diffusers/heun |" in printed and "(1)" in printed  # Heun used 1 of 2
    record = json.loads((tmp_path / "samplers.json").read_text())
    assert [(r["sampler"], r["budget"], r["evaluations"]) for r in record["rows"]] == [
        ("deis", 2, 2), ("deis", 3, 3), ("diffusers/heun", 2, 1), ("diffusers/heun", 3, 3),
    ]  # fmt: skip
    assert (tmp_path / "samplers.png").stat().st_size > 1000

    record["rows"][0]["feature_fid"] = 1.0  # a row that is there is not measured again
    (tmp_path / "samplers.json").write_text(json.dumps(record))
    assert bench(folder, tmp_path, *names, "ipndm1/edm") == 0
    again = json.loads((tmp_path / "samplers.json").read_text())["rows"]
    assert again[0]["feature_fid"] == 1.0 and len(again) == 6

    assert bench(folder, tmp_path, *names, "--seed", "5") == 2
    assert "other settings" in capsys.readouterr().err


def test_two_at_once_lose_no_rows(tmp_path, monkeypatch):
    def measure(pipe, config, todo, rows, own):
        time.sleep(0.2)  # while the other would begin with the same rows
        for sampler, budget in todo:
            rows.add({"sampler": sampler, "budget": budget, **FIGURES})

    monkeypatch.setattr(compare, "_measure", measure)
    pipe, output = DDPMPipeline(plain_unet(sample_size=32), DDIMScheduler()), tmp_path / "new" / "rows.json"
    found = {}

    def run(name):
        config = SamplerBench(samplers=[name], evaluations=[2], num_images=4, batch_size=4)
        found[name] = compare.bench_samplers(pipe, config, output, {"model": "x"})

    threads = [threading.Thread(target=run, args=[name]) for name in ("ddim", "deis")]
    for one in threads:
        one.start()
    for one in threads:
        one.join()
    assert [row["sampler"] for name in ("ddim", "deis") for row in found[name]] == ["ddim", "deis"]
    assert sorted(row["sampler"] for row in json.loads(output.read_text())["rows"]) == ["ddim", "deis"]
    assert [path.name for path in output.parent.iterdir()] == ["rows.json"]


def test_bench_draws_the_images_that_generate_makes(folder, tmp_path):
    """The bench's own loop and the pipeline agree: same seeds, same scheduler, same pictures."""
    from ptq4dm.pipelines.load import load_pipeline
    from ptq4dm.pipelines.sampling import sample
    from ptq4dm.samplers.comparison.compare import solve

    pipe = load_pipeline(folder)
    pipe.scheduler = make_sampler("t_ab2/quad", pipe.scheduler.config)
    expected = sample(pipe, [3, 4], num_inference_steps=4)
    noise = torch.cat([torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(s)) for s in (3, 4)])
    pipe.scheduler.set_timesteps(4)
    images = solve(pipe.unet.eval(), pipe.scheduler, noise, None)
    torch.testing.assert_close((images / 2 + 0.5).clamp(0, 1), expected)


def test_budgets_are_in_evaluations():
    assert set_budget(make_sampler("rho_rk-3heun/edm", CONFIG), 8, "cpu") == 6
    assert set_budget(make_sampler("rho_rk-4rk/edm", CONFIG), 3, "cpu") == 4  # one step needs more than there is
    assert set_budget(make_sampler("diffusers/heun", CONFIG), 8, "cpu") == 7
    assert set_budget(make_sampler("t_ab3/quad", CONFIG), 8, "cpu") == 8


def test_names():
    assert isinstance(make_sampler("ddim", CONFIG, grid="quad"), OurDDIM)
    default = make_sampler("deis", CONFIG)
    assert isinstance(default, DEISScheduler) and default.config.solver == "t_ab"
    one = make_sampler("ipndm2/edm/clean", CONFIG).config
    assert (one.solver, one.order, one.timestep_grid, one.final_denoise) == ("ipndm", 2, "edm", True)
    assert make_sampler("rho_rk-4rk/log", CONFIG).config.rk_method == "4rk"
    theirs = make_sampler("diffusers/dpm++3m-karras", CONFIG)
    assert isinstance(theirs, DPMSolverMultistepScheduler)
    assert theirs.config.solver_order == 3 and theirs.config.use_karras_sigmas


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("dream", {}, "unknown sampler .*, fitted for .*, or a folder with the scheduler_config.json of a fitted"),
        ("fitted", {}, "fitted stands for the schedule beside"),
        ("t_ab9/quad", {}, "unknown sampler"),
        ("t_ab3/cube", {}, "unknown sampler"),
        ("rho_rk-5dp/edm", {}, "unknown sampler"),
        ("diffusers/pndm", {}, "diffusers/ goes with"),
        ("diffusers/ddim-karras", {}, "diffusers/ goes with"),
        ("ddim", {"order": 2}, "ddim has no order"),
        ("rho_rk", {"order": 2}, "rho_rk has no order"),
        ("t_ab3/quad", {"order": 2}, "fixes its order"),
        ("diffusers/unipc", {"grid": "edm"}, "fixes its order"),
        ("deis", {"grid": "cube"}, "unknown timestep_grid"),
    ],
)
def test_wrong_names_get_a_sentence(name, options, message):
    with pytest.raises(UserError, match=message):
        make_sampler(name, CONFIG, **options)


def test_figures_that_measure_nothing(unet):
    pipe = DDPMPipeline(unet(), DDIMScheduler())
    with pytest.raises(UserError, match="32x32 pixel models"):
        SamplerBench().check(pipe)


def test_the_usual_samplers_are_those_that_the_model_takes():
    flow = FlowMatchEulerDiscreteScheduler().config
    assert usual_samplers(CONFIG) == list(compare.SAMPLERS)
    assert usual_samplers(flow) == [name for name in compare.SAMPLERS if name != "diffusers/ddim"]


def test_table_marks_the_best_and_what_was_used():
    rows = [
        {"sampler": "a", "budget": 5, "evaluations": 5, "feature_fid": 3.0},
        {"sampler": "b", "budget": 5, "evaluations": 4, "feature_fid": 4.0},
        {"sampler": "b", "budget": 8, "evaluations": 8, "feature_fid": 2.5},
    ]
    assert table(rows).splitlines()[2:] == ["| a | **3.00** |  |", "| b | 4.00 (4) | **2.50** |"]


def test_generate_and_quantize_take_a_sampler(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["generate", "--model", folder, "--num-images", "1", "--sampler", "t_ab", "--order", "2",
                 "--grid", "cubic", "--steps", "2"]) == 0  # fmt: skip
    from ptq4dm.pipelines.images import read_metadata

    scheduler = read_metadata(next(tmp_path.glob("out/images/*.png")))["scheduler"]
    assert scheduler["class"] == "DEISScheduler"
    assert (scheduler["solver"], scheduler["order"], scheduler["timestep_grid"]) == ("t_ab", 2, "cubic")

    few = ["--num-samples", "2", "--calibration-steps", "2"]
    assert main(["quantize", "--model", folder, "--sampler", "deis", *few]) == 0
    saved = json.loads((tmp_path / "out/quantized/scheduler/scheduler_config.json").read_text())
    assert saved["_class_name"] == "DEISScheduler"  # a model quantized for a sampler is saved with it
    assert main(["generate", "--num-images", "1", "--steps", "2", "--output", "out/b"]) == 0

    capsys.readouterr()
    assert main(["generate", "--model", folder, "--order", "2"]) == 2
    assert "--sampler" in capsys.readouterr().err

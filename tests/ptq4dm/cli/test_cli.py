"""The command line in-process: every verb, one plain line and status 2 for wrong input, nothing half-written."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMPipeline,
    DiTTransformer2DModel,
    FlowMatchEulerDiscreteScheduler,
    UNet2DModel,
)
from PIL import Image

from models import plain_unet
from ptq4dm.cli import collect as collect_verb
from ptq4dm.cli import quantize as quantize_verb
from ptq4dm.cli.main import main
from ptq4dm.kernels.runtime import atomic
from ptq4dm.pipelines.pixel_dit import PixelDiTPipeline
from ptq4dm.quantization.checkpoint import BlockCheckpoint

BAR = re.compile(r"\d+%\|")
FEW = ["--num-samples", "2", "--calibration-steps", "2"]
DYNAMIC = ["--method", "rtn", "--activations", "dynamic"]


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """An empty working folder, one thread."""
    monkeypatch.chdir(tmp_path)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield tmp_path
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Folders of tiny 32x32 pipelines: unet, dit; and what the command line made of unet: store, static, dynamic."""
    root = tmp_path_factory.mktemp("models")
    DDPMPipeline(plain_unet(sample_size=32), DDIMScheduler()).save_pretrained(root / "unet")
    dit = DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=3, out_channels=3, num_layers=1, sample_size=32,
        patch_size=8, num_embeds_ada_norm=10,
    )  # fmt: skip
    PixelDiTPipeline(dit, DDIMScheduler()).save_pretrained(root / "dit")
    assert main(["collect", "--model", f"{root}/unet", "--output", f"{root}/store", *FEW]) == 0
    calibration = ["--calibration", f"{root}/store", "--objective", "max"]
    assert main(["quantize", "--model", f"{root}/unet", "--output", f"{root}/static", *calibration]) == 0
    assert main(["quantize", "--model", f"{root}/unet", "--output", f"{root}/dynamic", *DYNAMIC]) == 0
    return root


@pytest.fixture
def run(capsys):
    """run("info", ...) -> (status, stdout, lines of stderr that are no progress bars)."""

    def call(*arguments):
        capsys.readouterr()
        try:
            status = main([str(a) for a in arguments])
        except SystemExit as end:
            status = end.code
        out, err = capsys.readouterr()
        lines = [line.rpartition("\r")[2] for line in err.splitlines() if line.strip()]
        return status, out, [line for line in lines if not BAR.search(line)]

    return call


def tree(folder):
    return sorted(str(p.relative_to(folder)) for p in Path(folder).rglob("*"))


def contents(folder):
    return {name: (Path(folder) / name).read_bytes() for name in tree(folder) if (Path(folder) / name).is_file()}


# --- what works ---------------------------------------------------------------------------------------------


def test_the_embedded_model_from_collect_to_info(run, here):
    """Bare commands find each other's results under out/."""
    status, out, err = run("collect", *FEW, "--plot", "out/ranges.png")
    assert (status, err) == (0, []) and "unet: 2 tuples, 92 layers\ncalibration store: out/calibration" in out
    with Image.open("out/ranges.png") as picture:
        assert picture.format == "PNG"
    status, out, err = run("quantize", "--calibration", "out/calibration", "--objective", "max")
    assert (status, err) == (0, []) and "layer output, dB" in out and "92 layers on" in out
    assert "out/quantized/quantization.json" in out
    status, out, err = run("generate", "--num-images", 2, "--num-inference-steps", 2)
    assert (status, err) == (0, []) and "2 images of out/quantized: out/images" in out
    assert tree("out/images") == ["000000.png", "000001.png"]
    with Image.open("out/images.png") as picture:
        assert picture.size == (2 * 32 * 4, 32 * 4)
    status, out, err = run("info", "--json")
    facts = json.loads(out)
    assert (status, err, len(facts["layers"])) == (0, [], 92)
    assert facts["quantization"] == {"method": "ptq4dm", "objective": "max"} and facts["model"] == "out/quantized"
    folder = Path("out/quantized/unet/diffusion_pytorch_model.safetensors")
    assert 0 < facts["bytes"] <= folder.stat().st_size < 0.6 * 18_212_734  # the float16 file of the original
    assert tree("out") == sorted(tree("out"))
    assert not [name for name in tree(here) if name.endswith((".part", ".tmp")) or "/." in name]


def test_quantize_without_calibration_collects(run, models):
    status, out, _ = run("quantize", "--model", models / "unet", *FEW, "--output", "q")
    assert status == 0 and "quantized pipeline: q" in out and "layer output" in out
    files = [
        "README.md",
        "model_index.json",
        "plan.json",
        "quantization.json",
        "scheduler",
        "scheduler/scheduler_config.json",
    ]
    assert tree("q") == [*files, "unet", "unet/config.json", "unet/diffusion_pytorch_model.safetensors"]
    assert tree(".") == sorted(["q", *(f"q/{name}" for name in tree("q"))])  # the calibration was temporary
    record = json.loads(Path("q/quantization.json").read_text())
    assert record["model"] == str(models / "unet") and record["bytes_after"] < record["bytes_before"]


def test_transforms_have_their_calibration_collected_and_their_plan_can_be_followed(run, models):
    def basis(folder):
        return {layer["basis"] for layer in json.loads(Path(f"{folder}/quantization.json").read_text())["layers"]}

    command = ["quantize", "--model", models / "dit", *DYNAMIC]
    status, _, err = run(*command, "--transforms", "smooth-attention", *FEW, "--output", "q")
    assert (status, err, basis("q")) == (0, [], {"output"})
    assert "plan.safetensors" in contents("q")  # the divisors
    status, _, err = run("quantize", "--model", models / "dit", "--plan", "q/plan.json", "--output", "again")
    assert (status, err) == (0, [])
    name = "transformer/diffusion_pytorch_model.safetensors"
    assert contents("again")[name] == contents("q")[name]
    assert run(*command, "--output", "plain")[0] == 0 and contents("plain")[name] != contents("q")[name]
    assert run(*command, "--transforms", "rotate", "--output", "r")[0] == 0
    assert basis("r") == {"weight"}  # rotations look at nothing: nothing is collected
    assert run(*command, "--transforms", "hadamard:16", "--output", "h")[0] == 0
    told = json.loads(Path("h/quantization.json").read_text())["layers"]
    assert sum("hadamard 16" in layer["format"] for layer in told) > 10
    status, _, err = run(*command, "--transforms", "hadamard:32", "--output", "no")
    assert status == 2 and "a regular rotation has groups of 16, 64 or 256, not 32" in err[-1]


@pytest.mark.parametrize(
    ("options", "found", "basis"),
    [
        (["--method", "qoq", "--num-tuples", "2", *FEW], "W4A8 progressive", "output"),
        (
            ["--method", "qoq", "--rounding", "nearest", "--rotation", "none", "--smoothing", "none", "--no-reorder"],
            "W4A8 progressive",
            "weight",
        ),
        (["--method", "qoq", "--variant", "channel", "--smoothing", "0.1", *FEW], "W4A8 affine", "output"),
        (["--method", "mixpe", "--activation-bits", "16", "--group-size", "32"], "W4A16 g32 affine", "weight"),
    ],
    ids=["qoq", "qoq, every pass off", "qoq channel", "mixpe 16"],
)
def test_methods_with_four_bits(run, models, options, found, basis):
    status, _, err = run("quantize", "--model", models / "dit", *options, "--output", "q")
    assert (status, err) == (0, [])
    layers = json.loads(Path("q/quantization.json").read_text())["layers"]
    assert any(layer["format"].startswith(found) for layer in layers) and {layer["basis"] for layer in layers} == {
        basis
    }


def test_rows_of_eight_bits_are_told_and_drawn(run, models):
    pytest.importorskip("matplotlib")
    command = ["quantize", "--model", models / "dit", "--method", "mixllm", "--rows", 0.3, "--num-tuples", 2, *FEW]
    status, out, err = run(*command, "--plot", "rows.png", "--output", "q")
    assert (status, err) == (0, []) and "rows of 8 bits: " in out and "picture: rows.png" in out
    assert Path("rows.png").read_bytes()[:4] == b"\x89PNG"
    found = json.loads(Path("q/quantization.json").read_text())["found"]
    assert [one["share"] for one in found.values()] == [0.3] and sum(
        kind["wide"] for kind in next(iter(found.values()))["types"].values()
    )
    status, _, err = run("quantize", "--model", models / "dit", "--plan", "q/plan.json", "--plot", "rows.png")
    assert status == 2 and "a plan that is followed does not know" in err[0]


def test_a_plan_gives_the_same_codes(run, models):
    status, out, _ = run(
        "quantize", "--model", models / "unet", "--plan", models / "static/plan.json", "--output", "q"
    )
    assert status == 0 and "(weight, dB" in out  # nothing was collected
    name = "unet/diffusion_pytorch_model.safetensors"
    assert contents("q")[name] == contents(models / "static")[name]
    assert contents("q")["plan.json"] == contents(models / "static")["plan.json"]


def test_method_options_reach_the_recipe(run, models):
    options = ["--weight-bits", 4, "--activation-bits", 6, "--activations", "dynamic", "--objective", "lp"]
    options += ["--objective-parameter", 2, "--first-last", "keep", "--modules-to-not-convert", "mid_block*"]
    status, *_ = run("quantize", "--model", models / "unet", *options, "--output", "q")
    assert status == 0
    layers = json.loads(Path("q/plan.json").read_text())["layers"]
    assert "conv_in" not in layers and "conv_out" not in layers and not any("mid_block" in name for name in layers)
    expected = {"weight_bits": 4, "activation_bits": 6, "objective": "lp", "objective_parameter": 2.0}
    assert layers and all(layer.items() >= expected.items() for layer in layers.values())
    assert all(layer["input_scale"] is None for layer in layers.values())


def test_an_interrupted_quantize_goes_on_from_its_checkpoint(run, models, monkeypatch):
    save, command = BlockCheckpoint.save, ["quantize", "--model", models / "unet", *DYNAMIC, "--output", "q"]
    kept = []

    def save_two(self, block, layers):
        save(self, block, layers)
        kept.append(block)
        if len(kept) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(BlockCheckpoint, "save", save_two)
    assert run(*command, "--checkpoint", "kept")[::2] == (130, ["interrupted"])
    assert len(list(Path("kept").glob("*.safetensors"))) == 2 and not Path("q").exists()
    assert run(*command, "--checkpoint", "kept")[0] == 0
    assert len(kept) > 3 and len(set(kept)) == len(kept)  # no block was packed twice
    name = "unet/diffusion_pytorch_model.safetensors"
    assert contents("q")[name] == contents(models / "dynamic")[name]
    status, out, err = run(*command, "--weight-bits", 4, "--output", "q4", "--checkpoint", "kept")
    assert (status, out, len(err)) == (2, "", 1) and "kept holds the blocks of another quantization" in err[0]
    assert not Path("q4").exists()


def test_a_folder_that_cannot_be_a_checkpoint_is_told_before_calibration(run, models, monkeypatch):
    monkeypatch.setattr(quantize_verb, "collect", None)
    Path("foreign").mkdir()
    Path("foreign/thesis.txt").write_text("mine")
    for folder, message in (("foreign", "holds other files"), ("foreign/thesis.txt/c", "cannot make the folder")):
        status, _, err = run("quantize", "--model", models / "unet", "--checkpoint", folder)
        assert status == 2 and len(err) == 1 and message in err[0]
    assert tree(".") == ["foreign", "foreign/thesis.txt"]


@pytest.mark.parametrize("name", ["thesis.tex", ".git/HEAD", "samples/000000.png", "README.md"])
def test_a_folder_with_the_users_files_is_refused(run, models, name):
    shutil.copytree(models / "dynamic", "q")
    Path("q", name).parent.mkdir(exist_ok=True)
    Path("q", name).write_text("mine")
    before = contents("q")
    status, _, err = run("quantize", "--model", models / "unet", "--output", "q")
    assert status == 2 and len(err) == 1 and name in err[0]
    assert contents("q") == before


def test_a_link_as_output_is_followed(run, models):
    Path("disk").mkdir()
    Path("q").symlink_to("disk/model")
    for _ in range(2):
        assert (
            run("quantize", "--model", models / "unet", "--plan", models / "static/plan.json", "--output", "q")[0]
            == 0
        )
    assert Path("q").is_symlink() and Path("disk/model/model_index.json").is_file()
    assert sorted(p.name for p in Path().iterdir()) == ["disk", "q"] and tree("disk")[0] == "model"


def test_quantizing_again_replaces_the_folder(run, models):
    shutil.copytree(models / "dynamic", "q")
    Path("q.old").mkdir()  # somebody's own backup
    before = contents("q")
    assert run("quantize", "--model", models / "unet", "--plan", models / "static/plan.json", "--output", "q")[0] == 0
    after = contents("q")
    assert after.keys() == before.keys() and after["plan.json"] != before["plan.json"]
    assert sorted(p.name for p in Path().iterdir()) == ["q", "q.old"]
    Path("empty").mkdir()
    assert run("quantize", "--model", models / "unet", "--plan", "q/plan.json", "--output", "empty")[0] == 0


@pytest.mark.parametrize("broken", ["save_pretrained", "rename", "interrupt"])
def test_a_failing_save_leaves_the_old_folder_whole(run, models, monkeypatch, broken):
    shutil.copytree(models / "dynamic", "q")
    before = contents("q")
    full = OSError(28, "No space left on device")
    if broken == "save_pretrained":
        save = UNet2DModel.save_pretrained

        def half(self, folder, *args, **kwargs):
            save(self, folder, *args, **kwargs)
            raise full

        monkeypatch.setattr(UNet2DModel, "save_pretrained", half)
    else:

        def refuse(new, place, beside):
            raise full if broken == "rename" else KeyboardInterrupt

        monkeypatch.setattr(atomic, "exchange", refuse)
    status, _, err = run(
        "quantize", "--model", models / "unet", "--plan", models / "static/plan.json", "--output", "q"
    )  # fmt: skip
    message = "ptq4dm quantize: cannot write q: No space left on device; make room, or give another place."
    assert (status, err) == ((130, ["interrupted"]) if broken == "interrupt" else (2, [message]))
    assert contents("q") == before and [p.name for p in Path().iterdir()] == ["q"]


def test_generate_resumes_and_takes_labels(run, models):
    options = ["generate", "--model", models / "dit", "--num-inference-steps", 2, "--class-labels", 3, 5]
    assert run(*options, "--num-images", 2, "--output", "i", "--picture", "g.png", "--seed", 7)[0] == 0
    before = contents("i")
    status, out, _ = run(*options, "--num-images", 3, "--output", "i", "--picture", "g.png", "--seed", 7)
    assert status == 0 and "3 images" in out and "picture: g.png" in out
    assert tree("i") == ["000007.png", "000008.png", "000009.png"]
    assert all(contents("i")[name] == data for name, data in before.items())
    with Image.open("g.png") as picture:
        assert picture.size == (3 * 128, 128)


def test_evaluate_finds_the_original(run, models):
    small = ["--num-paired", 2, "--num-heldout", 2, "--num-inference-steps", 2, "--batch-size", 2]
    status, out, err = run("evaluate", "--model", models / "static", "--metric", "none", *small, "--output", "e")
    assert (status, err) == (0, []) and f"{models}/static against {models}/unet" in out and "same-seed PSNR" in out
    report = json.loads(Path("e/report.json").read_text())
    assert report["paired"]["num_images"] == 2 and report["epsilon_error"]["rows"] == 2 and "frechet" not in report
    assert report["bytes"]["ratio"] > 1.5 and tree("e") == ["report.json", "samples.png"]
    few = ["--num-images", 3, "--num-inference-steps", 1, "--num-paired", 0, "--num-heldout", 0]
    status, out, _ = run("evaluate", "--model", models / "unet", *few, "--output", "f")
    assert status == 0 and "feature-FID" in out and "3 images" in out and "warning" in out
    assert json.loads(Path("f/report.json").read_text())["frechet"]["num_images"] == 3


def test_evaluate_folders_of_images(run, models):
    made = run("generate", "--model", models / "unet", "--num-images", 3, "--num-inference-steps", 1, "--output", "i")
    assert made[::2] == (0, [])
    status, out, _ = run("evaluate", "--images", "i", "--write-reference", "reference.npz")
    assert status == 0 and "statistics of 3 images: reference.npz" in out
    status, out, _ = run("evaluate", "--images", "i", "--reference", "reference.npz")
    assert status == 0 and float(re.search(r"feature-FID +(\S+)", out)[1]) < 1e-3


def test_info(run, models):
    status, out, err = run("info", "--model", models / "static")
    assert (status, err) == (0, []) and "W8A8 static" in out and "objective" in out
    layers = len(json.loads((models / "static/plan.json").read_text())["layers"])
    assert len(out.splitlines()) == 6 + 2 + layers + ("reference" in out)  # a line on layers that no kernel serves
    status, out, _ = run("info", "--model", models / "unet")
    assert status == 0 and re.search(r"quantization +of 'unet': none", out) and "float32" in out and "W8A8" not in out
    facts = json.loads(run("info", "--model", models / "unet", "--dtype", "bfloat16", "--json")[1])
    assert facts["quantization"] is None and {row["format"] for row in facts["layers"]} == {"bfloat16"}


def test_interrupted(run, models, monkeypatch):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    for verb in (collect_verb, quantize_verb):
        monkeypatch.setattr(verb, "collect", interrupt)
    status, _, err = run("collect", "--model", models / "unet")
    assert (status, err) == (130, ["interrupted; the same command goes on where it stopped"])
    assert run("quantize", "--model", models / "unet")[::2] == (130, ["interrupted"])  # begins anew: no promise
    assert tree(".") == []


COMMANDS = ("collect", "quantize", "allocate", "generate", "evaluate", "compare", "distill", "bench", "info")


def test_help_names_every_command(run):
    status, out, _ = run("--help")
    assert status == 0 and all(f" {name} " in out for name in COMMANDS)


# --- wrong input --------------------------------------------------------------------------------------------

QUANTIZE, COLLECT, GENERATE = (
    ["quantize", "--model", "unet"],
    ["collect", "--model", "unet"],
    ["generate", "--model", "unet"],
)
EVALUATE = ["evaluate", "--model", "unet"]
DISTILL = ["distill", "--model", "unet"]

WRONG = [
    # parser
    (["magic"], "invalid choice: 'magic'"),
    ([], "required: command"),
    (["info", "--wings"], "unrecognized arguments: --wings"),
    (["info", "--dtype", "float8"], "--dtype: invalid choice: 'float8'"),
    (["collect", "--num-samples", "many"], "--num-samples: invalid int value: 'many'"),
    (["quantize", "--activations", "lazy"], "activations must be one of static, dynamic; got 'lazy'"),
    (["quantize", "--method", "svdquant", "--activations", "static"], "activations must be one of int4, int8, fp8"),
    (["quantize", "--method", "rtn", "--rank", "8"], "RTNConfig has no option rank"),
    ([*GENERATE, "--grid", "quad"], "--order and --grid belong to a sampler; name one with --sampler."),
    ([*GENERATE, "--sampler", "dream"], "unknown sampler 'dream'"),
    (["evaluate", "--metric", "beauty"], "--metric: invalid choice: 'beauty'"),
    # models
    (["info", "--model", "no-such-model"], "'no-such-model' is neither an embedded model"),
    (["info", "--model", "./nowhere"], "neither an embedded model"),
    (["info", "--model", "."], "no model_index.json"),
    (["generate", "--model", "broken"], "diffusion_pytorch_model.safetensors is not a whole safetensors file"),
    (["info", "--device", "warp"], "device 'warp' cannot be used here; try --device cpu"),
    # calibration
    ([*COLLECT, "--collector", "magic"], "choose from uniform, ndtc, solver"),
    ([*COLLECT, "--num-samples", "-1"], "--num-samples must be at least 1; got -1"),
    ([*COLLECT, "--calibration-steps", "0"], "must be at least 1; got 0"),
    ([*COLLECT, "--sigma", "-1"], "sigma is not negative"),
    ([*COLLECT, "--seed", "-1"], "seed must not be negative"),
    ([*COLLECT, "--output", "file/store"], "cannot make the folder file/store: Not a directory"),
    ([*COLLECT, "--output", "foreign"], "foreign is not empty and is no calibration store"),
    ([*COLLECT, "--output", "store"], "already holds a calibration store that differs in config;"),
    ([*COLLECT, "--plot-layer", "conv_in"], "give --plot PNG too"),
    ([*COLLECT, "--prompt", "a cat"], "DDPMPipeline takes no 'prompt'"),
    (["collect", "--model", "static", "--output", "new"], "full precision"),
    # quantize
    ([*QUANTIZE, "--plot-layer", "conv_in"], "give --plot PNG too"),
    ([*QUANTIZE, "--method", "magic"], "method 'magic' is unknown; choose from"),
    ([*QUANTIZE, "--objective", "beauty"], "objective 'beauty' is unknown; choose from"),
    ([*QUANTIZE, "--objective", "lp", "--objective-parameter", "-2"], "exponent of objective 'lp' is positive"),
    ([*QUANTIZE, "--method", "rtn", "--objective", "lp"], "no option objective"),
    ([*QUANTIZE, "--weight-bits", "9"], "from 2 to 8; got 9"),
    ([*QUANTIZE, "--weight-bits", "-4"], "from 2 to 8; got -4"),
    ([*QUANTIZE, "--num-samples", "0"], "--num-samples must be at least 1"),
    ([*QUANTIZE, "--calibration", "nowhere"], "nowhere is not a calibration store"),
    (["quantize", "--model", "dit", "--calibration", "store"], "collected from another model"),
    ([*QUANTIZE, "--calibration", "torn"], "statistics.safetensors cannot be read"),
    ([*QUANTIZE, "--plan", "nowhere.json"], "nowhere.json is missing"),
    ([*QUANTIZE, "--plan", "store/store.json"], "a plan written by ptq4dm cannot be read"),
    ([*QUANTIZE, "--plan", "static/quantization.json"],
     "static/quantization.json is a report of what was quantized, and no plan; give static/plan.json"),
    ([*QUANTIZE, "--calibration", "store", "--num-samples", "8"],
     "the store store was collected with 2, so that --num-samples 8 would change nothing"),
    ([*QUANTIZE, "--calibration", "store", "--calibration-steps", "7"], "--calibration-steps 7 would change nothing"),
    (["allocate", "--model", "unet", "--calibration", "store", "--collector", "ndtc"],
     "--collector ndtc would change nothing"),
    ([*QUANTIZE, "--num-tuples", "5"],
     "nothing of this PTQ4DMConfig looks at calibration tuples, so that --num-tuples would"),
    ([*QUANTIZE, "--plan", "static/plan.json", "--method", "rtn"], "leave out --method"),
    (["quantize", "--model", "dit", "--plan", "static/plan.json"], "plan is of another model"),
    ([*QUANTIZE, "--plan", "static/plan.json", "--symmetric", "--weight-bits", "4"],
     "leave out --symmetric, --weight-bits"),
    ([*QUANTIZE, "--output", "foreign"], "foreign exists and was not written by ptq4dm quantize"),
    ([*QUANTIZE, "--output", "file"], "file is a file, and the result is a folder"),
    ([*QUANTIZE, "--output", "file/q"], "cannot write file/q: "),
    ([*QUANTIZE, "--checkpoint", "foreign"], "foreign holds other files; give a folder of its own to a checkpoint."),
    ([*QUANTIZE, "--checkpoint", "file"], "cannot make the folder file: file is a file."),
    (["quantize", "--model", "static", *DYNAMIC], "quantized already"),
    ([*QUANTIZE, *DYNAMIC, "--transforms", "hadamard:64", "sylvester:32"], "a layer rotates its input once"),
    ([*QUANTIZE, *DYNAMIC, "--weight-bits", "4", "--weight-grid", "codebook", "--affine"], "give no --affine with"),
    ([*QUANTIZE, *DYNAMIC, "--modules-to-not-convert", "*"], "no layer of the model"),
    # generate
    ([*GENERATE, "--num-images", "0"], "0 images asked for; --num-images must be at least 1"),
    ([*GENERATE, "--num-images", "-3"], "-3 images asked for"),
    ([*GENERATE, "--num-inference-steps", "0"], "at least one step"),
    ([*GENERATE, "--seed", "-1"], "a seed must not be negative"),
    ([*GENERATE, "--batch-size", "0"], "--batch-size must be at least 1"),
    ([*GENERATE, "--output", "file/images"], "cannot make the folder file/images: Not a directory"),
    ([*GENERATE, "--picture", "file/grid.png"], "cannot write file/grid.png: "),
    ([*COLLECT, "--plot", "file/plot.png"], "cannot write file/plot.png: "),
    ([*GENERATE, "--guidance-scale", "2"], "takes no argument 'guidance_scale'"),
    ([*GENERATE, "--class-labels", "1"], "takes no 'class_labels'"),
    (["generate", "--model", "dit", "--class-labels", "10"], "class label 10 is outside [0, 10)"),
    # evaluate
    ([*EVALUATE, "--num-images", "0"], "zero images cannot give a Frechet distance"),
    ([*EVALUATE, "--metric", "none"], "does not say what it was quantized from, and metric none compares with that;"),
    ([*EVALUATE, "--num-paired", "-1"], "--num-paired must not be negative"),
    ([*EVALUATE, "--write-reference", "r.npz"], "give it with --images"),
    ([*EVALUATE, "--output", "file/e", "--num-images", "2"], "file/e: Not a directory"),
    ([*EVALUATE, "--reference", "nowhere.npz"], "nowhere.npz"),
    (["evaluate", "--images", "nowhere"], "nowhere"),
    (["evaluate", "--model", "orphan", "--metric", "none"], "Name it with --full-precision"),
    (["evaluate", "--model", "static", "--full-precision", "gone", "--metric", "none"], "'gone' is neither"),
    (["evaluate", "--model", "confused", "--metric", "none"], "name the original model with --full-precision"),
    # distill
    ([*DISTILL, "--dtype", "float16"], "float16 overflows where gradients are"),
    ([*DISTILL, "--images", "0"], "--images must be at least 1; got 0"),
    ([*DISTILL, "--student-lr", "-1"], "--student-lr must be positive; got -1.0"),
    ([*DISTILL, "--minutes", "0"], "--minutes must be positive; got 0"),
    ([*DISTILL, "--resume", "--output", "new"], "no checkpoint at new.run/checkpoint.safetensors to resume"),
    ([*DISTILL, "--output", "foreign"], "foreign exists and was not written by ptq4dm distill"),
    ([*DISTILL, "--output", "file/s"], "cannot write file/s: "),
    ([*DISTILL, "--output", "taken"], "taken.run is not empty; go on with the run in it (--resume)"),
    (["distill", "--model", "static"], "the teacher is quantized"),
    (["distill", "--model", "flow", "--images", "1"], "DDPMPipeline does not scale its input"),
]  # fmt: skip


@pytest.fixture
def desk(here, models):
    """A working folder with good and bad things in it."""
    for name in ("unet", "dit", "static", "store"):
        (here / name).symlink_to(models / name)
    for name, source in (
        ("broken", "unet"),
        ("torn", "store"),
        ("orphan", "static"),
        ("confused", "static"),
        ("flow", "unet"),
    ):
        shutil.copytree(models / source, here / name)
    for path in ("broken/unet/diffusion_pytorch_model.safetensors", "torn/statistics.safetensors"):
        Path(path).write_bytes(Path(path).read_bytes()[:1000])
    record = json.loads(Path("orphan/quantization.json").read_text())
    Path("orphan/quantization.json").write_text(json.dumps({**record, "model": "gone"}))
    Path("confused/quantization.json").write_text("[]")
    FlowMatchEulerDiscreteScheduler().save_pretrained("flow/scheduler")
    path = Path("flow/model_index.json")
    path.write_text(path.read_text().replace("DDIMScheduler", "FlowMatchEulerDiscreteScheduler"))
    (here / "file").write_text("mine")
    (here / "taken.run").mkdir()
    (here / "taken.run" / "thesis.txt").write_text("mine")
    (here / "foreign").mkdir()
    (here / "foreign" / "thesis.txt").write_text("mine")
    return here


def test_wrong_input_gives_one_line_status_2_and_leaves_nothing(run, desk):
    kept = contents(desk)
    failures = []
    for arguments, message in WRONG:
        status, out, err = run(*arguments)
        said = len(err) == 1 and err[0].startswith("ptq4dm") and message in err[0] and "Traceback" not in err[0]
        left = sorted(contents(desk).keys() ^ kept.keys())
        if status != 2 or not said or out or left:
            failures.append(f"{' '.join(arguments)}: {status=} {err=} {out=} {left=}")
        shutil.rmtree(desk / "out", ignore_errors=True)
    assert not failures, "\n".join(failures)
    assert contents(desk) == kept

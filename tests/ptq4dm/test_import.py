"""What an import brings along: little before a name is used, and our classes in diffusers, in either order."""

import ast
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler, DDPMPipeline, DiffusionPipeline, DiTTransformer2DModel

import fresh
import ptq4dm
from ptq4dm import diffusers_hook
from ptq4dm.pipelines.embedded import asset_path

HEAVY = {"torch", "diffusers", "transformers", "accelerate", "numpy", "PIL", "safetensors", "triton"}


def alone(code, *arguments):
    """Run code in a process of its own; returns what its last line printed, as JSON."""
    env = os.environ | {"PYTHONPATH": str(Path(ptq4dm.__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", code, *map(str, arguments)]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


ROOMS = "import ptq4dm, ptq4dm.samplers, ptq4dm.svdquant\nfor p in (ptq4dm, ptq4dm.samplers, ptq4dm.svdquant): dir(p)"
MAIN = "from ptq4dm.cli.main import main\ntry:\n    main([%r])\nexcept SystemExit as end:\n    assert end.code == %d"
CHEAP = {
    "import": ROOMS,
    "help": MAIN % ("--help", 0),
    "version": MAIN % ("--version", 0),
    "wrong": MAIN % ("magic", 2),
}


@pytest.mark.parametrize("code", CHEAP.values(), ids=CHEAP)
def test_little_is_imported_before_a_name_is_used(code):
    modules = alone(code + "\nimport json, sys\nprint(json.dumps(sorted(sys.modules)))")
    assert not HEAVY & {name.partition(".")[0] for name in modules}
    assert len([name for name in modules if name.startswith("ptq4dm")]) <= 14 and len(modules) < 250


def told_to_editors(package):
    """name -> (module, attribute), from the imports under TYPE_CHECKING."""
    tree = ast.parse(Path(package.__file__).read_text())
    block = next(node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")
    found = {}
    for node in block.body:
        for alias in node.names:
            found[alias.asname or alias.name] = (f"{package.__name__}.{node.module}", alias.name)
    return found


@pytest.mark.parametrize("name", ["ptq4dm", "ptq4dm.samplers", "ptq4dm.svdquant"])
def test_public_names_are_what_editors_are_told(name):
    package = importlib.import_module(name)
    told = told_to_editors(package)
    assert set(package.__all__) - {"UserError", "DamagedFile"} == set(told) and len(told) >= 5
    assert set(package.__all__) <= set(dir(package))
    for public, (module, attribute) in told.items():
        assert getattr(package, public) is getattr(importlib.import_module(module), attribute)
    space: dict = {}
    exec(f"from {name} import *", space)
    assert set(package.__all__) <= set(space)
    with pytest.raises(AttributeError, match="no attribute 'magic'"):
        package.magic  # noqa: B018


def test_the_verbs_of_the_library_are_public():
    assert {"collect", "quantize", "generate", "evaluate", "EvaluateConfig", "sample", "record"} < set(ptq4dm.__all__)
    assert "quantization_config" in ptq4dm.__all__


# --- diffusers ----------------------------------------------------------------------------------------------

SAVED = {"one_step": "OneStepScheduler", "deis": "DEISScheduler", "ddim": "DDIMScheduler"}


@pytest.mark.parametrize(("module", "kind"), SAVED.items())
def test_saved_pipelines_name_these_modules(module, kind, unet, tmp_path):
    """Files that users have say so: the module of a scheduler's class is a file format."""
    scheduler = getattr(ptq4dm.samplers, kind)()
    DDPMPipeline(unet(), scheduler).save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["scheduler"] == [f"ptq4dm.samplers.{module}", kind]
    assert set(diffusers_hook.SAVED) == {f"samplers.{name}" for name in SAVED}


@pytest.fixture(scope="module")
def saved(unet, tmp_path_factory):
    """A W8A8 model in a pipeline with a DEIS scheduler; an SVDQuant model in our own pipeline; their outputs."""
    root = tmp_path_factory.mktemp("saved")
    pipe = DDPMPipeline(unet(), ptq4dm.samplers.DEISScheduler())
    ptq4dm.quantize(pipe, ptq4dm.RTNConfig(activations="dynamic"))
    pipe.save_pretrained(root / "w8a8")
    torch.manual_seed(0)
    dit = DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=3, out_channels=3, num_layers=1, sample_size=8,
        patch_size=4, num_embeds_ada_norm=10,
    )  # fmt: skip
    other = ptq4dm.PixelDiTPipeline(dit, DDIMScheduler())
    store = ptq4dm.collect(other, ptq4dm.CalibrationConfig(num_samples=2, num_inference_steps=2))
    quick = {"rank": 2, "group_size": 16, "num_tuples": 2, "smoothing": 0.5, "rounding": "nearest"}
    ptq4dm.quantize(other, ptq4dm.SVDQuantConfig(**quick), store)
    other.save_pretrained(root / "svdquant")
    return root


LOAD = """
import json, sys
from pathlib import Path
root, embedded = Path(sys.argv[1]), sys.argv[2]
unet = UNet2DModel.from_pretrained(root / "w8a8" / "unet")
facts = {"unet": len([m for m in unet.modules() if hasattr(m, "plan")])}
from diffusers import DiffusionPipeline
for name, path in (("w8a8", root / "w8a8"), ("svdquant", root / "svdquant"), ("embedded", embedded)):
    pipe = DiffusionPipeline.from_pretrained(path)
    kinds = [f"{type(part).__module__}.{type(part).__qualname__}" for part in (pipe, pipe.scheduler)]
    network = getattr(pipe, "unet", None) or pipe.transformer
    formats = sorted({m.plan.format for m in network.modules() if hasattr(m, "plan")})
    facts[name] = [*kinds, formats, sum(p.double().sum().item() for p in network.state_dict().values())]
from diffusers import PipelineQuantizationConfig, QuantoConfig  # looks whether a config is of any class of the table
PipelineQuantizationConfig(quant_mapping={"unet": QuantoConfig("int8")})
print(json.dumps(facts))
"""


@pytest.mark.parametrize(
    "first",
    [
        "import ptq4dm\nfrom diffusers import UNet2DModel",
        "from diffusers import UNet2DModel\nimport ptq4dm",
        "from diffusers import DiffusionPipeline, UNet2DModel\nimport ptq4dm",
    ],
    ids=["ptq4dm-diffusers", "models-ptq4dm", "pipelines-ptq4dm"],
)
def test_saved_models_load_whichever_is_imported_first(first, saved, tmp_path):
    words = str(saved), str(asset_path("unet-cifar10-onestep"))
    facts = json.loads(fresh.printed(first + LOAD, *words, said=tmp_path / "said", base="").splitlines()[-1])
    ddpm = f"{DDPMPipeline.__module__}.DDPMPipeline"
    ours = {"w8a8": "deis.DEISScheduler", "embedded": "one_step.OneStepScheduler"}
    assert facts["unet"] > 10
    for name, scheduler in ours.items():
        assert facts[name][:2] == [ddpm, f"ptq4dm.samplers.{scheduler}"]
    assert facts["svdquant"][0] == "ptq4dm.pipelines.pixel_dit.PixelDiTPipeline"
    assert [facts[name][2] for name in ("w8a8", "svdquant", "embedded")] == [["int8"], ["int8", "svdq"], []]
    for name in ("w8a8", "svdquant"):
        pipe = DiffusionPipeline.from_pretrained(saved / name)
        network = getattr(pipe, "unet", None) or pipe.transformer
        assert facts[name][3] == sum(p.double().sum().item() for p in network.state_dict().values())


@pytest.mark.parametrize(
    "ask",
    [
        "from ptq4dm.quantization.recipe import QuantConfig\nmade = QuantConfig.from_dict({'method': 'svdquant'})",
        "from ptq4dm.layers.plan import Plan\n"
        "made = Plan.from_dict({'method': 'svdquant', 'layers': {'a': {'format': 'svdq', 'rank': 4}}}).layers['a']",
    ],
    ids=["method", "plan"],
)
def test_registries_are_complete_for_whoever_asks_first(ask, tmp_path):
    code = (
        "import json, sys\n" + ask + "\nfrom ptq4dm.quantization.recipe import METHODS\n"
        "print(json.dumps([type(made).__module__, made.rank, len(METHODS), sorted(METHODS)]))"
    )
    module, rank, count, names = json.loads(fresh.printed(code, said=tmp_path / "said").splitlines()[-1])
    assert (module, rank) in (("ptq4dm.svdquant.method", 32), ("ptq4dm.svdquant.layers.plan", 4))
    assert count == len(names) and {"ptq4dm", "rtn", "svdquant"} <= set(names)

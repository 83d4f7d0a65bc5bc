"""The rooms at the top of the checkout become one import package, and take no name that belongs to others."""

import importlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import fresh
import ptq4dm
from ptq4dm.errors import UserError
from ptq4dm.pipelines.embedded import asset_path
from ptq4dm.pipelines.load import EMBEDDED

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10; pytest brings tomli there
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[2]
ROOMS = ("ptq4dm", "kernels", "svdquant", "samplers")


def python(code, *path, cwd=ROOT):
    """Run code as `python -c` does, so with cwd first on the import path; returns what it printed."""
    env = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, path)), "PYTHONSAFEPATH": ""}
    done = subprocess.run([sys.executable, "-c", code], cwd=cwd, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


@pytest.fixture(scope="module")
def settings():
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]


def test_kernels_stays_a_namespace():
    """A regular package of that name at the top would hide Hugging Face's `kernels` from diffusers."""
    assert (ROOT / "kernels").is_dir()
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_the_libraries_import_from_the_top_of_the_checkout(tmp_path):
    pytest.importorskip("transformers")
    code = "import transformers, diffusers; print(diffusers.UNet2DModel.__name__, transformers.__name__)"
    said = fresh.printed(code, said=tmp_path / "said", base="", PYTHONPATH="", PYTHONSAFEPATH="")
    assert said.split()[-2:] == ["UNet2DModel", "transformers"]


def test_an_installed_kernels_package_wins_over_the_folder(tmp_path):
    package = tmp_path / "kernels"
    package.mkdir()
    (package / "__init__.py").write_text("installed = True\n")
    about = tmp_path / "kernels-0.0.1.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: kernels\nVersion: 0.0.1\n")
    code = (
        "import diffusers, kernels, ptq4dm.kernels\n"
        "print(kernels.__file__, kernels.installed, *ptq4dm.kernels.__path__)"
    )
    path = os.pathsep.join(map(str, (tmp_path, ROOT)))
    said = fresh.printed(code, said=tmp_path / "said", base="", PYTHONPATH=path, PYTHONSAFEPATH="")
    file, installed, *ours = said.split()
    assert (file, installed) == (str(package / "__init__.py"), "True")
    assert ours and str(package) not in ours


def test_every_package_folder_is_listed(settings):
    """setuptools packs what pyproject.toml lists and nothing else: a new folder must be added there."""
    folders = {f.parent.relative_to(ROOT).as_posix() for room in ROOMS for f in (ROOT / room).rglob("*.py")}
    names = {folder.replace("/", ".").removeprefix("ptq4dm.") for folder in folders} - {"ptq4dm"}
    assert len(folders) > 20
    assert set(settings["packages"]) == {"ptq4dm", "ptq4dm.assets", "ptq4dm.kernels", *(f"ptq4dm.{n}" for n in names)}
    assert all((ROOT / folder).is_dir() for folder in settings["package-dir"].values())


def test_the_version_stands_in_one_place():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert "version" not in project["project"] and project["project"]["dynamic"] == ["version"]
    module, _, name = project["tool"]["setuptools"]["dynamic"]["version"]["attr"].rpartition(".")
    assert getattr(importlib.import_module(module), name) == ptq4dm.__version__
    code = """
from setuptools import Distribution
dist = Distribution({"script_name": "setup.py"})
dist.parse_config_files(["pyproject.toml"])
print(dist.get_version())
"""
    pytest.importorskip("setuptools", minversion="77", reason="pyproject.toml needs setuptools 77")
    assert python(code) == [ptq4dm.__version__]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Path in a wheel -> file of the checkout: what setuptools' build step would copy, without building 60 MB."""
    pytest.importorskip("setuptools", minversion="77", reason="pyproject.toml needs setuptools 77")
    build = tmp_path_factory.mktemp("build")
    code = f"""
from setuptools import Distribution
dist = Distribution({{"script_name": "setup.py"}})
dist.parse_config_files(["pyproject.toml"])
dist.include_package_data = False  # go by the patterns in pyproject.toml; writes no egg-info
step = dist.get_command_obj("build_py")
step.build_lib = {str(build)!r}
step.ensure_finalized()
for package, module, file in step.find_all_modules():
    print(step.get_module_outfile(step.build_lib, package.split("."), module), file)
for package, source, target, names in step.data_files:
    for name in names:
        print(f"{{target}}/{{name}}", f"{{source}}/{{name}}")
"""
    words = python(code)
    return {
        Path(target).relative_to(build).as_posix(): ROOT / source
        for target, source in zip(words[::2], words[1::2], strict=True)
    }


def test_a_wheel_would_carry_every_file(wheel):
    """All modules, all embedded models."""
    expected = {"ptq4dm/py.typed"}
    for room in ROOMS:
        inside = "ptq4dm" if room == "ptq4dm" else f"ptq4dm/{room}"
        expected |= {f"{inside}/{p.relative_to(ROOT / room).as_posix()}" for p in (ROOT / room).rglob("*.py")}
    assets = {p.relative_to(ROOT).as_posix() for p in (ROOT / "assets").rglob("*") if p.is_file()}
    assert any(name.endswith(".safetensors") for name in assets)
    expected |= {f"ptq4dm/{p.relative_to(ROOT).as_posix()}" for p in (ROOT / "kernels" / "tuned").glob("*.json")}
    assert expected | {f"ptq4dm/{name}" for name in assets} <= set(wheel)


def test_an_installed_wheel_works_from_the_folder_above_a_clone(wheel, tmp_path):
    """There a folder is called ptq4dm, too: the clone. It has no __init__.py, so that a package that has one wins."""
    site, above = tmp_path / "site-packages", tmp_path / "above"
    for target, source in wheel.items():
        if not target.startswith("ptq4dm/assets/"):
            (site / target).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, site / target)
    for folder in ("ptq4dm", "kernels", "assets"):
        (above / "ptq4dm" / folder).mkdir(parents=True)
    (above / "ptq4dm" / "pyproject.toml").touch()
    (above / "ptq4dm" / "ptq4dm" / "__init__.py").write_text("raise SystemExit('the clone')")
    code = (
        "import sys, ptq4dm, ptq4dm.cli.main, ptq4dm.kernels.formats.int8 as int8\n"
        "import ptq4dm.samplers, ptq4dm.svdquant\n"
        "from ptq4dm.quantization.recipe import QuantConfig\n"
        "from ptq4dm.kernels.runtime.settings import FOLDER\n"
        "methods = [QuantConfig.from_dict({'method': name}).method for name in ('rtn', 'svdquant')]\n"
        "print(ptq4dm.__file__, *ptq4dm.__path__, int8.__file__, ptq4dm.samplers.__file__, *methods)\n"
        "print(len(list(FOLDER.glob('*.json'))))"
    )
    package = site / "ptq4dm"
    said = fresh.printed(code, said=tmp_path / "said", folder=above, PYTHONPATH=str(site), PYTHONSAFEPATH="")
    assert said.split() == [
        str(package / "__init__.py"),
        str(package),
        str(package / "kernels" / "formats" / "int8.py"),
        str(package / "samplers" / "__init__.py"),
        "rtn",
        "svdquant",
        str(len(list((ROOT / "kernels" / "tuned").glob("*.json")))),
    ]


def test_embedded_models_are_found_and_small():
    for name in (*EMBEDDED, "features-cifar10"):
        assert (asset_path(name) / "README.md").is_file()
    with pytest.raises(UserError, match="no-such-model"):
        asset_path("no-such-model")
    assert sum(p.stat().st_size for p in (ROOT / "assets").rglob("*") if p.is_file()) < 75e6

"""The rooms at the top of the checkout become one import package, and take no name that belongs to others."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

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


def test_the_libraries_import_from_the_top_of_the_checkout():
    pytest.importorskip("transformers")
    code = "import transformers, diffusers; print(diffusers.UNet2DModel.__name__, transformers.__name__)"
    assert python(code)[-2:] == ["UNet2DModel", "transformers"]


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
    file, installed, *ours = python(code, tmp_path, ROOT)
    assert (file, installed) == (str(package / "__init__.py"), "True")
    assert ours and str(package) not in ours


def test_every_package_folder_is_listed(settings):
    """setuptools packs what pyproject.toml lists and nothing else: a new folder must be added there."""
    assert set(settings["packages"]) == set(settings["package-dir"])
    folders = {f.parent.relative_to(ROOT).as_posix() for room in ROOMS for f in (ROOT / room).rglob("*.py")}
    assert folders <= set(settings["package-dir"].values())
    assert all((ROOT / folder).is_dir() for folder in settings["package-dir"].values())
    assert all(name == "ptq4dm" or name.startswith("ptq4dm.") for name in settings["packages"])


def test_a_wheel_would_carry_every_file(tmp_path):
    """What setuptools' build step would copy, without building 60 MB: all modules, all embedded models."""
    pytest.importorskip("setuptools", minversion="77", reason="pyproject.toml needs setuptools 77")
    code = f"""
from setuptools import Distribution
dist = Distribution({{"script_name": "setup.py"}})
dist.parse_config_files(["pyproject.toml"])
dist.include_package_data = False  # go by the patterns in pyproject.toml; writes no egg-info
step = dist.get_command_obj("build_py")
step.build_lib = {str(tmp_path)!r}
step.ensure_finalized()
print(*step.get_outputs(include_bytecode=False), sep="\\n")
"""
    carried = {Path(line).relative_to(tmp_path).as_posix() for line in python(code)}
    expected = {"ptq4dm/py.typed"}
    for room in ROOMS:
        inside = "ptq4dm" if room == "ptq4dm" else f"ptq4dm/{room}"
        expected |= {f"{inside}/{p.relative_to(ROOT / room).as_posix()}" for p in (ROOT / room).rglob("*.py")}
    assets = {p.relative_to(ROOT).as_posix() for p in (ROOT / "assets").rglob("*") if p.is_file()}
    assert any(name.endswith(".safetensors") for name in assets)
    expected |= {f"ptq4dm/{p.relative_to(ROOT).as_posix()}" for p in (ROOT / "kernels" / "tuned").glob("*.json")}
    assert expected | {f"ptq4dm/{name}" for name in assets} <= carried


def test_embedded_models_are_found_and_small():
    for name in (*EMBEDDED, "features-cifar10"):
        assert (asset_path(name) / "README.md").is_file()
    with pytest.raises(UserError, match="no-such-model"):
        asset_path("no-such-model")
    assert sum(p.stat().st_size for p in (ROOT / "assets").rglob("*") if p.is_file()) < 70e6

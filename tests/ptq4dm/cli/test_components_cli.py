"""`ptq4dm quantize --components`: several networks, each by its recipe; `info` of what comes out."""

import json

import pytest

import personal
from ptq4dm.cli.main import main
from ptq4dm.files.outside import read_object

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore")]
EIGHT = "text_encoder=rtn activations=dynamic"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    personal.text().save_pretrained(folder)
    return str(folder)


def test_networks_and_their_bytes(model, tmp_path, capsys):
    output = tmp_path / "out"
    assert main(["quantize", "--model", model, "--components", "vae", EIGHT, "--output", str(output)]) in (0, None)
    table = capsys.readouterr().out
    assert "all networks" in table and "quantized: vae, text_encoder" in table
    record = read_object(output / "quantization.json", {"memory": dict, "recipes": dict})
    assert record["recipes"]["vae"]["first_last"] == "keep" and "weight_bits" not in record["recipes"]["text_encoder"]
    assert set(read_object(output / "plan.json", {"components": dict})["components"]) == {"vae", "text_encoder"}
    main(["info", "--model", str(output), "--json", "--verify"])
    facts = json.loads(capsys.readouterr().out)
    assert facts["memory"] == record["memory"] and facts["verified"] == {"text_encoder": 12, "vae": 34}
    assert facts["networks"]["text_encoder"]["recipe"] == record["recipes"]["text_encoder"]
    main(["info", "--model", str(output)])
    assert "memory        vae" in capsys.readouterr().out


def test_a_plan_of_several_networks_is_followed(model, tmp_path):
    first, second = tmp_path / "a", tmp_path / "b"
    main(["quantize", "--model", model, "--components", "vae", "text_encoder", "--output", str(first)])
    main(["quantize", "--model", model, "--plan", str(first / "plan.json"), "--output", str(second)])
    for name in ("vae/diffusion_pytorch_model", "text_encoder/model"):
        one, two = ((folder / f"{name}.safetensors").read_bytes() for folder in (first, second))
        assert one == two


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--components", "nothing"], "has no network 'nothing'"),
        (["--components", "vae", "vae"], "--components names 'vae' twice"),
        (["--components", "vae", "--component", "unet"], "--component is of all networks alike"),
        (["--components", "vae", "--method", "rtn"], "--method is of denoisers without a recipe of their own"),
        (
            ["--components", "vae", "--weight-bits", "4"],
            "--weight-bits is of denoisers without a recipe of their own",
        ),
        (["--components", "vae=rtn"], "the recipe of 'vae' wants calibration"),
        (["--components", "vae=rtn activation_bits=5 x"], "'x' is no option; write option=value"),
        (["--components", "vae=nothing"], "quantization method 'nothing' is unknown"),
    ],
)
def test_wrong_options(options, words, model, tmp_path, capsys):
    assert main(["quantize", "--model", model, *options, "--output", str(tmp_path / "out")]) == 2
    assert words in capsys.readouterr().err and not (tmp_path / "out").exists()

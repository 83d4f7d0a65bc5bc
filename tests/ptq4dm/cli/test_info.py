"""`ptq4dm info`: what is left in full precision and why, adapters, other networks."""

import copy
import json

import pytest
from diffusers import DDPMPipeline, DDPMScheduler
from peft import LoraConfig
from safetensors.torch import load_file, save_file

import denoisers
import ptq4dm
from models import conditional_unet
from ptq4dm import RTNConfig
from ptq4dm.cli import info
from ptq4dm.cli.main import main
from ptq4dm.kernels.cpu import library
from ptq4dm.kernels.runtime import settings
from ptq4dm.quantization.diffusers_bridge import quantization_config
from ptq4dm.svdquant import fuse_lora

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore")]


def test_what_is_left_and_why(unet, tmp_path, capsys):
    model = unet()
    assert info.left_layers(model, None) == []
    ptq4dm.quantize(model, RTNConfig(activations="dynamic", first_last="keep", modules_to_not_convert=("mid_block",)))
    why = {row["layer"]: row["why"] for row in info.left_layers(model, quantization_config(model))}
    assert why["conv_in"] == "the model's first layer" and why["conv_out"] == "the model's last layer"
    assert why["mid_block.resnets.0.conv1"] == "modules_to_not_convert has 'mid_block'"
    assert len(why) == 2 + sum(name.startswith("mid_block") for name in why)
    DDPMPipeline(model, DDPMScheduler()).save_pretrained(tmp_path / "out")
    assert main(["info", "--model", str(tmp_path / "out")]) in (0, None)
    text = capsys.readouterr().out
    assert "\nquantization  of 'unet': method rtn" in text and "\nbytes         of 'unet': " in text
    assert "in full precision, and why" in text and "conv_in: the model's first layer" in text
    main(["info", "--model", str(tmp_path / "out"), "--json"])
    facts = json.loads(capsys.readouterr().out)
    assert {row["layer"] for row in facts["left"]} == set(why) and facts["adapters"] == {} == facts["networks"]


def test_kinds_that_are_not_quantized():
    model, _, _ = denoisers.quantized("dit")
    why = {row["layer"]: row["why"] for row in info.left_layers(model, quantization_config(model))}
    assert why["proj_out_1"].startswith("svdquant chose no format for it")
    table = "transformer_blocks.0.norm1.emb.class_embedder.embedding_table"
    assert why[table] == "Embedding is not of a kind that is quantized"
    calibrated = {"evidence": "store"}, "its role, its shape or what it costs, or calibration never called it)"
    alone = {"evidence": "none"}, "its role, its shape or what it costs)"
    for options, end in (calibrated, alone):
        config = ptq4dm.SVDQuantConfig(**options)
        why = {row["layer"]: row["why"] for row in info.left_layers(model, config)}
        assert why["proj_out_1"] == f"svdquant chose no format for it (by {end}"


def test_attention_in_8_bits():
    model = copy.deepcopy(denoisers.quantized("dit")[0])
    assert info.attention_in_8_bits_of(model) == []
    ptq4dm.plan_attention(model, "e4m3", layers=["transformer_blocks.1.attn1"])
    rows = info.attention_in_8_bits_of(model)
    assert rows == [{"layer": "transformer_blocks.1.attn1", "kind": "e4m3", "kernel": "reference"}]


def test_adapters():
    model = copy.deepcopy(denoisers.quantized("flux")[0])
    for name in ("one", "two"):
        model.add_adapter(LoraConfig(r=4, target_modules=["attn.to_q"]), name)
    model.set_adapters("one")
    beside = info.adapters_of(model)
    assert beside == {
        "one": {"layers": 2, "active": True, "fused": 0}, "two": {"layers": 2, "active": False, "fused": 0},
    }  # fmt: skip
    fuse_lora(model)
    assert info.adapters_of(model)["one"] == {"layers": 0, "active": True, "fused": 2}
    config = quantization_config(model)
    assert "part of an adapter" in {row["why"] for row in info.left_layers(model, config)}
    assert info.adapters_of(conditional_unet()) == {}


def test_other_networks():
    model, _ = denoisers.pair("dit")
    other, _ = denoisers.pair("dit")
    ptq4dm.quantize(model, RTNConfig(activations="dynamic"))

    class Two(DDPMPipeline):
        def __init__(self, transformer, transformer_2, scheduler):
            super(DDPMPipeline, self).__init__()
            self.register_modules(transformer=transformer, transformer_2=transformer_2, scheduler=scheduler)

    found = info.other_networks(Two(model, other, DDPMScheduler()))
    assert found["transformer_2"]["class"] == "DiTTransformer2DModel" and not found["transformer_2"]["quantized"]
    assert list(found) == ["transformer_2"] and found["transformer_2"]["bytes"] > 0


def test_verify(unet, tmp_path, capsys):
    model = unet()
    ptq4dm.quantize(model, RTNConfig(activations="dynamic"))
    folder = tmp_path / "out"
    DDPMPipeline(model, DDPMScheduler()).save_pretrained(folder)
    assert main(["info", "--model", str(folder), "--verify"]) in (0, None)
    assert "verified      unet: " in capsys.readouterr().out
    main(["info", "--model", str(folder), "--verify", "--json"])
    facts = json.loads(capsys.readouterr().out)
    assert facts["verified"] == {"unet": len(facts["layers"])}
    path = folder / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    for name in ("conv_in", "conv_out"):
        tensors[f"{name}.qweight"].view(-1)[:1].neg_().sub_(1)
    save_file(tensors, path, {"format": "pt"})
    assert main(["info", "--model", str(folder), "--verify"]) == 2
    told = capsys.readouterr().err.strip()
    assert "\n" not in told and "changed: unet: 'conv_in', 'conv_out'" in told
    assert main(["info", "--model", "unet-cifar10", "--verify"]) == 2
    assert "nothing to verify" in capsys.readouterr().err


def test_the_compiled_kernels_of_a_cpu_are_named_where_layers_ask_for_them(unet, tmp_path, capsys, monkeypatch):
    for bits in (8, 4):
        model = unet()
        ptq4dm.quantize(model, RTNConfig(activations="dynamic", weight_bits=bits))
        DDPMPipeline(model, DDPMScheduler()).save_pretrained(tmp_path / f"{bits}")

    def facts(bits, kind="linear"):
        settings.forget()
        library.forget()
        main(["info", "--model", str(tmp_path / f"{bits}"), "--json"])
        found = json.loads(capsys.readouterr().out)
        return found["compiled"], {row["kernel"] for row in found["layers"] if row["kind"] == kind}

    for kind in ("conv2d", "linear"):
        compiled, kernels = facts(4, kind)
        assert compiled == library.status() and compiled.startswith(("compiled for ", "not compiled: "))
        assert ("cpu-w4a8" in kernels) == library.available()
    main(["info", "--model", str(tmp_path / "4")])
    assert f"CPU kernels   {compiled}\n" in capsys.readouterr().out
    assert facts(8)[0] is None and library.status() is None, "nobody asked, nothing was built"
    assert library.found().text == compiled
    main(["info", "--model", str(tmp_path / "8"), "--json"])
    assert json.loads(capsys.readouterr().out)["compiled"] is None, "what others asked for is not this model's"
    monkeypatch.setenv("PTQ4DM_CPU_KERNELS", "0")
    compiled, kernels = facts(4)
    assert "PTQ4DM_CPU_KERNELS=0" in compiled and "cpu-w4a8" not in kernels
    monkeypatch.undo()
    settings.forget()
    library.forget()

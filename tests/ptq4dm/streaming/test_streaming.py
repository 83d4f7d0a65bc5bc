"""From folder to folder, layer by layer: the bits of loading, quantizing and saving, and never a whole network."""

import json
import weakref
from dataclasses import replace

import pytest
import torch
from diffusers import DDIMScheduler, DDPMPipeline

import ptq4dm
from helpers import same
from models import dit, unet
from ptq4dm import DamagedFile, PixelDiTPipeline, RTNConfig, SVDQuantConfig, UserError
from ptq4dm.cli.main import main
from ptq4dm.streaming.folder import stream_folder, streams
from ptq4dm.streaming.shards import Shards

pytestmark = pytest.mark.usefixtures("one_thread")

ALONE = SVDQuantConfig(evidence="none", rank=4, group_size=32, activations="int8")
WIDE = {"num_attention_heads": 1, "attention_head_dim": 32, "num_layers": 1}


def pixel_dit():
    return PixelDiTPipeline(dit(in_channels=3, out_channels=3, patch_size=2, **WIDE), DDIMScheduler())


def pixel_unet():
    return DDPMPipeline(unet(), DDIMScheduler(clip_sample=True))


CASES = {
    "svdquant": (pixel_dit, ALONE, torch.float32),
    "svdquant in bf16": (pixel_dit, ALONE, torch.bfloat16),
    "rotated": (
        pixel_dit,
        SVDQuantConfig(evidence="none", group_size=32, transforms=("hadamard:16",)),
        torch.float32,
    ),
    "unet in 8 bits": (pixel_unet, RTNConfig(activations="dynamic"), torch.float32),
}


@pytest.mark.parametrize("case", CASES)
def test_the_same_bits_and_report_as_load_quantize_and_save(case, tmp_path):
    make, config, dtype = CASES[case]
    make().save_pretrained(tmp_path / "float", max_shard_size="20KB")
    report = stream_folder(tmp_path / "float", config, tmp_path / "out", dtype=dtype, limit=10_000)
    whole = ptq4dm.load_pipeline(tmp_path / "float", dtype)
    by_hand = ptq4dm.quantize(whole, config)
    name = by_hand.networks[0]
    loaded = ptq4dm.load_pipeline(tmp_path / "out", dtype)
    assert same(getattr(loaded, name).state_dict(), getattr(whole, name).state_dict())
    assert report.to_dict() == by_hand.to_dict()
    assert ptq4dm.verify(tmp_path / "out") == {name: len(report.layers)}
    assert len(list((tmp_path / "out" / name).glob("*.safetensors"))) > 1
    assert len(ptq4dm.Plan.load(tmp_path / "out" / "plan.json").layers) == len(report.layers)


def test_other_networks_are_copied_and_counted(tmp_path):
    pipe = pixel_dit()
    pipe.save_pretrained(tmp_path / "float")
    place = tmp_path / "float" / "extra"
    place.mkdir()
    from safetensors.torch import save_file

    save_file({"weight": torch.zeros(8, 4)}, place / "model.safetensors")
    index = json.loads((tmp_path / "float" / "model_index.json").read_text()) | {"extra": ["transformers", "T5Model"]}
    (tmp_path / "float" / "model_index.json").write_text(json.dumps(index))
    report = stream_folder(tmp_path / "float", ALONE, tmp_path / "out")
    assert report.memory["extra"] == [128, 128] and report.left == ["extra"]
    assert (tmp_path / "out" / "extra" / "model.safetensors").read_bytes() == (
        place / "model.safetensors"
    ).read_bytes()


def test_packed_layers_do_not_stay_in_memory(tmp_path, monkeypatch):
    model = dit(in_channels=3, out_channels=3, patch_size=2, **WIDE | {"num_layers": 3})
    PixelDiTPipeline(model, DDIMScheduler()).save_pretrained(tmp_path / "float")
    packed, alive, add = [], [], Shards.add

    def watched(self, tensors):
        packed.extend(weakref.ref(one) for one in tensors.values())
        add(self, tensors)
        alive.append(sum(one() is not None for one in packed))

    monkeypatch.setattr(Shards, "add", watched)
    stream_folder(tmp_path / "float", ALONE, tmp_path / "out", limit=1)
    *layers, rest = alive
    assert len(layers) == 27 and max(layers) <= 12  # of two layers, of up to six tensors each
    assert rest < 100 < len(packed)


def test_shards_hold_no_more_than_they_may(tmp_path):
    shards, held = Shards(tmp_path, 100), []
    for number in range(5):
        shards.add({str(number): torch.zeros(10)})
        held.append(sum(one.nbytes for one in shards._held.values()))
    shards.close()
    assert held == [40, 80, 40, 80, 40] and len(list(tmp_path.glob("*.safetensors"))) == 3


def test_what_it_cannot_do_is_not_streamed(tmp_path):
    pixel_dit().save_pretrained(tmp_path / "float")
    assert streams(tmp_path / "float", ALONE)
    assert not streams(tmp_path / "float", SVDQuantConfig())
    assert not streams(tmp_path / "float", SVDQuantConfig(evidence="none", transforms=("rotate",)))
    assert not streams(tmp_path, ALONE)
    with pytest.raises(UserError, match=r"transformer: 'nope' in modules_to_not_convert names no layer"):
        stream_folder(tmp_path / "float", replace(ALONE, modules_to_not_convert=("nope",)), tmp_path / "out")
    stream_folder(tmp_path / "float", ALONE, tmp_path / "out")
    with pytest.raises(UserError, match="quantized already"):
        stream_folder(tmp_path / "out", ALONE, tmp_path / "again")
    weights = tmp_path / "float" / "transformer" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(DamagedFile):
        stream_folder(tmp_path / "float", ALONE, tmp_path / "again")
    assert not (tmp_path / "again").exists()


def test_the_command_streams(tmp_path, monkeypatch, capsys):
    pixel_dit().save_pretrained(tmp_path / "float")
    monkeypatch.setattr("ptq4dm.cli.quantize.load", None)  # what has the pipeline whole is not called
    command = ["quantize", "--model", str(tmp_path / "float"), "--method", "svdquant", "--evidence", "none"]
    assert main([*command, "--rank", "4", "--group-size", "32", "--output", str(tmp_path / "out")]) == 0
    said, warned = capsys.readouterr()
    assert "W4A4 g32 r4" in said and ptq4dm.verify(tmp_path / "out")
    assert "kept in float32" not in warned  # of no modules, by diffusers


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_the_same_bits_and_kernels_as_load_quantize_and_save(tmp_path):
    pixel_dit().save_pretrained(tmp_path / "float")
    config, device = SVDQuantConfig(evidence="none", rank=16, group_size=32), torch.device("cuda")
    report = stream_folder(tmp_path / "float", config, tmp_path / "out", dtype=torch.bfloat16, device=device)
    whole = ptq4dm.load_pipeline(tmp_path / "float", torch.bfloat16, device)
    assert report.to_dict() == ptq4dm.quantize(whole, config).to_dict()
    loaded = ptq4dm.load_pipeline(tmp_path / "out", torch.bfloat16, device)
    assert same(loaded.transformer.state_dict(), whole.transformer.state_dict())


def test_what_is_in_the_outputs_place_stays(tmp_path):
    pixel_dit().save_pretrained(tmp_path / "float")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "letter").write_text("mine")
    before = sorted(tmp_path.rglob("*"))
    for place in ("float", "other"):
        with pytest.raises(UserError, match=f"{place} exists and was not written by ptq4dm quantize"):
            stream_folder(str(tmp_path / "float"), ALONE, str(tmp_path / place))
    for wrong in (SVDQuantConfig(evidence="calls"), RTNConfig(transforms=("smooth",)), SVDQuantConfig()):
        with pytest.raises(UserError, match="looks at layers together, or what .* cannot be streamed") as error:
            stream_folder(tmp_path / "float", wrong, tmp_path / "out")
        assert not isinstance(error.value, DamagedFile)
    with pytest.raises(UserError, match="stream_folder: output must be"):
        stream_folder(tmp_path / "float", ALONE, None)
    assert sorted(tmp_path.rglob("*")) == before

"""The pixel-space DiT pipeline, and opening pipelines by name."""

import json
import shutil

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    DEISMultistepScheduler,
    DiffusionPipeline,
    EulerDiscreteScheduler,
)

from models import dit, plain_unet
from ptq4dm.errors import UserError
from ptq4dm.pipelines.denoiser import denoiser
from ptq4dm.pipelines.embedded import check_name
from ptq4dm.pipelines.images import to_uint8
from ptq4dm.pipelines.load import EMBEDDED, check_loadable, load_pipeline, load_reference
from ptq4dm.pipelines.pixel_dit import PixelDiTPipeline
from ptq4dm.pipelines.sampling import default_steps, sample

pytestmark = pytest.mark.usefixtures("one_thread")


def tiny(scheduler=DDIMScheduler, out_channels=3):
    transformer = dit(in_channels=3, out_channels=out_channels)
    pipe = PixelDiTPipeline(transformer, scheduler())
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_is_the_ddim_recursion():
    """Against DDIM (arXiv:2010.02502, eq. 12, sigma = 0) written out."""
    pipe = tiny()
    labels = torch.tensor([3, 7])
    ours = pipe(labels, [torch.Generator().manual_seed(s) for s in (1, 2)], 5, output_type="pt").images
    x = torch.cat([torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(s)) for s in (1, 2)])
    bars = pipe.scheduler.alphas_cumprod
    times = [800, 600, 400, 200, 0]
    for now, then in zip(times, [*times[1:], None], strict=True):
        with torch.no_grad():
            eps = pipe.transformer(x, torch.tensor([now, now]), class_labels=labels).sample
        a, b = bars[now], torch.tensor(1.0) if then is None else bars[then]
        x0 = ((x - (1 - a).sqrt() * eps) / a.sqrt()).clamp(-1, 1)  # the scheduler's clip_sample
        x = b.sqrt() * x0 + (1 - b).sqrt() * eps
    assert torch.allclose(ours, (x / 2 + 0.5).clamp(0, 1), atol=1e-5)


@pytest.mark.parametrize("scheduler", [DDIMScheduler, DDPMScheduler, DEISMultistepScheduler, EulerDiscreteScheduler])
def test_images_depend_on_label_and_seed_alone(scheduler):
    pipe = tiny(scheduler)
    pipe.transformer.double()
    together = sample(pipe, [3, 14, 4], num_inference_steps=3)
    alone = sample(pipe, [4], num_inference_steps=3)
    assert torch.equal(to_uint8(together[2:]), to_uint8(alone))
    relabelled = sample(pipe, [4], num_inference_steps=3, conditioning={"class_labels": [9]})
    assert not torch.equal(alone, relabelled)


def test_euler_in_sigma_space_is_ddim():
    """Both integrate the same ODE with the same first-order step (DDIM, arXiv:2010.02502, eq. 13)."""
    pipe = tiny()
    common = {"timestep_spacing": "trailing", "beta_schedule": "linear"}
    pipe.scheduler = DDIMScheduler(clip_sample=False, **common)
    ddim = sample(pipe, [1, 2], num_inference_steps=4)
    pipe.scheduler = EulerDiscreteScheduler(**common)
    assert torch.allclose(sample(pipe, [1, 2], num_inference_steps=4), ddim, atol=1e-3)


def test_learned_variance_is_left_out():
    pipe = tiny(out_channels=6)
    before = sample(pipe, [0], num_inference_steps=2)
    # proj_out_2 writes patches of [2, 2, 6]; the last three of each six are the variance.
    rows = pipe.transformer.proj_out_2.bias.data.view(4, 6)
    rows[:, 3:] += 100
    assert torch.equal(before, sample(pipe, [0], num_inference_steps=2))
    rows[:, :3] += 0.1
    assert not torch.equal(before, sample(pipe, [0], num_inference_steps=2))


def test_eta_is_passed_on():
    pipe = tiny()

    def run(eta):
        generator = torch.Generator().manual_seed(0)
        return pipe([1], generator, num_inference_steps=3, eta=eta, output_type="pt").images

    assert not torch.equal(run(0.0), run(1.0)) and torch.equal(run(1.0), run(1.0))


def test_output_types():
    pipe = tiny()
    picture = pipe([1], torch.Generator().manual_seed(0), 2).images[0]
    tensor = pipe([1], torch.Generator().manual_seed(0), 2, output_type="pt", return_dict=False)[0]
    array = pipe([1], torch.Generator().manual_seed(0), 2, output_type="np").images
    assert picture.size == (8, 8) and tensor.shape == (1, 3, 8, 8) and array.shape == (1, 8, 8, 3)
    assert (to_uint8(tensor)[0].permute(1, 2, 0).numpy() == picture).all()


@pytest.mark.parametrize("labels", [[10], [-1], [0.5], [], 3, torch.tensor([[1]]), torch.tensor([True])])
def test_wrong_labels(labels):
    with pytest.raises(UserError, match="class.label"):
        tiny()(labels)


def test_wrong_generators_and_output_type():
    with pytest.raises(UserError, match="1 generators were given for 2"):
        tiny()([1, 2], [torch.Generator()])
    with pytest.raises(UserError, match="output_type"):
        tiny()([1], output_type="latent")


def test_saves_as_plain_diffusers(tmp_path):
    pipe = tiny()
    pipe.save_pretrained(tmp_path / "dit")
    index = json.loads((tmp_path / "dit" / "model_index.json").read_text())
    assert index["_class_name"] == "PixelDiTPipeline"
    assert index["transformer"] == ["diffusers", "DiTTransformer2DModel"]
    assert index["scheduler"] == ["diffusers", "DDIMScheduler"]


@pytest.mark.parametrize("name", EMBEDDED)
def test_embedded_models_make_pictures(name):
    pipe = load_reference(name)
    kind = PixelDiTPipeline if "dit-" in name else DDPMPipeline
    assert type(pipe) is kind and {p.dtype for p in denoiser(pipe).parameters()} == {torch.float32}
    images = sample(pipe, [0], num_inference_steps=default_steps(pipe, 4))
    # A natural picture: neighbours resemble each other (noise has no such correlation).
    flat = images - images.mean((2, 3), keepdim=True)
    assert (flat[..., 1:] * flat[..., :-1]).sum() / flat.square().sum() > 0.7


def test_load_reference_dtype_and_wrong_name():
    pipe = load_reference("unet-cifar10", dtype=torch.bfloat16)
    assert {p.dtype for p in pipe.unet.parameters()} == {torch.bfloat16}
    with pytest.raises(UserError, match="choose from unet-cifar10, dit-cifar10"):
        load_reference("unet-cifar100")


@pytest.fixture
def folder(tmp_path):
    unet = plain_unet(add_attention=True)
    DDPMPipeline(unet.half(), DDIMScheduler()).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_load_pipeline_from_a_folder(folder):
    pipe = load_pipeline(str(folder))
    assert type(pipe) is DDPMPipeline and {p.dtype for p in pipe.unet.parameters()} == {torch.float32}
    assert isinstance(pipe, DiffusionPipeline)


def test_load_pipeline_names_a_broken_or_missing_weight_file(folder, caplog):
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    with pytest.raises(UserError, match="diffusion_pytorch_model.safetensors is not a whole"):
        load_pipeline(folder)
    weights.unlink()
    with pytest.raises(UserError, match="no file named diffusion_pytorch_model.safetensors") as caught:
        load_pipeline(folder)
    assert "\n" not in str(caught.value)


def test_load_pipeline_refuses_what_is_no_pipeline(folder, tmp_path):
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps({**index, "_class_name": "NoSuchPipeline"}))
    with pytest.raises(UserError, match="NoSuchPipeline"):
        load_pipeline(folder)
    shutil.rmtree(folder / "unet")
    (folder / "model_index.json").unlink()
    with pytest.raises(UserError, match="model_index.json"):
        load_pipeline(folder)
    for name in ("nope", "./nope", str(tmp_path / "nope"), tmp_path / "nope"):
        with pytest.raises(UserError, match="neither an embedded model"):
            load_pipeline(name)


def test_load_pipeline_says_in_one_sentence_that_the_hub_has_none(monkeypatch):
    def offline(*_, **__):
        raise OSError("Cannot load model owner/name: not cached.\nAnd a second line.")

    monkeypatch.setattr(DiffusionPipeline, "from_pretrained", offline)
    with pytest.raises(UserError, match="no folder 'owner/name' here.*not cached") as caught:
        load_pipeline("owner/name")
    assert "second line" not in str(caught.value)


def test_a_path_that_is_not_there_is_not_asked_of_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(DiffusionPipeline, "from_pretrained", lambda *_, **__: pytest.fail("the hub was asked"))
    monkeypatch.setattr(DiffusionPipeline, "load_config", lambda *_, **__: pytest.fail("the hub was asked"))
    (tmp_path / "out").mkdir()
    for name in ("out/none", "none/", "/none", "./none", "../none", "~/none", "a/b/c", "a\\b", "a/.b", "-/b", "a//b"):
        for call in (load_pipeline, check_loadable):
            with pytest.raises(UserError, match="there is a folder 'out' here|neither an embedded model") as caught:
                call(name)
            assert str(caught.value).count(".") >= 1 and "\n" not in str(caught.value)
    for name in ("owner/name", "stabilityai/stable-diffusion-xl-base-1.0", "out2/none", "01-ai/_a.b"):
        check_name(name)  # a hub's, as far as a name tells


def test_load_pipeline_wants_a_device_that_is_here():
    with pytest.raises(UserError, match="'abacus' cannot be used"):
        load_reference(device="abacus")

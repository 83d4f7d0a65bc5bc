"""A pipeline without text encoders on the command line: prompts as embeddings from a file, and a size."""

import json

import pytest
import torch
from accelerate.state import AcceleratorState
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline
from diffusers.utils import logging
from safetensors.torch import save_file

import denoisers
from ptq4dm.cli.main import main
from ptq4dm.cli.options import conditioning_of
from ptq4dm.cli.verbs import build_parser
from ptq4dm.pipelines.images import load_images, read_metadata
from ptq4dm.pipelines.sampling import sample

pytestmark = pytest.mark.usefixtures("one_thread")
logging.set_verbosity_error()
SIZE = ["--height", "16", "--width", "32", "--device", "cpu"]


@pytest.fixture
def flux(tmp_path, monkeypatch):
    """A folder of a FluxPipeline without text encoders, and the embeddings of two prompts."""
    monkeypatch.chdir(tmp_path)
    transformer = denoisers.flux()[0]
    latents, width = transformer.config.in_channels // 4, transformer.config.joint_attention_dim
    vae = AutoencoderKL(latent_channels=latents, block_out_channels=(8,), norm_num_groups=4, shift_factor=0.0).eval()
    pipe = FluxPipeline(FlowMatchEulerDiscreteScheduler(), vae, None, None, None, None, transformer)
    pipe.save_pretrained("flux")
    torch.manual_seed(0)
    embeds = {"prompt_embeds": torch.randn(2, 4, width)}
    embeds["pooled_prompt_embeds"] = torch.randn(2, transformer.config.pooled_projection_dim)
    save_file(embeds, "prompts.safetensors")
    yield pipe, embeds
    AcceleratorState._reset_state()


def run(*arguments):
    return main([str(a) for a in arguments])


def test_the_verbs_take_embeddings(flux, capsys):
    pipe, embeds = flux
    given = ["--model", "flux", "--prompt-embeds", "prompts.safetensors", *SIZE]
    assert run("generate", *given, "--num-images", 3, "--steps", 2, "--output", "images") == 0
    found = load_images([f"images/{k:06d}.png" for k in range(3)])
    assert found.shape == (3, 3, 16, 32)
    wanted = sample(
        pipe, range(3), num_inference_steps=2, conditioning=embeds, pipeline_kwargs={"height": 16, "width": 32}
    )
    torch.testing.assert_close(found.float() / 255, wanted, atol=1 / 255, rtol=0)
    settings = read_metadata("images/000002.png")
    assert settings["pipeline_kwargs"] == {"height": 16, "width": 32}
    calibration = ["--num-samples", 2, "--calibration-steps", 2]
    assert run("collect", *given, *calibration, "--output", "store") == 0
    assert run("quantize", *given, *calibration, "--output", "flux-w8a8") == 0
    assert run("quantize", "--model", "flux", "--calibration", "store", "--output", "other", "--device", "cpu") == 0
    capsys.readouterr()
    report = ["--num-paired", 4, "--num-heldout", 2, "--num-images", 2, "--steps", 2, "--batch-size", 2, "--json"]
    square = ["--prompt-embeds", "prompts.safetensors", "--height", 32, "--width", 32, "--device", "cpu"]
    assert run("evaluate", "--model", "flux-w8a8", *square, *report) == 0
    assert json.loads(capsys.readouterr().out)["full_precision"] == "flux"


def test_embeddings_come_to_the_dtype_of_the_model(flux):
    pipe, embeds = flux
    wide = {name: tensor.double() for name, tensor in embeds.items()}
    kwargs = {"height": 16, "width": 16}
    one, two = (
        sample(pipe, [0, 1], num_inference_steps=1, conditioning=c, pipeline_kwargs=kwargs) for c in (embeds, wide)
    )
    assert torch.equal(one, two)


@pytest.mark.parametrize(
    "tensors, more, answer",
    [
        (None, ["--prompt", "a dog"], "this FluxPipeline has no text encoder: give prompts as embeddings,"),
        (None, [], "this FluxPipeline has no text encoder: give prompts as embeddings,"),
        (
            {"embeds": torch.ones(1, 2)},
            [],
            "FILE cannot be read (it holds no prompt_embeds); give a",
        ),
        (
            {"prompt_embeds": torch.tensor(1.0)},
            [],
            "needs one row for a prompt; prompt_embeds has 0",
        ),
        (
            {"prompt_embeds": torch.ones(2, 4, 8), "pooled_prompt_embeds": torch.ones(1, 8)},
            [],
            "needs one row for a prompt; pooled_prompt_embeds has 1, prompt_embeds has 2",
        ),
        ({"prompt_embeds": torch.full((1, 4, 8), torch.nan)}, [], "'prompt_embeds' holds NaN or infinity"),
        ({"prompt_embeds": torch.ones(1, 4, 8), "image": torch.ones(1)}, [], "FluxPipeline takes no 'image'"),
        ({"prompt_embeds": torch.ones(1, 4, 8)}, [], "FluxPipeline cannot be called with this prompt_embeds"),
    ],
)
def test_wrong_embeddings_are_one_sentence(tensors, more, answer, flux, capsys):
    if tensors is not None:
        save_file(tensors, "FILE")
        more = ["--prompt-embeds", "FILE"]
    assert run("collect", "--model", "flux", "--num-samples", 1, "--calibration-steps", 1, *more, *SIZE) == 2
    told = capsys.readouterr().err
    assert answer in told and "Traceback" not in told


@pytest.mark.parametrize("verb", ["collect", "quantize", "allocate", "generate", "evaluate"])
def test_the_size_of_a_video_is_the_pipelines_arguments(verb):
    flags = ["--num-frames", "5", "--height", "16", "--width", "32", "--guidance-scale", "3"]
    found = conditioning_of(build_parser([verb]).parse_args([verb, *flags]))
    assert found["conditioning"] is None
    assert found["pipeline_kwargs"] == {"guidance_scale": 3.0, "height": 16, "width": 32, "num_frames": 5}

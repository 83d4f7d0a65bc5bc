"""DisBack as it is meant to be run: a GPU, bfloat16, compiled networks."""

import json

import pytest
import torch
from accelerate.state import AcceleratorState
from diffusers import DDIMScheduler, DDPMPipeline

from ptq4dm.samplers import DisBackConfig, distill

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("compiled", [False, True])
def test_a_run_that_stops_and_goes_on(unet, tmp_path, compiled):
    AcceleratorState._reset_state(reset_partial_state=True)  # other tests run accelerate on the CPU
    pipe = DDPMPipeline(unet().to("cuda", memory_format=torch.channels_last), DDIMScheduler())
    options = dict(
        batch_size=32, degradation_steps=4, path_points=2, switch_every=3, evaluate_every=5 * 32, log_every=5,
        precision="bf16", compile=compiled,
    )  # fmt: skip
    distill(pipe, DisBackConfig(images=10 * 32, **options), tmp_path / "run")
    student = distill(pipe, DisBackConfig(images=20 * 32, **options), tmp_path / "run", resume=True)
    AcceleratorState._reset_state(reset_partial_state=True)
    lines = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert lines[-1]["step"] == 20 and (tmp_path / "run" / "samples" / "000000640.png").is_file()
    images = student(batch_size=4, num_inference_steps=1, output_type="pt").images
    assert images.isfinite().all() and images.device.type == "cuda"
    before, after = pipe.unet.conv_in.weight, student.unet.conv_in.weight
    assert after.dtype == torch.float32 and not torch.equal(before, after)

"""A LoRA adapter on a 4-bit model, without quantizing again: its ranks join SVDQuant's low-rank branch.

    python scripts/examples/lora_on_4_bits.py                                       # tiny FLUX, random adapter
    python scripts/examples/lora_on_4_bits.py --model org/flux --lora style.safetensors --device cuda

The codes stay as they are; strengths can be changed while the model is in use, and taking the adapter out gives
back the same bits. Needs `pip install "ptq4dm[lora]"`.
"""

import argparse

import tiny
import torch
from peft import LoraConfig
from safetensors.torch import load_file

import ptq4dm
from ptq4dm.errors import run
from ptq4dm.pipelines.sampling import sample
from ptq4dm.svdquant import fuse_lora, scale_lora, unfuse_lora


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="diffusers folder or hub id of a FLUX; a tiny random one otherwise")
    parser.add_argument("--lora", help="safetensors file in diffusers' layout; a random adapter otherwise")
    parser.add_argument("--prompt", nargs="+", default=["a lighthouse at dusk"])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--steps", type=int, default=2)
    args = parser.parse_args(argv)

    if args.model:
        pipe = ptq4dm.load_pipeline(args.model, torch.bfloat16, args.device)
        conditioning, size = {"prompt": args.prompt}, {}
    else:
        (pipe, conditioning), size = tiny.flux(), {"height": 16, "width": 16}
    inputs = {"conditioning": conditioning, "pipeline_kwargs": size}
    calibration = ptq4dm.CalibrationConfig(num_samples=8, num_inference_steps=args.steps, batch_size=4)
    store = ptq4dm.collect(pipe, calibration, **inputs)
    ptq4dm.quantize(pipe, ptq4dm.SVDQuantConfig(rank=16, activations="int8"), store)
    plain = sample(pipe, [0], num_inference_steps=args.steps, **inputs)

    if args.lora:  # `pipe.load_lora_weights` for pipelines other than FLUX
        pipe.transformer.load_lora_adapter(load_file(args.lora), adapter_name="style")
    else:
        targets = ["to_q", "to_k", "to_v", "proj_mlp"]
        adapter = LoraConfig(r=4, lora_alpha=8, target_modules=targets, init_lora_weights=False)
        pipe.transformer.add_adapter(adapter, adapter_name="style")
    print(f"layers that took the adapter: {fuse_lora(pipe)}")

    changes = {}
    for strength in (1.0, 0.5, 0.0):
        scale_lora(pipe, {"style": strength})
        changes[strength] = (sample(pipe, [0], num_inference_steps=args.steps, **inputs) - plain).abs().mean().item()
        print(f"strength {strength}: images move by {changes[strength]:.4f} of their range")
    unfuse_lora(pipe)
    again = sample(pipe, [0], num_inference_steps=args.steps, **inputs)
    print("without the adapter: the same bits as before" if torch.equal(again, plain) else "something is left behind")
    return changes, torch.equal(again, plain)


if __name__ == "__main__":
    run(main)

"""A LoRA adapter on a 4-bit model, without quantizing again: its ranks join SVDQuant's low-rank branch.

    python scripts/examples/lora_on_4_bits.py --tiny                                # a random FLUX and adapter
    python scripts/examples/lora_on_4_bits.py --model wan --lora style.safetensors --device cuda

The codes stay as they are; strengths can be changed while the model is in use, and taking the adapter out gives
back the same bits. Layers in 8 bits have no branch: their part stays with peft. --model is a name in large_models.py.
Needs `pip install ".[lora,text]"`.
"""

import argparse
from pathlib import Path

import large_models
import torch
from peft import LoraConfig

import ptq4dm
from ptq4dm.errors import UserError, run
from ptq4dm.files.outside import read_tensors
from ptq4dm.pipelines.denoiser import denoiser
from ptq4dm.svdquant import fuse_lora, scale_lora, unfuse_lora


def check_adapter(path: Path) -> None:
    """Raises UserError, before any work, for a file that holds no adapter."""
    if not path.is_file():
        raise UserError(f"--lora {path} is no file; give a safetensors file or a hub id.")
    if not any("lora" in name.lower() for name in read_tensors(path, lambda file: file.names)):
        raise UserError(f"--lora {path} holds no tensor of a LoRA adapter.")


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="flux", choices=large_models.MODELS)
    parser.add_argument("--tiny", action="store_true", help="a random model of the same class, nothing is downloaded")
    parser.add_argument("--lora", help="safetensors file or hub id of an adapter; a random one otherwise")
    parser.add_argument("--prompt", default="a lighthouse at dusk")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--steps", type=int, help="those of the model's card, 2 with --tiny")
    args = parser.parse_args(argv)
    steps = large_models.steps_of(args.model, args.tiny, args.steps)
    if args.lora and (Path(args.lora).suffix or Path(args.lora).exists()):
        check_adapter(Path(args.lora))

    # Quantized from weights alone, in seconds.
    pipe, inputs = large_models.opened(args.model, [args.prompt], args.tiny, args.device)
    ptq4dm.quantize(pipe, large_models.recipe(args.model, args.device, evidence="none"))
    network = denoiser(pipe)

    def painted() -> torch.Tensor:
        return large_models.paint(pipe, inputs, steps, "pt")

    plain = painted()
    if args.lora:
        pipe.load_lora_weights(args.lora, adapter_name="style")
    else:
        layers = [name for name, layer in network.named_modules() if isinstance(layer, torch.nn.Linear)]
        adapter = LoraConfig(r=4, lora_alpha=8, target_modules=layers, init_lora_weights=False)
        network.add_adapter(adapter, adapter_name="style")
    print(f"layers that took the adapter into their branch: {fuse_lora(pipe)}")
    with_peft = "style" in getattr(network, "peft_config", {})

    changes = {}
    for strength in (1.0, 0.5, 0.0):
        scale_lora(pipe, {"style": strength})
        if with_peft:
            network.set_adapters("style", strength)
        changes[strength] = (painted() - plain).abs().mean().item()
        print(f"strength {strength}: pictures move by {changes[strength]:.4f} of their range")
    unfuse_lora(pipe)
    if with_peft:
        network.delete_adapters("style")
    restored = torch.equal(painted(), plain)
    print("without the adapter: the same bits as before" if restored else "something is left behind")
    return changes, restored


if __name__ == "__main__":
    run(main)

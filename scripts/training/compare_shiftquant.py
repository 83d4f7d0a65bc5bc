"""Training on integers (ShiftQuant) beside training in floats: losses, feature-FID, times, noise of gradients.

    python scripts/training/compare_shiftquant.py --data cifar10-jpeg.tar.xz --stage unet --device cuda:0
    python scripts/training/compare_shiftquant.py --data ... --stage dit qat --device cuda:1 --graph
    python scripts/training/compare_shiftquant.py --data ... --stage times noise --device cuda:2
    python scripts/training/compare_shiftquant.py --data ... --rows "unet 6/6/6" "unet bf16" --steps 13000 --seeds 0
    python scripts/training/compare_shiftquant.py --data ... --rows "unet 6/6/8 G=2 narrow" "dit 8/8/6" --graph

Stages: `unet`, the UNet from scratch; `dit`, the embedded DiT trained on; `qat`, both trained on at W4A4, then
quantized by RTNConfig; `times`, forward and backward of layers and norms, with --graph a whole step, too; `noise`,
what rounding adds to gradients, whether it is without bias, and how far gradients reach at each time. What a row's
name may say is in shiftquant_rows.py. Each result is one line of JSON in --output, with card, commit and seed; rows
that are there are not made again, and several processes may write one file. A row that is interrupted,
by SIGTERM too, leaves a checkpoint beside the output, from which the same command goes on; one is written every two
minutes and before a row is measured. With --minutes the command trains until then: a row that is done too late is
measured by the next call, since measuring cannot be cut (10,000 samples take minutes).

Held-out losses are of the moving average, as it computes (`held_out`) and with plain float layers
(`held_out_float`), on test images at evenly spread times with noise of one seed. On a GPU floats are bf16 (autocast).
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from cifar10 import Split, read_cifar10
from reference_recipes import PEAK_LR, build_network
from rows_file import RowsFile
from shiftquant_measure import HeldOut
from shiftquant_noise import bias_rows, noise_rows, range_row
from shiftquant_rows import ROWS, Row, row_of
from shiftquant_steps import deadline_of
from shiftquant_times import rows as time_rows
from shiftquant_train import train_row

from ptq4dm.errors import UserError, run
from ptq4dm.pipelines.denoiser import denoiser
from ptq4dm.pipelines.devices import check_device
from ptq4dm.pipelines.load import load_pipeline

STAGES = ("unet", "dit", "qat", "times", "noise")
REFERENCE_BATCH = 512  # whose learning rates those of other batches follow, by the root


def embedded(network: str, device: torch.device) -> torch.nn.Module:
    """The embedded model in float32, with the dropout of training."""
    trained = denoiser(load_pipeline(f"{network}-cifar10", torch.float32, "cpu"))
    net = build_network(network)
    net.load_state_dict(trained.state_dict())
    return net.to(device)


def train_stage(
    row: Row, seed: int, args, output: RowsFile, splits: tuple[Split, Split], held: HeldOut, deadline
) -> bool:
    """Train and measure a row; False where time ran out."""
    steps = args.steps if not row.trained else args.fine_steps
    rate = args.learning_rate or PEAK_LR[row.network] * (args.batch_size / REFERENCE_BATCH) ** 0.5
    rate *= 0.1 if row.trained and args.learning_rate is None else 1
    key = {"row": row.name, "seed": seed, "steps": steps, "batch_size": args.batch_size}
    if output.has(**key):
        return True
    torch.manual_seed(seed)
    net = embedded(row.network, held.device) if row.trained else build_network(row.network, args.tiny)
    found = train_row(row, net.to(held.device), splits[0], held, rate, seed, steps, args, deadline)
    if found is None:
        return False
    figures, checkpoint = found
    output.add(**key, learning_rate=rate, **figures)
    checkpoint.unlink(missing_ok=True)
    return True


def main(arguments: list[str] | None = None) -> None:
    args = parse(arguments)
    deadline = deadline_of(args)
    device = check_device(args.device)
    if device.type == "cuda":
        torch.cuda.set_device(device.index or 0)
        torch.backends.cudnn.benchmark = True
        torch.set_float32_matmul_precision("high")
    output = RowsFile(args.output, device)
    if "times" in args.stage and not args.rows:
        for compiled in (False,) if args.eager else (True,) if device.type == "cuda" else (False, True):
            for found in time_rows(device, compiled, args.graph, args.cases):
                output.add(row="times", **found)
    chosen = [row for row in map(row_of, args.rows or ROWS) if args.rows or row.stage in args.stage]
    if not chosen and "noise" not in args.stage:
        return
    splits = read_cifar10(args.data)
    held = HeldOut(splits[1], args.held_out, device)
    for seed in args.seeds:  # rows that are compared lie side by side, wherever it is interrupted
        for row in chosen:
            if not train_stage(row, seed, args, output, splits, held, deadline):
                print(f"{row.name}, seed {seed}: time is over; the same command goes on", flush=True)
                return
    if "noise" in args.stage and not args.rows:
        for network in ("unet", "dit"):
            net = embedded(network, device).train()
            for found in noise_rows(net, splits[1], args.noise_batch):
                output.add(row="noise", network=network, **found)
            output.add(row="ranges", network=network, bins=range_row(net, splits[1], args.noise_batch))
            for found in bias_rows(net.eval(), splits[1], args.draws):
                output.add(row="bias", network=network, **found)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True, help="folder or .tar.xz with train/ and test/")
    parser.add_argument("--output", type=Path, default=Path("out/shiftquant.jsonl"))
    parser.add_argument("--stage", nargs="+", choices=STAGES, default=list(STAGES))
    parser.add_argument("--cases", nargs="+", default=["*"], help='of "times", such as "GroupNorm*" "step of unet*"')
    parser.add_argument("--rows", nargs="+", metavar="NAME", help='these rows alone, such as "unet 6/6/8 G=2"')
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=5000, help="from scratch (5000)")
    parser.add_argument("--fine-steps", type=int, default=2000, help="from the embedded model (2000)")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument(
        "--learning-rate", type=float, help="the recipe's, by the root of the batch; a tenth of it to train on"
    )
    parser.add_argument("--held-out", type=int, default=5000, help="test images of the held-out loss")
    parser.add_argument("--num-fid", type=int, default=5000, help="samples of feature-FID; 0: none")
    parser.add_argument("--fid-steps", type=int, default=20)
    parser.add_argument("--noise-batch", type=int, default=64)
    parser.add_argument("--draws", type=int, default=1000, help="of a gradient, in the rows of its bias")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--eager", action="store_true", help="without torch.compile; a CPU never trains with it")
    parser.add_argument(
        "--graph", action="store_true", help="each training step as one CUDA graph, and each timed call"
    )
    parser.add_argument("--minutes", type=float, help="train for so many, with a checkpoint at their end")
    parser.add_argument("--tiny", action="store_true", help="a small UNet, to try the script out with")
    args = parser.parse_args(arguments)
    for name in args.rows or ():
        row_of(name)
    if args.graph and not args.device.startswith("cuda"):
        raise UserError("--graph needs a GPU; leave it out.")
    return args


if __name__ == "__main__":
    run(main)

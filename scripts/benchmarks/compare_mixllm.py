"""MixLLM's scores held against what they claim: the error left by a share of rows, predicted and measured.

    python scripts/benchmarks/compare_mixllm.py --model dit-cifar10 --output out/mixllm-dit.json

For each score and rounding: what the scores of all rows that stay in 4 bits add up to, at 8 shares of rows in 8 bits,
beside the error of the model's prediction on tuples of other seeds; Spearman's rank correlation of the two, and
whether the measured error falls from share to share. Of "gauss-newton" the ratio of measured to predicted error as
well, both as a share of the prediction's square, for that is what it predicts: the error of nearest weights under
exact inputs. With it, how the salience of layers and the rows that are chosen change over time; and what of the
predicted gain is how many rows a layer gets, not which.
"""

from __future__ import annotations

import argparse
import copy
import json
from pathlib import Path

import torch
from scipy.stats import spearmanr

import ptq4dm
from ptq4dm.allocation.mixed_rows import mixed_plan
from ptq4dm.allocation.salient_rows import chosen_rows, predicted_error
from ptq4dm.calibration.evidence import chosen_calls, squared_error
from ptq4dm.calibration.record import replay
from ptq4dm.errors import UserError, run
from ptq4dm.files.atomic import replacing
from ptq4dm.layers.plan import Plan
from ptq4dm.pipelines.denoiser import denoiser
from ptq4dm.quantization.planning import make_plan

SHARES = (0.0, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)


class HeldOut:
    """A model in full precision on tuples of other seeds."""

    def __init__(self, model, calls, size: int):
        self.batches = [calls[part] for part in torch.arange(len(calls)).split(size)]
        self.exact = self._run(model)
        self.square = squared_error(self.exact, torch.zeros_like(self.exact))

    def error(self, model) -> float:
        """|eps_q - eps|^2 / |eps|^2."""
        return squared_error(self._run(model), self.exact) / self.square

    @torch.no_grad()
    def _run(self, model) -> torch.Tensor:
        return torch.cat([replay(model.eval(), batch).cpu() for batch in self.batches])


def at_share(model, plan: Plan, scores, share: float) -> Plan:
    """A plan of 4 bits with that share of rows in 8."""
    plan = plan.copy()
    for name, rows in chosen_rows(scores, share).items():
        plan.layers[name] = mixed_plan(plan.layers[name], rows, len(scores[name]))
    return plan


def kept_by_counts(scores, rows: dict[str, list[int]], most: float = 1.0) -> float | None:
    """The share of the predicted gain that is left, on average, where each layer has as many wide rows, drawn anew.

    most: of layers in which at most this share of rows is wide. None where these gain nothing.
    """
    gain = left = 0.0
    for name, own in rows.items():
        if len(own) <= most * len(scores[name]):
            gain += float(scores[name][own].sum())
            left += len(own) * float(scores[name].mean())
    return left / gain if gain else None


def largest(scores, rows: dict[str, list[int]], count: int = 3) -> list[dict]:
    """The layers with the most salience: their share of all of it, and how many of their rows are wide."""
    whole = sum(float(score.sum()) for score in scores.values()) or 1.0
    order = sorted(scores, key=lambda name: -float(scores[name].sum()))[:count]
    return [
        {
            "layer": name,
            "share": float(scores[name].sum()) / whole,
            "wide": len(rows[name]),
            "rows": len(scores[name]),
        }
        for name in order
    ]


def curve(model, store, truth: HeldOut, importance: str, rounding: str, args) -> dict:
    """Predicted and measured errors of one score over all shares."""
    options = {"rounding": rounding, "clip": "output" if rounding == "gptq" else "none", "num_tuples": args.tuples}
    config = ptq4dm.MixLLMConfig(importance=importance, seed=args.seed, **options)
    make_plan(model, config, store)
    scores = config.outcome.salience.total
    plain = make_plan(model, ptq4dm.MixLLMConfig(rows=0.0, seed=args.seed, **options), store)
    square = calibration_square(model, chosen_calls(store.recorded(), args.tuples), args.batch_size)
    rows = []
    for share in args.shares:
        quantized = copy.deepcopy(model)
        plan = at_share(model, plain, scores, share)
        ptq4dm.quantize(quantized, ptq4dm.MixLLMConfig(plan=plan, **options), store)
        chosen = chosen_rows(scores, share)
        rows.append({
            "share": share, "predicted": predicted_error(scores, chosen), "measured": truth.error(quantized),
            "kept by counts": kept_by_counts(scores, chosen),
            "kept in layers at most half wide": kept_by_counts(scores, chosen, 0.5),
            "largest": largest(scores, chosen),
        })  # fmt: skip
        print(importance, rounding, rows[-1], flush=True)
    predicted, measured = ([row[name] for row in rows] for name in ("predicted", "measured"))
    if importance == "gauss-newton" and rounding == "nearest":
        for row in rows:
            row["predicted_error"] = row["predicted"] / square
    return {
        "importance": importance, "rounding": rounding, "rows": rows,
        "spearman": float(spearmanr(predicted, measured).statistic),
        "monotone": all(a > b for a, b in zip(measured, measured[1:], strict=False)),
        "types": config.outcome.shares(), "bits": config.outcome.bits,
        "by_layer": config.outcome.salience.by_layer(), "overlap": config.outcome.salience.overlap(0.1),
        "edges": config.outcome.salience.edges,
    }  # fmt: skip


def calibration_square(model, calls, size: int) -> float:
    """|eps|^2 of the tuples that scores looked at."""
    return HeldOut(model, calls, size).square


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="dit-cifar10", help="an embedded model")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--importance", nargs="+", default=["gauss-newton", "fisher"])
    parser.add_argument("--rounding", nargs="+", default=["nearest", "gptq"])
    parser.add_argument("--shares", nargs="+", type=float, default=list(SHARES), help="of rows in 8 bits, rising")
    parser.add_argument("--tuples", type=int, default=128, help="calibration tuples")
    parser.add_argument("--held-out", type=int, default=128, help="tuples of other seeds")
    parser.add_argument("--steps", type=int, default=20, help="DDIM steps")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("out/mixllm.json"))
    return parser


def main(words: list[str] | None = None, pipe=None) -> None:
    args = arguments().parse_args(words)
    for name in ("tuples", "held_out", "steps", "batch_size"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} must be 1 or more, not {getattr(args, name)}.")
    if sorted(args.shares) != args.shares or len(set(args.shares)) < 2 or args.shares[0] < 0 or args.shares[-1] > 1:
        raise UserError("--shares are two or more numbers from 0 to 1, rising.")
    pipe = pipe or ptq4dm.load_reference(args.model, device=args.device)
    model = denoiser(pipe)
    law = {"num_inference_steps": args.steps, "batch_size": args.batch_size}
    store, other = (
        ptq4dm.collect(pipe, ptq4dm.CalibrationConfig("solver", count, seed=seed, **law))
        for count, seed in ((args.tuples, args.seed), (args.held_out, args.seed + 1_000_000))
    )
    truth = HeldOut(model, other.recorded(), args.batch_size)
    facts = {"model": args.model, "version": ptq4dm.__version__, "torch": torch.__version__, "curves": []}
    facts |= {name: getattr(args, name) for name in ("tuples", "held_out", "steps", "seed", "device")}
    args.output.parent.mkdir(parents=True, exist_ok=True)
    for rounding in args.rounding:
        for importance in args.importance:
            facts["curves"].append(curve(model, store, truth, importance, rounding, args))
            with replacing(args.output) as temporary:
                temporary.write_text(json.dumps(facts, indent=1) + "\n")
    for one in facts["curves"]:
        print(f"{one['importance']}, {one['rounding']}: Spearman {one['spearman']:.3f}, monotone {one['monotone']}")


if __name__ == "__main__":
    run(main)

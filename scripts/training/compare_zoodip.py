"""Zeroth-order personalization of packed models against back-propagation in float32: a class that has no row.

    python scripts/training/compare_zoodip.py --data cifar10-jpeg.tar.xz --output out/zoodip.jsonl --device cuda
    python scripts/training/compare_zoodip.py --output out/zoodip.jsonl --report

The row of one class of the embedded DiT is forgotten: it starts as the mean of the other classes' rows (with --init,
as another class), and is learned from --images pictures of that class. Measured on pictures that were not learned
from, with noise of their own and timesteps over the whole schedule: the loss, and its drop from the start as a
share of the drop that back-propagation through the float32 model reaches with the same pictures; and how many of
--samples pictures the embedded classifier takes for the class. A row of results is a line of JSON, and what is there
is not measured again; several processes may write one file, each its --share.

    MODEL start, MODEL own row             before, and with the row that the model was trained with
    float32 back-propagation SEED          the ceiling: Adam on gradients
    MODEL both | subspace | partial | neither SEED    the paper's two ideas
    MODEL paper's times SEED               both, with the timesteps that the paper has for latents
    MODEL released SEED                    both, the subspace as the authors' code has it
    MODEL walk SEED                        control: steps of "both", of equal length, in random directions
    MODEL shuffled SEED                    control: losses of "both" dealt to other perturbations
    MODEL memory                           peak memory of a step, of sampling, of back-propagation; steps a second
"""

from __future__ import annotations

import argparse
import fnmatch
import hashlib
import json
import subprocess
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from functools import cache, partial
from pathlib import Path

import torch
from cifar10 import CLASSES, class_pictures
from zoodip_report import report

import ptq4dm
from ptq4dm.errors import UserError, run
from ptq4dm.evaluation.features import load_features
from ptq4dm.pipelines.devices import check_device
from ptq4dm.progress import progress_bar
from ptq4dm.training.personalization.embedding_file import save_embedding
from ptq4dm.training.personalization.pictures import learned_from
from ptq4dm.training.personalization.problem import Problem, ready
from ptq4dm.training.personalization.run import step_once
from ptq4dm.training.personalization.schedule import schedule_of
from ptq4dm.training.personalization.targets import class_target
from ptq4dm.training.personalization.zeroth_order import Tuned, change, gradient, take

MODELS = {
    "float32": None,
    "W8A8": partial(ptq4dm.RTNConfig, activations="dynamic"),
    "W4A8": partial(ptq4dm.RTNConfig, weight_bits=4, group_size=64, activations="dynamic"),
}
WHOLE = {"first_time": 0.0, "last_time": 1.0}
PAPER = {"first_time": 0.5, "last_time": 0.9}
ARMS = {
    "both": {},
    "subspace": WHOLE,
    "partial": {"subspace": "none"},
    "neither": WHOLE | {"subspace": "none"},
    "paper's times": PAPER,
    "released": {"subspace": "released"},
    "walk": {},
    "shuffled": {},
}
ONCE = ("paper's times", "released")  # variants of one seed
BACK = "back-propagation"
SETTINGS = ARMS | {BACK: WHOLE}
pictures = cache(class_pictures)  # read once, for all models of a process
FREE = ("data", "output", "rows", "share", "device", "report")  # what decides no figure


def rows_of(args: argparse.Namespace) -> Iterator[tuple[str, str, int]]:
    """(model, arm, seed) of every row, the long ones first."""
    seeds = range(args.seed, args.seed + args.seeds)
    packed = [model for model in MODELS if MODELS[model]]
    for arm in ARMS:
        yield from ((model, arm, seed) for model in packed for seed in (seeds[:1] if arm in ONCE else seeds))
    yield from (("float32", arm, seed) for arm in (BACK, "both") for seed in seeds)
    yield from ((model, arm, args.seed) for model in MODELS for arm in ("start", "own row", "memory"))


class Bench:
    """A model, the pictures to learn from, and the held-out ones."""

    def __init__(self, args: argparse.Namespace, model: str) -> None:
        self.args, self.device = args, check_device(args.device)
        self.label = CLASSES.index(args.class_name)
        train, test = pictures(args.data, args.class_name)
        self.pipe = ptq4dm.load_reference("dit-cifar10", args.dtype or "float32", self.device)
        if make := MODELS[model]:
            ptq4dm.quantize(self.pipe, make())
        self.learned = learned_from(self.pipe, list(train[: args.images]))
        self.unseen = learned_from(self.pipe, list(test))
        self.schedule = schedule_of(self.pipe, self.device)
        g = torch.Generator().manual_seed(2**33)  # no run draws from it
        number = args.evaluation
        self.pictures = (torch.arange(number) % len(self.unseen)).tolist()
        self.t = ((torch.arange(number) * len(self.schedule.alpha)) // number).to(self.device)
        self.noise = torch.randn(number, *self.unseen.shape[1:], generator=g).to(self.device)

    def problem(self, seed: int, **settings) -> Problem:
        args = self.args
        config = ptq4dm.PersonalizeConfig(
            seed=seed,
            steps=args.steps,
            batch_size=args.batch_size,
            perturbations=args.perturbations,
            learning_rate=args.learning_rate,
            **settings,
        )
        return Problem(class_target(self.pipe, self.label, args.init), self.learned, self.schedule, config)

    def losses(self, u: torch.Tensor) -> torch.Tensor:
        """[number], float32, on the CPU, of held-out pictures."""
        problem = replace(self.problem(0, forward_batch=self.args.rows_at_once), images=self.unseen)
        given = problem.target.tables.rounded(u).expand(len(self.t), -1)
        return problem.losses(given, self.pictures, self.t, self.noise).cpu()

    def accuracy(self, u: torch.Tensor) -> float:
        """The share of samples of the learned class that the classifier takes for it."""
        model = self.pipe.transformer
        before = {n: p.detach().clone() for n, p in model.named_parameters() if "embedding_table" in n}
        with tempfile.TemporaryDirectory() as place:
            save_embedding(path := Path(place) / "row.safetensors", self.problem(0).target, u)
            ptq4dm.load_embedding(self.pipe, path)
        classifier, found = load_features(self.device), []
        for start in range(0, self.args.samples, self.args.rows_at_once):
            seeds = range(start, min(start + self.args.rows_at_once, self.args.samples))
            labels = {"class_labels": [self.label]}
            steps = self.args.sampler_steps
            images = ptq4dm.sample(self.pipe, seeds, num_inference_steps=steps, conditioning=labels)
            found.append(classifier(images.to(self.device) * 2 - 1).argmax(1) == self.label)
        for name, values in before.items():
            model.get_parameter(name).data.copy_(values)
        return float(torch.cat(found).float().mean())

    def own_row(self, u: torch.Tensor) -> torch.Tensor:
        tables = self.problem(0).target.tables
        return tables.unit([table.weight[self.label] for table in tables.tables])


def tuned(problem: Problem, arm: str) -> torch.Tensor:
    """The embedding [d] that an arm comes to."""
    config, state = problem.config, Tuned.start(problem.target.start)
    control = torch.Generator().manual_seed(config.seed + 2**34)
    for _ in progress_bar(range(config.steps), desc=arm):
        losses, directions = problem.pairs(state.u, problem.draw("step", state.step))
        if arm == "shuffled":
            rises = (losses[:, 1:] - losses[:, :1]).flatten()
            dealt = rises[torch.randperm(len(rises), generator=control).to(rises.device)]
            losses = torch.cat([torch.zeros_like(losses[:, :1]), dealt.view_as(losses[:, 1:])], 1)
        step = change(state, gradient(losses, directions, config.perturbation), config)
        if arm == "walk":
            other = torch.randn(len(step), generator=control).to(step)
            step = other * (step.norm() / other.norm())
        take(state, step, config)
    return state.average if config.average else state.u


def back_propagated(problem: Problem, steps: int, learning_rate: float) -> torch.Tensor:
    """The same by gradients: Adam on the loss of batches as large, on all timesteps."""
    u = problem.target.start.clone().requires_grad_()
    optimizer = torch.optim.Adam([u], learning_rate)
    problem.target.tables.tables[0].network.requires_grad_(False)
    for step in progress_bar(range(steps), desc=BACK):
        draw = problem.draw("step", step)
        with torch.enable_grad():
            loss = problem.errors(u.expand(len(draw.t), -1), draw.images, draw.t, draw.noise).mean()
            optimizer.zero_grad()
            loss.backward()
        optimizer.step()
    return u.detach()


def measure(bench: Bench, model: str, arm: str, seed: int) -> dict:
    args, start = bench.args, bench.problem(seed).target.start
    before = packed_bytes(bench.pipe)
    begun = time.monotonic()
    if arm == "start":
        u = start
    elif arm == "own row":
        u = bench.own_row(start)
    elif arm == BACK:
        u = back_propagated(bench.problem(seed, **SETTINGS[BACK]), args.back_steps, args.back_lr)
    else:
        u = tuned(bench.problem(seed, **ARMS[arm]), arm)
    settled(bench.device)
    seconds = time.monotonic() - begun
    losses, first = bench.losses(u), bench.losses(start)
    drop = first - losses
    found = {
        "loss": float(losses.mean()),
        "drop": float(drop.mean()),
        "drop_error": float(drop.std() / len(drop) ** 0.5),
        "drop_by_time": [float(part.mean()) for part in drop.tensor_split(10)],
        "moved": float((u - start).norm()),
        "seconds": round(seconds, 2),
        "unchanged": packed_bytes(bench.pipe) == before,
    }
    if arm in ARMS:
        found["steps_per_second"] = round(args.steps / seconds, 2)
    return found | ({"accuracy": bench.accuracy(u)} if args.samples else {})


def packed_bytes(pipe) -> str:
    """SHA-256 of all that the model's state is, tables of embeddings included."""
    digest = hashlib.sha256()
    for tensor in pipe.transformer.state_dict().values():
        digest.update(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def memory(bench: Bench, model: str) -> dict:
    """Peak bytes beyond nothing, on a GPU, of a step, of sampling as many rows, and of a step by gradients; speeds.

    Of batches of one image as the paper has, and of those of this comparison.
    """
    found: dict = {}
    bench.unseen = bench.noise = bench.t = torch.empty(0)  # what weighs, and is not of the work
    for name, b, n in (("one image", 1, 2), ("batch", bench.args.batch_size, bench.args.perturbations)):
        problem = bench.problem(0)
        problem.config = replace(problem.config, batch_size=b, perturbations=n)
        state, rows = Tuned.start(problem.target.start), b * (1 + n)
        labels = [bench.label] * rows

        def sampling(labels=labels) -> None:
            bench.pipe(labels, num_inference_steps=1, output_type="pt")

        works = {"step": partial(step_once, problem, state), "sampling": sampling}
        if model == "float32":
            works[BACK] = partial(back_propagated, problem, 1, 0.01)
        for what, work in works.items():
            found[f"{name}: {what}"] = measured(work, bench.device, bench.args.timed_seconds)
    return found


def measured(work, device: torch.device, least: float) -> dict:
    """{"peak_bytes", "per_second"} over so many seconds; bytes on a GPU only."""
    work()
    settled(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    begun, count = time.monotonic(), 0
    while count < 1 or time.monotonic() - begun < least:
        work()
        settled(device)
        count += 1
    seconds = time.monotonic() - begun
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
    return {"peak_bytes": peak, "per_second": round(count / seconds, 2)}


def settled(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def written(path: Path) -> list[dict]:
    """The lines that are there; half a line, of a process that was killed, does not count."""
    if not path.is_file():
        return []
    lines = path.read_text().split("\n")
    return [json.loads(line) for line in lines if line.startswith("{") and line.endswith("}")]


def commit() -> str:
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", help="folder or .tar.xz with train/<class>/ and test/<class>/")
    parser.add_argument("--output", type=Path, default=Path("out/zoodip.jsonl"))
    parser.add_argument("--rows", nargs="+", default=["*"], help="rows whose names fit one of these patterns")
    parser.add_argument("--share", default="1/1", help="i/n: of the rows every n-th, from the i-th on")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", help="of what is not packed; float32")
    parser.add_argument("--class-name", default="ship", choices=CLASSES)
    parser.add_argument("--init", default="mean", help="mean of the other rows, or the number of another class")
    parser.add_argument("--images", type=int, default=16)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--perturbations", type=int, default=8)
    parser.add_argument("--learning-rate", type=float, default=0.02)
    parser.add_argument("--back-steps", type=int, default=200)
    parser.add_argument("--back-lr", type=float, default=0.05)
    parser.add_argument("--evaluation", type=int, default=1000, help="held-out rows of the loss")
    parser.add_argument("--samples", type=int, default=256, help="pictures that the classifier looks at; 0: none")
    parser.add_argument("--sampler-steps", type=int, default=25)
    parser.add_argument("--rows-at-once", type=int, default=256)
    parser.add_argument("--timed-seconds", type=float, default=2.0, help="of each speed in the rows of memory")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--report", action="store_true", help="print the table of what is there")
    return parser.parse_args()


def main() -> None:
    args = parse()
    if args.report:
        print(report(written(args.output)))
        return
    if args.data is None:
        raise UserError("give --data, a folder or .tar.xz of CIFAR-10 as JPEG files.")
    device = check_device(args.device)
    if device.type == "cuda":
        torch.cuda.set_device(device.index or 0)
    settings = {name: value for name, value in vars(args).items() if name not in FREE}
    card = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    place, number = (int(part) for part in args.share.split("/"))
    wanted = [row for row in rows_of(args) if any(fnmatch.fnmatch(name_of(*row), one) for one in args.rows)]
    args.output.parent.mkdir(parents=True, exist_ok=True)
    benches: dict[str, Bench] = {}
    for model, arm, seed in wanted[place - 1 :: number]:
        name = name_of(model, arm, seed)
        if any(line["row"] == name and line["settings"] == settings for line in written(args.output)):
            continue
        if model not in benches:
            benches = {model: Bench(args, model)}  # one at a time is in memory
        with ready(benches[model].pipe):
            facts = memory(benches[model], model) if arm == "memory" else measure(benches[model], model, arm, seed)
        line = {"row": name, "model": model, "arm": arm, "seed": seed, **facts}
        line |= {"card": card, "torch": torch.__version__, "commit": commit(), "settings": settings}
        line["config"] = asdict(benches[model].problem(seed, **SETTINGS.get(arm, {})).config)
        if arm == "memory":
            benches = {}  # it has let go of the pictures
        with open(args.output, "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        shown = {k: v for k, v in facts.items() if k != "drop_by_time"}
        print(name, json.dumps(shown), flush=True)


def name_of(model: str, arm: str, seed: int) -> str:
    return f"{model} {arm}" if arm in ("start", "own row", "memory") else f"{model} {arm} {seed}"


if __name__ == "__main__":
    run(main)

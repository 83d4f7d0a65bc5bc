"""One model with the pictures to learn from and the held-out ones: the loss and the samples of an embedding."""

from __future__ import annotations

import argparse
import hashlib
import tempfile
from dataclasses import replace
from functools import cache
from pathlib import Path

import torch
from cifar10 import CLASSES, class_pictures
from zoodip_arms import MODELS, init_of

import ptq4dm
from ptq4dm.evaluation.features import load_features
from ptq4dm.pipelines.devices import check_device
from ptq4dm.training.personalization.embedding_file import save_embedding
from ptq4dm.training.personalization.pictures import learned_from
from ptq4dm.training.personalization.problem import Problem
from ptq4dm.training.personalization.targets import MEAN, NULL, class_target
from ptq4dm.training.schedule import even_times, schedule_of

pictures = cache(class_pictures)  # read once, for all models of a process


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
        self.rows = self.held_out(self.unseen, args.evaluation)
        self.near: int | None = None  # the nearest class, once it is asked for

    def held_out(self, images: torch.Tensor, number: int) -> tuple[list[int], torch.Tensor, torch.Tensor]:
        """(images, timesteps evenly over the whole schedule, noise) that no run draws."""
        g = torch.Generator().manual_seed(2**33)
        t = even_times(number, len(self.schedule.alpha)).to(self.device)
        noise = torch.randn(number, *images.shape[1:], generator=g).to(self.device)
        return [k % len(images) for k in range(number)], t, noise

    def problem(self, arm: str, seed: int, **settings) -> Problem:
        """What an arm minimises, from where it starts."""
        args = self.args
        config = ptq4dm.PersonalizeConfig(
            seed=seed,
            steps=args.steps,
            batch_size=args.batch_size,
            perturbations=args.perturbations,
            learning_rate=args.learning_rate,
            **{"weights": "size", **settings},
        )
        starts = {"": lambda: MEAN, ", null": lambda: NULL, ", near": lambda: str(self.nearest())}
        init = starts[init_of(arm)]()
        return Problem(class_target(self.pipe, self.label, init), self.learned, self.schedule, config)

    def nearest(self) -> int:
        """The class whose row has the least loss on the pictures to learn from."""
        if self.near is None:
            rows = self.held_out(self.learned, self.args.evaluation)
            losses = {k: self.losses(self.row(k), self.learned, rows).mean() for k in self.others()}
            self.near = min(losses, key=losses.__getitem__)
        return self.near

    def others(self) -> list[int]:
        return [k for k in range(len(CLASSES)) if k != self.label]

    def row(self, label: int) -> torch.Tensor:
        """The row [d] of a class that the model was trained with."""
        return class_target(self.pipe, self.label, str(label)).start

    def losses(self, u: torch.Tensor, images: torch.Tensor | None = None, rows: tuple | None = None) -> torch.Tensor:
        """[number], float32, on the CPU, of pictures that were not learned from, unless others are given."""
        images, (places, t, noise) = self.unseen if images is None else images, rows or self.rows
        problem = replace(self.problem("", 0, forward_batch=self.args.rows_at_once), images=images)
        given = problem.target.tables.rounded(u).expand(len(t), -1)
        return problem.losses(given, places, t, noise).cpu()

    def accuracy(self, u: torch.Tensor) -> float:
        """The share of samples of the learned class that the classifier takes for it."""
        model = self.pipe.transformer
        before = {n: p.detach().clone() for n, p in model.named_parameters() if "embedding_table" in n}
        with tempfile.TemporaryDirectory() as place:
            save_embedding(path := Path(place) / "row.safetensors", self.problem("", 0).target, u)
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

    def packed_bytes(self) -> str:
        """SHA-256 of all that the model's state is, tables of embeddings included."""
        digest = hashlib.sha256()
        for tensor in self.pipe.transformer.state_dict().values():
            digest.update(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()


def settled(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)

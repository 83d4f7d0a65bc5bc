"""The networks of a distillation on accelerate: who is trained, who is aimed at, and one step of an optimizer."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from ...errors import UserError
from ...files.crc import checksum
from ...files.outside import TensorFile, finite, read_tensors
from ...files.places import make_parent
from ...files.tensors import write_tensors
from ...layers.shift.convert import to_floats, to_integers
from ...layers.shift.widths import Widths
from ...training.task import seed_of
from .config import DisBackConfig

TRAINED = ("student", "fake")
KEPT = ("student", "average", "fake")  # what a checkpoint holds; the target can be had from the path


class Networks:
    """Four copies of the teacher: student and fake are trained, target is frozen, average follows the student.

    `nets` are the modules themselves; `call` holds them as they are to be called: with autocast, compiled, and
    synchronized where there are several processes.

    Args:
        folder: where the points of the path are: path/00001.safetensors and so on; point 0 is the teacher.
    """

    def __init__(self, teacher: nn.Module, config: DisBackConfig, accelerator: Accelerator, folder: Path) -> None:
        self.teacher, self.config, self.accelerator, self.folder = teacher, config, accelerator, folder
        # Dropout would be noise in the scores, and in a generator of one step: evaluation mode throughout.
        self.nets = {
            role: copy.deepcopy(teacher).to(accelerator.device).eval().requires_grad_(role in TRAINED)
            for role in ("student", "average", "fake", "target")
        }
        if config.bits < 16:
            for role in ("student", "average"):
                to_integers(self.nets[role], Widths(config.bits, config.bits, config.bits))
        self.optimizers = {
            f"{role}_optimizer": torch.optim.AdamW(
                self.nets[role].parameters(), lr=0.0, betas=config.betas, weight_decay=0.0, fused=True
            )
            for role in TRAINED
        }
        self.call = {
            role: accelerator.prepare_model(self.nets[role], evaluation_mode=role not in TRAINED)
            for role in ("student", "fake", "target")
        }
        self.target_index = 0

    def result(self) -> nn.Module:
        """The average of the student's weights, in plain layers."""
        if self.config.bits == 16:
            return self.nets["average"]
        plain = copy.deepcopy(self.nets["average"])
        to_floats(plain)
        return plain

    @property
    def kept(self) -> dict[str, nn.Module]:
        return {role: self.nets[role] for role in KEPT}

    def descend(self, role: str, step: int, parts: list, loss_of: Callable) -> Tensor:
        """One step of a role's optimizer down the mean of loss_of(part); returns this mean, still on the device."""
        net, optimizer, config = self.call[role], self.optimizers[f"{role}_optimizer"], self.config
        if config.bits < 16:  # gradients are rounded at random, and the step alone decides how
            torch.manual_seed(seed_of(config.seed, step, role, "rounding", self.accelerator.process_index))
        total = torch.zeros((), device=self.accelerator.device)
        for i, part in enumerate(parts):
            with nullcontext() if i + 1 == len(parts) else self.accelerator.no_sync(net):
                loss = loss_of(part) / len(parts)
                self.accelerator.backward(loss)
            total += loss.detach()
        nn.utils.clip_grad_norm_(self.nets[role].parameters(), config.gradient_clip)
        for group in optimizer.param_groups:
            group["lr"] = getattr(config, f"{role}_lr") * min(1.0, (step + 1) / config.warmup_steps)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return total

    @torch.no_grad()  # or the average would be part of a graph that grows with every step
    def follow(self, step: int) -> None:
        """Move the average a little towards the student."""
        keep = min(self.config.ema_decay, (1 + step) / (10 + step))
        average, student = (list(self.nets[role].parameters()) for role in ("average", "student"))
        torch._foreach_lerp_(average, student, 1 - keep)

    def keep_path_point(self, index: int) -> None:
        """Write the fake score of this moment as a point of the path."""
        if self.accelerator.is_main_process:
            path = self._point(index)
            make_parent(path)
            weights = {k: v.cpu().contiguous() for k, v in self.nets["fake"].state_dict().items()}
            checks = {name: checksum(tensor) for name, tensor in weights.items()}
            write_tensors(path, weights, {"checks": json.dumps(checks)})

    def aim(self, index: int) -> None:
        """Make a point of the path the target."""
        if index == self.target_index:
            return
        self.nets["target"].load_state_dict(self._point_weights(index) if index else self.teacher.state_dict())
        self.target_index = index

    def _point_weights(self, index: int) -> dict[str, Tensor]:
        """The weights of a point of the path. Raises UserError where it is missing, DamagedFile if it is broken."""
        path, known = self._point(index), self.teacher.state_dict()
        if not path.is_file():
            raise UserError(f"{path}, a point of the way back to the teacher, is missing; start anew.")

        def whole(file: TensorFile) -> dict[str, Tensor]:
            weights = {name: finite(tensor, name) for name, tensor in file.tensors().items()}
            if strange := weights.keys() ^ known.keys():
                raise ValueError(f"'{min(strange)}' is missing in it, or does not belong there")
            for name, tensor in weights.items():
                if tensor.shape != known[name].shape or tensor.dtype != known[name].dtype:
                    raise ValueError(f"'{name}' is {list(tensor.shape)} {tensor.dtype}")
                if "checks" in file.header and file.json("checks").get(name) != checksum(tensor):
                    raise ValueError(f"'{name}' is not what was written")
            return weights

        return read_tensors(path, whole, "start anew")

    def finite(self) -> bool:
        """True if all weights are free of NaN and infinity; waits for the device."""
        weights = [p for net in self.kept.values() for p in net.parameters()]
        return bool(torch.stack(torch._foreach_norm(weights)).isfinite().all())

    def _point(self, index: int) -> Path:
        return self.folder / "path" / f"{index:05d}.safetensors"

"""Records of a distillation run: lines of JSON, feature-FID of its student, sample grids."""

from __future__ import annotations

from itertools import chain
from pathlib import Path

import torch

from ...annotations import fits
from ...errors import UserError
from ...evaluation.feature_fid import FeatureFID
from ...evaluation.features import IMAGE_SIZE
from ...files.log import read_lines
from ...files.outside import described
from ...files.places import make_parent
from ...pipelines.images import image_grid, save_picture, to_uint8

GRID = 64  # pictures on a grid
EVALUATION_BATCH = 500
NUM_FID = 5000
COUNTS = ("step", "images", "degraded_images", "num_images", "target")


def read_log(path: str | Path) -> list[dict]:
    """The lines of a log.jsonl, see `read_lines`. Raises DamagedFile."""
    return read_lines(path, _check_numbers)


def _check_numbers(line: dict) -> None:
    """Raises ValueError where a line's counts are no whole numbers from 0, or its figures are not finite.

    A run with other losses gave up, so none is in a log.
    """
    needed = ("images",) if line["stage"] == "evaluation" else ()
    for name, value in line.items():
        if name in COUNTS and not (fits(value, int) and value >= 0):
            raise ValueError(f"a line tells of {described(value)} as its '{name}'")
        if name == "feature_fid" and not fits(value, float):
            raise ValueError(f"a line's '{name}' is {described(value)}")
        if isinstance(value, (int, float)) and not fits(value, bool | float):
            raise ValueError(f"a line's '{name}' is {described(value)}")
    if missing := [name for name in needed if name not in line]:
        raise ValueError(f"a line of an evaluation has no '{missing[0]}'")


class Exhibition:
    """The student on a fixed noise: feature-FID and a grid of samples, the same images at every visit."""

    def __init__(self, diffusion, shape: tuple[int, int, int], classes: int | None, config, device) -> None:
        self.diffusion, self.device = diffusion, device
        self.pictures = shape[0] in (1, 3)
        fits = shape == (3, IMAGE_SIZE, IMAGE_SIZE)
        self.num_fid = NUM_FID * fits if config.num_fid is None else config.num_fid
        if self.num_fid:
            if not fits:
                raise UserError(
                    f"feature-FID is of {IMAGE_SIZE}x{IMAGE_SIZE} RGB images; this model makes {shape[2]}x{shape[1]} "
                    f"with {shape[0]} channels: set num_fid to 0."
                )
            self.measure = FeatureFID(device)
        number = max(self.num_fid, GRID)
        # Not the noise of generate and evaluate, which goes by seeds, so nothing can be tuned to it.
        self.z = torch.randn(number, *shape, generator=torch.Generator().manual_seed(config.seed + 2**31))
        self.labels = None if classes is None else torch.arange(number) % classes

    @torch.no_grad()
    def visit(self, net, picture: Path) -> float | None:
        """feature-FID of the student over num_fid images (None: not asked for); the first of them as a grid."""
        if not (self.pictures or self.num_fid):
            return None
        batches = self._batches(net)
        first = next(batches)
        figure = self.measure(chain([first], batches)) if self.num_fid else None
        grid = first[:GRID].expand(-1, 3, -1, -1).cpu()
        make_parent(picture)
        save_picture(image_grid(grid, 8, max(1, 64 // grid.shape[-1])), picture)
        return figure

    def _batches(self, net):
        """Images [B, C, H, W] uint8: those of the figure, or as many as the grid takes."""
        number = self.num_fid or GRID
        for start in range(0, number, EVALUATION_BATCH):
            rows = slice(start, min(start + EVALUATION_BATCH, number))
            labels = None if self.labels is None else self.labels[rows].to(self.device)
            images = self.diffusion.generate(net, self.z[rows].to(self.device), labels)
            yield to_uint8((images / 2 + 0.5).clamp(0, 1))

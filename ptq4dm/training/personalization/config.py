"""Settings of zeroth-order personalization."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from ...checks import check_fields, named_options
from ...errors import UserError
from ...options import option

MOST = 10_000_000
SUBSPACES = ("paper", "released", "none")
WEIGHTS = ("equal", "size")
FREE = ("steps", "forward_batch", "log_every", "checkpoint_every")  # what may change when a run goes on


@named_options
@dataclass(frozen=True)
class PersonalizeConfig:
    """How an embedding is tuned by forward passes: ZOODiP, arXiv:2503.14868, algorithm 1.

    The embedding is tuned in units of its table's own root mean square, so that the same settings serve tables of any
    size. The paper's perturbation of 1e-3 and learning rate of 5e-3 are about 0.07 and 0.36 in these units if the
    tokens of CLIP ViT-L have 0.014, which we have not measured. On class rows in 8 and 4 bits 0.03 to 0.07 measured
    best: smaller ones drown in the rounding of activations, larger ones see the loss's curvature.

    steps: updates of the embedding. All take 72,000 rows of forward passes, those of the paper 90,000.
    batch_size: images of a step, each with noise, a timestep and perturbations of its own. The paper has 1.
    perturbations: n, of each image; a step takes batch_size x (n + 1) forward passes, in one batch.
    first_time, last_time: T_L and T_U, as shares of the schedule: timesteps are uniform between them ("partial
        uniform"). None: as schedule.py has it for the model.
    weights: "size": an image counts as much as perturbations change its loss, as in the paper, which has one image a
        step; "equal": each image's changes are divided by their root mean square. Early timesteps of pixels have
        large changes that say little.
    subspace: "paper": directions in which the last `buffer` embeddings hardly moved are taken out of the gradient;
        "released": the same as the authors' code has it, which also divides the gradient by sqrt((d + n - 1) / n),
        d the number of directions left; "none": the whole gradient.
    buffer: tau, how many embeddings that looks at; at most a sixth of the embedding's numbers (our assumption: the
        paper has 128 of 768).
    variance: nu, the share of the embeddings' variance that is taken for noise.
    average: of the moving average of embeddings, which is what is saved; 0 saves the last one, as the paper does.
    forward_batch: at most so many rows in one forward pass, for less memory; None: all that a step takes.
    """

    steps: int = option(1000, "updates of the embedding", low=1, high=MOST)
    batch_size: int = option(8, "images of a step, each with its own noise and timestep", low=1, high=65536)
    perturbations: int = option(8, "perturbations of the embedding for each image", low=1, high=65536)
    perturbation: float = option(0.07, "size of one, in units of the embeddings' root mean square", low=1e-6, high=10)
    learning_rate: float = option(0.02, "of Adam, in the same units", low=1e-9, high=10)
    betas: tuple[float, float] = option((0.9, 0.999), low=0)
    epsilon: float = option(1e-8, low=0)
    first_time: float | None = option(None, "share of the schedule where timesteps begin", low=0, high=1)
    last_time: float | None = option(None, "where they end (0.5 to 0.9; of pixels 0.1 to 0.5)", low=0, high=1)
    weights: str = option(
        "equal", "of a step's images: equal, or by the size of their losses' changes", choices=WEIGHTS
    )
    subspace: str = option("paper", "directions taken out of the gradient", choices=SUBSPACES)
    buffer: int = option(128, "embeddings that the subspace is found from", low=2, high=MOST)
    variance: float = option(1e-3, "share of their variance taken for noise", low=0, high=1)
    average: float = option(0.98, "of the moving average that is saved; 0: the last embedding", low=0)
    forward_batch: int | None = option(None, "rows of one forward pass; all of a step's", low=1, high=MOST)
    log_every: int = option(100, "steps between losses on the fixed set", low=1, high=MOST)
    checkpoint_every: int = option(100, "steps between checkpoints", low=1, high=MOST)
    seed: int = option(0, "of all noise", low=0)

    def __post_init__(self) -> None:
        check_fields(self, "PersonalizeConfig")
        if (self.first_time is None) != (self.last_time is None):
            raise UserError("first_time and last_time are given together, or not at all.")
        if self.first_time is not None and self.last_time is not None and not self.first_time < self.last_time:
            raise UserError(f"first_time must be before last_time; got {self.first_time:g} and {self.last_time:g}.")
        if max(self.betas) >= 1:
            raise UserError(f"betas are at least 0 and below 1; got {self.betas[0]:g} and {self.betas[1]:g}.")
        if not self.average < 1:
            raise UserError(f"average is at least 0 and below 1; got {self.average:g}.")

    def identity(self) -> dict:
        """Settings that have to be the same for a run to go on, as plain JSON values."""
        values = {name: value for name, value in asdict(self).items() if name not in FREE}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}

"""DisBack: a diffusion model becomes a one-step generator on the way back from student to teacher.

"Distribution Backtracking Builds A Faster Convergence Trajectory for One-step Diffusion Distillation", Zhang et al.,
arXiv:2408.15991. Score distillation pulls the generator G towards a target score by its difference to the score of
G's own images, which a second network, the fake score, has to learn. At first the teacher knows little about images
as poor as G_0's. So

    stage 1, degradation recording (algorithm 1): a copy s' of the teacher is trained on images of the frozen G_0; its
        checkpoints s'_0 (the teacher), s'_1, ..., s'_N lead from the teacher to G_0's own score;
    stage 2, distribution backtracking (algorithm 2): the fake score starts at s'_N, and the target walks back
        s'_{N-1}, ..., s'_0; generator and fake score are trained in turn.

Without stage 1 the target is the teacher from the start: Diff-Instruct (arXiv:2305.18455) with DMD's weights.
"""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import torch

from ...checks import checked
from ...pipelines.denoiser import check_pipeline, denoiser
from ...training.random_state import own_random_state
from .config import DisBackConfig
from .run import Run, alone_in, check_teacher


@checked
def distill(
    pipe, config: DisBackConfig | None = None, folder: str | os.PathLike = "out/distillation", resume: bool = False
):
    """Distil a pipeline's denoiser; returns a pipeline that samples with num_inference_steps=1.

    Nothing but the teacher is needed, no images. Under `accelerate launch` every process calls this alike, with the
    teacher on its own device; the batch is shared out and the result is the same up to rounding.

    Args:
        pipe: a pixel-space pipeline whose unet or transformer predicts noise, data, or a velocity (of diffusion or of
            flow matching), unconditional or class-conditional, in float32. Its denoiser is not changed.
        folder: of checkpoint, path, log and sample grids; new, or with `resume` that of an earlier call with the same
            config, budgets and learning rates aside, which then goes on as if it had never stopped: on a CPU bit for
            bit, on a GPU as far as its kernels repeat themselves.

    Raises:
        UserError: a teacher that cannot be distilled, a folder in use, nothing to resume, a checkpoint of another
            config or teacher, or a training that came to NaN or infinity (the last good checkpoint is kept).
    """
    check_pipeline(pipe)
    config, folder = config or DisBackConfig(), Path(folder)
    check_teacher(pipe, config)
    tuned = torch.backends.cudnn.flags(enabled=True, benchmark=True, allow_tf32=True)
    with alone_in(folder, pipe, config, resume), tuned, own_random_state(denoiser(pipe).device):
        run = Run(pipe, config, folder, resume)
        if run.config.backtracking:
            record_degradation(run)
        if not run.out_of_time:
            backtrack(run)
    return run.student()


def record_degradation(run: Run) -> None:
    """Stage 1: fit s', in the place of the fake score, to the frozen generator; keep N checkpoints of the way."""
    config, diffusion, progress = run.config, run.diffusion, run.progress
    networks = run.networks
    generator, fake = networks.call["student"], networks.call["fake"]
    points = [round(config.degradation_steps * k / config.path_points) for k in range(1, config.path_points + 1)]

    def fake_loss(part):
        with torch.no_grad():
            x0 = diffusion.generate(generator, part.z, part.labels)
        return diffusion.denoising_loss(fake, x0, part)

    with run.iterations(1, config.degradation_steps) as iterations:
        for step in iterations:
            loss = networks.descend("fake", step, run.parts("degradation", step), fake_loss)
            progress.degraded += 1
            run.note(1, fake_loss=loss)
            if progress.degraded in points:
                networks.keep_path_point(points.index(progress.degraded) + 1)
                run.save(1)


def backtrack(run: Run) -> None:
    """Stage 2: the generator follows the target back to the teacher, and the fake score follows the generator."""
    config, diffusion, progress = run.config, run.diffusion, run.progress
    networks = run.networks
    generator, fake, target = (networks.call[role] for role in ("student", "fake", "target"))
    generated: list[torch.Tensor] = []

    def generator_loss(part):
        x0 = diffusion.generate(generator, part.z, part.labels)
        generated.append(x0.detach())
        pull = diffusion.score_difference(fake, target, x0.detach(), part)
        return (x0 - (x0.detach() - pull)).square().mean() / 2  # whose gradient is the pull

    def fake_loss(pair):
        return diffusion.denoising_loss(fake, *pair)

    def images_for_fake(step, turn, parts):
        """(x_0, what to noise it with) of each part: first the generator's own images, after that new ones."""
        fresh = run.parts("fake", step, turn)
        if turn == 0:
            pairs = zip(generated, parts, fresh, strict=True)
            return [(x0, replace(new, z=old.z, labels=old.labels)) for x0, old, new in pairs]
        with torch.no_grad():
            return [(diffusion.generate(generator, part.z, part.labels), part) for part in fresh]

    if progress.step == 0:
        run.show()
    with run.iterations(2, -(-config.images // config.batch_size)) as iterations:
        for step in iterations:
            networks.aim(target_of(config, step))
            parts = run.parts("student", step)
            generated.clear()
            student_loss = networks.descend("student", step, parts, generator_loss)
            networks.follow(step)
            for turn in range(config.fake_steps):
                done = progress.degraded + step * config.fake_steps + turn
                fitted = networks.descend("fake", done, images_for_fake(step, turn, parts), fake_loss)
            progress.step += 1
            run.note(2, student_loss=student_loss, fake_loss=fitted)
            if progress.step % max(1, config.evaluate_every // config.batch_size) == 0:
                run.show()
                run.save(2)


def target_of(config: DisBackConfig, step: int) -> int:
    """Index of the point of the path that iteration `step` of stage 2 aims at; 0 is the teacher."""
    return max(0, config.path_points - 1 - step // config.switch_every) if config.backtracking else 0

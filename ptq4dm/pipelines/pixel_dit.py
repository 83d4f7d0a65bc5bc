"""A class-conditional diffusion transformer in pixel space (DiT, arXiv:2212.09748) as a diffusers pipeline.

diffusers' own DiTPipeline denoises the latents of a VAE, with classifier-free guidance. This one denoises
pixels; without guidance, as by default, it takes one forward pass per step.
"""

# No `from __future__ import annotations` here: diffusers compares loaded parts with the annotations of
# __init__, and not every version of it resolves them from strings.
import inspect
from collections.abc import Sequence

import diffusers
import torch
from diffusers import DiffusionPipeline, DiTTransformer2DModel, ImagePipelineOutput, SchedulerMixin
from diffusers.utils.torch_utils import randn_tensor

from ..checks import shown
from ..errors import UserError
from .stepping import model_input, noise_scale, set_steps


class PixelDiTPipeline(DiffusionPipeline):
    """Pixel-space, class-conditional DiT with any diffusers scheduler.

    Args:
        transformer: predicts the scheduler's target for images in [-1, 1]. Of twice as many output as input
            channels (a learned variance) the first half is used.
        scheduler: any diffusers scheduler.
    """

    model_cpu_offload_seq = "transformer"

    def __init__(self, transformer: DiTTransformer2DModel, scheduler: SchedulerMixin):
        super().__init__()
        if not (transformer is None or isinstance(transformer, torch.nn.Module)):
            raise UserError(f"transformer must be a network; got {shown(transformer)}.")
        if not (scheduler is None or hasattr(scheduler, "set_timesteps")) or isinstance(scheduler, type):
            raise UserError(f"scheduler must be a diffusers scheduler; got {shown(scheduler)}.")
        self.register_modules(transformer=transformer, scheduler=scheduler)

    @property
    def num_classes(self) -> int:
        # The embedding table has one row more: the null class of classifier-free guidance, no label of ours.
        return self.transformer.config.num_embeds_ada_norm

    def check_labels(self, class_labels: Sequence[int] | torch.Tensor) -> torch.Tensor:
        """int64 [B], on the device; UserError unless all are whole numbers in [0, num_classes)."""
        try:
            labels = torch.as_tensor(class_labels)
        except (TypeError, ValueError, RuntimeError, OverflowError):
            raise UserError("class_labels must be a list of whole numbers, one per image.") from None
        if labels.is_floating_point() or labels.dtype == torch.bool or labels.ndim != 1 or not len(labels):
            raise UserError("class_labels must be a list of whole numbers, one per image.")
        wrong = labels[(labels < 0) | (labels >= self.num_classes)]
        if len(wrong):
            raise UserError(f"class label {int(wrong[0])} is outside [0, {self.num_classes}).")
        return labels.to(self._execution_device, torch.int64)

    @torch.no_grad()
    def __call__(
        self,
        class_labels: Sequence[int] | torch.Tensor,
        generator: torch.Generator | list[torch.Generator] | None = None,
        num_inference_steps: int = 50,
        eta: float = 0.0,
        guidance_scale: float = 1.0,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> ImagePipelineOutput | tuple:
        """Generate one image per label.

        Args:
            class_labels: [B] labels in [0, num_classes).
            generator: one generator, or a list with one for every image.
            eta: noise of DDIM (0: deterministic); used only by schedulers whose step takes it.
            guidance_scale: w of classifier-free guidance (arXiv:2207.12598), u + w (c - u) of the predictions without
                and with the class, from one forward pass of twice the rows; 1: without. For models that were trained
                on images without their class, too.
            output_type: "pil", "np" (float32 [B,H,W,3]) or "pt" (float [B,3,H,W]), the latter two in [0, 1].

        Raises:
            UserError: a label out of range, a list of generators of another length, an unknown output_type.
        """
        labels = self.check_labels(class_labels)
        if isinstance(generator, list) and len(generator) != len(labels):
            raise UserError(f"{len(generator)} generators were given for {len(labels)} class labels.")
        if output_type not in ("pil", "np", "pt"):
            raise UserError(f"output_type must be 'pil', 'np' or 'pt', not '{output_type}'.")

        device, model = self._execution_device, self.transformer
        channels, size = model.config.in_channels, model.config.sample_size
        shape = (len(labels), channels, size, size)
        x = randn_tensor(shape, generator=generator, device=device, dtype=model.dtype)
        set_steps(self.scheduler, num_inference_steps, device)
        x = x * noise_scale(self.scheduler)
        taken = inspect.signature(self.scheduler.step).parameters
        extra = {k: v for k, v in {"generator": generator, "eta": eta}.items() if k in taken}
        for t in self.progress_bar(self.scheduler.timesteps):
            inputs = model_input(self.scheduler, x, t).to(model.dtype)
            output = guided_prediction(model, inputs, t.expand(len(labels)), labels, guidance_scale)[:, :channels]
            x = self.scheduler.step(output, t, x, **extra).prev_sample

        images = (x / 2 + 0.5).clamp(0, 1)
        if output_type != "pt":
            images = images.float().cpu().permute(0, 2, 3, 1).numpy()
            if output_type == "pil":
                images = self.numpy_to_pil(images)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)


def guided_prediction(
    model: torch.nn.Module, inputs: torch.Tensor, times: torch.Tensor, labels: torch.Tensor, scale: float
) -> torch.Tensor:
    """What a class-conditional DiT predicts for inputs [B, C, H, W] at times [B] with labels [B], guided.

    u + w (c - u) with w = scale, from one forward pass of twice the rows; c alone where it is 1.
    """
    if scale == 1:
        return model(inputs, timestep=times, class_labels=labels).sample
    labels = torch.cat([torch.full_like(labels, model.config.num_embeds_ada_norm), labels])
    output = model(torch.cat([inputs, inputs]), timestep=torch.cat([times, times]), class_labels=labels).sample
    without, given = output.chunk(2)
    return without + scale * (given - without)


# DiffusionPipeline.from_pretrained looks up the class that model_index.json names on the diffusers module: it
# must be there for a saved pipeline to load by itself.
diffusers.PixelDiTPipeline = PixelDiTPipeline

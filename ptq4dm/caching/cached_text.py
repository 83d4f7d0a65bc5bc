"""Keys and values of the text, computed once for a prompt and reused in every step and guidance half.

Cross-attention looks at the text, which stays the same while a picture is sampled; so do its keys and values. They
are kept in 4 bits per head (kernels/formats/kv4.py), and attention reads them so: QServe's KV4 (arXiv:2405.04532) on
what a diffusion model has of a cache of keys and values. The transform "smooth-attention" makes keys fit for it;
four_bits.py rounds them.

    with ptq4dm.cached_text(pipe) as cache:
        pipe("a red barn")
    print(cache)

Nothing of it is ever stale. A layer's keys and values are those of the text [B, L, C] that the layer is given, known
by its values to the bit, and of its projections as they are now: other weights, adapters, scales of adapters, dtypes,
devices or autocast compute them anew (state.py says what cannot be seen). Everything is forgotten when another call
of the pipeline sets its scheduler's timesteps, and at the end of the block.

Once in a forward pass the text is compared with a copy of it, on its device; the host waits for the answer, so it
works in no CUDA graph, and in a compiled model each layer's look-up breaks the graph. The copy is all that is kept in
the model's dtype.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from torch import nn

from ..annotations import plain_number
from ..checks import shown
from ..errors import UserError
from ..interrupts import uninterrupted
from ..pipelines.denoiser import denoisers_by_prefix, pipelines_in, schedulers_of, turn_at
from .processors import CachedText, why_not
from .text_cache import TextCache

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

BITS = (4, 16)


@contextmanager
def cached_text(target: DiffusionPipeline | nn.Module, bits: int | None = 4) -> Iterator[TextCache]:
    """A `TextCache` that serves the cross-attention of a pipeline's denoisers, or of a model, in the `with` block.

    bits: of a key or a value. 4: codes with a 16-bit scale and zero for each token and head; 16: where the model
        computes in float32, float16; None: as they are computed, which gives the same pictures to the bit.

    Self-attention, other threads' verbs (they wait) and the model after the block are as before. Known are
    `Attention` of diffusers with its plain processors (UNet2DConditionModel, PixArt, Sana) and `WanAttention` without
    keys of an image; the cache's `left` says what else a model has. Where hooks are on projections, as offloading has
    them, keys and values are computed in every call, in the same bits, and kept for none.

    Raises:
        UserError: there is no cross-attention that is known, bits is another number, or a model is called with
            gradients enabled.
    """
    bits = plain_number(bits)
    if bits is not None and not (type(bits) is int and bits in BITS):
        raise UserError(f"cached_text: bits must be 4, 16 or None (as computed); got {shown(bits)}.")
    models = denoisers_by_prefix(target, "what is sampled with cached_text")
    with turn_at(target):
        cache, found = _prepared(target, models, bits)
        try:
            with uninterrupted():
                for attn in found:
                    attn.processor = CachedText(attn, cache)
            yield cache
        finally:
            with uninterrupted():
                for attn in found:
                    if isinstance(attn.processor, CachedText) and attn.processor.cache is cache:
                        attn.processor = attn.processor.original
                cache.clear()


def _prepared(
    target: DiffusionPipeline | nn.Module, models: dict[str, nn.Module], bits: int | None
) -> tuple[TextCache, list[nn.Module]]:
    """An empty cache, with names of what it serves and leaves, and the attention modules that it will serve."""
    clocks = []
    if not isinstance(target, nn.Module):
        clocks = [clock for one in pipelines_in(target) for clock in schedulers_of(one).values()]
    cache, found = TextCache(bits, clocks), []
    for prefix, model in models.items():
        for name, module in model.named_modules():
            if not getattr(module, "is_cross_attention", False) or not hasattr(module, "processor"):
                continue
            if why := why_not(module):
                cache.left[prefix + name] = why
            else:
                cache.layers.append(prefix + name)
                found.append(module)
    if not found:
        what = ", ".join(type(getattr(model, "_orig_mod", model)).__name__ for model in models.values())
        name, why = next(iter(cache.left.items()), ("", ""))
        raise UserError(
            f"{what} has no cross-attention whose text can be kept: "
            + (
                f"'{name}' is left, for {why}."
                if name
                else "it is known of Attention and WanAttention of diffusers, and in joint attention keys of a text "
                "change with the picture."
            )
        )
    return cache, found

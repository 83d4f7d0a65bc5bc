"""The down projection of layers that share an input, which the first of them holds."""

from __future__ import annotations

import torch
from safetensors import safe_open
from torch import Tensor, nn


def fetched_down(lender: nn.Module, device: torch.device) -> Tensor | None:
    """Another layer's down projection, back from where offloading layer by layer has put it away in the meantime."""
    down = lender.down
    if down is None:
        return None
    if "_diffusers_hook" in vars(lender):
        hook = lender._diffusers_hook.get_hook("group_offloading")
        if hook is not None and getattr(hook.group, "_is_offloaded_to_disk", False):  # what is in memory is noise
            with safe_open(hook.group.safetensors_file_path, "pt", device=str(device)) as file:
                return file.get_tensor(hook.group.tensor_to_key[down])
    if down.device == device:
        return down
    if down.is_meta:  # accelerate's; the values are in its hook
        hook = lender._hf_hook
        hooks = getattr(hook, "hooks", [hook])
        down = next(one.weights_map["down"] for one in hooks if getattr(one, "weights_map", None) is not None)
    return down.to(device)

"""Graphs without a GPU: PyTorch's operations on the tensors at hand are written down, and run again.

Like a CUDA graph this knows memory and operations and nothing of Python: which way the code went, which numbers it
saw and which tensors it read are those of the capture.
"""

from contextlib import contextmanager

import torch
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

VALUE = torch.ops.aten._local_scalar_dense.default
FRESH = torch.ops.aten.lift_fresh.default


class Written(TorchDispatchMode):
    """What was called with what, in order; no tensor of it is let go, so that its id stays its own."""

    def __init__(self):
        super().__init__()
        self.calls, self.made, self.fixed = [], {}, set()

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        read = [id(one) for one in pytree.tree_leaves((args, kwargs)) if isinstance(one, torch.Tensor)]
        known = operation is FRESH or bool(read) and all(one in self.fixed for one in read)
        if operation is VALUE and not known and any(one in self.made for one in read):
            raise RuntimeError("a value is read back in the middle of a capture")
        result = operation(*args, **(kwargs or {}))
        self.calls.append((operation, args, kwargs or {}, result))
        for one in pytree.tree_leaves(result):
            if isinstance(one, torch.Tensor):
                self.made[id(one)] = one
                if known:
                    self.fixed.add(id(one))
        return result

    def run_again(self, leaves):
        """What leaves of the capture's result are now."""
        now = {}

        def mapped(one):
            return now.get(id(one), one)

        for operation, args, kwargs, result in self.calls:
            args, kwargs = pytree.tree_map(mapped, (args, kwargs))
            made = operation(*args, **kwargs)
            for old, new in zip(pytree.tree_leaves(result), pytree.tree_leaves(made), strict=True):
                if isinstance(old, torch.Tensor):
                    now[id(old)] = new
        return [mapped(one) for one in leaves]


class TracedGraphs:
    def __init__(self, device=None):
        self.captures = 0
        self.fails = ""

    def place(self, tensor, strides):
        return torch.empty_strided(tensor.shape, strides, dtype=tensor.dtype).copy_(tensor)

    def capture(self, function):
        if self.fails:
            raise RuntimeError(self.fails)
        self.captures += 1
        function()
        with torch.no_grad(), Written() as written:
            leaves, structure = pytree.tree_flatten(function())
        outputs = [one.clone() if isinstance(one, torch.Tensor) else one for one in leaves]

        def replay():
            with torch.no_grad():
                for place, made in zip(outputs, written.run_again(leaves), strict=True):
                    if isinstance(made, torch.Tensor):
                        place.copy_(made)

        return replay, structure.unflatten(outputs)

    @contextmanager
    def turn(self):
        yield

    def emptied(self):
        pass

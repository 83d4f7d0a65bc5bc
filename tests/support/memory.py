"""What compute-sanitizer does on a GPU, in Triton's interpreter: kernels touch only the tensors they are given."""

import numpy as np


def span(tensor):
    """(first byte, byte past the last) of what a tensor shows of its storage."""
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.element_size() * (tensor.numel() > 0)


def merged(spans):
    """(starts, ends) in order, overlapping ones as one."""
    found = []
    for start, end in sorted(spans):
        if found and start <= found[-1][1]:
            found[-1][1] = max(end, found[-1][1])
        else:
            found.append([start, end])
    return np.array(found, dtype=np.uint64).reshape(-1, 2).T


def watch(interpreter, patch):
    """Let each load and store of every launch be checked; `patch` is pytest's MonkeyPatch."""
    executor, builder = interpreter.GridExecutor, interpreter.InterpreterBuilder
    begin, load, store = executor._init_args_hst, builder.create_masked_load, builder.create_masked_store
    given = {}

    def to_host(self, args, kwargs):
        args, kwargs = begin(self, args, kwargs)
        tensors = [getattr(value, "base", value) for value in (*args, *kwargs.values())]
        given["spans"] = merged([span(tensor) for tensor in tensors if hasattr(tensor, "data_ptr")])
        return args, kwargs

    def check(pointers, mask, what):
        touched = np.asarray(pointers.data)[np.broadcast_to(mask.data, np.shape(pointers.data)).astype(bool)]
        starts, ends = given["spans"]
        size = np.uint64(max(1, pointers.get_element_ty().primitive_bitwidth // 8))
        place = np.searchsorted(starts, touched, side="right") - 1
        outside = (place < 0) | (touched + size > ends[np.maximum(place, 0)])
        if outside.any():
            raise IndexError(f"a {what} of {int(outside.sum())} addresses that are in none of the kernel's tensors")

    def checked_load(self, pointers, mask, *rest, **more):
        check(pointers, mask, "load")
        return load(self, pointers, mask, *rest, **more)

    def checked_store(self, pointers, value, mask, *rest, **more):
        check(pointers, mask, "store")
        return store(self, pointers, value, mask, *rest, **more)

    patch.setattr(executor, "_init_args_hst", to_host)
    patch.setattr(builder, "create_masked_load", checked_load)
    patch.setattr(builder, "create_masked_store", checked_store)

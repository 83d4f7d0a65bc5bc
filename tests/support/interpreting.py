"""Triton's interpreter, several times as fast, with the same results: what it does anew in each call is done once."""

import functools


def hasten(interpreter, patch):
    """Take two things out of every operation; `patch` is pytest's MonkeyPatch.

    A call of a jitted helper from a kernel puts the interpreter's functions into `triton.language` again, where the
    launch has put them already; and each value looks up its numpy dtype in a dictionary that is made for it.
    """
    begin, restore = interpreter._patch_lang, interpreter._LangPatchScope.restore
    inside = {}  # scope of a launch that has not ended -> the modules in which the functions are already
    nothing = interpreter._LangPatchScope()

    @functools.cache
    def modules_of(fn):
        return {id(value) for value in fn.__globals__.values() if value in (interpreter.tl, interpreter.tl.core)}

    def patched(fn):
        if not inside:
            scope = begin(fn)
            inside[scope] = set(modules_of(fn))
            return scope
        (done,) = inside.values()
        if not modules_of(fn) <= done:  # what is put in by a helper nobody takes out again
            begin(fn)
            done |= modules_of(fn)
        return nothing

    def restored(scope):
        inside.pop(scope, None)
        restore(scope)

    patch.setattr(interpreter, "_patch_lang", patched)
    patch.setattr(interpreter._LangPatchScope, "restore", restored)
    dtype_of = interpreter._get_np_dtype
    of_scalar = functools.cache(dtype_of)

    def np_dtype(dtype):
        scalar = getattr(dtype, "element_ty", None)
        block = isinstance(dtype, interpreter.tl.block_type)
        if block and not isinstance(scalar, interpreter.tl.pointer_type):
            return of_scalar(scalar)
        return dtype_of(dtype) if block or isinstance(dtype, interpreter.tl.pointer_type) else of_scalar(dtype)

    patch.setattr(interpreter, "_get_np_dtype", np_dtype)

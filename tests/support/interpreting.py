"""Triton's interpreter, several times as fast, with the same results: what it does anew in each call is done once."""

import functools


def hasten(interpreter, patch):
    """Take what is in vain, or always the same, out of every operation; `patch` is pytest's MonkeyPatch."""
    _put_functions_in_once(interpreter, patch)
    _look_dtypes_up_once(interpreter, patch)
    _make_types_once(interpreter.tl, patch)
    _leave_unread_checks_out(interpreter, patch)


def _put_functions_in_once(interpreter, patch):
    """A call of a jitted helper puts the interpreter's functions where the launch has put them already."""
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


def _look_dtypes_up_once(interpreter, patch):
    """Each value looks up its numpy dtype in a dictionary that is made for it."""
    dtype_of = interpreter._get_np_dtype
    of_scalar = functools.cache(dtype_of)

    def np_dtype(dtype):
        scalar = getattr(dtype, "element_ty", None)
        block = isinstance(dtype, interpreter.tl.block_type)
        if block and not isinstance(scalar, interpreter.tl.pointer_type):
            return of_scalar(scalar)
        return dtype_of(dtype) if block or isinstance(dtype, interpreter.tl.pointer_type) else of_scalar(dtype)

    patch.setattr(interpreter, "_get_np_dtype", np_dtype)


def _make_types_once(tl, patch):
    """Each value makes its type, the name of it and its shape, three tuples of constants, anew."""
    make_type, unwrap = tl.block_type.__init__, tl.core._unwrap_if_constexpr
    types, shapes = {}, {}
    plain = (int, bool, float, str, type(None), tl.tensor)

    def unwrapped(value):
        kind = type(value)
        return value if kind in plain else value.value if kind is tl.constexpr else unwrap(value)

    def block_type(self, element_ty, shape):
        pointed = getattr(element_ty, "address_space", None), getattr(element_ty, "const", None)
        key = element_ty.name, *pointed, *[unwrapped(size) for size in shape]
        if key not in types:
            make_type(self, element_ty, shape)
            types[key] = dict(vars(self))
        vars(self).update(types[key])

    def tensor(self, handle, kind):
        self.handle, self.type, self.dtype = handle, kind, kind.scalar
        key = tuple(kind.shape) if kind.is_block() else ()
        if key not in shapes:
            numel = functools.reduce(lambda product, size: product * size, key, 1)
            shapes[key] = tl.constexpr(numel), tl.tuple([tl.constexpr(size) for size in key])
        self.numel, self.shape = shapes[key]

    patch.setattr(tl.core, "_unwrap_if_constexpr", unwrapped)
    patch.setattr(tl.block_type, "__init__", block_type)
    patch.setattr(tl.tensor, "__init__", tensor)


def _leave_unread_checks_out(interpreter, patch):
    """Sums of integers are made again in 64 bits, for an assertion that only a debugged kernel reads."""
    semantic = type(interpreter.interpreter_semantic)
    checked = semantic.binary_op_sanitize_overflow_impl

    def check(self, *operands):
        return checked(self, *operands) if self.builder.options.debug else None

    patch.setattr(semantic, "binary_op_sanitize_overflow_impl", check)

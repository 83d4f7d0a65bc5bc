"""Errors as the command line tells them: one line each. What nobody expects stays a traceback, so that bugs are seen.

2    wrong input: what was typed, or a place that cannot be written (UserError), or a file that is not there
1    the machine could not: no memory, a stdout without room, a package that is missing
"""

from __future__ import annotations

import errno
import re
import sys
from collections.abc import Mapping

from ..errors import UserError, printable

WRONG_INPUT, FAILED = 2, 1
NO_MEMORY = (  # what torch and C++ say, each in its own words
    "can't allocate memory",
    "not enough memory: you tried to allocate",
    "out of memory",
    "std::bad_alloc",
    "Storage size calculation overflowed",
    "CUBLAS_STATUS_ALLOC_FAILED",
)
OF_NAMES = (FileNotFoundError, FileExistsError, NotADirectoryError, IsADirectoryError, PermissionError)
WRONG_NAMES = (errno.ENAMETOOLONG, errno.ELOOP, errno.EROFS, errno.EINVAL, errno.ENXIO, errno.ENOTEMPTY)
NONE_IS = {"group_size": "row"}
FEWER = "give a smaller --batch-size, or free memory"


def told(error: BaseException) -> tuple[int, str] | None:
    """Return the exit status and the sentence for an error that a user can cause; None for any other."""
    settings = sys.modules.get(f"{__package__.split('.')[0]}.kernels.runtime.settings")  # they know of no UserError
    if isinstance(error, (UserError, getattr(settings, "DamagedSettings", UserError))):
        return WRONG_INPUT, str(error)
    if isinstance(error, MemoryError) or isinstance(error, OSError) and error.errno == errno.ENOMEM:
        return FAILED, f"not enough memory; {FEWER}."
    if isinstance(error, RuntimeError) and any(text in str(error) for text in NO_MEMORY):
        device = "GPU memory" if type(error).__name__ == "OutOfMemoryError" or "CUDA" in str(error) else "memory"
        return FAILED, f"not enough {device}; {FEWER}."
    if isinstance(error, UnicodeEncodeError) and "surrogates" in error.reason:
        name = error.object.encode("utf-8", "surrogateescape")
        return WRONG_INPUT, f"the name {name!r} is not UTF-8, and files that are written would hold it; rename it."
    if isinstance(error, OSError) and error.errno is not None:
        where = [str(name) for name in (error.filename, error.filename2) if name is not None]
        hint = "; make room there, or write elsewhere" if error.errno in (errno.ENOSPC, errno.EDQUOT) else ""
        status = WRONG_INPUT if isinstance(error, OF_NAMES) or error.errno in WRONG_NAMES else FAILED
        return status, f"{error.strerror or type(error).__name__}{': ' if where else ''}{' -> '.join(where)}{hint}."
    if isinstance(error, ValueError) and "embedded null" in str(error):
        return WRONG_INPUT, "a name has a zero byte in it, which no file can have."
    if isinstance(error, ModuleNotFoundError) and error.name and not error.name.startswith(__package__.split(".")[0]):
        return FAILED, f"the package '{error.name}' is not installed here."
    return None


def in_flags(sentence: str, flags: Mapping[str, str]) -> str:
    """A sentence about an option of a recipe, in the words of the command line.

        ShiftQuantConfig: weight_decay must not be negative; got -1.    --weight-decay must not be negative; got -1.
        bits=16 trains in floats; leave wide out.                       --bits 16 trains in floats; leave --wide out.
        take activations='static' with it.                              take --activations static with it.

    flags: name of an option -> its flag. Other sentences stay as they are: a name in them may be the user's own.
    """
    names = "|".join(sorted(map(re.escape, flags), key=len, reverse=True))
    first = re.match(rf"(?:\w+Config: )?({names})\b(?= (?:must|lies|and|is|belongs?)\b)", sentence)
    if first:
        told = "|".join([first[1], *(re.escape(name) for name in flags if "_" in name)])
        sentence = re.sub(rf"(?<![\w-])({told})\b(?![-=])", lambda found: flags[found[1]], sentence[first.start(1) :])
        sentence = sentence.replace(" or None", "")
    sentence = re.sub(rf"(?<![\w./-])({names})=True\b", lambda found: flags[found[1]], sentence)
    sentence = re.sub(rf"(?<![\w./-])({names})=False\b", lambda found: f"no {flags[found[1]]}", sentence)
    sentence = re.sub(rf"(?<![\w./-])({names})=None\b", lambda found: _left_out(found[1], flags), sentence)
    sentence = re.sub(rf"(?<![\w./-])({names})='([\w-]+)'", lambda found: f"{flags[found[1]]} {found[2]}", sentence)
    sentence = re.sub(rf"(?<![\w./-])({names})=(?=[\w.])", lambda found: f"{flags[found[1]]} ", sentence)
    in_words = re.compile(rf"\b({names})\b")
    return re.sub(r"\bleave [\w ]+ out\b", lambda found: in_words.sub(lambda one: flags[one[1]], found[0]), sentence)


def _left_out(name: str, flags: Mapping[str, str]) -> str:
    """How an option is None in a shell: by a word of its own, or left out."""
    return f"{flags[name]} {NONE_IS[name]}" if name in NONE_IS else f"no {flags[name]}"


def complain(text: str) -> None:
    """Print one line on stderr, whatever is in the text: a name may hold line ends and escapes, and be very long."""
    print(printable(text), file=sys.stderr)

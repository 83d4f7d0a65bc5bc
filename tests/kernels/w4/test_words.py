"""The PTX that widens four packed codes at once, run here by its text: Triton's interpreter runs none."""

import itertools

import pytest
import torch

import ptq4dm  # noqa: F401

words = pytest.importorskip("ptq4dm.kernels.w4.products.words", reason="needs Triton", exc_type=ImportError)
from ptq4dm.kernels.w4.products import short_levels  # noqa: E402


def permuted(low, high, selector):
    """PRMT: byte i of the result is byte (nibble i of the selector & 7) of low and then high; no sign is spread."""
    assert not (selector & 0x8888).any()
    eight = low | high << 32  # as two's complement: the top byte is masked after the shift
    picked = [(eight >> 8 * (selector >> 4 * i & 7)) & 255 for i in range(4)]
    return sum(one << 8 * i for i, one in enumerate(picked))


DO = {
    "prmt.b32": lambda a, b, c: permuted(a, b, torch.as_tensor(c) & 0xFFFF),
    "or.b32": lambda a, b: a | b,
    "and.b32": lambda a, b: a & b,
    "xor.b32": lambda a, b: a ^ b,
    "shr.b32": lambda a, b: a >> b,
    "add.s32": lambda a, b: a + b,
    "mad.lo.s32": lambda a, b, c: a * b + c,
    "mov.b32": lambda a: a,
}


def run(asm: str, result: str = "r0", **registers: torch.Tensor) -> torch.Tensor:
    """$0, or another result, after the instructions; registers are int64 in 0..2^32 - 1."""
    values = dict(registers)
    for line in asm.strip("{} ").split(";"):
        name, _, rest = line.strip().partition(" ")
        if name in ("", ".reg"):
            continue
        target, *given = (part.strip() for part in rest.split(","))
        numbers = [values[one.replace("$", "r")] if not one.startswith("0x") and not one.isdigit() else int(one, 0)
                   for one in given]  # fmt: skip
        values[target.replace("$", "r")] = DO[name](*numbers) & 0xFFFFFFFF
    return values[result]


def as_bytes(word: torch.Tensor) -> torch.Tensor:
    """[W] -> int8 values [W, 4]."""
    each = torch.stack([word >> (8 * i) & 255 for i in range(4)], -1)
    return torch.where(each > 127, each - 256, each)


def packed(low: torch.Tensor, high: torch.Tensor) -> torch.Tensor:
    """Nibbles [W, 4] each -> words [W] of four bytes."""
    return ((low | high << 4) << 8 * torch.arange(4)).sum(-1)


@pytest.mark.parametrize(("half", "widened", "added"), [
    (0, "_LOW_WIDENED", "_LOW_ADDED"), (1, "_HIGH_WIDENED", "_HIGH_ADDED"),
])  # fmt: skip
def test_four_codes_at_once_are_each_code_alone(half, widened, added):
    """All steps, zero points and codes whose w8 is an int8, in all four places, and the ends beside one another."""
    generator = torch.Generator().manual_seed(0)
    reached = set()
    for step, zero in itertools.product(range(1, 17), range(-8, 8)):
        right = [q + 8 for q in range(-8, 8) if -128 <= step * (q - zero) <= 127]
        ends = list(itertools.product({right[0], right[-1]}, repeat=4))
        codes = torch.tensor(right)[torch.randint(len(right), (64, 4), generator=generator)]
        codes = torch.cat([codes, torch.tensor(ends), torch.tensor(right)[:, None].expand(-1, 4)])
        others = torch.randint(16, codes.shape, generator=generator)
        raw = packed(*((codes, others) if half == 0 else (others, codes)))
        for asm, s1 in ((widened, step), (added, 1)):
            if asm == added and step > 1:
                continue
            a = (128 - s1 * (zero + 8)) * 0x01010101 & 0xFFFFFFFF
            given = dict(r2=torch.tensor(s1), r6=torch.tensor(a)) if asm == widened else dict(r2=torch.tensor(a))
            found = as_bytes(run(getattr(words, asm).value, r1=raw, **given))
            assert torch.equal(found, s1 * (codes - 8 - zero))
            reached |= {int(found.min()), int(found.max())}
    assert min(reached) == -128
    assert max(reached) == 126  # 127 is prime, and steps reach 16


@pytest.mark.parametrize(("half", "asm"), [(0, "_LOW_ALONE"), (1, "_HIGH_ALONE")])
def test_nibbles_as_they_are(half, asm):
    low, high = (torch.arange(16).repeat(4).view(16, 4), torch.arange(15, -1, -1).repeat(4).view(16, 4))
    assert torch.equal(as_bytes(run(getattr(words, asm).value, r1=packed(low, high))), (low, high)[half])


def test_levels_are_looked_up():
    """All nibbles in all eight places of a word, of levels that reach both ends of int8."""
    levels = torch.tensor([-127, -90, -71, -55, -40, -27, -15, -4, 3, 14, 26, 39, 54, 70, 91, 127])
    table = [((levels[4 * i : 4 * i + 4] & 255) << 8 * torch.arange(4)).sum() for i in range(4)]
    places = {f"r{3 + 4 * i}": word for i, word in enumerate(table)}
    low = torch.randint(16, (512, 4), generator=torch.Generator().manual_seed(0))
    high = low.flip(0).roll(1, 1)
    assert all(len(set(one.tolist())) == 16 for one in (*low.T, *high.T))
    for result, nibbles in (("r0", low), ("r1", high)):
        found = as_bytes(run(words._LOOKED_UP.value, result, r2=packed(low, high), **places))
        assert torch.equal(found, levels[nibbles])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_levels_are_looked_up_as_floats(dtype):
    """In pairs as uniform codes come out: bytes 0 and 2, then 1 and 3, of low nibbles and of high ones."""
    levels = torch.tensor([-127, -90, -71, -55, -40, -27, -15, -4, 0, 14, 26, 39, 54, 70, 91, 127])
    table = short_levels.tables_of(levels.to(torch.int8)[None], dtype)[0].long() & 0xFFFFFFFF
    places = {f"r{5 + i}": word for i, word in enumerate(table)}
    low = torch.randint(16, (512, 4), generator=torch.Generator().manual_seed(0))
    high = low.flip(0).roll(1, 1)
    for result, nibbles, pair in (
        ("r0", low, (0, 2)),
        ("r1", high, (0, 2)),
        ("r2", low, (1, 3)),
        ("r3", high, (1, 3)),
    ):
        found = run(short_levels._PAIRS.value, result, r4=packed(low, high), **places)
        floats = torch.stack([found & 0xFFFF, found >> 16], -1).to(torch.uint16).view(torch.int16).view(dtype)
        assert torch.equal(floats.long(), levels[nibbles[:, pair]])

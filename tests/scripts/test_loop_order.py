"""The order of work in a compiled loop, read from a disassembly."""

import importlib
from pathlib import Path

import pytest

from ptq4dm import UserError

SCRIPTS = Path(__file__).parents[2] / "scripts" / "benchmarks"
LISTING = """
.L_x_0:
        /*0000*/                   LOP3.LUT R1, R2, 0xf0f0f0f, RZ, 0xc0, !PT ;
.L_x_1:
        /*0010*/                   LOP3.LUT R1, R2, 0xf0f0f0f, RZ, 0xc0, !PT ;
        /*0020*/                   IMAD R1, R2, R3, R4 ;
        /*0030*/                   PRMT R1, R2, 0x3210, R4 ;
        /*0040*/                   WARPGROUP.ARRIVE ;
        /*0050*/                   IGMMA.64x128x32.S8.S8 R24, R88, gdesc[UR24], RZ, !UPT ;
        /*0060*/                   WARPGROUP.DEPBAR.LE gsb0, 0x0 ;
        /*0070*/              @UP1 UTMALDG.2D [UR12], [UR26] ;
        /*0080*/                   I2FP.F32.S32 R24, R24 ;
        /*0090*/                   FFMA R1, R24, R2, R1 ;
        /*00a0*/              @!P0 BRA `(.L_x_1) ;
        /*00b0*/               @P0 BRA `(.L_x_0) ;
.L_x_2:
        /*00c0*/                   BRA `(.L_x_2) ;
"""


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    return importlib.import_module("loop_order")


def test_the_inner_loop_is_told_in_its_order(script):
    steps = script.loop(LISTING)
    assert len(steps) == 10 and steps[0].startswith("LOP3") and steps[-1].startswith("BRA")
    assert script.order(steps) == [
        ("unpacking", 2), ("product", 1), ("wait for products", 1), ("load of a later step", 1), ("conversion", 1),
        ("multiply-add", 1),
    ]  # fmt: skip


def test_what_is_refused(script):
    with pytest.raises(UserError, match="no loop with matrix instructions"):
        script.loop(LISTING.replace("IGMMA", "IADD3"))
    for words in (["--layer", "3072,100"], ["--layer", "3072"], ["--rows", "0"]):
        with pytest.raises(UserError, match="--layer is N,K|--rows must be"):
            script.main(words)

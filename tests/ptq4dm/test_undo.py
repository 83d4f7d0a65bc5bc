"""A change that fails, or is interrupted, leaves no trace; one that is made is made whole."""

import signal

import pytest
import torch
from torch import nn

from models import unet
from ptq4dm.interrupts import one_interrupt
from ptq4dm.undo import whole_or_not
from states import state_of

pytestmark = pytest.mark.usefixtures("one_thread")


def turned_over(model):
    """All sorts of things done to a model."""
    model.conv_in = nn.Identity()
    model.train()
    model.mid_block.register_forward_hook(lambda *_: None)
    model._register_state_dict_hook(lambda *_: None)
    model.__class__ = type("Other", (type(model),), {"__slots__": ()})
    model.extra, model.is_quantized = [1], True
    model.config["entry"] = model.config.entry = 1
    model.time_proj.register_buffer("more", torch.zeros(1))
    model.conv_out.weight.requires_grad_(False).grad = torch.zeros_like(model.conv_out.weight)
    del model.conv_norm_out
    with torch.no_grad():
        model.conv_out.weight += 1


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_what_fails_leaves_all_models_as_they_were(error):
    models = [unet(), unet(seed=1)]
    before = [state_of(model) for model in models]

    def change(gate):
        for model in models:
            turned_over(model)
        assert all(state_of(model) != state for model, state in zip(models, before, strict=True))
        raise error

    with pytest.raises(error):
        whole_or_not(models, change, values=True)
    assert [state_of(model) for model in models] == before


def test_gives_what_the_change_gives():
    model = unet()
    before = state_of(model)
    assert whole_or_not([model], lambda gate: turned_over(model) or "made") == "made"
    assert state_of(model) != before and model.is_quantized


def test_an_interrupt_behind_the_gate_waits_until_all_is_in():
    model, done = nn.Linear(2, 2), []

    def change(gate):
        gate.open = False
        signal.raise_signal(signal.SIGINT)
        model.put = True
        done.append("in")

    with pytest.raises(KeyboardInterrupt):
        whole_or_not([model], change)
    assert done == ["in"] and model.put
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_the_second_interrupt_waits_for_what_puts_things_back():
    done = []
    with pytest.raises(KeyboardInterrupt), one_interrupt():
        try:
            signal.raise_signal(signal.SIGINT)
            done.append("never")
        finally:
            signal.raise_signal(signal.SIGINT)
            done.append("back")
    assert done == ["back"]


def test_a_handler_that_raises_nothing_leaves_the_gate_open():
    seen = []
    before = signal.signal(signal.SIGINT, lambda *_: seen.append(1))
    try:
        with one_interrupt() as gate:
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)
            assert gate.open and seen == [1, 1]
    finally:
        signal.signal(signal.SIGINT, before)

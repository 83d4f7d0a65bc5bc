"""SIGTERM is an interrupt, and short stretches are not cut in two."""

import os
import signal
import time

import pytest

from ptq4dm.interrupts import one_interrupt, terminated_as_interrupted, uninterrupted, unswallowed


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_sigterm_is_an_interrupt(number):
    before = signal.signal(number, signal.SIG_DFL)  # under nohup it is ignored
    try:
        with pytest.raises(KeyboardInterrupt), terminated_as_interrupted():
            os.kill(os.getpid(), number)
            time.sleep(5)
        assert signal.getsignal(number) is signal.SIG_DFL
    finally:
        signal.signal(number, before)


def test_ignored_signals_stay_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with terminated_as_interrupted():
            os.kill(os.getpid(), signal.SIGHUP)
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupts_wait_for_the_end(number):
    done = []
    with pytest.raises(KeyboardInterrupt), terminated_as_interrupted(), uninterrupted():
        os.kill(os.getpid(), number)
        time.sleep(0.01)
        done.append(1)
    assert done == [1]


def swallow(kind):
    """What C++ makes of an interrupt in Python that it calls: an error of its own, or nothing."""
    try:
        signal.raise_signal(signal.SIGINT)
    except KeyboardInterrupt:
        if kind is not None:
            raise kind("it has no shape") from None


@pytest.mark.parametrize("block", [unswallowed, one_interrupt])
@pytest.mark.parametrize("kind", [None, ValueError, RuntimeError])
def test_an_interrupt_that_others_swallow_is_raised_at_the_end(block, kind):
    with pytest.raises(KeyboardInterrupt), block():
        swallow(kind)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_errors_and_every_interrupt_go_through_unswallowed():
    with pytest.raises(ValueError, match="mine"), unswallowed():
        raise ValueError("mine")
    raised = 0
    with pytest.raises(KeyboardInterrupt), unswallowed():
        for _ in range(3):
            try:
                signal.raise_signal(signal.SIGINT)
            except KeyboardInterrupt:
                raised += 1
    assert raised == 3

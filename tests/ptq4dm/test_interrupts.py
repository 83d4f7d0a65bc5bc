"""SIGTERM is an interrupt, and short stretches are not cut in two."""

import os
import signal
import time

import pytest

from ptq4dm.interrupts import terminated_as_interrupted, uninterrupted


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_sigterm_is_an_interrupt(number):
    before = signal.getsignal(number)
    with pytest.raises(KeyboardInterrupt), terminated_as_interrupted():
        os.kill(os.getpid(), number)
        time.sleep(5)
    assert signal.getsignal(number) is before


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

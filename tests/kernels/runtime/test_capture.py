"""A capture that fails leaves random numbers as they were."""

import pytest
import torch

from ptq4dm.kernels.runtime.capture import captured


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_random_numbers_go_on_after_a_capture_that_failed():
    x, own = torch.ones(4, device="cuda"), torch.Generator("cuda").manual_seed(7)
    torch.cuda.manual_seed(3)
    expected = torch.rand(4, device="cuda"), torch.rand(4, device="cuda", generator=own)
    torch.cuda.manual_seed(3)
    own.manual_seed(7)
    with pytest.raises(RuntimeError), captured(generators=(own,)):
        torch.rand(4, device="cuda") + torch.rand(4, device="cuda", generator=own)
        x.sum().item()  # waits for the GPU, which no graph can
    found = torch.rand(4, device="cuda"), torch.rand(4, device="cuda", generator=own)
    assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_graph_draws_anew_at_each_replay():
    with captured() as graph:
        drawn = torch.rand(4, device="cuda")
    graph.replay()
    first = drawn.clone()
    graph.replay()
    assert not torch.equal(first, drawn)

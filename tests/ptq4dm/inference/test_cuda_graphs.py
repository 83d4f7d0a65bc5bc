"""CUDA's own graphs under `optimize`: what test_graphs.py asks of traces, where it is up to the GPU."""

import pytest
import torch

import models
import ptq4dm

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]


@pytest.fixture(scope="module", autouse=True)
def exact():
    """Convolutions in float32, not in TF32: compiled ones differ from others by no more than their order of sums."""
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        yield


def model():
    return models.conditional_unet().cuda()


def call(network, seed=0, time=500, batch=2, size=8):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, 4, size, size, generator=generator).cuda()
    text = torch.randn(batch, 5, 12, generator=generator).cuda()
    with torch.no_grad():
        return network(x, time, encoder_hidden_states=text).sample


@pytest.fixture(scope="module")
def expected(exact):
    plain = model()
    forms = [dict(seed=seed, batch=batch, size=size) for seed in range(3) for batch in (1, 2) for size in (8, 16)]
    return [(form, call(plain, **form)) for form in forms]


@pytest.mark.parametrize("compiled", [False, True])
def test_what_is_replayed_is_what_the_model_gives(expected, compiled):
    network = model()
    report = ptq4dm.optimize(network, compiled=compiled)
    for _ in range(2):
        for form, right in expected:
            torch.testing.assert_close(call(network, **form), right, atol=1e-4, rtol=1e-4)
    assert network.forward.captures == 4 and network.forward.replays == 20
    with torch.no_grad():
        network.conv_in.weight.mul_(2)
        form, right = expected[0]
        assert not torch.allclose(call(network, **form), right, atol=1e-3)
    report.undo()
    assert "forward" not in vars(network)


def test_streams_wait_for_each_other(expected):
    network = model()
    ptq4dm.optimize(network, compiled=False)
    form = expected[0][0]
    for _ in range(2):
        call(network, **form)
    streams, made = [torch.cuda.Stream() for _ in range(3)], []
    rights = [(form, right) for form, right in expected if form["batch"] == 1 and form["size"] == 8]
    torch.cuda.synchronize()
    for stream, (form, _) in zip(streams, rights, strict=True):
        with torch.cuda.stream(stream):
            made.append(call(network, **form))
    torch.cuda.synchronize()
    assert all(torch.allclose(one, right, atol=1e-4) for one, (_, right) in zip(made, rights, strict=True))


def test_what_waits_for_the_gpu_runs_as_it_is_and_harms_no_other_graph(expected):
    network = model()
    plain = type(network).forward

    class Reads(type(network)):
        def forward(self, sample, *args, **kwargs):
            assert float(sample.flatten()[0]) < 1e9
            return plain(self, sample, *args, **kwargs)

    network.__class__ = Reads
    ptq4dm.optimize(network, compiled=False)
    for form, right in expected * 2:
        assert torch.allclose(call(network, **form), right, atol=1e-4)
    assert not network.forward.replays and any("it cannot be captured" in why for why in network.forward.plain)
    other = model()
    ptq4dm.optimize(other, compiled=False)
    for form, right in expected * 2:
        assert torch.allclose(call(other, **form), right, atol=1e-4)
    assert other.forward.replays

"""Calls from graphs: what they give is what the model gives now, whatever was done to it since the capture.

A trace takes a CUDA graph's place (tests/support/traced_graphs.py); scripts measure the graphs themselves.
"""

import copy
import pickle
import threading
from contextlib import nullcontext

import peft
import pytest
import torch
from torch import nn
from torch.utils import _pytree as pytree
from torch.utils.flop_counter import FlopCounterMode

import models
import ptq4dm
from ptq4dm.inference import graphs
from ptq4dm.inference.graphs import Graphed
from traced_graphs import TracedGraphs

pytestmark = pytest.mark.usefixtures("one_thread")
SMALL = dict(
    block_out_channels=(8,), down_block_types=("CrossAttnDownBlock2D",), up_block_types=("CrossAttnUpBlock2D",)
)  # fmt: skip


def graphed(model, kept=graphs.KEPT):
    model.forward = Graphed(model, TracedGraphs(), kept)
    return model.forward


def inputs(seed=0, batch=2, size=8, channels=4):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, channels, size, size, generator=generator)
    return x, torch.randn(batch, 5, 12, generator=generator)


def call(model, seed=0, time=500, batch=2, size=8, **more):
    x, text = inputs(seed, batch, size)
    with torch.no_grad():
        return model(x, time, encoder_hidden_states=text, **more).sample


def right(model, seed=0, **how):
    """What the model gives by itself, computed by its class's forward."""
    own = vars(model).pop("forward", None)
    try:
        return call(model, seed, **how)
    finally:
        if own is not None:
            model.forward = own


def same(model, seed=0, **how):
    return torch.allclose(call(model, seed, **how), right(model, seed, **how), atol=1e-5)


@pytest.fixture
def unet():
    """A model with a graph of one form, captured."""
    model = models.conditional_unet(**SMALL)
    graphed(model)
    for seed in range(3):
        assert same(model, seed)
    assert model.forward.captures == 1 and model.forward.replays == 2
    return model


def test_calls_are_replayed_and_their_outputs_stay(unet):
    held = [(call(unet, seed, time=100 * seed), right(unet, seed, time=100 * seed)) for seed in range(5)]
    assert all(torch.allclose(made, expected, atol=1e-5) for made, expected in held)
    assert unet.forward.captures == 1 and unet.forward.replays == 7
    assert unet.forward.plain == {"the first call of a form": 1}


@pytest.mark.parametrize("times", [(1, 2, 3, 4), (0.5, 0.25, 0.125, 0.3), (torch.tensor(7), 8, 9, torch.tensor(1))])
def test_times_that_are_numbers_are_no_forms_of_their_own(times):
    model = models.conditional_unet(**SMALL)
    seen = graphed(model)
    for time in times:
        assert same(model, 1, time=time)
    assert seen.captures == 1 and seen.replays == 3
    seen.clear()
    x, text = inputs()
    with torch.no_grad():
        for time in times:
            made = model(sample=x, timestep=time, encoder_hidden_states=text, return_dict=False)[0]
            assert torch.allclose(made, right(model, 0, time=time), atol=1e-5)
    assert seen.captures == 2


def test_forms_have_graphs_of_their_own(unet):
    forms = [dict(batch=2), dict(batch=1), dict(size=16)]
    for how in forms * 3:
        assert same(unet, 3, **how)
    assert len(unet.forward.graphs) == len(forms) and unet.forward.captures == len(forms)
    kwargs = [{"scale": 0.5}, {"scale": 0.25}]
    for _ in range(3):
        for one in kwargs:
            assert same(unet, 4, cross_attention_kwargs=one)
    assert unet.forward.captures == len(forms) + len(kwargs)


def test_the_form_that_was_not_used_for_longest_goes():
    model = models.conditional_unet(**SMALL)
    seen = graphed(model, kept=2)
    for batch in (1, 1, 2, 2, 1, 3, 3):  # 2 goes for 3
        assert same(model, batch=batch)
    assert seen.captures == 3 and seen.dropped == 1 and len(seen.graphs) == 2
    assert same(model, batch=1) and seen.captures == 3
    assert same(model, batch=2) and seen.captures == 4 and seen.dropped == 2


def test_strides_and_types_are_forms(unet):
    x, text = inputs()
    with torch.no_grad():
        for _ in range(3):
            y = unet(x.contiguous(memory_format=torch.channels_last), 3, encoder_hidden_states=text).sample
            assert torch.allclose(y, right(unet, 0, time=3), atol=1e-5)
    assert unet.forward.captures == 2


def weight(model):
    return model.conv_in.weight


def written(model):
    with torch.no_grad():
        weight(model).mul_(1.5)


def through_data(model):
    weight(model).data = weight(model).data * 1.5


def replaced(model):
    model.conv_in.weight = nn.Parameter(weight(model).detach() * 1.5)


def loaded(model):
    state = {name: value * 1.25 for name, value in model.state_dict().items()}
    model.load_state_dict(state)


def another_module(model):
    model.conv_out = copy.deepcopy(model.conv_out)
    with torch.no_grad():
        model.conv_out.bias.add_(1)


class Doubling:
    def __call__(self, attn, hidden_states, *args, **kwargs):
        return 2 * hidden_states


def another_processor(model):
    model.set_attn_processor(Doubling())


def free_u(model):
    model.enable_freeu(s1=0.9, s2=0.2, b1=1.5, b2=1.6)


def config_of_lora():
    return peft.LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False)


def adapter(model):
    torch.manual_seed(3)
    model.add_adapter(config_of_lora(), adapter_name="one")


CHANGES = [written, through_data, replaced, loaded, another_module, another_processor, free_u, adapter]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_no_graph_is_stale(unet, change):
    before = call(unet, 5)
    change(unet)
    assert same(unet, 5) and not torch.allclose(call(unet, 5), before, atol=1e-4)
    for seed in range(2):
        assert same(unet, seed)
    assert unet.forward.captures == 2 and unet.forward.dropped == 1


def test_adapters_that_come_change_and_go(unet):
    adapter(unet)
    torch.manual_seed(4)
    unet.add_adapter(config_of_lora(), adapter_name="two")
    steps = [
        lambda: unet.set_adapters(["one"], [1.0]),
        lambda: unet.set_adapters(["one"], [0.25]),
        lambda: unet.set_adapters(["one", "two"], [0.5, 2.0]),
        unet.disable_adapters,
        unet.enable_adapters,
        lambda: unet.fuse_lora(),
        lambda: unet.unfuse_lora(),
        lambda: unet.delete_adapters(["two"]),
    ]
    for step in steps:
        before = right(unet, 6)
        step()
        changed = not torch.allclose(right(unet, 6), before, atol=1e-5)
        for seed in (6, 7, 8):
            assert same(unet, seed), step
        assert changed or step in steps[5:7] or step is steps[0]


def test_a_scale_that_is_set_to_what_it_was_costs_no_capture(unet):
    adapter(unet)
    for seed in range(4):
        assert same(unet, seed)
    before = unet.forward.captures
    for seed in range(4):
        unet.set_adapters(["one"], [0.5])
        unet.set_adapters(["one"], [1.0])
        assert same(unet, seed)
    assert unet.forward.captures == before


def test_hooks_see_their_calls(unet):
    seen = []
    handle = unet.conv_out.register_forward_hook(lambda *_: seen.append(1))
    for seed in range(3):
        assert same(unet, seed)
    assert len(seen) == 6 and unet.forward.captures == 1
    assert unet.forward.plain["'conv_out' has a hook"] == 3
    handle.remove()
    before = unet.forward.replays
    assert same(unet, 1) and unet.forward.replays == before + 1 and unet.forward.captures == 1


def test_caches_of_embeddings_and_texts(unet):
    before = unet.forward.replays
    with ptq4dm.cached_embeddings(unet) as cache:
        for seed in range(3):
            assert same(unet, seed)
    assert cache.reused and unet.forward.replays == before
    with ptq4dm.cached_text(unet, None) as cache:
        for seed in (1, 1, 2):
            assert torch.allclose(call(unet, seed), right(unet, seed), atol=1e-5)
    assert unet.forward.replays == before and cache.layers
    assert same(unet, 1) and unet.forward.replays == before + 1


def test_whoever_looks_at_operations_sees_them(unet):
    with FlopCounterMode(display=False) as counted:
        call(unet, 1)
    assert counted.get_total_flops() > 0 and same(unet, 1)
    assert unet.forward.plain["operations of torch are looked at, or changed"] == 1


def test_offloaded_models_are_left(unet):
    from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module

    add_hook_to_module(unet.conv_in, ModelHook())
    assert same(unet, 1) and unet.forward.plain["'conv_in' is offloaded or moved by accelerate"] == 1
    remove_hook_from_module(unet.conv_in)
    assert same(unet, 1)


@pytest.mark.parametrize("how", ["gradient", "training"])
def test_calls_that_graphs_cannot_serve(unet, how):
    x, text = inputs()
    unet.train(how == "training")
    with nullcontext() if how == "gradient" else torch.no_grad():
        y = unet(x.requires_grad_(how == "gradient"), 3, encoder_hidden_states=text).sample
    if how == "gradient":
        y.sum().backward()
        assert x.grad is not None
    unet.eval()
    assert unet.forward.replays == 2 and same(unet, 1) and unet.forward.captures == 1
    assert {"gradients are enabled", "the model is in training"} & set(unet.forward.plain)


def test_autocast_and_inference_mode_are_forms(unet):
    for _ in range(3):
        with torch.autocast("cpu", torch.bfloat16):
            made, expected = call(unet, 2), right(unet, 2)
        assert torch.allclose(made.float(), expected.float(), atol=0.05)
        with torch.inference_mode():
            assert same(unet, 2)
        assert same(unet, 2)
    assert unet.forward.captures == 3


def test_what_cannot_be_captured_runs_as_it_is():
    model = models.conditional_unet(**SMALL)
    seen = graphed(model)
    seen.backend.fails = "operation not permitted when stream is capturing"
    for seed in range(4):
        assert same(model, seed)
    assert seen.captures == 0 and not seen.graphs
    (why,) = [why for why in seen.plain if why != "the first call of a form"]
    assert why == "it cannot be captured (operation not permitted when stream is capturing)"
    assert seen.plain[why] == 3


def test_arguments_of_unknown_kinds():
    model = models.conditional_unet(**SMALL)
    seen = graphed(model)
    for seed in range(3):
        assert same(model, seed, cross_attention_kwargs={"scale": 1.0, "other": object()})
    assert seen.plain == {"an argument is of the class object": 3}


def test_a_model_that_changes_all_the_time_is_captured_ever_less_often():
    model = models.conditional_unet(**SMALL)
    seen = graphed(model)
    for seed in range(40):
        written(model) if seed % 2 else None
        assert same(model, seed % 3)
    assert seen.captures <= 5 and seen.plain["the model keeps changing"] > 20
    for seed in range(40):  # and it comes to rest
        call(model, seed)
    assert seen.replays > 8 and seen.captures <= 6


def test_weights_of_inference_mode_are_left():
    with torch.inference_mode():
        model = models.conditional_unet(**SMALL)
    seen = graphed(model)
    for seed in range(4):
        with torch.inference_mode():
            assert same(model, seed)
    assert not seen.replays and any("inference_mode" in why for why in seen.plain)


def test_copies_are_plain_and_states_have_their_names(unet):
    names = list(models.conditional_unet(**SMALL).state_dict())
    assert list(unet.state_dict()) == names
    for copied in (copy.deepcopy(unet), pickle.loads(pickle.dumps(unet))):
        with torch.no_grad():
            weight(copied).mul_(2)
        assert not isinstance(copied.forward, Graphed) and torch.equal(call(copied, 1), right(copied, 1))
        assert not torch.allclose(call(copied, 1), call(unet, 1), atol=1e-4)


def test_outputs_of_every_structure_are_copied(unet):
    x, text = inputs()
    with torch.no_grad():
        for _ in range(3):
            found = unet(x, 3, encoder_hidden_states=text, return_dict=False)
    assert isinstance(found, tuple) and torch.allclose(found[0], right(unet, 0, time=3), atol=1e-5)
    graph = next(reversed(unet.forward.graphs.values()))
    held = {leaf.data_ptr() for leaf in pytree.tree_leaves(graph.outputs) if isinstance(leaf, torch.Tensor)}
    assert found[0].data_ptr() not in held


def test_threads_do_not_write_into_each_other_s_calls(unet):
    expected = {seed: right(unet, seed) for seed in range(4)}
    wrong = []

    def work(seed):
        for _ in range(5):
            if not torch.allclose(call(unet, seed), expected[seed], atol=1e-5):
                wrong.append(seed)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in expected]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong

"""What is read off a model's calls: who shares an input, who is fed embeddings, what encloses them, what they saw."""

import pytest
import torch
from torch import nn

from ptq4dm.calibration import capture as capturing
from ptq4dm.calibration.calls import calls_of_rows
from ptq4dm.calibration.capture import capture
from ptq4dm.calibration.trace import block_of, trace
from ptq4dm.layers.view import find_layers

pytestmark = pytest.mark.usefixtures("one_thread")
K = 8


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.to_q, self.to_k, self.to_v = nn.Linear(K, K), nn.Linear(K, K), nn.Linear(K, K)
        self.to_out = nn.ModuleList([nn.Linear(K, K), nn.Dropout(0.5)])

    def forward(self, x, text=None):
        text = x if text is None else text
        y = self.to_q(x) + self.to_k(text).mean(1, keepdim=True) * self.to_v(input=text).mean(1, keepdim=True)
        return self.to_out[1](self.to_out[0](y))


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm1 = nn.ModuleDict({"linear": nn.Linear(K, 2 * K)})  # never called itself
        self.attn1, self.cross = Attention(), nn.ModuleList([Attention(), Attention()])
        self.proj_mlp, self.mlp = nn.Linear(K, K), nn.Linear(K, K)
        self.unused = nn.Linear(K, K)
        self.early, self.late = nn.Linear(K, K), nn.Linear(K, K)

    def forward(self, x, time, text):
        scale, shift = self.norm1["linear"](time)[:, None].chunk(2, -1)
        x = x * scale + shift
        x = self.mlp(self.attn1(x) + self.proj_mlp(x))
        for cross in self.cross:
            x = cross(x, text)
        y = self.early(x)
        x.add_(1.0)  # what the next layer is fed is in the same place, and is not the same
        return y + self.late(x)


class Model(nn.Module):
    config = {}

    def __init__(self):
        super().__init__()
        self.entry, self.time = nn.Linear(2, K), nn.Linear(1, K)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.conv, self.exit = nn.Conv2d(3, 3, 1), nn.Linear(K, 2)

    def forward(self, x, timestep, text, return_dict=True):
        time = self.time(timestep.float()[:, None])
        hidden = self.entry(x)
        for block in self.blocks:
            hidden = block(hidden, time, text)
        self.conv(torch.ones(2, 3, 4, 5))
        return (self.exit(hidden),)


def calls(rows=3, tokens=5):
    generator = torch.Generator().manual_seed(0)
    text = torch.randn(rows, 4, K, generator=generator)
    return calls_of_rows(torch.randn(rows, tokens, 2, generator=generator), timestep=torch.arange(rows), text=text)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Model().eval()


@pytest.fixture
def traced(model):
    return trace(model, find_layers(model), calls())


def inside(block, *names):
    return [f"blocks.{block}.{name}" for name in names]


@pytest.mark.parametrize("block", [0, 1])
def test_layers_that_are_fed_one_tensor(traced, block):
    first = inside(block, "attn1.to_q", "attn1.to_k", "attn1.to_v", "proj_mlp")  # in the order of their calls
    cross = [inside(block, f"cross.{i}.to_k", f"cross.{i}.to_v") for i in range(2)]
    for name in first:
        assert traced[name].shares == first and traced[name].enclosing == f"blocks.{block}"
    for i, pair in enumerate(cross):  # one text is fed to all four
        for name in pair:
            assert traced[name].shares == pair and traced[name].enclosing == f"blocks.{block}.cross.{i}"
    for name in inside(block, "cross.0.to_q", "attn1.to_out.0", "mlp", "norm1.linear"):
        assert traced[name].shares == [name] and traced[name].enclosing == name


def test_a_tensor_changed_in_place_is_another(traced):
    for name in inside(0, "early", "late"):
        assert traced[name].shares == [name]


def test_tokens_and_embeddings(traced):
    embeddings = {name for name, seen in traced.items() if not seen.tokens}
    assert embeddings == {"time", *inside(0, "norm1.linear"), *inside(1, "norm1.linear")}
    assert traced["conv"].tokens


def test_layers_that_are_not_called_are_left_out(model, traced):
    assert {view.name for view in find_layers(model)} - traced.keys() == {*inside(0, "unused"), *inside(1, "unused")}


def test_blocks(traced):
    assert traced["blocks.1.attn1.to_out.0"].block == "blocks.1" and traced["entry"].block == "entry"
    assert block_of("down_blocks.1.attentions.0.transformer_blocks.2.attn1.to_q") == "down_blocks.1"
    assert block_of("mid_block.attentions.0.proj_in") == "mid_block.attentions.0"
    assert block_of("time_embed.linear_1") == "time_embed"


def test_what_encloses_must_be_called(model):
    """The innermost module around two layers may be a mere container: then nothing judges them but themselves."""
    model.blocks[0].norm1["more"] = nn.Linear(K, 2 * K)
    model.blocks[0].norm1["linear"].register_forward_hook(
        lambda _, args, y: y + 0 * model.blocks[0].norm1["more"](*args)
    )
    traced = trace(model, find_layers(model), calls())
    pair = inside(0, "norm1.linear", "norm1.more")
    assert all(traced[name].shares == pair and traced[name].enclosing == name for name in pair)


def test_views_choose_what_is_looked_at(model):
    views = [view for view in find_layers(model) if "attn1.to_" in view.name and not view.name.endswith("to_q")]
    traced = trace(model, views, calls())
    pair = inside(1, "attn1.to_k", "attn1.to_v")
    assert traced[pair[0]].shares == pair and traced[pair[0]].enclosing == "blocks.1.attn1"
    assert traced.keys() == {view.name for view in views}


def hooks(model):
    return [m for m in model.modules() if m._forward_hooks or m._forward_pre_hooks]


def test_the_model_is_left_as_it_was(model):
    model.train()
    model.blocks[1].eval()
    before = {name: module.training for name, module in model.named_modules()}
    trace(model, find_layers(model), calls())
    capture(model, ["blocks.0.mlp"], ["blocks.0"], [calls()], 0)
    assert not hooks(model)
    model.exit.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        trace(model, find_layers(model), calls())
    with pytest.raises(ZeroDivisionError):
        capture(model, ["exit", "conv"], [], [calls()], 0)
    assert len(hooks(model)) == 1
    assert {name: module.training for name, module in model.named_modules()} == before


# --- capture ------------------------------------------------------------------------------------------------


def inputs_of(model, layer, batches):
    """All token rows of a layer's inputs, by a hook of its own."""
    seen = []
    handle = model.get_submodule(layer).register_forward_pre_hook(lambda _, args: seen.append(args[0].clone()))
    with torch.no_grad():
        for batch in batches:
            call = batch.call()
            model(*call.args, **call.kwargs)
    handle.remove()
    return torch.cat([x.reshape(-1, x.shape[-1]) for x in seen])


def test_captured_rows_are_what_the_layer_is_fed(model):
    batches = [calls(), calls()[1:]]
    got = capture(model, ["blocks.1.mlp", "blocks.1.cross.1.to_k"], [], batches, 0)
    for name in got.rows:
        everything = inputs_of(model, name, batches)
        assert torch.equal(got.rows[name], everything)
        assert torch.equal(got.peaks[name], everything.abs().amax(0))
        assert got.lows[name] == everything.min()
    assert len(got.rows["blocks.1.mlp"]) == 25 and len(got.rows["blocks.1.cross.1.to_k"]) == 20


def test_convolutions_give_a_row_for_each_pixel(model):
    assert capture(model, ["conv"], [], [calls()], 0).rows["conv"].shape == (2 * 4 * 5, 3)


def test_captured_rows_are_drawn_by_the_seed(model, monkeypatch):
    monkeypatch.setattr(capturing, "MAX_ROWS", 12)
    name, batches = "blocks.1.mlp", [calls(), calls()]
    first, again, other = (capture(model, [name], [], batches, seed) for seed in (0, 0, 1))
    everything = inputs_of(model, name, batches)
    assert len(first.rows[name]) == 12  # 6 of each batch of 15
    assert torch.equal(first.rows[name], again.rows[name]) and not torch.equal(first.rows[name], other.rows[name])
    assert all((row == everything).all(1).any() for row in first.rows[name])
    assert len(first.rows[name][:6].unique(dim=0)) == 6
    assert not torch.equal(first.rows[name][:6], first.rows[name][6:])  # of equal batches other rows
    assert torch.equal(first.peaks[name], everything.abs().amax(0))  # of all inputs, not of those drawn


def test_calls_of_modules_are_kept_whole(model):
    got = capture(model, [], ["blocks.1.cross.1"], [calls(), calls()[:1]], 0)
    (args, kwargs), (second, _) = got.calls["blocks.1.cross.1"]
    assert not kwargs and args[0].shape == (3, 5, K) and torch.equal(args[1], calls().call().kwargs["text"])
    assert len(second[0]) == 1


def test_the_model_runs_no_further_than_it_must(model):
    ran = []
    for name in ("blocks.0.mlp", "blocks.0.cross.1", "blocks.1.mlp"):
        model.get_submodule(name).register_forward_hook(lambda *_, name=name: ran.append(name))
    capture(model, ["blocks.0.mlp"], ["blocks.0.attn1"], [calls()], 0)
    assert ran == ["blocks.0.mlp"]
    ran.clear()
    got = capture(model, ["blocks.0.mlp", "blocks.0.unused"], [], [calls()], 0)  # waits for what never comes
    assert ran == ["blocks.0.mlp", "blocks.0.cross.1", "blocks.1.mlp"] and got.rows.keys() == {"blocks.0.mlp"}

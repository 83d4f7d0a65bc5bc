"""Which layers are trained together, and in which order."""

import pytest
import torch
from torch import nn

from helpers import normal, run
from models import conditional_unet, dit, unet
from ptq4dm.calibration.record import record
from ptq4dm.layers.view import find_layers
from ptq4dm.reconstruction.blocks import call_order, innermost_blocks, trained_together

pytestmark = pytest.mark.usefixtures("one_thread")


def seen(model, call=run):
    """(names of all layers, recorded calls) of a model."""
    with record(model) as calls, torch.no_grad():
        call(model)
    return [view.name for view in find_layers(model)], calls


def members(together):
    found = {}
    for name, block in together.items():
        found.setdefault(block, []).append(name.removeprefix(f"{block}.") if name != block else "")
    return found


class Feed(nn.Module):
    """A block of two layers, or with its first one in place."""

    def __init__(self, inplace=False):
        super().__init__()
        self.act, self.up, self.down = nn.ReLU(inplace), nn.Linear(6, 8), nn.Linear(8, 6)

    def forward(self, x):
        return self.down(self.up(self.act(x)))


class Odd(nn.Module):
    """Layers in another order than their calls; a block that nobody calls, of whose layers the model calls one."""

    config = {}

    def __init__(self, inplace=False):
        super().__init__()
        self.last, self.unused = nn.Linear(6, 6), nn.Linear(6, 6)
        self.blocks = nn.ModuleList([Feed(), Feed(inplace), Feed()])
        self.first = nn.Linear(6, 6)

    def forward(self, x):
        x = self.blocks[1](self.first(x))
        return self.last(self.blocks[2].down(self.blocks[0].up(x)))


def test_a_transformer_is_trained_block_by_block():
    names, calls = seen(dit())
    found = members(trained_together(dit(), names, "block", calls))
    inner = [block for block in found if block.startswith("transformer_blocks")]
    assert inner == ["transformer_blocks.0", "transformer_blocks.1"]
    assert {"attn1.to_q", "attn1.to_out.0", "ff.net.0.proj", "ff.net.2"} < set(found[inner[0]])
    assert all(layers == [""] for block, layers in found.items() if block not in inner)  # by themselves


def test_a_unet_goes_down_through_its_middle_and_up():
    model = unet()
    names, calls = seen(model)
    order = list(members(trained_together(model, names, "block", calls)))
    place = lambda start: [i for i, block in enumerate(order) if block.startswith(start)]  # noqa: E731
    assert max(place("down_blocks")) < min(place("mid_block")) <= max(place("mid_block")) < min(place("up_blocks"))
    assert [view.name.split(".")[0] for view in find_layers(model)].index("up_blocks") < [
        view.name.split(".")[0] for view in find_layers(model)
    ].index("mid_block")  # the model holds them in another order
    assert call_order(model, names, calls) == [name for name in trained_together(model, names, "layer", calls)]


def test_the_innermost_block_has_a_layer():
    """Stable Diffusion's: a transformer block inside an attention, which keeps what is around it."""
    model = conditional_unet()
    names, calls = seen(model)
    found = members(trained_together(model, names, "block", calls))
    outer, inner = "mid_block.attentions.0", "mid_block.attentions.0.transformer_blocks.0"
    assert found[outer] == ["proj_in", "proj_out"] and "attn2.to_k" in found[inner] and len(found[inner]) == 10
    assert list(found).index(outer) < list(found).index(inner)
    assert found["down_blocks.0.resnets.0"] == ["conv1", "time_emb_proj", "conv2"]
    # alone in a down block whose other layers are in blocks within it
    assert found["down_blocks.0.downsamplers.0.conv"] == [""] and "down_blocks.0" not in found
    assert all(len(layers) > 1 or layers == [""] for layers in found.values())


def test_layers_one_by_one():
    names, calls = seen(unet())
    assert all(name == block for name, block in trained_together(unet(), names, "layer", calls).items())


def test_layers_that_are_called_without_their_block_are_by_themselves():
    model = Odd().eval()
    names, calls = seen(model, lambda model: model(normal(2, 6)))
    found = trained_together(model, names, "block", calls)
    assert [*found][:6] == ["first", "blocks.1.up", "blocks.1.down", "blocks.0.up", "blocks.2.down", "last"]
    assert set([*found][6:]) == {"unused", "blocks.0.down", "blocks.2.up"}  # never called: they come last
    assert found["blocks.1.up"] == found["blocks.1.down"] == "blocks.1"
    assert all(name == block for name, block in found.items() if not name.startswith("blocks.1"))
    assert call_order(model, names, calls) == [*found]
    assert innermost_blocks(model, names)["blocks.0.up"] == "blocks.0"


def test_a_block_that_changes_its_input_in_place_is_trained_layer_by_layer():
    """Called again with the same tensor it would be fed something else."""
    model = Odd(inplace=True).eval()
    names, calls = seen(model, lambda model: model(normal(2, 6)))
    assert trained_together(model, names, "block", calls)["blocks.1.up"] == "blocks.1.up"


def test_lists_of_lists_and_a_model_that_is_a_list():
    model = nn.Sequential(nn.Linear(6, 6), nn.Sequential(Feed(), nn.ModuleList([Feed()])[0]), Feed())
    found = innermost_blocks(model, [view.name for view in find_layers(model)])
    assert set(found.values()) == {"1.0", "1.1", "2"} and "0" not in found

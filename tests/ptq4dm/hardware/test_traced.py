"""Work read off models: every product that PyTorch's own counter of operations counts, by layer, and nothing else."""

import pytest
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, DDPMPipeline, DiTPipeline, HeunDiscreteScheduler
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from models import conditional_unet, dit, unet
from ptq4dm.errors import UserError
from ptq4dm.hardware import (
    CORRECTED,
    DESIGNS,
    HOROWITZ_45NM,
    simulate,
    works_of_call,
    works_of_known,
    works_of_net,
    works_of_pipeline,
)
from ptq4dm.hardware.known import KNOWN, facts_of, meta_model
from ptq4dm.hardware.traced import PRODUCTS, block_of, scaled

CALLS = {
    "unet": lambda: (unet(), {"sample": torch.zeros(2, 3, 8, 8), "timestep": torch.ones(2)}),
    "dit": lambda: (
        dit(),
        {"hidden_states": torch.zeros(2, 4, 8, 8), "timestep": torch.ones(2), "class_labels": torch.zeros(2).long()},
    ),
    "conditional": lambda: (
        conditional_unet(),
        {
            "sample": torch.zeros(2, 4, 8, 8),
            "timestep": torch.ones(2),
            "encoder_hidden_states": torch.zeros(2, 5, 12),
        },
    ),
}


@pytest.mark.parametrize("name", CALLS)
def test_products_are_those_that_pytorch_counts(name):
    model, arguments = CALLS[name]()
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:  # counts no other
        model(**arguments)
    works = works_of_call(model, lambda: model(**arguments))
    assert 2 * sum(work.products * work.count for work in works) == counter.get_total_flops()
    assert {work.kind for work in works} >= {"attention", "conditioning", PRODUCTS}
    assert sum(work.edge for work in works) == 2


@pytest.mark.parametrize("name", KNOWN)
def test_models_known_by_shapes_are_the_real_ones(name):
    facts, model = facts_of(name), meta_model(name)
    parameters = sum(p.numel() for p in model.parameters())
    assert parameters == facts["parameters"] and all(p.is_meta for p in model.parameters())
    works = works_of_known(name)
    seen = {work.name for work in works if work.weights}
    layers = {name for name, part in model.named_modules() if isinstance(part, (nn.Linear, nn.Conv2d))}
    assert seen == layers and len(seen) > 400
    assert {work.batch for work in works if work.name in ("conv_in", "add_embedding.linear_1")} <= {2}
    products = sum(work.products * work.count for work in works if work.weights)
    # SDXL's UNet: 2.99e12 a row, two rows. FLUX: its 11.9e9 weights meet 4096, 512 or both kinds of tokens.
    assert products == pytest.approx({"sdxl": 2 * 2.99e12, "flux": 2.97e13}[name], rel=0.01)


def test_a_layer_is_seen_as_it_is():
    class Odd(nn.Module):
        config = {"in_channels": 6, "out_channels": 5}

        def __init__(self):
            super().__init__()
            self.conv_in = nn.Conv2d(6, 8, (3, 5), stride=(2, 1), padding=(1, 0), groups=2)
            self.middle = nn.Linear(8, 12)
            self.unused = nn.Linear(4, 4)
            self.last = nn.Linear(12, 5)

        def forward(self, x):
            x = self.conv_in(x).flatten(2).mT
            x = self.middle(x)
            return self.last(F.scaled_dot_product_attention(x, x[:, :7], x[:, :7]))

    model = Odd()
    works = {work.name: work for work in works_of_call(model, lambda: model(torch.zeros(3, 6, 10, 9)))}
    conv, middle = works["conv_in"], works["middle"]
    assert (conv.batch, conv.height, conv.width, conv.channels, conv.outputs, conv.count) == (3, 5, 5, 3, 4, 2)
    assert conv.kernel == (3, 5) and conv.stride == (2, 1) and conv.edge and conv.kind == "convolution"
    assert (middle.rows, middle.inputs, middle.outputs, middle.edge) == (75, 8, 12, False)
    scores, values = (work for work in works.values() if work.kind == PRODUCTS)
    assert (scores.rows, scores.inputs, scores.outputs, scores.count) == (25, 12, 7, 3)
    assert (values.rows, values.inputs, values.outputs, values.count) == (25, 7, 12, 3)
    assert "unused" not in works


def test_a_pipelines_work_is_of_one_image_and_all_its_steps():
    pipe = DDPMPipeline(unet(), DDIMScheduler())
    works, steps = works_of_pipeline(pipe, 7)
    assert steps == 7 and {work.batch for work in works if work.weights and work.height > 1} == {1}
    called = works_of_call(pipe.unet, lambda: pipe.unet(torch.zeros(1, 3, 8, 8), 1))
    assert sorted(map(str, works)) == sorted(map(str, called))
    many = scaled(works, 3)
    assert sum(w.products * w.count for w in many) == 3 * sum(w.products * w.count for w in works)


@pytest.mark.parametrize("scheduler, steps", [(DDIMScheduler, 4), (HeunDiscreteScheduler, 7)])
def test_guidance_and_evaluations_are_counted(scheduler, steps):
    vae = AutoencoderKL(block_out_channels=(4,), norm_num_groups=2, latent_channels=4)
    pipe = DiTPipeline(dit(num_embeds_ada_norm=1000), vae, scheduler())  # whose null class is the 1000th
    for guidance, rows in ((4.0, 2), (1.0, 1)):
        works, found = works_of_pipeline(pipe, 4, pipeline_kwargs={"guidance_scale": guidance})
        assert found == steps  # Heun's method looks twice at all times but the last
        assert {work.batch for work in works if work.name == "pos_embed.proj"} == {rows}
        assert {work.count for work in works if work.kind == PRODUCTS} == {2 * rows}  # two heads


def test_products_without_weights_have_no_four_bits():
    model, arguments = CALLS["dit"]()
    works = works_of_call(model, lambda: model(**arguments))
    products = [work for work in works if not work.weights]
    assert len(products) == 4
    for design in DESIGNS:
        for one in simulate(products, design, HOROWITZ_45NM, CORRECTED):
            per = 1.5 if design.floating else 0.3  # pJ: a multiplication and an addition of the widest operands
            assert one.energy["array"] == pytest.approx(one.work.products * one.work.count * per)


@pytest.mark.parametrize(
    "name, block",
    [
        ("transformer_blocks.3.attn1.to_out.0", "transformer_blocks.3"),
        (
            "down_blocks.1.attentions.0.transformer_blocks.1.ff.net.2",
            "down_blocks.1.attentions.0.transformer_blocks.1",
        ),
        ("mid_block.resnets.1.conv1", "mid_block.resnets.1"),
        ("conv_in", ""),
    ],
)
def test_the_block_of_a_layer(name, block):
    assert block_of(name) == block


def test_what_cannot_be_modelled_is_told():
    with pytest.raises(UserError, match="no layers"):
        works_of_call(nn.ReLU(), lambda: None)
    with pytest.raises(UserError, match="sdxl, flux"):
        facts_of("sd3")
    with pytest.raises(UserError, match="vit-b, vit-h"):
        works_of_net("vit-l", 64, CORRECTED)

"""Attention of diffusers' models in 8 bits: who is served, what stays as it was, and what the report says."""

import contextlib

import diffusers
import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.functional import scaled_dot_product_attention

from ptq4dm import UserError, attention_errors, attention_in_8_bits
from ptq4dm.calibration.record import ready
from ptq4dm.layers.attention import processors
from ptq4dm.layers.attention.processors import Redirected, plain_processor
from ptq4dm.layers.attention.state import Attention8
from tests.support import denoisers, models


def inputs(seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, 4, 8, 8, generator=generator), torch.tensor([3, 7])


@torch.no_grad()
def run(model, timestep=400, seed=1):
    x, labels = inputs(seed)
    return model(x, torch.full((2,), timestep), class_labels=labels).sample


def relative(y, right):
    return ((y - right).norm() / right.norm()).item()


@pytest.mark.parametrize("kind", ["int8", "e4m3"])
def test_a_transformer(kind):
    model = models.dit()
    right, before = run(model), [part.processor for part in model.modules() if hasattr(part, "processor")]
    with attention_in_8_bits(model, kind) as attention:
        y = run(model)
        assert all(
            isinstance(part.processor, AttnProcessor2_0) for part in model.modules() if hasattr(part, "processor")
        )
    assert 0 < relative(y, right) < 0.01
    assert torch.equal(run(model), right)
    assert [part.processor for part in model.modules() if hasattr(part, "processor")] == before
    assert attention.layers == ["transformer_blocks.0.attn1", "transformer_blocks.1.attn1"]
    assert attention.kernels == {"reference": 2} and "in 8 bits by reference, 2 times" in str(attention)


def test_layers_by_name_and_another_backend():
    model = models.dit()
    right = run(model)
    with attention_in_8_bits(model, layers=["transformer_blocks.1.attn1"]) as attention:
        one = run(model)
    assert not torch.equal(one, right) and attention.kernels == {"reference": 1}
    assert attention.left == {"transformer_blocks.0.attn1": "not asked for"}
    said = pytest.raises(
        UserError, match="'nowhere' is no attention of this model, e.g. 'transformer_blocks.0.attn1'"
    )
    with said, attention_in_8_bits(model, layers=["nowhere"]):
        pass


def test_timesteps():
    model = models.dit()
    early, late = run(model, 900), run(model, 400)
    with attention_in_8_bits(model, timesteps=(0, 900)) as attention:
        assert torch.equal(run(model, 900), early)
        assert not attention.kernels and not torch.equal(run(model, 400), late)
    assert attention.kernels == {"reference": 2} and not model._forward_pre_hooks
    for wrong in [(5, 5), (1,), "all", (0, None)]:
        said = pytest.raises(UserError, match="timesteps (are two|must be 2) numbers")
        with said, attention_in_8_bits(model, timesteps=wrong):
            pass


def test_what_is_left_to_torch_is_counted():
    model = models.dit()
    x, labels = inputs()
    with attention_in_8_bits(model) as attention, torch.enable_grad():
        model(x, torch.full((2,), 4), class_labels=labels).sample.sum().backward()
    assert attention.sixteen == {"gradients are wanted": 2} and not attention.kernels
    assert "as it was 2 times: gradients are wanted" in str(attention)
    for part in model.modules():
        if hasattr(part, "processor"):
            part.processor = AttnProcessor()
    with attention_in_8_bits(model) as attention:
        run(model)
    assert attention.unreached == attention.layers and "2 layers compute attention in another way" in str(attention)


def test_cross_attention_stays():
    model = models.conditional_unet()
    x, text = torch.randn(1, 4, 8, 8), torch.randn(1, 5, 12)
    with torch.no_grad(), attention_in_8_bits(model) as attention:
        model(x, 3, encoder_hidden_states=text)
    assert all(name.endswith("attn1") for name in attention.layers) and attention.layers
    assert set(attention.left.values()) == {"it looks at a text, whose keys are few"}
    assert sum(attention.kernels.values()) == len(attention.layers)


def test_masks_and_shared_keys_are_left():
    state = Attention8("int8")
    q, few = torch.randn(1, 4, 6, 8), torch.randn(1, 2, 6, 8)
    mask = torch.ones(6, 6, dtype=torch.bool)
    with Redirected(state, "a"):
        masked = scaled_dot_product_attention(q, q, q, attn_mask=mask)
        causal = scaled_dot_product_attention(q, q, q, is_causal=True)
        grouped = scaled_dot_product_attention(q, few, few, enable_gqa=True)
        scaled = scaled_dot_product_attention(q, q, q, scale=2.0)
    assert state.sixteen == {"it has a mask": 2, "its heads are of several sizes, or share keys": 1}
    assert torch.equal(masked, scaled_dot_product_attention(q, q, q, attn_mask=mask))
    assert torch.equal(causal, scaled_dot_product_attention(q, q, q, is_causal=True))
    assert torch.equal(grouped, scaled_dot_product_attention(q, few, few, enable_gqa=True))
    right = scaled_dot_product_attention(q, q, q, scale=2.0)
    assert 0 < relative(scaled, right) < 0.1


def test_twice_and_wrong():
    model = models.dit()
    again = pytest.raises(UserError, match="it is in 8 bits already")
    with attention_in_8_bits(model), again, attention_in_8_bits(model):
        pass
    with (
        pytest.raises(UserError, match="kind must be 'int8' or 'e4m3'; got 'int4'"),
        attention_in_8_bits(model, "int4"),
    ):
        pass
    with pytest.raises(UserError, match="UNet2DModel has no attention"), attention_in_8_bits(models.plain_unet()):
        pass
    processor = model.transformer_blocks[0].attn1.processor
    assert plain_processor(processor) is processor


def test_errors_by_layer_and_timestep():
    model = models.dit()
    right = run(model)

    def call():
        assert torch.equal(run(model), right)
        run(model, 900)

    errors = attention_errors(model, call)
    assert errors.timesteps == [900.0, 400.0] and list(errors.squares) == [
        f"transformer_blocks.{i}.attn1" for i in (0, 1)
    ]
    assert 0 < errors.error() < 0.02
    each = [errors.error(name, time) for name in errors.squares for time in errors.timesteps]
    assert min(each) <= errors.error() <= max(each)
    assert [row[2] for row in errors.over(0)] == sorted(each, reverse=True) and not errors.over(1.0)
    assert str(errors).splitlines()[0].split() == ["timestep", "900", "400", "all"]
    with pytest.raises(UserError, match="reached no attention"):
        attention_errors(model, lambda: None)


def test_compiled():
    model = models.dit()
    right = run(model)
    with attention_in_8_bits(model):
        y = run(model)
        torch._dynamo.reset()
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        again = run(compiled)
    assert relative(y, right) > 0 and relative(again, y) < 1e-5


def flux(blocks=1):
    torch.manual_seed(0)
    model = diffusers.FluxTransformer2DModel(
        patch_size=1, in_channels=4, num_layers=blocks, num_single_layers=blocks, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=8, pooled_projection_dim=8, axes_dims_rope=(4, 4, 8),
    )  # fmt: skip
    given = dict(hidden_states=torch.randn(1, 16, 4), encoder_hidden_states=torch.randn(1, 5, 8))
    places = dict(img_ids=torch.zeros(16, 3), txt_ids=torch.zeros(5, 3))
    return model, given | places | dict(pooled_projections=torch.randn(1, 8), timestep=torch.tensor([0.5]))


def wan():
    torch.manual_seed(0)
    model = diffusers.WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4, num_layers=2, text_dim=8,
        freq_dim=16, ffn_dim=32, rope_max_seq_len=32,
    )  # fmt: skip
    given = dict(hidden_states=torch.randn(1, 4, 2, 8, 8), encoder_hidden_states=torch.randn(1, 5, 8))
    return model, given | dict(timestep=torch.tensor([500]))


def sd3():
    torch.manual_seed(0)
    model = diffusers.SD3Transformer2DModel(
        sample_size=8, patch_size=1, in_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=4,
        joint_attention_dim=32, caption_projection_dim=32, pooled_projection_dim=64, out_channels=4,
    )  # fmt: skip
    given = dict(hidden_states=torch.randn(1, 4, 8, 8), encoder_hidden_states=torch.randn(1, 5, 32))
    return model, given | dict(pooled_projections=torch.randn(1, 64), timestep=torch.tensor([5]))


@pytest.mark.parametrize("made", [lambda: flux(3), wan], ids=["flux", "wan"])
@torch.no_grad()
def test_blocks_are_compiled_as_often_as_without(made):
    """Not once for each layer's name: of twenty blocks torch.compile would refuse all but eight."""
    model, given = made()
    model.eval()
    counters, results = [], []
    for context in (contextlib.nullcontext(), attention_in_8_bits(model)):
        torch._dynamo.reset()
        counters.append(CompileCounterWithBackend("eager"))
        with context:
            right = model(**given).sample
            model.compile_repeated_blocks(fullgraph=True, backend=counters[-1])
            results.append(relative(model(**given).sample, right))
        for part in model.modules():
            part._compiled_call_impl = None
    assert counters[0].frame_count == counters[1].frame_count > 0 and max(results) < 1e-5


@pytest.mark.parametrize("made", [flux, wan, sd3])
@torch.no_grad()
def test_models_with_rotary_embeddings_and_joined_texts(made):
    model, given = made()
    model.eval()
    right = model(**given).sample
    with attention_in_8_bits(model) as attention:
        y = model(**given).sample
    assert 0 < relative(y, right) < 0.01
    assert sum(attention.kernels.values()) == len(attention.layers) == 2 and not attention.unreached
    assert not attention.sixteen and torch.equal(model(**given).sample, right)


@pytest.mark.parametrize("joined", [False, True], ids=["", "one layer for q, k and v"])
def test_fluxs_norms_and_rotary_embedding_go_into_the_op(monkeypatch, joined):
    """With a text and without; with a hook on a norm by its own processor."""
    model, store = denoisers.pair("flux")
    if joined:
        model.fuse_qkv_projections()
    call, ops = ready(store.calls, model), []
    plain = processors.attention8

    def seen(*args):
        ops.append(len(args))
        return plain(*args)

    monkeypatch.setattr(processors, "attention8", seen)
    with torch.no_grad(), attention_in_8_bits(model) as attention:
        together = model(*call.args, **call.kwargs)[0]
        layers = len(attention.layers)
        assert layers > 1 and ops == [15] * layers and attention.kernels == {"reference": layers}
        handle = model.transformer_blocks[0].attn.norm_k.register_forward_hook(lambda *_: None)
        by_hook = model(*call.args, **call.kwargs)[0]
        assert sorted(ops[layers:]) == [5] + [15] * (layers - 1)
        handle.remove()
        monkeypatch.setattr(processors.flux, "serves", lambda *_: False)
        apart = model(*call.args, **call.kwargs)[0]
        assert ops[2 * layers :] == [5] * layers
    assert relative(together, apart) < 2e-5 and relative(by_hook, apart) < 2e-5
    with torch.no_grad():
        assert 0 < relative(together, model(*call.args, **call.kwargs)[0]) < 0.02

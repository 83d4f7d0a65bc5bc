"""Keys and values of the text, kept over steps: the same as without, in fewer bits, never those of another state."""

import copy
import gc

import diffusers
import peft
import pytest
import torch
from torch import nn
from torch.utils import _pytree as pytree

import denoisers
import models
import ptq4dm
from ptq4dm import UserError
from ptq4dm.caching.four_bits import keys_in_4_bits, values_in_4_bits
from ptq4dm.caching.text_cache import MOST_TEXTS
from ptq4dm.kernels.formats.kv4 import dequantize_kv4

TOKENS, WIDTH = denoisers.TEXT
KINDS = {"pixart": denoisers.pixart, "sdxl": denoisers.sdxl, "wan": denoisers.wan, "sana": denoisers.sana}
LAYERS = {"pixart": 2, "sdxl": 4, "wan": 2, "sana": 2}


class Prompted(diffusers.DiffusionPipeline):
    """Guided sampling of a text; the halves in one call of the network, or each in its own. Texts are new tensors in
    every step, as those of a pipeline may be."""

    def __init__(self, transformer, scheduler, shape, arguments):
        super().__init__()
        self.register_modules(transformer=transformer, scheduler=scheduler)
        self.shape, self.arguments = shape, arguments
        self.set_progress_bar_config(disable=True)

    @torch.no_grad()
    def __call__(self, words, num_inference_steps=3, together=True, between=None, generator=None, output_type="pt"):
        self.scheduler.set_timesteps(num_inference_steps)
        x = torch.randn(len(words), *self.shape, generator=torch.Generator().manual_seed(1))
        x = x.to(self.transformer.dtype)
        for t in self.scheduler.timesteps:
            texts = torch.cat([torch.zeros_like(words), words]).to(x.dtype)
            halves = [(torch.cat([x, x]), texts)] if together else [(x, one) for one in texts.chunk(2)]
            found = [
                self.transformer(one, timestep=t.expand(len(one)), return_dict=False, **self.arguments(text))[0]
                for one, text in halves
            ]
            without, with_text = torch.cat(found)[:, : x.shape[1]].chunk(2)
            x = self.scheduler.step(without + 3 * (with_text - without), t, x, return_dict=False)[0]
            if between is not None:
                between(self.transformer)
        return diffusers.ImagePipelineOutput(images=x[:, :3])


def words(batch=2, seed=0):
    return torch.randn(batch, TOKENS, WIDTH, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def made():
    """kind -> a pipeline that nobody changes."""
    found = {}
    for kind, build in KINDS.items():
        torch.manual_seed(0)
        model, shape, arguments = build()
        for parameter in model.parameters():
            nn.init.normal_(parameter, 0, (parameter[0].numel() if parameter.ndim > 1 else 4) ** -0.5)
        found[kind] = Prompted(model.eval(), diffusers.DDIMScheduler(clip_sample=False), shape, arguments)
    return found


@pytest.fixture
def own(made):
    """kind -> a pipeline to change."""

    def of(kind):
        pipe = made[kind]
        parts = copy.deepcopy(pipe.transformer), diffusers.DDIMScheduler(clip_sample=False)
        return Prompted(*parts, pipe.shape, pipe.arguments)

    return of


def error(one, other):
    return ((one - other).norm() / other.norm()).item()


# ------------------------------------------------------------------------------------------------- what it computes


@pytest.mark.parametrize("together", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_as_computed_gives_the_same_pictures_to_the_bit(kind, together, made):
    pipe = made[kind]
    right = pipe(words(), together=together).images
    with ptq4dm.cached_text(pipe, bits=None) as cache:
        assert torch.equal(pipe(words(), together=together).images, right)
    texts = 1 if together else 2
    assert (cache.made, cache.reused) == (LAYERS[kind] * texts, LAYERS[kind] * texts * 2)
    assert len(cache.layers) == LAYERS[kind] and not cache.left and f"reused {cache.reused}" in str(cache)
    assert torch.equal(pipe(words(), together=together).images, right)  # and after it


@pytest.mark.parametrize("kind", KINDS)
def test_four_bits_are_those_of_the_format(kind, made):
    """As a model whose keys and values are rounded where they leave projections and norms."""
    pipe, handles = made[kind], []

    def rounded(heads, quantize):
        def hook(module, args, y):
            split = y if y.ndim == 4 else y.unflatten(-1, (heads, -1)).transpose(1, 2)
            back = dequantize_kv4(quantize(split), split.shape[-1])
            return back if y.ndim == 4 else back.transpose(1, 2).flatten(2)

        return hook

    exact = pipe(words()).images
    with ptq4dm.cached_text(pipe, bits=4) as cache:
        found = pipe(words()).images
    for name in cache.layers:
        attn = pipe.transformer.get_submodule(name)
        for part, quantize in ((attn.norm_k or attn.to_k, keys_in_4_bits), (attn.to_v, values_in_4_bits)):
            handles.append(part.register_forward_hook(rounded(attn.heads, quantize)))
    try:
        right = pipe(words()).images
    finally:
        for handle in handles:
            handle.remove()
    assert error(found, right) < 1e-5 and error(right, exact) > 1e-3
    assert "attention by reference" in str(cache)


def test_sixteen_bits_lie_between(made):
    pipe = made["pixart"]
    exact = pipe(words()).images
    with ptq4dm.cached_text(pipe, bits=16) as cache:
        found = pipe(words()).images
    assert 0 < error(found, exact) < 1e-2
    with ptq4dm.cached_text(pipe, bits=4) as four:
        assert error(pipe(words()).images, exact) > 5 * error(found, exact)
    heads = 32  # width of one
    assert four.most_bytes[0] <= (4 + 32 / heads) / 16 * cache.most_bytes[0]
    assert four.most_bytes[1] == cache.most_bytes[1] == 2 * 2 * TOKENS * 64 * 4  # one copy, of both halves


def test_padded_prompts(own):
    """A mask is of the call, not of the cache: the same text with another mask reuses its keys."""
    pipe = own("pixart")
    x, time = torch.randn(2, *pipe.shape, generator=torch.Generator().manual_seed(0)), torch.tensor([500, 500])
    masks = [(torch.arange(TOKENS) < torch.tensor([[3], [kept]])).long() for kept in (5, 8)]

    def run(mask):
        options = pipe.arguments(words()) | {"encoder_attention_mask": mask}
        with torch.no_grad():
            return pipe.transformer(x, timestep=time, return_dict=False, **options)[0]

    right = [run(mask) for mask in masks]
    for bits, bound in ((None, 0), (4, 0.2)):
        with ptq4dm.cached_text(pipe.transformer, bits) as cache:
            assert all(error(run(mask), y) <= bound for mask, y in zip(masks, right, strict=True))
            assert (cache.made, cache.reused) == (2, 2)
    assert error(right[0], right[1]) > 1e-3


def test_older_processors_and_other_scales():
    torch.manual_seed(0)
    model = models.conditional_unet()
    attentions = [m for m in model.modules() if getattr(m, "is_cross_attention", False)]
    for attn in attentions:
        attn.set_processor(diffusers.models.attention_processor.AttnProcessor())
        attn.scale *= 2
    x, text = torch.randn(2, 4, 8, 8), torch.randn(2, 5, 12)
    with torch.no_grad():
        right = model(x, 10, text).sample
        for bits, bound in ((None, 1e-5), (4, 0.2)):
            with ptq4dm.cached_text(model, bits) as cache:
                assert error(model(x, 10, text).sample, right) < bound
            assert len(cache.layers) == len(attentions) > 1


def test_self_attention_is_untouched(made):
    pipe = made["pixart"]
    before = {name: module.processor for name, module in pipe.transformer.named_modules() if name.endswith("attn1")}
    with ptq4dm.cached_text(pipe) as cache:
        assert all(pipe.transformer.get_submodule(name).processor is one for name, one in before.items())
        assert before and all(name.endswith("attn2") for name in cache.layers)


def test_inside_our_verbs_and_on_quantized_layers(own):
    pipe = own("sdxl")
    ptq4dm.quantize(pipe, ptq4dm.RTNConfig(weight_bits=4, activations="dynamic"))
    right = pipe(words()).images
    with ptq4dm.cached_text(pipe, bits=None) as cache:
        assert torch.equal(pipe(words()).images, right) and cache.reused == 8
        sampled = ptq4dm.sample(pipe, [0, 1], num_inference_steps=3, conditioning={"words": words()})
    again = ptq4dm.sample(pipe, [0, 1], num_inference_steps=3, conditioning={"words": words()})
    assert cache.made == 8 and torch.equal(sampled, again)


def test_compiled_models_keep_texts_too(own):
    pipe = own("pixart")
    right = pipe(words()).images
    whole = pipe.transformer
    pipe.transformer = torch.compile(whole, backend="eager")
    with ptq4dm.cached_text(pipe, bits=None) as cache:
        assert error(pipe(words()).images, right) < 1e-6
    assert (cache.made, cache.reused) == (2, 4)
    torch._dynamo.reset()


# --------------------------------------------------------------------------------------------------- never stale


def in_place(model):
    with torch.no_grad():
        first_attention(model).to_k.weight.mul_(1.5)


def replaced(model):
    layer = first_attention(model).to_v
    layer.weight = nn.Parameter(layer.weight * 1.5)


def loaded(model):
    model.load_state_dict({name: value * 1.01 for name, value in model.state_dict().items()})


def another_layer(model):
    attn = first_attention(model)
    attn.to_k = denoisers.Doubled(attn.to_k)


def other_bias(model):
    layer = first_attention(model).to_k
    layer.bias = None if layer.bias is not None else nn.Parameter(torch.ones(layer.out_features))


def other_norm(model):
    attn = first_attention(model)
    if attn.norm_k is None:
        attn.norm_k = nn.RMSNorm(attn.inner_dim // attn.heads)
    else:
        attn.norm_k.eps = 10.0


def another_forward(model):
    layer = first_attention(model).to_k
    layer.forward = lambda x: nn.functional.linear(x, layer.weight) - 1


def adapter(model):
    torch.manual_seed(3)
    config = peft.LoraConfig(r=2, target_modules=["to_k", "to_v"], init_lora_weights=False)
    peft.inject_adapter_in_model(config, model)


def adapters(model):
    return [module for module in model.modules() if isinstance(module, peft.tuners.lora.LoraLayer)]


def scaled_adapter(model):
    for layer in adapters(model):
        layer.scale_layer(3.0)


def no_adapter(model):
    for layer in adapters(model):
        layer.enable_adapters(False)


def merged_adapter(model):
    """peft writes through `.data`; it also notes that it did. At another scale, for merging alone changes nothing."""
    scaled_adapter(model)
    for layer in adapters(model):
        layer.merge()


def first_attention(model):
    return next(m for m in model.modules() if getattr(m, "is_cross_attention", False))


CHANGES = [in_place, replaced, loaded, another_layer, other_bias, other_norm, another_forward, adapter]
OF_ADAPTERS = [scaled_adapter, no_adapter, merged_adapter]


@pytest.mark.parametrize("change", CHANGES + OF_ADAPTERS, ids=lambda change: change.__name__)
@pytest.mark.parametrize("kind", ["pixart", "sdxl", "wan"])
def test_a_change_between_steps_is_seen(kind, change, own):
    """With the cache pictures are those without, to the bit; and the change matters."""
    pictures = {}
    for cached in (False, True):
        for changing in (False, True):
            pipe, steps = own(kind), []
            if change in OF_ADAPTERS:
                adapter(pipe.transformer)

            def between(model, steps=steps, changing=changing):
                steps.append(1)
                if changing and len(steps) == 1:
                    change(model)

            if cached:
                with ptq4dm.cached_text(pipe, bits=None) as cache:
                    pictures[cached, changing] = pipe(words(), between=between).images
                assert cache.reused > 0
            else:
                pictures[cached, changing] = pipe(words(), between=between).images
    assert torch.equal(pictures[True, True], pictures[False, True])
    assert torch.equal(pictures[True, False], pictures[False, False])
    assert not torch.equal(pictures[False, True], pictures[False, False])


@pytest.mark.parametrize("kind", ["pixart", "sdxl", "wan"])
def test_another_prompt_batch_or_dtype(kind, own):
    pipe = own(kind)
    given = [words(), words(seed=1), words(3), words(1), words()]
    right = [pipe(one).images for one in given]
    with ptq4dm.cached_text(pipe, bits=None):
        for one, y in zip(given, right, strict=True):
            assert torch.equal(pipe(one).images, y)
        pipe.transformer.to(torch.bfloat16)
        half = pipe(words()).images
        pipe.transformer.to(torch.float32)  # rounded
        rounded = pipe(words()).images
    assert half.dtype == torch.bfloat16 and torch.equal(rounded, pipe(words()).images)
    assert not torch.equal(rounded, right[0])


def test_a_text_that_is_written_into(own):
    """The same tensor with other words, inside one call of the pipeline."""
    pipe = own("sdxl")
    x, text, time = torch.randn(2, *pipe.shape), words(), torch.tensor([5, 5])

    def run():
        options = pipe.arguments(words()) | {"encoder_hidden_states": text}
        with torch.no_grad():
            return pipe.transformer(x, timestep=time, return_dict=False, **options)[0]

    with ptq4dm.cached_text(pipe, bits=None) as cache:
        first = run()
        text[1, 2] += 1
        second = run()
        assert cache.made == 8 and torch.equal(run(), second) and cache.reused == 4
    assert torch.equal(run(), second) and not torch.equal(first, second)


def test_weights_written_through_data_are_seen_by_the_next_call(own):
    """torch does not count such writing: within one call it could not be seen."""
    pipe = own("wan")
    with ptq4dm.cached_text(pipe, bits=None) as cache:
        before = pipe(words()).images
        first_attention(pipe.transformer).to_v.weight.data.mul_(2)
        after = pipe(words()).images
    assert cache.made == 4 and torch.equal(after, pipe(words()).images) and not torch.equal(before, after)


def test_autocast_is_part_of_the_state(own):
    pipe = own("wan")
    x, time = torch.randn(1, *pipe.shape), torch.tensor([5])

    def run(on):
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=on):
            return pipe.transformer(x, timestep=time, return_dict=False, **pipe.arguments(words(1)))[0]

    right = [run(on) for on in (True, False, True)]
    with ptq4dm.cached_text(pipe.transformer, bits=None):
        assert all(torch.equal(run(on), y) for on, y in zip((True, False, True), right, strict=True))


def test_parameters_without_a_count_are_never_trusted(own):
    pipe = own("pixart")
    with torch.inference_mode():
        layer = first_attention(pipe.transformer).to_k
        layer.weight = nn.Parameter(layer.weight.clone(), requires_grad=False)
    with ptq4dm.cached_text(pipe, bits=None) as cache:
        pipe(words())
    assert (cache.made, cache.reused) == (1 * 3 + 1, 2)


def test_hooks_on_projections_are_called_in_every_step(own):
    pipe, calls = own("pixart"), []
    handle = first_attention(pipe.transformer).to_k.register_forward_hook(lambda *_: calls.append(1))
    with ptq4dm.cached_text(pipe) as cache:
        hooked = pipe(words()).images
    handle.remove()
    with ptq4dm.cached_text(pipe):
        assert torch.equal(pipe(words()).images, hooked)  # in the same bits
    assert len(calls) == 3 and (cache.made, cache.uncached, cache.reused) == (4, 3, 2)
    assert "3 could not be kept: hooks" in str(cache)


# ------------------------------------------------------------------------------------------------ what is kept


def living(shapes):
    """Floating tensors of these shapes that are alive."""
    tensors = [one for one in gc.get_objects() if type(one) is torch.Tensor and one.is_floating_point()]
    return [one for one in tensors if tuple(one.shape) in shapes]


@pytest.mark.parametrize("kind", ["pixart", "sdxl", "wan"])
def test_no_keys_or_values_outlive_a_call_but_in_four_bits(kind, own):
    """Between steps there is no float tensor of their shape, but for texts themselves: the copy by which a text is
    known has that shape where a text is as wide as the model."""
    pipe, given = own(kind), words(5)
    shapes = set()
    for attn in (module for module in pipe.transformer.modules() if getattr(module, "is_cross_attention", False)):
        width = attn.inner_dim // attn.heads
        shapes |= {(10, attn.heads, TOKENS, width), (10, TOKENS, attn.heads, width), (10, TOKENS, attn.inner_dim)}
    counts = {}
    for bits in (4, None):
        before = {id(one) for one in living(shapes)}

        with ptq4dm.cached_text(pipe, bits) as cache:

            def between(_, bits=bits, before=before, cache=cache):
                texts = [torch.cat([torch.zeros_like(given), given]), *(one.copy for one in cache._texts)]
                found = [one for one in living(shapes) if id(one) not in before]
                kept = [one for one in found if not any(torch.equal(one, text) for text in texts)]
                counts.setdefault(bits, []).append(len({one.data_ptr() for one in kept}))

            pipe(given, between=between)
        assert not cache._texts and not [one for one in living(shapes) if id(one) not in before]
    assert counts == {4: [0] * 3, None: [2 * LAYERS[kind]] * 3}  # the second: a census that finds them


def test_few_texts_are_kept(own):
    pipe = own("wan")
    x, time = torch.randn(1, *pipe.shape), torch.tensor([5])
    with ptq4dm.cached_text(pipe.transformer) as cache, torch.no_grad():
        for seed in (0, 1, 2, 3, 4, 5, 5, 2, 0):
            pipe.transformer(x, timestep=time, **pipe.arguments(words(1, seed)))
        assert len(cache._texts) == MOST_TEXTS == 4 and (cache.made, cache.reused) == (14, 4)
        one = cache.bytes[0] / MOST_TEXTS
    assert cache.bytes == (0, 0) and cache.most_bytes[0] == MOST_TEXTS * one


# -------------------------------------------------------------------------------------------------- refusals, ends


def test_the_model_is_as_before_whatever_happens(made):
    pipe = made["pixart"]
    before = [module.processor for module in pipe.transformer.modules() if hasattr(module, "processor")]
    with pytest.raises(KeyError), ptq4dm.cached_text(pipe):
        pipe(words())
        raise KeyError
    with ptq4dm.cached_text(pipe):
        first_attention(pipe.transformer).set_processor(
            mine := diffusers.models.attention_processor.AttnProcessor2_0()
        )
    after = [module.processor for module in pipe.transformer.modules() if hasattr(module, "processor")]
    assert first_attention(pipe.transformer).processor is mine  # who set another keeps it
    first_attention(pipe.transformer).set_processor(before[1])
    assert len(after) == 4 and sum(a is b for a, b in zip(before, after, strict=True)) == 3


@pytest.mark.parametrize("bits", [8, 0, "4", True])
def test_bits(bits, made):
    with pytest.raises(UserError, match="bits must be 4, 16 or None"), ptq4dm.cached_text(made["wan"], bits=bits):
        pass


def refused(target):
    with pytest.raises(UserError) as caught, ptq4dm.cached_text(target):
        pass
    return str(caught.value)


def test_what_has_no_such_text(made):
    assert "DiTTransformer2DModel has no cross-attention whose text can be kept" in refused(denoisers.dit()[0])
    assert "FluxTransformer2DModel has no" in refused(denoisers.flux()[0])
    assert "in joint attention" in refused(denoisers.ltx()[0])
    odd = models.conditional_unet()
    odd.set_attn_processor(diffusers.models.attention_processor.SlicedAttnProcessor(1))
    assert "its processor is SlicedAttnProcessor, of Attention" in refused(odd)
    odd.set_attn_processor(diffusers.models.attention_processor.AttnProcessor())
    for attn in [module for module in odd.modules() if getattr(module, "is_cross_attention", False)]:
        attn.norm_q = attn.norm_k = nn.RMSNorm(attn.inner_dim // attn.heads)
    assert "does not use its norms" in refused(odd)
    image = diffusers.WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=32, in_channels=4, out_channels=4, num_layers=1, text_dim=64,
        freq_dim=64, ffn_dim=128, rope_max_seq_len=32, image_dim=64, added_kv_proj_dim=64,
    )  # fmt: skip
    assert "keys of an image, or of a second text, beside those of the text" in refused(image)
    for wrong in ("model", None, 3):
        assert "pipeline" in refused(wrong)
    with ptq4dm.cached_text(made["wan"]):
        assert "its text is kept already" in refused(made["wan"])


def test_projections_that_are_fused(own):
    pipe = own("wan")
    pipe.transformer.fuse_qkv_projections()
    assert "its projections are fused" in refused(pipe)


def test_gradients_are_refused(made):
    pipe = made["wan"]
    with pytest.raises(UserError, match="under torch.no_grad"), ptq4dm.cached_text(pipe.transformer):
        pipe.transformer(torch.randn(1, *pipe.shape), timestep=torch.tensor([5]), **pipe.arguments(words(1)))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_on_a_gpu(kind, dtype, own):
    """As computed to the bit; 4 bits by the kernel, as near to what the reference computes as the dtype is fine."""
    pipe = own(kind)
    pipe.transformer.to("cuda", dtype)
    x = torch.randn(2, *pipe.shape, generator=torch.Generator().manual_seed(0)).to("cuda", dtype)
    text, time = words().to("cuda", dtype), torch.tensor([500, 20], device="cuda")

    def arguments(words):
        """Those of the pipeline, on the GPU and in its dtype; masks are whole numbers."""
        return pytree.tree_map(
            lambda leaf: (
                leaf.to("cuda", dtype if leaf.is_floating_point() else None) if torch.is_tensor(leaf) else leaf
            ),
            pipe.arguments(words),
        )

    def run(bits):
        with ptq4dm.cached_text(pipe.transformer, bits) as cache, torch.no_grad():
            found = [
                pipe.transformer(x, timestep=time, return_dict=False, **arguments(text.clone()))[0] for _ in range(3)
            ]
        assert torch.equal(found[0], found[1]) and torch.equal(found[1], found[2])
        assert (cache.made, cache.reused) == (LAYERS[kind], 2 * LAYERS[kind])
        return found[0].float(), cache

    with torch.no_grad():
        right = pipe.transformer(x, timestep=time, return_dict=False, **arguments(text))[0].float()
    assert torch.equal(run(None)[0], right)
    four, cache = run(4)
    assert dict(cache.kernels) == {"triton-kv4": 3 * LAYERS[kind]}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ptq4dm.kernels.attention.layer.kernel_name", lambda *_: "reference")
        plain = run(4)[0]
    assert error(four, plain) < (0.02 if dtype == torch.float16 else 0.1)
    assert 1e-3 < error(four, right) < 0.5

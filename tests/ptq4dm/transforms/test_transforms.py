"""Every registered transform on every small denoiser: the function stays, the weights change, plans are followed."""

import copy
import json

import diffusers
import pytest
import torch
from diffusers.models.attention import FeedForward
from diffusers.models.attention_processor import AttnProcessor
from torch import nn

import denoisers
import ptq4dm
from ptq4dm.errors import UserError
from ptq4dm.kernels.formats.hadamard import hadamard
from ptq4dm.transforms.attention import query_key_streams, value_streams
from ptq4dm.transforms.base import TRANSFORMS, TransformPlan, apply_all
from ptq4dm.transforms.feedforward import gated_streams, hidden_streams
from ptq4dm.transforms.peaks import Peaks, watch_peaks
from ptq4dm.transforms.reorder import falling
from ptq4dm.transforms.smooth import Smooth
from ptq4dm.transforms.smooth_attention import shared

pytestmark = pytest.mark.usefixtures("one_thread")
WORDS = torch.randn(2, 8, 64, generator=torch.Generator().manual_seed(1)).double()


def allegro():
    """Rotary embeddings, and no norms of queries and keys."""
    model = diffusers.AllegroTransformer3DModel(
        num_attention_heads=2, attention_head_dim=24, in_channels=4, out_channels=4, num_layers=1, sample_height=8,
        sample_width=8, sample_frames=2, cross_attention_dim=48, caption_channels=64,
    )  # fmt: skip
    angles = torch.outer(torch.arange(4.0), torch.tensor([1.0, 0.5, 0.25, 0.1] * 2))
    turns = (angles.cos(), angles.sin())
    places = torch.cartesian_prod(torch.arange(2), torch.arange(4), torch.arange(4)).T[:, None].expand(3, 2, -1)
    return model, (4, 2, 8, 8), lambda words: {
        "encoder_hidden_states": words, "image_rotary_emb": ((turns,) * 3, tuple(places)),
        "attention_mask": torch.ones(2, 2, 8, 8).double(), "encoder_attention_mask": torch.ones(2, 8).double(),
    }  # fmt: skip


def wan_with_image():
    """Cross-attention to text and, with values of its own, to an image; both into one output projection."""
    model = diffusers.WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=32, in_channels=4, out_channels=4, num_layers=1, text_dim=64,
        freq_dim=64, ffn_dim=128, rope_max_seq_len=32, image_dim=64, added_kv_proj_dim=64,
    )  # fmt: skip
    return model, (4, 2, 8, 8), lambda words: {
        "encoder_hidden_states": words.repeat(1, 64, 1), "encoder_hidden_states_image": words[:, :3],
    }  # fmt: skip


def without_norms(build):
    """The same architecture with queries and keys as they leave their projections (SD3 medium, early CogVideoX)."""

    def built():
        model, *rest = build()
        for module in model.modules():
            for norm in ("norm_q", "norm_k", "norm_added_q", "norm_added_k"):
                if hasattr(module, norm):
                    setattr(module, norm, None)
        return model, *rest

    return built


@pytest.fixture(scope="module")
def zoo(unet):
    """kind -> (model in float64, its output function, peaks of its layers)."""
    builders = {
        "unet": lambda: (unet(), (3, 8, 8), lambda words: {}),
        **denoisers.KINDS,
        "allegro": allegro,
        "wan with image": wan_with_image,
        "sd3 without norms": without_norms(denoisers.sd3),
        "cogvideox without norms": without_norms(denoisers.cogvideox),
    }
    made = {}

    def of(kind):
        if kind not in made:
            torch.manual_seed(0)
            model, shape, arguments = builders[kind]()
            for parameter in model.parameters():  # no zeros, no ones: every weight and bias counts
                fan_in = parameter[0].numel() if parameter.ndim > 1 else 4
                nn.init.normal_(parameter, 0, fan_in**-0.5)
            model.double().eval()
            x, options = torch.randn(2, *shape).double(), arguments(WORDS)

            @torch.no_grad()
            def output(model):
                time = torch.tensor([3.0, 7.0]).double() / (10 if "flux" in kind else 1)
                return model(x, timestep=time, return_dict=False, **options)[0]

            with watch_peaks(model) as peaks:
                output(model)
            made[kind] = model, output, peaks
        return made[kind]

    of.kinds = list(builders)
    return of


KINDS = ["unet", "dit", "pixart", "sd3", "flux", "sana", "sdxl", "cogvideox", "wan", "ltx", "allegro"]
KINDS += ["wan with image", "sd3 without norms", "cogvideox without norms"]
CHANGES = sorted(name for name, one in TRANSFORMS.items() if not getattr(one, "online", False))  # of float weights
NOTHING = {("smooth-attention", "ltx")}
# the last block of SD3 forgets its text
UNREAD = {("transformer_blocks.1.attn.add_q_proj", "sd3 without norms")}
UNREAD |= {("transformer_blocks.1.attn.norm_added_q", "sd3")}


def same(a, b):
    """Equal but for rounding: some layers of diffusers compute in float32 whatever they are given."""
    return float((a - b).abs().max() / b.abs().max()) < 1e-5


def weights(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def changed(model, before):
    return {name.rpartition(".")[0] for name, tensor in model.state_dict().items() if (tensor != before[name]).any()}


def through_json(plan):
    tensors = {**plan.tensors, "of another plan": torch.ones(1)}
    return TransformPlan.from_dict(json.loads(json.dumps(plan.to_dict())), tensors)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", CHANGES)
def test_function_is_preserved(zoo, name, kind):
    """The model's output before and after; each plan changes all its layers and no other; were one of them not
    changed, the output would be another: the test can fail."""
    original, output, peaks = zoo(kind)
    reference, before = output(original), weights(original)
    plans = TRANSFORMS[name].find(original, peaks)
    assert bool(plans) == ((name, kind) not in NOTHING)
    assert not changed(original, before)
    for plan in plans:
        model = copy.deepcopy(original)
        apply_all(model, [plan])
        assert changed(model, before) == set(plan.modules)
        assert same(output(model), reference)
        for layer in plan.modules:
            after = weights(model.get_submodule(layer))
            model.get_submodule(layer).load_state_dict(original.get_submodule(layer).state_dict())
            assert same(output(model), reference) == ((layer, kind) in UNREAD)
            model.get_submodule(layer).load_state_dict(after)


@pytest.mark.parametrize("name", CHANGES)
def test_every_transform_is_found_somewhere(name):
    """What `test_function_is_preserved` expects of it is not nothing everywhere."""
    assert any((name, kind) not in NOTHING for kind in KINDS)


@pytest.mark.parametrize("kind", KINDS)
def test_plans_are_followed_to_the_bit(zoo, kind):
    """All transforms one after another, by plans that went through JSON."""
    original, output, peaks = zoo(kind)
    one, two = copy.deepcopy(original).float(), copy.deepcopy(original).float()
    plans = []
    for name in CHANGES:
        plans += TRANSFORMS[name].find(one, peaks)
    apply_all(one, plans)
    again = [through_json(plan) for plan in plans]
    assert again == plans
    apply_all(two, again)
    assert all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), two.state_dict().values(), strict=True))
    assert same(output(one.double()), output(original.float().double()))
    original.double()


@pytest.mark.parametrize("name", CHANGES)
def test_attention_by_its_older_processor(zoo, name):
    original, output, peaks = zoo("pixart")
    model = copy.deepcopy(original)
    model.set_attn_processor(AttnProcessor())
    plans = TRANSFORMS[name].find(model, peaks)
    assert plans == TRANSFORMS[name].find(original, peaks)
    apply_all(model, plans)
    assert same(output(model), output(original))


@pytest.mark.parametrize("name", ["smooth", "reorder"])
@pytest.mark.parametrize(
    "activation", ["gelu", "gelu-approximate", "geglu", "geglu-approximate", "swiglu", "linear-silu"]
)
def test_feed_forward_layers(name, activation):
    torch.manual_seed(0)
    layer = FeedForward(16, 12, activation_fn=activation, final_dropout=True).double().eval()
    x = torch.randn(9, 16).double()
    with torch.no_grad(), watch_peaks(layer) as peaks:
        expected = layer(x)
    before = weights(layer)
    plans = TRANSFORMS[name].find(layer, peaks)
    apply_all(layer, plans)
    found = name == "reorder" or activation in ("geglu", "swiglu")
    assert changed(layer, before) == ({"net.0.proj", "net.2"} if found else set())
    torch.testing.assert_close(layer(x), expected, rtol=1e-6, atol=1e-6)


def test_the_zoo_is_all_that_is_tested(zoo):
    assert zoo.kinds == KINDS


# --- the formulas -------------------------------------------------------------------------------------------


def test_smooth_is_its_formula(zoo):
    """s_j = peak_j^alpha / max|W_out[:, j]|^(1 - alpha), W_v /= s, W_out *= s."""
    original, _, peaks = zoo("pixart")
    plan = TRANSFORMS["smooth"].find(original, peaks, alpha=0.3)[0]
    assert plan.options == {"alpha": 0.3}
    value, out = (original.get_submodule(name) for name in plan.modules)
    s = peaks.peak(plan.modules[1]).double() ** 0.3 / out.weight.abs().amax(0) ** 0.7
    model = copy.deepcopy(original)
    apply_all(model, [plan])
    after = [model.get_submodule(name) for name in plan.modules]
    torch.testing.assert_close(after[0].weight, value.weight / s[:, None], rtol=1e-6, atol=0)
    torch.testing.assert_close(after[0].bias, value.bias / s, rtol=1e-6, atol=0)
    torch.testing.assert_close(after[1].weight, out.weight * s, rtol=1e-6, atol=0)
    assert torch.equal(after[1].bias, out.bias)


def test_smoothed_keys_are_equally_large(zoo):
    """alpha = 1 in a model without rotary embeddings; with them, in each pair the larger one is 1."""
    for kind in ("dit", "allegro"):
        original, output, peaks = zoo(kind)
        model = copy.deepcopy(original)
        plan = TRANSFORMS["smooth-attention"].find(model, peaks, alpha=1.0)[0]
        apply_all(model, [plan])
        with watch_peaks(model) as after:
            output(model)
        key = after.output_peak(plan.modules[0])
        if kind == "allegro":  # 2 heads of 3 thirds of 2 halves of 4
            key = key.reshape(6, 2, 4).amax(1)
        torch.testing.assert_close(key, torch.ones_like(key), rtol=1e-5, atol=0)


@pytest.mark.parametrize("kind, pairs", [("sd3", False), ("wan", True), ("cogvideox", True)])
def test_norms_take_in_divisors(zoo, kind, pairs):
    """RMSNorm of each head for two modalities, of all heads as one, and LayerNorm with a bias: with alpha = 1 keys
    that come out of them are equally large. The projections stay."""
    original, output, peaks = zoo(kind)
    model = copy.deepcopy(original)
    plans = TRANSFORMS["smooth-attention"].find(model, peaks, alpha=1.0)
    apply_all(model, plans)
    assert all("norm" in name for plan in plans for name in plan.modules)
    assert any(".attn2." in name for plan in plans for name in plan.modules) == (kind == "wan")
    with watch_peaks(model) as after:
        output(model)
    for plan in plans:
        keys = [name for name in plan.modules if name.endswith("_k")]
        key = torch.stack([after.output_peak(name) for name in keys]).amax(0)
        turned = pairs and ".attn2." not in keys[0]  # Wan's text is not turned
        s = plan.tensors["divisors"]
        key = key.reshape(-1, 2).amax(1) if turned else key[s > 1e-4]  # no divisor is smaller
        assert len(key) >= len(s) // 2 - 1
        torch.testing.assert_close(key, torch.ones_like(key), rtol=1e-5, atol=0)
        assert len(keys) == (2 if kind == "sd3" else 1)
        assert len(plan.tensors["divisors"]) == (64 if kind == "wan" else 32)


def test_a_text_s_keys_are_smoothed_whole_by_default(zoo):
    """And the others by the paper's half."""
    for kind in ("pixart", "wan"):
        model, _, peaks = zoo(kind)
        plans = TRANSFORMS["smooth-attention"].find(model, peaks)
        shares = {(".attn2." in plan.modules[0], plan.options["alpha"]) for plan in plans}
        assert shares == {(True, 1.0), (False, 0.5)}
        assert {plan.options["alpha"] for plan in TRANSFORMS["smooth-attention"].find(model, peaks, alpha=0)} == {0}


def test_norms_that_do_not_fit_have_no_stream(zoo):
    """A norm without a weight, or on one side alone over other channels: nothing could take the divisors in."""
    original, _, peaks = zoo("sd3")
    for broken in (nn.RMSNorm(32, elementwise_affine=False), nn.RMSNorm(64), None):
        model = copy.deepcopy(original)
        for block in model.transformer_blocks:
            block.attn.norm_q = broken
        assert not query_key_streams(model)
    model = copy.deepcopy(zoo("pixart")[0])
    found = len(query_key_streams(model))
    model.set_attn_processor(AttnProcessor())  # which knows no norms
    model.transformer_blocks[0].attn2.norm_k = nn.RMSNorm(32)
    assert len(query_key_streams(model)) == found - 1 == 3


def test_reordered_inputs_fall(zoo):
    original, output, peaks = zoo("sdxl")
    model = copy.deepcopy(original)
    apply_all(model, TRANSFORMS["reorder"].find(model, peaks))
    with watch_peaks(model) as after:
        output(model)
    for stream in value_streams(model) + hidden_streams(model):
        for head in after.peak(stream.modules[-1]).reshape(stream.heads, -1):
            assert (head.diff() <= 1e-6 * head[0]).all()
    assert falling(torch.tensor([1.0, 3, 3, 2, 5, 9]), 2).tolist() == [1, 2, 0, 5, 4, 3]


def test_hadamard_is_orthogonal():
    for size in (1, 2, 8, 64):
        H = hadamard(size)
        torch.testing.assert_close(H @ H.T, torch.eye(size).double())
        torch.testing.assert_close(H.abs(), torch.full_like(H, size**-0.5))


def test_rotation_spreads_an_outlier(zoo):
    original, output, _ = zoo("dit")
    model = copy.deepcopy(original)
    stream = value_streams(model)[0]
    with torch.no_grad():
        model.get_submodule(stream.modules[0]).weight[5] *= 100
    ratio = []
    for plans in ([], TRANSFORMS["rotate"].find(model, None)[:1]):
        apply_all(model, plans)
        with watch_peaks(model) as peaks:
            output(model)
        head = peaks.peak(stream.modules[-1])[:32]
        ratio.append(float(head.max() / head.median()))
    assert ratio[0] > 20 and ratio[1] < 2


def test_shared_divisors():
    assert shared(torch.tensor([1.0, 2, 5, 3]), torch.tensor([0, 1, 0, 1])).tolist() == [5, 3, 5, 3]


def test_16_bits_stay_16_bits(zoo):
    original, output, peaks = zoo("dit")
    model = copy.deepcopy(original).bfloat16()
    coarse = output(model.double())
    model.bfloat16()
    for name in CHANGES:
        apply_all(model, TRANSFORMS[name].find(model, peaks))
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    error = (output(model.double()) - coarse).abs().max() / coarse.abs().max()
    assert 1e-5 < error < 0.05  # the changed weights are rounded anew


# --- where nothing is found ---------------------------------------------------------------------------------


def test_no_stream_where_it_would_not_be_exact(zoo):
    """Fused projections, another processor, adapters, tied weights, quantized layers: all are left alone."""
    original = zoo("pixart")[0]
    everything = value_streams(original)

    def left(edit):
        model = copy.deepcopy(original)
        edit(model.transformer_blocks[0].attn1)
        return [s for s in everything if s not in value_streams(model)]

    def doubled(attention):
        attention.to_v = nn.Sequential(attention.to_v)

    def tied(attention):
        attention.to_k.weight = attention.to_v.weight

    def used_twice(attention):
        attention.another_name = attention.to_v

    def own_processor(attention):
        attention.processor = type("AttnProcessor2_0", (type(attention.processor),), {})()

    def grouped(attention):
        attention.to_v = nn.Linear(64, 32)

    assert left(lambda attention: None) == []
    for edit in (lambda a: a.fuse_projections(), doubled, tied, used_twice, own_processor, grouped):
        assert left(edit) == everything[:1]


def test_text_that_leaves_without_a_projection_has_no_stream(zoo):
    """The last block of SD3."""
    model = zoo("sd3")[0]
    assert [s.modules for s in value_streams(model)] == [
        [f"transformer_blocks.0.attn.{part}" for part in ("to_v", "add_v_proj", "to_out.0", "to_add_out")]
    ]


def test_single_blocks_of_flux(zoo):
    """One layer reads attention and hidden units."""
    model = zoo("flux")[0]
    values, hidden = value_streams(model)[-1], hidden_streams(model)[-1]
    block = "single_transformer_blocks.0"
    assert values.modules == [f"{block}.attn.to_v", f"{block}.proj_out"]
    assert hidden.modules == [f"{block}.proj_mlp", f"{block}.proj_out"]
    assert (values.readers[0].start, hidden.readers[0].start, values.size, hidden.size) == (0, 64, 64, 256)


def test_gates_have_two_rows_for_a_unit(zoo):
    model = zoo("sdxl")[0]
    for gated, hidden in zip(gated_streams(model), hidden_streams(model), strict=True):
        assert [end.start for end in hidden.writers] == [0, gated.size] and gated.writers == hidden.writers[:1]


def test_rotary_embeddings_turn_pairs(zoo):
    assert query_key_streams(zoo("cogvideox without norms")[0])[0][1].tolist()[:6] == [0, 0, 1, 1, 2, 2]
    thirds = query_key_streams(zoo("allegro")[0])[0][1].tolist()
    assert thirds[:12] == [0, 1, 2, 3, 0, 1, 2, 3, 8, 9, 10, 11] and min(thirds[24:]) == 24


# --- refusals -----------------------------------------------------------------------------------------------


def refused(model, plans, match):
    before = weights(model)
    with pytest.raises(UserError, match=match) as error:
        apply_all(model, plans)
    assert not changed(model, before)
    assert str(error.value).count(". ") == 0


@pytest.mark.parametrize("name", CHANGES)
def test_a_plan_of_another_model_is_refused(zoo, name):
    """Nothing has changed then, by the plans before it neither."""
    original, _, peaks = zoo("pixart")
    plans = TRANSFORMS[name].find(original, peaks)
    last = plans[-1]

    def with_last(**values):
        return [*plans[:-1], TransformPlan(last.kind, values.pop("modules", last.modules), last.options, **values)]

    refused(zoo("wan")[0], plans, "of another model: there is no module")
    refused(zoo("pixart")[0], with_last(tensors=last.tensors, modules=last.modules[::-1]), "of another model")
    wider = diffusers.PixArtTransformer2DModel(
        num_attention_heads=2, attention_head_dim=64, in_channels=4, num_layers=2, sample_size=16,
        cross_attention_dim=128, caption_channels=64,
    )  # fmt: skip
    refused(wider, plans, "of another model")
    if last.tensors:
        refused(original, with_last(tensors={}), "of another model")
        wrong = {key: value.new_zeros(len(value)) for key, value in last.tensors.items()}
        refused(original, with_last(tensors=wrong), "no permutation|positive and finite")
    packed = copy.deepcopy(original).float()
    ptq4dm.quantize(packed, ptq4dm.RTNConfig(activations="dynamic"))
    refused(packed, plans, "full precision")
    with torch.device("meta"):
        empty = denoisers.pixart()[0]
    with pytest.raises(UserError, match="not loaded"):
        apply_all(empty, plans)


def test_plans_for_queries_and_keys_know_norms_and_rotary_embeddings(zoo):
    free, _, peaks = zoo("sd3 without norms")
    plans = TRANSFORMS["smooth-attention"].find(free, peaks)
    refused(zoo("sd3")[0], plans, "not preserve the function")
    turning, _, peaks = zoo("cogvideox without norms")
    plan = TRANSFORMS["smooth-attention"].find(turning, peaks)[0]
    plan.tensors["divisors"] = torch.arange(1.0, 65)
    refused(turning, [plan], "turns together")


def test_plans_lack_nothing():
    plan = TransformPlan("smooth", ["a", "b"], {"alpha": 0.5}, {"divisors": torch.ones(4)})
    data = plan.to_dict()
    assert data["tensors"] == {"divisors": [4]}
    assert (
        plan
        == through_json(plan)
        != TransformPlan("smooth", ["a", "b"], {"alpha": 0.5}, {"divisors": torch.zeros(4)})
    )
    with pytest.raises(UserError, match="lacks its tensor 'divisors'"):
        TransformPlan.from_dict(data, {})
    with pytest.raises(UserError, match=r"has shape \[5\] and not \[4\]"):
        TransformPlan.from_dict(data, {"divisors": torch.ones(5)})
    with pytest.raises(UserError, match="transform 'smoothe' is unknown; choose from .*smooth"):
        TransformPlan.from_dict({**data, "kind": "smoothe"}, plan.tensors)
    for broken in ({}, [], {**data, "options": 3}, {**data, "tensors": ["divisors"]}):
        with pytest.raises(UserError, match="a transform's plan"):
            TransformPlan.from_dict(broken, plan.tensors)


WHOLE = {  # kind -> options, tensors of a plan
    "smooth": ({"alpha": 0.5}, {"divisors": torch.tensor([0.5, 1, 2, 4])}),
    "smooth-attention": ({"alpha": 0.5}, {"divisors": torch.tensor([0.5, 1, 2, 4])}),
    "reorder": ({}, {"order": torch.tensor([1, 0, 3, 2])}),
    "rotate": ({"block": 4}, {}),
    "hadamard": ({"group": 16, "kind": "regular"}, {}),
    "sylvester": ({"group": 32, "kind": "sylvester"}, {}),
}
DIVISORS = [
    *({"divisors": WHOLE["smooth"][1]["divisors"].to(t)} for t in (torch.float16, torch.float64, torch.int32)),
    *({"divisors": torch.tensor([1.0, wrong])} for wrong in (0.0, -1.0, 1e-38, 1e30)), {},
    {**WHOLE["smooth"][1], "more": torch.ones(1)},
]  # fmt: skip
BROKEN = [
    *((kind, {"alpha": alpha}, {}) for kind in ("smooth", "smooth-attention") for alpha in ("x", True, None, 1.5)),
    *((kind, {"beta": 0.5}, {}) for kind in WHOLE),
    *((kind, {}, tensors) for kind in ("smooth", "smooth-attention") for tensors in DIVISORS),
    *(("reorder", {}, {"order": torch.tensor(order)}) for order in ([0, 0], [1, 2], [-1, 0], [1.0, 0.0])),
    *(("rotate", {"block": block}, {}) for block in (0, 1, 3, -4, 4.0, "4", True)),
    ("rotate", {}, {"order": torch.arange(4)}),
    *(("hadamard", {"group": group}, {}) for group in (0, 8, 32, 1024, 16.0, "16", True)),
    *(("sylvester", {"kind": kind}, {}) for kind in ("regular", "random", 1)),
]


@pytest.mark.parametrize(("kind", "options", "tensors"), BROKEN)
def test_plans_that_can_be_of_no_model_are_not_loaded(kind, options, tensors, tmp_path):
    sound, parts = WHOLE[kind]
    plan = ptq4dm.Plan("rtn", {}, [TransformPlan(kind, ["a", "b"], {**sound, **options}, tensors or parts)])
    if not (tensors or options):  # nothing is there that should be
        plan = ptq4dm.Plan("rtn", {}, [TransformPlan(kind, ["a", "b"], sound, {})])
    plan.save(tmp_path / "plan.json")
    with pytest.raises(UserError, match=f"plan.json: .*'{kind}'"):
        ptq4dm.Plan.load(tmp_path / "plan.json")


@pytest.mark.parametrize("kind", sorted(TRANSFORMS))
def test_plans_that_can_be_of_a_model_are_loaded(kind, tmp_path):
    options, tensors = WHOLE[kind]
    for known in (options, {}) if kind in ("smooth", "smooth-attention", "reorder") else (options,):
        plan = ptq4dm.Plan("rtn", {}, [TransformPlan(kind, ["a", "b"], known, tensors)])
        plan.save(tmp_path / "plan.json")
        assert ptq4dm.Plan.load(tmp_path / "plan.json") == plan
        ptq4dm.Plan.from_dict(plan.to_dict()).check()  # as a packed model has it, without tensors


@pytest.mark.parametrize("name", sorted(name for name, one in TRANSFORMS.items() if one.needs))
def test_evidence_must_be_of_the_model(zoo, name):
    model, _, peaks = zoo("pixart")
    with pytest.raises(UserError, match="needs evidence"):
        TRANSFORMS[name].find(model, None)
    with pytest.raises(UserError, match="the evidence has none"):
        TRANSFORMS[name].find(model, Peaks())
    for wrong in (torch.ones(63), torch.full((64,), torch.nan)):
        every = dict.fromkeys(peaks.inputs, wrong)
        with pytest.raises(UserError, match="of another model"):
            TRANSFORMS[name].find(model, Peaks(every, every))


@pytest.mark.parametrize("name", ["smooth", "smooth-attention"])
@pytest.mark.parametrize("alpha", [-0.1, 1.5, float("nan")])
def test_alpha_is_a_share(zoo, name, alpha):
    model, _, peaks = zoo("pixart")
    with pytest.raises(UserError, match="from 0 to 1"):
        TRANSFORMS[name].find(model, peaks, alpha=alpha)


def test_layers_that_never_ran_are_left_alone(zoo):
    model, _, peaks = zoo("pixart")
    plans = Smooth().find(model, Peaks({k: v for k, v in peaks.inputs.items() if ".0.attn1." in k}))
    assert [plan.modules[1] for plan in plans] == ["transformer_blocks.0.attn1.to_out.0"]

"""Networks that wait for their first calls, and are quantized in the last of them."""

import copy
import threading

import pytest
import torch
from diffusers import DDIMScheduler

import ptq4dm
from helpers import same
from models import dit
from ptq4dm import PixelDiTPipeline, SVDQuantConfig, UserError
from ptq4dm.cli.main import main
from ptq4dm.layers.base import holds_quantized
from ptq4dm.quantization.diffusers_bridge import quantization_config

pytestmark = pytest.mark.usefixtures("one_thread")

QUICK = {
    "rank": 4,
    "group_size": 32,
    "activations": "int8",
    "smoothing": 0.5,
    "rounding": "nearest",
    "refinements": 1,
}
SEEDS = [0, 1]


def pipeline():
    model = dit(
        in_channels=3, out_channels=3, patch_size=2, num_attention_heads=1, attention_head_dim=32, num_layers=1
    )
    torch.manual_seed(1)
    with torch.no_grad():  # a fresh DiT answers zero whatever it is fed
        model.proj_out_2.weight.normal_(0, 0.1)
    return PixelDiTPipeline(model, DDIMScheduler())


def config(**options):
    return SVDQuantConfig(**{"evidence": "calls", "num_calls": 2} | QUICK | options)


def images(pipe, steps=4):
    return ptq4dm.sample(pipe, SEEDS, num_inference_steps=steps)


def recorded(count=2):
    pipe = pipeline()
    with ptq4dm.record(pipe.transformer) as calls:
        images(pipe)
    return calls[:count]


def noise():
    return torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(3))


def called(model, t=500):
    labels = torch.zeros(2, dtype=torch.long)
    return model(noise(), torch.full((2,), t), class_labels=labels).sample


def test_a_look_at_how_it_guides_is_no_first_call():
    """It calls the network for other rows, and other steps, than the generation does."""
    pipe, asked = pipeline(), {"guidance_scale": 2.0, "guidance_interval": (0.3, 0.7)}
    report = ptq4dm.quantize(pipe, config(num_calls=5))
    ptq4dm.sample(pipe, [0, 1, 2], num_inference_steps=4, pipeline_kwargs=asked)
    assert "(4 of 5 made)" in report.table()
    report.cancel()


def test_the_first_calls_of_a_pipeline_quantize_it_and_it_goes_on():
    pipe, by_hand = pipeline(), pipeline()
    report = ptq4dm.quantize(pipe, config())
    told = report.table()
    assert "transformer waits for calls of its own use (0 of 2 made)" in told and "full precision" in told
    state = torch.random.get_rng_state()
    found = images(pipe)
    assert torch.equal(torch.random.get_rng_state(), state)  # what the caller draws is what it would have drawn
    ptq4dm.quantize(by_hand.transformer, config(), recorded())
    assert same(pipe.transformer.state_dict(), by_hand.transformer.state_dict())
    exact, whole = images(pipeline()), images(by_hand)  # two steps of four are quantized
    assert 0 < (found - exact).abs().max() < 0.5 and not torch.equal(found, whole)
    assert not report.waiting and report.calls == {"transformer": [2, 4]}
    assert "transformer: by 2 recorded calls of 4 rows together" in report.table()
    assert report.to_dict()["networks"] == ["transformer"]


def test_calls_are_in_full_precision_up_to_the_last_and_quantized_after_it():
    model, by_hand = pipeline().transformer, pipeline().transformer
    exact = [called(model, t) for t in (900, 600, 300)]
    with ptq4dm.record(by_hand) as calls:
        called(by_hand, 900), called(by_hand, 600)
    ptq4dm.quantize(by_hand, config(), calls)
    ptq4dm.quantize(model, config())
    assert torch.equal(called(model, 900), exact[0]) and torch.equal(called(model, 600), exact[1])
    third = called(model, 300)
    assert torch.equal(third, called(by_hand, 300)) and not torch.equal(third, exact[2])


def test_what_the_caller_switched_on_does_not_reach_it():
    model, by_hand = pipeline().transformer, pipeline().transformer
    ptq4dm.quantize(by_hand, config(), recorded_alone())
    ptq4dm.quantize(model, config())
    with torch.inference_mode():
        called(model, 900), called(model, 600)
    assert same(model.state_dict(), by_hand.state_dict())
    assert not any(one.is_inference() for one in model.state_dict().values())


def recorded_alone():
    model = pipeline().transformer
    with ptq4dm.record(model) as calls:
        called(model, 900), called(model, 600)
    return calls


def test_eight_bit_inputs_have_no_grids_of_the_first_steps_alone():
    model = pipeline().transformer
    ptq4dm.quantize(model, config(), recorded_alone())
    plans = quantization_config(model).plan.layers.values()
    assert {"int8", "svdq"} == {one.format for one in plans}
    assert all(one.input_scale is None for one in plans if one.format == "int8")
    assert not any(one.activation == "none" for one in plans if one.format == "svdq")


REFUSED = {
    "quantize": lambda pipe: ptq4dm.quantize(pipe, config()),
    "collect": lambda pipe: ptq4dm.collect(pipe),
    "evaluate": lambda pipe: ptq4dm.evaluate(pipe),
    "optimize": lambda pipe: ptq4dm.optimize(pipe),
    "fuse": lambda pipe: ptq4dm.fuse(pipe),
    "copy": lambda pipe: copy.deepcopy(pipe.transformer),
}


def test_what_would_take_it_for_a_finished_network_is_refused(tmp_path):
    pipe = pipeline()
    report = ptq4dm.quantize(pipe, config())
    called(pipe.transformer)
    saving = {"save": lambda pipe: pipe.save_pretrained(tmp_path / "out"), "report": lambda pipe: report.to_dict()}
    for name, verb in (REFUSED | saving).items():
        with pytest.raises(UserError, match=r"waits for calls of its own use \(1 of 2 made\)"):
            verb(pipe)
            pytest.fail(name)
    report.cancel()
    assert not report.waiting
    pipe.save_pretrained(tmp_path / "float")
    called(pipe.transformer), called(pipe.transformer)
    assert not holds_quantized(pipe.transformer)


def test_calls_that_fail_do_not_count():
    model = pipeline().transformer
    report = ptq4dm.quantize(model, config())
    with pytest.raises(RuntimeError):
        model(torch.zeros(2, 5, 8, 8), torch.zeros(2), class_labels=torch.zeros(2, dtype=torch.long))
    called(model)
    assert "(1 of 2 made)" in report.table() and not holds_quantized(model)
    called(model)
    assert holds_quantized(model)


def test_a_call_that_is_given_nan_is_named_and_does_not_count():
    model = pipeline().transformer
    ptq4dm.quantize(model, config(num_calls=1))
    labels, times = torch.zeros(2, dtype=torch.long), torch.full((2,), 500)
    with pytest.raises(UserError, match="call of DiTTransformer2DModel was given NaN in 'hidden_states'"):
        model(noise() * float("nan"), times, class_labels=labels)
    assert not holds_quantized(model)
    with ptq4dm.record(model), pytest.raises(UserError, match="given NaN in 'timestep'"):
        model(noise(), times * float("nan"), class_labels=labels)
    called(model)
    assert holds_quantized(model)


def test_an_error_ends_it_and_leaves_full_precision():
    model = pipeline().transformer
    exact, report = called(model), ptq4dm.quantize(model, config())
    called(model)
    with torch.no_grad():  # other weights than those of the first call
        model.proj_out_2.weight.mul_(2)
        model.transformer_blocks[0].ff.net[2].weight.mul_(2)
    with pytest.raises(UserError, match="other weights"):
        called(model)
    assert not holds_quantized(model) and called(model).shape == exact.shape
    assert "was not quantized and is in full precision: the calls were recorded" in report.table()


def test_an_interrupt_changes_nothing_and_the_last_call_is_waited_for_anew(monkeypatch):
    model, by_hand = pipeline().transformer, pipeline().transformer
    report = ptq4dm.quantize(model, config())
    called(model, 900)
    before = {name: one.clone() for name, one in model.state_dict().items()}
    monkeypatch.setattr("ptq4dm.quantization.quantize.output_errors", interrupt)
    with pytest.raises(KeyboardInterrupt):
        called(model, 600)
    monkeypatch.undo()
    assert same(model.state_dict(), before) and "(1 of 2 made)" in report.table()
    called(model, 600)
    ptq4dm.quantize(by_hand, config(), recorded_alone())
    assert same(model.state_dict(), by_hand.state_dict())


def interrupt(*_):
    raise KeyboardInterrupt


def test_waits_until_no_thread_is_in_a_call():
    model, inside, go = pipeline().transformer, threading.Event(), threading.Event()
    ptq4dm.quantize(model, config(num_calls=1))
    main_thread = threading.get_ident()

    def pause(*_):
        if threading.get_ident() != main_thread:
            inside.set()
            assert go.wait(20)

    hook = model.transformer_blocks[0].register_forward_pre_hook(pause)
    other = threading.Thread(target=called, args=(model,))
    other.start()
    assert inside.wait(20)
    called(model)
    assert not holds_quantized(model)
    hook.remove()
    go.set()
    other.join()
    assert holds_quantized(model)


def test_options_that_would_change_nothing_are_refused():
    with pytest.raises(UserError, match="num_calls"):
        SVDQuantConfig(num_calls=2)
    with pytest.raises(UserError, match="num_calls"):
        config(num_calls=0)


def test_the_command_runs_the_pipeline_for_its_calls(tmp_path, capsys):
    pipeline().save_pretrained(tmp_path / "float")
    options = [f"--{name.replace('_', '-')}={value}" for name, value in QUICK.items()]
    command = [
        "quantize",
        "--model",
        str(tmp_path / "float"),
        "--method",
        "svdquant",
        "--evidence",
        "calls",
        *options,
    ]
    few = [*command, "--calibration-steps", "1", "--output", str(tmp_path / "few")]
    assert main(few) == 2 and "called 1 times in 1 steps, and 4 calls" in capsys.readouterr().err
    assert not (tmp_path / "few").exists()
    assert main([*command, "--num-samples", "3"]) == 2 and "--num-samples" in capsys.readouterr().err
    two = ["--num-calls", "2", "--calibration-steps", "4", "--batch-size", "2", "--output", str(tmp_path / "out")]
    assert main([*command, *two]) == 0
    assert "by 2 recorded calls of 4 rows together" in capsys.readouterr().out
    assert main([*command, "--num-calls", "2", "--calibration-steps", "4", "--output", str(tmp_path / "one")]) == 0
    assert "by 2 recorded calls of 2 rows together" in capsys.readouterr().out  # an image at once
    saved, by_hand = ptq4dm.load_pipeline(tmp_path / "out"), ptq4dm.load_pipeline(tmp_path / "float")
    with ptq4dm.record(by_hand.transformer) as calls:
        images(by_hand)
    ptq4dm.quantize(by_hand, config(), calls[:2])
    assert same(saved.transformer.state_dict(), by_hand.transformer.state_dict())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_the_first_calls_quantize_it_and_draw_no_numbers():
    pipe, by_hand = pipeline(), pipeline()
    for one in (pipe, by_hand):
        one.to("cuda")
    ptq4dm.quantize(pipe, config())
    drawn = torch.cuda.get_rng_state()
    images(pipe)
    assert torch.equal(torch.cuda.get_rng_state(), drawn)
    with ptq4dm.record(by_hand.transformer) as calls:
        images(by_hand)
    ptq4dm.quantize(by_hand, config(), calls[:2], component="transformer")
    assert same(pipe.transformer.state_dict(), by_hand.transformer.state_dict())

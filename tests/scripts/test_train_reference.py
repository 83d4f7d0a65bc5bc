"""The training script at toy size: files in the assets' layout, the assets' recipe, and a resume that is exact."""

import importlib
import json
import math
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

import fresh
import two_processes
from ptq4dm.errors import UserError
from ptq4dm.evaluation.features import Features, load_features
from ptq4dm.evaluation.frechet import read_statistics
from ptq4dm.pipelines.embedded import asset_path
from ptq4dm.pipelines.load import load_pipeline

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def scripts():
    """Import a module of scripts/ by name, as the scripts import each other.

    One thread: sums come in one order, so that a resumed run can equal a straight one bit for bit.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "scripts" / "training"))
        yield importlib.import_module
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Twelve training and four test pictures of three classes, in CIFAR-10's folders."""
    root = tmp_path_factory.mktemp("cifar")
    rng = np.random.default_rng(0)
    for split, number in (("train", 4), ("test", 1)):
        for name in ("airplane", "frog", "truck"):
            folder = root / split / name
            folder.mkdir(parents=True)
            for k in range(number):
                coarse = rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)
                Image.fromarray(coarse).resize((32, 32)).save(folder / f"{k:04}.jpg", quality=95)
    return root


def run(scripts, data, output, kind, steps, *more, name=None):
    arguments = [kind, "--data", str(data), "--output", str(output), "--max-steps", str(steps)]
    arguments += ["--batch-size", "4", "--device", "cpu", "--tiny", *more]
    scripts("train_reference").main(arguments)
    return json.loads((output / f"{name or kind}-cifar10.json").read_text())


def files(folder):
    return {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()} - {"README.md"}


@pytest.mark.parametrize(("kind", "part"), [("unet", "unet"), ("dit", "transformer")])
def test_diffusion_model_is_saved_measured_and_resumed(scripts, data, tmp_path, kind, part):
    name = f"{kind}-cifar10"
    result = run(scripts, data, tmp_path / "straight", kind, 4, "--num-fid", "3")
    assert result["steps"] == 4 and result["images_seen"] == 16
    assert set(result["feature-FID"]) == {"DDIM 50 steps", "DDIM 10 steps"}
    assert all(math.isfinite(v) and v > 0 for v in result["feature-FID"].values())
    assert (tmp_path / "straight" / f"{name}.png").is_file()

    folder = tmp_path / "straight" / name
    fitted = "fitted/scheduler_config.json"  # comes of `ptq4dm bench samplers --fit`
    assert files(folder) == files(asset_path(name)) - {fitted}
    model_index = json.loads((folder / "model_index.json").read_text())
    assert model_index == json.loads((asset_path(name) / "model_index.json").read_text()) | {
        "_diffusers_version": model_index["_diffusers_version"]
    }
    weights = load_file(folder / part / "diffusion_pytorch_model.safetensors")
    assert {w.dtype for w in weights.values()} == {torch.float16}
    loaded = getattr(load_pipeline(folder), part)
    assert loaded.state_dict().keys() == weights.keys()

    run(scripts, data, tmp_path / "halves", kind, 2, "--num-fid", "0")
    two_steps = load_file(tmp_path / "halves" / name / part / "diffusion_pytorch_model.safetensors")
    run(scripts, data, tmp_path / "halves", kind, 4, "--num-fid", "0", "--resume")
    resumed = load_file(tmp_path / "halves" / name / part / "diffusion_pytorch_model.safetensors")
    assert all(torch.equal(resumed[k], weights[k]) for k in weights)
    assert not all(torch.equal(two_steps[k], weights[k]) for k in weights)
    assert not [p for p in tmp_path.rglob("*") if "tmp" in p.name or p.name.startswith(".")]


@pytest.mark.parametrize("more", [(), ("--large",)])
def test_flow_model_is_saved_measured_and_resumed(scripts, data, tmp_path, more):
    name = "flow-dit-large" if more else "flow-dit"

    def go(folder, steps, *others):
        run(scripts, data, tmp_path / folder, "dit", steps, "--flow", *more, *others, name=name)
        return load_file(tmp_path / folder / f"{name}-cifar10/transformer/diffusion_pytorch_model.safetensors")

    weights = go("straight", 4, "--num-fid", "3")
    result = json.loads((tmp_path / "straight" / f"{name}-cifar10.json").read_text())
    assert set(result["feature-FID"]) == {"Euler 50 steps", "Euler 10 steps"}
    pipe = load_pipeline(tmp_path / "straight" / f"{name}-cifar10")
    assert type(pipe.scheduler).__name__ == "FlowMatchEulerDiscreteScheduler" and pipe.scheduler.shift == 1
    go("halves", 2, "--num-fid", "0")
    resumed = go("halves", 4, "--num-fid", "0", "--resume")
    assert all(torch.equal(resumed[k], weights[k]) for k in weights)


def test_velocity_is_learned_where_it_is_known(scripts):
    """The loss is zero for the exact velocity of one picture, n - x_0 = (x - x_0) / sigma at time 1000 sigma, and
    a tenth of the labels are the null class of guidance, in all blocks at once."""
    recipes = scripts("reference_recipes")
    torch.manual_seed(0)
    picture, seen = torch.rand(3, 32, 32) * 2 - 1, []
    picture = (picture + picture.flip(2)) / 2  # the same when mirrored

    class Exact:
        config = recipes.build_network("flow-dit", tiny=True).config

        def __call__(self, x, t, class_labels, return_dict):
            seen.append((t, class_labels))
            return (((x - picture) / (t / 1000)[:, None, None, None]),)

    labels = torch.full((4000,), 3)
    loss = recipes.diffusion_loss("flow-dit", torch.device("cpu"))(Exact(), picture.expand(4000, -1, -1, -1), labels)
    assert loss < 1e-6
    ((times, given),) = seen
    logit = torch.logit(times / 1000)
    assert logit.mean().item() == pytest.approx(-0.5, abs=0.1) and logit.std().item() == pytest.approx(1.2, abs=0.1)
    assert set(given.tolist()) == {3, 10} and (given == 10).float().mean().item() == pytest.approx(0.1, abs=0.02)
    drops = [part.dropout_prob for part in recipes.build_network("flow-dit").modules() if hasattr(part, "token_drop")]
    assert len(drops) == 6 and not any(drops)


def test_feature_network_is_saved_measured_and_resumed(scripts, data, tmp_path):
    result = run(scripts, data, tmp_path / "straight", "features", 4)
    folder = tmp_path / "straight" / "features-cifar10"
    assert files(folder) == files(asset_path("features-cifar10"))
    weights = load_file(folder / "model.safetensors")
    stored = load_file(asset_path("features-cifar10/model.safetensors"))
    assert {k: (v.shape, v.dtype) for k, v in weights.items()} == {k: (v.shape, v.dtype) for k, v in stored.items()}

    net = Features().eval()
    net.load_state_dict(weights)
    cifar10 = scripts("cifar10")
    train, test = cifar10.read_cifar10(data)
    with torch.no_grad():
        features = net.features(cifar10.to_signed(train.images)).double()
        right = net(cifar10.to_signed(test.images)).argmax(1) == test.labels
    assert result["test_accuracy"] == right.double().mean().item()
    statistics = read_statistics(folder / "train-statistics.npz")
    assert statistics.n == 12
    torch.testing.assert_close(statistics.mu, features.mean(0), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(statistics.sigma, torch.cov(features.T), rtol=1e-4, atol=1e-6)

    run(scripts, data, tmp_path / "halves", "features", 2)
    run(scripts, data, tmp_path / "halves", "features", 4, "--resume")
    resumed = load_file(tmp_path / "halves" / "features-cifar10" / "model.safetensors")
    assert all(torch.equal(resumed[k], weights[k]) for k in weights)


def test_statistics_of_the_embedded_network(scripts, data, tmp_path, capsys):
    path = tmp_path / "new" / "train-statistics.npz"
    scripts("reference_statistics").main(["--data", str(data), "--output", str(path)])
    assert "on 3 images" in capsys.readouterr().out
    statistics, embedded = read_statistics(path), read_statistics(asset_path("features-cifar10") / path.name)
    assert (statistics.feature, statistics.mode) == (embedded.feature, embedded.mode)
    cifar10 = scripts("cifar10")
    train, _ = cifar10.read_cifar10(data)
    features = load_features().features(cifar10.to_signed(train.images)).double()
    torch.testing.assert_close(statistics.mu, features.mean(0), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(statistics.sigma, torch.cov(features.T), rtol=1e-4, atol=1e-6)


def test_resume_needs_the_same_run(scripts, data, tmp_path):
    with pytest.raises(UserError, match="no checkpoint"):
        run(scripts, data, tmp_path, "dit", 1, "--num-fid", "0", "--resume")
    run(scripts, data, tmp_path, "dit", 1, "--num-fid", "0")
    with pytest.raises(UserError, match=r"other settings \(seed\)"):
        run(scripts, data, tmp_path, "dit", 2, "--num-fid", "0", "--resume", "--seed", "1")
    checkpoint = tmp_path / "dit-cifar10.checkpoint.safetensors"
    checkpoint.write_bytes(checkpoint.read_bytes()[:-100])
    with pytest.raises(UserError, match="checkpoint.safetensors cannot be read"):
        run(scripts, data, tmp_path, "dit", 2, "--num-fid", "0", "--resume")


@pytest.mark.parametrize(("kind", "part"), [("unet", "unet"), ("dit", "transformer")])
def test_recipe_is_that_of_the_embedded_models(scripts, kind, part):
    recipes = scripts("reference_recipes")
    folder = asset_path(f"{kind}-cifar10")
    config = json.loads((folder / part / "config.json").read_text())
    built = recipes.build_network(kind)
    assert json.loads(built.to_json_string()) == config | {
        "_diffusers_version": json.loads(built.to_json_string())["_diffusers_version"]
    }
    scheduler = json.loads(recipes.build_scheduler().to_json_string())
    stored = json.loads((folder / "scheduler" / "scheduler_config.json").read_text())
    assert scheduler == stored | {"_diffusers_version": scheduler["_diffusers_version"]}
    with safe_open(folder / part / "diffusion_pytorch_model.safetensors", framework="pt") as file:
        stored = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    assert stored == {name: tuple(value.shape) for name, value in built.state_dict().items()}


def test_schedules(scripts):
    recipes = scripts("reference_recipes")
    parameter = [torch.nn.Parameter(torch.zeros(1))]
    sgd = torch.optim.SGD(parameter, lr=0.0, momentum=0.9)
    seen = []
    for done in (0.0, 0.2, 1.0):
        recipes.set_schedule("features", sgd, 0, done)
        seen += [sgd.param_groups[0]["lr"], sgd.param_groups[0]["momentum"]]
    assert seen == pytest.approx([0.016, 0.95, 0.4, 0.85, 1.6e-6, 0.95])

    adam = torch.optim.AdamW(parameter, lr=0.0)
    seen = []
    for step, done in ((0, 0.0), (5000, 0.3), (5000, 0.65), (5000, 1.0)):
        recipes.set_schedule("unet", adam, step, done)
        seen.append(adam.param_groups[0]["lr"])
    assert seen == pytest.approx([6e-7, 6e-4, 3e-4, 0.0])


def test_one_cycle_is_that_of_torch(scripts):
    """The schedule is written as a function of progress; torch's own class gives the same numbers."""
    recipes = scripts("reference_recipes")
    ours = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.0, momentum=0.9)
    theirs = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0, momentum=0.9)
    total = 1000
    cycle = torch.optim.lr_scheduler.OneCycleLR(theirs, max_lr=0.4, total_steps=total, pct_start=0.2)
    for step in range(total - 1):
        recipes.set_schedule("features", ours, step, step / total)
        for key, close in (("lr", 3e-3), ("momentum", 1e-3)):
            assert ours.param_groups[0][key] == pytest.approx(theirs.param_groups[0][key], abs=close)
        theirs.step()
        cycle.step()


def test_augmentations(scripts):
    cifar10 = scripts("cifar10")
    torch.manual_seed(0)
    x = torch.arange(2 * 3 * 32 * 32).reshape(2, 3, 32, 32).float()
    flipped = cifar10.random_flip(x.repeat(16, 1, 1, 1))
    kinds = {(torch.equal(a, x[k % 2]), torch.equal(a, x[k % 2].flip(2))) for k, a in enumerate(flipped)}
    assert kinds == {(True, False), (False, True)}
    shifted = cifar10.random_shift(x.repeat(16, 1, 1, 1))
    padded = torch.nn.functional.pad(x, [4] * 4, mode="reflect")
    windows = {(k, i, j): padded[k, :, i : i + 32, j : j + 32] for k in (0, 1) for i in range(9) for j in range(9)}
    places = [
        [place for place, w in windows.items() if place[0] == k % 2 and torch.equal(w, a)]
        for k, a in enumerate(shifted)
    ]
    assert all(len(place) == 1 for place in places)
    assert len({place[0] for place in places}) > 16


def test_archive_and_folder_read_the_same(scripts, data, tmp_path):
    cifar10 = scripts("cifar10")
    archive = tmp_path / "cifar.tar.xz"
    with tarfile.open(archive, "w:xz") as tar:
        tar.add(data / "test", "test")
        tar.add(data / "train", "train")
    for one, other in zip(cifar10.read_cifar10(archive), cifar10.read_cifar10(data), strict=True):
        assert torch.equal(one.images, other.images)
        assert torch.equal(one.labels, other.labels)
    assert one.images.shape == (3, 3, 32, 32) and one.images.dtype == torch.uint8
    assert one.labels.tolist() == [0, 6, 9]


def test_wrong_data_is_a_user_error(scripts, data, tmp_path):
    read = scripts("cifar10").read_cifar10
    with pytest.raises(UserError, match="there is no CIFAR-10"):
        read(tmp_path / "nothing")
    broken = tmp_path / "broken.tar.xz"
    broken.write_bytes(b"not an archive")
    with pytest.raises(UserError, match="cannot be read as a tar archive"):
        read(broken)
    large = tmp_path / "large" / "train" / "frog"
    large.mkdir(parents=True)
    Image.new("RGB", (64, 64)).save(large / "0.jpg")
    with pytest.raises(UserError, match="64x64"):
        read(tmp_path / "large")
    Image.new("RGB", (32, 32)).save(large / "0.jpg")
    with pytest.raises(UserError, match="no pictures under test"):
        read(tmp_path / "large")


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["features", "--minutes", "1"], "leave --minutes out"),
        (["unet", "--minutes", "0"], "must be positive"),
        (["unet", "--flow"], "--flow goes with dit"),
        (["dit", "--large"], "--large goes with dit --flow"),
        (["dit", "--num-fid", "1"], "--num-fid"),
        (["dit", "--batch-size", "13", "--device", "cpu"], "12 training images"),
    ],
)
def test_wrong_options_are_user_errors(scripts, data, tmp_path, more, message):
    with pytest.raises(UserError, match=message):
        scripts("train_reference").main([*more, "--data", str(data), "--output", str(tmp_path)])


def test_run_from_the_command_line(tmp_path):
    """From the top of the checkout, wrong input ends with status 2 and one line."""
    command = [
        "scripts/training/train_reference.py",
        "unet",
        "--data",
        str(tmp_path / "none"),
        "--output",
        str(tmp_path),
    ]
    done = fresh.begin(two_processes.START, *command, said=tmp_path / "said")
    assert done.wait() == 2
    assert done.text().strip().splitlines()[-1].startswith("error: there is no CIFAR-10 at")

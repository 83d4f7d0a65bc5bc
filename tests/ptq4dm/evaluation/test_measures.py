"""SSIM, LPIPS, CLIP score and ImageReward: each against its formula, and said where it is not measured."""

import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch import nn

import personal
from ptq4dm import UserError
from ptq4dm.errors import DamagedFile
from ptq4dm.evaluation.evaluate import EvaluateConfig, evaluate
from ptq4dm.evaluation.measures import Measures, load_measures
from ptq4dm.evaluation.prompted import load_clip, load_image_reward
from ptq4dm.evaluation.published import markdown
from ptq4dm.evaluation.report import format_report
from ptq4dm.evaluation.similarity import load_lpips, ssim
from ptq4dm.pipelines.images import to_uint8

pytestmark = pytest.mark.usefixtures("one_thread")


def pictures(number=3, size=32, seed=0):
    return torch.rand(number, 3, size, size, generator=torch.Generator().manual_seed(seed))


def test_ssim_of_flat_pictures_is_its_formula():
    """Without structure there is only the term of brightness, (2ab + C1) / (a^2 + b^2 + C1), C1 = 0.01^2."""
    a, b = torch.full((1, 3, 16, 16), 0.2), torch.full((1, 3, 16, 16), 0.6)
    assert ssim(a, b) == pytest.approx([(2 * 0.2 * 0.6 + 1e-4) / (0.2**2 + 0.6**2 + 1e-4)])
    x = pictures()
    assert ssim(x, x) == pytest.approx([1.0] * 3)
    assert ssim(x[:, :, :5], x[:, :, :5]) is None


def test_pictures_too_small_for_a_figure_are_said_to_be(alexnet):
    measures = Measures(lpips=load_lpips(alexnet))
    found = measures.pairs(pictures(size=4), pictures(size=4, seed=1))
    assert found.keys() == {"mse", "psnr"} and measures.not_measured["ssim"].startswith("4x4 pixels are too few")
    assert "takes 32 a side" in measures.not_measured["lpips"]


# ------------------------------------------------------------------------------------------------------ LPIPS


def features():
    """AlexNet's convolutions (Krizhevsky 2014), as torchvision numbers them."""
    relu, pool = (lambda: nn.ReLU()), (lambda: nn.MaxPool2d(3, 2))
    return nn.Sequential(
        nn.Conv2d(3, 64, 11, 4, 2), relu(), pool(), nn.Conv2d(64, 192, 5, padding=2), relu(), pool(),
        nn.Conv2d(192, 384, 3, padding=1), relu(), nn.Conv2d(384, 256, 3, padding=1), relu(),
        nn.Conv2d(256, 256, 3, padding=1), relu(), pool(),
    )  # fmt: skip


@pytest.fixture
def alexnet(tmp_path, monkeypatch):
    """A file of random weights in torchvision's names. Where torchvision does not import, its network is ours."""
    try:
        import torchvision  # noqa: F401
    except Exception:  # noqa: BLE001  (missing, or built for another torch)
        theirs = ModuleType("torchvision")
        theirs.models = SimpleNamespace(alexnet=lambda weights: SimpleNamespace(features=features()))
        monkeypatch.setitem(sys.modules, "torchvision", theirs)
        monkeypatch.setattr("torchmetrics.functional.image.lpips._TORCHVISION_AVAILABLE", True)
    torch.manual_seed(0)
    state = {f"features.{name}": value for name, value in features().state_dict().items()}
    torch.save({**state, "classifier.1.weight": torch.zeros(2, 2)}, tmp_path / "alexnet.pth")
    return tmp_path / "alexnet.pth"


def test_lpips_is_its_formula_with_the_weights_of_the_file(alexnet):
    """Sum over five layers of the mean over pixels of w (a - b)^2, a and b of length 1 over channels (eq. 1)."""
    from torchmetrics.functional.image import lpips as theirs

    measure, a, b = load_lpips(alexnet), pictures(2, 48), pictures(2, 48, seed=1)
    assert measure.name == "alex"
    net = features()
    net.load_state_dict(
        {k.removeprefix("features."): v for k, v in torch.load(alexnet).items() if "classifier" not in k}
    )
    lines = torch.load(theirs.__file__.replace("lpips.py", "lpips_models/alex.pth"), map_location="cpu")
    shift, scale = (torch.tensor(x).reshape(1, 3, 1, 1) for x in ([-0.030, -0.088, -0.188], [0.458, 0.448, 0.450]))
    wanted, (x, y) = torch.zeros(2), ((2 * one - 1 - shift) / scale for one in (a, b))
    with torch.no_grad():
        for k, layer in enumerate(net[:12]):  # the last pool is not asked
            x, y = layer(x), layer(y)
            if isinstance(layer, nn.ReLU):
                at = (1, 4, 7, 9, 11).index(k)
                u, v = (one / (one.square().sum(1, keepdim=True) + 1e-8).sqrt() for one in (x, y))
                wanted += (lines[f"lin{at}.model.1.weight"] * (u - v).square()).sum(1).mean((1, 2))
    assert measure(a, b) == pytest.approx(wanted.tolist(), rel=1e-4) and min(measure(a, b)) > 1e-3
    assert measure(a, a) == [0, 0]


def test_a_file_of_other_weights_is_refused(alexnet, tmp_path):
    state = torch.load(alexnet)
    torch.save({"layer.weight": torch.zeros(2)}, tmp_path / "other.pth")
    torch.save({**state, "features.3.weight": torch.zeros(2, 2)}, tmp_path / "shape.pth")
    torch.save({k: v for k, v in state.items() if k != "features.0.bias"}, tmp_path / "less.pth")
    for name in ("other", "shape", "less", "missing"):
        with pytest.raises(DamagedFile, match=name):
            load_lpips(tmp_path / f"{name}.pth")


def test_without_torchvision_lpips_says_what_to_install(alexnet, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision", None)
    with pytest.raises(UserError, match="pip install torchvision"):
        load_lpips(alexnet)


# ------------------------------------------------------------------------------------- scores of prompts


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """The folder of a tiny CLIP model."""
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor

    torch.manual_seed(0)
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    words = personal.tokenizer()
    text = {**small, "vocab_size": len(words), "max_position_embeddings": 16, "bos_token_id": 1, "eos_token_id": 2}
    config = CLIPConfig(
        text_config=text, vision_config={**small, "image_size": 16, "patch_size": 8}, projection_dim=8
    )
    folder = tmp_path_factory.mktemp("clip")
    CLIPModel(config).save_pretrained(folder)
    looks = CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    CLIPProcessor(looks, words).save_pretrained(folder)
    return folder


def test_the_clip_score_is_a_hundred_times_the_cosine_and_never_negative(clip):
    from transformers import CLIPModel, CLIPProcessor

    images, prompts = pictures(6, 20), ["a photo of a dog", "cat"] * 3
    score = load_clip(clip)
    found = score(images, prompts)
    model, processor = CLIPModel.from_pretrained(clip).eval(), CLIPProcessor.from_pretrained(clip)
    cosines = []
    for image, prompt in zip(to_uint8(images), prompts, strict=True):  # each by itself: the batch changes nothing
        inputs = processor(text=[prompt], images=[image], return_tensors="pt", input_data_format="channels_first")
        with torch.no_grad():
            out = model(**inputs)
        cosines.append(float(torch.cosine_similarity(out.image_embeds, out.text_embeds)))
    assert found == pytest.approx([100 * max(cosine, 0) for cosine in cosines], abs=1e-3)
    assert max(found) > 1 and score(images[:1], ["dog " * 40])[0] >= 0  # longer than the model's 16 tokens


def test_a_folder_without_a_clip_model_is_refused(tmp_path):
    with pytest.raises(UserError, match="no folder of a CLIP model"):
        load_clip(tmp_path / "nowhere")
    with pytest.raises(DamagedFile, match="folder of a CLIP model of transformers"):
        load_clip(tmp_path)


def test_image_reward_is_asked_by_its_package_with_the_files_of_the_folder(tmp_path, monkeypatch):
    package, asked = ModuleType("ImageReward"), []

    def load(name, device, med_config):
        asked.append((name, device, med_config))
        return SimpleNamespace(score=lambda prompt, image: len(prompt) + image.getpixel((0, 0))[0] / 255)

    package.load = load
    with pytest.raises(UserError, match=r"ImageReward\.pt is missing"):
        load_image_reward(tmp_path)
    for name in ("ImageReward.pt", "med_config.json"):
        (tmp_path / name).touch()
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *_: None)
    with pytest.raises(UserError, match="vocabulary of bert-base-uncased"):
        load_image_reward(tmp_path)
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *_: "vocab.txt")
    monkeypatch.setitem(sys.modules, "ImageReward", None)
    with pytest.raises(UserError, match="pip install image-reward"):
        load_image_reward(tmp_path)
    monkeypatch.setitem(sys.modules, "ImageReward", package)
    score = load_image_reward(tmp_path)
    assert asked == [(str(tmp_path / "ImageReward.pt"), "cpu", str(tmp_path / "med_config.json"))]
    assert score(torch.ones(2, 3, 4, 4), ["four", "sixsix"]) == [5.0, 7.0]


# ------------------------------------------------------------------------------------------ in the report


def test_evaluate_scores_the_prompts_of_both_models_and_fills_the_table(clip, monkeypatch):
    few = {"metric": "none", "num_paired": 3, "num_heldout": 0, "timed_steps": 0, "num_inference_steps": 1}
    asked = []

    def reward(folder, device):
        return lambda images, prompts: asked.extend(prompts) or [float(len(prompt)) for prompt in prompts]

    monkeypatch.setattr("ptq4dm.evaluation.measures.load_image_reward", reward)
    prompts = {"prompt": ["a dog", "cat"]}
    config = EvaluateConfig(**few, conditioning=prompts, clip=clip, image_reward="folder", batch_size=2)
    report = evaluate(personal.text(0), personal.text(1), config)
    assert asked == ["a dog", "cat", "a dog", "cat", "a dog", "a dog"]  # two batches, each of two models
    assert report["prompts"]["model"]["image_reward"]["mean"] == pytest.approx((5 + 3 + 5) / 3)
    score, pipes = load_clip(clip), (personal.text(0), personal.text(1))
    for kind, pipe in zip(("model", "full_precision"), pipes, strict=True):
        from ptq4dm.pipelines.sampling import sample

        parts = [sample(pipe, seeds, num_inference_steps=1, conditioning=prompts) for seeds in ([0, 1], [2])]
        wanted = score(torch.cat(parts), ["a dog", "cat", "a dog"])
        assert report["prompts"][kind]["clip"]["mean"] == pytest.approx(sum(wanted) / 3, abs=1e-3)
    assert report["not_measured"] == {"lpips": "--lpips-weights FILE"}
    text = format_report(report)
    head, _, full, ours = [line for line in text.splitlines() if line.startswith("|")]
    assert head.replace(" ", "") == "||FID|IR|CLIP|LPIPS|PSNR|SSIM|"
    assert full.split("|")[1].strip() == "full precision" and full.split("|")[6].strip() == ""
    cells = [cell.strip() for cell in ours.split("|")[1:-1]]
    assert cells[0] == "quantized" and cells[1] == cells[4] == "" and cells[2].startswith("4.333 (")
    (low, high), alike = report["paired"]["psnr_interval"], report["paired"]["ssim"]
    assert cells[5] == f"{report['paired']['psnr_db']:.2f} ({low:.2f} to {high:.2f})"
    assert cells[6] == f"{alike['mean']:.3f} ({alike['interval'][0]:.3f} to {alike['interval'][1]:.3f})"
    assert "in brackets the ends of the 95 % interval over seeds" in text
    assert "not measured: LPIPS (--lpips-weights FILE), FID (--metric fid)" in text


def test_scores_without_prompts_are_said_not_to_be_measured():
    measures = Measures(scores={"clip": lambda images, prompts: [1.0]})
    assert measures.prompted(pictures(), None) == {}
    assert measures.not_measured == {"clip": "the pictures have no prompts"}
    assert load_measures(EvaluateConfig()).not_measured.keys() == {"lpips", "clip", "image_reward"}


def test_a_table_is_markdown():
    lines = markdown(["", "FID"], [["a", "1"], ["longer", ""]]).splitlines()
    assert lines == ["|        | FID |", "|--------|----:|", "| a      |   1 |", "| longer |     |"]

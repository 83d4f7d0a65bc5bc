"""The page of compare: whole by itself, escaped, and in a browser where there is one."""

import html
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from ptq4dm.comparing.page import page
from ptq4dm.comparing.rows import published_rows
from ptq4dm.evaluation.measures import Measures, summarized
from ptq4dm.evaluation.published import published_table
from ptq4dm.pipelines.images import load_images, save_png

TAGS = re.compile("<[^>]*>")
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
LABELS, SEEDS = ("original", "w8a8", "w4<i>"), [7, 8, 9]
PROMPTS = ["a cat", "</script><script>document.title='broken'</script>", "@@data@@ & <b>"]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(report, picture files) of three models and three seeds, 16x12 pixels, noise of 0, 3 and 12 grey levels."""
    folder, files = tmp_path_factory.mktemp("page"), {}
    g = torch.Generator().manual_seed(0)
    clean = torch.randint(40, 216, (3, 3, 12, 16), generator=g)
    for label, noise in zip(LABELS, (0, 3, 12), strict=True):
        images = (clean + torch.randint(-noise, noise + 1, clean.shape, generator=g)).to(torch.uint8)
        files[label] = [folder / f"{noise}-{seed}.png" for seed in SEEDS]
        for image, path in zip(images, files[label], strict=True):
            save_png(image, path, {"secret": "settings"})
    pictures = {label: load_images(some).float() / 255 for label, some in files.items()}
    worst = [
        {"layer": "<u>proj", "format": "W4", "kernel": "k", "basis": "output", "sqnr": s} for s in (8.5, "nan", None)
    ]
    entries = {}
    for label in LABELS:
        found = {} if label == "original" else Measures().pairs(pictures[label], pictures["original"])
        found.pop("mse", None)
        size = {"unet": [40, 8], "vae": [10, 10]}
        entries[label] = {"model": label, "quantization": {"method": "m"}, "memory": size, "worst": worst}
        entries[label] |= {"seeds": found, "figures": summarized(found)}
    report = {
        "full_precision": "original", "sampler": "DDIMScheduler", "num_inference_steps": 2, "seeds": SEEDS,
        "prompts": PROMPTS, "dtype": "float32", "device": "cpu", "models": entries,
        "not_measured": {"lpips": "--lpips-weights FILE"}, "warnings": ["w < 1"],
    }  # fmt: skip
    return report, files


def test_the_page_asks_nobody_for_anything_and_escapes_what_others_wrote(made):
    text = page(*made)
    assert text.startswith("<!doctype html>") and "@@style" not in text and "@@script" not in text
    assert "://" not in text and not re.search(r"(?:src|href)=[\"']?(?!data:|\"data:)\w", text)
    assert "default-src 'none'" in text and "@import" not in text and "url(" not in text
    assert "<i>" not in text.replace("<i></i>", "").replace('<i style="width', "") and "<u>proj" not in text
    assert "secret" not in text  # settings of the files, such as where a model lies
    assert text.count("</script>") == 2 and text.count("data:image/png;base64,") == len(LABELS) * len(SEEDS)


def _cells(text: str) -> list[list[str]]:
    """The cells of each model's row in the table of figures."""
    rows = [row for row in re.findall(r"<tr>(.*?)</tr>", text) if "<th scope=row>" in row and "<small>" in row]
    return [[cell for _, cell in re.findall(r"<(td|th)[^>]*>(.*?)</\1>", row)] for row in rows]


def test_all_figures_are_there_without_the_script(made):
    report, _ = made
    text = re.sub(r"<script.*?</script>", "", page(*made), flags=re.S)
    for label in LABELS[1:]:
        for name, digits in (("psnr", 2), ("ssim", 3)):
            for value in report["models"][label]["seeds"][name]:
                assert f">{value:.{digits}f}</td>" in text
            assert f">{report['models'][label]['figures'][name]['mean']:.{digits}f}<small>" in text
    assert {cells[0].split("<")[0] for cells in _cells(text)} == {"original", "w8a8", "w4&lt;i&gt;"}
    table = published_table(published_rows(report)).splitlines()
    printed = [[cell.strip() for cell in line.split("|")[6:8]] for line in table if "w8a8" in line or "w4" in line]
    on_the_page = [[TAGS.sub("", cell.replace("<small>", " (").replace("</small>", ")")) for cell in cells[1:3]]
                   for cells in _cells(text)[1:]]  # fmt: skip
    assert printed == on_the_page and re.fullmatch(r"[\d.]+ \([\d.]+ to [\d.]+\)", printed[0][0])
    for told in (
        "8.5 dB",
        "NaN",
        "no error",
        "LPIPS (--lpips-weights FILE)",
        "w &lt; 1",
        "36.0%",
        "all networks: unet, vae",
    ):
        assert told in text


@pytest.fixture(scope="module")
def browser():
    """dom(page's path, address) -> the document after its script ran."""
    program = next((found for name in BROWSERS if (found := shutil.which(name))), None)
    if program is None:
        pytest.skip(f"there is no browser here ({', '.join(BROWSERS)})")

    def dom(path: Path, address: str = "") -> str:
        flags = ["--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=4000", "--dump-dom"]
        command = [program, *flags, f"--user-data-dir={path.parent / 'profile'}", path.as_uri() + address]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-2000:]
        return done.stdout

    return dom


def inside(dom: str, name: str) -> str:
    """The text of the element with this id."""
    return html.unescape(re.search(rf'id="{name}"[^>]*>([^<]*)<', dom)[1])


def test_an_address_opens_its_view_and_the_browser_counts_the_same_psnr(made, browser, tmp_path):
    report, files = made
    (tmp_path / "index.html").write_text(page(report, files), encoding="utf-8")
    dom = browser(tmp_path / "index.html", "#left=w4%3Ci%3E&right=original&seed=8&at=30")
    assert inside(dom, "between") == f"{report['models']['w4<i>']['seeds']['psnr'][1]:.2f} dB"
    assert inside(dom, "left-name") == "w4<i>" and inside(dom, "right-name") == "original"
    assert inside(dom, "seed") == "8" and inside(dom, "prompt") == PROMPTS[1]
    assert "--at: 30%" in re.search(r'id="stage"[^>]*', dom)[0] and "<title>original, 2 quantized</title>" in dom
    other = browser(tmp_path / "index.html", "#left=w8a8&right=w4%3Ci%3E&seed=9")  # neither is full precision
    two = [load_images([files[label][2]]).double() / 255 for label in ("w8a8", "w4<i>")]
    assert inside(other, "between") == f"{float(-10 * (two[0] - two[1]).square().mean().log10()):.2f} dB"
    assert inside(browser(tmp_path / "index.html", "#left=w8a8&right=w8a8"), "between") == "identical"


def test_the_slider_and_the_keys_move_it(made, browser, tmp_path):
    """A script behind the page's own presses keys, as a reader would, and writes down what the page then shows."""
    presses = """
    const log = [], $ = (id) => document.getElementById(id), at = $("at");
    const told = (what) => log.push([what, $("left").value, $("right").value, $("seed").textContent,
      getComputedStyle($("over")).clipPath, $("stage").className, location.hash].join("|"));
    const press = (key) => document.body.dispatchEvent(new KeyboardEvent("keydown", { key, bubbles: true }));
    told("start");
    at.value = 80; at.dispatchEvent(new Event("input")); told("slide");
    for (const key of ["n", "n", "p", "s", "d", "d"]) { press(key); told(key); }
    document.querySelectorAll("#pictures button")[8].click(); told("click");
    at.focus(); told(document.activeElement.id + " " + at.getAttribute("aria-valuetext"));
    const kept = document.createElement("pre"); kept.id = "log"; kept.textContent = log.join("\\n");
    document.body.append(kept);
    """
    text = page(*made).replace("</body>", f"<script>{presses}</script></body>")
    (tmp_path / "index.html").write_text(text, encoding="utf-8")
    log = [line.split("|") for line in inside(browser(tmp_path / "index.html"), "log").splitlines()]
    assert [line[0] for line in log[:-1]] == ["start", "slide", "n", "n", "p", "s", "d", "d", "click"]
    assert [line[3] for line in log] == ["7", "7", "8", "9", "8", "8", "8", "8", "9", "9"]
    assert log[0][1:3] == ["original", "w8a8"] and log[5][1:3] == ["w8a8", "original"]
    assert "50%" in log[0][4] and "20%" in log[1][4] and "at=80" in log[1][6]  # it hides what is right of the line
    assert log[6][5] == "stage difference" and log[6][4] == "none" and log[7][5] == "stage"
    assert log[8][2] == "w4<i>" and log[9][0] == "at 80 % w8a8, 20 % w4<i>"

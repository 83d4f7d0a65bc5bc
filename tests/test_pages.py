"""The pages in Markdown: links lead somewhere, commands parse, scripts are there, the map of folders is whole."""

import contextlib
import functools
import io
import re
import shlex
from pathlib import Path

import pytest

from ptq4dm.cli import verbs
from ptq4dm.cli.parser import known_words
from ptq4dm.version import __version__

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted(
    p for p in ROOT.rglob("*.md") if not set(p.relative_to(ROOT).parts) & {".venv", "out", "build", "shared"}
)
LINK = re.compile(r"\]\(([^)\s]+)\)")


@functools.lru_cache
def anchors(page: Path) -> set[str]:
    """The names of its headings, as GitHub makes them."""
    heads = re.findall(r"^#+ (.*)$", page.read_text(), re.M)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


def commands(page: Path) -> list[str]:
    """Lines of its code in which the command `ptq4dm` is called, without comments."""
    text = page.read_text().replace("\\\n", " ")
    blocks = "\n".join(re.findall(r"^```(?:bash|sh)\n(.*?)^```", text, re.M | re.S))
    lines = blocks.splitlines() + re.findall(r"^    (ptq4dm .*)$", text, re.M)
    return [part.strip() for line in lines for part in line.split("&&") if part.strip().startswith("ptq4dm ")]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_and_scripts_of_a_page_are_there(page):
    wrong = []
    for link in LINK.findall(page.read_text()):
        if "://" in link or link.startswith("mailto:"):
            continue
        where, _, anchor = link.partition("#")
        target = (page.parent / where).resolve() if where else page
        if not target.exists() or (anchor and target.suffix == ".md" and anchor not in anchors(target)):
            wrong.append(link)
    for script in re.findall(r"python (scripts/[\w/]+\.py)", page.read_text()):
        wrong += [] if (ROOT / script).is_file() else [script]
    assert not wrong


def test_commands_of_the_pages_parse():
    """By the parser that is made of words.json, which another test keeps like the whole one."""
    words, found, wrong = known_words(), [], []
    for page in PAGES:
        for command in commands(page):
            _, verb, *rest = shlex.split(command, comments=True)
            found.append(verb)
            said = io.StringIO()
            try:
                with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
                    verbs._quick_parser(words, verb).parse_args([verb, *rest])
            except SystemExit as end:
                if end.code:
                    wrong.append(f"{page.relative_to(ROOT)}: {command}: {said.getvalue().strip()[-200:]}")
    assert len(found) > 20 and set(found) <= set(verbs.VERBS) and not wrong, "\n".join(wrong)


def test_the_first_page_is_short_and_its_map_whole():
    """At most 200 lines, the map within the first third; every folder of the library is in it, and nothing else."""
    text = (ROOT / "README.md").read_text()
    [tree] = re.findall(r"^```\n(ptq4dm/ .*?)^```", text, re.M | re.S)
    lines = text.splitlines()
    assert len(lines) <= 200 and lines.index(tree.splitlines()[-1]) < len(lines) / 3
    inside = set(re.findall(r"^  (\w+)/ ", tree, re.M))
    assert inside == {p.parent.name for p in (ROOT / "ptq4dm").glob("*/__init__.py")}
    assert all((ROOT / name).is_dir() for name in re.findall(r"^(\w+)/ ", tree, re.M))


def test_the_version_is_one():
    """Of the package, of what is cited, and the newest that the changelog tells of; fourteen papers are cited."""
    cited = (ROOT / "CITATION.cff").read_text()
    newest, date = re.search(r"^## \[(\d.*?)\] - (\S+)$", (ROOT / "CHANGELOG.md").read_text(), re.M).groups()
    assert f"\nversion: {__version__}\ndate-released: {date}\n" in cited and newest == __version__
    assert len(set(re.findall(r"arxiv.org/abs/(\S+)", cited))) == 14

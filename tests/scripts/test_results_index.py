"""The index of scripts/results: every file of figures stands in it; the scripts and pages that it names are there."""

import fnmatch
import re
from pathlib import Path

RESULTS = Path(__file__).parents[2] / "scripts" / "results"
TABLE = (RESULTS / "README.md").read_text().partition("| files | made by |")[2].partition("\n\n")[0]
INDEX = [line for line in TABLE.splitlines() if line.startswith("| `")]


def test_every_file_is_in_the_index():
    names = {name for line in INDEX for name in re.findall(r"`([^`]+\.jsonl?)`", line)}
    files = [path.name for path in RESULTS.iterdir() if path.suffix in (".json", ".jsonl")]
    assert len(files) > 50
    assert [file for file in files if not any(fnmatch.fnmatchcase(file, name) for name in names)] == []


def test_scripts_and_pages_of_the_index_are_there():
    scripts = RESULTS.parent
    for line in INDEX:
        made_by, pages = line.split(" | ")[1:]
        for name in re.findall(r"`([^`]+\.py)`", made_by):
            assert (scripts.parent / name).is_file() or list(scripts.glob(f"*/{name}")), name
        for page in re.findall(r"\]\(([^)#]+)", pages):
            assert (RESULTS / page).is_file(), page

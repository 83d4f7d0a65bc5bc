"""What a comparison leaves behind: two tables on the screen, comparison.json, comparison.png and index.html."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import UserError
from ..evaluation.published import directions, markdown, not_measured_text, published_table
from ..evaluation.report import write_samples
from ..files.atomic import replacing
from ..files.outside import read_json
from ..files.places import check_own, file_place, picture_place
from ..pipelines.picture_files import load_images
from .figures import picture_paths
from .page import BEGINS, page
from .rows import costs, frechet_label, published_rows, sizes_text

REPORT, PICTURE, PAGE = "comparison.json", "comparison.png", "index.html"
UNFINISHED = "unfinished.txt"  # lies in the folder until these are there


def check_places(folder: Path) -> None:
    """Raises UserError where the folder or files in it with the names of the results are somebody else's."""
    check_own(folder, [REPORT, UNFINISHED], "compare")
    picture_place(folder / PICTURE)
    file_place(folder / PAGE, ".html", BEGINS.encode())
    file_place(folder / REPORT, ".json")
    if (folder / REPORT).is_file():
        found = read_json(folder / REPORT, "it is no report, and would be replaced: choose another --output")
        if not isinstance(found, dict) or not {"full_precision", "models", "seeds"} <= found.keys():
            raise UserError(f"{folder / REPORT} is no report of compare; choose another folder.")


@contextmanager
def unfinished(folder: Path, images: Path) -> Iterator[None]:
    """A note in the folder while the block runs; it stays where that fails and images are there to go on with.

    So nobody takes these for a result, and the same command is let into the folder again.
    """
    note = folder / UNFINISHED
    with replacing(note) as temporary:
        temporary.write_text(
            "The last ptq4dm compare here has not ended: what it left is no result. The same command goes on.\n"
        )
    try:
        yield
    except BaseException:
        if not images.exists():
            note.unlink(missing_ok=True)
        raise
    note.unlink(missing_ok=True)


def format_comparison(report: dict) -> str:
    """The dict of `compare` as text: the published table, and what each model costs."""
    seeds, figures = report["seeds"], published_rows(report)
    lines = [
        f"{len(seeds)} seeds from {seeds[0]}, {report['sampler']}, {report['num_inference_steps']} steps, "
        f"{report['dtype']} on {report['device']}",
        "",
        published_table(figures, frechet_label(report)),
        directions(figures, len(seeds)),
        not_measured_text(report["not_measured"]),
        "",
    ]
    rows = {label: costs(entry) for label, entry in report["models"].items()}
    head = ["", *(what for what, _ in next(iter(rows.values())))]
    lines.append(markdown(head, [[label, *(text for _, text in row)] for label, row in rows.items()]))
    lines.append(sizes_text(report))
    if timed := next((e["step_time"] for e in report["models"].values() if "step_time" in e), None):
        lines.append(
            f"speed: times full precision, {timed['device']}, batch {timed['batch_size']}, median of "
            f"{timed['timed_steps']}, in turns"
        )
    lines += [f"warning: {text}" for text in report["warnings"]]
    return "\n".join(lines)


def write_comparison(report: dict, folder: Path, images: Path, num_shown: int) -> None:
    """Write the report, the picture and the page. Raises UserError where one cannot be written, or holds NaN."""
    shown = report["seeds"][:num_shown]
    paths = {label: picture_paths(images, label, shown) for label in report["models"]}
    try:
        text = json.dumps(report, indent=1, allow_nan=False)
    except ValueError:
        raise UserError("a figure is NaN or infinite: one of the models overflowed.") from None
    with replacing(folder / REPORT) as temporary:
        temporary.write_text(text + "\n")
    write_samples(
        [(label, load_images(some).float() / 255) for label, some in paths.items()], shown, folder / PICTURE
    )
    with replacing(folder / PAGE) as temporary:
        temporary.write_text(page(report, paths), encoding="utf-8")

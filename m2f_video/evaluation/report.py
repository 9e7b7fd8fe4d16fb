"""What an evaluation leaves behind: tables to read, a JSON report, and the files a benchmark's server takes."""

import json
import math
import os
import zipfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from m2f_video.evaluation.tracking import TrackingMetrics, TrackingResult
from m2f_video.evaluation.video_ap import STATS, VideoAPResult
from m2f_video.files import atomic_path, check_replaceable
from m2f_video.results.masks import plain_rle

if TYPE_CHECKING:
    from rich.table import Table

RESULTS_FILE = "results.json"
"""Name that evaluation servers expect, alone at the root of the zip."""
_ROW_KEYS = ("video_id", "category_id", "score", "segmentations")
_CLASS_STATS = ("AP", "AP50", "AP75", "AR1", "AR10")


def tables(ap: VideoAPResult, tracking: TrackingResult | None = None) -> "list[Table]":
    """Tables overall and by class, in percent; a dash where there is nothing to measure by."""
    from rich.table import Table

    overall = Table(*STATS, title="overall, %")
    overall.add_row(*(_percent(ap.stats[name]) for name in STATS))
    printed, headings = [overall], list[str]()
    if tracking is not None:
        numbers = _tracking_cells(tracking.combined)
        headings = list(numbers)
        printed.append(Table(*headings, title=f"tracking overall, %, scores from {tracking.score_threshold:g}"))
        printed[-1].add_row(*numbers.values())
    by_class = Table("id", "class", *_CLASS_STATS, *headings, title="by class, %")
    for category_id, name in ap.categories.items():
        cells = [_percent(ap.per_category[category_id][stat]) for stat in _CLASS_STATS]
        if tracking is not None:
            cells += _tracking_cells(tracking.per_category[category_id]).values()
        by_class.add_row(str(category_id), name, *cells)
    return [*printed, by_class]


def to_dict(ap: VideoAPResult, tracking: TrackingResult | None = None) -> dict[str, Any]:
    """The numbers as JSON takes them: fractions, -1 where there is nothing to measure by.

    The keys are those of `STATS`, then `per_category`, a list of objects with `id`, `name` and the same numbers. With
    tracking there is a `tracking` in the whole and in each category; that of the whole tells its `score_threshold`.
    """
    categories: list[dict[str, Any]] = [
        {"id": category_id, "name": name, **ap.per_category[category_id]} for category_id, name in ap.categories.items()
    ]
    report: dict[str, Any] = {**ap.stats, "per_category": categories}
    if tracking is not None:
        report["tracking"] = {"score_threshold": tracking.score_threshold, **tracking.combined.to_dict()}
        for category in categories:
            category["tracking"] = tracking.per_category[category["id"]].to_dict()
    return report


def write_report(path: str | os.PathLike[str], ap: VideoAPResult, tracking: TrackingResult | None = None) -> None:
    """Write `to_dict` to a JSON file, complete or not at all.

    Raises:
        OSError: the file cannot be written.
    """
    text = json.dumps(to_dict(ap, tracking), indent=2, allow_nan=False) + "\n"
    _write(path, lambda file: file.write_text(text, encoding="utf-8"))


def write_results(path: str | os.PathLike[str], rows: Iterable[Mapping[str, Any]]) -> None:
    """Write the rows of a YouTubeVIS submission to a JSON file, complete or not at all.

    Args:
        path: of the file.
        rows: with `video_id`, `category_id` (the data set's), `score` and `segmentations`, a compressed COCO encoding
            or None for each frame. Other keys, such as the `category` in a `tracks.json`, are left out.

    Raises:
        ValueError: a row is malformed.
        OSError: the file cannot be written.
    """
    text = _results_text(rows)
    _write(path, lambda file: file.write_text(text, encoding="utf-8"))


def write_submission(path: str | os.PathLike[str], rows: Iterable[Mapping[str, Any]]) -> None:
    """Write the zip that the CodaLab servers of YouTubeVIS and OVIS take: `results.json` at its root, nothing else.

    Args:
        path: of the zip file.
        rows: see `write_results`.

    Raises:
        ValueError: a row is malformed.
        OSError: the file cannot be written.
    """
    text = _results_text(rows)

    def write(file: Path) -> None:
        with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr(RESULTS_FILE, text)

    _write(path, write)


def check_writable(path: str | os.PathLike[str]) -> None:
    """Fail before the work where the file could not be written after it.

    Raises:
        OSError: its folder is missing or not writable, or it is a folder itself.
        ValueError: it is a pipe or device.
    """
    file = Path(path)
    if not file.parent.is_dir():
        raise FileNotFoundError(f"{file}: there is no folder {file.parent}; make it first")
    check_replaceable(file)
    if not os.access(file.parent, os.W_OK):
        raise PermissionError(f"{file}: the folder {file.parent} is not writable")


def _write(path: str | os.PathLike[str], write: Callable[[Path], object]) -> None:
    check_writable(path)
    with atomic_path(path) as file:
        write(file)


def _results_text(rows: Iterable[Mapping[str, Any]]) -> str:
    return json.dumps([_submission_row(row, f"row {number}") for number, row in enumerate(rows)], allow_nan=False)


def _submission_row(row: Mapping[str, Any], where: str) -> dict[str, Any]:
    missing = [key for key in _ROW_KEYS if key not in row]
    if missing:
        raise ValueError(f"{where} of the results has no {', '.join(missing)}")
    if not math.isfinite(row["score"]):
        raise ValueError(f"{where} of the results: the score must be a finite number, got {row['score']}")
    segmentations = [None if mask is None else plain_rle(mask) for mask in row["segmentations"]]
    if any(mask is not None and plain is None for mask, plain in zip(row["segmentations"], segmentations, strict=True)):
        raise ValueError(f"{where} of the results: run lengths must be compressed; use pycocotools.mask.encode")
    return {
        "video_id": int(row["video_id"]),
        "category_id": int(row["category_id"]),
        "score": float(row["score"]),
        "segmentations": segmentations,
    }


def _percent(fraction: float) -> str:
    return "-" if fraction < 0 else f"{100 * fraction:.1f}"


def _tracking_cells(metrics: TrackingMetrics) -> dict[str, str]:
    """Table cells by heading; all but the count of switches are fractions."""
    numbers = metrics.to_dict()
    switches = numbers.pop("id_switches")
    cells = {name: _percent(value) for name, value in numbers.items()}
    return cells | {"id switches": str(switches) if metrics.HOTA >= 0 else "-"}

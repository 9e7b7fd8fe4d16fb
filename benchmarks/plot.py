"""Draw the medians of a benchmark as bars."""

from pathlib import Path

from m2f_video.benchmark import PARTS, Report
from m2f_video.files import atomic_path

GROUP = 0.8  # width of a part's bars together


def draw(report: Report, path: Path) -> None:
    """Write a picture, whose suffix chooses the format: one plot for each number of frames, with lines over quartiles.

    Needs matplotlib, of the extra m2f-video[bench].
    """
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    rows = [row for row in report.rows if row.seconds]
    counts = sorted({row.frames for row in rows})
    labels = list(dict.fromkeys((row.implementation, row.dtype) for row in rows))
    width = GROUP / len(labels)
    figure, axes = pyplot.subplots(len(counts), squeeze=False, figsize=(11, 4 * len(counts)), layout="constrained")
    for axis, count in zip(axes[:, 0], counts, strict=True):
        parts = [part for part in PARTS if any((row.part, row.frames) == (part, count) for row in rows)]
        for position, label in enumerate(labels):
            bars = [row for row in rows if row.frames == count and (row.implementation, row.dtype) == label]
            x = [parts.index(row.part) - GROUP / 2 + (position + 0.5) * width for row in bars]
            axis.bar(x, [row.quartiles[1] for row in bars], width, label=", ".join(label))
            axis.vlines(x, [row.quartiles[0] for row in bars], [row.quartiles[2] for row in bars], "black")
        axis.set_xticks(range(len(parts)), parts)
        axis.set_ylabel("seconds per frame")
        axis.set_title(f"{count} frame(s) at a time")
    axes[0, 0].legend()
    figure.suptitle(f"m2f-video (ours): {report.title}")
    with atomic_path(path) as file:
        figure.savefig(file, dpi=120)

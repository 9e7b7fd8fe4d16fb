"""What `long_video.py` counts of a method's tracks, and says of it: metrics, intervals, tables, plots.

V videos, B draws of videos, A thresholds of IoU of HOTA, K categories.
"""

import importlib.util
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Self

import numpy as np
from ablation_report import TrackMatches, number, table
from long_methods import DEFAULT, METHODS

from m2f_video.evaluation.pairing import Pairing
from m2f_video.evaluation.tracking import pairing_numbers
from m2f_video.files import atomic_path

METRICS = ("AP", "AP50", "HOTA", "IDF1", "id switches")
COMPARED = ("AP", "HOTA", "IDF1")
"""Those whose differences get an interval."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Numbers:
    """What a method's tracks of V videos are worth, of which every metric on any choice of the videos follows.

    Attributes:
        matches: for AP.
        hota: (V, 4, A): true positives, misses, false positives, and AssA summed over the true positives.
        identity: (V, 3): identity true positives, misses and false positives.
        switches: (V,), of identities.
    """

    matches: TrackMatches
    hota: np.ndarray
    identity: np.ndarray
    switches: np.ndarray

    @classmethod
    def of(cls, matches: TrackMatches, pairings: Sequence[Pairing]) -> Self:
        """Those of one video."""
        counted = [pairing_numbers(pairing) for pairing in pairings]
        hota = [count["hota"] for count in counted]
        names = ("HOTA_TP", "HOTA_FN", "HOTA_FP")
        summed = [[of[name] for name in names] + [of["AssA"] * of["HOTA_TP"]] for of in hota]
        identity = [[count["identity"][name] for name in ("IDTP", "IDFN", "IDFP")] for count in counted]
        return cls(
            matches=matches,
            hota=np.sum(summed, 0)[None].astype(float),
            identity=np.sum(identity, 0)[None].astype(float),
            switches=np.array([sum(count["clear"]["IDSW"] for count in counted)], float),
        )

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        matches = {name: value.astype(float).tolist() for name, value in vars(self.matches).items()}
        return {"matches": matches, **{name: getattr(self, name).tolist() for name in ("hota", "identity", "switches")}}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """From what `to_dict` gave."""
        kinds = {"scores": float, "true_positive": bool, "false_positive": bool}
        arrays = {
            field.name: np.array(data["matches"][field.name], kinds.get(field.name, np.int64))
            for field in fields(TrackMatches)
        }
        return cls(
            matches=TrackMatches(**arrays),
            **{name: np.array(data[name], float) for name in ("hota", "identity", "switches")},
        )

    @classmethod
    def joined(cls, parts: Sequence[Self]) -> Self:
        """Those of the videos of all, in this order."""
        first = np.cumsum([0, *(len(part.switches) for part in parts)])
        matches = {field.name: [getattr(part.matches, field.name) for part in parts] for field in fields(TrackMatches)}
        matches["video"] = [start + video for start, video in zip(first, matches["video"], strict=False)]
        axis = {"true_positive": 1, "false_positive": 1}
        return cls(
            matches=TrackMatches(**{name: np.concatenate(of, axis.get(name, 0)) for name, of in matches.items()}),
            **{
                name: np.concatenate([getattr(part, name) for part in parts])
                for name in ("hota", "identity", "switches")
            },
        )

    def metrics(self, counts: np.ndarray | None = None) -> dict[str, np.ndarray]:
        """Each of `METRICS` (B,) where video v is there counts[b, v] times; of all videos once, by default.

        As `average_precision` and `tracking_metrics` have them.

        Args:
            counts: (B, V).
        """
        if counts is None:
            counts = np.ones((1, len(self.switches)), np.int64)
        first = slice(None, 1)
        loosest = replace(
            self.matches,
            true_positive=self.matches.true_positive[first],
            false_positive=self.matches.false_positive[first],
        )
        true, misses, false, association = np.einsum("bv,vna->nba", counts, self.hota)
        hota = np.sqrt(true / np.maximum(true + misses + false, 1) * association / np.maximum(true, 1e-10))
        id_true, id_misses, id_false = (counts @ self.identity).T
        return {
            "AP": self.matches.average_precision(counts),
            "AP50": loosest.average_precision(counts),
            "HOTA": hota.mean(1),
            "IDF1": id_true / np.maximum(id_true + 0.5 * id_misses + 0.5 * id_false, 1),
            "id switches": counts @ self.switches,
        }


def compare(of_methods: Mapping[str, Numbers], draws: int, base: str = DEFAULT) -> dict[str, dict[str, Any]]:
    """Metrics of every method, and what the base has more than it.

    Args:
        of_methods: on the same videos.
        draws: B, of the videos with replacement.
        base: what the others are held against.

    Returns:
        By method, `metrics`; and where the base is there, `differences`: by metric the base's less the method's, with
        the 95 % interval, as [difference, low, high].
    """
    num_videos = len(next(iter(of_methods.values())).switches)
    counts = np.random.default_rng(0).multinomial(num_videos, np.full(num_videos, 1 / num_videos), size=draws)
    point = {name: {key: float(value[0]) for key, value in of.metrics().items()} for name, of in of_methods.items()}
    found: dict[str, dict[str, Any]] = {name: {"metrics": metrics} for name, metrics in point.items()}
    if base not in of_methods:
        return found
    drawn = {name: of.metrics(counts) for name, of in of_methods.items()}
    for name in of_methods:
        if name != base:
            found[name]["differences"] = {
                key: [
                    point[base][key] - point[name][key],
                    *(float(value) for value in np.percentile(drawn[base][key] - drawn[name][key], (2.5, 97.5))),
                ]
                for key in COMPARED
            }
    return found


def write_report(
    folder: Path,
    name: str,
    complete: Mapping[tuple[int, int], Mapping[str, Numbers]],
    about: Mapping[str, Any],
    *,
    draws: int,
) -> str:
    """Write JSON, Markdown and, with matplotlib, a plot; gives the text of the second.

    Args:
        folder: of the three.
        name: of the three, without ending.
        complete: what was found on all videos, by length and seed, and method.
        about: what all of it has in common; `title`, `machine`, `command` and `claims`.
        draws: of videos.
    """
    lengths: dict[str, Any] = {}
    for length in sorted({length for length, _ in complete}):
        named = {seed: of for (at, seed), of in complete.items() if at == length and of}
        common = [method.name for method in METHODS if named and all(method.name in of for of in named.values())]
        if not common:
            continue
        pooled = {name: Numbers.joined([named[seed][name] for seed in named]) for name in common}
        lengths[str(length)] = {
            "seeds": list(named),
            "videos": len(pooled[common[0]].switches),
            "methods": compare(pooled, draws),
            "by_seed": {
                str(seed): {n: of["metrics"] for n, of in compare(found, 2).items()} for seed, found in named.items()
            },
        }
    notes = {method.name: {"group": method.group, "note": method.note} for method in METHODS}
    report = {**about, "draws": draws, "methods": notes, "lengths": lengths}
    return save(folder, name, report, markdown(report), draw)


def save(folder: Path, name: str, report: Mapping[str, Any], text: str, plot: Any) -> str:
    """Write a report in three forms; gives the text."""
    folder.mkdir(parents=True, exist_ok=True)
    for file, content in ((f"{name}.json", json.dumps(report, indent=2) + "\n"), (f"{name}.md", text)):
        with atomic_path(folder / file) as path:
            path.write_text(content, encoding="utf-8")
    if importlib.util.find_spec("matplotlib") is None:
        print("no plot, which needs matplotlib: pip install 'm2f-video[bench]'")
    else:
        plot(report, folder / f"{name}.png")
    return text


def markdown(report: Mapping[str, Any]) -> str:
    """The report to read."""
    parts = [
        "# Long videos",
        "" if report["claims"] else "**A rehearsal: the numbers mean nothing.**\n",
        f"{report['title']}. W/S are frames of a window and from one to the next. Tracks that score less than 0.3 "
        f"do not count for HOTA, IDF1 and identity switches. What `{DEFAULT}` has more than a method, on the same "
        f"videos, is given with its 95 % interval ({report['draws']} draws of videos with replacement); bold where "
        "that leaves out 0.\n",
    ]
    for length, of in report["lengths"].items():
        seeds = ", ".join(map(str, of["seeds"]))
        parts += [
            f"## {length} frames\n\n{of['videos']} videos, seeds {seeds}.\n",
            table(
                ("method", *METRICS, *(f"{DEFAULT} has more {name}" for name in COMPARED)),
                [
                    (
                        name,
                        *(number(row["metrics"][key], ".0f" if key == METRICS[-1] else ".3f") for key in METRICS),
                        *(difference(row, key) for key in COMPARED),
                    )
                    for name, row in of["methods"].items()
                ],
            ),
            "",
        ]
    parts += ["## By seed\n\nAP / AP50 / HOTA / IDF1 / identity switches.\n"]
    places = [(length, seed) for length, of in report["lengths"].items() for seed in of["by_seed"]]
    names = [name for name in report["methods"] if any(name in of["methods"] for of in report["lengths"].values())]
    parts += [
        table(
            ("method", *(f"{length}, seed {seed}" for length, seed in places)),
            [
                (name, *(one_line(report["lengths"][length]["by_seed"][seed].get(name)) for length, seed in places))
                for name in names
            ],
        ),
        "\n" + "\n".join(f"- {name}: {note}." for name in names if (note := report["methods"][name]["note"])),
        f"\nMachine: {', '.join(f'{name} {value}' for name, value in report['machine'].items())}. "
        f"Command: `{report['command']}`",
    ]
    return "\n".join(part for part in parts if part is not None) + "\n"


def one_line(metrics: Mapping[str, float] | None) -> str:
    """All of a method's in a cell."""
    return (
        ""
        if metrics is None
        else " / ".join(f"{metrics[key]:.3f}" for key in METRICS[:-1]) + f" / {metrics[METRICS[-1]]:.0f}"
    )


def difference(row: Mapping[str, Any], key: str) -> str:
    """A cell: difference and interval."""
    if "differences" not in row:
        return ""
    value, low, high = row["differences"][key]
    shown = f"{value:+.3f} ({low:+.3f}, {high:+.3f})"
    return f"**{shown}**" if low > 0 or high < 0 else shown


def draw(report: Mapping[str, Any], path: Path) -> None:
    """HOTA, IDF1 and AP of the main methods and the bounds by length."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    shown = [name for name, of in report["methods"].items() if of["group"] in ("main", "bounds", "linkers")]
    figure, axes = pyplot.subplots(1, len(COMPARED), figsize=(15, 5), layout="constrained")
    for axis, key in zip(axes, COMPARED, strict=True):
        for place, name in enumerate(shown):
            rows = {int(t): of["methods"][name] for t, of in report["lengths"].items() if name in of["methods"]}
            values = [row["metrics"][key] for row in rows.values()]
            style = {"main": "o-", "bounds": "s--", "linkers": "^:"}[report["methods"][name]["group"]]
            axis.plot(list(rows), values, style, label=name, color=f"C{place % 10}", markersize=4)
        axis.set_xscale("log", base=2)
        ticks = [int(length) for length in report["lengths"]]
        axis.set_xticks(ticks, [str(tick) for tick in ticks])
        axis.set_xlabel("frames of a video")
        axis.set_title(key)
        axis.set_ylim(0, 1)
    figure.legend(*axes[0].get_legend_handles_labels(), fontsize=8, loc="outside right upper")
    figure.suptitle(report["title"] + ("" if report["claims"] else " (a rehearsal)"), fontsize=9)
    with atomic_path(path) as file:
        figure.savefig(file, dpi=120)
    pyplot.close(figure)

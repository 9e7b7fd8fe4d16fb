import importlib.util
import json
import os
import zipfile
from pathlib import Path
from typing import Any

import pytest
import tyro

from m2f_video import evaluation
from m2f_video.cli.evaluate import eval_results
from m2f_video.evaluation import (
    STATS,
    EvaluationWarning,
    TrackingResult,
    VideoAPResult,
    evaluate,
    evaluate_tracking,
    write_report,
    write_results,
    write_submission,
)
from tests.evaluation.builders import T, annotation, box, dataset, result

TRUTH = dataset(annotation(1, [box(0, 0)] * T), annotation(2, [box(0, 15)] * T))
RESULTS = [result(0.9, [box(0, 0)] * T), result(0.8, [box(5, 5), None, None, None])]


@pytest.fixture(scope="module")
def measured() -> tuple[VideoAPResult, TrackingResult]:
    return evaluate(TRUTH, RESULTS), evaluate_tracking(TRUTH, RESULTS)


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    paths = {name: tmp_path / f"{name}.json" for name in ("annotations", "results")}
    paths["annotations"].write_text(json.dumps(TRUTH))
    paths["results"].write_text(json.dumps(RESULTS))
    return paths


def test_report_holds_all_numbers(measured: tuple[VideoAPResult, TrackingResult], tmp_path: Path) -> None:
    ap, tracking = measured
    write_report(tmp_path / "report.json", ap, tracking)
    report = json.loads((tmp_path / "report.json").read_text())
    assert {name: report[name] for name in STATS} == ap.stats
    assert [row["name"] for row in report["per_category"]] == ["class 1", "class 2"]
    assert report["per_category"][1]["AP"] == report["per_category"][1]["tracking"]["HOTA"] == -1
    assert report["tracking"] == {"score_threshold": 0.3, **tracking.combined.to_dict()}
    plain = evaluation.to_dict(ap)
    assert "tracking" not in plain
    assert "tracking" not in plain["per_category"][0]
    assert [file.name for file in tmp_path.iterdir()] == ["report.json"]


def test_tables_show_percents_and_dashes(measured: tuple[VideoAPResult, TrackingResult]) -> None:
    ap, tracking = measured
    overall, follow, by_class = evaluation.tables(ap, tracking)
    assert [column.header for column in overall.columns] == list(STATS)
    assert list(overall.columns[0].cells) == ["50.5"]
    assert list(follow.columns[0].cells) == [f"{100 * tracking.combined.HOTA:.1f}"]
    assert list(by_class.columns[1].cells) == ["class 1", "class 2"]
    assert [list(column.cells)[1] for column in list(by_class.columns)[2:]] == ["-"] * 10
    assert len(evaluation.tables(ap)) == 2


def test_results_are_written_as_servers_take_them(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [row | {"category": "class 1"} for row in RESULTS]
    rows[0]["segmentations"] = [mask | {"counts": mask["counts"].encode()} for mask in rows[0]["segmentations"]]
    write_results(tmp_path / "results.json", rows)
    assert json.loads((tmp_path / "results.json").read_text()) == RESULTS
    write_submission(tmp_path / "submission.zip", iter(rows))
    with zipfile.ZipFile(tmp_path / "submission.zip") as archive:
        assert archive.namelist() == ["results.json"]
        assert json.loads(archive.read("results.json")) == RESULTS
    assert evaluate(TRUTH, tmp_path / "results.json").stats == evaluate(TRUTH, RESULTS).stats


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"score": float("nan")}, "row 1 of the results: the score must be a finite number, got nan"),
        ({"segmentations": [{"size": [1, 1], "counts": [1]}]}, "row 1 of the results: run lengths must be compressed"),
    ],
)
@pytest.mark.parametrize("write", [write_results, write_submission])
def test_faulty_rows_leave_the_file_as_it_was(write: Any, changes: Any, message: str, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("before")
    with pytest.raises(ValueError, match=message):
        write(tmp_path / "out", [RESULTS[0], RESULTS[1] | changes])
    with pytest.raises(ValueError, match=r"row 0 of the results has no score, segmentations"):
        write(tmp_path / "out", [{"video_id": 1, "category_id": 1}])
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [("out", "before")]


def test_places_that_cannot_be_written(measured: tuple[VideoAPResult, TrackingResult], tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"there is no folder .*missing; make it first"):
        write_report(tmp_path / "missing" / "report.json", measured[0])
    with pytest.raises(IsADirectoryError, match="is a folder"):
        write_report(tmp_path, measured[0])


# --- the command


def test_command_prints_and_writes(files: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = tmp_path / "report.json"
    arguments = ["--annotations", str(files["annotations"]), "--results", str(files["results"]), "--json", str(report)]
    assert tyro.cli(eval_results, args=arguments) == 0
    output, error = capsys.readouterr()
    assert all(word in output for word in ("AP75", "class 2", "HOTA", "50.5", f"written to {report}"))
    assert error == ""  # no progress bars where there is no terminal
    expected = evaluation.to_dict(evaluate(TRUTH, RESULTS), evaluate_tracking(TRUTH, RESULTS))
    assert json.loads(report.read_text()) == expected


def test_command_without_tracking(files: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert eval_results(**files, tracking=False) == 0
    assert "HOTA" not in capsys.readouterr().out


def test_command_without_trackeval_says_what_is_left_out(
    files: dict[str, Path], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.warns(EvaluationWarning, match=r"left out, they need trackeval: pip install 'm2f-video\[eval\]'"):
        assert eval_results(**files) == 0
    output = capsys.readouterr().out
    assert "AP75" in output
    assert "HOTA" not in output


def test_command_checks_the_output_first(files: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="make it first"):
        eval_results(**files, json=tmp_path / "missing" / "report.json")


def test_command_shows_its_arguments(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        tyro.cli(eval_results, args=["--help"])
    assert "--score-threshold" in capsys.readouterr().out


def test_a_pipe_is_no_place_for_a_report(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "report.json")
    with pytest.raises(ValueError, match=r"report\.json is a named pipe; name a regular file"):
        write_results(tmp_path / "report.json", [])
    assert (tmp_path / "report.json").is_fifo()

"""The runner of `make gpu`: deadlines, parts that fail, what is written; and a rehearsal of all of it."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
PARTS = """
import json, os, subprocess, sys, time
part = sys.argv[1]
print("RESULT " + json.dumps({"device": "Card | X-1", "capability": [9, 0]} if part == "machine" else {
    "test": "a|b", "outcome": "failed" if part == "tests" else "passed", "s": 1.23456}), flush=True)
if part == "speed":
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(100)"])
    print("RESULT " + json.dumps({"child": child.pid}), flush=True)
    time.sleep(100)
if part == "training":
    sys.exit("the loss | is gone")
"""


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ModuleType:
    """The runner, with parts that do little."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import gpu

    (tmp_path / "parts.py").write_text(PARTS)
    monkeypatch.setattr(gpu, "SCRIPT", tmp_path / "parts.py")
    monkeypatch.setattr(gpu, "PARTS", {"tests": 60, "speed": 1.5, "training": 60, "memory": 60, "compiled": 60})
    monkeypatch.setattr(gpu.signal, "signal", lambda *_: None)
    return gpu


def is_running(pid: int) -> bool:
    try:
        return (Path("/proc") / str(pid) / "stat").read_text().split()[2] not in "ZX"
    except FileNotFoundError:
        return False


def test_parts_that_hang_or_fail_stop_no_other(gpu: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert gpu.main(["--output", str(tmp_path / "out")]) == 1
    report = json.loads((tmp_path / "out" / "gpu_card_x_1.json").read_text())
    assert report["parts"] == {
        "tests": "done",
        "speed": "stopped at its deadline of 2 s",
        "training": "failed with exit code 1: the loss | is gone",
        "memory": "done",
        "compiled": "done",
    }
    assert report["output"] == {"speed": [], "training": ["the loss | is gone"]}
    [child] = [row["child"] for row in report["rows"] if "child" in row]
    end = time.monotonic() + 10
    while is_running(child) and time.monotonic() < end:
        time.sleep(0.05)
    assert not is_running(child)
    assert {row["part"] for row in report["rows"]} == set(report["parts"])  # what was found until then is kept
    printed = capsys.readouterr().out
    assert printed.endswith("did not pass: speed, training\n")
    table = (tmp_path / "out" / "gpu_card_x_1.md").read_text()
    assert table in printed
    shards = sum(row["part"] == "tests" for row in report["rows"])
    assert shards >= 2
    assert f"0 of {shards} tests passed." in table
    assert "| a\\|b | failed | 1.23 |" in table
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["gpu_card_x_1.json", "gpu_card_x_1.md"]


def test_all_passed_says_what_is_verified(
    gpu: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu, "PARTS", {"memory": 60})
    assert gpu.main(["--output", str(tmp_path)]) == 0
    assert "(9, 0) in m2f_video/ops/triton_verified.py" in capsys.readouterr().out


def test_the_time_of_all_is_bounded(gpu: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = {}

    def run_part(part: str, seconds: float, rehearse: bool) -> tuple:
        given[part] = seconds
        return "done", [{"device": "x", "capability": [9, 0]}] if part == "machine" else [], []

    monkeypatch.undo()
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.setattr(gpu, "run_part", run_part)
    monkeypatch.setattr(gpu.signal, "signal", lambda *_: None)
    assert gpu.main(["--output", str(tmp_path)]) == 0
    assert given.pop("compiled") == pytest.approx(gpu.ALL, abs=1)  # all that is left
    assert sum(given.values()) + gpu.PARTS["compiled"] <= 8 * 60


def test_without_a_gpu_it_says_so(gpu: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "parts.py").write_text("raise SystemExit('no CUDA')")
    assert gpu.main(["--output", str(tmp_path / "out")]) == 2
    assert "there is no CUDA device" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_rehearsal_passes(tmp_path: Path) -> None:
    """Without the libraries that a machine with a GPU lacks."""
    pytest.importorskip("triton")
    command = [sys.executable, str(BENCHMARKS / "gpu.py"), "--rehearse", "--output", str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | {"PYTHONPATH": ""})  # noqa: S603
    assert result.returncode == 0, result.stdout + result.stderr
    report = json.loads((tmp_path / "gpu_rehearsal.json").read_text())
    assert set(report["parts"].values()) == {"done"}
    rows = [row for row in report["rows"] if row["part"] != "tests"]
    assert {row["part"] for row in rows} == report["parts"].keys() - {"tests"}
    assert all(row["what"] == "timed" for row in rows if row["part"] == "compiled")


@pytest.mark.slow
def test_what_need_not_be_installed_is_not_imported() -> None:
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); from gpu_parts import NOT_THERE, PARTS;"
        "sys.modules.update(dict.fromkeys(NOT_THERE));"
        "import m2f_video.parity, m2f_video.benchmark, m2f_video.training, m2f_video.inference.features,"
        " tests.conftest, tests.ops.test_triton"
    )
    command = [sys.executable, "-c", code, str(BENCHMARKS)]
    subprocess.run(command, check=True, cwd=BENCHMARKS.parent)  # noqa: S603

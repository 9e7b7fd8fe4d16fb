"""Checkpoint files: whole, damaged, and cut off while they are written."""

import os
import warnings
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from m2f_video.training.checkpoint import CheckpointWarning, list_checkpoints, load_latest_checkpoint, save_checkpoint


def a_state(value: float) -> dict[str, Any]:
    """What a trainer keeps, of a model with one tensor."""
    weights = torch.full((5000,), value)
    return {
        "config": "{}",
        "data": "fingerprint",
        "validation": None,
        "workers": 1,
        "model": {"weights": weights},
        "average": {"weights": weights.clone()},
        "optimizer": {
            "state": {0: {"step": torch.tensor(value), "exp_avg": weights / 2, "exp_avg_sq": weights / 4}},
            "param_groups": [{"lr": 0.1, "betas": (0.9, 0.999), "fused": None, "amsgrad": False, "params": [0]}],
        },
        "scaler": {"scale": 65536.0, "growth_factor": 2.0, "_growth_tracker": 0},
        "best": {"step": 1, "AP": 0.5},
    }


def save(output: Path, *steps: int, keep: int = 9) -> None:
    for step in steps:
        save_checkpoint(output, step, a_state(step), keep)


def names(output: Path) -> list[str]:
    return sorted(file.name for file in (output / "checkpoints").iterdir())


def load(output: Path) -> dict[str, Any] | None:
    """Load without a warning."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return load_latest_checkpoint(output)


def test_the_latest_is_loaded(tmp_path: Path) -> None:
    assert load(tmp_path) is None
    save(tmp_path, 9, 10)
    (tmp_path / "checkpoints" / "step-11.pt").write_text("not of this program")
    state = load(tmp_path)
    assert state is not None
    expected = {"format": 1, "step": 10, **a_state(10)}
    assert repr(state) == repr(expected)
    assert torch.equal(state["model"]["weights"], expected["model"]["weights"])
    assert torch.equal(state["optimizer"]["state"][0]["exp_avg"], torch.full((5000,), 5.0))
    assert list_checkpoints(tmp_path) == [(step, tmp_path / "checkpoints" / f"step-{step:08d}.pt") for step in (9, 10)]


def test_only_the_latest_are_kept(tmp_path: Path) -> None:
    save(tmp_path, 1, 2, 3, keep=2)
    assert names(tmp_path) == ["step-00000002.pt", "step-00000003.pt"]
    save(tmp_path, 4, keep=1)
    assert names(tmp_path) == ["step-00000004.pt"]


def cut(content: bytes) -> bytes:
    return content[: len(content) // 2]


def flip(content: bytes) -> bytes:
    """Change a byte of the weights, which no parser minds."""
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


@pytest.mark.parametrize(
    "damage",
    [
        cut,
        flip,
        lambda content: content[:-1],
        lambda content: b"",
        lambda content: b"\0" * len(content),
        lambda content: b"[1, 2]",
        lambda content: content.replace(b"weights", b"weighty"),
    ],
    ids=["cut", "flipped", "last byte", "empty", "zeros", "text", "key"],
)
def test_a_damaged_file_is_named_and_the_one_before_is_taken(damage: Callable[[bytes], bytes], tmp_path: Path) -> None:
    save(tmp_path, 3, 6)
    file = tmp_path / "checkpoints" / "step-00000006.pt"
    damaged = damage(file.read_bytes())
    file.write_bytes(damaged)
    with pytest.warns(CheckpointWarning, match=f"^{file} is damaged and passed over") as caught:
        state = load_latest_checkpoint(tmp_path)
    assert "\n" not in str(caught[0].message)
    assert state is not None
    assert torch.equal(state["model"]["weights"], torch.full((5000,), 3.0))
    assert file.read_bytes() == damaged


def passed_over(output: Path, reason: str) -> None:
    """Step 3 is passed over in one line that says why, and step 2 is taken."""
    file = output / "checkpoints" / "step-00000003.pt"
    with pytest.warns(CheckpointWarning, match=f"^{file} is damaged and passed over .*{reason}") as caught:
        state = load_latest_checkpoint(output)
    assert state is not None
    assert state["step"] == 2
    (line,) = str(caught[0].message).splitlines()
    assert len(line) < 300
    assert line.count(str(file)) == 1


@pytest.mark.parametrize("foreign", [[1, 2], {"step": 3}, {"format": 1}, {"format": "1"}, torch.zeros(2)], ids=str)
def test_a_foreign_file_is_passed_over(foreign: Any, tmp_path: Path) -> None:
    save(tmp_path, 2)
    torch.save(foreign, tmp_path / "checkpoints" / "step-00000003.pt")
    passed_over(tmp_path, "")


MANY = torch.zeros(1).expand(1 << 50)


@pytest.mark.parametrize(
    ("path", "values"),
    [
        ("config", [None, 1, "", "[" * 100_000, "1" * 5000]),
        ("step", [None, "3", torch.zeros(2)]),
        ("data", [None, 5]),
        ("validation", [5]),
        ("workers", [None, "1", 1.5]),
        ("model", [None, [], {"weights": 1}, {1: torch.zeros(1)}, {"weights": MANY}, {"a": torch.eye(2).to_sparse()}]),
        ("average", [1, {"weights": None}]),
        ("optimizer", [None, {}, {"param_groups": []}]),
        ("optimizer.state", [None, [], {"a": {}}, {0: None}, {0: {"exp_avg": MANY}}, {0: {"step": 1}}]),
        ("scaler", [None, {"scale": "1"}, {"scale": [1]}]),
        ("best", [1, {}, {"step": 1}, {"step": "1", "AP": 0.5}]),
    ],
)
def test_a_state_with_something_missing_or_wrong_is_passed_over(path: str, values: list[Any], tmp_path: Path) -> None:
    save(tmp_path, 2)
    for value in [*values, "missing"]:
        state = {"format": 1, "step": 3, **a_state(3)}
        *parents, name = path.split(".")
        inner = state[parents[0]] if parents else state
        if value == "missing":
            del inner[name]
        else:
            inner[name] = value
        torch.save(state, tmp_path / "checkpoints" / "step-00000003.pt")
        passed_over(tmp_path, path.split(".")[0])


@pytest.mark.parametrize(
    ("other", "reason"),
    [(Namespace(), "it asks for argparse.Namespace"), ({((),): 1}, "it has a tuple as a key"), (1 << 2000, "bits")],
    ids=str,
)
def test_a_checkpoint_runs_nothing_and_holds_nothing_else(other: Any, reason: str, tmp_path: Path) -> None:
    save(tmp_path, 2)
    torch.save({"format": 1, "step": 3, **a_state(3), "x": other}, tmp_path / "checkpoints/step-00000003.pt")
    passed_over(tmp_path, reason)


def test_a_pipe_in_place_of_a_checkpoint_is_passed_over(tmp_path: Path) -> None:
    save(tmp_path, 2)
    os.mkfifo(tmp_path / "checkpoints/step-00000003.pt")
    passed_over(tmp_path, "not a regular file")


def test_a_renamed_file_is_passed_over(tmp_path: Path) -> None:
    save(tmp_path, 2, 3)
    file = tmp_path / "checkpoints" / "step-00000003.pt"
    file.rename(file.with_name("step-00000004.pt"))
    with pytest.warns(CheckpointWarning, match=r"step-00000004\.pt .*it holds step 3"):
        assert (load_latest_checkpoint(tmp_path) or {})["step"] == 2


def test_no_readable_one_is_left(tmp_path: Path) -> None:
    save(tmp_path, 1, 2)
    for _, file in list_checkpoints(tmp_path):
        file.write_bytes(cut(file.read_bytes()))
    with (
        pytest.warns(CheckpointWarning) as caught,
        pytest.raises(ValueError, match=r"none of the 2 checkpoints in .* can be read; start a new run"),
    ):
        load_latest_checkpoint(tmp_path)
    assert len(caught) == 2


def test_a_newer_format_is_not_passed_over(tmp_path: Path) -> None:
    save(tmp_path, 1)
    torch.save({"format": 2, "step": 2}, tmp_path / "checkpoints" / "step-00000002.pt")
    with pytest.raises(ValueError, match=r"step-00000002\.pt has format 2, not 1; .*upgrade"):
        load(tmp_path)


def test_damaged_later_ones_do_not_push_out_good_ones(tmp_path: Path) -> None:
    save(tmp_path, 2, 4, 6)
    for _, file in list_checkpoints(tmp_path)[1:]:
        file.write_bytes(b"")
    save(tmp_path, 3, keep=1)
    assert [step for step, _ in list_checkpoints(tmp_path)] == [3]


def test_what_a_killed_process_left_behind_is_no_checkpoint_and_goes(tmp_path: Path) -> None:
    save(tmp_path, 1)
    (tmp_path / "checkpoints" / ".step-00000002.0a1b2c3d.pt").write_bytes(b"half a checkpo")
    assert (load(tmp_path) or {})["step"] == 1
    save(tmp_path, 2)
    assert names(tmp_path) == ["step-00000001.pt", "step-00000002.pt"]


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (RuntimeError("unexpected pos 7 vs 5\nC++ frames"), "cannot be written, the disk may be full: unexpected pos"),
        (OSError(28, "No space left on device"), "No space left on device; free some"),
    ],
)
def test_a_full_disk_leaves_what_was_there(
    error: Exception, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path, 1)

    def fail(state: Any, file: Any) -> None:
        file.write(b"some")
        raise error

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(OSError, match=message) as raised:
        save(tmp_path, 2, keep=1)
    assert "step-00000002.pt" in str(raised.value)
    assert "\n" not in str(raised.value)
    assert names(tmp_path) == ["step-00000001.pt"]


def test_folders_among_the_checkpoints_are_left_alone(tmp_path: Path) -> None:
    for name in (".step-x", "step-00000000.pt", "step-00000009.pt"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    save_checkpoint(tmp_path, 3, {}, keep=1)
    assert [step for step, _ in list_checkpoints(tmp_path)] == [3]
    assert len(list((tmp_path / "checkpoints").iterdir())) == 4

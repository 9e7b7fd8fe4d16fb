"""Checkpoint files: whole, damaged, and cut off while they are written."""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from m2f_video.training.checkpoint import CheckpointWarning, list_checkpoints, load_latest_checkpoint, save_checkpoint


def save(output: Path, *steps: int, keep: int = 9) -> None:
    for step in steps:
        save_checkpoint(output, step, {"weights": torch.full((5000,), step), "best": None}, keep)


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
    assert (state["step"], state["best"]) == (10, None)
    assert torch.equal(state["weights"], torch.full((5000,), 10))
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
    assert torch.equal(state["weights"], torch.full((5000,), 3))
    assert file.read_bytes() == damaged


@pytest.mark.parametrize("foreign", [[1, 2], {"step": 3}, {"format": 1}, torch.zeros(2)], ids=str)
def test_a_foreign_file_is_passed_over(foreign: Any, tmp_path: Path) -> None:
    save(tmp_path, 2)
    torch.save(foreign, tmp_path / "checkpoints" / "step-00000003.pt")
    with pytest.warns(CheckpointWarning, match=r"step-00000003\.pt is damaged"):
        state = load_latest_checkpoint(tmp_path)
    assert state is not None
    assert state["step"] == 2


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

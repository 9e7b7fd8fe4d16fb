"""What a run tells while it goes, and what a resumed one goes on with."""

import errno
import os
import sys
from contextlib import closing
from pathlib import Path

import pytest
import torch

from m2f_video.training import Worker
from m2f_video.training.log import LOGGED_PARTS, TrainingLog
from tests.training.tiny_run import (
    VIDEOS,
    assert_same_end,
    column,
    copy_stopped_run,
    rows,
    train,
    train_until,
)


def test_tensorboard(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train_until(2, tmp_path, tensorboard=True, validation=VIDEOS)
    train(tmp_path, tensorboard=True, validation=VIDEOS, resume=True)
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert {"train/loss", "train/grad_norm", "evaluation/AP"} <= set(events.Tags()["scalars"])
    assert [(event.step, event.value) for event in events.Scalars("train/loss")] == [
        (index + 1, pytest.approx(loss)) for index, loss in enumerate(column(tmp_path, "loss"))
    ]


def test_without_tensorboard_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ImportError, match=r"pip install 'm2f-video\[train\]'"):
        train(tmp_path, tensorboard=True)


def full(*_: object, **__: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


NUMBERS = dict.fromkeys(("loss", *LOGGED_PARTS, "learning_rate", "grad_norm", "seconds"), 1.0)


@pytest.mark.parametrize("call", ["open", "add_scalar", "flush", "close", "print"])
def test_a_full_disk_is_named_by_what_is_written_to(call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.utils.tensorboard import SummaryWriter

    log = TrainingLog(tmp_path, Worker(0, 1, torch.device("cpu")), 9, 0, every=1, tensorboard=True)
    if call == "open":
        (tmp_path / "log.csv").symlink_to("/dev/full")
    elif call == "print":
        monkeypatch.setattr("builtins.print", full)
    else:
        monkeypatch.setattr(SummaryWriter, call, full)
    name = {"open": tmp_path / "log.csv", "print": "standard output"}.get(call, tmp_path / "tensorboard")
    with pytest.raises(OSError, match=f"No space left on device; .*: '{name}'$"), closing(log):
        log.step(1, NUMBERS)
    monkeypatch.undo()
    log.close()


def test_a_log_that_a_kill_cut_short(whole: Path, tmp_path: Path) -> None:
    copy_stopped_run(2, tmp_path)
    with (tmp_path / "log.csv").open("a") as file:
        file.write("3,4.2")
    train(tmp_path, resume=True)
    assert_same_end(tmp_path, whole)


DAMAGED_ROWS = (
    "2,0.5,0.5",  # cut off
    "2,1,1,1,1,1,1,1,1",  # too long
    "2,1,1,1,one,1,1,1",
    "two,1,1,1,1,1,1,1",
    f"{'9' * 5000},1,1,1,1,1,1,1",  # a huge step
    "\0" * 40,  # zeros of a power cut
    "",
    "\udcff\udcfe,1",  # not text
)


def test_damaged_rows_of_a_log_are_left_out(whole: Path, tmp_path: Path) -> None:
    copy_stopped_run(2, tmp_path)
    log = tmp_path / "log.csv"
    header, first, second = log.read_text().splitlines()
    for kind in DAMAGED_ROWS:  # each is noticed alone
        log.write_bytes("\n".join([header, first, kind, second, ""]).encode("utf-8", "surrogateescape"))
        with pytest.warns(UserWarning, match=f"^{log}: 1 damaged lines are left out"):
            TrainingLog(tmp_path, Worker(0, 1, torch.device("cpu")), 3, 2, every=1, tensorboard=False).close()
        assert [row["step"] for row in rows(tmp_path)] == ["1", "2"], kind
    content = "\n".join([header, first, *DAMAGED_ROWS, second, ""])
    log.write_bytes(content.encode("utf-8", "surrogateescape"))
    with pytest.warns(UserWarning, match=f"^{log}: {len(DAMAGED_ROWS)} damaged lines are left out"):
        train(tmp_path, resume=True)
    assert_same_end(tmp_path, whole)


@pytest.mark.parametrize("name", ["log.csv", "evaluation.csv"])
@pytest.mark.parametrize("content", [b"epoch,loss\n1,2\n", b"step,loss\n1,2\n", b"\0\0\0\n", b"\xff\xfe\n", b"\n"])
def test_a_log_of_something_else_is_left_as_it_is(name: str, content: bytes, tmp_path: Path) -> None:
    file = tmp_path / name
    file.write_bytes(content)
    with pytest.raises(ValueError, match=rf"^{file} is no log to go on with, as its columns are not step,.*; move it"):
        train(tmp_path, resume=True)
    assert file.read_bytes() == content
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_a_log_that_is_a_pipe_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "log.csv")
    with pytest.raises(ValueError, match=r"log\.csv is a named pipe"):
        train(tmp_path, resume=True)


@pytest.mark.parametrize("content", ["", "step,lo"])
def test_a_log_that_is_cut_within_its_header(content: str, tmp_path: Path) -> None:
    copy_stopped_run(1, tmp_path)
    (tmp_path / "log.csv").write_text(content)
    train(tmp_path, resume=True)
    assert [row["step"] for row in rows(tmp_path)] == ["2", "3"]

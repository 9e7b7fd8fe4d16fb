"""Reading what strangers give, and writing whole or not at all."""

import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from m2f_video.files import atomic_path, check_regular, naming, new_folder, parse_json, read_json

WRITER = """
import sys, time
from pathlib import Path
from m2f_video.files import atomic_path, new_folder
with atomic_path(Path(sys.argv[1]) / "overlay.mp4") as file, new_folder(Path(sys.argv[1]) / "OUT") as folder:
    file.write_bytes(b"half"), (folder / "part").write_bytes(b"half")
    print("writing", flush=True)
    time.sleep(60)
"""


def start_writer(folder: Path) -> subprocess.Popen:
    command = [sys.executable, "-c", WRITER, str(folder)]
    writer = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)  # noqa: S603
    assert writer.stdout is not None
    assert writer.stdout.readline() == "writing\n"
    return writer


def write_both(folder: Path) -> None:
    with atomic_path(folder / "overlay.mp4") as file, new_folder(folder / "OUT") as made:
        file.write_bytes(b"whole")
        (made / "part").write_bytes(b"whole")


def test_what_a_killed_writer_left_is_removed_by_the_next(tmp_path: Path) -> None:
    writer = start_writer(tmp_path)
    writer.kill()
    writer.wait()
    assert len(list(tmp_path.iterdir())) == 2
    (tmp_path / ".overlay.notes.mp4").write_bytes(b"the user's")
    write_both(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".overlay.notes.mp4", "OUT", "overlay.mp4"]


def test_what_a_living_writer_writes_stays(tmp_path: Path) -> None:
    writer = start_writer(tmp_path)
    try:
        before = set(tmp_path.iterdir())
        write_both(tmp_path)
        assert before < set(tmp_path.iterdir())
    finally:
        writer.send_signal(signal.SIGKILL)
        writer.wait()


def test_a_folder_in_the_way_is_found_before_anything_is_written(tmp_path: Path) -> None:
    (tmp_path / "tracks.json").mkdir()
    with pytest.raises(IsADirectoryError, match=r"tracks\.json"), atomic_path(tmp_path / "tracks.json"):
        pytest.fail("the block must not run")
    assert [path.name for path in tmp_path.iterdir()] == ["tracks.json"]


def test_a_full_disk_names_the_file_and_not_its_stand_in(tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"No space left.*free some.*'.*/out\.txt'"), atomic_path(tmp_path / "out.txt"):
        raise OSError(errno.ENOSPC, "No space left on device")
    with (
        pytest.raises(OSError, match=r"'.*/out\.txt'"),
        atomic_path(tmp_path / "out.txt") as file,
    ):
        raise OSError(errno.ENOSPC, "No space left on device", str(file))
    with pytest.raises(OSError, match=r"log\.csv"), naming("log.csv"):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", ["pipe", "device"])
def test_what_would_block_is_refused(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "pipe" if kind == "pipe" else Path("/dev/zero")
    if kind == "pipe":
        os.mkfifo(path)
    start = time.monotonic()
    with pytest.raises(ValueError, match=r"is a .*, not a regular file"):
        check_regular(path)
    with pytest.raises(ValueError, match=r"is a .*, not a regular file"):
        read_json(path)
    assert time.monotonic() - start < 5


@pytest.mark.parametrize(
    "text",
    [
        "1" + 30 * "0",
        "-" + 5000 * "9",
        '{"a": [9223372036854775808]}',
        "1e999",
        "[1.5E+400]",
        "1" + 400 * "0" + ".5",
        100_000 * "[",
        100_000 * '{"a":',
        100_000 * "[" + 100_000 * "]",
        "",
        '{"a": 1',
    ],
    ids=lambda text: f"{text[:12]}x{len(text)}",
)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-16"])
def test_hostile_json_is_one_kind_of_error(tmp_path: Path, text: str, encoding: str) -> None:
    file = tmp_path / "file.json"
    file.write_bytes(text.encode(encoding))
    with pytest.raises(ValueError, match=r"file\.json: not a JSON file, or cut off: .{1,200}$"):
        read_json(file)


def test_numbers_that_fit_are_read_as_they_are() -> None:
    text = '{"a": [9223372036854775807, -9223372036854775808, 1e308, 1e-999, 0.12345678901234567890123], "b": "9e999"}'
    expected = {"a": [2**63 - 1, -(2**63), 1e308, 0.0, 0.12345678901234567890123], "b": "9e999"}
    assert parse_json(text) == parse_json(text.encode()) == parse_json(text.encode("utf-16")) == expected


def test_names_as_long_as_file_systems_take_them_are_written(tmp_path: Path) -> None:
    final = tmp_path / (250 * "j" + ".json")
    leftover = None
    with atomic_path(final) as file:
        leftover = file.with_name(file.name.replace(file.name.split(".")[2], "0a1b2c3d"))
        file.write_text("new")
    leftover.write_text("of a killed writer")
    with atomic_path(final) as file:
        file.write_text("newer")
    assert [path.name for path in tmp_path.iterdir()] == [final.name]
    assert final.read_text() == "newer"

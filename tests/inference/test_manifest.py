"""What is said of the results of many videos, whoever writes it."""

import json
import multiprocessing
from pathlib import Path

import pytest

from m2f_video.inference.manifest import Manifest

MADE_FROM = {"checkpoint": "demo", "model": "0" * 64, "options": {"top_k": 10, "mode": "auto"}}


def test_processes_see_what_others_write_meanwhile(tmp_path):
    first, second = Manifest(tmp_path, MADE_FROM), Manifest(tmp_path, MADE_FROM | {"checkpoint": "the same, elsewhere"})
    first.add("a", {"state": "done", "frames": 3})
    second.add("b", {"state": "failed", "error": "é\udce9"})
    first.add("a", {"state": "failed"})
    for manifest in (first, second):
        manifest.refresh()
        assert manifest.entries == {
            "a": {"video": "a", "state": "failed"},
            "b": {"video": "b", "state": "failed", "error": "é\udce9"},
        }
        assert manifest.fresh == {"a", "b"}
    third = Manifest(tmp_path, MADE_FROM)
    assert (third.entries, third.fresh) == (first.entries, set())
    lines = first.path.read_text("ascii").splitlines()
    assert json.loads(lines[0]) == {"made_from": MADE_FROM}
    assert len(lines) == 4
    assert list(tmp_path.iterdir()) == [first.path]


def test_a_line_that_is_cut_off_does_not_count(tmp_path):
    manifest = Manifest(tmp_path, MADE_FROM)
    manifest.add("a", {"state": "done"})
    with manifest.path.open("ab") as file:
        file.write(b'{"video": "b", "sta')
    again = Manifest(tmp_path, MADE_FROM)
    again.add("c", {"state": "done"})
    manifest.refresh()
    assert set(manifest.entries) == {"a", "c"}


@pytest.mark.parametrize("length", [0, 5, 30])
def test_a_header_that_is_cut_off_is_written_again(tmp_path, length):
    header = Manifest(tmp_path, MADE_FROM).path.read_bytes()
    (tmp_path / "manifest.jsonl").write_bytes(header[:length])
    Manifest(tmp_path, MADE_FROM)
    assert (tmp_path / "manifest.jsonl").read_bytes() == header


@pytest.mark.parametrize(
    ("other", "named"),
    [
        ({"model": "1" * 64}, r"another checkpoint \(demo \[00000000\] and not demo \[11111111\]\); give --output"),
        ({"options": {"top_k": 3, "mode": "auto"}}, r"another top_k \(10 and not 3\); give --output another"),
        ({"options": {"top_k": 10}}, r"another mode \(auto and not None\)"),
    ],
)
def test_results_of_something_else_are_named(tmp_path, other, named):
    Manifest(tmp_path, MADE_FROM).add("a", {"state": "done"})
    before = (tmp_path / "manifest.jsonl").read_bytes()
    with pytest.raises(ValueError, match=f"manifest.jsonl: the results there are made with {named}"):
        Manifest(tmp_path, MADE_FROM | other)
    assert (tmp_path / "manifest.jsonl").read_bytes() == before


@pytest.mark.parametrize("content", [b"mine", b"mine\n", b'{"made_from": 3}\n', b'{"video": "a", "state": "done"}\n'])
def test_what_is_no_manifest_is_left_alone(tmp_path, content):
    (tmp_path / "manifest.jsonl").write_bytes(content)
    with pytest.raises(ValueError, match="it is no manifest"):
        Manifest(tmp_path, MADE_FROM)
    assert (tmp_path / "manifest.jsonl").read_bytes() == content


@pytest.mark.parametrize(
    "line",
    [
        b"\xff\n",
        b"[]\n",
        b'{"video": 3, "state": "done"}\n',
        b'{"video": "b"}\n',
        b'{"video": "b", "state": "done", "source": null}\n',
        b'{"video": "b", "state": "done", "source": ["a.mp4"]}\n',
        b'{"video": "b", "state": "done", "files": 5}\n',
        b'{"video": "b", "state": "done", "frames": "5"}\n',
        b'{"video": "b", "state": "failed", "error": 5}\n',
    ],
)
def test_a_damaged_line_is_named(tmp_path, line):
    path = Manifest(tmp_path, MADE_FROM).path
    with path.open("ab") as file:
        file.write(line)
    with pytest.raises(ValueError, match="a line of it is damaged"):
        Manifest(tmp_path, MADE_FROM)


def test_one_that_holds_nothing_is_removed_and_made_again(tmp_path):
    first, second = Manifest(tmp_path, MADE_FROM), Manifest(tmp_path, MADE_FROM)
    first.remove_unused()
    assert not first.path.exists()
    second.add("a", {"state": "done"})
    first.remove_unused()
    assert set(Manifest(tmp_path, MADE_FROM).entries) == {"a"}


def write(folder: Path, name: str) -> None:
    manifest = Manifest(folder, MADE_FROM)
    for index in range(10):
        manifest.add(f"{name}{index}", {"state": "done", "text": "x" * 5000})


def test_processes_that_write_at_once_lose_no_line(tmp_path):
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=write, args=(tmp_path, name)) for name in "abc"]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert len(Manifest(tmp_path, MADE_FROM).entries) == 30

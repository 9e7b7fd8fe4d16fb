"""The research guide, `m2f_video/modeling/README.md`: all of its code runs, and its table tells where everything is."""

import ast
import linecache
import os
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
import torch
import torch.distributed as dist

from m2f_video.config import PixelDecoderConfig, TransformerDecoderConfig
from m2f_video.modeling import build
from m2f_video.training import LossConfig, TrainConfig
from m2f_video.training.config import CHANGEABLE

GUIDE = Path(build.__file__).with_name("README.md")
TEXT = GUIDE.read_text(encoding="utf-8")
LOOP = "A training loop of your own"
PARTS_OF_A_CONFIG = ("backbone", "preprocessing", "augment", "optim")
PARITY = "Is it still equal to the original?"


def blocks() -> Iterator[tuple[str, str]]:
    """Every block of Python under its heading."""
    for section in re.split(r"^##+ ", TEXT, flags=re.MULTILINE)[1:]:
        for code in re.findall(r"^```python\n(.*?)^```$", section, flags=re.MULTILINE | re.DOTALL):
            yield section.partition("\n")[0], code


PREAMBLE, *BLOCKS = blocks()


def run(heading: str, code: str) -> None:
    linecache.cache[heading] = len(code), None, code.splitlines(keepends=True), heading  # for tracebacks
    exec(compile(code, heading, "exec"), {"__name__": "guide"})  # noqa: S102


@pytest.fixture
def group_of_one(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """One worker, announced as `torchrun` does it."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        port = server.getsockname()[1]
    group = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    for name, value in group.items():
        monkeypatch.setenv(name, str(value))
    yield
    if dist.is_initialized():  # which a loop that failed has left
        dist.destroy_process_group()


@pytest.mark.parametrize(("heading", "code"), BLOCKS, ids=[heading for heading, _ in BLOCKS])
def test_code_of_the_guide_runs(
    heading: str, code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    if heading == PARITY:
        pytest.importorskip("transformers")
    if heading == LOOP and dist.is_available():
        request.getfixturevalue("group_of_one")
    monkeypatch.chdir(tmp_path)
    run(heading, PREAMBLE[1] + code)
    assert any(isinstance(node, ast.Assert) for node in ast.walk(ast.parse(code))), "it cannot fail"


def test_there_are_ten_recipes() -> None:
    assert PREAMBLE[0] == "Recipes"
    recipes = TEXT.partition("## Recipes")[2].partition("## Hooks and taps")[0]
    assert recipes.count("\n### ") >= 10


@pytest.mark.slow
def test_two_workers_share_the_loop(tmp_path: Path) -> None:
    (code,) = [code for heading, code in BLOCKS if heading == LOOP]
    (tmp_path / "loop.py").write_text(
        f"{PREAMBLE[1]}\n{code}    torch.save(model.state_dict(), f'{{worker.rank}}.pt')\n"
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "loop.py"]
    here = os.environ | {"PYTHONPATH": str(GUIDE.parents[2])}
    done = subprocess.run(command, cwd=tmp_path, env=here, capture_output=True, text=True, check=False)  # noqa: S603
    assert done.returncode == 0, done.stderr
    assert all(f"worker {rank} step 3" in done.stdout for rank in range(2))
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert all(tensor.equal(second[name]) for name, tensor in first.items())


# The table


def rows() -> list[list[str]]:
    table = TEXT.partition("## From the papers to the code")[2].partition("## Modules of your own")[0]
    return [line.strip("|").split("|") for line in table.splitlines() if line.startswith("| ")][1:]


def quoted(text: str) -> list[str]:
    return re.findall(r"`([^`]+)`", text)


@pytest.mark.parametrize("row", rows(), ids=lambda row: row[0].strip())
def test_what_a_row_names_is_where_it_says(row: list[str]) -> None:
    where = quoted(row[2])
    files = [name for name in where if name.endswith(".py")]
    source = "".join((GUIDE.parent / name).read_text(encoding="utf-8") for name in files)
    for name in set(where) - set(files):
        assert re.search(rf"(class|def) {name}\b|self\.{name} = ", source), f"{name} is in none of {files}"


@pytest.mark.parametrize("table", [build.PIXEL_DECODERS, build.CROSS_ATTENTIONS, build.LAYER_ORDERS, build.POSITIONS])
def test_every_value_is_in_a_row_with_its_class(table: dict[str, type]) -> None:
    (row,) = [row for row in rows() if set(table) <= set(quoted(row[1]))]
    assert {kind.__name__ for kind in table.values()} <= set(quoted(row[2]))


@pytest.mark.parametrize("config", [TransformerDecoderConfig, PixelDecoderConfig, LossConfig])
def test_values_are_in_the_row_of_their_field(config: type) -> None:
    for name, hint in get_type_hints(config).items():
        row = next(row for row in rows() if name in re.split(r"\W", row[1]))
        assert {value for value in get_args(hint) if isinstance(value, str)} <= set(quoted(row[1])), name


def fields_of(made: Any, prefix: str = "") -> Iterator[str]:
    for item in fields(made):
        value, name = getattr(made, item.name), f"{prefix}{item.name}"
        yield from fields_of(value, f"{name}.") if is_dataclass(value) else (name,)


def test_every_field_has_a_row() -> None:
    """A name without its part, as `num_layers`, is of the part that was named last in the row."""
    known: set[str] = set()
    for row in rows():
        part = ""
        for name in quoted(row[1]):
            known.add(name if "." in name else f"{part}{name}")
            part = f"{name.rpartition('.')[0] or name}." if "." in name or name in PARTS_OF_A_CONFIG else part
    wanted = {name.removeprefix("model.") for name in fields_of(TrainConfig())} - CHANGEABLE - {"parts"}
    assert "backbone.window_size" in wanted
    assert wanted - known == set()

"""Who may import whom: arrows of the layout, read from the source."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "m2f_video"
BASE = {"files", "distributed", "categories", "config", "checked_config"}
MAY_IMPORT = {
    "ops": set[str](),
    "modeling": {"ops", "hub", "partial_loading"},
    "acceleration": {"modeling", "ops"},
    "video": set[str](),
    "results": {"video"},
    "inference": {"modeling", "acceleration", "video", "results", "hub"},
}
INSIDE_FUNCTIONS = {("modeling/video_mask2former.py", "acceleration"), ("modeling/as_built.py", "acceleration")}
"""Imports against the arrows, when a function is called: `prepare_for_inference` puts twins in place, and what looks
at the classes of modules looks through them."""


def imports(file: Path, *, nested: bool) -> Iterator[str]:
    """Modules of the package that a file imports, by dotted name without the package's."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    for node in ast.walk(tree) if nested else tree.body:
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("m2f_video"):
            name = node.module.removeprefix("m2f_video").lstrip(".")
            folder = PACKAGE / name.replace(".", "/")
            for alias in node.names:
                is_file = (folder / f"{alias.name}.py").is_file()
                yield f"{name}.{alias.name}".lstrip(".") if is_file or not name else name


@pytest.mark.parametrize("place", MAY_IMPORT)
def test_arrows_point_one_way(place: str) -> None:
    wrong = set()
    for file in sorted((PACKAGE / place).rglob("*.py")):
        name = str(file.relative_to(PACKAGE))
        others = {module.split(".")[0] for module in imports(file, nested=True)}
        for other in others - BASE - MAY_IMPORT[place] - {place}:
            if (name, other) not in INSIDE_FUNCTIONS:
                wrong.add((name, other))
    assert wrong == set()


def test_the_model_does_not_know_of_its_acceleration() -> None:
    for file in (PACKAGE / "modeling").glob("*.py"):
        assert not [name for name in imports(file, nested=False) if name.startswith("acceleration")]


def test_there_is_no_circle_of_files() -> None:
    graph = {
        ".".join(file.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__"): set(
            imports(file, nested=False)
        )
        for file in PACKAGE.rglob("*.py")
    }
    done: set[str] = set()

    def visit(name: str, above: tuple[str, ...]) -> None:
        assert name not in above, " -> ".join((*above, name))
        if name in graph and name not in done:
            for other in graph[name]:
                if other != name:
                    visit(other, (*above, name))
            done.add(name)

    for name in graph:
        visit(name, ())


def test_no_file_is_long() -> None:
    packages = [PACKAGE, PACKAGE.parent / "weights_convert"]
    lengths = {f.name: len(f.read_text(encoding="utf-8").splitlines()) for p in packages for f in p.rglob("*.py")}
    assert {name: length for name, length in lengths.items() if length > 450} == {}

"""Compiling, keeping and loading the kernels."""

from pathlib import Path

import pytest
import torch

from m2f_video.ops import cpu_kernels

pytestmark = pytest.mark.skipif(cpu_kernels.why_no_kernels() is not None, reason="needs Linux and a C++ compiler")

PROGRAM = '#include <cstdint>\nextern "C" __attribute__((visibility("default"))) void f(int64_t, int64_t, float*) {}\n'


@pytest.fixture
def sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of other sources, which are compiled into one of their own."""
    folder = tmp_path / "csrc"
    folder.mkdir()
    (folder / "f.cpp").write_text(PROGRAM)
    monkeypatch.setattr(cpu_kernels, "SOURCES", folder)
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "kept"))
    return folder


def build() -> None:
    cpu_kernels._library.__wrapped__()


def kept(sources: Path) -> list[Path]:
    return sorted((sources.parent / "kept" / "m2f_video").iterdir())


def test_a_library_is_compiled_once_for_its_sources_and_flags(sources: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build()
    [library] = kept(sources)
    changed = library.stat().st_mtime_ns
    build()
    assert [library] == kept(sources)
    assert library.stat().st_mtime_ns == changed
    (sources / "f.cpp").write_text(PROGRAM + "// changed\n")
    build()
    monkeypatch.setattr(cpu_kernels, "FLAGS", (*cpu_kernels.FLAGS, "-g"))
    build()
    assert len(kept(sources)) == 3


def test_what_the_compiler_says_is_passed_on_and_nothing_is_left(sources: Path) -> None:
    (sources / "f.cpp").write_text("int f( {")
    with pytest.raises(RuntimeError, match=r"(?s)do not compile: .*f\.cpp.*error"):
        build()
    assert kept(sources) == []


@pytest.mark.parametrize("command", ["", "g++ -pipe"])
def test_cxx_names_a_command(command: str, sources: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", command)
    build()
    assert len(kept(sources)) == 1


@pytest.mark.parametrize(("command", "reason"), [("no-compiler", "no C.. compiler"), ("g++ '", "CXX is no command")])
def test_a_compiler_that_is_not_there(command: str, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", command)
    with pytest.raises(RuntimeError, match=rf"{reason}.*compile='none'"):
        build()


def test_a_folder_that_cannot_be_written_is_named(sources: Path) -> None:
    (sources.parent / "kept").write_text("a file")
    with pytest.raises(RuntimeError, match=r"kept.*TORCH_EXTENSIONS_DIR"):
        build()


def test_files_that_others_may_have_written_are_not_loaded(sources: Path) -> None:
    build()
    [library] = kept(sources)
    library.chmod(0o777)
    with pytest.raises(RuntimeError, match=f"{library.name} is not loaded"):
        build()
    library.chmod(0o755)
    library.parent.chmod(0o777)
    with pytest.raises(RuntimeError, match="m2f_video is not loaded"):
        build()


def test_a_file_that_is_no_library_is_an_error(sources: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def compile_nothing(*args: str) -> str:
        if "-o" in args:
            Path(args[-1]).write_text("nothing")
        return ""

    monkeypatch.setattr(cpu_kernels, "_run", compile_nothing)
    with pytest.raises(RuntimeError, match=r"cannot be kept or loaded: .*kernels-.*\.so"):
        build()


@pytest.mark.parametrize(
    "tensor",
    [
        torch.zeros(4, 6).t(),
        torch.zeros(4, device="meta"),
        torch.zeros(4).as_subclass(type("Other", (torch.Tensor,), {})),
    ],
)
def test_kernels_get_plain_memory_alone(tensor: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="takes contiguous tensors on a CPU"):
        cpu_kernels.call("layer_norm", torch.zeros(1), tensor)


def test_which_inputs_run() -> None:
    x = torch.zeros(2)
    assert cpu_kernels.runs(x, None, x)
    assert cpu_kernels.runs(x.bfloat16())
    assert not cpu_kernels.runs(x, x.bfloat16())
    assert not cpu_kernels.runs(x.double())
    assert not cpu_kernels.runs(x.to("meta"))
    assert not cpu_kernels.runs(x, torch.zeros(2, requires_grad=True))
    with torch.no_grad():
        assert cpu_kernels.runs(x, torch.zeros(2, requires_grad=True))
    with torch.autocast("cpu", torch.bfloat16):
        assert not cpu_kernels.runs(x)

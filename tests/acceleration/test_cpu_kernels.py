"""Compiling, keeping and loading the kernels."""

import os
import pwd
import re
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from m2f_video.acceleration import cpu_kernels
from m2f_video.cli.main import main

pytestmark = pytest.mark.skipif(cpu_kernels.why_no_kernels() is not None, reason="needs Linux and a C++ compiler")

PROGRAM = """#include <cstdint>
#define EXPORT extern "C" __attribute__((visibility("default")))
EXPORT int64_t f() { return 7; }
"""


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
    assert cpu_kernels._library.__wrapped__().f() == 7


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
    with pytest.raises(RuntimeError, match=r"do not compile: g\+\+: f\.cpp:1:.*error: .+") as raised:
        build()
    assert len(str(raised.value)) < 300
    assert str(sources / "f.cpp") in "".join(raised.value.__notes__)  # the whole command
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


def cut(library: Path) -> None:
    os.truncate(library, library.stat().st_size // 2)


def change(library: Path) -> None:
    content = bytearray(library.read_bytes())
    content[len(content) // 2] ^= 1
    library.write_bytes(content)


def exchange(library: Path) -> None:
    """Put another library of ours in the place of one."""
    shutil.copy(library, library.with_name("kernels-0123456789abcdef.so"))
    source = cpu_kernels.SOURCES / "f.cpp"
    source.write_text(PROGRAM.replace("7", "8"))
    with pytest.raises(AssertionError):
        build()
    source.write_text(PROGRAM)
    [other] = [
        file for file in library.parent.iterdir() if file.name not in (library.name, "kernels-0123456789abcdef.so")
    ]
    other.replace(library)


def link(library: Path) -> None:
    library.rename(library.with_name("elsewhere"))
    library.symlink_to("elsewhere")


SPOILT: dict[str, Callable[[Path], object]] = {
    "cut": cut,
    "empty": lambda library: library.write_bytes(b""),
    "changed": change,
    "of someone else": lambda library: shutil.copy(torch._C.__file__, library),
    "exchanged": exchange,
    "a link": link,
    "a pipe": lambda library: (library.unlink(), os.mkfifo(library)),
    "written by a group": lambda library: library.chmod(0o660),
    "written by all": lambda library: library.chmod(0o777),
}


@pytest.mark.parametrize("kind", SPOILT)
def test_what_is_not_as_it_was_kept_is_compiled_again(kind: str, sources: Path) -> None:
    build()
    [library] = kept(sources)
    whole = library.read_bytes()
    SPOILT[kind](library)
    build()
    assert library.read_bytes() == whole
    assert not library.is_symlink()
    assert library.stat().st_mode & 0o777 == 0o600


def test_a_library_that_is_cut_off_while_it_is_used(sources: Path) -> None:
    library = cpu_kernels._library.__wrapped__()
    [file] = kept(sources)
    assert str(file) not in Path("/proc/self/maps").read_text()
    os.truncate(file, 0)
    assert library.f() == 7


def test_several_processes_compile_at_once(sources: Path) -> None:
    with ThreadPoolExecutor(4) as pool:
        for future in [pool.submit(build) for _ in range(4)]:
            future.result()
    build()
    assert len(kept(sources)) == 1


def test_what_is_made_is_for_the_user_alone(sources: Path) -> None:
    before = os.umask(0)
    try:
        build()
    finally:
        os.umask(before)
    folder = sources.parent / "kept"
    assert [path.stat().st_mode & 0o077 for path in (folder, *folder.rglob("*"))] == [0, 0, 0]


@pytest.mark.parametrize("mode", [0o770, 0o707, 0o777])
@pytest.mark.parametrize("place", ["kept", "kept/m2f_video", "."])
def test_folders_that_others_can_write_to_are_refused(place: str, mode: int, sources: Path) -> None:
    build()
    folder = sources.parent / place
    folder.chmod(mode)
    with pytest.raises(RuntimeError, match=f"^{folder.resolve()} is not loaded from.*; chmod go-w it, or name another"):
        build()
    folder.chmod(0o1777)  # as /tmp: what is ours in it stays so
    build()


def test_folders_of_other_users_are_refused(sources: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build()
    folder = sources.parent / "kept"
    if os.getuid() == 0:
        os.chown(folder, 12345, -1)
    else:
        monkeypatch.setattr(os, "getuid", lambda: 12345)
    with pytest.raises(
        RuntimeError, match=r"is not loaded from, as it belongs to another user; .*TORCH_EXTENSIONS_DIR"
    ):
        build()


def test_a_link_is_as_good_as_what_it_leads_to(sources: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build()
    (sources.parent / "link").symlink_to("kept")
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(sources.parent / "link"))
    build()
    (sources.parent / "kept").chmod(0o777)
    with pytest.raises(RuntimeError, match="kept is not loaded from"):
        build()


def test_kernels_that_are_missing_are_named(sources: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (sources / "f.cpp").write_text(PROGRAM + "#if 0\nEXPORT void g();\n#endif\n")
    with pytest.raises(RuntimeError, match=r"not whole, they have no g; remove .*kernels-.*"):
        build()


def test_every_kernel_that_is_called_is_looked_for() -> None:
    calls = re.compile(r"cpu_kernels\.call\(\s*\"(\w+)\"")
    called = {
        name for file in Path(cpu_kernels.__file__).parent.glob("*.py") for name in calls.findall(file.read_text())
    }
    sources = "".join(file.read_text() for file in cpu_kernels.SOURCES.glob("*.cpp"))
    assert len(called) > 5
    assert called | {"fast_products"} == set(cpu_kernels._EXPORTED.findall(sources))


def test_without_a_home_the_reason_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def nobody(_: int) -> None:
        raise KeyError("uid not found")

    for name in ("HOME", "XDG_CACHE_HOME", "TORCH_EXTENSIONS_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", nobody)
    with pytest.raises(RuntimeError, match=r"no home folder .*TORCH_EXTENSIONS_DIR"):
        build()
    assert main(["info"]) == 0
    assert "kernels for a CPU: none, there is no home folder" in capsys.readouterr().out


@pytest.mark.parametrize("home", ["a file", "a file/within", "a loop"])
def test_homes_that_cannot_be_used_are_named(
    home: str, sources: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (sources.parent / "a file").touch()
    (sources.parent / "a loop").symlink_to("a loop")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.delenv("TORCH_EXTENSIONS_DIR")
    monkeypatch.setenv("HOME", str(sources.parent / home))
    with pytest.raises(RuntimeError, match=r"cannot be kept or loaded: .*a (file|loop).*TORCH_EXTENSIONS_DIR"):
        build()
    assert main(["info"]) == 0
    assert f"kept in {sources.parent / home}" in capsys.readouterr().out


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

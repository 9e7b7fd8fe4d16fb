"""What an import loads: the heavy and optional libraries come where they are used, not before."""

import subprocess
import sys

HEAVY = ("av", "pycocotools", "scipy", "timm", "torchvision", "transformers", "triton", "PIL", "tyro", "rich")


def loaded_by(module: str, names: tuple[str, ...]) -> set[str]:
    """Which of `names` a fresh interpreter has loaded after importing a module."""
    code = f"import sys, {module}; print(*[name for name in {names!r} if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)  # noqa: S603
    assert result.returncode == 0, result.stderr
    return set(result.stdout.split())


def test_importing_the_package_loads_nothing_heavy() -> None:
    assert loaded_by("m2f_video", HEAVY) == set()


def test_the_converter_needs_nothing_of_the_package() -> None:
    assert loaded_by("weights_convert", (*HEAVY, "m2f_video")) == set()


def test_the_public_names() -> None:
    import m2f_video

    expected = {
        "VideoMask2Former",
        "VideoMask2FormerConfig",
        "VideoProcessor",
        "VideoSegmentation",
        "read_video",
        "segment_video",
    }
    assert expected <= set(m2f_video.__all__)
    assert all(hasattr(m2f_video, name) for name in m2f_video.__all__)

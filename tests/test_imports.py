"""What an import loads: the heavy and optional libraries come where they are used, not before."""

import subprocess
import sys

HEAVY = (
    *("PIL", "av", "pycocotools", "rich", "scipy", "timm", "torch._dynamo", "torchvision", "transformers", "triton"),
    "tyro",
)


def test_imports_load_nothing_heavy_and_the_converter_nothing_of_the_package() -> None:
    """In one fresh interpreter, as each takes seconds to load PyTorch."""
    steps = [
        ("weights_convert", (*HEAVY, "m2f_video")),
        ("m2f_video", HEAVY),
        ("m2f_video.results.tracks", HEAVY),
        ("m2f_video.modeling.video_mask2former", HEAVY),
    ]
    code = f"""
import importlib, sys
for module, names in {steps!r}:
    importlib.import_module(module)
    print(module, *[name for name in names if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)  # noqa: S603
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [module for module, _ in steps]


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

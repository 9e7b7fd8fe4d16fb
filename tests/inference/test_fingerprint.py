"""What tells that a result is of this model, these options and this video."""

import copy
import json
import os
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from PIL import Image

from m2f_video.inference.fingerprint import (
    differences,
    model_fingerprint,
    options_fingerprint,
    source_fingerprint,
)
from m2f_video.inference.linking import EmbeddingLinker, TransferLinker
from m2f_video.video import VideoError


def test_a_model_is_told_by_its_weights_dtype_and_config(tiny_model):
    other = copy.deepcopy(tiny_model)
    assert model_fingerprint(other) == model_fingerprint(tiny_model)
    assert model_fingerprint(copy.deepcopy(tiny_model).double()) != model_fingerprint(tiny_model)
    with torch.no_grad():
        other.transformer_decoder.class_head.bias[0] += 1e-3
    assert model_fingerprint(other) != model_fingerprint(tiny_model)
    other = copy.deepcopy(tiny_model)
    other.config = other.config.replace(labels=("a", *other.config.labels[1:]))
    assert model_fingerprint(other) != model_fingerprint(tiny_model)
    with pytest.raises(TypeError, match="object has no state_dict"):
        model_fingerprint(object())


def test_acceleration_does_not_change_it(tiny_model):
    from m2f_video.acceleration import accelerated

    expected = model_fingerprint(tiny_model)
    with accelerated(tiny_model, plain=False) as fast:
        assert model_fingerprint(fast) == expected


def test_a_file_is_told_by_its_size_and_time(tmp_path):
    file = tmp_path / "video.mp4"
    file.write_bytes(b"12345")
    before = source_fingerprint(file)
    assert before["bytes"] == 5
    assert json.loads(json.dumps(before)) == before == source_fingerprint(str(file))
    os.utime(file, ns=(1, before["modified_ns"] + 1))
    assert [text.split()[0] for text in differences(before, source_fingerprint(file))] == ["modified_ns"]
    with pytest.raises(FileNotFoundError, match="nowhere"):
        source_fingerprint(tmp_path / "nowhere")


def test_a_folder_is_told_by_each_of_its_frames(tmp_path):
    for name in ("0", "1", "2"):
        Image.new("RGB", (4, 4)).save(tmp_path / f"{name}.png")
        os.utime(tmp_path / f"{name}.png", ns=(int(name), int(name)))
    before = source_fingerprint(tmp_path)
    (tmp_path / "notes.txt").write_text("no frame")
    assert source_fingerprint(tmp_path) == before
    swap(tmp_path / "0.png", tmp_path / "1.png")  # the same sizes and times, in another order
    assert differences(before, source_fingerprint(tmp_path)) == ["frames"]
    for frame in tmp_path.glob("*.png"):
        frame.unlink()
    with pytest.raises(VideoError, match="holds no frames"):
        source_fingerprint(tmp_path)


def swap(a: Path, b: Path) -> None:
    a.rename(a.with_suffix(".tmp"))
    b.rename(a)
    a.with_suffix(".tmp").rename(b)


@dataclass(frozen=True)
class MyLinker:
    threshold: float
    weights: tuple[int, ...] = (1, 2)


def test_options_go_through_json():
    options = {"mode": "auto", "stride": None, "top_k": 10, "frames": slice(1, 5), "linker": MyLinker(0.5)}
    found = options_fingerprint(options)
    assert json.loads(json.dumps(found)) == found
    assert differences(found, options_fingerprint(options | {"top_k": 3})) == ["top_k (10 and not 3)"]
    assert differences(found, options_fingerprint(options | {"linker": MyLinker(0.6)})) == [
        "linker.threshold (0.5 and not 0.6)"
    ]
    assert differences(found, options_fingerprint(options | {"linker": TransferLinker()}))
    endless = options_fingerprint({"linker": EmbeddingLinker(), "score": float("nan")})
    assert json.loads(json.dumps(endless, allow_nan=False))["linker"]["threshold"] == "-inf"
    assert differences(found, {}) != [] != differences({}, found)

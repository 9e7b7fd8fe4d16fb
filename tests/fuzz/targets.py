"""What is fuzzed: for each kind of file valid ones to begin with, and how the program reads it."""

import io
import json
import pickle
import random
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save

from m2f_video.data.coco import CocoVideos
from m2f_video.data.synthetic import SyntheticVideos
from m2f_video.data.validate import check_dataset
from m2f_video.data.write import write_youtube_vis
from m2f_video.data.youtube_vis import YouTubeVis
from m2f_video.evaluation import average_precision, load_ground_truth, load_results, pair_tracks
from m2f_video.evaluation.journal import Journal
from m2f_video.hub import load_config
from m2f_video.inference.processor import VideoProcessor
from m2f_video.modeling.video_mask2former import VideoMask2Former
from m2f_video.results.tracks import VideoSegmentation
from m2f_video.training import TrainConfig, Trainer
from m2f_video.training.checkpoint import checkpoint_file
from m2f_video.video import VideoWriter, open_video
from tests.evaluation.builders import random_case
from tests.fuzz.mutations import mutate_bytes, mutate_json, mutate_state, random_pickle
from tests.training.tiny_run import CONFIG, MODEL, VIDEOS, train
from weights_convert import from_native, hf_config_from_native, read_checkpoint

Mutants = Iterator[Callable[[Path], object]]
"""Each is called with an empty folder: it writes a mutant there, and lets the program read it."""


def videos(folder: Path, rng: random.Random) -> Mutants:
    frames = np.random.default_rng(0).integers(0, 255, (4, 34, 50, 3), np.uint8)
    seeds: dict[str, bytes] = {}
    for name, codec in {"a.mp4": "libx264", "b.avi": "mjpeg", "c.mkv": "libx264", "d.webm": "libvpx-vp9"}.items():
        seeds[name] = _encoded(folder / name, codec, frames)
    images = [Image.fromarray(frame) for frame in frames]
    for name in ("e.gif", "f.webp", "g.png", "h.tif"):
        buffer = io.BytesIO()
        images[0].save(buffer, Path(name).suffix[1:].replace("tif", "tiff"), save_all=True, append_images=images[1:])
        seeds[name] = buffer.getvalue()
    while True:
        name = rng.choice(sorted(seeds))
        yield _reading(name, mutate_bytes(seeds[name], rng), lambda path: sum(1 for _ in open_video(path)))


def frames(folder: Path, rng: random.Random) -> Mutants:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (34, 50, 3), np.uint8))
    seeds: dict[str, bytes] = {}
    exif = Image.Exif()
    exif[0x0112] = 6
    for suffix in ("jpg", "png", "bmp", "webp", "tif", "gif", "ppm"):
        buffer = io.BytesIO()
        kind = {"jpg": "jpeg", "tif": "tiff"}.get(suffix, suffix)
        image.save(buffer, kind, **({"exif": exif} if suffix in ("jpg", "png", "webp") else {}))
        seeds[f"0.{suffix}"] = buffer.getvalue()
    while True:
        name = rng.choice(sorted(seeds))
        yield _reading(name, mutate_bytes(seeds[name], rng), lambda path: sum(1 for _ in open_video(path.parent)))


def configs(folder: Path, rng: random.Random) -> Mutants:
    native = MODEL.to_dict()
    foreign, preprocessor = hf_config_from_native(
        MODEL.replace(pixel_decoder=replace(MODEL.pixel_decoder, num_points=4)).to_dict()
    )
    weights = save(VideoMask2Former(MODEL).state_dict())
    recipe = json.loads(CONFIG.to_json())
    while True:
        kind = rng.randrange(3)
        if kind == 0:
            yield _loading({"config.json": mutate_json(native, rng), "model.safetensors": weights})
        elif kind == 1:
            parts = {"config.json": foreign, "preprocessor_config.json": preprocessor}
            chosen = rng.choice(sorted(parts))
            yield _loading({name: _mutated(value, rng, name == chosen) for name, value in parts.items()}, weights=False)
        else:
            yield _reading("train.json", mutate_json(recipe, rng), TrainConfig.from_file)


def weights(folder: Path, rng: random.Random) -> Mutants:
    model = VideoMask2Former(MODEL)
    config = json.dumps(MODEL.to_dict()).encode()
    seeds = {"model.safetensors": save(model.state_dict()), "pytorch_model.bin": _saved(model.state_dict())}
    while True:
        name = rng.choice(sorted(seeds))
        content = seeds[name]
        if rng.random() < 0.5:  # where it says what follows
            head = 4096 if name.endswith("safetensors") else len(content) // 8
            content = mutate_bytes(content[:head], rng) + content[head:]
        else:
            content = mutate_bytes(content, rng)
        yield _loading({"config.json": config, name: content})


def pickles(folder: Path, rng: random.Random) -> Mutants:
    state = from_native(VideoMask2Former(MODEL).state_dict())
    few = dict(list(state.items())[:8])
    arrays = {key: value.numpy() for key, value in few.items()}
    seeds = {
        "a.pkl": pickle.dumps({"model": arrays, "__author__": "x", "matching_heuristics": True}),
        "b.pkl": pickle.dumps({"model": arrays}, protocol=0),
        "c.pth": _saved({"model": OrderedDict(state), "iteration": 3, "optimizer": {"state": {0: {"step": 1.0}}}}),
        "d.pth": _saved(few, _use_new_zipfile_serialization=False),
        "e.pkl": b"",  # made of operations drawn at random
    }
    while True:
        name = rng.choice(sorted(seeds))
        content = mutate_bytes(seeds[name], rng) if seeds[name] else random_pickle(rng)
        yield _reading(name, content, read_checkpoint)


def annotations(folder: Path, rng: random.Random) -> Mutants:
    write_youtube_vis(SyntheticVideos(2, 0, "easy", 3, 32, 48), folder / "set")
    data = json.loads((folder / "set" / "train.json").read_text())
    data["annotations"][0]["segmentations"][0] = [[1.5, 2, 20, 3, 10.25, 20]]
    data["annotations"][1]["segmentations"][1] = {"size": [32, 48], "counts": [100, 36, 1400]}

    def read(path: Path) -> None:
        frames = folder / "set" / "JPEGImages"
        report = check_dataset(path, frames)
        sound = not report.faults and report.num_annotations > 0  # without any there is nothing to measure by
        readers = (lambda: [video.clip(range(video.num_frames)) for video in _each(YouTubeVis(path, frames))],
                   lambda: load_ground_truth(path))  # fmt: skip
        refused = []
        for reader in readers:
            try:
                reader()
            except (ValueError, OSError) as error:
                refused.append(error)
        if sound and refused:
            raise AssertionError(f"data check finds no fault, and reading does: {refused[0]}")
        for error in refused[:1]:
            raise error

    while True:
        yield _reading("train.json", mutate_json(data, rng), read)


def coco(folder: Path, rng: random.Random) -> Mutants:
    (folder / "images").mkdir()
    for number in (1, 2):
        Image.new("RGB", (48, 32)).save(folder / "images" / f"{number}.jpg")
    data = {
        "images": [{"id": n, "file_name": f"{n}.jpg", "height": 32, "width": 48} for n in (1, 2)],
        "categories": [{"id": 3, "name": "cat"}, {"id": 7, "name": "dog"}],
        "annotations": [
            {"id": 5, "image_id": 1, "category_id": 3, "iscrowd": 0, "segmentation": [[1, 2, 20, 3, 10, 20]]},
            {"id": 6, "image_id": 2, "category_id": 7, "segmentation": {"size": [32, 48], "counts": [100, 36, 1400]}},
        ],
    }

    def read(path: Path) -> None:
        for video in _each(CocoVideos(path, folder / "images")):
            video.clip([0])

    while True:
        yield _reading("instances.json", mutate_json(data, rng), read)


def results(folder: Path, rng: random.Random) -> Mutants:
    truth_data, rows = random_case(0)
    truth = load_ground_truth(truth_data)

    def read(path: Path) -> None:
        average_precision(truth, pair_tracks(truth, load_results(path, truth)))

    def read_lines(path: Path) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of a run that was stopped
            VideoSegmentation.load(path).to_dict()

    tracks = _tracks()
    (folder / "tracks.json").write_text(json.dumps(tracks))
    VideoSegmentation.load(folder).save(folder, overlay=False)
    lines = (folder / "tracks.jsonl").read_bytes().splitlines()
    while True:
        if (kind := rng.random()) < 0.4:
            yield _reading("results.json", mutate_json(rows, rng), read)
        elif kind < 0.7:
            yield _reading("tracks.json", mutate_json(tracks, rng), VideoSegmentation.load)
        elif kind < 0.85:
            yield _reading("tracks.jsonl", mutate_bytes(b"\n".join(lines) + b"\n", rng), read_lines)
        else:
            yield _reading("tracks.jsonl", _mutated_line(lines, rng), read_lines)


def formats(folder: Path, rng: random.Random) -> Mutants:
    (folder / "tracks.json").write_text(json.dumps(_tracks()))
    result, labels = VideoSegmentation.load(folder), ("a", "b")
    result.to_mots(folder / "mots.txt")
    result.to_png(folder / "maps")
    mots, maps = ((folder / name).read_bytes() for name in ("mots.txt", "maps/00000.png"))
    ids = (folder / "maps" / "ids.json").read_bytes()

    def read_map(path: Path) -> VideoSegmentation:
        return VideoSegmentation.from_png(path.parent)

    def read_ids(path: Path) -> VideoSegmentation:
        (path.parent / "00000.png").write_bytes(maps)
        return VideoSegmentation.from_png(path.parent)

    def read_rows(path: Path) -> VideoSegmentation:
        return VideoSegmentation.from_youtube_vis(path, labels)

    def read_mots(path: Path) -> VideoSegmentation:
        return VideoSegmentation.from_mots(path, labels)

    while True:
        kind = rng.randrange(5)
        if kind == 0:
            yield _reading("coco.json", mutate_json(result.to_coco(), rng), VideoSegmentation.from_coco)
        elif kind == 1:
            yield _reading("rows.json", mutate_json(result.to_youtube_vis(), rng), read_rows)
        elif kind == 2:
            yield _reading("mots.txt", mutate_bytes(mots, rng), read_mots)
        elif kind == 3:
            yield _reading("00000.png", mutate_bytes(maps, rng), read_map)
        else:
            yield _reading("ids.json", mutate_json(json.loads(ids), rng), read_ids)


def journals(folder: Path, rng: random.Random) -> Mutants:
    made_from = {"model": "abc", "dataset": "def", "preprocessing": {"shortest_edge": 32}, "top_k": 10}
    journal = Journal(folder / "journal.jsonl", made_from)
    for index, row in enumerate(random_case(0)[1][:3]):
        journal.add(index, [row])
    lines = (folder / "journal.jsonl").read_bytes().splitlines()

    def read(path: Path) -> None:
        Journal(path, made_from).add(7, [])

    while True:
        content = mutate_bytes(b"\n".join(lines) + b"\n", rng) if rng.random() < 0.5 else _mutated_line(lines, rng)
        yield _reading("journal.jsonl", content, read)


def runs(folder: Path, rng: random.Random) -> Mutants:
    run = train(folder / "run", CONFIG.replace(steps=1, keep_checkpoints=1), validation=VIDEOS)
    state = torch.load(checkpoint_file(run.output, 1), weights_only=True)

    def read(path: Path) -> None:
        Trainer(run.config, VIDEOS, path.parent.parent, validation=VIDEOS, resume=True).close()

    content = _saved(state)
    while True:
        mutant = mutate_bytes(content, rng) if rng.random() < 0.5 else _saved(mutate_state(state, rng))
        yield _reading("checkpoints/step-00000001.pt", mutant, read)


TARGETS: dict[str, Callable[[Path, random.Random], Mutants]] = {
    target.__name__: target
    for target in (videos, frames, configs, weights, pickles, annotations, coco, results, formats, journals, runs)
}


def _reading(name: str, content: bytes, read: Callable[[Path], object]) -> Callable[[Path], object]:
    def run(folder: Path) -> object:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        return read(path)

    return run


def _loading(files: dict[str, bytes], weights: bool = True) -> Callable[[Path], object]:
    def run(folder: Path) -> None:
        for name, content in files.items():
            (folder / name).write_bytes(content)
        load_config(folder)
        processor = VideoProcessor.from_pretrained(folder)
        if weights:
            VideoMask2Former.from_pretrained(folder)
        processor.padded_size(32, 48)

    return run


def _mutated(value: Any, rng: random.Random, chosen: bool) -> bytes:
    return mutate_json(value, rng) if chosen else json.dumps(value).encode()


def _encoded(path: Path, codec: str, frames: np.ndarray) -> bytes:
    if codec == "libx264":
        with VideoWriter(path, 12, frames.shape[2], frames.shape[1]) as writer:
            for frame in frames:
                writer.write(frame)
        return path.read_bytes()
    import av

    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream(codec, rate=12)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode(None))
    return path.read_bytes()


def _saved(state: Any, **options: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(state, buffer, **options)
    return buffer.getvalue()


def _each(dataset: Any) -> Iterator[Any]:
    return (dataset[index] for index in range(len(dataset)))


def _mutated_line(lines: list[bytes], rng: random.Random) -> bytes:
    """A file of lines of JSON, one of which is another."""
    mutants = list(lines)
    at = rng.randrange(len(lines))
    mutants[at] = mutate_json(json.loads(lines[at]), rng)
    return b"\n".join(mutants) + b"\n"


def _tracks() -> dict[str, Any]:
    present = next(mask for mask in random_case(0)[1][0]["segmentations"] if mask is not None)
    rows = [
        {"video_id": 1, "category_id": 1, "category": "a", "score": 0.5, "segmentations": [present, None]},
        {"video_id": 1, "category_id": 2, "category": "b", "score": 0.25, "segmentations": [None, present]},
    ]
    return {
        "video": {"source": "a.mp4", "width": 30, "height": 20, "fps": 12.5, "frames": [0, 2]},
        "categories": [{"id": 1, "name": "a"}, {"id": 2, "name": "b"}],
        "results": rows,
    }

"""Exported models: they give what the model gives, at any size and length; and what is none is refused in one line."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from m2f_video import VideoMask2Former, VideoSegmentation, segment_video
from m2f_video import export as export_module
from m2f_video.cli.main import main
from m2f_video.config import (
    PixelDecoderConfig,
    SwinConfig,
    TimmBackboneConfig,
    TransformerDecoderConfig,
    VideoMask2FormerConfig,
)
from m2f_video.export import OPSET, TOLERANCE, Export, ExportError, check_sizes, export_model
from m2f_video.exported import NAMES, PARTS, ExportedModel, ExportFiles, external_locations
from m2f_video.inference.clip_model import ClipModel
from m2f_video.inference.fingerprint import model_fingerprint
from m2f_video.inference.segment import Mode
from m2f_video.modeling.transformer_decoder import MaskProduct
from m2f_video.modeling.video_mask2former import FrameFeatures, VideoMask2FormerOutput
from m2f_video.parity import random_frames, random_model
from m2f_video.video import VideoWriter
from tests.conftest import synthetic_frames
from tests.tolerances import relative_error

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

SMALL = VideoMask2FormerConfig(
    backbone=SwinConfig(embed_dim=8, depths=(2, 1, 1, 1), num_heads=(1, 2, 2, 4), window_size=3),
    pixel_decoder=PixelDecoderConfig(hidden_dim=64, mask_dim=32, num_layers=1, ffn_dim=32, num_heads=4),
    transformer_decoder=TransformerDecoderConfig(hidden_dim=32, num_queries=5, num_layers=3, num_heads=4, ffn_dim=32),
    labels=("cat", "dog"),
)
FILES = ["model.decoder.onnx", "model.encoder.onnx", "model.json", "model.onnx"]
SIZES = [(1, 64, 96), (3, 32, 32), (4, 128, 96)]
"""With maps of one pixel at stride 32."""
PAIR = Path(__file__).parent / "golden" / "exported" / "model.onnx"
"""Of the tiny model, without the clip model: exporting takes longer than all other tests. To renew it, export the tiny
model to there and remove the clip model."""


@pytest.fixture(scope="session")
def written(tiny_model: VideoMask2Former, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Export]:
    """The tiny model as ONNX. Shared by slow tests: leave it as it is."""
    output = tmp_path_factory.mktemp("exported") / "model.onnx"
    return output, export_model(tiny_model, output, sizes=SIZES[:2])


@pytest.fixture
def copied(tmp_path: Path) -> Path:
    """A copy of the pair to damage."""
    shutil.copytree(PAIR.parent, tmp_path / "copy")
    return tmp_path / "copy" / "model.onnx"


def run(*arguments: object) -> int:
    try:
        return main([str(argument) for argument in arguments])
    except SystemExit as exit_:
        return int(exit_.code or 0)


def halves(model: ClipModel, clip: Tensor, chunk: int) -> tuple[Tensor, Tensor]:
    """Class and mask logits of a clip (T, 3, H, W), encoded so many frames at a time."""
    features = FrameFeatures.concatenate([model.encode_frames(part) for part in clip.split(chunk)])
    output = model.decode_clip(features, output_masks=False)
    return output.class_queries_logits, MaskProduct()(output.mask_embeddings, features.mask_features[None])


@pytest.mark.slow
def test_it_writes_the_model_both_halves_and_a_manifest(written, tiny_model) -> None:
    output, result = written
    assert result.passed
    assert sorted(path.name for path in output.parent.iterdir()) == FILES
    assert sorted(path.name for path in result.files) == FILES
    runs = [(check.part, check.frames) for check in result.checks]
    assert runs == [("clip", 1), ("pair", 1), ("clip", 3), ("pair", 3)]
    manifest = json.loads((output.parent / "model.json").read_text())
    assert manifest["opset"] == OPSET
    assert len(manifest["checks"]) == len(runs)
    for part in PARTS:
        model = onnx.load(ExportFiles(output).part(part))
        onnx.checker.check_model(model)
        assert {entry.version for entry in model.opset_import if not entry.domain} == {OPSET}
        assert {node.domain for node in model.graph.node} <= {"", "ai.onnx"}
        assert tuple(item.name for item in model.graph.input) == NAMES[part][0]
        assert tuple(item.name for item in model.graph.output) == NAMES[part][1]
    session = onnxruntime.InferenceSession(output)
    about = json.loads(session.get_modelmeta().custom_metadata_map["m2f_video"])
    assert VideoMask2FormerConfig.from_dict(about["config"]) == tiny_model.config


@pytest.mark.slow
@pytest.mark.parametrize("size", SIZES)
def test_the_clip_model_gives_what_the_model_gives(written, tiny_model, size: tuple[int, int, int]) -> None:
    clip = random_frames(*size, seed=1).float()[None]
    session = onnxruntime.InferenceSession(written[0])
    classes, masks = (torch.from_numpy(each) for each in session.run(None, {"pixel_values": clip.numpy()}))
    check_equal(classes, masks, tiny_model(clip))


@pytest.mark.parametrize("size", SIZES)
def test_a_pair_gives_what_the_model_gives(tiny_model, size: tuple[int, int, int]) -> None:
    clip = random_frames(*size, seed=1).float()
    check_equal(*halves(ExportedModel.load(PAIR), clip, chunk=2), tiny_model(clip[None]))


def check_equal(classes: Tensor, masks: Tensor, expected: VideoMask2FormerOutput) -> None:
    assert masks.shape == expected.masks_queries_logits.shape
    assert relative_error(classes, expected.class_queries_logits) < TOLERANCE
    assert relative_error(masks, expected.masks_queries_logits) < TOLERANCE


@pytest.mark.parametrize("mode", ["whole", "window"])
def test_segment_video_runs_a_pair(tiny_model, mode: Mode) -> None:
    model = ExportedModel.load(PAIR.with_name("model.encoder.onnx"))
    assert isinstance(model, ClipModel)
    video = synthetic_frames(7, 60, 90)
    ours, expected = (segment_video(each, video, mode=mode, window=3, plain=True) for each in (model, tiny_model))
    assert expected.tracks
    assert [(track.label, track.query_id) for track in ours.tracks] == [
        (track.label, track.query_id) for track in expected.tracks
    ]
    assert [track.score for track in ours.tracks] == pytest.approx([track.score for track in expected.tracks], rel=1e-3)
    assert differing_pixels(ours, expected) <= 1e-4


def differing_pixels(ours: VideoSegmentation, expected: VideoSegmentation) -> float:
    """The share of pixels of all masks that differ."""
    masks = [
        np.stack([track.mask(frame) for track in each.tracks for frame in range(len(each.frames))])
        for each in (ours, expected)
    ]
    return float((masks[0] != masks[1]).mean())


def test_a_model_that_is_prepared_or_in_bfloat16_exports_as_it_is_written(tmp_path: Path, monkeypatch) -> None:
    model = random_model(SMALL, 0)
    model.prepare_for_inference(dtype="bfloat16")
    written: list[VideoMask2Former] = []
    monkeypatch.setattr(export_module, "_write", lambda model, *_: written.append(model) or _stop())
    with pytest.raises(ExportError, match="stopped"):
        export_model(model, tmp_path / "model.onnx")
    assert written[0].dtype == torch.float32
    assert model.dtype == torch.bfloat16
    assert type(written[0].backbone.stages[0].blocks[0]).__module__ == "m2f_video.modeling.swin"


def _stop() -> None:
    raise RuntimeError("stopped")


def test_frames_of_another_kind_are_refused() -> None:
    model = ExportedModel.load(PAIR)
    for wrong in (torch.zeros(2, 3, 64, 64, dtype=torch.uint8), torch.zeros(3, 64, 64), torch.zeros(0, 3, 64, 64)):
        with pytest.raises(ValueError, match="floating point"):
            model.encode_frames(wrong)
    with pytest.raises(ValueError, match="multiples of 32"):
        model.encode_frames(torch.zeros(1, 3, 64, 70))
    features = model.encode_frames(torch.zeros(1, 3, 64, 64))
    with pytest.raises(ValueError, match="cannot be run on"):
        model.decode_clip(FrameFeatures(features.mask_features[:, :3], features.multi_scale))


def test_memory_that_does_not_suffice_is_told_as_such(monkeypatch) -> None:
    from onnxruntime.capi.onnxruntime_pybind11_state import RuntimeException

    def fail(*_: object) -> None:
        raise RuntimeException("Failed to allocate memory for requested buffer of size 80000000000")

    model = ExportedModel.load(PAIR)
    monkeypatch.setattr(onnxruntime.InferenceSession, "run", fail)
    with pytest.raises(MemoryError):
        model.encode_frames(torch.zeros(1, 3, 64, 64))


def write_video(path: Path) -> Path:
    with VideoWriter(path, 8, 90, 60) as writer:
        for frame in synthetic_frames(5, 60, 90):
            writer.write(frame)
    return path


def test_the_command_segments_by_a_pair(tmp_path: Path, capsys) -> None:
    videos = tmp_path / "videos"
    videos.mkdir()
    video = write_video(videos / "a.mp4")
    options = ("--checkpoint", PAIR, "--mode", "window", "--window", "2", "--no-overlay")
    assert run("segment", video, "--output", tmp_path / "one", *options) == 0
    assert run("segment", video, "--output", tmp_path / "one", "--resume", *options) == 0
    assert "complete already" in capsys.readouterr().out
    assert run("segment", videos, "--output", tmp_path / "many", *options) == 0
    one, many = (VideoSegmentation.load(tmp_path / name) for name in ("one", "many/a"))
    assert one.tracks
    assert one.tracks == many.tracks


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--dtype", "bfloat16"), "float32 on a CPU"),
        (("--temporal", "joint"), "leave out"),
        (("--mode", "streamed"), "whole' or 'window"),
    ],
)
def test_the_command_refuses_what_a_pair_cannot_do(tmp_path: Path, capsys, options, said: str) -> None:
    video = write_video(tmp_path / "a.mp4")
    assert run("segment", video, "--checkpoint", PAIR, "--output", tmp_path / "out", *options) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:5000])


def sign(output: Path) -> None:
    """Let the manifest have the digests of what is there, as a stranger's would."""
    files = ExportFiles(output)
    manifest = json.loads(files.manifest.read_text())
    for part in ("encoder", "decoder"):
        manifest["files"][part] = {files.part(part).name: export_module.digest_of(files.part(part))}
    files.manifest.write_text(json.dumps(manifest))


def rewrite(path: Path, change: Callable[[object], object]) -> None:
    model = onnx.load(path)
    change(model)
    onnx.save(model, path)


def cut_off(output: Path) -> None:
    truncate(output.with_name("model.encoder.onnx"))


def cut_off_and_signed(output: Path) -> None:
    cut_off(output)
    sign(output)


def without_manifest(output: Path) -> None:
    output.with_name("model.json").unlink()


def manifest_cut_off(output: Path) -> None:
    truncate(output.with_name("model.json"))
    output.with_name("model.json").write_text(output.with_name("model.json").read_text()[:100])


def manifest_of_something_else(output: Path) -> None:
    output.with_name("model.json").write_text('{"a": [1]}')


def manifest_of_the_future(output: Path) -> None:
    content = json.loads(output.with_name("model.json").read_text())
    output.with_name("model.json").write_text(json.dumps(content | {"format_version": 99}))


def without_metadata(output: Path) -> None:
    rewrite(output.with_name("model.encoder.onnx"), lambda model: model.ClearField("metadata_props"))
    sign(output)


def halves_exchanged(output: Path) -> None:
    shutil.copy(output.with_name("model.decoder.onnx"), output.with_name("model.encoder.onnx"))
    sign(output)


def decoder_missing(output: Path) -> None:
    output.with_name("model.decoder.onnx").unlink()


def other_labels(output: Path) -> None:
    def change(model) -> None:
        about = json.loads(model.metadata_props[0].value)
        about["config"]["labels"] = ["one"]
        model.metadata_props[0].value = json.dumps(about)

    for part in ("encoder", "decoder"):
        rewrite(ExportFiles(output).part(part), change)
    sign(output)


def foreign_operator(output: Path) -> None:
    def change(model) -> None:
        model.graph.node[0].domain = "com.example"
        model.opset_import.append(onnx.helper.make_opsetid("com.example", 1))

    rewrite(output.with_name("model.encoder.onnx"), change)
    sign(output)


def name_outside_the_folder(output: Path) -> None:
    files = ExportFiles(output)
    manifest = json.loads(files.manifest.read_text())
    manifest["files"]["encoder"]["../secret"] = "0"
    files.manifest.write_text(json.dumps(manifest))


def weights_outside_the_folder(output: Path) -> None:
    secret = output.parent.parent / "secret.bin"
    secret.write_bytes(bytes(1 << 20))

    def change(model) -> None:
        tensor = max(model.graph.initializer, key=lambda each: len(each.raw_data))
        length = len(tensor.raw_data)
        onnx.external_data_helper.set_external_data(tensor, location="../secret.bin", offset=0, length=length)
        tensor.ClearField("raw_data")

    path = output.with_name("model.encoder.onnx")
    model = onnx.load(path)
    change(model)
    path.write_bytes(model.SerializeToString())
    sign(output)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (cut_off, "damaged, or of another export"),
        (cut_off_and_signed, "no ONNX file, or cut off"),
        (without_manifest, "not from m2f-video export"),
        (manifest_cut_off, "not a JSON file"),
        (manifest_of_something_else, "not the manifest"),
        (manifest_of_the_future, "not written by this version"),
        (without_metadata, "no config in it"),
        (halves_exchanged, "not the encoder"),
        (decoder_missing, "missing"),
        (other_labels, "not the decoder that its metadata say"),
        (foreign_operator, "cannot be run by ONNX Runtime"),
        (name_outside_the_folder, "outside its folder"),
        (weights_outside_the_folder, "outside its folder"),
    ],
)
def test_what_is_damaged_or_foreign_is_one_clear_error(copied: Path, capsys, damage, said: str) -> None:
    damage(copied)
    video = write_video(copied.parent / "a.mp4")
    assert run("segment", video, "--checkpoint", copied, "--output", copied.parent / "out") == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
    assert not (copied.parent / "out").exists()


@pytest.mark.parametrize("name", ["missing.onnx", "model.pt2"])
def test_a_file_that_is_no_export_is_told_by_name(tmp_path: Path, name: str) -> None:
    with pytest.raises((FileNotFoundError, ExportError), match=name):
        ExportedModel.load(tmp_path / name)


def test_a_pair_is_told_from_others_by_its_fingerprint(copied: Path) -> None:
    one, same = ExportedModel.load(PAIR), ExportedModel.load(copied)
    assert model_fingerprint(one) == model_fingerprint(same)
    rewrite(copied.with_name("model.encoder.onnx"), lambda model: setattr(model, "doc_string", "another"))
    sign(copied)
    assert model_fingerprint(ExportedModel.load(copied)) != model_fingerprint(one)


@pytest.mark.slow
def test_large_weights_go_beside_the_file(tiny_model, tmp_path: Path, monkeypatch, copied: Path) -> None:
    monkeypatch.setattr(export_module, "MOST_INLINE", 0)
    path = copied.with_name("model.decoder.onnx")
    export_module._write(tiny_model, "decoder", path, "onnx")
    assert set(external_locations(onnx.load(path, load_external_data=False))) == {"model.decoder.onnx.data"}
    sign(copied)
    with pytest.raises(ExportError, match=r"model\.decoder\.onnx\.data"):
        ExportedModel.load(copied)  # the manifest does not know it
    files = ExportFiles(copied)
    manifest = json.loads(files.manifest.read_text())
    manifest["files"]["decoder"] = export_module._digests(path)
    files.manifest.write_text(json.dumps(manifest))
    clip = random_frames(2, 64, 64, seed=0).float()
    classes, _ = halves(ExportedModel.load(copied), clip, chunk=1)
    assert relative_error(classes, tiny_model(clip[None]).class_queries_logits) < TOLERANCE


@pytest.mark.parametrize("kind", ["bifpn", "fapn"])
def test_what_cannot_be_exported_is_refused_by_name(kind, tmp_path: Path) -> None:
    config = SMALL.replace(pixel_decoder=PixelDecoderConfig(kind=kind, hidden_dim=32, mask_dim=32))
    with pytest.raises(ExportError, match=kind):
        export_model(random_model(config, 0), tmp_path / "model.onnx")
    assert list(tmp_path.iterdir()) == []


def test_a_mask_product_of_ones_own_is_refused(tmp_path: Path) -> None:
    class Twice(MaskProduct):
        def forward(self, mask_embeddings: Tensor, mask_features: Tensor) -> Tensor:
            return 2 * super().forward(mask_embeddings, mask_features)

    model = VideoMask2Former(SMALL, parts={"transformer_decoder.mask_product": lambda _: Twice()})
    with pytest.raises(ExportError, match="Twice"):
        export_model(model, tmp_path / "model.onnx")


def test_a_part_that_looks_at_numbers_is_refused_by_name(tmp_path: Path) -> None:
    class Looking(torch.nn.Module):
        def __init__(self, embedding: torch.nn.Module) -> None:
            super().__init__()
            self.embedding = embedding

        def forward(self, frames: Tensor) -> Tensor:
            return self.embedding(frames if frames.sum() > 0 else -frames)

    model = VideoMask2Former(SMALL, parts={"backbone.patch_embed": Looking})
    with pytest.raises(ExportError, match=r"backbone\.patch_embed of its own cannot be exported to onnx"):
        export_model(model, tmp_path / "model.onnx")
    assert list(tmp_path.iterdir()) == []


def test_a_failed_check_writes_nothing_and_exits_with_1(folder: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    def slightly_off(_readers: object, _model: object, size: tuple[int, int, int]) -> list[export_module.Check]:
        return [export_module.Check("clip", *size, class_error=1e-6, mask_error=float("nan"))]

    monkeypatch.setattr(export_module, "_write", lambda _model, _part, path, _format: path.touch())
    monkeypatch.setattr(export_module, "_readers", lambda *_: {})
    monkeypatch.setattr(export_module, "_checks", slightly_off)
    output = tmp_path / "out" / "model.onnx"
    assert run("export", "--checkpoint", folder, "--output", output) == 1
    assert "OVER the tolerance" in capsys.readouterr().out
    assert not output.parent.exists()


@pytest.mark.parametrize("name", ["model.pt2", "model", "model.encoder.onnx"])
def test_the_name_has_to_fit(folder: Path, tmp_path: Path, name: str, capsys) -> None:
    assert run("export", "--checkpoint", folder, "--output", tmp_path / name) == 2
    assert "model.onnx" in capsys.readouterr().err


def test_check_sizes_are_what_the_processor_gives(tiny_model) -> None:
    default = random_model(SMALL, 0)
    assert check_sizes(default) == ((1, 480, 864), (3, 416, 224))
    assert check_sizes(tiny_model)[0][1] == 64


@pytest.mark.slow
def test_torch_export_gives_what_the_model_gives(folder: Path, tiny_model, tmp_path: Path) -> None:
    output = tmp_path / "model.pt2"
    assert run("export", "--checkpoint", folder, "--output", output, "--format", "torch") == 0
    assert sorted(path.name for path in tmp_path.glob("model*")) == [name.replace("onnx", "pt2") for name in FILES]
    extra = {"m2f_video": ""}
    clip = random_frames(4, 96, 160, seed=1).float()[None]
    classes, masks = torch.export.load(output, extra_files=extra).module()(clip)
    expected = tiny_model(clip)
    assert relative_error(classes, expected.class_queries_logits) < TOLERANCE
    assert relative_error(masks, expected.masks_queries_logits) < TOLERANCE
    assert VideoMask2FormerConfig.from_dict(json.loads(extra["m2f_video"])["config"]) == tiny_model.config


VARIANTS = {
    "per_frame": {"temporal": "per_frame"},
    "fpn": {"pixel_decoder": PixelDecoderConfig(kind="fpn", hidden_dim=64, mask_dim=32)},
    "semantic_fpn": {"pixel_decoder": PixelDecoderConfig(kind="semantic_fpn", hidden_dim=64, mask_dim=32)},
    "none": {"pixel_decoder": PixelDecoderConfig(kind="none", hidden_dim=64, mask_dim=32)},
    "two levels": {"pixel_decoder": PixelDecoderConfig(num_levels=2, num_layers=1, hidden_dim=64, mask_dim=32)},
    "full, self first": {
        "transformer_decoder": TransformerDecoderConfig(
            hidden_dim=32, num_queries=5, num_layers=3, num_heads=4, cross_attention="full", layer_order="self_first"
        )
    },
    "mask pooling, learnable": {
        "transformer_decoder": TransformerDecoderConfig(
            hidden_dim=32, num_queries=5, num_layers=3, cross_attention="mask_pooling", query_features="learnable"
        )
    },
    "smca, zero": {
        "transformer_decoder": TransformerDecoderConfig(
            hidden_dim=32, num_queries=5, num_layers=3, cross_attention="smca", query_features="zero"
        )
    },
    "concatenated, no positions, projected": {
        "transformer_decoder": TransformerDecoderConfig(
            hidden_dim=32, num_queries=5, num_layers=2, features="concatenated", temporal_position="none"
        )
    },
    "single, in space": {
        "transformer_decoder": TransformerDecoderConfig(
            hidden_dim=32, num_queries=5, num_layers=2, features="single", scale=16, temporal_position="sine_2d"
        )
    },
    "resnet": {"backbone": TimmBackboneConfig(name="resnet18")},
    "convnext": {"backbone": TimmBackboneConfig(name="convnext_atto")},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", VARIANTS)
def test_variants_and_timm_backbones_export(name: str, tmp_path: Path) -> None:
    model = random_model(SMALL.replace(**VARIANTS[name]), 0)
    # A group norm of one pixel is of two values here, which makes rounding a hundred times as large.
    sizes = [size for size in SIZES if min(size[1:]) > 32]
    assert export_model(model, tmp_path / "model.onnx", sizes=sizes).passed


@pytest.mark.slow
def test_swin_tiny_at_its_size(tmp_path: Path) -> None:
    model = random_model(VideoMask2FormerConfig.preset("swin_tiny_youtubevis_2019"), 0)
    result = export_model(model, tmp_path / "model.onnx", sizes=[(1, 480, 864), (3, 224, 416), (8, 128, 96)])
    assert result.passed, result.checks


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["whole", "window"])
def test_tracks_of_the_demo_video_are_identical(mode: Mode, tmp_path: Path) -> None:
    assert run("demo", "--output", tmp_path / "demo") == 0
    assert run("export", "--checkpoint", "demo", "--output", tmp_path / "model.onnx") == 0
    how = ("--mode", mode, "--no-overlay", "--output")
    results = []
    for checkpoint in ("demo", tmp_path / "model.onnx"):
        output = tmp_path / str(len(results))
        assert run("segment", tmp_path / "demo" / "video.mp4", "--checkpoint", checkpoint, *how, output) == 0
        results.append(json.loads((output / "tracks.json").read_text())["results"])
    ours, expected = results
    assert [row["segmentations"] for row in ours] == [row["segmentations"] for row in expected]
    assert [row["category"] for row in ours] == [row["category"] for row in expected]

"""From a hub name to a model and back: huggingface_hub's own code, talking to a stub."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants as hub_constants
from safetensors.torch import load_file

from m2f_video.categories import YOUTUBEVIS_2019, YOUTUBEVIS_2021
from m2f_video.config import ConfigError
from m2f_video.hub import load_config
from m2f_video.inference.processor import VideoProcessor
from m2f_video.modeling.video_mask2former import VideoMask2Former
from tests.hub_stub import HubStub, commit_of, http
from tests.tolerances import identical
from weights_convert import CheckpointError

NAME = "owner/tiny-model"


@pytest.fixture
def stub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[HubStub]:
    monkeypatch.setattr(hub_constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub_constants, "HF_TOKEN_PATH", str(tmp_path / "no token"))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    with HubStub().installed() as stub:
        yield stub


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def test_hub_model(stub: HubStub, tiny_model: VideoMask2Former, folder: Path, cache: Path) -> None:
    stub.models[NAME, "main"] = folder
    assert identical(VideoMask2Former.from_pretrained(NAME, cache_dir=cache), tiny_model)
    assert sorted(stub.downloads()) == ["config.json", "model.safetensors"]
    assert VideoProcessor.from_pretrained(NAME, cache_dir=cache).labels == tiny_model.config.labels
    assert len(stub.downloads()) == 2  # nothing is fetched a second time


def test_hub_config_alone_fetches_no_weights(stub: HubStub, hf_folder: Path, cache: Path) -> None:
    stub.models[NAME, "main"] = hf_folder
    load_config(NAME, cache_dir=cache)
    assert sorted(stub.downloads()) == ["config.json", "preprocessor_config.json"]


def test_hub_model_of_pickles_only(stub: HubStub, tiny_model: VideoMask2Former, hf_folder: Path, cache: Path) -> None:
    torch.save(load_file(hf_folder / "model.safetensors"), hf_folder / "pytorch_model.bin")
    (hf_folder / "model.safetensors").unlink()
    (hf_folder / "README.md").write_text("a card")
    stub.models[NAME, "main"] = hf_folder
    assert identical(VideoMask2Former.from_pretrained(NAME, cache_dir=cache), tiny_model)
    assert sorted(set(stub.downloads())) == ["config.json", "preprocessor_config.json", "pytorch_model.bin"]


def test_safetensors_are_preferred(stub: HubStub, hf_folder: Path, cache: Path) -> None:
    (hf_folder / "pytorch_model.bin").write_bytes(b"not to be touched")
    stub.models[NAME, "main"] = hf_folder
    VideoMask2Former.from_pretrained(NAME, cache_dir=cache)
    assert "pytorch_model.bin" not in stub.downloads()


def test_hub_revision(stub: HubStub, tiny_model: VideoMask2Former, folder: Path, tmp_path: Path, cache: Path) -> None:
    other = VideoMask2Former(tiny_model.config)
    other.save_pretrained(tmp_path / "other")
    stub.models |= {(NAME, "main"): tmp_path / "other", (NAME, "v1"): folder}
    assert identical(VideoMask2Former.from_pretrained(NAME, cache_dir=cache, revision="v1"), tiny_model)
    assert identical(
        VideoMask2Former.from_pretrained(NAME, cache_dir=cache, revision=commit_of(NAME, "v1")), tiny_model
    )
    assert identical(VideoMask2Former.from_pretrained(NAME, cache_dir=cache), other)
    with pytest.raises(FileNotFoundError, match=r"v9"):
        VideoMask2Former.from_pretrained(NAME, cache_dir=cache, revision="v9")


def test_hub_token(stub: HubStub, tiny_model: VideoMask2Former, folder: Path, cache: Path) -> None:
    stub.models[NAME, "main"] = folder
    stub.gated.add(NAME)
    with pytest.raises(FileNotFoundError, match=rf"{NAME}.*(?i:gated|restricted)"):
        VideoMask2Former.from_pretrained(NAME, cache_dir=cache)
    with pytest.raises(FileNotFoundError, match=NAME):
        VideoMask2Former.from_pretrained(NAME, cache_dir=cache, token=stub.token[:-1])
    assert identical(VideoMask2Former.from_pretrained(NAME, cache_dir=cache, token=stub.token), tiny_model)
    assert {token for _, _, token in stub.requests[-3:]} == {stub.token}


def test_a_repository_that_is_not_there_is_named(stub: HubStub, cache: Path) -> None:
    with pytest.raises(FileNotFoundError, match=rf"{NAME} is not a local path.*Repository Not Found.*private or gated"):
        VideoMask2Former.from_pretrained(NAME, cache_dir=cache)
    assert not list(cache.rglob("*.safetensors"))


def test_a_repository_without_weights_is_named(stub: HubStub, folder: Path, cache: Path) -> None:
    (folder / "model.safetensors").unlink()
    stub.models[NAME, "main"] = folder
    with pytest.raises(CheckpointError, match="holds no weights"):
        VideoMask2Former.from_pretrained(NAME, cache_dir=cache)


def test_a_repository_without_config_needs_one(
    stub: HubStub, tiny_model: VideoMask2Former, folder: Path, cache: Path
) -> None:
    (folder / "config.json").unlink()
    stub.models[NAME, "main"] = folder
    with pytest.raises(ConfigError, match=r"config\.json does not exist.* preset such as 'swin_tiny"):
        VideoMask2Former.from_pretrained(NAME, cache_dir=cache)
    assert identical(VideoMask2Former.from_pretrained(NAME, cache_dir=cache, config=tiny_model.config), tiny_model)


@pytest.mark.parametrize("pickled", [False, True])
def test_what_was_downloaded_works_without_network(
    stub: HubStub, tiny_model: VideoMask2Former, hf_folder: Path, cache: Path, pickled: bool
) -> None:
    if pickled:
        torch.save(load_file(hf_folder / "model.safetensors"), hf_folder / "pytorch_model.bin")
        (hf_folder / "model.safetensors").unlink()
    stub.models[NAME, "main"] = hf_folder
    VideoMask2Former.from_pretrained(NAME, cache_dir=cache)
    stub.requests.clear()
    assert identical(VideoMask2Former.from_pretrained(NAME, cache_dir=cache, local_files_only=True), tiny_model)
    assert stub.requests == []
    stub.online = False
    assert identical(VideoMask2Former.from_pretrained(NAME, cache_dir=cache), tiny_model)


def test_what_was_not_downloaded_is_named_without_network(stub: HubStub, folder: Path, cache: Path) -> None:
    stub.models[NAME, "main"] = folder
    with pytest.raises(FileNotFoundError, match=rf"{NAME} is neither a local path nor in the hub cache"):
        VideoMask2Former.from_pretrained(NAME, cache_dir=cache, local_files_only=True)
    assert stub.requests == []
    stub.online = False
    with pytest.raises(FileNotFoundError, match=rf"{NAME} .*the hub was not reached"):
        VideoMask2Former.from_pretrained(NAME, cache_dir=cache)


def test_weights_that_were_not_downloaded_with_the_config(stub: HubStub, folder: Path, cache: Path) -> None:
    stub.models[NAME, "main"] = folder
    VideoProcessor.from_pretrained(NAME, cache_dir=cache)
    with pytest.raises(FileNotFoundError, match=rf"{NAME} is neither a local path nor in the hub cache"):
        VideoMask2Former.from_pretrained(NAME, cache_dir=cache, local_files_only=True)
    assert identical(VideoMask2Former.from_pretrained(NAME, cache_dir=cache), VideoMask2Former.from_pretrained(folder))


def test_a_connection_that_breaks_off_is_reported(
    stub: HubStub, folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stub.models[NAME, "main"] = folder
    serve = stub._file

    def break_off(request: Any, *path: str) -> Any:
        if request.method == "GET":
            raise http.ReadError("connection reset", request=request)
        return serve(request, *path)

    monkeypatch.setattr(stub, "_file", break_off)
    monkeypatch.setattr("time.sleep", lambda _seconds: None)  # huggingface_hub tries again and again
    with pytest.raises(FileNotFoundError, match=NAME):
        VideoMask2Former.from_pretrained(NAME, cache_dir=cache)


def test_force_download(stub: HubStub, tiny_model: VideoMask2Former, folder: Path, cache: Path) -> None:
    stub.models[NAME, "main"] = folder
    VideoMask2Former.from_pretrained(NAME, cache_dir=cache)
    stub.requests.clear()
    assert identical(VideoMask2Former.from_pretrained(NAME, cache_dir=cache, force_download=True), tiny_model)
    assert "model.safetensors" in stub.downloads()


def test_a_local_folder_goes_before_a_hub_name(
    stub: HubStub, tiny_model: VideoMask2Former, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    tiny_model.save_pretrained(NAME)
    assert identical(VideoMask2Former.from_pretrained(NAME), tiny_model)
    assert stub.requests == []


def test_pushing_to_the_hub(stub: HubStub, tiny_model: VideoMask2Former, tmp_path: Path) -> None:
    url = tiny_model.push_to_hub(NAME, token=stub.token)
    assert NAME in url
    assert sorted(stub.pushed[NAME]) == ["README.md", "config.json", "model.safetensors"]
    for name, content in stub.pushed[NAME].items():
        (tmp_path / name).write_bytes(content)
    assert identical(VideoMask2Former.from_pretrained(tmp_path), tiny_model)


def test_saving_and_pushing_at_once(stub: HubStub, tiny_model: VideoMask2Former, tmp_path: Path) -> None:
    tiny_model.save_pretrained(tmp_path / "here", push_to_hub=True, repo_id=NAME, token=stub.token)
    assert identical(VideoMask2Former.from_pretrained(tmp_path / "here"), tiny_model)
    assert sorted(stub.pushed[NAME]) == ["README.md", "config.json", "model.safetensors"]


# --- the published models


@pytest.mark.network
def test_the_published_2021_model_gives_its_reference_slices() -> None:
    """Numbers of the reference implementation for the first five frames of a video; see the model's documentation."""
    from huggingface_hub import hf_hub_download

    from m2f_video.config import PreprocessingConfig
    from m2f_video.video.reader import read_video

    model = VideoMask2Former.from_pretrained("facebook/video-mask2former-swin-tiny-youtubevis-2021-instance")
    assert model.config.labels == YOUTUBEVIS_2021
    assert model.config.temporal == "joint"
    video = read_video(hf_hub_download("shivi/video-demo", "cars.mp4", repo_type="dataset"))[:5]
    processor = VideoProcessor(PreprocessingConfig(fixed_size=(480, 640)), model.config.labels)
    with torch.inference_mode():
        output = model(**processor(video), output_hidden=True)
    assert output.masks_queries_logits.shape == (1, 100, 5, 120, 160)
    ours = {
        "backbone": output.features.backbone_maps[-1][0, 0],
        "mask features": output.features.mask_features[0, 0],
        "queries": output.queries[-1][0],
        "masks": output.masks_queries_logits[0, 0, 0],
        "classes": output.class_queries_logits[0],
    }
    expected = {
        "backbone": [[-0.4360, 0.7583, 0.9673], [-0.1426, -0.0267, 0.5829], [-0.2385, 0.0773, -0.1495]],
        "mask features": [[-0.3904, -0.2753, -0.2319], [-0.3824, -0.1098, -0.2226], [-0.3643, -0.0688, -0.1076]],
        "queries": [[-1.7580, -0.5369, -0.9012], [-1.1428, -0.7896, -0.2773], [-1.3240, -0.3889, -0.1932]],
        "masks": [[-63.1859, -76.4797, -69.0339], [-62.5494, -68.8616, -81.0631], [-61.4500, -68.9583, -73.0472]],
        "classes": [[-3.0352, -3.6200, -5.5203], [-1.9340, -2.5809, -4.5011], [-2.3295, -2.9547, -4.4537]],
    }
    for name, values in expected.items():
        torch.testing.assert_close(ours[name][:3, :3], torch.tensor(values), rtol=0, atol=1e-4, msg=name)


@pytest.mark.network
def test_the_published_2019_model_has_its_labels() -> None:
    config = load_config("facebook/video-mask2former-swin-tiny-youtubevis-2019-instance")
    assert config.labels == YOUTUBEVIS_2019
    assert config.temporal == "joint"

"""Drawings of what a model looked at: the numbers are where they belong on the frame, and the page holds them all."""

import base64
import io
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from m2f_video.results.inspection import (
    Inspection,
    LayerLook,
    QueryLook,
    SamplingLook,
    count_pictures,
    draw_attended,
    draw_inspection,
    draw_mask,
    draw_samples,
    draw_weights,
)
from m2f_video.results.inspection_page import write_page, write_pictures

FRAME = np.full((40, 60, 3), 200, np.uint8)
WHOLE = (1.0, 1.0)


def inspection() -> Inspection:
    logits = np.full((4, 6), -5.0)
    logits[:2, :3] = 5
    look = LayerLook(1, logits, logits > 0, np.ones((4, 6)) / 24, 0.25)
    sampling = SamplingLook(0, np.array([[0.25, 0.5], [0.9, 0.9]]), np.array([0.8, 0.2]), np.array([0, 2]))
    query = QueryLook(3, "cat & <dog>", 0.5, logits, (LayerLook(0, None, None, None, None), look))
    return Inspection(FRAME, 7, (6, 7, 8), WHOLE, (30, 20), (32, 16, 8), (sampling,), (query,))


def bright(image: np.ndarray) -> np.ndarray:
    return image[..., 1] > 120


def test_a_mask_is_drawn_where_it_is() -> None:
    logits = inspection().queries[0].mask_logits
    seen = bright(draw_mask(FRAME, logits, WHOLE))
    assert seen[:15, :25].all()
    assert not seen[25:].any()
    assert not seen[:, 35:].any()


def test_padding_of_the_models_input_is_not_drawn() -> None:
    allowed = np.zeros((4, 6), bool)
    allowed[:2, :3] = True
    assert bright(draw_attended(FRAME, allowed, (0.5, 0.5))).all()  # the frame is the upper left quarter
    assert bright(draw_attended(FRAME, allowed, WHOLE)).mean() == pytest.approx(0.25, abs=0.01)


def test_weights_are_light_where_they_are_large() -> None:
    weights = np.zeros((4, 6), np.float32)
    weights[3, 5] = 0.4
    heat = draw_weights(FRAME, weights, WHOLE).astype(int).sum(-1)
    assert np.unravel_index(heat.argmax(), heat.shape) >= (30, 50)
    assert heat[:20, :30].max() < heat.max() / 2


def test_no_weight_at_all_is_drawn_dark() -> None:
    assert draw_weights(FRAME, np.zeros((4, 6), np.float32), WHOLE).max() < 120


def test_samples_are_drawn_at_their_places_and_by_level() -> None:
    look = inspection().sampling[0]
    image = draw_samples(FRAME, look, WHOLE, (5, 35)).astype(int)
    assert image[20, 15, 0] > image[20, 15, 2]  # the coarsest: red
    assert image[36, 54, 2] > image[36, 54, 0]  # the finest: blue
    half = draw_samples(FRAME, look, (1.0, 0.5), (5, 35)).astype(int)
    assert half[20, 30, 0] > half[20, 30, 2]


def test_all_that_is_known_is_drawn() -> None:
    pictures = list(draw_inspection(inspection()))
    assert [picture.name for picture in pictures] == [
        "sampling_layer_0", "query_3_mask", "query_3_layer_1_mask_logits", "query_3_layer_1_attention_mask",
        "query_3_layer_1_attention_weights",
    ]  # fmt: skip
    assert count_pictures(inspection()) == len(pictures)
    assert all(picture.image.dtype == np.uint8 and picture.image.shape == FRAME.shape for picture in pictures)
    assert "25 %" in pictures[-1].title


def test_a_large_frame_is_drawn_smaller() -> None:
    large = replace(inspection(), frame=np.zeros((900, 1600, 3), np.uint8))
    assert {picture.image.shape for picture in draw_inspection(large)} == {(360, 640, 3)}


def test_a_page_holds_its_pictures_and_needs_nothing_else(tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []
    write_page(tmp_path / "page.html", inspection(), "a <video> \udcff", lambda *counts: told.append(counts))
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    images = re.findall(r'src="data:image/jpeg;base64,([^"]+)"', page)
    assert [Image.open(io.BytesIO(base64.b64decode(image))).size for image in images] == [(60, 40)] * 5
    assert told == [(done, 5) for done in range(1, 6)]
    assert "http" not in page
    assert "Query 3: cat &amp; &lt;dog&gt;, 0.500" in page
    assert "a &lt;video&gt;" in page
    assert "x = 30, y = 20" in page


def test_pictures_are_files(tmp_path: Path) -> None:
    write_pictures(tmp_path / "new" / "folder", inspection())
    names = {f"{picture.name}.png" for picture in draw_inspection(inspection())}
    assert {file.name for file in (tmp_path / "new" / "folder").iterdir()} == names
    with pytest.raises(FileExistsError, match="it exists already"):
        write_pictures(tmp_path / "new" / "folder", inspection())


@pytest.mark.parametrize("write", [
    lambda path, stop: write_page(path, inspection(), "title", stop),
    lambda path, stop: write_pictures(path, inspection(), stop),
])  # fmt: skip
def test_nothing_half_written_remains(write: object, tmp_path: Path) -> None:
    def stop(done: int, total: int) -> None:
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "page.html", stop)  # type: ignore[operator]
    assert list(tmp_path.iterdir()) == []

import math
import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from m2f_video.modeling.position_encoding import position_dtype, sine_1d, sine_2d, sine_3d
from tests.golden_files import GOLDEN
from tests.tolerances import assert_close

POSITIONS = load_file(GOLDEN / "ops" / "position.safetensors")


@pytest.mark.parametrize("name", sorted(POSITIONS))
def test_positions_equal_the_original(name: str) -> None:
    expected = POSITIONS[name]
    size = {letter: int(number) for letter, number in re.findall(r"([thwn])(\d+)", name.split(".")[1])}
    if name.startswith("sine2d"):
        ours = sine_2d(size["h"], size["w"], 2 * size["n"], dtype=torch.float32)
        assert_close(ours.permute(2, 0, 1)[None], expected)
    else:
        ours = sine_3d(size["t"], size["h"], size["w"], 2 * size["n"], dtype=torch.float32)
        assert_close(ours.permute(0, 3, 1, 2)[None], expected)


@given(st.integers(1, 9), st.integers(1, 8).map(lambda half: 2 * half))
def test_one_axis_is_the_formula(length: int, dim: int) -> None:
    encoding = sine_1d(length, dim, dtype=torch.float64)
    assert encoding.shape == (length, dim)
    for position in range(length):
        scaled = (position + 1) / (length + 1e-6) * 2 * math.pi
        for channel in range(dim):
            angle = scaled / 10000 ** (2 * (channel // 2) / dim)
            expected = math.cos(angle) if channel % 2 else math.sin(angle)
            assert encoding[position, channel].item() == pytest.approx(expected, abs=1e-14)


def test_y_is_in_the_first_half_and_x_in_the_second() -> None:
    encoding = sine_2d(3, 5, 8, dtype=torch.float64)
    assert encoding.shape == (3, 5, 8)
    assert torch.equal(encoding[:, :, :4], encoding[:, :1, :4].expand(-1, 5, -1))
    assert torch.equal(encoding[:, :, 4:], encoding[:1, :, 4:].expand(3, -1, -1))
    assert torch.equal(encoding[:, 0, :4], sine_1d(3, 4, dtype=torch.float64))
    assert torch.equal(encoding[0, :, 4:], sine_1d(5, 4, dtype=torch.float64))


def test_time_is_added_over_all_channels() -> None:
    encoding = sine_3d(4, 2, 3, 8, dtype=torch.float64)
    time = encoding - sine_2d(2, 3, 8, dtype=torch.float64)
    assert_close(time, sine_1d(4, 8, dtype=torch.float64)[:, None, None].expand(-1, 2, 3, -1))


def test_the_code_of_a_frame_depends_on_the_clip_length() -> None:
    assert not torch.allclose(sine_3d(2, 1, 1, 8, dtype=torch.float64)[0], sine_3d(3, 1, 1, 8, dtype=torch.float64)[0])


def test_one_frame_adds_a_constant() -> None:
    difference = sine_3d(1, 4, 5, 8, dtype=torch.float64)[0] - sine_2d(4, 5, 8, dtype=torch.float64)
    assert_close(difference, difference[:1, :1].expand(4, 5, -1))


@pytest.mark.parametrize(
    ("features", "positions"),
    [
        (torch.float16, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
)
def test_positions_are_never_below_float32(features: torch.dtype, positions: torch.dtype) -> None:
    assert position_dtype(torch.zeros(1, dtype=features)) == positions

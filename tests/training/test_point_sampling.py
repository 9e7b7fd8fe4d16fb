"""Bilinear values at points, and which points."""

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from m2f_video.modeling.transformer_decoder import resize_frames
from m2f_video.training.point_sampling import point_sample, random_points, uncertain_points
from tests.golden_files import GOLDEN
from tests.tolerances import assert_close


@pytest.fixture(scope="module")
def golden() -> dict[str, Tensor]:
    return load_file(GOLDEN / "ops" / "sampling.safetensors")


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# ---- sampling ----


def test_point_values_equal_the_original(golden: dict[str, Tensor]) -> None:
    assert_close(point_sample(golden["point_input"], golden["point_coords_xy"]), golden["point_output"])


def test_resized_maps_equal_the_original(golden: dict[str, Tensor]) -> None:
    sizes = [name.removeprefix("bilinear_") for name in golden if name.startswith("bilinear_")]
    assert len(sizes) == 5
    for size in sizes:
        height, width = map(int, size.split("x"))
        assert_close(resize_frames(golden["point_input"][None], (height, width))[0], golden[f"bilinear_{size}"])


@pytest.mark.parametrize(
    ("point", "value"),
    [
        ((1 / 6, 1 / 4), 1.0),  # centre of a pixel
        ((5 / 6, 3 / 4), 6.0),
        ((1 / 3, 1 / 4), 1.5),  # between two
        ((1 / 3, 1 / 2), 3.0),  # between four
        ((0.0, 1 / 4), 0.5),  # on the border: half a zero
        ((0.0, 0.0), 0.25),
        ((1.0, 1.0), 1.5),
    ],
)
def test_point_values_by_hand(point: tuple[float, float], value: float) -> None:
    maps = torch.tensor([[[[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]]], dtype=torch.float64)
    points = torch.tensor([[point]], dtype=torch.float64)
    assert_close(point_sample(maps, points), torch.full((1, 1, 1), value, dtype=torch.float64))


def test_no_maps_have_no_values() -> None:
    assert point_sample(torch.zeros(0, 1, 4, 4), torch.zeros(0, 7, 2)).shape == (0, 1, 7)


@pytest.mark.parametrize(
    ("maps", "points", "message"),
    [
        (torch.zeros(1, 4, 4), torch.zeros(1, 3, 2), r"maps must be \(R, C, H, W\)"),
        (torch.zeros(2, 1, 4, 4), torch.zeros(1, 3, 2), r"got \(2, 1, 4, 4\) and \(1, 3, 2\)"),
        (torch.zeros(1, 1, 4, 4), torch.zeros(1, 3, 3), r"points \(R, P, 2\)"),
        (torch.zeros(1, 1, 4, 4), torch.zeros(1, 3, 2).double(), "one floating-point dtype"),
        (torch.zeros(1, 1, 4, 4).bool(), torch.zeros(1, 3, 2).bool(), "one floating-point dtype"),
    ],
)
def test_point_sample_names_what_does_not_fit(maps: Tensor, points: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        point_sample(maps, points)


# ---- randomness ----


def test_points_come_from_the_generator_in_any_dtype() -> None:
    single = random_points(3, 5, torch.zeros(1), generator())
    double = random_points(3, 5, torch.zeros(1).double(), generator())
    assert single.shape == (3, 5, 2)
    assert single.dtype == torch.float32
    assert torch.equal(double, single.double())
    assert not torch.equal(single, random_points(3, 5, torch.zeros(1), generator(1)))


def test_points_without_a_generator_follow_the_global_seed() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        first = random_points(2, 4, torch.zeros(1))
        torch.manual_seed(3)
        assert torch.equal(random_points(2, 4, torch.zeros(1)), first)


@pytest.mark.parametrize(
    ("drawn", "message"),
    [
        (torch.zeros(2, 4, 2), r"gave \(2, 4, 2\), asked for \(2, 5, 2\)"),
        (torch.full((2, 5, 2), torch.nan), "NaN or values outside"),
        (torch.full((2, 5, 2), 1.5), "NaN or values outside"),
    ],
)
def test_a_function_that_draws_badly_is_named(drawn: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        random_points(2, 5, torch.zeros(1), lambda shape: drawn)


# ---- uncertainty ----


class Recorder:
    """Draws from a generator and keeps what it drew."""

    def __init__(self) -> None:
        self.generator = generator()
        self.draws: list[Tensor] = []

    def __call__(self, shape: tuple[int, ...]) -> Tensor:
        self.draws.append(torch.rand(shape, generator=self.generator))
        return self.draws[-1]


def ramp(rows: int) -> Tensor:
    """(R, 1, 8, 64) logits that are 0 in the middle column and grow to the right, steeper in each row."""
    slope = torch.arange(1, rows + 1.0).view(-1, 1, 1, 1)
    return (slope * torch.linspace(-10, 10, 64)).expand(rows, 1, 8, 64)


def test_points_are_the_most_uncertain_of_many_and_new_ones() -> None:
    recorder = Recorder()
    logits = ramp(2)
    points = uncertain_points(logits, 40, random=recorder)
    assert [tuple(draw.shape) for draw in recorder.draws] == [(2, 120, 2), (2, 10, 2)]
    candidates, new = recorder.draws
    assert torch.equal(points[:, 30:], new)
    for row in range(2):
        value = point_sample(logits[row : row + 1], candidates[row : row + 1]).flatten().abs()
        expected = candidates[row][value.argsort()[:30]]
        assert torch.equal(points[row, :30].sort(0).values, expected.sort(0).values)


def test_each_ratio_does_what_it_says() -> None:
    logits = ramp(1)
    uniform, certain, oversampled = Recorder(), Recorder(), Recorder()
    assert torch.equal(uncertain_points(logits, 20, importance_sample_ratio=0.0, random=uniform), uniform.draws[1])
    points = uncertain_points(logits, 20, importance_sample_ratio=1.0, random=certain)
    assert len(certain.draws) == 1
    closer = uncertain_points(logits, 20, importance_sample_ratio=1.0, oversample_ratio=10.0, random=oversampled)
    assert oversampled.draws[0].shape == (1, 200, 2)
    assert point_sample(logits, closer).abs().max() < point_sample(logits, points).abs().max()


def test_a_batch_has_the_points_of_its_rows() -> None:
    logits = torch.randn(3, 1, 9, 7, generator=generator())
    recorder = Recorder()
    points = uncertain_points(logits, 16, random=recorder)
    for row in range(3):
        draws = [draw[row : row + 1] for draw in recorder.draws]
        alone = uncertain_points(logits[row : row + 1], 16, random=lambda shape, draws=draws: draws.pop(0))
        assert torch.equal(alone[0], points[row])


def test_choosing_points_has_no_gradient() -> None:
    logits = ramp(1).clone().requires_grad_()
    assert not uncertain_points(logits, 8, random=generator()).requires_grad


@pytest.mark.parametrize(
    ("shape", "ratios", "message"),
    [
        ((2, 4, 4), {}, r"logits must be \(R, 1, H, W\), got \(2, 4, 4\)"),
        ((2, 3, 4, 4), {}, "logits must be"),
        ((2, 1, 4, 4), {"oversample_ratio": 0.5}, "at least 1"),
        ((2, 1, 4, 4), {"importance_sample_ratio": 1.5}, r"in \[0, 1\]"),
    ],
)
def test_uncertain_points_names_what_is_wrong(shape: tuple[int, ...], ratios: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        uncertain_points(torch.zeros(shape), 8, **ratios)

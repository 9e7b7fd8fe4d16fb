"""The synthetic benchmark: the same everywhere, exact masks, and every field of the difficulty has an effect."""

import hashlib
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from m2f_video.data import DIFFICULTIES, SHAPES, Difficulty, SyntheticVideos
from m2f_video.data.synthetic_render import Renderer, texture
from m2f_video.data.synthetic_scene import Look, Scene, SceneObject, sample_scene
from m2f_video.data.synthetic_shapes import TABLE_EXTENT, cosine, distance_table, sine

# of 3 videos of seed 7, 8 frames of 80x48: change them only together with VERSION
HASHES = {
    "easy": "d885d8ba25077848924891fe99307025c389fcda0cdd292a12b69b735a490a40",
    "medium": "4553f1882a7e2c77f6506864d59f7ee2ce3f8fd992ef38576c664f6d94c56f82",
    "hard": "c978d8ec4cef4215157d3b35bbffec953f51450db480fe823afa67751b3b1ed3",
}
BUSY = Difficulty(
    num_objects=(4, 4),
    radius=(0.15, 0.25),
    speed=(0.01, 0.05),
    spin=0.05,
    zoom=1.5,
    crossing=0.5,
    lookalike=0.5,
    camouflage=0.5,
    clutter=0.5,
    background_speed=0.05,
    background_spin=0.01,
    occluders=1,
    lighting=0.3,
    noise=10,
)


def small(num_videos: int = 2, **arguments) -> SyntheticVideos:
    return SyntheticVideos(num_videos, **{"num_frames": 6, "height": 32, "width": 48, **arguments})


@pytest.mark.parametrize("difficulty", DIFFICULTIES)
def test_videos_are_the_same_on_every_machine(difficulty):
    digest = hashlib.sha256()
    videos = SyntheticVideos(3, 7, difficulty, num_frames=8, height=48, width=80)
    for index in range(3):
        clip = videos[index].clip(range(8))
        for tensor in (clip.frames, clip.masks, clip.labels):
            digest.update(tensor.numpy().tobytes())
    assert digest.hexdigest() == HASHES[difficulty]


@given(st.integers(0, 2**40), st.integers(0, 5), st.sampled_from(list(DIFFICULTIES)))
@settings(max_examples=15, deadline=None)
def test_masks_are_disjoint_and_present_where_not_empty(seed, index, difficulty):
    clip = small(6, seed=seed, difficulty=difficulty)[index].clip(range(6))
    assert clip.masks.sum(0).max() <= 1
    assert torch.equal(clip.present, clip.masks.flatten(2).any(2))
    assert clip.present.any(1).all()
    assert len(clip.labels) == len(set(clip.instance_ids.tolist())) <= DIFFICULTIES[difficulty].num_objects[1]


@given(st.integers(0, 1000), st.lists(st.integers(0, 5), min_size=1, max_size=4))
@settings(max_examples=15, deadline=None)
def test_any_frames_of_any_video_can_be_rendered_alone(seed, frames):
    whole = small(3, seed=seed, difficulty="hard")[2].clip(range(6))
    part = small(30, seed=seed, difficulty="hard")[2].clip(frames)
    assert torch.equal(part.frames, whole.frames[frames])
    rows = [whole.instance_ids.tolist().index(id_) for id_ in part.instance_ids.tolist()]
    assert torch.equal(part.masks, whole.masks[rows][:, frames])
    assert torch.equal(part.labels, whole.labels[rows])
    left_out = sorted(set(range(len(whole.labels))) - set(rows))
    assert not whole.masks[left_out][:, frames].any()


def test_seeds_and_indices_give_different_videos():
    frames = [small(seed=seed)[index].clip([0]).frames for seed in (0, 1) for index in (0, 1)]
    assert len({frame.numpy().tobytes() for frame in frames}) == 4


def test_a_scene_looks_the_same_at_another_resolution():
    near, far = (SyntheticVideos(1, 3, "easy", 2, 48 * n, 64 * n)[0].clip([1]) for n in (1, 2))
    assert torch.equal(near.labels, far.labels)
    halved = torch.nn.functional.avg_pool2d(far.masks[:, 0].float()[None], 2)[0] > 0.5
    assert ((halved & near.masks[:, 0]).sum((1, 2)) / (halved | near.masks[:, 0]).sum((1, 2))).min() > 0.8


def scene_of(*objects: SceneObject) -> Scene:
    zeros = np.zeros(1)
    return Scene(
        objects=objects,
        strips=(),
        background=look((0, 0, 0)),
        background_x=zeros,
        background_y=zeros,
        background_turns=zeros,
        light=zeros + 1,
        noise=0,
    )


def look(color) -> Look:
    return Look(pattern="plain", colors=(color, color), periods=2, seed=0)


def placed(shape: str, x: float, radius: float, color=(1, 1, 1)) -> SceneObject:
    return SceneObject(
        shape=SHAPES.index(shape),
        look=look(color),
        x=np.array([x]),
        y=np.array([0.5]),
        base_radius=radius,
        radius=np.array([radius]),
        turns=np.array([0.0]),
    )


def test_nearer_objects_hide_farther_ones():
    scene = scene_of(placed("disc", 0.4, 0.2, (1, 0, 0)), placed("disc", 0.6, 0.2, (0, 1, 0)))
    image, (near, far) = Renderer(scene, 100, 100).frame(0, np.random.default_rng(0))
    y, x = (np.mgrid[:100, :100] + 0.5) / 100
    left, right = ((x - center) ** 2 + (y - 0.5) ** 2 for center in (0.4, 0.6))
    clear = (abs(left - 0.04) > 0.001) & (abs(right - 0.04) > 0.001)  # the circle is a polygon
    assert (near == (left < 0.04))[clear].all()
    assert (far == ((right < 0.04) & (left > 0.04)))[clear].all()
    inner = left < 0.03
    assert (image[inner][:, 0] > 100).all()
    assert (image[inner][:, 1] == 0).all()  # nothing of the green disc shines through


def test_edges_are_blended_and_masks_cut_them_in_half():
    image, (mask,) = Renderer(scene_of(placed("square", 0.5, 0.2225 * np.sqrt(2))), 100, 100).frame(
        0, np.random.default_rng(0)
    )
    row = image[50, :, 0].astype(int)
    assert mask[50].sum() == pytest.approx(2 * 22.25, abs=1)
    assert ((row > 5) & (row < 0.55 * row.max())).sum() == 2  # a quarter of a pixel at each side


def test_an_object_out_of_the_frame_is_absent():
    image, masks = Renderer(scene_of(placed("star", -0.5, 0.2)), 50, 50).frame(0, np.random.default_rng(0))
    assert not masks.any()
    assert not image.any()


@pytest.mark.parametrize("shape", SHAPES)
def test_shapes_fill_their_circle_and_differ(shape):
    table = distance_table(shape)
    ticks = np.linspace(-TABLE_EXTENT, TABLE_EXTENT, len(table))
    radius = np.sqrt(ticks[:, None] ** 2 + ticks**2)[table < 0].max()
    assert 0.93 < radius <= 1.01
    overlaps = [
        (first & second).sum() / (first | second).sum()
        for other in SHAPES
        if other != shape
        for first in [turned_mask(shape, 0)]
        for second in (turned_mask(other, turn) for turn in range(24))
    ]
    assert max(overlaps) < 0.87  # of equal area and at the size of a small object


@cache
def turned_mask(shape: str, turn: int) -> np.ndarray:
    """A shape of 300 pixels, turned by 24ths."""
    table = distance_table(shape)
    area = (table < 0).mean() * (2 * TABLE_EXTENT) ** 2
    y, x = (np.mgrid[:48, :48] - 23.5) * np.sqrt(area / 300)
    cos, sin = np.cos(turn * np.pi / 12), np.sin(turn * np.pi / 12)
    ticks = [(axis / TABLE_EXTENT + 1) / 2 * (len(table) - 1) for axis in (cos * y - sin * x, cos * x + sin * y)]
    row, column = (np.clip(np.rint(tick), 0, len(table) - 1).astype(int) for tick in ticks)
    return table[row, column] < 0


@given(st.floats(-50, 50))
def test_sine_and_cosine(turns):
    assert sine(turns) == pytest.approx(np.sin(2 * np.pi * turns), abs=1e-12)
    assert cosine(turns) == pytest.approx(np.cos(2 * np.pi * turns), abs=1e-12)


@pytest.mark.parametrize("pattern", ["plain", "blotches", "stripes", "checks", "dots", "rings"])
def test_textures_repeat_without_seams_and_differ(pattern):
    pixels = texture(Look(pattern=pattern, colors=((1, 0, 0), (0, 0, 1)), periods=4, seed=1), 64)
    assert pixels.shape == (64, 64, 3)
    assert pixels.min() >= 0
    assert pixels.max() <= 1
    inner = np.abs(np.diff(pixels, axis=1)).max()
    if pattern != "rings":  # these only ever lie on objects, which do not repeat them
        assert np.abs(pixels[:, 0] - pixels[:, -1]).max() <= inner + 1e-6
    other = texture(Look(pattern=pattern, colors=((1, 0, 0), (0, 0, 1)), periods=4, seed=2), 64)
    assert not np.array_equal(pixels, other)


CHANGES = {
    "num_objects": (1, 1),
    "radius": (0.3, 0.35),
    "speed": (0.1, 0.1),
    "spin": 0.0,
    "zoom": 1.0,
    "crossing": 0.0,
    "seen": 1.0,
    "lookalike": 0.0,
    "camouflage": 0.0,
    "clutter": 0.0,
    "background_speed": 0.0,
    "background_spin": 0.0,
    "occluders": 0,
    "lighting": 0.0,
    "noise": 0.0,
}


def test_the_changes_below_cover_all_fields():
    assert set(CHANGES) == set(Difficulty.__dataclass_fields__)


@cache
def render(difficulty: Difficulty) -> list[bytes]:
    videos = small(4, seed=1, difficulty=difficulty)
    return [videos[index].clip(range(6)).frames.numpy().tobytes() for index in range(4)]


@pytest.mark.parametrize("field", CHANGES)
def test_every_field_changes_the_video(field):
    assert render(BUSY) != render(replace(BUSY, **{field: CHANGES[field]}))


def scenes(count: int = 30, **fields) -> list[Scene]:
    difficulty = replace(DIFFICULTIES["medium"], **fields)
    return [sample_scene(np.random.default_rng(seed), difficulty, 16, 1.6) for seed in range(count)]


def test_fields_mean_what_they_say():
    for scene in scenes(num_objects=(3, 3), spin=0.02, zoom=1.5, radius=(0.1, 0.2), lookalike=0):
        assert len(scene.objects) <= 3
        for thing in scene.objects:
            assert 0.1 <= thing.base_radius <= 0.2
            assert max(thing.radius[0] / thing.radius[-1], thing.radius[-1] / thing.radius[0]) <= 1.5 + 1e-9
            assert np.abs(np.diff(thing.turns)).max() <= 0.02 + 1e-9
    assert all(not scene.strips for scene in scenes(occluders=0))
    assert all(len(scene.strips) == 2 for scene in scenes(occluders=2))


def test_crossing_objects_leave_the_frame_and_others_stay():
    def is_out(thing: SceneObject) -> np.ndarray:
        return (thing.x < 0) | (thing.x > 1.6) | (thing.y < 0) | (thing.y > 1)

    things = [thing for scene in scenes(crossing=1.0, speed=(0.03, 0.05)) for thing in scene.objects]
    assert np.mean([is_out(thing).any() and not is_out(thing).all() for thing in things]) > 0.8
    assert not any(is_out(thing).any() for scene in scenes(crossing=0.0) for thing in scene.objects)


def test_lookalikes_share_class_and_texture():
    for scene in scenes(lookalike=1.0):
        assert len({(thing.shape, thing.look) for thing in scene.objects}) == 1
    assert all(len({thing.look for thing in scene.objects}) == len(scene.objects) for scene in scenes(lookalike=0.0))


def test_objects_are_placed_where_they_can_be_seen():
    for scene in scenes(seen=1.0, crossing=0.0):
        for number, thing in enumerate(scene.objects):
            assert ((thing.x > 0) & (thing.x < 1.6) & (thing.y > 0) & (thing.y < 1)).all()
            for nearer in scene.objects[:number]:
                distance = np.hypot(thing.x - nearer.x, thing.y - nearer.y)
                assert (distance > 0.7 * nearer.radius).all()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("num_objects", (3, 1)),
        ("radius", (0, 0.1)),
        ("speed", (-1, 1)),
        ("speed", (0, float("nan"))),
        ("zoom", 0.5),
        ("crossing", 1.5),
        ("noise", -1.0),
        ("spin", float("inf")),
        ("lookalike", float("nan")),
    ],
)
def test_impossible_difficulties(field, value):
    with pytest.raises(ValueError, match=f"Difficulty.{field}"):
        Difficulty(**{field: value})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_videos": -1}, "num_videos"),
        ({"num_videos": 1, "seed": -1}, "seed"),
        ({"num_videos": 1, "num_frames": 0}, "num_frames"),
        ({"num_videos": 1, "height": 8}, "16 pixels"),
        ({"num_videos": 1, "difficulty": "brutal"}, "'brutal'; difficulties: easy, medium, hard"),
        ({"num_videos": 1, "difficulty": 3}, "unknown difficulty 3; difficulties: easy"),
    ],
)
def test_impossible_datasets(arguments, message):
    with pytest.raises(ValueError, match=message):
        SyntheticVideos(**arguments)


def test_frames_and_videos_that_do_not_exist():
    videos = small(2)
    with pytest.raises(IndexError, match="no video 2"):
        videos[2]
    with pytest.raises(ValueError, match="no frame 6"):
        videos[0].clip([6])
    with pytest.raises(ValueError, match="at least one frame"):
        videos[0].clip([])
    with pytest.raises(ValueError, match="unknown shape"):
        distance_table("blob")


def test_a_single_frame_and_an_empty_scene():
    clip = small(1, num_frames=1, difficulty=Difficulty(num_objects=(0, 0)))[0].clip([0])
    assert clip.masks.shape == (0, 1, 32, 48)
    assert clip.frames.shape == (1, 3, 32, 48)

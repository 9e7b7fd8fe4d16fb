import pytest

from m2f_video.categories import COCO_TO_VIS, LABEL_SETS, OVIS, YOUTUBEVIS_2019, YOUTUBEVIS_2021


@pytest.mark.parametrize(
    ("labels", "count"), [("youtubevis_2019", 40), ("youtubevis_2021", 40), ("ovis", 25)], ids=lambda value: str(value)
)
def test_every_set_has_its_number_of_different_names(labels: str, count: int) -> None:
    names = LABEL_SETS[labels]
    assert len(names) == len(set(names)) == count
    assert all(name and name == name.strip() for name in names)


def test_all_sets_are_listed() -> None:
    assert LABEL_SETS == {"youtubevis_2019": YOUTUBEVIS_2019, "youtubevis_2021": YOUTUBEVIS_2021, "ovis": OVIS}


@pytest.mark.parametrize(
    ("labels", "ids"),
    [
        (
            "youtubevis_2019",
            {1: "person", 2: "giant_panda", 6: "sedan", 8: "dog", 11: "hand", 21: "motorbike", 40: "tennis_racket"},
        ),
        (
            "youtubevis_2021",
            {1: "airplane", 5: "car", 9: "dog", 14: "flying_disc", 26: "person", 39: "whale", 40: "zebra"},
        ),
        ("ovis", {1: "Person", 4: "Dog", 12: "Poultry", 13: "Giant_panda", 22: "Motorcycle", 25: "Vehical"}),
    ],
)  # fmt: skip
def test_names_have_the_datasets_ids(labels: str, ids: dict[int, str]) -> None:
    assert {number: LABEL_SETS[labels][number - 1] for number in ids} == ids


def test_the_two_releases_share_most_names_and_hardly_any_ids() -> None:
    assert set(YOUTUBEVIS_2019) - set(YOUTUBEVIS_2021) == {"ape", "eagle", "hand", "owl", "sedan"}
    assert set(YOUTUBEVIS_2021) - set(YOUTUBEVIS_2019) == {"bird", "car", "flying_disc", "squirrel", "whale"}
    assert [name for name, other in zip(YOUTUBEVIS_2019, YOUTUBEVIS_2021, strict=True) if name == other] == []


def test_the_release_of_2021_is_in_alphabetical_order() -> None:
    assert list(YOUTUBEVIS_2021) == sorted(YOUTUBEVIS_2021)


def test_coco_names_map_to_names_of_their_set() -> None:
    assert COCO_TO_VIS.keys() == LABEL_SETS.keys()
    for labels, names in COCO_TO_VIS.items():
        assert set(names.values()) <= set(LABEL_SETS[labels])


@pytest.mark.parametrize(
    ("labels", "count", "ids"),
    [
        ("youtubevis_2019", 21, {"person": 1, "bicycle": 21, "car": 6, "skis": 33, "tennis racket": 40}),
        ("youtubevis_2021", 23, {"person": 26, "bird": 3, "frisbee": 14, "skis": 31, "tennis racket": 34}),
        ("ovis", 17, {"person": 1, "bus": 25, "truck": 25, "sheep": 6, "giraffe": 11}),
    ],
)
def test_coco_names_have_the_ids_of_the_original(labels: str, count: int, ids: dict[str, int]) -> None:
    names = COCO_TO_VIS[labels]
    assert len(names) == count
    assert {name: LABEL_SETS[labels].index(names[name]) + 1 for name in ids} == ids

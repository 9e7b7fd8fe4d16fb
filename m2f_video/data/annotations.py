"""The one reader of annotation files in the YouTubeVIS format and in COCO's: finding, parsing and checking them.

Training, measuring, `data check` and `data split` all see a file through `parse_annotations`. Every fault goes to a
`Report`, which raises at the first or keeps them all; what is parsed are the rows without a fault.
"""

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Literal

import numpy as np

from m2f_video.files import check_regular, read_json
from m2f_video.results.masks import check_picture_size

ANNOTATION_FILES = (
    "train.json",
    "instances.json",
    "annotations_train.json",
    "train_instances.json",
    "train_instances_.json",
)
"""Annotation files that are looked for, in this order, where a dataset is given as a folder: those of YouTubeVIS 2019,
YouTubeVIS 2021, OVIS and LV-VIS, which comes with either name."""

FRAMES_FOLDER = "JPEGImages"

MOST_CATEGORIES = 5000
"""The precision of each takes 200 kB in an evaluation."""


class DatasetError(ValueError):
    """Annotations or frames that are not in the format; the message names file, place and fault."""


@dataclass(frozen=True, kw_only=True)
class Fault:
    """Something wrong with a dataset.

    Attributes:
        file: the annotation file, or the frame that is meant.
        message: where in the file, and what is wrong.
        annotation_id: the annotation that is meant, None where it is no annotation's fault, or has no id.
    """

    file: str
    message: str
    annotation_id: int | None = None

    def __str__(self) -> str:
        return f"{self.file}: {self.message}"


Report = Callable[[Fault], None]
"""Called with each fault that is found."""


def refuse(fault: Fault) -> None:
    """The `Report` that raises `DatasetError` at the first fault."""
    raise DatasetError(str(fault))


@dataclass(frozen=True, kw_only=True, slots=True)
class VideoRecord:
    """A row of `videos`, or of COCO's `images`.

    Attributes:
        id: of the row.
        height: pixels.
        width: pixels.
        num_frames: length.
        file_names: of the frames, relative to their folder and inside it; empty where they were not asked for.
    """

    id: int
    height: int
    width: int
    num_frames: int
    file_names: tuple[str, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Annotation:
    """A row of `annotations`: one object of a video.

    Attributes:
        id: of the row.
        video_id: of the video.
        category_id: of the category.
        crowd: whether it stands for a group, which training leaves out.
        segmentations: one for each frame, as the file holds them: `compress_segmentation` checks them.
        areas: pixels in each frame as the file states them; None where it does not, or they were not asked for.
    """

    id: int
    video_id: int
    category_id: int
    crowd: bool
    segmentations: Sequence[Any]
    areas: Sequence[Any] | None


@dataclass(frozen=True, kw_only=True)
class AnnotationFile:
    """A parsed annotation file.

    Attributes:
        data: the parsed JSON.
        videos: by id, in the order of the file.
        categories: names by id, by rising id.
        annotations: in the order of the file.
    """

    data: Mapping[str, Any]
    videos: dict[int, VideoRecord]
    categories: dict[int, str]
    annotations: tuple[Annotation, ...]

    def instances(self) -> dict[int, list[Annotation]]:
        """The annotations of each video but for crowds, by the video's id."""
        of_video: dict[int, list[Annotation]] = {id_: [] for id_ in self.videos}
        for annotation in self.annotations:
            if not annotation.crowd:
                of_video[annotation.video_id].append(annotation)
        return of_video


def find_annotations(path: str | os.PathLike[str]) -> Path:
    """The annotation file of a dataset given as that file or as a folder that holds one of `ANNOTATION_FILES`.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is a pipe or device.
    """
    file = Path(path)
    check_regular(file)
    if file.is_file():
        return file
    if not file.exists():
        raise FileNotFoundError(f"{file}: there is no such dataset")
    for name in ANNOTATION_FILES:
        if (file / name).is_file():
            return file / name
    raise FileNotFoundError(f"{file}: the folder holds no {' or '.join(ANNOTATION_FILES)}; give the annotation file")


def find_frames(
    annotations: Path, frames: str | os.PathLike[str] | None = None, videos: Iterable[VideoRecord] = ()
) -> Path:
    """The folder of frames that belongs to an annotation file.

    Args:
        annotations: the file.
        frames: the folder, where it is known. None looks where published datasets have it: `JPEGImages` beside the file
            (YouTubeVIS 2021), `train/JPEGImages` (YouTubeVIS 2019, LV-VIS), `JPEGImages/train` (LV-VIS) and `train`
            (OVIS), where the file's name is of that part, such as `train.json`, `train_instances.json` or
            `annotations_train.json`.
        videos: of the file: of several such folders the first is taken that has their first frame.

    Raises:
        FileNotFoundError: there is no such folder.
    """
    if frames is not None:
        if not Path(frames).is_dir():
            raise FileNotFoundError(f"{frames}: there is no such folder of frames")
        return Path(frames)
    part = annotations.stem.removeprefix("annotations_").removesuffix("_").removesuffix("_instances")
    names = (FRAMES_FOLDER, f"{part}/{FRAMES_FOLDER}", f"{FRAMES_FOLDER}/{part}", part)
    folders = [folder for name in names if (folder := annotations.parent / name).is_dir()]
    if not folders:
        raise FileNotFoundError(
            f"{annotations}: there is no folder of frames, none of {', '.join(names)} beside it; name it (--frames, "
            "--validation-frames)"
        )
    first = next((video.file_names[0] for video in videos if video.file_names), None)
    with_first = (folder for folder in folders if first is not None and (folder / first).exists())
    return next(with_first, folders[0])


def read_annotations(
    file: Path, item: Literal["video", "image"] = "video", per_frame: Sequence[str] = (), report: Report = refuse
) -> AnnotationFile:
    """Parse an annotation file whose frames are to be read; the arguments are those of `parse_annotations`.

    Raises:
        FileNotFoundError: there is no such file.
        DatasetError: it is a pipe or device, is not JSON, or see `parse_annotations`.
    """
    try:
        data = read_json(file)
    except ValueError as error:
        raise DatasetError(f"{file}: not an annotation file: {str(error).removeprefix(f'{file}: ')}") from error
    return parse_annotations(data, str(file), item=item, per_frame=per_frame, report=report)


def parse_annotations(
    data: Any,
    name: str,
    *,
    item: Literal["video", "image"] = "video",
    with_frames: bool = True,
    per_frame: Sequence[str] = (),
    report: Report = refuse,
) -> AnnotationFile:
    """Check what an annotation file holds.

    Args:
        data: parsed JSON; `annotations` may be missing or null, as in test sets.
        name: of the file, for messages.
        item: what is annotated: videos, or COCO's images, which become videos of a single frame; annotations of images
            that the file does not have are left out.
        with_frames: the frames are to be read: each video needs its file names, and each annotation as many
            segmentations. Otherwise a length does, and another number of segmentations is no fault.
        per_frame: which other lists with an entry per frame to check where they are there: `areas`, `bboxes`.
        report: called with each fault but for those that are raised; by default it raises `DatasetError`.

    Raises:
        DatasetError: it is no object with lists of objects.
    """
    if not isinstance(data, Mapping):
        raise DatasetError(
            f"{name}: not an annotation file: it is no JSON object with {item}s, categories and annotations; are "
            "annotations and results swapped?"
        )
    tables = {key: data.get(key) for key in (f"{item}s", "categories")} | {"annotations": data.get("annotations") or []}
    for key, rows in tables.items():
        odd = [row for row in rows if not isinstance(row, Mapping)] if isinstance(rows, list | tuple) else [rows]
        if odd:
            raise DatasetError(f"{name}: not an annotation file: {key!r} must be a list of objects, not {odd[0]!r:.60}")
    for key in (f"{item}s", "categories"):
        if not tables[key]:
            report(Fault(file=name, message=f"there are no {key}"))
    if (count := len(tables["categories"])) > MOST_CATEGORIES:
        report(Fault(file=name, message=f"{count} categories are too many, it may be {MOST_CATEGORIES}"))

    video_rows, annotation_rows = tables[f"{item}s"], tables["annotations"]
    if item == "image":
        video_rows = ({**row, "file_names": [row.get("file_name")], "length": None} for row in video_rows)
        annotation_rows = ({**row, "segmentations": [row.get("segmentation")]} for row in annotation_rows)

    videos: dict[int, VideoRecord | None] = {}  # None where the row has a fault
    for row in _rows(video_rows, item, name, report):
        video = _parse_video(row, with_frames)
        if row.id is not None:
            videos[row.id] = video
    categories: dict[int, str] = {}
    titles: set[str] = set()
    for row in _rows(tables["categories"], "category", name, report):
        title = row.get("name", str)
        if title in titles:
            row.fault(f"another category has the name {title!r:.60}")
        if title is not None:
            titles.add(title)
        if row.id is not None:
            categories[row.id] = title or ""
    annotations = [
        _parse_annotation(row, item, videos, categories, with_frames, per_frame)
        for row in _rows(annotation_rows, "annotation", name, report)
    ]
    return AnnotationFile(
        data=data,
        videos={id_: video for id_, video in videos.items() if video is not None},
        categories=dict(sorted(categories.items())),
        annotations=tuple(annotation for annotation in annotations if annotation is not None),
    )


class Row:
    """A row of a file, which gives its fields where they are what they should be.

    Args:
        fields: parsed JSON.
        where: what to call it in messages, such as "video 4".
        file: name of the file, for messages.
        report: called with each fault; by default it raises `DatasetError`.
    """

    def __init__(self, fields: Mapping[str, Any], where: str, file: str, report: Report = refuse) -> None:
        self.fields = fields
        self.where = where
        self.id: int | None = None
        self.file = file
        self._report = report

    def fault(self, message: str) -> None:
        """Report a fault of this row."""
        id_ = self.id if self.where.startswith("annotation ") else None
        self._report(Fault(file=self.file, message=f"{self.where}: {message}", annotation_id=id_))

    def get(self, key: str, kind: type) -> Any:
        """A field of this type: int, str or list; None where it is missing or of another type, which is a fault."""
        value = self.fields.get(key)
        if kind is int and isinstance(value, np.integer):
            return int(value)
        if isinstance(value, bool) or not isinstance(value, (list, tuple) if kind is list else kind):
            self.fault(f"{key!r} must be {kind.__name__}, got {value!r:.60}")
            return None
        return value


def _rows(rows: Iterable[Mapping[str, Any]], kind: str, file: str, report: Report) -> Iterator[Row]:
    """Rows with ids, each of which only one may have; the id is None where it is none."""
    known: set[int] = set()
    for number, fields in enumerate(rows):
        row = Row(fields, f"{kind} row {number}", file, report)
        row.id = row.get("id", int)
        if row.id is not None:
            row.where = f"{kind} {row.id}"
            if row.id in known:
                row.fault(f"another {kind} has the same id")
            known.add(row.id)
        yield row


def _parse_video(row: Row, with_frames: bool) -> VideoRecord | None:
    height, width = (row.get(key, int) for key in ("height", "width"))
    for key, side in (("height", height), ("width", width)):
        if side is not None and side < 1:
            row.fault(f"{key} must be positive, got {side}")
            height = None
    if height is not None and width is not None:
        try:
            check_picture_size(height, width)
        except ValueError as error:
            row.fault(str(error))
            height = None
    listed: Any = row.fields.get("file_names")
    names = row.get("file_names", list) if with_frames or isinstance(listed, list | tuple) else None
    num_frames = None if names is None else len(names)
    if row.fields.get("length") is not None or not (with_frames or names):
        length = row.get("length", int)
        if names is None:
            num_frames = length
        elif length is not None and length != num_frames:
            row.fault(f"length is {length}, but there are {num_frames} file names")
    if num_frames is not None and num_frames < 1:
        row.fault("it has no frames")
    inner = []
    for name in names or () if with_frames else ():
        if _is_inner_path(name):
            inner.append(name)
        else:
            row.fault(f"{name!r:.60} is no file name inside the folder of frames")
    if row.id is None or height is None or width is None or num_frames is None:
        return None
    return VideoRecord(id=row.id, height=height, width=width, num_frames=num_frames, file_names=tuple(inner))


def _parse_annotation(
    row: Row,
    item: str,
    videos: Mapping[int, VideoRecord | None],
    categories: Mapping[int, str],
    with_frames: bool,
    per_frame: Sequence[str],
) -> Annotation | None:
    video_id, category_id = row.get(f"{item}_id", int), row.get("category_id", int)
    if item == "image" and video_id is not None and video_id not in videos:
        return None  # subsets of COCO may keep the annotations of images that they leave out
    for kind, id_, known in ((item, video_id, videos), ("category", category_id, categories)):
        if id_ is not None and id_ not in known:
            row.fault(f"there is no {kind} {id_}")
    crowd = row.fields.get("iscrowd", 0)
    if crowd not in (0, 1):
        row.fault(f"'iscrowd' must be 0 or 1, got {crowd!r:.60}")
    segmentations = row.get("segmentations", list)
    lists = {key: row.get(key, list) for key in per_frame if row.fields.get(key) is not None}
    video = videos.get(video_id)
    if video is not None and segmentations is not None:
        if with_frames or not segmentations:
            expected, what = video.num_frames, f"the {video.num_frames} frames of {item} {video_id}"
        else:
            expected, what = len(segmentations), f"{len(segmentations)} segmentations"
        for key, entries in {"segmentations": segmentations, **lists}.items():
            if entries is not None and len(entries) != expected:
                row.fault(f"{len(entries)} {key} for {what}")
    areas = lists.get("areas")
    if areas is not None and not all(map(_is_area, areas)):
        row.fault("'areas' must be numbers of pixels, null where the object is absent")
    if row.id is None or video is None or category_id is None or segmentations is None:
        return None
    return Annotation(
        id=row.id,
        video_id=video.id,
        category_id=category_id,
        crowd=bool(crowd),
        segmentations=segmentations,
        areas=areas,
    )


def _is_area(area: Any) -> bool:
    """Whether this may stand in an annotation's `areas`: a number of pixels, or null where the object is absent."""
    if isinstance(area, bool) or not isinstance(area, int | float | np.number):
        return area is None
    return bool(0 <= area < 2**31)


def _is_inner_path(name: Any) -> bool:
    """Whether a file name of an annotation file leads to a place inside the folder it is relative to."""
    if not isinstance(name, str) or not name or name.startswith("/") or "\0" in name:
        return False
    try:
        longest = max(map(len, os.fsencode(name).split(b"/")))
    except UnicodeEncodeError:  # JSON can hold what no file system can
        return False
    return longest < 256 and len(name) < 4096 and ".." not in PurePosixPath(name).parts

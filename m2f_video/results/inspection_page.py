"""An inspection as one HTML page that needs nothing else, or as a folder of PNG files."""

import base64
import io
from collections.abc import Callable
from html import escape
from itertools import groupby
from pathlib import Path

import numpy as np

from m2f_video.files import atomic_path, new_folder
from m2f_video.results.inspection import Inspection, Picture, count_pictures, draw_inspection, level_color

Progress = Callable[[int, int], None]

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2em auto; max-width: 1400px; padding: 0 1em; color: #222 }
h2 { margin-top: 2em; border-bottom: 1px solid #ccc }
.row { display: grid; grid-template-columns: repeat(auto-fill, minmax(300px, 1fr)); gap: 12px }
figure { margin: 0 } img { width: 100%; display: block } figcaption { font-size: 13px; color: #555 }
.dot { display: inline-block; width: .8em; height: .8em; border-radius: 50%; margin: 0 .3em 0 .8em }
"""
_EXPLAINED = """Masks: the frame is dark where a mask does not cover it; the line is where its logit is 0. <em>May
attend here</em>: pixels of the level that the attention mask leaves open. <em>Attends here</em>: weights of the
cross-attention, mean of its heads, light where they are large, each picture by its own largest."""


def write_page(path: Path, inspection: Inspection, title: str, progress: Progress | None = None) -> None:
    """Write one HTML file, with the pictures inside it.

    Args:
        path: of the file. It appears when it is complete, and not at all when anything fails.
        inspection: what to show.
        title: what was looked at by which model.
        progress: called with (pictures drawn, pictures in all) after each.

    Raises:
        OSError: the file cannot be written.
    """
    with atomic_path(path) as file, file.open("w", encoding="utf-8", errors="xmlcharrefreplace") as page:
        head = f'<meta charset="utf-8"><title>{escape(title)}</title><style>{_STYLE}</style>'
        page.write(f'<!doctype html>\n<html lang="en"><head>{head}</head>\n<body><h1>{escape(title)}</h1>\n')
        clip = inspection.clip
        page.write(f"<p>Frame {inspection.number}, decoded with frames {clip[0]} to {clip[-1]}. {_EXPLAINED}</p>\n")
        done, total = 0, count_pictures(inspection)
        for group, pictures in groupby(draw_inspection(inspection), lambda picture: picture.group):
            note = _legend(inspection) if group == "Sampling" else ""
            page.write(f'<h2>{escape(group)}</h2>{note}\n<div class="row">\n')
            for picture in pictures:
                page.write(_figure(picture))
                done += 1
                if progress is not None:
                    progress(done, total)
            page.write("</div>\n")
        page.write("</body></html>\n")


def write_pictures(folder: Path, inspection: Inspection, progress: Progress | None = None) -> None:
    """Write each picture as a PNG file, named after what it shows, into a new folder.

    Args:
        folder: made, or empty. It appears when it is complete.
        inspection: what to show.
        progress: as of `write_page`.

    Raises:
        FileExistsError: there is something in the folder.
        OSError: it cannot be written.
    """
    total = count_pictures(inspection)
    with new_folder(folder) as temporary:
        for done, picture in enumerate(draw_inspection(inspection), 1):
            (temporary / f"{picture.name}.png").write_bytes(_encoded(picture.image, "PNG"))
            if progress is not None:
                progress(done, total)


def _legend(inspection: Inspection) -> str:
    x, y = inspection.point
    levels = "".join(
        f'<span class="dot" style="background:{level_color(level)}"></span>stride {stride}'
        for level, stride in enumerate(inspection.strides)
    )
    return f"<p>Where the deformable attention samples for the pixel at x = {x}, y = {y}, all heads:{levels}</p>"


def _figure(picture: Picture) -> str:
    data = base64.b64encode(_encoded(picture.image, "JPEG")).decode("ascii")
    title = escape(picture.title)
    return f'<figure><img alt="{title}" src="data:image/jpeg;base64,{data}"><figcaption>{title}</figcaption></figure>\n'


def _encoded(image: np.ndarray, kind: str) -> bytes:
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(image).save(file, kind, **({"quality": 85} if kind == "JPEG" else {}))
    return file.getvalue()

"""A result as a notebook shows it: some frames with their tracks, and a table."""

import base64
import io
from html import escape
from typing import TYPE_CHECKING

import numpy as np

from m2f_video.results.drawing import draw_tracks, track_colors
from m2f_video.results.masks import decode_mask
from m2f_video.results.overlay import read_frames
from m2f_video.video.decode import VideoError
from m2f_video.video.reader import VideoReader, open_video

if TYPE_CHECKING:
    from m2f_video.results.tracks import VideoSegmentation

_PICTURES, _WIDTH = 6, 240  # pixels
_MOST_TRACKS = 30
_LAST_FRAME = 300  # of the source, up to which it is decoded for pictures
_GROUND = 48  # grey of frames that are not to be had


def notebook_html(result: "VideoSegmentation") -> str:
    """HTML that needs nothing else; texts of files are never markup.

    Frames are drawn from the first 300 of the video, so that it takes no longer for a long one; where it is not at hand
    there are masks alone, from all of it, and a line says why.
    """
    positions, frames, note = _pictures_of(result)
    drawn = "".join(_figure(result, *each) for each in zip(positions, frames, strict=True))
    return (
        f"<div><p><b>{escape(result.source[:200])}</b>: {len(result.frames)} frames, {result.width}x{result.height}, "
        f'{len(result.tracks)} tracks{escape(note)}</p><div style="display:flex;flex-wrap:wrap;gap:6px">{drawn}</div>'
        f"{_table(result)}</div>"
    )


def _pictures_of(result: "VideoSegmentation") -> tuple[list[int], list[np.ndarray], str]:
    """Positions to show, the frames there, and why they are grey."""
    near = sum(number < _LAST_FRAME for number in result.frames)
    reason = "the video is not at hand"
    if result.video is not None and near:
        try:
            reader = result.video if isinstance(result.video, VideoReader) else open_video(result.video)
            if reader.read_once:
                reason = "the video was read once"
            else:
                positions = _spread(near)
                numbers = [result.frames[position] for position in positions]
                return positions, list(read_frames(reader, size=(result.height, result.width), frames=numbers)), ""
        except (VideoError, OSError) as error:
            reason = str(error)
    positions = _spread(len(result.frames))
    ground = np.full((result.height, result.width, 3), _GROUND, np.uint8)
    return positions, [ground] * len(positions), f" (masks alone: {reason:.200})"


def _spread(count: int) -> list[int]:
    """Some of so many positions, from the first to the last."""
    return np.unique(np.linspace(0, count - 1, min(count, _PICTURES)).round().astype(int)).tolist()


def _figure(result: "VideoSegmentation", position: int, frame: np.ndarray) -> str:
    """A small picture of a frame with the tracks in it, one of a query."""
    from PIL import Image

    step = max(1, -(-result.width // _WIDTH))
    queries = dict[int, int]()  # the place of the best track of each
    for place, track in enumerate(result.tracks):
        queries.setdefault(track.query_id, place)
    tracks = [result.tracks[place] for place in queries.values()]
    masks = ((track, track.segmentations[position]) for track in tracks)
    seen = [(track, decode_mask(rle)[::step, ::step]) for track, rle in masks if rle is not None]
    small = np.asarray(Image.fromarray(frame).reduce(step))
    colors = track_colors(track.id for track, _ in seen)
    drawn = draw_tracks(small, [mask for _, mask in seen], colors, [""] * len(seen))
    file = io.BytesIO()
    Image.fromarray(drawn).save(file, "JPEG", quality=85)
    data = base64.b64encode(file.getvalue()).decode("ascii")
    number = result.frames[position]
    return (
        f'<figure style="margin:0"><img alt="frame {number}" src="data:image/jpeg;base64,{data}">'
        f"<figcaption>frame {number}</figcaption></figure>"
    )


def _table(result: "VideoSegmentation") -> str:
    rows = []
    shown = result.tracks[:_MOST_TRACKS]
    for track, color in zip(shown, track_colors(track.id for track in shown).tolist(), strict=True):
        swatch = f'<span style="color:rgb({color[0]},{color[1]},{color[2]})">&#9632;</span>'
        seen = f"{track.num_frames_visible}/{len(result.frames)}"
        cells = track.id, f"{track.label:.80}", f"{track.score:.3f}", f"{track.certainty:.3f}", seen
        rows.append(f"<tr><td>{swatch}</td>{''.join(f'<td>{escape(str(cell))}</td>' for cell in cells)}</tr>")
    if not rows:
        return ""
    heads = "".join(f"<th>{name}</th>" for name in ("", "id", "label", "score", "certainty", "frames"))
    more = len(result.tracks) - len(shown)
    note = f"<p>and {more} more</p>" if more else ""
    return f"<table><thead><tr>{heads}</tr></thead><tbody>{''.join(rows)}</tbody></table>{note}"

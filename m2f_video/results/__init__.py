"""What segmenting gives: tracks, their masks, drawings of them, and the files that hold them."""

from m2f_video.results.masks import Rle
from m2f_video.results.tracks import OVERLAY_FILE, TRACKS_FILE, Track, VideoSegmentation
from m2f_video.results.tracks_file import TRACKS_LINES_FILE

__all__ = ["OVERLAY_FILE", "TRACKS_FILE", "TRACKS_LINES_FILE", "Rle", "Track", "VideoSegmentation"]

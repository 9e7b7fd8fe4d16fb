"""What segmenting gives: tracks, their masks, drawings of them, and the files that hold them."""

from m2f_video.results.masks import Rle
from m2f_video.results.tracks import OVERLAY_FILE, TRACKS_FILE, Track, VideoSegmentation

__all__ = ["OVERLAY_FILE", "TRACKS_FILE", "Rle", "Track", "VideoSegmentation"]

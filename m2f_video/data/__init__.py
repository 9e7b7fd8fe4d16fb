"""Datasets of annotated videos: real, synthetic and made of images; clips of them, augmentation, checks."""

from m2f_video.data.annotations import DatasetError, Fault
from m2f_video.data.augment import Augmentation, AugmentConfig
from m2f_video.data.clip import AnnotatedVideo, AnnotatedVideos, Clip, ClipDataset, ClipSampling, sample_frames
from m2f_video.data.coco import CameraMotion, CocoVideos
from m2f_video.data.source import is_synthetic, open_dataset
from m2f_video.data.split import split_dataset
from m2f_video.data.synthetic import DIFFICULTIES, SHAPES, STANDARD_SPLITS, Difficulty, SyntheticVideos
from m2f_video.data.validate import DatasetReport, check_dataset
from m2f_video.data.write import write_youtube_vis, youtube_vis_annotations
from m2f_video.data.youtube_vis import YouTubeVis

__all__ = [
    "DIFFICULTIES",
    "SHAPES",
    "STANDARD_SPLITS",
    "AnnotatedVideo",
    "AnnotatedVideos",
    "AugmentConfig",
    "Augmentation",
    "CameraMotion",
    "Clip",
    "ClipDataset",
    "ClipSampling",
    "CocoVideos",
    "DatasetError",
    "DatasetReport",
    "Difficulty",
    "Fault",
    "SyntheticVideos",
    "YouTubeVis",
    "check_dataset",
    "is_synthetic",
    "open_dataset",
    "sample_frames",
    "split_dataset",
    "write_youtube_vis",
    "youtube_vis_annotations",
]

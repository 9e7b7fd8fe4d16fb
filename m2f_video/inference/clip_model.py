"""What inference asks of a model.

F frames, Q queries, K classes, C channels, H W height and width of the model's input.
"""

from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from m2f_video.config import VideoMask2FormerConfig
from m2f_video.modeling.video_mask2former import FrameFeatures


class ClipPrediction(Protocol):
    """What a model says of the objects of a clip."""

    @property
    def class_queries_logits(self) -> Tensor:
        """(1, Q, K+1); the last class is no-object."""

    @property
    def mask_embeddings(self) -> Tensor:
        """(1, Q, C); products with mask features are mask logits."""


@runtime_checkable
class ClipModel(Protocol):
    """A model in two halves: one sees frames in any chunks, one the clip as a whole.

    `VideoMask2Former` is one. Whatever else has these, such as an exported pair, can stand in. Where it has a
    `mask_product` too, called with embeddings (1, Q, C) and mask features (1, F, C, H/4, W/4), that gives the mask
    logits (1, Q, F, H/4, W/4); otherwise `m2f_video.modeling.transformer_decoder.MaskProduct` does. Where it is no
    `torch.nn.Module`, whose weights can be looked at, a text `fingerprint` may tell it from others.
    """

    @property
    def config(self) -> VideoMask2FormerConfig:
        """Labels, preprocessing, and whether clips are decoded jointly."""

    @property
    def device(self) -> torch.device:
        """Where frames are to be."""

    @property
    def dtype(self) -> torch.dtype:
        """Of the features."""

    def encode_frames(self, frames: Tensor) -> FrameFeatures:
        """Features of frames (F, 3, H, W), normalised."""

    def decode_clip(self, features: FrameFeatures, *, output_masks: bool) -> ClipPrediction:
        """Classes and mask embeddings of a clip; with `output_masks` false no masks are made."""

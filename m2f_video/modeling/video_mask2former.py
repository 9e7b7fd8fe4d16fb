"""Video Mask2Former, assembled (arXiv 2112.10764; arXiv 2112.01527, figure 2).

Two halves that can run apart: `encode_frames` sees frames one by one, `decode_clip` sees a clip as a whole.

B clips, T frames of a clip, Q queries, K classes, C channels, H W height and width of the input in pixels.
"""

import functools
import os
import warnings
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

import torch
from huggingface_hub import PyTorchModelHubMixin
from torch import Tensor, nn

from m2f_video.config import TRAINING_PARTS, VideoMask2FormerConfig
from m2f_video.hub import load_model, parse_dtype, warn_of_slow_dtype
from m2f_video.modeling.as_built import build_of, changes, recorded_config, tensors_of
from m2f_video.modeling.build import (
    Parts,
    build_backbone,
    build_pixel_decoder,
    build_transformer_decoder,
    exchange_modules,
    with_parts,
)
from m2f_video.modeling.taps import Taps, capture
from m2f_video.modeling.transformer_decoder import MaskProduct, Prediction
from m2f_video.partial_loading import warn_of_partial_loading
from weights_convert import staged_folder, write_checkpoint


@dataclass(frozen=True)
class FrameFeatures:
    """What `encode_frames` makes of F frames: all that the decoder needs of them.

    Attributes:
        mask_features: (F, mask_dim, H/4, W/4).
        multi_scale: strides 32, 16, 8, each (F, C, H_l, W_l).
        backbone_maps: strides 4, 8, 16, 32, each (F, C_i, H_i, W_i), when hidden states are asked for.
        encoder_layers: tokens (F, N, C) after each layer of the pixel decoder, when hidden states are asked for.
    """

    mask_features: Tensor
    multi_scale: tuple[Tensor, ...]
    backbone_maps: tuple[Tensor, ...] | None = None
    encoder_layers: tuple[Tensor, ...] | None = None

    @classmethod
    def concatenate(cls, parts: Sequence["FrameFeatures"]) -> "FrameFeatures":
        """Join features of consecutive frames, all of one size.

        Raises:
            ValueError: there are no parts, or they differ in size or in what they hold.
        """
        if not parts:
            raise ValueError("there are no frame features to concatenate")
        if len(parts) == 1:
            return parts[0]
        sizes = {tuple(part.mask_features.shape[1:]) for part in parts}
        if len(sizes) > 1:
            raise ValueError(f"frame features to concatenate must be of one size, got {sorted(sizes)}")
        if len({(part.backbone_maps is None, part.encoder_layers is None) for part in parts}) > 1:
            raise ValueError("frame features to concatenate must all hold hidden states, or none of them")

        def join(tuples: Sequence[tuple[Tensor, ...] | None]) -> tuple[Tensor, ...] | None:
            present = [maps for maps in tuples if maps is not None]
            return tuple(torch.cat(maps) for maps in zip(*present, strict=True)) if present else None

        return cls(
            torch.cat([part.mask_features for part in parts]),
            tuple(torch.cat(maps) for maps in zip(*(part.multi_scale for part in parts), strict=True)),
            join([part.backbone_maps for part in parts]),
            join([part.encoder_layers for part in parts]),
        )


@dataclass(frozen=True)
class VideoMask2FormerOutput:
    """Predictions for a batch of clips. With `temporal="per_frame"` every frame is a clip: B becomes B*T, and T 1.

    Attributes:
        class_queries_logits: (B, Q, K+1), the last column is "no object".
        masks_queries_logits: (B, Q, T, H/4, W/4); None where masks were not asked for.
        mask_embeddings: (B, Q, mask_dim), which multiplied with mask features give the mask logits.
        auxiliary: predictions at every depth, the learnable queries' first and the final ones last; with
            `output_auxiliary`.
        features: what the frame encoder made, backbone maps and encoder layers included; with `output_hidden`.
        queries: queries (B, Q, C) at every depth, before the prediction head's norm; with `output_hidden`.
        attention_masks: `attention_mask` of each decoder layer's mask logits, (B, Q, T*H_l*W_l) bool; with
            `output_hidden`.
    """

    class_queries_logits: Tensor
    masks_queries_logits: Tensor | None
    mask_embeddings: Tensor
    auxiliary: tuple[Prediction, ...] | None = None
    features: FrameFeatures | None = None
    queries: tuple[Tensor, ...] | None = None
    attention_masks: tuple[Tensor, ...] | None = None


for _output_type in (FrameFeatures, VideoMask2FormerOutput, Prediction):
    torch.export.register_dataclass(_output_type)


class VideoMask2Former(
    nn.Module,
    PyTorchModelHubMixin,
    library_name="m2f-video",
    tags=["video-instance-segmentation", "mask2former"],
    pipeline_tag="image-segmentation",
):
    """Video Mask2Former.

    Args:
        config: what to build; the weights are random. `from_pretrained` loads published ones.
        parts: modules of your own in the place of ours, by the names of `m2f_video.config.PARTS`: classes, or functions
            that make one, called with the keyword arguments of the class in whose place they stand; or by the name of
            any module in the model: what makes one of the one that is there. `loss` and `matcher` are no modules of
            the network: `Trainer(..., model=model)` finds them here. `config.parts` records what all are called.

    Raises:
        ConfigError: a part that there is no place for, or one that the config records and that is not given.
    """

    def __init__(self, config: VideoMask2FormerConfig, parts: Parts | None = None) -> None:
        if not isinstance(config, VideoMask2FormerConfig):
            raise TypeError(f"config must be a VideoMask2FormerConfig, got {type(config).__name__}")
        super().__init__()
        parts = parts or {}
        self.config = config = with_parts(config, parts, is_subclass=type(self) is not VideoMask2Former)
        self.backbone = build_backbone(config, parts)
        self.pixel_decoder = build_pixel_decoder(config, parts, self.backbone.channels)
        self.transformer_decoder = build_transformer_decoder(config, parts)
        exchange_modules(self, parts)
        self.training_parts: Parts = {name: parts[name] for name in TRAINING_PARTS if name in parts}
        self.as_built = build_of(self)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.transformer_decoder.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Floating-point type of the weights."""
        return next(self.transformer_decoder.parameters()).dtype

    @property
    def mask_product(self) -> MaskProduct:
        """What makes mask logits of mask embeddings and mask features."""
        return self.transformer_decoder.mask_product

    def forward(
        self,
        pixel_values: Tensor,
        output_auxiliary: bool = False,
        output_hidden: bool = False,
        frames_per_chunk: int | None = None,
    ) -> VideoMask2FormerOutput:
        """Segment a batch of clips.

        Args:
            pixel_values: (B, T, 3, H, W), normalised and padded as `VideoProcessor` does; cast to the model's dtype.
            output_auxiliary: also give the predictions at every depth. They need every layer's full masks; without
                them, only the last layer's are made and the attention works on resized mask features instead.
            output_hidden: also give the intermediate features, queries and attention masks.
            frames_per_chunk: encode this many frames at a time, to bound memory; None encodes all at once.

        Raises:
            ValueError: `pixel_values` of another shape, without frames, or not floating point; or `frames_per_chunk`
                below 1.
        """
        _check_pixel_values(pixel_values, ndim=5, layout="(B, T, 3, H, W)")
        if frames_per_chunk is not None and frames_per_chunk < 1:
            raise ValueError(f"frames_per_chunk must be at least 1, got {frames_per_chunk}")
        frames = pixel_values.flatten(0, 1)
        chunks = frames.split(frames_per_chunk or len(frames))
        features = FrameFeatures.concatenate([self.encode_frames(chunk, output_hidden) for chunk in chunks])
        return self.decode_clip(
            features, pixel_values.shape[1], output_auxiliary=output_auxiliary, output_hidden=output_hidden
        )

    def encode_frames(self, frames: Tensor, output_hidden: bool = False) -> FrameFeatures:
        """Backbone and pixel decoder: the per-frame half, in any chunks, so that frames must not see each other in it.

        Args:
            frames: (F, 3, H, W), normalised; cast to the model's dtype.
            output_hidden: keep the backbone maps and every encoder layer's tokens.

        Raises:
            ValueError: `frames` of another shape, without frames, or not floating point.
        """
        _check_pixel_values(frames, ndim=4, layout="(F, 3, H, W)")
        maps = self.backbone(frames.to(self.dtype))
        with torch.autocast(frames.device.type, enabled=False):  # as in the original, whose pixel decoder is float32
            decoded = self.pixel_decoder(tuple(level.to(self.dtype) for level in maps), output_hidden)
        return FrameFeatures(
            decoded.mask_features, decoded.multi_scale, maps if output_hidden else None, decoded.encoder_layers
        )

    def decode_clip(
        self,
        features: FrameFeatures,
        num_frames: int | None = None,
        output_auxiliary: bool = False,
        output_hidden: bool = False,
        output_masks: bool = True,
    ) -> VideoMask2FormerOutput:
        """Transformer decoder: the half that sees a whole clip.

        Args:
            features: of F frames, clip after clip.
            num_frames: frames T of each clip, so that B = F / T; None takes all frames as one clip.
            output_auxiliary: also give the predictions at every depth.
            output_hidden: also give features, queries and attention masks.
            output_masks: make mask logits of all queries; without them, multiply the mask embeddings of the queries
                you keep with `features.mask_features` yourself (`MaskProduct`).

        Raises:
            ValueError: F is not a multiple of `num_frames`.
        """
        F = features.mask_features.shape[0]
        T = F if num_frames is None else num_frames
        if T < 1 or F % T:
            raise ValueError(f"{F} frames do not make clips of {T} frames")
        if self.config.temporal == "per_frame":
            T = 1
        mask_features = features.mask_features.unflatten(0, (-1, T))
        multi_scale = tuple(level.unflatten(0, (-1, T)) for level in features.multi_scale)
        decoded = self.transformer_decoder(mask_features, multi_scale, output_auxiliary, output_hidden)
        masks = None
        if decoded.auxiliary is not None:
            masks = decoded.auxiliary[-1].masks_queries_logits
        elif output_masks:
            masks = self.mask_product(decoded.mask_embeddings, mask_features)
        return VideoMask2FormerOutput(
            decoded.class_queries_logits,
            masks,
            decoded.mask_embeddings,
            auxiliary=decoded.auxiliary,
            features=features if output_hidden else None,
            queries=decoded.queries,
            attention_masks=decoded.attention_masks,
        )

    def capture(
        self, *names: str, detach: bool = True, device: torch.device | str | None = None
    ) -> AbstractContextManager[Taps]:
        """Look at what modules compute while this model runs in a `with` block, in whatever way; results do not change.

            with model.capture("transformer_decoder.layers.*.cross_attn", "*.cross_attn.attention_weights") as taps:
                segment_video(model, "cars.mp4")
            taps["transformer_decoder.layers.3.cross_attn"]  # (1, Q, C)

        An output is what the module gives: a tensor, or tuples and dataclasses of such. Those of modules of backbone
        and pixel decoder are concatenated over the frames of a clip, in whatever chunks these were encoded.
        `taps.calls(name)` gives one for each clip, or call of another module; `taps[name]` the only one. What no
        forward returns is called by its module's name and one of these (`*` does not match these):

        - `cross_attn.attention_mask`: as `F.scaled_dot_product_attention` is told, bool (B, Q, S), or (B, M, Q, S)
          where heads differ, or what is added to products; None where a query attends everywhere.
        - `cross_attn.attention_weights`: (B, M, Q, S), before dropout; 4 M Q S bytes a clip: 21 MB a frame at stride 8
          of 480x864, 100 queries and 8 heads. Of `MaskPooling` the shares (B, Q, S) of pixels. `backbone...attn` too.
        - `layers.N.mask_logits` and `cross_attn.mask_logits`: (B, Q, S) of a layer, at the size of its level; None
          where there are none.
        - `pixel_decoder...self_attn.sampling_locations`: (F, N, M, L, P, 2) as (x, y), 0 and 1 being the outer edges.
        - `pixel_decoder...self_attn.sampling_weights`: (F, N, M, L, P).

        What is captured runs without a fused twin, as whatever is hooked; the rest stays fused. Calls by the thread
        that opened the block are captured.

        Args:
            names: of modules, as `named_modules` has them, or patterns as of `fnmatch`, whose `*` matches dots too.
            detach: give copies without gradients; otherwise what autograd knows, itself.
            device: where to put what is captured; None: where it is.

        Raises:
            ValueError: a name or pattern that matches nothing, or a compiled model (`torch.compile`).
            TapError: from `taps[name]`, see there.
        """
        return capture(self, *names, detach=detach, device=device)

    def prepare_for_inference(
        self, dtype: torch.dtype | str | None = None, compile: Literal["auto", "kernels", "model", "none"] = "auto"
    ) -> Self:
        """Do once, in place, what `segment_video` does for the length of a call; for inference, parameters are frozen.

        On a CPU fused twins take the place of modules, see `m2f_video.acceleration`: they have the same parameters, and
        copies of weights in the order that a kernel reads, as large again. Results stay equal to rounding. What is not
        as the twins know it, or is touched afterwards, moved or trained, runs as it is written;
        `m2f_video.acceleration.report(model)` tells which. Copies of the model are plain.

        Args:
            dtype: cast to this floating-point type; None keeps the weights' own.
            compile: what is compiled. `kernels` are our own in C++ for a CPU, for any size of video: up to 10 seconds
                in this call, once, and kept on disk for the next process. `none` has twins that need none of them.
                `model` lets `torch.compile` work on backbone, pixel decoder and transformer decoder each as a whole,
                which takes minutes with the first frame, and puts no twins in place. `auto` is `kernels` on a CPU where
                they compile, else `none`, and a line says so.

        Returns:
            This model, in evaluation mode.

        Raises:
            ValueError: an unknown dtype or way to compile, or `kernels` on another device than a CPU, or without a
                compiler.
            KernelError: `kernels` do not compile. The model is as it was then, as with the other errors.
        """
        from m2f_video.acceleration import cpu_kernels, prepare, release

        if compile not in ("auto", "kernels", "model", "none"):
            raise ValueError(f"compile must be auto, kernels, model or none, got {compile!r}")
        target_dtype = self.dtype if dtype is None else parse_dtype(dtype)
        if compile == "kernels":
            if self.device.type != "cpu":
                raise ValueError(
                    f"compile='kernels' is for a CPU, the model is on {self.device}; take 'model' or 'none'"
                )
            if reason := cpu_kernels.why_no_kernels():
                raise ValueError(f"compile='kernels' cannot be done: {reason}; or take 'none'")
            cpu_kernels.load()
        if target_dtype != self.dtype:  # else it was said when they became so
            warn_of_slow_dtype(target_dtype, self.device)
        release(self)
        self.eval().requires_grad_(False).to(dtype=target_dtype)
        for part in (self.backbone, self.pixel_decoder, self.transformer_decoder):
            part._compiled_call_impl = None  # what an earlier call has left
            if compile == "model":
                part.compile()
        if compile != "model":
            prepare(self, compile)
        return self

    @classmethod
    def from_pretrained(  # type: ignore[override]  # the mixin's extra arguments reach __init__, ours are named
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        *,
        config: VideoMask2FormerConfig | str | os.PathLike[str] | None = None,
        temporal: str | None = None,
        dtype: torch.dtype | str | None = None,
        device: torch.device | str | None = None,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        local_files_only: bool = False,
        force_download: bool = False,
        parts: Parts | None = None,
        partial: bool = False,
    ) -> Self:
        """Load a model from the hub, a folder or a file, in this project's or a foreign format.

        Args:
            pretrained_model_name_or_path: hub name (`owner/name`), folder with `config.json` and weights, file
                (`.safetensors`, `.bin`, `.pth`, `.pkl`), or `demo`, the small model inside the package. Transformers
                and detectron2 weights convert in memory.
            config: needed for a weight file without a `config.json` beside it; a config, the name of a preset, or a
                config file. It replaces the checkpoint's own.
            temporal: `joint` or `per_frame`; None reads it from the checkpoint. How frames are resized and padded is
                the checkpoint's own in either case.
            dtype: floating-point type of the weights, None for float32; `"bfloat16"` or `torch.bfloat16`.
            device: where to put the weights, None for the CPU.
            revision: branch, tag or commit on the hub.
            token: access token for the hub.
            cache_dir: folder of the hub's downloads.
            local_files_only: use what was downloaded before, never the network.
            force_download: download again.
            parts: modules of your own that the model was built with, as for `VideoMask2Former`. A checkpoint records
                their names, and none is ever imported by its name.
            partial: load what fits, and leave the rest of the model as it is initialised, at random; a warning has the
                table of what was done. `m2f_video.load_partially` says what fits, and gives the table for a model that
                is built already.

        Returns:
            The model in evaluation mode.

        Raises:
            FileNotFoundError: no such file or folder, and not a hub name.
            ConfigError: the config is missing or describes no model we can build.
            weights_convert.ConversionError: weights that cannot be read, are not finite, or do not fit the config; with
                `partial`, of which nothing fits.
            ValueError: an unknown dtype or device.
        """
        return load_model(
            functools.partial(cls, parts=parts) if parts else cls,
            pretrained_model_name_or_path,
            config=config,
            temporal=temporal,
            dtype=dtype,
            device=device,
            revision=revision,
            token=token,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
            force_download=force_download,
            check_first=not parts,
            partially=warn_of_partial_loading if partial else None,
        )

    def save_pretrained(self, save_directory: str | os.PathLike[str], **kwargs: Any) -> str | None:
        """Write `config.json`, `model.safetensors` and, where there is none, a model card `README.md`.

        Every file is written beside its place and then renamed, so that a failure leaves what was there before. Hooks,
        patched methods and settings such as `num_heads` of a layer cannot be saved, which a warning says. Of modules
        that were put into the model since it was built, and of a subclass, `config.json` records the names, as of
        `parts`: it loads with these given alone, or by the subclass.

        Args:
            save_directory: folder, made where missing.
            kwargs: of `PyTorchModelHubMixin.save_pretrained`, such as `push_to_hub=True` and `repo_id`.

        Raises:
            ValueError: a module keeps something else than tensors in the state dict.
        """
        if said := str(changes(self)):
            warnings.warn(
                f"the model is not what its config builds: {said}. Weights are saved; hooks, patches and settings "
                "cannot be, and are to be set again; modules of its own are to be given as parts={name: ...} when it "
                "is loaded",
                stacklevel=2,
            )
        with staged_folder(Path(save_directory), keep=["README.md"]) as staging:
            return super().save_pretrained(staging, **kwargs)

    def _save_pretrained(self, save_directory: Path) -> None:
        state_dict = {name: tensor.detach().cpu() for name, tensor in tensors_of(self).items()}
        write_checkpoint(save_directory, state_dict, recorded_config(self).to_dict())


def _check_pixel_values(pixels: Tensor, *, ndim: int, layout: str) -> None:
    if pixels.ndim != ndim or pixels.shape[-3] != 3 or 0 in pixels.shape:
        raise ValueError(f"frames must be {layout} and not empty, got {tuple(pixels.shape)}")
    if not pixels.is_floating_point():
        raise ValueError(f"frames must be floating point, got {pixels.dtype}; VideoProcessor normalises uint8 video")

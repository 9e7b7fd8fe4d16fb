"""Pixel decoders that the paper compares the deformable encoder with (arXiv 2112.01527, table 4e): feature pyramids.

One class for each row. All are called as the published one, `pixel_decoder(maps, output_hidden)`, and work frame by
frame. Convolutions are followed by the group norm that it has, and levels are resized bilinearly to the size of the
next one, as its own feature-pyramid step does: maps of frames of any size need not be halves of each other.

B frames, C channels, H W height and width of a level; levels are ordered coarse to fine, strides 32, 16, 8 and 4.
"""

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from m2f_video.modeling.maps import conv_norm, mask_projection, output_conv, resize
from m2f_video.modeling.pixel_decoder import Maps, PixelDecoderOutput
from m2f_video.modeling.position_encoding import position_dtype

NUM_LEVELS = 4
EPSILON = 1e-4  # of BiFPN's fusion (arXiv 1911.09070, section 3.3)


class BackboneProjections(nn.Module):
    """No pixel decoder: each of the backbone's maps is projected, and they never meet.

    The others build on it.

    Args:
        in_channels: channels of the backbone's maps at strides 4, 8, 16, 32.
        hidden_dim: width C of the multi-scale features.
        mask_dim: channels of the mask features.
    """

    def __init__(self, *, in_channels: tuple[int, ...], hidden_dim: int, mask_dim: int) -> None:
        super().__init__()
        self.lateral_convs = nn.ModuleList(conv_norm(channels, hidden_dim, 1) for channels in reversed(in_channels))
        self.mask_projection = mask_projection(hidden_dim, mask_dim)

    def forward(self, maps: Maps, output_hidden: bool = False) -> PixelDecoderOutput:
        """Decode the maps of a batch of frames.

        Args:
            maps: (B, C_i, H_i, W_i) at strides 4, 8, 16, 32.
            output_hidden: there is no encoder layer whose tokens could be kept.
        """
        laterals = tuple(conv(level) for conv, level in zip(self.lateral_convs, reversed(maps), strict=True))
        levels = self.fuse(laterals)
        mask_features = self.mask_projection(self.mask_source(levels))
        return PixelDecoderOutput(mask_features, levels[:-1], () if output_hidden else None)

    def fuse(self, laterals: Maps) -> Maps:
        """Let levels, each (B, C, H_l, W_l), see each other."""
        return laterals

    def mask_source(self, levels: Maps) -> Tensor:
        """What mask features are projected from: (B, C, H/4, W/4)."""
        return levels[-1]


class FeaturePyramid(BackboneProjections):
    """FPN (arXiv 1612.03144), as MaskFormer has it (arXiv 2107.06278, section 4.1).

    From coarse to fine, each level is the projected map plus the level before, smoothed by a 3x3 convolution.
    """

    def __init__(self, *, in_channels: tuple[int, ...], hidden_dim: int, mask_dim: int) -> None:
        super().__init__(in_channels=in_channels, hidden_dim=hidden_dim, mask_dim=mask_dim)
        self.output_convs = nn.ModuleList(output_conv(hidden_dim) for _ in range(NUM_LEVELS))

    def fuse(self, laterals: Maps) -> Maps:
        """Top-down."""
        levels = [self.output_convs[0](laterals[0])]
        for conv, lateral in zip(list(self.output_convs)[1:], laterals[1:], strict=True):
            levels.append(conv(lateral + resize(levels[-1], lateral)))
        return tuple(levels)


class SemanticFeaturePyramid(FeaturePyramid):
    """Semantic FPN (arXiv 1901.02446, figure 3): an FPN, of which all levels make the mask features.

    Each is brought to stride 4 by stages of a 3x3 convolution and upsampling by 2; what comes of them is summed.
    """

    def __init__(self, *, in_channels: tuple[int, ...], hidden_dim: int, mask_dim: int) -> None:
        super().__init__(in_channels=in_channels, hidden_dim=hidden_dim, mask_dim=mask_dim)
        self.stages = nn.ModuleList(
            nn.ModuleList(output_conv(hidden_dim) for _ in range(stages)) for stages in (3, 2, 1, 1)
        )

    def mask_source(self, levels: Maps) -> Tensor:
        """The sum of all levels; the finest has a convolution, too."""
        total = torch.zeros_like(levels[-1])
        for index, (x, stages) in enumerate(zip(levels, self.stages, strict=True)):
            for stage, finer in zip(cast("nn.ModuleList", stages), levels[index + 1 :] or levels[-1:], strict=True):
                x = resize(stage(x), finer)
            total = total + x
        return total


class FeatureSelection(nn.Module):
    """Adds to each channel of a map as much of it as its mean over the frame says (arXiv 2108.07058, section 3.2)."""

    def __init__(self, *, dim: int) -> None:
        super().__init__()
        self.importance = nn.Conv2d(dim, dim, kernel_size=1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        return x + x * self.importance(x.mean((2, 3), keepdim=True)).sigmoid()


class DeformableConv(nn.Conv2d):
    """Torchvision's, 3x3, in float32 at least: positions need the digits, and it has no kernel for bfloat16."""

    def __init__(self, *, dim: int) -> None:
        super().__init__(dim, dim, kernel_size=3, padding=1, bias=False)
        nn.init.kaiming_uniform_(self.weight, a=1)

    def forward(self, x: Tensor, offsets: Tensor) -> Tensor:  # type: ignore[override]
        """(B, C, H, W), by offsets (B, 2*9, H, W) in pixels, y before x -> (B, C, H, W)."""
        from torchvision.ops import deform_conv2d  # takes as long to load as PyTorch, and no other model needs it

        exact = position_dtype(x)
        output = deform_conv2d(x.to(exact), offsets.to(exact), self.weight.to(exact), padding=self.padding)
        return output.to(x.dtype)


class FeatureAlignment(nn.Module):
    """Moves what was upsampled to where the finer map has it (arXiv 2108.07058, section 3.1).

    A deformable 3x3 convolution, whose offsets are linear in the two; at first there are none.
    """

    def __init__(self, *, dim: int) -> None:
        super().__init__()
        self.offsets = nn.Conv2d(2 * dim, 2 * 9, kernel_size=3, padding=1)
        self.align = DeformableConv(dim=dim)
        for parameter in self.offsets.parameters():
            nn.init.zeros_(parameter)

    def forward(self, coarse: Tensor, lateral: Tensor) -> Tensor:
        """Two maps (B, C, H, W), the first upsampled -> (B, C, H, W)."""
        return self.align(coarse, self.offsets(torch.cat([lateral, coarse], dim=1)))


class AlignedFeaturePyramid(FeaturePyramid):
    """FaPN (arXiv 2108.07058): an FPN that weighs the channels of maps, and aligns what it upsamples with them."""

    def __init__(self, *, in_channels: tuple[int, ...], hidden_dim: int, mask_dim: int) -> None:
        super().__init__(in_channels=in_channels, hidden_dim=hidden_dim, mask_dim=mask_dim)
        for conv, channels in zip(self.lateral_convs, reversed(in_channels), strict=True):
            cast("nn.Sequential", conv).insert(0, FeatureSelection(dim=channels))
        self.alignments = nn.ModuleList(FeatureAlignment(dim=hidden_dim) for _ in range(NUM_LEVELS - 1))

    def fuse(self, laterals: Maps) -> Maps:
        """Top-down."""
        levels = [self.output_convs[0](laterals[0])]
        steps = zip(list(self.output_convs)[1:], self.alignments, laterals[1:], strict=True)
        for conv, align, lateral in steps:
            levels.append(conv(lateral + align(resize(levels[-1], lateral), lateral)))
        return tuple(levels)


class WeightedFusion(nn.Module):
    """Fast normalized fusion of maps and a depthwise separable convolution (arXiv 1911.09070, section 3.3)."""

    def __init__(self, *, dim: int, num_inputs: int) -> None:
        super().__init__()
        self.weights = nn.Parameter(torch.ones(num_inputs))
        self.depthwise = nn.Conv2d(dim, dim, kernel_size=3, padding=1, groups=dim, bias=False)
        self.pointwise = conv_norm(dim, dim, kernel_size=1).append(nn.SiLU(inplace=True))

    def forward(self, *levels: Tensor) -> Tensor:
        """Maps (B, C, H, W) -> (B, C, H, W)."""
        weights = self.weights.relu()
        weights = weights / (weights.sum() + EPSILON)
        fused = torch.stack([weight * level for weight, level in zip(weights, levels, strict=True)]).sum(0)
        return self.pointwise(self.depthwise(fused))


class BidirectionalLayer(nn.Module):
    """One BiFPN layer (arXiv 1911.09070, section 3.3): top-down, and bottom-up with what came in once more."""

    def __init__(self, *, dim: int) -> None:
        super().__init__()
        self.top_down = nn.ModuleList(WeightedFusion(dim=dim, num_inputs=2) for _ in range(NUM_LEVELS - 1))
        self.bottom_up = nn.ModuleList(WeightedFusion(dim=dim, num_inputs=inputs) for inputs in (3, 3, 2))

    def forward(self, levels: Maps) -> Maps:
        """Levels, each (B, C, H_l, W_l), coarse to fine -> as many of the same shapes."""
        down = [levels[0]]
        for fusion, level in zip(self.top_down, levels[1:], strict=True):
            down.append(fusion(level, resize(down[-1], level)))
        up = [down[-1]]
        inputs = [*zip(levels[-2:0:-1], down[-2:0:-1], strict=True), (levels[0],)]  # fine to coarse
        for fusion, maps in zip(self.bottom_up, inputs, strict=True):
            up.append(fusion(*maps, F.adaptive_max_pool2d(up[-1], maps[0].shape[-2:])))
        return tuple(reversed(up))


class BidirectionalFeaturePyramid(BackboneProjections):
    """BiFPN (arXiv 1911.09070).

    Args:
        in_channels: channels of the backbone's maps at strides 4, 8, 16, 32.
        hidden_dim: width C of the multi-scale features.
        mask_dim: channels of the mask features.
        num_layers: times that it goes down and up.
    """

    def __init__(self, *, in_channels: tuple[int, ...], hidden_dim: int, mask_dim: int, num_layers: int) -> None:
        super().__init__(in_channels=in_channels, hidden_dim=hidden_dim, mask_dim=mask_dim)
        self.layers = nn.ModuleList(BidirectionalLayer(dim=hidden_dim) for _ in range(num_layers))

    def fuse(self, laterals: Maps) -> Maps:
        """Layer after layer."""
        levels = laterals
        for layer in self.layers:
            levels = layer(levels)
        return levels

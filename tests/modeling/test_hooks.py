"""Hooks see every module that is called, with its gradients, and change nothing."""

import re
import warnings

import pytest
import torch
from torch import Tensor, nn

from m2f_video import VideoMask2Former
from m2f_video.config import PixelDecoderConfig, SwinConfig, TransformerDecoderConfig, VideoMask2FormerConfig

CONFIG = VideoMask2FormerConfig(
    backbone=SwinConfig(embed_dim=16, depths=(2, 1, 1, 1), num_heads=(1, 2, 4, 8), window_size=4, drop_path_rate=0.0),
    pixel_decoder=PixelDecoderConfig(hidden_dim=32, mask_dim=32, num_layers=1, ffn_dim=64, num_heads=4, num_points=2),
    # another width than the pixel decoder's, so that the levels are projected
    transformer_decoder=TransformerDecoderConfig(hidden_dim=64, num_queries=5, num_layers=3, num_heads=4, ffn_dim=64),
    labels=("cat", "dog"),
)
BACKBONES = {"": CONFIG, "timm ": CONFIG.replace(backbone="timm:test_resnet")}
NEVER_CALLED = (nn.ModuleList, nn.Embedding)
"""Kinds of modules that only hold what others call or read."""


def build(backbone: str) -> VideoMask2Former:
    torch.manual_seed(0)
    return VideoMask2Former(BACKBONES[backbone]).train()


def learn(model: VideoMask2Former) -> dict[str, Tensor]:
    """Gradients of what all modules have a share in."""
    pixels = torch.randn(1, 2, 3, 64, 64, generator=torch.Generator().manual_seed(1), requires_grad=True)
    predictions = model(pixels, output_auxiliary=True).auxiliary or ()
    parts = [logits for each in predictions for logits in (each.class_queries_logits, each.masks_queries_logits)]
    torch.stack([logits.square().mean() for logits in parts]).sum().backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.fixture(scope="module")
def expected() -> dict[str, dict[str, Tensor]]:
    return {backbone: learn(build(backbone)) for backbone in BACKBONES}


def places() -> list[tuple[str, str]]:
    """One module of each place: of layers and stages that are alike, the first. timm's modules are its own."""
    names = [name for name, module in build("").named_modules() if not isinstance(module, NEVER_CALLED)]
    kinds = {re.sub(r"(layers|stages)\.\d", r"\1", name): name for name in reversed(names)}
    return [*(("", name) for name in kinds.values()), ("timm ", "backbone")]


@pytest.mark.parametrize(("backbone", "name"), places())
def test_backward_hooks(backbone: str, name: str, expected: dict[str, dict[str, Tensor]]) -> None:
    model, seen = build(backbone), []
    module = model.get_submodule(name)
    module.register_full_backward_hook(lambda _, inputs, outputs: seen.append((inputs, outputs)))
    module.register_full_backward_pre_hook(lambda _, outputs: seen.append((outputs,)))
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        found = learn(model)
    if any("output should be a Tensor or a tuple" in str(warning.message) for warning in said):
        assert name in ("", "pixel_decoder", "transformer_decoder")  # PyTorch knows no dataclasses, and says so
    else:
        assert len(seen) >= 2
        assert all(isinstance(gradient, Tensor) for outputs in seen for gradient in outputs[-1])
    assert found.keys() == expected[backbone].keys()
    for key, gradient in found.items():
        torch.testing.assert_close(gradient, expected[backbone][key], msg=lambda text, key=key: f"{key}: {text}")


def test_what_a_forward_hook_keeps_stays_as_it_was() -> None:
    model, kept = build(""), []

    def keep(module: nn.Module, inputs: tuple[object, ...], output: object) -> None:
        if isinstance(output, Tensor):
            kept.append((type(module).__name__, output, output.detach().clone()))

    for module in model.modules():
        module.register_forward_hook(keep)
    learn(model)
    assert len(kept) > 50
    for kind, output, copy in kept:
        assert torch.equal(output, copy), kind

"""The per-frame model against the numbers of the transformers image model with the same weights."""

import pytest
import torch
from torch import Tensor, nn

from m2f_video.config import VideoMask2FormerConfig
from m2f_video.modeling.transformer_decoder import resize_frames
from m2f_video.modeling.video_mask2former import VideoMask2Former
from tests.golden_files import HF_BATCHES, load_hf_outputs, read_info, unpack_bools
from tests.tolerances import differences


@pytest.fixture(scope="module")
def image_model(tiny_config: VideoMask2FormerConfig, tiny_model: VideoMask2Former) -> VideoMask2Former:
    model = VideoMask2Former(tiny_config.replace(temporal="per_frame"))
    model.load_state_dict(tiny_model.state_dict())
    return model.eval()


def stages(model: VideoMask2Former, images: Tensor) -> dict[str, Tensor]:
    """Every stage for images (F, 3, H, W), under the names of the golden file."""
    normed: list[Tensor] = []

    def keep(_module: nn.Module, _inputs: object, output: Tensor) -> None:
        normed.append(output.transpose(0, 1))

    hook = model.transformer_decoder.norm.register_forward_hook(keep)
    with torch.inference_mode():
        output = model(images[None], output_auxiliary=True, output_hidden=True)
    hook.remove()

    features = output.features
    ours = {"pixel_values": images, "mask_features": features.mask_features}
    ours |= {f"backbone.{index}": level for index, level in enumerate(features.backbone_maps)}
    ours |= {f"pixel_encoder.layer{index}": tokens for index, tokens in enumerate(features.encoder_layers)}
    ours |= {f"multi_scale.{index}": level for index, level in enumerate(features.multi_scale)}
    for index, prediction in enumerate(output.auxiliary):
        masks = prediction.masks_queries_logits
        prefix = f"aux.{index}." if index < 3 else ""
        ours[f"{prefix}class_queries_logits"] = prediction.class_queries_logits
        ours[f"{prefix}masks_queries_logits"] = masks[:, :, 0]
        size = features.multi_scale[index % 3].shape[-2:]
        ours[f"attn_mask_raw.{index}"] = (resize_frames(masks, size) < 0).flatten(2)
        ours[f"decoder_hidden.{index}"] = output.queries[index].transpose(0, 1)
        ours[f"intermediate_normed.{index}"] = normed[index]
    ours["transformer_decoder_last_hidden_state"] = output.queries[-1]
    return ours


@pytest.mark.parametrize("batch", HF_BATCHES)
def test_every_stage_equals_transformers(image_model: VideoMask2Former, batch: str) -> None:
    tensors = unpack_bools(load_hf_outputs(), read_info("hf")["bool_shapes"])
    golden = {
        name.removeprefix(f"{batch}."): tensor for name, tensor in tensors.items() if name.startswith(f"{batch}.")
    }
    assert differences(stages(image_model, golden["pixel_values"]), golden) == {}

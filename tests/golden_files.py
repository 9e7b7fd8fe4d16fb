"""The golden numbers in tests/golden, with what was left out of the files put back (see the README there)."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

GOLDEN = Path(__file__).parent / "golden"
TINY_CASES = ("a", "b", "c")
HF_BATCHES = ("p96", "u70x90")
PIXEL_MEAN, PIXEL_STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)


def read_info(folder: str) -> dict[str, Any]:
    return json.loads((GOLDEN / folder / "info.json").read_text())


def original_weights() -> dict[str, Tensor]:
    """The tiny model's, under the original's names."""
    return load_file(GOLDEN / "tiny" / "weights.safetensors")


def load_tiny_case(case: str) -> dict[str, Tensor]:
    """Every tensor of one run of the original, boolean ones still packed."""
    info, weights = read_info("tiny")["cases"][case], original_weights()
    tensors = load_file(GOLDEN / "tiny" / f"case_{case}.safetensors")
    mean, std = torch.tensor(PIXEL_MEAN).view(3, 1, 1), torch.tensor(PIXEL_STD).view(3, 1, 1)
    normalised = (tensors["input.raw_uint8"].float() - mean) / std
    (height, width), (padded_height, padded_width) = info["raw_size"], info["padded_size"]
    tensors["input.normalised"] = normalised
    tensors["input.padded"] = torch.nn.functional.pad(normalised, (0, padded_width - width, 0, padded_height - height))
    levels = _levels(tensors["encoder.layer1"], (padded_height, padded_width))
    tensors["decoder.0.query"] = weights["sem_seg_head.predictor.query_feat.weight"][:, None]
    for index, level in enumerate(levels):
        embedding = weights["sem_seg_head.predictor.level_embed.weight"][index]
        tensors[f"pixel_decoder.multi_scale.{index}"] = level
        tensors[f"decoder.{index}.memory"] = (level.flatten(2) + embedding[:, None]).permute(0, 2, 1).reshape(-1, 1, 64)
        tensors[f"decoder.{index + 1}.query"] = tensors[f"decoder.{index}.after_ffn"]
    return tensors


def load_hf_outputs() -> dict[str, Tensor]:
    """Every tensor of the two batches of the transformers model, boolean ones still packed."""
    tensors = load_file(GOLDEN / "hf" / "outputs.safetensors")
    tensors["p96.pixel_values"] = load_tiny_case("c")["input.padded"]
    tensors["u70x90.pixel_values"] = load_file(GOLDEN / "tiny" / "backbone_unpadded_70x90.safetensors")["input"]
    queries = original_weights()["sem_seg_head.predictor.query_feat.weight"]
    for batch in HF_BATCHES:
        levels = _levels(tensors[f"{batch}.pixel_encoder.layer1"], tensors[f"{batch}.pixel_values"].shape[-2:])
        tensors |= {f"{batch}.multi_scale.{index}": level for index, level in enumerate(levels)}
        tensors[f"{batch}.decoder_hidden.0"] = queries[:, None].expand(-1, 2, -1)
        last = tensors[f"{batch}.decoder_hidden.3"]
        tensors[f"{batch}.transformer_decoder_last_hidden_state"] = last.transpose(0, 1)
    return tensors


def load_swin_blocks() -> dict[str, Tensor]:
    """Two-block Swin stages, `{case}.{name}`."""
    tensors = load_file(GOLDEN / "ops" / "swin_blocks_ws4.safetensors")
    tensors |= load_file(GOLDEN / "ops" / "swin_blocks_ws5_ws7.safetensors")
    for case, info in read_info("ops")["swin"].items():
        tensors[f"{case}.output"] = tensors[f"{case}.block1.out"]
        tensors[f"{case}.relative_position_index"] = tensors[f"ws{info['window']}.relative_position_index"]
    return {name: tensor for name, tensor in tensors.items() if name.split(".")[0] in read_info("ops")["swin"]}


def unpack_bools(tensors: Mapping[str, Tensor], shapes: Mapping[str, list[int]]) -> dict[str, Tensor]:
    """With every packed boolean tensor `X.packed` replaced by `X`: bits in C order, the highest of a byte first."""
    unpacked = {name: tensor for name, tensor in tensors.items() if not name.endswith(".packed")}
    for name, shape in shapes.items():
        bits = (tensors[f"{name}.packed"][:, None] >> torch.arange(7, -1, -1)) & 1
        unpacked[name] = bits.flatten()[: torch.Size(shape).numel()].bool().view(shape)
    return unpacked


def sha256(tensors: Mapping[str, Tensor]) -> str:
    """Of names, dtypes, shapes and bytes."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()


def _levels(tokens: Tensor, size: tuple[int, int]) -> list[Tensor]:
    """Tokens (B, N, C) of strides 32, 16, 8, as (B, C, H, W) each."""
    shapes = [(-(-size[0] // stride), -(-size[1] // stride)) for stride in (32, 16, 8)]
    parts = tokens.split([height * width for height, width in shapes], dim=1)
    return [part.transpose(1, 2).unflatten(2, shape) for part, shape in zip(parts, shapes, strict=True)]

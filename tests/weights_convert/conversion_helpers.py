"""Golden files and a comparison, for the tests of the converter."""

import json
from pathlib import Path
from typing import Any

import torch

GOLDEN = Path(__file__).parent.parent / "golden"
StateDict = dict[str, torch.Tensor]

NATIVE_CONFIG: dict[str, Any] = {
    "model_type": "m2f-video",
    "format_version": 1,
    "backbone": {
        "type": "swin",
        "embed_dim": 16,
        "depths": [1, 1, 2, 1],
        "num_heads": [1, 2, 4, 8],
        "window_size": 4,
        "mlp_ratio": 4.0,
        "qkv_bias": True,
        "drop_path_rate": 0.0,
    },
    "pixel_decoder": {
        "hidden_dim": 64,
        "mask_dim": 64,
        "num_layers": 2,
        "ffn_dim": 1024,
        "num_heads": 8,
        "num_points": 4,
        "dropout": 0.0,
    },
    "transformer_decoder": {"hidden_dim": 64, "num_queries": 10, "num_layers": 3, "num_heads": 8, "ffn_dim": 128},
    "temporal": "joint",
    "labels": ["person", "panda", "lizard", "parrot", "skateboard"],
    "preprocessing": {
        "shortest_edge": 480,
        "longest_edge": 1333,
        "fixed_size": None,
        "size_divisor": 32,
        "fit": "pad",
        "image_mean": [0.485, 0.456, 0.406],
        "image_std": [0.229, 0.224, 0.225],
    },
}


def read_golden(name: str) -> Any:
    return json.loads((GOLDEN / name).read_text())


def assert_same(left: StateDict, right: StateDict) -> None:
    """Same keys, and tensors of the same dtype, shape and bits."""
    assert left.keys() == right.keys()
    for key, tensor in left.items():
        assert tensor.dtype == right[key].dtype, key
        assert torch.equal(tensor, right[key]), key


def named(original: StateDict, column: int) -> StateDict:
    """The original weights under the names of a column of the golden pair list, which this package has no part in."""
    named: StateDict = {}
    for row in read_golden("hf/original_to_hf_keys.json"):
        source, target, note = original[row[0]], row[column], row[3]
        if target is not None:
            chunk = next((at for at, part in enumerate("qkv") if f"chunk '{part}'" in note), None)
            named[target] = source if chunk is None else source.chunk(3)[chunk].clone()
    return named

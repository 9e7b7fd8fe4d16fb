"""Golden inputs: the tiny original weights, and the same weights under both hf namings by an independent pair list."""

import copy
from typing import Any

import pytest
import torch
from conversion_helpers import GOLDEN, NATIVE_CONFIG, StateDict, named
from safetensors.torch import load_file


@pytest.fixture(scope="session")
def original() -> StateDict:
    return load_file(GOLDEN / "tiny/weights.safetensors")


@pytest.fixture(scope="session")
def hf_old(original: StateDict) -> StateDict:
    """As published: with the index buffers."""
    stages = "model.pixel_level_module.encoder.encoder.layers."
    buffers = {
        key.replace("backbone.layers.", stages).replace("attn.", "attention.self."): tensor
        for key, tensor in original.items()
        if key.endswith("relative_position_index")
    }
    return named(original, 2) | buffers


@pytest.fixture(scope="session")
def hf_current(original: StateDict) -> StateDict:
    extra = "model.pixel_level_module.encoder.swin.layernorm."
    return named(original, 1) | {extra + "weight": torch.ones(128), extra + "bias": torch.zeros(128)}


@pytest.fixture
def config() -> dict[str, Any]:
    return copy.deepcopy(NATIVE_CONFIG)

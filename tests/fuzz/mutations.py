"""Damage of every kind to bytes and to parsed JSON, drawn from a generator: the same seed gives the same mutants."""

import copy
import json
import random
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

NUMBERS = (0, 1, -1, 2, 255, 256, 2**15, 2**31 - 1, 2**31, 2**32, 2**53 + 1, 2**63 - 1, -(2**63), 0.5, -0.0, 1e9, 1e308)
WORDS = ("", "0", "a", "../x", "/etc/hostname", "\x00", "\x1b[2J", "\ud800", "x" * 5000, "null", "timm:resnet5000", "é")
SHAPES: tuple[Any, ...] = ([], {}, [[]], [None], {"": None}, [0] * 300, [None] * 5000, [[[1, 2, 3, 4, 5, 6]]])
RAW = ("1e999", "-1e999", "NaN", "Infinity", "1" + 400 * "0", 5000 * "9", 2000 * "[" + 2000 * "]", 3000 * '{"a":')
"""JSON texts that no parsed value stands for."""
TENSORS: tuple[Callable[[Tensor], Any], ...] = (
    *(lambda x: x[None], lambda x: x.flatten()[:1], lambda x: x.flatten()[:0]),
    *(lambda x: x.new_zeros(1).expand(1 << 50), lambda x: x * torch.nan, lambda x: x.to("meta")),
    *(lambda x: x.tolist(), lambda x: torch.nn.Parameter(x, requires_grad=False)),
    *(Tensor.long, Tensor.double, Tensor.half, Tensor.bool, Tensor.to_sparse),
)
"""What may be in the place of a tensor."""


_NAMES = (
    *(b"numpy ndarray", b"numpy dtype", b"numpy._core.multiarray _reconstruct", b"torch._utils _rebuild_tensor_v2"),
    *(b"collections OrderedDict", b"collections Counter", b"builtins set", b"os system"),
)
_OPERATIONS = (
    *(b"(", b")", b"]", b"}", b"N", b"\x88", b"\x8f", b"K\x05", b"J\xff\xff\xff\x7f", b"G\x7f\xf0" + bytes(6)),
    *(b"X\x05\0\0\0model", b"U\x03abc", b"\x8a\x0a" + b"\xff" * 9 + b"\x7f"),  # texts, and a long integer
    *(b"t", b"l", b"d", b"s", b"u", b"a", b"e", b"\x85", b"\x86", b"\x87", b"\x90", b"\x91", b"2\x86", b"]2a"),
    *(b"0", b"1", b"2", b"\x94", b"h\0", b"Q", b"R", b"b", b"\x81"),
    *(b"c" + name.replace(b" ", b"\n") + b"\n" for name in _NAMES),
)
"""Of pickles: containers, numbers, texts, what fills containers, the stack and the memo, calls."""


def mutate_bytes(data: bytes, rng: random.Random) -> bytes:
    """One to four damages: flipped, removed, inserted, repeated, zeroed or exchanged parts, or an early end."""
    mutant = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        start = rng.randrange(len(mutant) + 1) if rng.random() < 0.5 else rng.randrange(min(len(mutant), 512) + 1)
        length = rng.choice((1, 1, 2, 4, 8, 64, 1024))
        kind = rng.randrange(8)
        if kind == 0 and mutant:
            mutant[start % len(mutant)] ^= 1 << rng.randrange(8)
        elif kind == 1:
            del mutant[start : start + length]
        elif kind == 2:
            mutant[start:start] = rng.randbytes(length)
        elif kind == 3:
            mutant[start:start] = mutant[start : start + length] * rng.choice((1, 2, 50))
        elif kind == 4:
            mutant[start : start + length] = bytes(len(mutant[start : start + length]))
        elif kind == 5:
            mutant[start : start + 4] = rng.choice((2**31 - 1, 2**32 - 1, 0, 1, 2**24)).to_bytes(
                4, rng.choice(("big", "little"))
            )
        elif kind == 6:
            mutant[start : start + length] = b"\xff" * length
        else:
            del mutant[start:]
    return bytes(mutant)


def random_pickle(rng: random.Random) -> bytes:
    """A program of the operations that build containers, tensors and nests, in any order, some of them very often."""
    program = b"\x80\x04"
    for _ in range(rng.randint(1, 40)):
        program += rng.choice(_OPERATIONS) * rng.choice((1, 1, 1, 1, 1, 1, 60, 3000))
    return program + b"."


def mutate_json(value: Any, rng: random.Random) -> bytes:
    """A text in which one to three places hold something else, are gone, or are there twice."""
    mutant = copy.deepcopy(value)
    raw: dict[str, str] = {}
    for _ in range(rng.randint(1, 3)):
        place = _a_place(mutant, rng)
        if place is None:
            break
        (parent, key), kind = place, rng.randrange(8)
        if kind == 0:
            del parent[key]
        elif kind == 1 and isinstance(parent, list):
            parent.insert(key, copy.deepcopy(parent[key]))
        elif kind == 2:
            parent[key] = [parent[key]]
        elif kind == 3:
            mark = f"@{len(raw)}@"
            raw[json.dumps(mark)] = rng.choice(RAW)
            parent[key] = mark
        else:
            pool: Any = rng.choice((NUMBERS, WORDS, SHAPES, (None, True, False)))
            parent[key] = copy.deepcopy(rng.choice(pool))
    text = json.dumps(mutant)
    for mark, replacement in raw.items():
        text = text.replace(mark, replacement)
    return text.encode()


def mutate_state(value: dict[str, Any], rng: random.Random) -> dict[str, Any]:
    """A state as PyTorch saves it in which one to three places hold something else, are gone, or have another name."""
    mutant = _copied(value)
    for _ in range(rng.randint(1, 3)):
        place = _a_place(mutant, rng)
        if place is None:
            break
        (parent, key), kind = place, rng.randrange(4)
        old = parent[key]
        if kind == 0:
            del parent[key]
        elif kind == 1 and isinstance(parent, dict):
            parent[rng.choice((*WORDS[:5], *NUMBERS[:6]))] = parent.pop(key)
        elif kind == 2 and isinstance(old, Tensor):
            parent[key] = rng.choice(TENSORS)(old)
        else:
            pool: Any = rng.choice((NUMBERS, WORDS[:6], SHAPES, (None, True, float("nan")), (torch.zeros(2),)))
            parent[key] = copy.deepcopy(rng.choice(pool))
    return mutant


def _copied(value: Any) -> Any:
    """With containers of its own, and the same tensors."""
    if isinstance(value, dict):
        return {key: _copied(item) for key, item in value.items()}
    return [_copied(item) for item in value] if isinstance(value, list) else value


def _a_place(value: Any, rng: random.Random) -> tuple[Any, Any] | None:
    """A container somewhere inside and a key of it: as often high up, where there are few, as deep down."""
    places = list(_places(value))
    if not places:
        return None
    depth = rng.choice(sorted({len(path) for path in places}))
    path = rng.choice([path for path in places if len(path) == depth])
    for key in path[:-1]:
        value = value[key]
    return value, path[-1]


def _places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    if isinstance(value, dict | list):
        for key in value if isinstance(value, dict) else range(len(value)):
            yield (*path, key)
            yield from _places(value[key], (*path, key))

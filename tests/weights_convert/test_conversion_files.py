"""Checkpoint files of every kind are read safely, and written whole or not at all."""

import argparse
import collections
import contextlib
import json
import os
import pathlib
import pickle
import shutil
import struct
import subprocess
import sys
import zipfile

import numpy as np
import pytest
import torch
from conversion_helpers import GOLDEN, assert_same
from safetensors.torch import load_file, save_file

from weights_convert import (
    CheckpointError,
    ConversionError,
    read_checkpoint,
    read_torch_file,
    to_native,
    write_checkpoint,
)
from weights_convert.pickles import _ALLOWED, _CONSTANTS

WEIGHTS = GOLDEN / "tiny/weights.safetensors"
CANARY = "executed"


def dump(path, content, **options):
    path.write_bytes(pickle.dumps(content, **options))
    return path


def arrays(state_dict):
    return {key: tensor.numpy() for key, tensor in state_dict.items()}


def renamed(data: bytes, old: bytes, new: bytes) -> bytes:
    """A pickle (of protocol 2) with the name of a module changed."""
    return data.replace(b"c" + old + b"\n", b"c" + new + b"\n")


# ---- kinds of files ----


def test_safetensors_file(original):
    checkpoint = read_checkpoint(WEIGHTS)
    assert_same(checkpoint.state_dict, original)
    assert (checkpoint.format, checkpoint.config, checkpoint.preprocessor) == ("detectron2", None, None)


@pytest.mark.parametrize("protocol", range(6))
def test_pickle_of_arrays(original, tmp_path, protocol):
    """As the original checkpoints: arrays under ``model``, beside other things."""
    other = {"__author__": "someone", "matching_heuristics": True, "tags": {"a", "b"}, "none": (None, 1.5, b"")}
    path = dump(tmp_path / "model_final.pkl", {"model": arrays(original)} | other, protocol=protocol)
    assert_same(read_checkpoint(str(path)).state_dict, original)


def test_pickle_of_numpy_1_and_of_python_2(original, tmp_path):
    data = pickle.dumps({"model": arrays(original)}, protocol=2)
    older = renamed(data, b"numpy._core.multiarray", b"numpy.core.multiarray")
    assert older != data
    (tmp_path / "a.pkl").write_bytes(older)
    assert_same(read_checkpoint(tmp_path / "a.pkl").state_dict, original)
    # Python 2 wrote bytes as they are: U is its opcode for a short byte string
    raw = np.arange(3, dtype="<f4").tobytes()
    text = (
        b"\x80\x02}U\x14backbone.norm0.weightcnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R"
        b"(K\x01K\x03\x85cnumpy\ndtype\nU\x02f4K\x00K\x01\x87R(K\x03U\x01<NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
        b"\x89U" + bytes([len(raw)]) + raw + b"tbs."
    ).replace(b"U\x14backbone.norm0.weight", b"U\x20backbone.layers.0.norm.weightxxx")
    (tmp_path / "b.pkl").write_bytes(text)
    (key,) = (state_dict := read_checkpoint(tmp_path / "b.pkl").state_dict)
    assert torch.equal(state_dict[key], torch.tensor([0.0, 1.0, 2.0]))


def test_pickle_of_unusual_arrays(tmp_path):
    content = {
        "backbone.layers.a": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
        "backbone.layers.b": np.arange(3, dtype=">f4"),
        "backbone.layers.c": np.float16(2.5),
        "backbone.layers.d": np.zeros((0, 2), dtype=np.int32),
        "backbone.layers.e": np.array([True, False]),
        "backbone.layers.f": np.arange(12, dtype=np.uint8).reshape(3, 4)[:, ::2],
    }
    for protocol in (2, 5):
        state_dict = read_checkpoint(dump(tmp_path / "a.pkl", content, protocol=protocol)).state_dict
        for key, array in content.items():
            assert state_dict[key].numpy().dtype == array.dtype.newbyteorder("=")
            assert np.array_equal(state_dict[key].numpy(), array)
            assert state_dict[key].shape == array.shape


def test_pickle_of_tensors(original, tmp_path):
    state_dict = torch.nn.Linear(2, 2).state_dict()  # an OrderedDict with an attribute
    tensors = collections.OrderedDict({"sem_seg_head." + key: value for key, value in state_dict.items()})
    tensors._metadata = state_dict._metadata
    tensors["sem_seg_head.t"] = torch.arange(6.0).reshape(2, 3).T
    tensors["sem_seg_head.half"] = torch.nn.Parameter(torch.ones(2, dtype=torch.bfloat16))
    read = read_checkpoint(dump(tmp_path / "a.pkl", {"state_dict": tensors}))
    assert_same(read.state_dict, {key: tensor.detach() for key, tensor in tensors.items()})


@pytest.mark.parametrize("suffix", [".pth", ".pkl", ".bin", ".safetensors"])
@pytest.mark.parametrize("zipped", [True, False])
def test_torch_file_under_any_name(original, tmp_path, suffix, zipped):
    path = tmp_path / f"model{suffix}"
    content = {"model": original, "optimizer": {"state": {}, "param_groups": [{"lr": 0.1}]}, "iteration": 3}
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    assert_same(read_checkpoint(path).state_dict, original)


def test_other_kinds_under_the_wrong_name(original, tmp_path):
    shutil.copy(WEIGHTS, tmp_path / "a.pkl")
    assert_same(read_checkpoint(tmp_path / "a.pkl").state_dict, original)
    assert_same(read_checkpoint(dump(tmp_path / "b.pth", arrays(original))).state_dict, original)


def test_nested_state_dicts_are_unwrapped(original, tmp_path):
    torch.save({"model": {"state_dict": original}}, tmp_path / "a.pth")
    assert_same(read_checkpoint(tmp_path / "a.pth").state_dict, original)


# ---- folders ----


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_folder(hf_old, tmp_path, name):
    save_file(hf_old, tmp_path / name) if name.endswith("safetensors") else torch.save(hf_old, tmp_path / name)
    assert read_checkpoint(tmp_path).config is None
    (tmp_path / "config.json").write_text('{"model_type": "mask2former"}')
    (tmp_path / "preprocessor_config.json").write_text('{"size_divisor": 32}')
    checkpoint = read_checkpoint(tmp_path)
    assert_same(checkpoint.state_dict, hf_old)
    assert checkpoint.format == "hf"
    assert checkpoint.config == {"model_type": "mask2former"}
    assert checkpoint.preprocessor == {"size_divisor": 32}


@pytest.fixture(params=["model.safetensors", "pytorch_model.bin"])
def sharded(request, hf_old, tmp_path):
    keys = list(hf_old)
    names = [f"{at}-of-2.{request.param.rpartition('.')[2]}" for at in (1, 2)]
    for name, part in zip(names, (keys[:100], keys[100:]), strict=True):
        tensors = {key: hf_old[key] for key in part}
        save_file(tensors, tmp_path / name) if name.endswith("safetensors") else torch.save(tensors, tmp_path / name)
    places = {key: names[at >= 100] for at, key in enumerate(keys)}
    index = tmp_path / f"{request.param}.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return index, names


def test_sharded_folder(hf_old, sharded):
    assert_same(read_checkpoint(sharded[0].parent).state_dict, hf_old)


def test_sharded_folder_errors(sharded):
    index, names = sharded
    good = json.loads(index.read_text())
    for change, message in [
        ({"extra.weight": names[0]}, r"names extra\.weight \(of 1\), which no shard holds"),
        ({"extra.weight": "3-of-2.bin"}, "3-of-2.bin is missing"),
        ({"extra.weight": "../outside.bin"}, "outside its folder"),
        ({"extra.weight": "/etc/hostname"}, "outside its folder"),
        ({"extra.weight": ".."}, "is a folder, not a regular file"),
        ({"extra.weight": 3}, "no weight_map"),
    ]:
        index.write_text(json.dumps({"weight_map": good["weight_map"] | change}))
        with pytest.raises(CheckpointError, match=message):
            read_checkpoint(index.parent)


@pytest.mark.parametrize("text", ["{", "[1]", "\udcff"])
def test_bad_json_is_named(tmp_path, text):
    shutil.copy(WEIGHTS, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(CheckpointError, match=r"config\.json: it (is not valid JSON|must hold a JSON object)"):
        read_checkpoint(tmp_path)


@pytest.mark.parametrize(
    "text",
    ["9" * 5000, "-" + "9" * 30, "1e999", "[" * 100_000, '{"a":' * 100_000, "[" * 200 + "]" * 200],
    ids=["digits", "integer", "float", "lists", "objects", "closed"],
)
@pytest.mark.parametrize("name", ["config.json", "preprocessor_config.json", "pytorch_model.bin.index.json"])
def test_json_out_of_bounds_is_named(tmp_path, name, text):
    if "index" not in name:
        shutil.copy(WEIGHTS, tmp_path / "model.safetensors")
        (tmp_path / "config.json").write_text("{}")
    (tmp_path / name).write_text(f'{{"a": {text}}}')
    with pytest.raises(
        CheckpointError, match=rf"{name}.* (is not valid JSON|nests too deeply|range of 64 bits)"
    ) as error:
        read_checkpoint(tmp_path)
    assert len(str(error.value)) < 300


def test_json_that_is_too_large_is_not_read(tmp_path):
    shutil.copy(WEIGHTS, tmp_path / "model.safetensors")
    with (tmp_path / "config.json").open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(CheckpointError, match=r"config\.json: it is larger than 16 MB"):
        read_checkpoint(tmp_path)


@pytest.mark.parametrize("name", ["config.json", "preprocessor_config.json", "model.safetensors", "1-of-2.safetensors"])
@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir, lambda path: path.symlink_to("/dev/zero")])
def test_what_is_no_regular_file_is_not_waited_for(tmp_path, name, make):
    if name == "1-of-2.safetensors":
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    elif name != "model.safetensors":
        shutil.copy(WEIGHTS, tmp_path / "model.safetensors")
        (tmp_path / "config.json").write_text("{}")
    (tmp_path / name).unlink(missing_ok=True)
    make(tmp_path / name)
    for path in (tmp_path, tmp_path / name)[: 1 + (name == "model.safetensors" and make is not os.mkdir)]:
        with pytest.raises(CheckpointError, match=rf"{name} is a (folder|pipe, socket or device), not a regular file"):
            read_checkpoint(path)


def test_keys_of_no_known_format_name_their_file(tmp_path):
    save_file({"a": torch.ones(1)}, tmp_path / "a.safetensors")
    with pytest.raises(ConversionError, match=r"a\.safetensors: no known format"):
        read_checkpoint(tmp_path / "a.safetensors")


def test_a_link_to_nothing_is_named(tmp_path):
    (tmp_path / "a.pth").symlink_to("nowhere")
    with pytest.raises(CheckpointError, match=r"a\.pth is a link to nothing"):
        read_torch_file(tmp_path / "a.pth")


# ---- files that are no checkpoints ----


def test_missing_and_empty(tmp_path):
    with pytest.raises(CheckpointError, match="does not exist"):
        read_checkpoint(tmp_path / "nothing")
    with pytest.raises(CheckpointError, match=r"holds no weights; one of model\.safetensors"):
        read_checkpoint(tmp_path)
    (tmp_path / "a.pkl").touch()
    with pytest.raises(CheckpointError, match="is empty"):
        read_checkpoint(tmp_path / "a.pkl")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"<!DOCTYPE html><html>not found</html>", "not a checkpoint"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
        (b"\x00" * 64, "not a checkpoint"),
        (b"PK\x03\x04" + b"\x00" * 64, "damaged torch file"),
        (b"\x80\x02garbage", "damaged pickle"),
        (b"\x80\x02]q\x00(K\x01K\x02e.", "no state dict but a list"),
        (b"\x80\x02}q\x00.", "no state dict but a dict"),
        (b"\x80\x02}K\x01K\x02s.", "1 is a int, not a tensor"),
        (b"\x80\x02}q\x00U\x05modelh\x00s.", "nests too deeply"),  # a dict within itself
        (b"\x80\x02Q.", "damaged pickle"),  # a persistent id
    ],
)
def test_content_that_is_no_checkpoint(tmp_path, content, message):
    (tmp_path / "a.pkl").write_bytes(content)
    with pytest.raises(CheckpointError, match=message) as error:
        read_checkpoint(tmp_path / "a.pkl")
    assert "a.pkl" in str(error.value)


@pytest.fixture(scope="module")
def every_kind(tmp_path_factory, original):
    folder = tmp_path_factory.mktemp("kinds")
    few = {key: tensor for key, tensor in original.items() if key.startswith("backbone.layers.0")}
    save_file(few, folder / "a.safetensors")
    torch.save(few, folder / "zip.pth")
    torch.save(few, folder / "legacy.pth", _use_new_zipfile_serialization=False)
    dump(folder / "arrays.pkl", {"model": arrays(few)})
    dump(folder / "tensors.pkl", few)
    return sorted(folder.iterdir())


def test_truncated_at_many_places(every_kind, tmp_path):
    """Whatever is cut off, the error is ours and names the file."""
    for whole in every_kind:
        data = whole.read_bytes()
        assert read_checkpoint(whole).state_dict
        for length in sorted({1, 8, 9, 20, 100, *range(0, len(data), max(1, len(data) // 40)), len(data) - 1} - {0}):
            cut = tmp_path / whole.name
            cut.write_bytes(data[:length])
            with pytest.raises(ConversionError, match=whole.name):
                read_checkpoint(cut)


def test_damaged_bytes_never_give_a_raw_error(every_kind, tmp_path):
    """A changed byte gives other numbers, or an error of ours."""
    random = np.random.default_rng(0)
    for whole in every_kind:
        data = whole.read_bytes()
        for _ in range(100):
            changed = bytearray(data)
            for at in random.integers(0, min(len(data), 3000), 3):
                changed[at] = random.integers(256)
            damaged = tmp_path / whole.name
            damaged.write_bytes(changed)
            with contextlib.suppress(ConversionError):
                read_checkpoint(damaged)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_weights_that_are_not_finite_are_named(original, tmp_path, value, dtype):
    bad = original["backbone.norm1.bias"].to(dtype).clone()
    bad[3:5] = value
    save_file(original | {"backbone.norm1.bias": bad}, tmp_path / "a.safetensors")
    with pytest.raises(CheckpointError, match=r"backbone\.norm1\.bias has 2 NaN or infinite values of 32"):
        read_checkpoint(tmp_path / "a.safetensors")


def test_entries_that_are_no_tensors_are_named(original, tmp_path):
    torch.save(original | {"epoch": 3}, tmp_path / "a.pth")
    with pytest.raises(CheckpointError, match="'epoch' is a int, not a tensor"):
        read_checkpoint(tmp_path / "a.pth")


# ---- hostile pickles ----


class Runs:
    """Calls something when unpickled."""

    def __init__(self, function, *args):
        self.call = (function, args)

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda canary: Runs(os.system, f"touch {canary}"), r"(posix|nt)\.system"),
        (lambda canary: Runs(eval, f"open({canary!r}, 'w')"), r"(builtins|__builtin__)\.eval"),
        (lambda canary: Runs(exec, f"open({canary!r}, 'w')"), r"(builtins|__builtin__)\.exec"),
        (lambda canary: Runs(open, canary, "w"), r"(_?io|__builtin__)\.open"),
        (lambda canary: Runs(getattr, {}, "clear"), r"(builtins|__builtin__)\.getattr"),
        (lambda canary: Runs(torch.load, canary), r"torch\.serialization\.load"),
        (lambda canary: Runs(np.load, canary), r"numpy.*load"),
        (lambda canary: torch.nn.Linear(1, 1), r"(torch\.nn\.modules\.linear\.Linear|copy_reg\._reconstructor)"),
    ],
)
def test_pickles_run_nothing(original, tmp_path, protocol, make, name):
    canary = tmp_path / CANARY
    hostile = make(str(canary))
    for content in (hostile, {"model": {**arrays(original), "x": [{"y": (hostile,)}]}}, {hostile: 1}):
        path = dump(tmp_path / "a.pkl", content, protocol=protocol)
        with pytest.raises(CheckpointError, match=f"a.pkl: it asks for {name}"):
            read_checkpoint(path)
    assert not canary.exists()


def test_torch_files_run_nothing(original, tmp_path):
    canary = tmp_path / CANARY
    for zipped in (True, False):
        torch.save(
            {"model": original, "x": Runs(os.system, f"touch {canary}")},
            tmp_path / "a.pth",
            _use_new_zipfile_serialization=zipped,
        )
        with pytest.raises(CheckpointError, match=r"a\.pth: it asks for (posix|nt)\.system"):
            read_checkpoint(tmp_path / "a.pth")
    assert not canary.exists()


def test_torch_storage_within_a_pickle_runs_nothing(tmp_path):
    """The bytes of a storage are a torch file, which could be another hostile pickle."""
    canary = tmp_path / CANARY
    inner = pickle.dumps(Runs(os.system, f"touch {canary}"), protocol=2)
    path = dump(tmp_path / "a.pkl", {"x": Runs(torch.storage._load_from_bytes, inner)}, protocol=2)
    with pytest.raises(CheckpointError, match=r"a\.pkl: it asks for (posix|nt)\.system"):
        read_checkpoint(path)
    assert not canary.exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        # a state set on one of the functions that rebuild arrays, and on the class of arrays
        (b"\x80\x02c_codecs\nencode\n}U\x01aU\x01bsb.", "change the functions that read it"),
        (b"\x80\x02cnumpy\nndarray\nN}U\x06tensorK\x01s\x86b.", "change the functions that read it"),
        # a class made without its constructor
        (b"\x80\x02cnumpy\nndarray\n)\x81.", "damaged pickle"),
        # dotted names do not reach into what is allowed
        (b"\x80\x04\x8c\x05numpy\x8c\x10ndarray.__init__\x93.", r"numpy\.ndarray\.__init__"),
        (b"\x80\x02c_codecs\nencode\nU\x01aU\x03zip\x86R.", "encodes text as 'zip'"),
        # a few bytes that ask for much memory: a place in the memo, a length, zeros by number
        (b"\x80\x02Nr\xff\xff\xff\x7f.", "no state dict but a NoneType"),
        (b"\x80\x05\x96" + (1 << 45).to_bytes(8, "little") + b".", "damaged pickle"),
        (b"\x80\x02c__builtin__\nbytes\nJ\xff\xff\xff\x7f\x85R.", "damaged pickle"),
        (
            b"\x80\x02cnumpy.core.multiarray\nscalar\ncnumpy\ndtype\nU\x02u1\x85RJ\xff\xff\xff\x7f\x86R.",
            "bytes for an array",
        ),
        (b"\x80\x02cnumpy\ndtype\nU\x02O8K\x00K\x01\x87R.", "array of type 'O8'"),
        (b"\x80\x02cnumpy\ndtype\nU\x03V16K\x00K\x01\x87R.", "array of type 'V16'"),
    ],
)
def test_handmade_pickles(tmp_path, content, message):
    (tmp_path / "a.pkl").write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        read_checkpoint(tmp_path / "a.pkl")


def test_object_arrays_are_refused(tmp_path):
    for protocol in (2, 5):
        path = dump(tmp_path / "a.pkl", {"a": np.array([1, "x", None], dtype=object)}, protocol=protocol)
        with pytest.raises(CheckpointError, match="array of type 'O8'"):
            read_checkpoint(path)


def test_arrays_with_too_few_bytes_are_refused(tmp_path):
    data = pickle.dumps({"a": np.arange(4, dtype=np.uint8)}, protocol=2)
    assert data.count(b"K\x04\x85") == 1
    (tmp_path / "a.pkl").write_bytes(data.replace(b"K\x04\x85", b"K\x7f\x85"))
    with pytest.raises(CheckpointError, match=r"too few or too many bytes for an array of shape \(127,\)"):
        read_checkpoint(tmp_path / "a.pkl")


def test_tensors_beyond_their_storage_are_refused(tmp_path):
    storage = torch.storage.TypedStorage(
        wrap_storage=torch.zeros(4).untyped_storage(), dtype=torch.float, _internal=True
    )
    for offset, size, stride in ((2, (9,), (1,)), (0, (2,), (4,)), (-1, (2,), (1,)), (0, (2,), (-1,)), (9, (1,), (1,))):
        beyond = Runs(torch._utils._rebuild_tensor_v2, storage, offset, size, stride, False, {})
        with pytest.raises(CheckpointError, match=r"truncated or damaged pickle|impossible shape; the file"):
            read_checkpoint(dump(tmp_path / "a.pkl", {"a": beyond}))


@pytest.mark.parametrize("zipped", [True, False])
def test_tensors_blown_up_by_a_stride_are_refused(tmp_path, zipped):
    torch.save({"a": torch.zeros(1).expand(1 << 50)}, tmp_path / "a.pth", _use_new_zipfile_serialization=zipped)
    with pytest.raises(CheckpointError, match="a claims more values than the file holds"):
        read_checkpoint(tmp_path / "a.pth")


# ---- what is beside the weights ----


def save_as(kind, content, path):
    if kind == "pickle":
        return dump(path, content)
    torch.save(content, path, _use_new_zipfile_serialization=kind == "zip")
    return path


KINDS = ["pickle", "zip", "legacy"]


@pytest.mark.parametrize("kind", KINDS)
def test_plain_values_beside_the_weights_are_no_matter(original, tmp_path, kind):
    """The same in pickles and in torch files."""
    optimizer = torch.optim.AdamW((module := torch.nn.Linear(2, 2)).parameters())
    module(torch.ones(2)).sum().backward()
    optimizer.step()
    tensor = torch.nn.Parameter(torch.ones(2))
    tensor.note = 1
    content = {
        "model": collections.OrderedDict(original),
        "optimizer": optimizer.state_dict(),
        "args": {"lr": 0.1, "name": "a", "betas": (0.9, None), "raw": b"x", "array": bytearray(b"y"), "big": 1 << 100},
        "meters": collections.defaultdict(list, {"loss": [1.0], 2: []}),
        "counts": collections.defaultdict(int, {None: 1}) | collections.Counter("aab"),
        "milestones": collections.Counter([3, 3, 5]),
        "best": np.float64(0.5),
        "epoch": np.int64(3),
        "flag": np.bool_(True),
        "random": ("MT19937", np.arange(624, dtype=np.uint32), 1, 0.0),
        "generator": torch.get_rng_state(),
        "sets": ({1, "a", None, 2.5}, frozenset({b"x"})),
        "torch": (torch.Size([2, 3]), torch.device("cpu"), torch.float16, 1j),
        "tensors": [tensor, torch.ones(3, dtype=torch.uint16), torch.zeros(2, dtype=torch.complex64)],
    }
    assert_same(read_checkpoint(save_as(kind, content, tmp_path / "a.pth")).state_dict, original)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("other", "name"),
    [
        (argparse.Namespace(lr=1), r"argparse\.Namespace"),
        (pathlib.PurePosixPath("a"), r"pathlib\.PurePosixPath"),
        (collections.deque([1]), r"collections\.deque"),
    ],
)
def test_other_things_beside_the_weights_are_refused_by_name(original, tmp_path, kind, other, name):
    path = save_as(kind, {"model": original, "args": other}, tmp_path / "a.pth")
    with pytest.raises(CheckpointError, match=f"a.pth: it asks for {name}, .* have its state dict saved alone"):
        read_checkpoint(path)


UNUSUAL = {
    "sparse": lambda eye: eye.to_sparse(),
    "csr": lambda eye: eye.to_sparse_csr(),
    "meta": lambda eye: eye.to("meta"),
    "quantized": lambda eye: torch.quantize_per_tensor(eye, 1.0, 0, torch.qint8),
    "nested": lambda eye: torch.nested.nested_tensor([eye, eye]),
    "complex64": lambda eye: eye.to(torch.complex64),
    "uint16": lambda eye: eye.to(torch.uint16),
}


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", UNUSUAL)
def test_tensors_of_unusual_kinds_are_named(original, tmp_path, kind, name):
    """Those that PyTorch writes into a file of that kind; beside the weights they are no matter."""
    tensor = UNUSUAL[name](torch.eye(2))
    said = {"csr": "sparse"}.get(name, name)
    path = save_as(kind, {"model": original | {"layers.odd": tensor}}, tmp_path / "a.pth")
    with pytest.raises(CheckpointError, match=rf"a\.pth: '?layers\.odd'? is a {said} tensor"):
        read_checkpoint(path)
    assert read_checkpoint(save_as(kind, {"model": original, "x": [tensor]}, path)).state_dict.keys() == original.keys()


# ---- hostile content: each is read in a process of its own, which it would end ----

LEGACY_HEAD = pickle.dumps(0x1950A86A20F9469CFC6C, 2) + pickle.dumps(1001, 2) + pickle.dumps({"little_endian": True}, 2)
LONG = b"\x8b" + struct.pack("<i", 1 << 16) + b"\x7f" * (1 << 16)  # an integer of half a million bits
TENSOR = b"ctorch._utils\n_rebuild_tensor_v2\n((U\x07storagectorch\nFloatStorage\nU\x010U\x03cpuK\x04tQK\x00"
BYTES = b"B" + struct.pack("<I", 1 << 20) + bytes(1 << 20)
ARRAY = b"cnumpy._core.numeric\n_frombuffer\nq\x00(" + BYTES + b"cnumpy\ndtype\nU\x02u1\x85R"
DEEP, DOUBLED = b")" + b"\x85" * 300_000, b")" + b"2\x86" * 60  # tuples in tuples, and each twice in the next
MANY = 100_000

HOSTILE = {
    "deep tuple": DEEP,
    "deep list": b"]" * MANY + b"a" * (MANY - 1),
    "deep dict": b"}K\x01" * MANY + b"N" + b"s" * MANY,
    "deep key": b"}" + DEEP + b"Ns",
    "deep keys": b"}(" + DEEP + b"Nu",
    "deep key of a dict": b"(" + DEEP + b"Nd",
    "deep key of an OrderedDict": b"ccollections\nOrderedDict\n(" + DEEP + b"N\x86l\x85R",
    "deep member": b"\x8f(" + DEEP + b"\x90",
    "deep member of a frozenset": b"(" + DEEP + b"\x91",
    "deep member of a list for a set": b"c__builtin__\nset\n(" + DEEP + b"l\x85R",
    "deep frozenset": b"(" * MANY + b"\x91" * MANY,
    "5000 deep key": b"}" + b")" + b"\x85" * 5000 + b"Ns",
    "doubled": DOUBLED,
    "doubled value": b"}U\x01a" + DOUBLED + b"s",
    "doubled key": b"}" + DOUBLED + b"Ns",
    "doubled lists": b"]q\x00" + b"]h\x00ah\x00aq\x00" * 60,
    "doubled dtype": b"cnumpy\ndtype\n" + DOUBLED + b"\x85R",
    "doubled byte order": b"cnumpy\ndtype\nU\x02f4\x85R(K\x03" + DOUBLED + b"tb",
    "doubled shape": ARRAY + DOUBLED + b"U\x01CtR",
    "doubled encoding": b"c_codecs\nencode\nU\x01a" + DOUBLED + b"\x86R",
    "doubled name": DOUBLED + DOUBLED + b"\x93",
    "doubled content": DOUBLED + b"Q",
    "list in itself": b"]q\x00h\x00a",
    "long integers as a shape": ARRAY + b"(" + LONG * 20 + b"tU\x01CtR",
    "long integer as a key": b"}" + LONG + b"q\x00Ns" + b"h\x00Ns" * MANY,
    "long integer as a value": b"}U\x01a" + LONG + b"s",
    "long integer as a member": b"\x8f(" + LONG + b"\x90",
    "long integer as text": b"L" + b"9" * 5000 + b"L\n",
    "long integer as an offset": TENSOR + LONG + b"K\x01\x85K\x01\x85\x89}tR",
    "many sets": b"\x8f0" * 3_000_000,
    "many marks": b"(" * 3_000_001,
    "calls with the same list": b"c__builtin__\nset\nq\x00](" + b"N" * MANY + b"eq\x01" + b"h\x00h\x01\x85R0" * MANY,
    "calls with the same dict": b"ccollections\nCounter\nq\x00}("
    + b"".join(b"J" + struct.pack("<i", key) + b"N" for key in range(MANY))
    + b"uq\x01"
    + b"h\x00h\x01\x85R0" * MANY,
    "calls with many arguments": b"ccollections\ndefaultdict\nq\x00("
    + b"N" * MANY
    + b"tq\x01"
    + b"h\x00h\x01R0" * MANY,
    "calls with the same text": b"c_codecs\nencode\nq\x00V" + b"a" * (1 << 20) + b"\nq\x01" + b"h\x00h\x01\x85R" * MANY,
    "old classes with the same list": b"c__builtin__\nset\nq\x00](" + b"N" * MANY + b"eq\x01" + b"(h\x00h\x01o0" * MANY,
    "copies of an array": ARRAY + b"J\x00\x00\x10\x00\x85U\x01Ctq\x01" + b"h\x00h\x01R" * MANY,
    "states of an array": b"cnumpy\nndarray\n)R(K\x01J\x00\x00\x10\x00\x85cnumpy\ndtype\nU\x02u1\x85R\x89"
    + BYTES
    + b"tq\x00"
    + b"h\x00b" * MANY,
    "parts of a tensor without end": b"ccollections\nOrderedDict\n"
    + TENSOR
    + b"(\x8a\x07\0\0\0\0\0\0\x04K\x01t(K\x00K\x00t\x89}tR\x85R",
    "a million dimensions": TENSOR + b"(" + b"K\x01" * 1_000_000 + b"t(" + b"K\x00" * 1_000_000 + b"t\x89}tR",
    "negative strides": TENSOR + b"K\x01\x85J\xff\xff\xff\xff\x85\x89}tR",
    "state of a tensor": TENSOR + b"K\x01\x85K\x01\x85\x89}tR}b",
    "item of a tensor": TENSOR + b"K\x01\x85K\x01\x85\x89}tRK\x00K\x07s",
    "long name": b"c" + b"a" * 1_000_000 + b"\n" + b"b" * 1_000_000 + b"\n",
    "name with a line and an escape": b"\x8c\x06a\nb\x1b[m\x8c\x01c\x93",
    "long frame": b"\x95" + b"\xff" * 7 + b"\x7f",
    "long bytes": b"\x8e" + b"\xff" * 7 + b"\x7f",
    "zeros by number": b"c__builtin__\nbytearray\nJ\xff\xff\xff\x7f\x85R",
    "a tensor class called": b"ctorch\nTensor\nJ\xff\xff\xff\x7f\x85R",
    "integers in a defaultdict's place": b"c__builtin__\nint\nU\x01a\x85R",
}

READ = """
import signal, sys
from weights_convert import CheckpointError, read_checkpoint
for line in sys.stdin:
    signal.alarm(60)
    try:
        read_checkpoint(line.rstrip("\\n"))
        print("was read", flush=True)
    except CheckpointError as error:
        print(error, flush=True)
status = open("/proc/self/status").read()  # what getrusage tells begins with the most of who started this
print(status.split("VmHWM:")[1].split()[0])
"""


def zip_file(path, content, data=b"\0" * 16, **options):
    with zipfile.ZipFile(path, "w", **options) as archive:
        archive.writestr("a/data.pkl", content)
        archive.writestr("a/data/0", data)
    return path


@pytest.fixture(scope="module")
def said_of_hostile(tmp_path_factory):
    """What a reader says of every file, and the most memory it had."""
    folder = tmp_path_factory.mktemp("hostile")
    files = []
    for name, body in HOSTILE.items():
        content = b"\x80\x02" + body + b"."
        files += [folder / f"{name}.pkl", folder / f"{name}.zip", folder / f"{name}.legacy"]
        files[-3].write_bytes(content)
        zip_file(files[-2], content)
        files[-1].write_bytes(LEGACY_HEAD + content)
        if len(body) > 2_000_000:  # slow ones once
            del files[-2:]
    command = [sys.executable, "-c", READ]
    given = "".join(f"{file}\n" for file in files)
    done = subprocess.run(command, input=given, capture_output=True, text=True, check=False)  # noqa: S603 - our own
    *lines, memory = done.stdout.splitlines()
    assert done.returncode == 0, f"{files[len(lines)].name}: {done.stderr}"
    return dict(zip(files, lines, strict=True)), int(memory)


@pytest.mark.slow
def test_hostile_pickles_are_refused_in_one_line(said_of_hostile):
    said, memory = said_of_hostile
    for file, line in said.items():
        assert line.startswith(str(file)), line
        assert len(line) < 300
        assert line.isprintable()
    assert memory < 2 << 20  # KiB


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.slow if name in ("doubled value", "doubled lists") else ())
        for name, body in HOSTILE.items()
        if len(body) < 20_000
    ],
)
def test_small_hostile_pickles_are_refused_in_one_line(tmp_path, name):
    """Those that would hang or fail, but not end the process."""
    content = b"\x80\x02" + HOSTILE[name] + b"."
    (tmp_path / "a").write_bytes(content)
    zip_file(tmp_path / "b", content)
    (tmp_path / "c").write_bytes(LEGACY_HEAD + content)
    for file in tmp_path.iterdir():
        with pytest.raises(CheckpointError) as error:
            read_checkpoint(file)
        assert str(error.value).startswith(str(file))
        assert len(str(error.value)) < 300
        assert str(error.value).isprintable()


PUSHED = [
    b"N",
    b"K\x00",
    b"J\xff\xff\xff\xff",
    b"U\x01a",
    b"C\x01a",
    b"]",
    b"}",
    b")",
    b"(",
    b"\x8f",
    b"2",
    b"h\x00",
    LONG,
]
CALLED = [b"c" + b"\n".join(name.encode() for name in names) + b"\n" for names in (*_ALLOWED, *_CONSTANTS)]
MADE = [TENSOR + b"K\x04\x85K\x01\x85\x89}t", b"cnumpy\ndtype\nU\x02f4\x85R", *(CALLED[:1] * 2)]
DONE = [
    b"q\x00",
    b"\x85",
    b"\x86",
    b"\x87",
    b"t",
    b"R",
    b"R",
    b"b",
    b"s",
    b"a",
    b"u",
    b"e",
    b"\x90",
    b"\x91",
    b"d",
    b"l",
    b"o",
    b"Q",
]


def test_random_pickles_never_give_a_raw_error(tmp_path):
    """Opcodes at random, of those that are read: what they make is read, or refused in a line."""
    random = np.random.default_rng(0)
    for _ in range(400):
        kinds = [
            (PUSHED, CALLED, MADE, DONE)[kind]
            for kind in random.choice(4, random.integers(1, 50), p=[0.4, 0.1, 0.1, 0.4])
        ]
        content = b"\x80\x02" + b"".join(kind[random.integers(len(kind))] for kind in kinds) + b"."
        (tmp_path / "plain").write_bytes(content)
        (tmp_path / "legacy").write_bytes(LEGACY_HEAD + content + pickle.dumps([], 2))
        zip_file(tmp_path / "zip", content)
        for name in ("plain", "legacy", "zip"):
            with pytest.raises(ConversionError) as error:
                read_checkpoint(tmp_path / name)
            assert len(str(error.value)) < 300
            assert str(error.value).isprintable()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: zip_file(path, b"\x80\x02}.", bytes(50 << 20), compression=zipfile.ZIP_DEFLATED), "compressed"),
        (lambda path: zip_file(path, b"\x80\x02}.", b"a", compression=zipfile.ZIP_LZMA), "compressed"),
        (lambda path: zip_file(path, b"\x80\x02" + TENSOR + b"K\x01\x85K\x01\x85\x89}tR.", b""), "does not hold"),
        (lambda path: zip_file(path, b"\x80\x02" + TENSOR + b"K\x01\x85K\x01\x85\x89}tR.", b"abc"), "does not hold"),
        (lambda path: zipfile.ZipFile(path, "w").writestr("word/document.xml", "<a/>"), "none of torch.save"),
    ],
)
def test_zip_files_that_are_no_torch_files(tmp_path, make, message):
    make(tmp_path / "a.bin")
    with pytest.raises(CheckpointError, match=f"a.bin: .*{message}"):
        read_checkpoint(tmp_path / "a.bin")


def test_entries_that_claim_more_than_the_file_are_refused(original, tmp_path):
    torch.save(original, tmp_path / "a.bin")
    data = (tmp_path / "a.bin").read_bytes()
    with zipfile.ZipFile(tmp_path / "a.bin") as archive:
        size = max(archive.infolist(), key=lambda entry: entry.file_size).file_size
    directory = data.index(b"PK\x01\x02")
    claimed = data[directory:].replace(struct.pack("<II", size, size), struct.pack("<II", 1 << 31, 1 << 31))
    (tmp_path / "b.bin").write_bytes(data[:directory] + claimed)
    with pytest.raises(CheckpointError, match=r"b\.bin: its entries claim more bytes than the file holds"):
        read_checkpoint(tmp_path / "b.bin")


def test_a_torch_file_with_changed_bytes_is_damaged(original, tmp_path):
    torch.save(original, tmp_path / "a.bin")
    data = bytearray((tmp_path / "a.bin").read_bytes())
    data[len(data) // 2] ^= 1
    (tmp_path / "a.bin").write_bytes(data)
    with pytest.raises(CheckpointError, match=r"a\.bin: it is a damaged torch file \(Bad CRC"):
        read_checkpoint(tmp_path / "a.bin")


def test_torch_files_without_checksums_are_read(original, tmp_path):
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(original, tmp_path / "a.bin")
    finally:
        torch.serialization.set_crc32_options(before)
    assert_same(read_checkpoint(tmp_path / "a.bin").state_dict, original)


@pytest.mark.parametrize("kind", KINDS)
def test_many_views_of_the_same_memory_are_refused(tmp_path, kind):
    """A few may be: tied weights."""
    weights = torch.zeros(1000)
    path = save_as(kind, {f"layers.{key}": weights for key in range(3)}, tmp_path / "a.pth")
    assert len(read_checkpoint(path).state_dict) == 3
    path = save_as(kind, {f"layers.{key}": weights[key:] for key in range(500)}, path)
    if kind == "pickle":  # which writes each by itself
        assert len(read_checkpoint(path).state_dict) == 500
        return
    with pytest.raises(CheckpointError, match="its tensors claim more values than the file holds"):
        read_checkpoint(path)


def test_files_full_of_holes_are_not_read(tmp_path):
    safetensors_file(
        tmp_path / "a.safetensors", {"layers.a": {"dtype": "F32", "shape": [1 << 38], "data_offsets": [0, 1 << 40]}}
    )
    for name, head in (("a.safetensors", b""), ("b.pkl", b"\x80\x04\x8e" + struct.pack("<Q", 1 << 39))):
        with (tmp_path / name).open("ab") as file:
            file.write(head)
            file.truncate(1 << 41)
        with pytest.raises(CheckpointError, match=f"{name}: it is larger than 32 GB"):
            read_checkpoint(tmp_path / name)


def safetensors_file(path, header, data=b"\0" * 64):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


GOOD = {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}


@pytest.mark.parametrize(
    "header",
    [
        b"{" + b"[" * 100_000,
        b'{"a":' * 100_000,
        b'{"layers.a":{"dtype":"F32","shape":[4],"data_offsets":[0,16]},"layers.a":5}',
        {"layers.a": GOOD},  # not all the bytes
        {"layers.a": GOOD | {"data_offsets": [0, 64]}},
        {"layers.a": GOOD | {"shape": [16], "data_offsets": [0, 64]}, "layers.b": GOOD},  # over each other
        {"layers.a": GOOD | {"shape": [1 << 62, 4], "data_offsets": [0, 64]}},
        {"layers.a": GOOD | {"shape": [1 << 70], "data_offsets": [0, 64]}},
        {"layers.a": GOOD | {"shape": [-16], "data_offsets": [0, 64]}},
        {"layers.a": GOOD | {"shape": [16], "data_offsets": [64, 0]}},
        {"layers.a": GOOD | {"shape": [1 << 40], "data_offsets": [0, 1 << 42]}},
        {"layers.a": GOOD | {"dtype": "STR", "shape": [16], "data_offsets": [0, 64]}},
        {"layers.a": {"dtype": "F4", "shape": [128], "data_offsets": [0, 64]}},
        {"layers.a": {"dtype": "F8_E8M0", "shape": [64], "data_offsets": [0, 64]}},
        {"layers.a": {"dtype": "C64", "shape": [8], "data_offsets": [0, 64]}},
        {"layers.a": 5},
        {"__metadata__": {"a": 5}},
        {},
    ],
)
def test_hostile_safetensors_are_refused_in_one_line(tmp_path, header):
    safetensors_file(tmp_path / "a.safetensors", header)
    with pytest.raises(ConversionError) as error:
        read_checkpoint(tmp_path / "a.safetensors")
    assert len(str(error.value)) < 300
    assert "a.safetensors" in str(error.value)


# ---- writing ----


def test_written_folder_is_read_back(original, config, tmp_path):
    native = to_native(original)
    write_checkpoint(tmp_path / "new/folder", native, config, {"size_divisor": 32})
    checkpoint = read_checkpoint(tmp_path / "new/folder")
    assert_same(checkpoint.state_dict, native)
    assert checkpoint.config == config
    assert checkpoint.preprocessor == {"size_divisor": 32}
    assert checkpoint.format == "native"
    names = ["config.json", "model.safetensors", "preprocessor_config.json"]
    assert sorted(os.listdir(tmp_path / "new/folder")) == names
    assert len({path.stat().st_mode for path in (tmp_path / "new/folder").iterdir()}) == 1
    assert (tmp_path / "new/folder/config.json").read_text().startswith('{\n  "model_type": "m2f-video",\n')


def test_written_file_is_read_back_and_replaced(original, tmp_path):
    for factor in (1, 2):
        native = {key: tensor * factor for key, tensor in to_native(original).items()}
        write_checkpoint(tmp_path / "a.safetensors", native)
        assert_same(load_file(tmp_path / "a.safetensors"), native)
    assert os.listdir(tmp_path) == ["a.safetensors"]


def test_tensors_that_share_memory_are_written(tmp_path):
    tensor = torch.arange(6.0).reshape(2, 3)
    state_dict = {"a": tensor, "b": tensor, "c": tensor[0], "d": tensor.T, "e": torch.nn.Parameter(tensor)}
    write_checkpoint(tmp_path / "a.safetensors", state_dict)
    assert_same(load_file(tmp_path / "a.safetensors"), {key: value.detach() for key, value in state_dict.items()})


def test_folder_needs_a_config(original, tmp_path):
    with pytest.raises(CheckpointError, match="needs a config"):
        write_checkpoint(tmp_path / "a", original)
    assert os.listdir(tmp_path) == []


def test_what_killed_writers_left_goes_and_what_others_write_stays(original, config, tmp_path):
    import fcntl

    for name in (".writing-0a1b2c3d", ".writing-locked_1", ".writing-notes"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_text("half")
    (tmp_path / ".writing-link0000").symlink_to(tmp_path / ".writing-notes")
    locked = os.open(tmp_path / ".writing-locked_1", os.O_RDONLY)
    fcntl.flock(locked, fcntl.LOCK_EX)
    try:
        write_checkpoint(tmp_path, original, config)
        write_checkpoint(tmp_path / "a.safetensors", original)
    finally:
        os.close(locked)
    names = [".writing-link0000", ".writing-locked_1", ".writing-notes"]
    assert sorted(os.listdir(tmp_path)) == [*names, "a.safetensors", "config.json", "model.safetensors"]
    assert os.listdir(tmp_path / ".writing-notes") == ["model.safetensors"]


@pytest.mark.parametrize("kind", [os.mkdir, os.mkfifo])
@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "preprocessor_config.json"])
def test_what_is_in_the_way_leaves_all_as_it_was(original, config, tmp_path, kind, name):
    kind(tmp_path / name)
    with pytest.raises(CheckpointError, match=f"{name} is in the way"):
        write_checkpoint(tmp_path, original, config, {})
    assert os.listdir(tmp_path) == [name]


def test_target_below_a_file_is_an_error(original, config, tmp_path):
    (tmp_path / "file").write_text("x")
    for target in (tmp_path / "file", tmp_path / "file/a.safetensors", tmp_path / "file/folder"):
        with pytest.raises(CheckpointError, match="cannot be written"):
            write_checkpoint(target, original, config)
    assert (tmp_path / "file").read_text() == "x"


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
@pytest.mark.parametrize("target", ["new/deep", "new/a.safetensors", "old"])
def test_failed_write_leaves_nothing(original, config, tmp_path, monkeypatch, error, target):
    write_checkpoint(tmp_path / "old", original, config | {"labels": ["before"]})
    before = {path: path.read_bytes() for path in (tmp_path / "old").iterdir()}

    def fail(tensors, path, metadata):
        path.write_bytes(b"half")
        raise error

    monkeypatch.setattr("weights_convert.checkpoints.save_file", fail)
    with pytest.raises((CheckpointError, KeyboardInterrupt)):
        write_checkpoint(tmp_path / target, original, config)
    assert os.listdir(tmp_path) == ["old"]
    assert {path: path.read_bytes() for path in (tmp_path / "old").iterdir()} == before


def test_a_header_larger_than_any_is_refused_unread(tmp_path):
    (tmp_path / "a.safetensors").write_bytes((1 << 40).to_bytes(8, "little") + b'{"a":')
    with pytest.raises(CheckpointError, match="header of more than 16 MB"):
        read_checkpoint(tmp_path / "a.safetensors")


def test_a_long_path_is_named_by_its_end(tmp_path):
    folder = tmp_path / ("long" * 30)
    folder.mkdir()
    (folder / "pytorch_model.bin.index.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"^\.\.\.\S*/pytorch_model\.bin\.index\.json: it is not valid JSON"):
        read_checkpoint(folder)

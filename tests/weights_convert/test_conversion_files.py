"""Checkpoint files of every kind are read safely, and written whole or not at all."""

import collections
import contextlib
import json
import os
import pickle
import shutil

import numpy as np
import pytest
import torch
from conversion_helpers import GOLDEN, assert_same
from safetensors.torch import load_file, save_file

from weights_convert import CheckpointError, ConversionError, read_checkpoint, to_native, write_checkpoint

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
    with pytest.raises(CheckpointError, match=r"config\.json (is not valid JSON|must hold a JSON object)"):
        read_checkpoint(tmp_path)


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


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
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

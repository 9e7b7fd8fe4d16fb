"""The command end to end."""

import json
import os
import resource
import shutil
import subprocess
import sys

import pytest
import timm
import torch
from conversion_helpers import GOLDEN, assert_same
from safetensors.torch import load_file, save_file

from weights_convert import from_native, hf_config_from_native, read_checkpoint, to_native, write_checkpoint
from weights_convert.cli import main

WEIGHTS = GOLDEN / "tiny/weights.safetensors"


@pytest.fixture
def hf_folder(original, config, tmp_path):
    write_checkpoint(tmp_path / "hf", from_native(to_native(original)), *hf_config_from_native(config))
    return tmp_path / "hf"


def fails(capsys, *argv):
    """Run, expect exit code 2 and one line on stderr, which is returned."""
    assert main([str(arg) for arg in argv]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = captured.err.splitlines()
    return line


def test_hf_folder_to_native_and_back(hf_folder, original, config, tmp_path, capsys):
    assert main([str(hf_folder), str(tmp_path / "native")]) == 0
    out = capsys.readouterr().out
    assert "hf -> native" in out
    assert "ignored 1 x criterion.empty_weight" in out
    assert "901,865 parameters written to" in out
    native = read_checkpoint(tmp_path / "native")
    assert_same(native.state_dict, to_native(original))
    assert native.config == config
    assert main([str(tmp_path / "native"), str(tmp_path / "back"), "--to", "hf"]) == 0
    assert "added criterion.empty_weight" in capsys.readouterr().out
    for name in ("config.json", "preprocessor_config.json", "model.safetensors"):
        assert (tmp_path / "back" / name).read_bytes() == (hf_folder / name).read_bytes()


def test_report_counts_tensors_by_group(tmp_path, capsys):
    assert main([str(WEIGHTS), str(tmp_path / "a.safetensors"), "--to", "hf"]) == 0
    rows = [line.strip("│┃| ").split() for line in capsys.readouterr().out.replace("│", " ").splitlines()]
    counts = {row[0]: row[1:] for row in rows if len(row) == 3}
    assert counts["backbone.stages"] == ["74", "94"]  # 5 blocks of 13 tensors, two of them cut in three; 3 x 3 more
    assert counts["backbone.patch_embed"] == ["4", "4"]
    assert counts["transformer_decoder.layers"] == ["54", "66"]
    assert counts["all"] == ["206", "238"]
    assert len(load_file(tmp_path / "a.safetensors")) == 241


def test_bare_file_with_a_config(hf_folder, original, config, tmp_path):
    for name, source in (("a", hf_folder / "config.json"), ("b", tmp_path / "a/config.json")):
        assert main([str(WEIGHTS), str(tmp_path / name), "--config", str(source), "--temporal", "per_frame"]) == 0
        checkpoint = read_checkpoint(tmp_path / name)
        assert checkpoint.config == config | {"temporal": "per_frame"}
        assert_same(checkpoint.state_dict, to_native(original))


def test_bare_file_without_a_config(tmp_path, capsys):
    line = fails(capsys, WEIGHTS, tmp_path / "a")
    assert "SRC carries no config" in line
    assert "give --config FILE or a DST ending in .safetensors" in line
    assert os.listdir(tmp_path) == []


def test_options_without_effect_are_refused(tmp_path, capsys):
    assert "have no effect" in fails(capsys, WEIGHTS, tmp_path / "a.safetensors", "--temporal", "joint")


def test_source_is_never_overwritten(hf_folder, capsys):
    before = (hf_folder / "model.safetensors").read_bytes()
    for src, dst in (
        (hf_folder, hf_folder),
        (hf_folder, hf_folder / "../hf"),
        (hf_folder, hf_folder / "model.safetensors"),
        (hf_folder / "model.safetensors", hf_folder / "model.safetensors"),
        (hf_folder / "model.safetensors", hf_folder),
    ):
        assert "DST is SRC" in fails(capsys, src, dst)
    assert (hf_folder / "model.safetensors").read_bytes() == before


def test_config_of_other_labels(hf_folder, tmp_path, capsys):
    config = json.loads((hf_folder / "config.json").read_text())
    config["id2label"]["5"] = "surplus"
    (tmp_path / "config.json").write_text(json.dumps(config))
    line = fails(capsys, WEIGHTS, tmp_path / "a", "--config", tmp_path / "config.json")
    assert "the config has 6 labels, but the weights 5 classes" in line


def test_a_layer_that_the_weights_lack(original, hf_folder, tmp_path, capsys):
    native = {key: tensor for key, tensor in to_native(original).items() if "transformer_decoder.layers.2." not in key}
    write_checkpoint(tmp_path / "short.safetensors", native)
    line = fails(capsys, tmp_path / "short.safetensors", tmp_path / "a", "--config", hf_folder / "config.json")
    assert "the config has 3 of transformer_decoder.layers.*, but the weights 2" in line
    assert not (tmp_path / "a").exists()


def test_a_resnet_of_other_depths(original, config, tmp_path, capsys):
    weights = to_native(original)
    backbone = timm.create_model("resnet26", features_only=True).state_dict()
    weights = {key: tensor for key, tensor in weights.items() if not key.startswith("backbone.")}
    weights |= {f"backbone.model.{key}": tensor for key, tensor in backbone.items()}
    save_file(weights, tmp_path / "resnet.safetensors")
    for name in ("resnet26", "resnet50"):
        (tmp_path / "config.json").write_text(json.dumps(config | {"backbone": {"type": "timm", "name": name}}))
        argv = (tmp_path / "resnet.safetensors", tmp_path / name, "--config", tmp_path / "config.json", "--to", "hf")
        if name == "resnet26":
            assert main([str(arg) for arg in argv]) == 0
            assert read_checkpoint(tmp_path / name).config["backbone_config"]["depths"] == [2, 2, 2, 2]
        else:
            capsys.readouterr()
            assert "the config has 3 of backbone.model.layer1.*, but the weights 2" in fails(capsys, *argv)
            assert not (tmp_path / name).exists()


def test_part_of_a_model_goes_to_a_file_only(original, hf_folder, tmp_path, capsys):
    part = {key.removeprefix("backbone."): tensor for key, tensor in original.items() if ".layers.0." in key}
    part = {key: tensor for key, tensor in part.items() if key.startswith("layers.")}
    torch.save({"model": part}, tmp_path / "swin.pth")
    argv = [tmp_path / "swin.pth", tmp_path / "a", "--config", hf_folder / "config.json"]
    assert "a part of a model" in fails(capsys, *argv)
    assert main([str(tmp_path / "swin.pth"), str(tmp_path / "a.safetensors")]) == 0
    assert all(key.startswith("backbone.stages.0.") for key in load_file(tmp_path / "a.safetensors"))


@pytest.mark.parametrize("name", ["R50.yaml", "config.json", "config"])
def test_a_config_of_detectron2_is_named(name, tmp_path, capsys):
    for text in ("_BASE_: Base.yaml\nMODEL:\n  MASK_ON: True\n", "# of the original\nMODEL:\n  MASK_ON: True\n"):
        (tmp_path / name).write_text(text)
        line = fails(capsys, WEIGHTS, tmp_path / "a", "--config", tmp_path / name)
        assert f"{name}: it is a config of detectron2" in line
        assert "resnet50_youtubevis_2019" in line
    (tmp_path / name).write_text("a: 1\n")
    assert "not valid JSON" in fails(capsys, WEIGHTS, tmp_path / "a", "--config", tmp_path / name)


def test_bad_input_is_one_line(hf_folder, tmp_path, capsys):
    (tmp_path / "bad.pkl").write_bytes(b"\x80\x02cos\nsystem\nU\x02ls\x85R.")
    assert "asks for os.system" in fails(capsys, tmp_path / "bad.pkl", tmp_path / "a")
    assert "does not exist" in fails(capsys, tmp_path / "none", tmp_path / "a")
    line = fails(capsys, WEIGHTS, tmp_path / "a", "--config", tmp_path / "none.json")
    assert "none.json cannot be read: No such file" in line
    (tmp_path / "other.json").write_text('{"model_type": "detr"}')
    line = fails(capsys, WEIGHTS, tmp_path / "a", "--config", tmp_path / "other.json")
    assert "other.json: config: model_type = 'detr' is another architecture" in line
    weights = load_file(hf_folder / "model.safetensors")
    save_file(weights | {"model.more": torch.zeros(1)}, tmp_path / "more.safetensors")
    assert "more.safetensors: hf: no rule for model.more" in fails(
        capsys, tmp_path / "more.safetensors", tmp_path / "a"
    )
    assert not (tmp_path / "a").exists()


def test_a_given_config_stands_in_for_a_broken_one(hf_folder, original, tmp_path, capsys):
    shutil.copytree(hf_folder, tmp_path / "broken")
    (tmp_path / "broken/config.json").write_text("{")
    assert "config.json: it is not valid JSON" in fails(capsys, tmp_path / "broken", tmp_path / "a")
    config = ("--config", str(hf_folder / "config.json"))
    assert main([str(tmp_path / "broken"), str(tmp_path / "a"), *config]) == 0
    assert main([str(tmp_path / "broken"), str(tmp_path / "a.safetensors")]) == 0
    assert_same(load_file(tmp_path / "a.safetensors"), to_native(original))


@pytest.mark.parametrize(("field", "value"), [("kind", "fpn"), ("num_levels", 4), ("num_layers", 0)])
def test_a_variant_is_called_one_before_its_weights_are_looked_at(field, value, original, config, tmp_path, capsys):
    config["pixel_decoder"][field] = value
    weights = {key: tensor for key, tensor in to_native(original).items() if "pixel_decoder.layers" not in key}
    write_checkpoint(tmp_path / "native", weights, config)
    assert f"pixel_decoder.{field} = {value!r}" in fails(capsys, tmp_path / "native", tmp_path / "a", "--to", "hf")
    said = fails(capsys, tmp_path / "native", tmp_path / "a.safetensors")
    assert "or of a variant of the published model" in said


def test_native_config_that_hf_cannot_express(hf_folder, original, config, tmp_path, capsys):
    config["pixel_decoder"]["num_points"] = 8
    write_checkpoint(tmp_path / "native", to_native(original), config)
    assert "pixel_decoder.num_points = 8" in fails(capsys, tmp_path / "native", tmp_path / "a", "--to", "hf")
    assert not (tmp_path / "a").exists()


def test_interrupt(hf_folder, tmp_path, monkeypatch, capsys):
    def interrupt(*args, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr("weights_convert.checkpoints.save_file", interrupt)
    assert main([str(hf_folder), str(tmp_path / "native")]) == 130
    assert "interrupted" in capsys.readouterr().err
    assert not (tmp_path / "native").exists()


def test_what_is_there_is_overwritten_only_when_told(hf_folder, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty/.writing-0a1b2c3d").mkdir()  # what a killed run left
    assert main([str(hf_folder), str(tmp_path / "empty")]) == 0
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes/a.txt").write_text("a")
    (tmp_path / "file.safetensors").write_text("b")
    (tmp_path / "dangling.safetensors").symlink_to("nowhere")
    for name in ("empty", "notes", "file.safetensors", "dangling.safetensors"):
        before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
        capsys.readouterr()
        line = fails(capsys, hf_folder, tmp_path / name)
        assert f"DST ({tmp_path / name}) exists already; give another DST, or --overwrite" in line
        assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
        assert main([str(hf_folder), str(tmp_path / name), "--overwrite"]) == 0
        assert read_checkpoint(tmp_path / name).format == "native"
    assert (tmp_path / "notes/a.txt").read_text() == "a"


@pytest.mark.parametrize("target", ["native", "hf"])
def test_a_class_head_of_one_number_is_named(target, original, hf_folder, tmp_path, capsys):
    weights = to_native(original) | {"transformer_decoder.class_head.weight": torch.tensor(1.0)}
    save_file(weights, tmp_path / "odd.safetensors")
    argv = (tmp_path / "odd.safetensors", tmp_path / "a", "--to", target, "--config", hf_folder / "config.json")
    assert "the config has 5 labels, but the weights 0 classes" in fails(capsys, *argv)
    assert main([str(argv[0]), str(tmp_path / "b.safetensors"), "--to", target]) == 0


def test_a_config_that_is_not_whole(original, config, tmp_path, capsys):
    for name, value in (("backbone", 5), ("backbone", {}), ("pixel_decoder", None), ("transformer_decoder", {})):
        write_checkpoint(tmp_path / "native", to_native(original), config | {name: value})
        assert "the config is not whole" in fails(capsys, tmp_path / "native", tmp_path / "a")
    assert not (tmp_path / "a").exists()


STOPPED = """
import contextlib, io, runpy, signal
import weights_convert.checkpoints
def main():
    try:
        runpy.run_module("weights_convert", run_name="__main__")
    except SystemExit as done:
        return done.code
weights_convert.checkpoints.save_file = lambda *args, **options: signal.raise_signal(number)
signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell has ignored in what it puts in the background
for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
    with contextlib.redirect_stderr(io.StringIO()) as said:
        code = main()
    print(code, said.getvalue(), end="")
signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as under nohup
weights_convert.checkpoints.save_file = lambda *args, **options: signal.raise_signal(signal.SIGHUP)
print(main())
"""


def test_signals_that_end_a_process_leave_nothing(tmp_path):
    command = [sys.executable, "-c", STOPPED, WEIGHTS, tmp_path / "new/a.safetensors"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603 - our own command
    lines = done.stdout.splitlines()
    assert lines[:3] == ["130 weights_convert: interrupted, nothing written"] * 3
    assert (lines[-1], done.returncode, done.stderr) == ("0", 0, "")
    assert os.listdir(tmp_path / "new") == ["a.safetensors"]


def test_help_and_wrong_usage(capsys):
    for argv, code in ((["--help"], 0), ([], 2), (["a", "b", "--to", "onnx"], 2)):
        with pytest.raises(SystemExit) as stop:
            main(argv)
        assert stop.value.code == code
    assert "python -m weights_convert native/ for-transformers/ --to hf" in capsys.readouterr().out


def run(*argv, **options):
    command = [sys.executable, "-m", "weights_convert", *map(str, argv)]
    return subprocess.run(command, capture_output=True, text=True, check=False, **options)  # noqa: S603 - our own command


def test_as_a_process(tmp_path, original):
    done = run(WEIGHTS, tmp_path / "a.safetensors")
    assert (done.returncode, done.stderr) == (0, "")
    assert_same(load_file(tmp_path / "a.safetensors"), to_native(original))


def test_full_disk(tmp_path):
    """A limit on file sizes, which fails a write as a full disk does."""
    limit = 1 << 20
    done = run(
        WEIGHTS,
        tmp_path / "a.safetensors",
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    )
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert "a.safetensors cannot be written" in done.stderr
    assert os.listdir(tmp_path) == []

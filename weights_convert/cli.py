"""The command line: parse, call the library, print what was mapped."""

import argparse
import os
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from weights_convert.checkpoints import CONFIG_NAME, WEIGHTS_NAME, read_config, read_state_dict, write_checkpoint
from weights_convert.configs import RESNETS, hf_config_from_native, to_native_config
from weights_convert.convert import Translation, export_state_dict, import_state_dict
from weights_convert.errors import ConversionError, naming
from weights_convert.rules import StateDict, count_layers
from weights_convert.staging import is_occupied

_HEAD = "transformer_decoder.class_head.weight"
_DESCRIPTION = """\
Convert Video Mask2Former weights. SRC may be
  - a folder or file of transformers (old or current key names, model.safetensors or pytorch_model.bin, sharded too),
  - an original checkpoint of the research code (.pkl or .pth; detectron2 key names),
  - a Swin or ResNet classifier of timm, torchvision or detectron2, or of Swin's authors (gives the backbone only),
  - a native folder or file.
Its kind is told from its content. Nothing in it is executed. The numbers are carried over bit for bit, and a key that
no rule knows is an error. DST is a folder (config.json and model.safetensors), or a name ending in .safetensors for
the weights alone.

examples:
  python -m weights_convert video-mask2former-swin-tiny/ native/
  python -m weights_convert model_final.pkl native/ --config video-mask2former-swin-tiny/config.json
  python -m weights_convert model_final.pkl weights.safetensors
  python -m weights_convert native/ for-transformers/ --to hf

DST must be new or an empty folder, unless --overwrite is given.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        argv: Arguments without the program's name; None takes those of the process.

    Returns:
        0, or 2 for bad input (one line on stderr), or 130 when interrupted.
    """
    args = _parser().parse_args(argv)
    try:
        _convert(args.src, args.dst, args.to, args.config, args.temporal, args.overwrite)
    except (ConversionError, OSError) as error:
        print(f"weights_convert: {ConversionError(str(error))}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("weights_convert: interrupted, nothing written", file=sys.stderr)
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m weights_convert",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("src", metavar="SRC", type=Path, help="checkpoint folder or file")
    parser.add_argument("dst", metavar="DST", type=Path, help="folder to write, or a .safetensors file")
    parser.add_argument("--to", choices=("native", "hf"), default="native", help="format to write (default: native)")
    parser.add_argument(
        "--config", metavar="FILE", type=Path, help="config.json, native or of transformers, for a SRC without one"
    )
    parser.add_argument(
        "--temporal",
        choices=("joint", "per_frame"),
        help="attend over all frames (video model) or frame by frame (image model); default: as the config says",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace what DST holds")
    return parser


def _convert(src: Path, dst: Path, to: str, config_file: Path | None, temporal: str | None, overwrite: bool) -> None:
    weights_only = dst.suffix == ".safetensors"
    written = os.path.realpath(dst if weights_only else dst / WEIGHTS_NAME)
    sources = (os.path.realpath(src), os.path.realpath(src / WEIGHTS_NAME))
    if written in sources or os.path.realpath(dst) == sources[0]:
        raise ConversionError(f"DST is SRC ({src}); give another DST, SRC is never overwritten")
    if not overwrite and is_occupied(dst):
        raise ConversionError(f"DST ({dst}) exists already; give another DST, or --overwrite to replace what is there")
    if weights_only and (config_file or temporal):
        raise ConversionError(
            "a .safetensors DST has no config, so --config and --temporal have no effect: leave them out"
        )
    state_dict = read_state_dict(src)
    with naming(src):
        incoming = import_state_dict(state_dict)
    config: dict[str, Any] | None = None
    preprocessor: dict[str, Any] | None = None
    if not weights_only:
        if _HEAD not in incoming.state_dict:
            raise ConversionError(f"SRC is a part of a model, no class head ({src}): give a DST ending in .safetensors")
        path = config_file or src / CONFIG_NAME
        if not config_file and not path.exists():
            raise ConversionError(f"SRC carries no config ({src}): give --config FILE or a DST ending in .safetensors")
        found = read_config(path)
        with naming(path):
            native = config = to_native_config(*found, temporal)
            if to == "hf":  # first, as it names what sets a variant apart
                config, preprocessor = hf_config_from_native(native)
            _check_fit(incoming.state_dict, native)
    with naming(src):
        outgoing = export_state_dict(incoming.state_dict, to)
    write_checkpoint(dst, outgoing.state_dict, config, preprocessor)
    _report(incoming, outgoing, dst)


def _check_fit(native: StateDict, config: dict[str, Any]) -> None:
    """A config must have as many labels and layers as the weights of a whole model."""
    labels, classes = config.get("labels"), (native[_HEAD].shape or [1])[0] - 1
    if not isinstance(labels, list) or len(labels) != classes:
        count = len(labels) if isinstance(labels, list) else "no"
        raise ConversionError(
            f"the config has {count} labels, but the weights {classes} classes: give the matching --config"
        )
    try:
        layers = {f"{part}.layers.": config[part]["num_layers"] for part in ("pixel_decoder", "transformer_decoder")}
        if config["pixel_decoder"].get("kind", "ms_deform_attn") not in ("ms_deform_attn", "bifpn"):
            del layers["pixel_decoder.layers."]  # of a kind without
        if config["backbone"]["type"] == "swin":
            layers |= {f"backbone.stages.{i}.blocks.": depth for i, depth in enumerate(config["backbone"]["depths"])}
        elif resnet := RESNETS.get(config["backbone"].get("name")):
            layers |= {f"backbone.model.layer{i}.": depth for i, depth in enumerate(resnet["depths"], start=1)}
    except (AttributeError, KeyError, TypeError) as error:  # a native config is taken as it is
        raise ConversionError(f"the config is not whole ({error}): give a whole one by --config") from error
    for prefix, wanted in layers.items():
        if (found := count_layers(native, prefix)) != wanted:
            raise ConversionError(
                f"the config has {wanted} of {prefix}*, but the weights {found}: weights are missing, or give the "
                "matching --config"
            )


def _report(incoming: Translation, outgoing: Translation, dst: Path) -> None:
    table = Table(title=f"{incoming.format} -> {outgoing.format}", title_justify="left")
    table.add_column("group")
    table.add_column("tensors in", justify="right")
    table.add_column("tensors out", justify="right")
    taken, given = Counter[str](), Counter[str]()
    for key, names in incoming.pairs.items():
        group = ".".join(key.split(".")[:2])
        taken[group] += len(names)
        given[group] += len(outgoing.pairs[key])
    for group, count in taken.items():
        table.add_row(group, str(count), str(given[group]))
    table.add_section()
    table.add_row("all", str(taken.total()), str(given.total()))
    Console(soft_wrap=True, markup=False, emoji=False, highlight=False).print(table)
    for pattern, count in incoming.ignored.items():
        print(f"ignored {count} x {pattern}")
    for key in outgoing.added:
        print(f"added {key}")
    print(f"{sum(tensor.numel() for tensor in incoming.state_dict.values()):,} parameters written to {dst}")

"""The `train` command: it chooses a config, calls the trainer and prints."""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Literal

import tyro

from m2f_video.config import PRESETS_IN_WORDS, VideoMask2FormerConfig
from m2f_video.training.config import TRAIN_PRESETS, TrainConfig

SHOWN_PRESET = "demo"
"""Its fields are the defaults that --help shows where nothing else is chosen."""
Settings = Annotated[TrainConfig, tyro.conf.AvoidSubcommands, tyro.conf.arg(name="")]
# A record, which no flag can set; the config itself does not know of command lines.
VideoMask2FormerConfig.__annotations__["parts"] = Annotated[dict[str, str], tyro.conf.Suppress]


def train_command(argv: Sequence[str] = ()) -> Callable[..., int]:
    """The command whose flags have the defaults that `--preset`, `--config` or a resumed run give them.

    Args:
        argv: the whole command line.

    Raises:
        ConfigError: no such preset, or no valid config file.
        FileNotFoundError: no such config file.
    """
    defaults = _defaults(argv)

    def train(
        *,
        data: str,
        output: Path,
        preset: Literal[TRAIN_PRESETS] | None = None,  # type: ignore[valid-type]  # made at run time
        config: Path | None = None,
        frames: Path | None = None,
        validation: str | None = None,
        validation_frames: Path | None = None,
        validation_videos: int | None = None,
        init: str | None = None,
        init_backbone: str | None = None,
        init_partial: bool = False,
        resume: bool = False,
        device: str | None = None,
        tensorboard: bool = False,
        settings: Settings = defaults,
    ) -> int:
        """Train a model; write checkpoints, logs and, at the end, a model that other commands take.

        Writes OUTPUT/final (the model), OUTPUT/best (of the best evaluation), OUTPUT/checkpoints (to resume from),
        OUTPUT/log.csv, OUTPUT/evaluation.csv and OUTPUT/train.json (the config). The flags after --tensorboard are the
        fields of the config; their defaults are those of the preset, the config file or the resumed run. torchrun
        shares each batch among several GPUs or machines.

        Examples: m2f-video train --preset demo --data synthetic --output run

        m2f-video train --data synthetic --output run --resume

        torchrun --nproc-per-node 8 -m m2f_video train --preset swin_tiny_youtubevis_2019 --data ytvis_2019/train
        --init coco_checkpoint --output run

        Args:
            data: to train on: a folder or annotation file in the YouTubeVIS format; or synthetic:easy,
                synthetic:medium, synthetic:hard, or synthetic for the medium one.
            output: folder of the run; it must not hold another one.
            preset: recipe whose fields are the defaults: demo, or that of a published checkpoint. A resumed run has its
                own.
            config: JSON file of a recipe, such as the train.json of another run, instead of a preset.
            frames: folder of the videos' folders of frames; by default found where published datasets have it.
            validation: dataset to evaluate on; for a folder its val.json. By default the validation videos of the
                synthetic benchmark where that is trained on, and none otherwise; none says none.
            validation_frames: as frames, for --validation.
            validation_videos: only the first so many of them.
            init: weights to begin with, by hub name, folder or file; by default random ones.
            init_backbone: weights of the backbone alone to begin with: a file, folder or hub name (of a converted
                backbone, of timm, torchvision, detectron2 or Swin's authors, or of a whole model), or timm:NAME for
                pretrained ones of timm, such as timm:resnet50.a1_in1k; timm takes those of the model's own backbone.
            init_partial: load what fits of weights that are of another config, and print what was loaded, resized, left
                new and ignored: other classes, queries, layers, windows, another backbone, modules of one's own.
            resume: go on from the latest checkpoint in OUTPUT.
            device: such as cpu or cuda; by default cuda where there is one, else cpu.
            tensorboard: write TensorBoard's event files to OUTPUT/tensorboard; needs the extra m2f-video[train].
            settings: of the run.
        """
        from m2f_video.data.source import is_synthetic, open_dataset
        from m2f_video.distributed import join_workers
        from m2f_video.training.folder import BEST_FOLDER, CONFIG_FILE, FINAL_FOLDER
        from m2f_video.training.trainer import Trainer

        if preset is None and config is None and not (resume and (output / CONFIG_FILE).exists()):
            missing = f"there is no run to resume in {output}; " if resume else ""
            raise ValueError(f"{missing}give --config or --preset (demo; {PRESETS_IN_WORDS})")
        validation = validation or (data if is_synthetic(data) else "none")
        videos = open_dataset(data, "train", frames=frames)
        held_out = None
        if validation != "none":
            held_out = open_dataset(validation, "val", validation_videos, validation_frames)
        elif validation_videos is not None or validation_frames is not None:
            option = "--validation-frames" if validation_videos is None else "--validation-videos"
            raise ValueError(f"{option} needs --validation")
        with join_workers(device) as worker:
            trainer = Trainer(
                settings,
                videos,
                output,
                validation=held_out,
                worker=worker,
                resume=resume,
                init=init,
                init_backbone=init_backbone,
                init_partial=init_partial,
                tensorboard=tensorboard,
            )
            count = sum(parameter.numel() for parameter in trainer.model.parameters())
            trainer.log.say(f"{count / 1e6:.1f} million parameters, {len(videos)} videos, on {worker.device}")
            trainer.train()
            best = f"; the best, of step {trainer.best['step']:.0f}, is {output / BEST_FOLDER}" if trainer.best else ""
            trainer.log.say(f"written to {output / FINAL_FOLDER}{best}")
        return 0

    return train


def _defaults(argv: Sequence[str]) -> TrainConfig:
    """The config that the flags change, chosen by those flags that choose one."""
    if list(argv[:1]) != ["train"]:  # another command, whose --config is another thing
        return TrainConfig.preset(SHOWN_PRESET)
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--preset", default=None)
    parser.add_argument("--config", type=Path, default=None)
    parser.add_argument("--output", type=Path, default=None)
    parser.add_argument("--resume", action="store_true")
    try:
        given, _ = parser.parse_known_args(argv)
    except argparse.ArgumentError:  # a flag without its value: the real parser says so
        return TrainConfig.preset(SHOWN_PRESET)
    if given.preset is not None and given.config is not None:
        raise ValueError("give --preset or --config, not both")
    if given.config is not None and given.config.suffix in (".yaml", ".yml"):
        raise ValueError(
            f"{given.config} is YAML, as configs of detectron2 are, which cannot be read; give a --preset such as "
            "resnet50_youtubevis_2019, or the train.json of a run"
        )
    if given.config is not None:
        return TrainConfig.from_file(given.config)
    if given.preset is None and given.resume and given.output is not None:
        from m2f_video.training.folder import CONFIG_FILE

        if (given.output / CONFIG_FILE).exists():
            return TrainConfig.from_file(given.output / CONFIG_FILE)
    return TrainConfig.preset(given.preset if given.preset in TRAIN_PRESETS else SHOWN_PRESET)

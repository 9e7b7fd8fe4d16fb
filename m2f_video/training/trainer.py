"""The training loop.

A step is a function of the weights, the optimiser's state, the seed and the step's number: the order of the clips, the
learning rate and everything random derive from the last two. That is what makes a resumed run equal to one that was
never stopped, bit for bit where the device computes deterministically (CPUs do, some GPU kernels do not).
"""

import copy
import errno
import os
import time
import warnings
from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock, Timeout
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from m2f_video.backbone_weights import load_backbone
from m2f_video.config import ConfigError, VideoMask2FormerConfig
from m2f_video.data.augment import Augmentation
from m2f_video.data.clip import AnnotatedVideos, ClipDataset
from m2f_video.distributed import Worker, mean_over_workers, share_buffers
from m2f_video.evaluation.annotations import GroundTruth
from m2f_video.evaluation.predict import evaluate_model, prepare_ground_truth
from m2f_video.files import atomic_path, made_directory, remove_leftovers
from m2f_video.hub import in_words, load_checkpoint, load_state_dict_strictly, other_function
from m2f_video.modeling.pixel_decoder import DeformableEncoderLayer
from m2f_video.modeling.swin import SwinBlock
from m2f_video.modeling.transformer_decoder import DecoderLayer
from m2f_video.modeling.video_mask2former import VideoMask2Former
from m2f_video.training.batches import Batch, ClipBatches, ClipOrder, Collate, load_batches, lost_process
from m2f_video.training.checkpoint import FOLDER, list_checkpoints, load_latest_checkpoint, save_checkpoint
from m2f_video.training.config import TrainConfig
from m2f_video.training.log import (
    EVALUATIONS_FILE,
    LOGGED_PARTS,
    STEPS_FILE,
    TENSORBOARD_FOLDER,
    TrainingLog,
)
from m2f_video.training.losses import LossNorms, NonFinitePredictionError, VideoMask2FormerLoss, loss_norms
from m2f_video.training.optim import build_optimizer, learning_rate, set_learning_rate, update_average

FINAL_FOLDER, BEST_FOLDER, CONFIG_FILE = "final", "best", "train.json"
LOCK_FILE = ".lock"
"""That is there while a run is at work in its folder, and after one that was killed; it means nothing by itself."""

_PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class Trainer:
    """A training run.

    It keeps other runs out of its folder until `train` ends, however it does, or `close` is called. A run that was
    killed keeps nobody out.

    Args:
        config: what to train and how.
        videos: to train on; the model's labels become theirs.
        output: folder of the run. It gets `train.json` (the config), `log.csv`, `evaluation.csv`, `checkpoints/`, the
            folder `best/` with the weights of the best evaluation, and `final/`.
        validation: videos to evaluate on; None evaluates never.
        worker: this process; see `join_workers`.
        resume: go on from the latest checkpoint in `output`, whatever `init` and `init_backbone` are; where there is
            none, begin.
        init: weights to begin with, as `VideoMask2Former.from_pretrained` takes them; None begins with random ones. A
            classifier of other labels begins with random weights.
        init_backbone: weights of the backbone to begin with, as `load_backbone` takes them, instead of `init`.
        tensorboard: write TensorBoard's event files too.

    Raises:
        ValueError: both `init` and `init_backbone` are given; another run is at work in the folder; it holds a run and
            `resume` was not asked for; the run in it had another config or other data; no checkpoint can be read, or
            its logs cannot be gone on with; a batch cannot be divided among the workers, or they disagree on what to
            go on with; or the validation videos are missing, have other classes or no annotations.
        OSError: files cannot be read or written.
    """

    def __init__(
        self,
        config: TrainConfig,
        videos: AnnotatedVideos,
        output: Path,
        *,
        validation: AnnotatedVideos | None = None,
        worker: Worker | None = None,
        resume: bool = False,
        init: str | None = None,
        init_backbone: str | None = None,
        tensorboard: bool = False,
    ) -> None:
        if init is not None and init_backbone is not None:
            raise ValueError("give init or init_backbone, not both: the first brings a backbone along")
        self.config = config = config.replace(model=config.model.replace(labels=tuple(videos.labels)))
        self.output = output
        self.validation = validation
        self.worker = worker or Worker(0, 1, torch.device("cpu"))
        self._data = videos.fingerprint
        self._held_out = None if validation is None else validation.fingerprint
        if config.evaluate_every and validation is None:
            raise ValueError(
                f"evaluate_every={config.evaluate_every}, but there are no validation videos; give some, or leave it 0"
            )
        with ExitStack() as held:
            if self.worker.is_main:
                held.enter_context(_held(output))
            self._prepare(videos, held, resume, init, init_backbone, tensorboard)
            self._resources = held.pop_all()
        if self.worker.is_main and config.optim.warmup_steps > config.steps:
            warnings.warn(
                f"the learning rate only rises: optim.warmup_steps={config.optim.warmup_steps} is longer than the run "
                f"of {config.steps} steps",
                stacklevel=2,
            )

    def _prepare(
        self,
        videos: AnnotatedVideos,
        held: ExitStack,
        resume: bool,
        init: str | None,
        init_backbone: str | None,
        tensorboard: bool,
    ) -> None:
        """Begin or resume; what has to be closed at the end is put on `held`."""
        config, output = self.config, self.output
        state = _checked_state(output, config, (self._data, self._held_out), resume)
        self.worker.check_same(
            "the run to go on with", (config.to_json(), self._data, None if state is None else state["step"])
        )
        self._truth = self._prepare_truth()

        torch.manual_seed(config.seed)
        model = VideoMask2Former(config.model)
        knows_classes = init is None or state is not None or load_initial_weights(model, init)
        begins_with = load_backbone(model, init_backbone) if init_backbone is not None and state is None else None
        self.model = model.to(self.worker.device).train()
        self.average = copy.deepcopy(self.model).eval().requires_grad_(False) if config.optim.ema_decay else None
        if config.activation_checkpointing:
            recompute_activations(self.model)
        self.optimizer = build_optimizer(self.model, config.optim)
        self.scaler = torch.amp.GradScaler(self.worker.device.type, enabled=config.precision == "float16")
        self.loss = VideoMask2FormerLoss(config.loss, config.model.num_labels)
        self.steps_done = 0
        self.best: dict[str, float] | None = None
        if state is not None:
            self._restore(state)

        self._batches = self._load_batches(videos)
        held.callback(self._batches.close)  # and the processes behind it
        if self.worker.is_main:
            for name in (FINAL_FOLDER, BEST_FOLDER):  # which may not be written again
                remove_leftovers(output / name / name)
        self.log = TrainingLog(output, self.worker, config.steps, self.steps_done, config.log_every, tensorboard)
        held.callback(self.log.close)
        if resume:
            begun = f"resume after step {self.steps_done}" if state else "there is no checkpoint yet; begin"
            self.log.say(f"{output}: {begun}")
        if state is not None and (given := init or init_backbone):
            self.log.say(f"{given} is not loaded: the run goes on from its checkpoint")
        if state is not None and state["workers"] != self.worker.world_size:
            self.log.say(
                f"{output}: there were {state['workers']} workers and are now {self.worker.world_size}, so that other "
                "random numbers are drawn than in an uninterrupted run"
            )
        if begins_with is not None:
            self.log.say(str(begins_with))
        if not knows_classes:
            self.log.say(f"{init} knows other classes: the classifier begins with random weights")

    @property
    def result(self) -> VideoMask2Former:
        """The model whose weights are evaluated and saved: the moving average where there is one."""
        return self.model if self.average is None else self.average

    def train(self) -> VideoMask2Former:
        """Do the steps that are left, leave the model in `final/`, and close the run.

        Raises:
            NonFinitePredictionError: the model predicts NaN or infinite values; the message names step and tensor.
            ValueError: a gradient is not finite, or a clip is damaged.
            OSError: files cannot be read or written, or a process that prepares clips was killed.
        """
        try:
            with closing(self):
                self._steps()
        except RuntimeError as error:
            if not str(error).startswith("DataLoader worker"):  # which may come up anywhere, by a signal
                raise
            raise lost_process(error) from error
        return self.result.eval()

    def close(self) -> None:
        """End the processes that prepare clips, write out the log, and let other runs into the folder."""
        self._resources.close()

    def _steps(self) -> None:
        config, model = self.config, self._wrapped()
        self._begin()
        for step in range(self.steps_done, config.steps):
            started = time.perf_counter()
            rate = learning_rate(config.optim, step, config.steps)
            set_learning_rate(self.optimizer, rate)
            losses = self._gradients(model, step, list(islice(self._batches, config.accumulation)))
            grad_norm = self._update(step)
            if self.average is not None:
                update_average(self.average, self.model, config.optim.ema_decay, step)
            self.steps_done = step + 1
            numbers = mean_over_workers(losses).tolist()
            values = dict(zip(("loss", *LOGGED_PARTS), numbers, strict=True))
            values |= {"learning_rate": rate, "grad_norm": grad_norm, "seconds": time.perf_counter() - started}
            self.log.step(self.steps_done, values)
            last = self.steps_done == config.steps
            evaluates = last or (config.evaluate_every > 0 and self.steps_done % config.evaluate_every == 0)
            is_best = evaluates and self._evaluate()
            if last or is_best or self.steps_done % config.checkpoint_every == 0:
                self._save()
            if is_best:  # after the checkpoint that says so
                self._write(BEST_FOLDER)
        self._write(FINAL_FOLDER)

    def _begin(self) -> None:
        """Leave what a run needs to be resumed from its beginning, or make up for what a kill has kept from it."""
        if not self.worker.is_main:
            return
        if self.steps_done == 0:  # initial weights included
            self._save()
        with atomic_path(self.output / CONFIG_FILE) as file:
            file.write_text(self.config.to_json(), encoding="utf-8")
        if self.best is not None and self.best["step"] == self.steps_done:
            self._write(BEST_FOLDER)

    def _write(self, folder: str) -> None:
        if self.worker.is_main:
            self.result.save_pretrained(self.output / folder)

    def _wrapped(self) -> Callable[..., Any]:
        if self.worker.world_size == 1:
            return self.model
        devices = [self.worker.device] if self.worker.device.type == "cuda" else None
        decoder = self.model.transformer_decoder
        unused = len(decoder.layers) < len(decoder.input_projections)  # those of levels that no layer attends to
        return DistributedDataParallel(self.model, device_ids=devices, find_unused_parameters=unused)

    def _gradients(self, model: Callable[..., Any], step: int, parts: list[Batch]) -> Tensor:
        """Add up the gradients of a step's parts; gives the losses `loss` and `LOGGED_PARTS`."""
        config, device = self.config, self.worker.device
        norms = self._norms(parts)
        losses = torch.zeros(1 + len(LOGGED_PARTS), dtype=torch.float64)
        for number, (frames, targets) in enumerate(parts):
            generator = self._seed(step, number)
            synchronised = number == len(parts) - 1  # gradients are exchanged once, with the last part
            if isinstance(model, DistributedDataParallel):
                model.require_backward_grad_sync = synchronised
            with torch.autocast(device.type, _PRECISIONS[config.precision], enabled=config.precision != "float32"):
                output = model(frames.to(device, non_blocking=True), output_auxiliary=True)
            try:
                result = self.loss(output, targets, generator, norms)
            except NonFinitePredictionError as error:
                raise NonFinitePredictionError(f"step {step + 1}: {error}") from error
            self.scaler.scale(result.total).backward()
            values = [result.total, *(result.parts[name] for name in LOGGED_PARTS)]
            losses += torch.stack(values).detach().cpu()
        return losses

    def _norms(self, parts: list[Batch]) -> LossNorms:
        return loss_norms(
            [target for _, targets in parts for target in targets],
            num_queries=self.config.model.transformer_decoder.num_queries,
            num_labels=self.config.model.num_labels,
            no_object_weight=self.config.loss.no_object_weight,
            device=self.worker.device,
        )

    def _seed(self, step: int, part: int) -> torch.Generator:
        """Seed what a part of a step draws: points by the generator, what is dropped by the global ones."""
        entropy = (self.config.seed, step, self.worker.rank, part)
        points, dropped = np.random.SeedSequence(entropy).generate_state(2, np.uint64).tolist()
        torch.manual_seed(dropped >> 1)
        return torch.Generator(self.worker.device).manual_seed(points >> 1)

    def _update(self, step: int) -> float:
        """Clip the gradients, move the weights, and give the gradients' norm before clipping."""
        self.scaler.unscale_(self.optimizer)
        limit = self.config.optim.clip_norm or float("inf")
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), limit).item()
        # the scaler leaves such a step out and lowers the scale; once it is below 1, it is not what overflows
        if not np.isfinite(norm) and not (self.scaler.is_enabled() and self.scaler.get_scale() >= 1):
            parameters = ((name, p.grad) for name, p in self.model.named_parameters() if p.grad is not None)
            bad = next((name for name, grad in parameters if not grad.isfinite().all()), "all parameters together")
            raise ValueError(
                f"step {step + 1}: the gradient of {bad} is not finite; lower the learning rate, or go back to an "
                "earlier checkpoint"
            )
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        return norm

    def _prepare_truth(self) -> GroundTruth | None:
        """What all evaluations measure by; a fault of the validation videos comes up here, before any training."""
        if self.validation is None:
            return None
        if other := set(self.validation.labels) ^ set(self.config.model.labels):
            raise ValueError(
                f"training and validation videos must have the same classes; only one of them has {min(other)!r}"
            )
        if not self.worker.is_main:
            return None
        truth = prepare_ground_truth(self.validation)
        if truth is None:
            raise ValueError("the validation videos have no annotations: there is no truth to measure by")
        return truth

    def _evaluate(self) -> bool:
        """Measure on the validation videos, if there are any; gives whether these are the best weights so far."""
        if self.validation is None:
            return False
        share_buffers(self.result)
        stats = evaluate_model(self.result, self.validation, ground_truth=self._truth).stats
        self.log.evaluation(self.steps_done, stats)
        if self.best is not None and stats["AP"] <= self.best["AP"]:
            return False
        self.best = {"step": self.steps_done, "AP": stats["AP"]}
        return True

    def _save(self) -> None:
        if not self.worker.is_main:
            return
        state = {
            "config": self.config.to_json(),
            "data": self._data,
            "validation": self._held_out,
            "workers": self.worker.world_size,
            "model": self.model.state_dict(),
            "average": None if self.average is None else self.average.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "best": self.best,
        }
        save_checkpoint(self.output, self.steps_done, state, self.config.keep_checkpoints)

    def _restore(self, state: dict[str, Any]) -> None:
        moments, groups = _moments(state), self.optimizer.state_dict()["param_groups"]  # which the config says all of
        best, average = state.get("best"), self.average
        expected = {
            "model": self.model.state_dict(),
            "average": None if average is None else average.state_dict(),
            "scaler": self.scaler.state_dict(),
            "best": None if best is None else {"step": 0, "AP": 0.0},
        }
        wrong = [name for name, own in expected.items() if not _is_like(state.get(name), own)]
        if wrong or not self._are_moments(moments):
            raise ValueError(
                f"{_checkpoint_file(self.output, state)} does not fit its run: {(*wrong, 'optimizer')[0]} is not what "
                "was saved there; remove it to resume from the one before"
            )
        self.steps_done = state["step"]
        self.best = best
        self.model.load_state_dict(state["model"])
        if average is not None:
            average.load_state_dict(state["average"])
        self.optimizer.load_state_dict({"state": moments, "param_groups": groups})
        self.scaler.load_state_dict(state["scaler"])

    def _are_moments(self, moments: Any) -> bool:
        """Whether this is what AdamW keeps of parameters, by their number."""
        parameters = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        return isinstance(moments, dict) and all(
            isinstance(number, int)
            and 0 <= number < len(parameters)
            and _is_like(
                kept, {"step": torch.zeros(()), **dict.fromkeys(("exp_avg", "exp_avg_sq"), parameters[number])}
            )
            for number, kept in moments.items()
        )

    def _load_batches(self, videos: AnnotatedVideos) -> Generator[Batch]:
        config = self.config
        order = ClipOrder(
            len(videos),
            batch_size=config.batch_size,
            steps=(self.steps_done, config.steps),
            seed=config.seed,
            rank=self.worker.rank,
            world_size=self.worker.world_size,
            parts=config.accumulation,
        )
        clips = ClipDataset(videos, config.sampling, Augmentation(config.augment), config.seed)
        collate = Collate(config.model.preprocessing, config.model.num_labels, config.label_source)
        on_gpu = self.worker.device.type == "cuda"
        return load_batches(ClipBatches(clips, collate), order, config.num_workers, pin_memory=on_gpu)


def recompute_activations(model: nn.Module) -> None:
    """Let each Swin block, encoder layer and decoder layer compute its activations again in the backward pass.

    Backbones of timm keep theirs.
    """
    for module in model.modules():
        if isinstance(module, SwinBlock | DeformableEncoderLayer | DecoderLayer):
            module.forward = partial(checkpoint, module.forward, use_reentrant=False)  # type: ignore[method-assign]


def load_initial_weights(model: VideoMask2Former, source: str) -> bool:
    """Load a checkpoint's weights into a model; a classifier of other labels keeps the weights it has.

    Warns where the checkpoint was made for another temporal mode or other frames, as one of an image model is.

    Returns:
        Whether the classifier was loaded too.

    Raises:
        ConfigError: its weights would compute something else in this model, as with other numbers of heads.
        weights_convert.ConversionError: other weights are missing, left over, or of other shapes.
        FileNotFoundError: no such checkpoint.
    """
    config, weights = load_checkpoint(source, config=_config_for_bare_file(source, model.config))
    head = {name: own for name, own in model.state_dict().items() if name.startswith("transformer_decoder.class_head.")}
    fits = all(name not in weights or weights[name].shape == own.shape for name, own in head.items())
    knows_classes = config.labels == model.config.labels and fits  # a bare file says how many by its shapes alone
    changed = other_function(config, model.config)
    asked = {name: both for name, both in changed.items() if name == "temporal" or name.startswith("preprocessing.")}
    if other := {name: both for name, both in changed.items() if name not in asked and name != "labels"}:
        raise ConfigError(
            f"{source:.80} would compute something else here than what it was trained for: {in_words(other)}; train "
            "with its own config, or without its weights"
        )
    if asked:
        warnings.warn(f"{source:.80} was trained for other frames: {in_words(asked)}", stacklevel=4)
    load_state_dict_strictly(model, weights if knows_classes else weights | head, source)
    return knows_classes


def _config_for_bare_file(source: str, config: VideoMask2FormerConfig) -> VideoMask2FormerConfig | None:
    """A weight file without a config beside it is taken to be of this model."""
    path = Path(source)
    return config if path.is_file() and not (path.parent / "config.json").exists() else None


@contextmanager
def _held(output: Path) -> Iterator[None]:
    """Hold the folder of a run, made where missing, so that no other run writes there; the system ends that in a kill.

    Raises:
        ValueError: another run holds it.
        OSError: it cannot be written, or files and folders are in each other's place.
    """
    for path in (output, *(output / name for name in (FOLDER, FINAL_FOLDER, BEST_FOLDER, TENSORBOARD_FOLDER))):
        if os.path.lexists(path) and not path.is_dir():
            raise NotADirectoryError(
                f"{path} is a file, where a training run needs a folder; move it, or write elsewhere"
            )
    for path in (output / name for name in (CONFIG_FILE, STEPS_FILE, EVALUATIONS_FILE, LOCK_FILE)):
        if path.is_dir():
            raise IsADirectoryError(
                f"{path} is a folder, where a training run needs a file; move it, or write elsewhere"
            )
    with made_directory(output):
        lock = FileLock(output / LOCK_FILE, thread_local=False)
        try:
            lock.acquire(timeout=0)
        except Timeout as error:
            raise ValueError(
                f"another training run is at work in {output}; wait for its end, or write elsewhere"
            ) from error
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.EOPNOTSUPP):
                raise
            warnings.warn(f"{output} cannot be locked: let no second run write there ({error.strerror})", stacklevel=2)
        try:
            yield
        finally:
            with suppress(OSError):  # Windows lets nobody remove what is open
                (output / LOCK_FILE).unlink()  # while it is locked: who has it open will look for a new one
            lock.release()


def _checkpoint_file(output: Path, state: dict[str, Any]) -> Path:
    return dict(list_checkpoints(output))[state["step"]]


def _moments(state: dict[str, Any]) -> Any:
    optimizer = state.get("optimizer")
    return optimizer.get("state") if isinstance(optimizer, dict) else None


def _is_like(found: Any, own: Any) -> bool:
    """Whether a part of a checkpoint has the form of what it is to replace: keys, and types and shapes of values."""
    if isinstance(own, Tensor):
        if not isinstance(found, Tensor) or found.is_nested or found.layout != torch.strided:
            return False
        return (found.shape, found.dtype, found.device.type) == (own.shape, own.dtype, "cpu")
    if isinstance(own, dict):
        return (
            isinstance(found, dict)
            and found.keys() == own.keys()
            and all(_is_like(found[key], own[key]) for key in own)
        )
    return type(found) is type(own)


def _checked_state(
    output: Path, config: TrainConfig, data: tuple[str, str | None], resume: bool
) -> dict[str, Any] | None:
    """The state to resume from; None to begin. `data` is of the training and of the validation videos."""
    if not resume:
        traces = (FINAL_FOLDER, BEST_FOLDER, CONFIG_FILE, STEPS_FILE, EVALUATIONS_FILE)
        if list_checkpoints(output) or any((output / name).exists() for name in traces):
            raise ValueError(f"{output} holds a training run already; go on with it by resume, or write elsewhere")
        return None
    state = load_latest_checkpoint(output)
    if state is None:
        return None
    file = _checkpoint_file(output, state)
    try:
        before = TrainConfig.from_json(state["config"])
    except ConfigError as error:
        raise ConfigError(f"{file}: {error}") from error
    if names := before.differences(config):
        raise ValueError(
            f"the run in {output} has another {', '.join(names[:5])}; resume it with the config it began with "
            f"({output / CONFIG_FILE})"
        )
    for kind, was, now in zip(("training", "validation"), (state["data"], state["validation"]), data, strict=True):
        if was != now:
            raise ValueError(
                f"the {kind} videos are not those that the run in {output} began with (another dataset, or its "
                "annotations, labels or videos have changed); give or restore them, or start a new run"
            )
    return state

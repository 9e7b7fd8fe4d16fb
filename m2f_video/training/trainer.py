"""The training loop.

A step is a function of the weights, the optimiser's state, the seed and the step's number: the order of the clips, the
learning rate and everything random derive from the last two. That is what makes a resumed run equal to one that was
never stopped, bit for bit where the device computes deterministically (CPUs do, some GPU kernels do not).
"""

import copy
import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from m2f_video.config import VideoMask2FormerConfig
from m2f_video.data.augment import Augmentation
from m2f_video.data.clip import AnnotatedVideos, ClipDataset
from m2f_video.evaluation.annotations import GroundTruth
from m2f_video.evaluation.predict import evaluate_model, prepare_ground_truth
from m2f_video.hub import load_checkpoint, load_state_dict_strictly
from m2f_video.modeling.pixel_decoder import DeformableEncoderLayer
from m2f_video.modeling.swin import SwinBlock
from m2f_video.modeling.transformer_decoder import DecoderLayer
from m2f_video.modeling.video_mask2former import VideoMask2Former
from m2f_video.training.batches import Batch, ClipBatches, ClipOrder, Collate, load_batches
from m2f_video.training.checkpoint import list_checkpoints, load_latest_checkpoint, save_checkpoint
from m2f_video.training.config import TrainConfig
from m2f_video.training.distributed import Worker, mean_over_workers, share_buffers
from m2f_video.training.log import TrainingLog
from m2f_video.training.losses import LossNorms, NonFinitePredictionError, VideoMask2FormerLoss, loss_norms
from m2f_video.training.optim import build_optimizer, learning_rate, set_learning_rate, update_average
from m2f_video.video_io import atomic_path

FINAL_FOLDER, BEST_FOLDER, CONFIG_FILE = "final", "best", "train.json"
LOGGED_PARTS = ("loss_ce", "loss_mask", "loss_dice")
"""Of the final prediction; `loss` is the sum over all depths."""

_PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class Trainer:
    """A training run.

    Args:
        config: what to train and how.
        videos: to train on; the model's labels become theirs.
        output: folder of the run. It gets `train.json` (the config), `log.csv`, `evaluation.csv`, `checkpoints/`, the
            folder `best/` with the weights of the best evaluation, and `final/`.
        validation: videos to evaluate on; None evaluates never.
        worker: this process; see `join_workers`.
        resume: go on from the latest checkpoint in `output`; where there is none, begin.
        init: weights to begin with, as `VideoMask2Former.from_pretrained` takes them; None begins with random ones. A
            classifier of other labels begins with random weights.
        tensorboard: write TensorBoard's event files too.

    Raises:
        ValueError: the folder holds a run and `resume` was not asked for; the run in it had another config or other
            data; no checkpoint can be read; a batch cannot be divided among the workers; or the validation videos have
            other classes or no annotations.
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
        tensorboard: bool = False,
    ) -> None:
        self.config = config = config.replace(model=config.model.replace(labels=tuple(videos.labels)))
        self.output = output
        self.validation = validation
        self.worker = worker or Worker(0, 1, torch.device("cpu"))
        self._data = videos.fingerprint
        state = _checked_state(output, config, self._data, resume)
        self._truth = self._prepare_truth()

        torch.manual_seed(config.seed)
        model = VideoMask2Former(config.model)
        if init is not None and state is None:
            load_initial_weights(model, init)
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
        if self.worker.is_main:
            output.mkdir(parents=True, exist_ok=True)
            with atomic_path(output / CONFIG_FILE) as file:
                file.write_text(config.to_json(), encoding="utf-8")
        self.log = TrainingLog(output, self.worker, config.steps, self.steps_done, config.log_every, tensorboard)
        if resume:
            begun = f"resume after step {self.steps_done}" if state else "there is no checkpoint yet; begin"
            self.log.say(f"{output}: {begun}")
        if init is not None and state is None:
            self._save()  # a run that is killed before its first checkpoint must not be resumed from random weights

    @property
    def result(self) -> VideoMask2Former:
        """The model whose weights are evaluated and saved: the moving average where there is one."""
        return self.average or self.model

    def train(self) -> VideoMask2Former:
        """Do the steps that are left, and leave the model in `final/`.

        Raises:
            NonFinitePredictionError: the model predicts NaN or infinite values; the message names step and tensor.
            ValueError: a gradient is not finite, or a clip is damaged.
            OSError: files cannot be read or written.
        """
        config, model = self.config, self._wrapped()
        for step in range(self.steps_done, config.steps):
            started = time.perf_counter()
            set_learning_rate(self.optimizer, rate := learning_rate(config.optim, step, config.steps))
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
            if last or (config.evaluate_every and self.steps_done % config.evaluate_every == 0):
                self._evaluate()
            if last or self.steps_done % config.checkpoint_every == 0:
                self._save()
        if self.worker.is_main:
            self.result.save_pretrained(self.output / FINAL_FOLDER)
        self.log.close()
        return self.result.eval()

    def _wrapped(self) -> Callable[..., Any]:
        if self.worker.world_size == 1:
            return self.model
        devices = [self.worker.device] if self.worker.device.type == "cuda" else None
        return DistributedDataParallel(self.model, device_ids=devices)

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
            losses += torch.stack(values).detach().double().cpu()
        return losses.to(device if device.type == "cuda" else "cpu")

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

    def _evaluate(self) -> None:
        """Measure on the validation videos; keep the best weights apart."""
        if self.validation is None:
            return
        share_buffers(self.result)
        stats = evaluate_model(self.result, self.validation, ground_truth=self._truth).stats
        self.log.evaluation(self.steps_done, stats)
        if self.best is None or stats["AP"] > self.best["AP"]:
            self.best = {"step": self.steps_done, "AP": stats["AP"]}
            if self.worker.is_main:
                self.result.save_pretrained(self.output / BEST_FOLDER)

    def _save(self) -> None:
        if not self.worker.is_main:
            return
        state = {
            "config": self.config.to_json(),
            "data": self._data,
            "model": self.model.state_dict(),
            "average": None if self.average is None else self.average.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "best": self.best,
        }
        save_checkpoint(self.output, self.steps_done, state, self.config.keep_checkpoints)

    def _restore(self, state: dict[str, Any]) -> None:
        self.steps_done = state["step"]
        self.best = state["best"]
        self.model.load_state_dict(state["model"])
        if self.average is not None:
            self.average.load_state_dict(state["average"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])

    def _load_batches(self, videos: AnnotatedVideos) -> Iterator[Batch]:
        config = self.config
        order = ClipOrder(
            len(videos),
            batch_size=config.batch_size,
            steps=(self.steps_done, max(config.steps, self.steps_done)),
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


def load_initial_weights(model: VideoMask2Former, source: str) -> None:
    """Load a checkpoint's weights into a model; a classifier of other labels keeps the weights it has.

    Raises:
        weights_convert.ConversionError: other weights are missing, left over, or of other shapes.
        FileNotFoundError: no such checkpoint.
    """
    config, weights = load_checkpoint(source, config=_config_for_bare_file(source, model.config))
    head = {name: own for name, own in model.state_dict().items() if name.startswith("transformer_decoder.class_head.")}
    fits = all(name not in weights or weights[name].shape == own.shape for name, own in head.items())
    if config.labels != model.config.labels or not fits:  # a bare file says its number of labels by its shapes alone
        weights |= head
    load_state_dict_strictly(model, weights, source)


def _config_for_bare_file(source: str, config: VideoMask2FormerConfig) -> VideoMask2FormerConfig | None:
    """A weight file without a config beside it is taken to be of this model."""
    path = Path(source)
    return config if path.is_file() and not (path.parent / "config.json").exists() else None


def _checked_state(output: Path, config: TrainConfig, data: str, resume: bool) -> dict[str, Any] | None:
    """The state to resume from; None to begin."""
    if not resume:
        if list_checkpoints(output) or (output / FINAL_FOLDER).exists():
            raise ValueError(f"{output} holds a training run already; go on with it by resume, or write elsewhere")
        return None
    state = load_latest_checkpoint(output)
    if state is None:
        return None
    before = TrainConfig.from_json(state["config"])
    if names := before.differences(config):
        raise ValueError(
            f"the run in {output} has another {', '.join(names[:5])}; resume it with the config it began with "
            f"({output / CONFIG_FILE})"
        )
    if state["data"] != data:
        raise ValueError(
            f"the training data are not those that the run in {output} began with (annotations, labels or videos have "
            "changed); restore them, or start a new run"
        )
    return state

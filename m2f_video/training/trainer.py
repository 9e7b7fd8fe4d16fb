"""The training loop.

A step is a function of the weights, the optimiser's state, the seed and the step's number: the order of the clips, the
learning rate and everything random derive from the last two. That is what makes a resumed run equal to one that was
never stopped, bit for bit where the device computes deterministically (CPUs do, some GPU kernels do not).
"""

import copy
import os
import time
import warnings
from collections.abc import Callable, Generator
from contextlib import ExitStack, closing
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from m2f_video.data.augment import Augmentation
from m2f_video.data.clip import AnnotatedVideos, ClipDataset
from m2f_video.distributed import Worker, mean_over_workers, share_buffers
from m2f_video.evaluation.annotations import GroundTruth
from m2f_video.evaluation.predict import evaluate_model, prepare_ground_truth
from m2f_video.files import atomic_path, remove_leftovers
from m2f_video.modeling.build import Parts, with_parts
from m2f_video.modeling.pixel_decoder import DeformableEncoderLayer
from m2f_video.modeling.swin import SwinBlock
from m2f_video.modeling.transformer_decoder import DecoderLayer
from m2f_video.modeling.video_mask2former import VideoMask2Former
from m2f_video.training.batches import Batch, ClipBatches, ClipOrder, Collate, load_batches, lost_process
from m2f_video.training.checkpoint import checkpoint_file, save_checkpoint
from m2f_video.training.config import TrainConfig
from m2f_video.training.folder import (
    BEST_FOLDER,
    CONFIG_FILE,
    FINAL_FOLDER,
    check_unused,
    held_folder,
    state_to_resume,
)
from m2f_video.training.initial_weights import InitialWeights
from m2f_video.training.log import LOGGED_PARTS, TrainingLog
from m2f_video.training.losses import NonFinitePredictionError, VideoMask2FormerLoss, loss_norms
from m2f_video.training.optim import build_optimizer, learning_rate, set_learning_rate, update_average


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
        init_partial: load what fits of them, as `load_partially` and `load_backbone` do; the log begins with the table
            of what was done.
        tensorboard: write TensorBoard's event files too.
        parts: modules of your own that the model is built with, as for `VideoMask2Former`. The run records their names,
            and goes on with parts of the same names alone.

    Raises:
        ConfigError: a part that there is no place for, or one that the config records and that is not given.
        ValueError: both `init` and `init_backbone` are given, or `init_partial` and none of them; another run is at
            work in the folder; it holds a run and `resume` was not asked for; the run in it had another config or other
            data; no checkpoint can be read, or its logs cannot be gone on with; a batch cannot be divided among the
            workers, or they disagree on what to go on with; or the validation videos are missing, have other classes or
            no annotations.
        OSError: files cannot be read or written.
    """

    def __init__(
        self,
        config: TrainConfig,
        videos: AnnotatedVideos,
        output: str | os.PathLike[str],
        *,
        validation: AnnotatedVideos | None = None,
        worker: Worker | None = None,
        resume: bool = False,
        init: str | None = None,
        init_backbone: str | None = None,
        init_partial: bool = False,
        tensorboard: bool = False,
        parts: Parts | None = None,
    ) -> None:
        initial = InitialWeights(init, init_backbone, init_partial)
        self.parts = parts or {}
        model = with_parts(config.model.replace(labels=tuple(videos.labels)), self.parts)
        self.config = config = config.replace(model=model)
        self.output = output = Path(output)
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
                held.enter_context(held_folder(output))
            if not resume:
                check_unused(output)
            state = state_to_resume(output, config, self._data, self._held_out) if resume else None
            self.worker.check_same(
                "the run to go on with", (config.to_json(), self._data, None if state is None else state["step"])
            )
            self._truth = self._prepare_truth()
            said = self._build(state, initial)
            self._batches = self._load_batches(videos)
            held.callback(self._batches.close)  # and the processes behind it
            self.log = TrainingLog(output, self.worker, config.steps, self.steps_done, config.log_every, tensorboard)
            held.callback(self.log.close)
            if resume:
                begun = f"resume after step {self.steps_done}" if state else "there is no checkpoint yet; begin"
                self.log.say(f"{output}: {begun}")
            for line in said:
                self.log.say(line)
            self._resources = held.pop_all()
        if self.worker.is_main and config.optim.warmup_steps > config.steps:
            warnings.warn(
                f"the learning rate only rises: optim.warmup_steps={config.optim.warmup_steps} is longer than the run "
                f"of {config.steps} steps",
                stacklevel=2,
            )

    def _build(self, state: dict[str, Any] | None, initial: InitialWeights) -> list[str]:
        """Make all that has a state, as it is at the beginning or was saved; gives what there is to say about it."""
        config, said = self.config, []
        torch.manual_seed(config.seed)
        model = VideoMask2Former(config.model, self.parts)
        if state is not None:
            if initial.source:
                said.append(f"{initial.source} is not loaded: the run goes on from its checkpoint")
            if state["workers"] != self.worker.world_size:
                said.append(
                    f"{self.output}: there were {state['workers']} workers and are now {self.worker.world_size}, so "
                    "that other random numbers are drawn than in an uninterrupted run"
                )
        else:
            said += initial.load(model)
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
        return said

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
        for name in (FINAL_FOLDER, BEST_FOLDER):  # which may not be written again
            remove_leftovers(self.output / name / name)
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
        idle_levels = len(decoder.layers) < max(len(decoder.input_projections), 1)  # that no layer attends to
        unused = idle_levels or bool(self.parts)  # of which nobody knows
        return DistributedDataParallel(self.model, device_ids=devices, find_unused_parameters=unused)

    def _gradients(self, model: Callable[..., Any], step: int, parts: list[Batch]) -> Tensor:
        """Add up the gradients of a step's parts; gives the losses `loss` and `LOGGED_PARTS`."""
        config, device = self.config, self.worker.device
        norms = loss_norms(
            [target for _, targets in parts for target in targets],
            num_queries=config.model.transformer_decoder.num_queries,
            num_labels=config.model.num_labels,
            no_object_weight=config.loss.no_object_weight,
            device=device,
        )
        losses = torch.zeros(1 + len(LOGGED_PARTS), dtype=torch.float64)
        for number, (frames, targets) in enumerate(parts):
            generator = self._seed(step, number)
            synchronised = number == len(parts) - 1  # gradients are exchanged once, with the last part
            if isinstance(model, DistributedDataParallel):
                model.require_backward_grad_sync = synchronised
            with torch.autocast(device.type, getattr(torch, config.precision), enabled=config.precision != "float32"):
                output = model(frames.to(device, non_blocking=True), output_auxiliary=True)
            try:
                result = self.loss(output, targets, generator, norms)
            except NonFinitePredictionError as error:
                raise NonFinitePredictionError(f"step {step + 1}: {error}") from error
            self.scaler.scale(result.total).backward()
            values = [result.total, *(result.parts[name] for name in LOGGED_PARTS)]
            losses += torch.stack(values).detach().cpu()
        return losses

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
        if self.worker.is_main:
            save_checkpoint(self.output, self.steps_done, self._state(), self.config.keep_checkpoints)

    def _state(self) -> dict[str, Any]:
        return {
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

    def _restore(self, state: dict[str, Any]) -> None:
        own, moments = self._state(), state["optimizer"]["state"]
        optimizer = own["optimizer"] | {"state": moments}  # the config says all of the rest
        parameters = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        kept = {
            number: {"step": torch.zeros(()), "exp_avg": parameter, "exp_avg_sq": parameter}
            for number, parameter in enumerate(parameters)
            if number in moments
        }
        pairs = {name: (state[name], own[name]) for name in ("model", "average", "scaler")}
        pairs["optimizer"] = moments, kept
        if wrong := [name for name, (found, expected) in pairs.items() if _form(found) != _form(expected)]:
            raise ValueError(
                f"{checkpoint_file(self.output, state['step'])} does not fit its run: {wrong[0]} is not what was saved "
                "there; remove it to resume from the one before"
            )
        self.steps_done, self.best = state["step"], state["best"]
        self.model.load_state_dict(state["model"])
        if self.average is not None:
            self.average.load_state_dict(state["average"])
        self.optimizer.load_state_dict(optimizer)
        self.scaler.load_state_dict(state["scaler"])

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


def _form(part: object) -> object:
    """What has to be equal in a part of a checkpoint and in what it replaces: keys, shapes and types of values."""
    if isinstance(part, dict):
        return {key: _form(value) for key, value in part.items()}
    return (part.shape, part.dtype) if isinstance(part, Tensor) else type(part)

"""The training loop.

A step is a function of the weights, the optimiser's state, the seed and the step's number: the order of the clips, the
learning rate and everything random derive from the last two. That is what makes a resumed run equal to one that was
never stopped, bit for bit where the device computes deterministically (CPUs do, some GPU kernels do not).
"""

import os
import time
import warnings
from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack, closing, contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from m2f_video.config import TRAINING_PARTS, VideoMask2FormerConfig
from m2f_video.data.augment import Augmentation
from m2f_video.data.clip import AnnotatedVideos, ClipDataset
from m2f_video.distributed import Worker, mean_over_workers, share_buffers, share_weights
from m2f_video.evaluation.annotations import GroundTruth
from m2f_video.evaluation.predict import evaluate_model, prepare_ground_truth
from m2f_video.files import atomic_path, remove_leftovers
from m2f_video.hub import first_misfit
from m2f_video.modeling.as_built import changes, tensors_of
from m2f_video.modeling.build import Parts, require_parts, with_parts
from m2f_video.modeling.transformer_decoder import SCALES
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
from m2f_video.training.given_model import check_unchanged, config_of, copied, holding, recompute_activations
from m2f_video.training.initial_weights import InitialWeights
from m2f_video.training.log import LOGGED_PARTS, TrainingLog
from m2f_video.training.losses import LossOutput, NonFinitePredictionError, build_loss, loss_norms
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
        parts: modules of your own that the model is built with, as for `VideoMask2Former`, and a `loss` or `matcher` of
            your own. The run records their names, and goes on with parts of the same names alone.
        model: to train, in place, instead of one that is built from the config: with all that was done to it, hooks and
            patches included, which take part in training and evaluation whenever they are set. They are in no
            checkpoint: set them again before a run is resumed, whose weights are then loaded into this model. Its
            config becomes the run's. A loss or matcher of your own is one that it was built with. It is put in training
            mode; weights that need no gradient stay as they are. What modules keep outside the state dict, as buffers
            that are not persistent, is not averaged or resumed.

    Raises:
        TypeError: `model` is no `VideoMask2Former`.
        ConfigError: a part that there is no place for, or one that the config records and that is not given; or `model`
            does not fit the config or the data.
        ValueError: more than one of `init`, `init_backbone` and `model` is given, `parts` with `model`, or
            `init_partial` and nothing to load; no weight of `model` learns, or its state dict is not its state; another
            run is at work in the folder; it holds a run and `resume` was not asked for; the run in it had another
            config or other data; no checkpoint can be read, or its logs cannot be gone on with; a batch cannot be
            divided among the workers, or they disagree on what to go on with; or the validation videos are missing,
            have other classes or no annotations.
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
        model: VideoMask2Former | None = None,
    ) -> None:
        initial = InitialWeights(init, init_backbone, init_partial)
        labels = tuple(videos.labels)
        if model is None:
            self.parts = parts or {}
            built = with_parts(config.model.replace(labels=labels), self.parts)
            require_parts(built, self.parts, TRAINING_PARTS)
        else:
            if initial.source or parts:
                raise ValueError(
                    "give model or what it is made from, not both: build it with its parts, and load weights into it, "
                    "by from_pretrained or load_backbone, before"
                )
            built = config_of(model, config.model, labels)
            self.parts = model.training_parts
        self.config = config = config.replace(model=built)
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
            said = self._build(state, initial, model)
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

    def _build(
        self, state: dict[str, Any] | None, initial: InitialWeights, given: VideoMask2Former | None
    ) -> list[str]:
        """Make all that has a state, as it is at the beginning or was saved; gives what there is to say about it."""
        config, said = self.config, []
        torch.manual_seed(config.seed)
        model = given or VideoMask2Former(config.model, self.parts)
        if given and (done := str(changes(given))):
            said.append(f"the model given is not what its config builds: {done}; do the same before it is resumed")
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
        self._is_given = given is not None
        if self._is_given:
            share_weights(self.model)
        self._names = self.model.state_dict().keys()
        self.average = copied(self.model.state_dict()) if config.optim.ema_decay else None
        self.optimizer = build_optimizer(self.model, config.optim)
        self.scaler = torch.amp.GradScaler(self.worker.device.type, enabled=config.precision == "float16")
        self.loss = build_loss(config.loss, config.model.num_labels, self.parts)
        self.steps_done = 0
        self.best: dict[str, float] | None = None
        if state is not None:
            self._restore(state)
        return said

    @contextmanager
    def result(self) -> Iterator[VideoMask2Former]:
        """The model as it is evaluated and saved: with the moving average of its weights where there is one."""
        with holding(self.model, self.average):
            yield self.model

    def train(self) -> VideoMask2Former:
        """Do the steps that are left, leave the model in `final/`, and close the run.

        Returns:
            `model`, which has the weights of `final/` then.

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
        if self.average is not None:
            self.model.load_state_dict(self.average)
        return self.model.eval()

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
        check_unchanged(self.model, self.config.model, self.optimizer, self._names)
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
            with self.result() as model:
                model.save_pretrained(self.output / folder)

    def _wrapped(self) -> Callable[..., Any]:
        if self.worker.world_size == 1:
            return self.model
        devices = [self.worker.device] if self.worker.device.type == "cuda" else None
        unused = _may_idle(self.config.model) or self._is_given or bool(self.parts)  # of which nobody knows
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
            low = config.precision != "float32"
            with (
                torch.autocast(device.type, getattr(torch, config.precision), enabled=low),
                recompute_activations(self.model, config.activation_checkpointing),
            ):
                output = model(frames.to(device, non_blocking=True), config.loss.deep_supervision)
            try:
                result = self.loss(output, targets, generator, norms)
            except NonFinitePredictionError as error:
                raise NonFinitePredictionError(f"step {step + 1}: {error}") from error
            if not isinstance(result, LossOutput):
                raise TypeError(f"a loss must give a m2f_video.training.LossOutput, got {type(result).__name__}")
            self.scaler.scale(result.total).backward()
            absent = result.total.new_tensor(float("nan"))  # a loss of one's own may have other parts
            values = [result.total, *(result.parts.get(name, absent) for name in LOGGED_PARTS)]
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
        with self.result() as model:
            share_buffers(model)
            stats = evaluate_model(model, self.validation, ground_truth=self._truth).stats
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
            "model": tensors_of(self.model),
            "average": self.average,
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
        if self._is_given and (misfit := first_misfit(own["model"], state["model"])):
            raise ValueError(f"the run in {self.output} is of another model than the one given: {misfit}")
        if wrong := [name for name, (found, expected) in pairs.items() if _form(found) != _form(expected)]:
            raise ValueError(
                f"{checkpoint_file(self.output, state['step'])} does not fit its run: {wrong[0]} is not what was saved "
                "there; remove it to resume from the one before"
            )
        self.steps_done, self.best = state["step"], state["best"]
        self.model.load_state_dict(state["model"])
        if self.average is not None:
            self.average = copied({name: state["average"][name].to(own) for name, own in self.average.items()})
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


def _may_idle(config: VideoMask2FormerConfig) -> bool:
    """Whether weights may have no part in any prediction: of levels that no layer attends to, or without any layer."""
    decoder, encoder = config.transformer_decoder, config.pixel_decoder
    layers_to_see_all = {"round_robin": len(SCALES), "concatenated": 1}.get(decoder.features)
    without_layer = encoder.kind == "ms_deform_attn" and encoder.num_layers == 0  # which has an embedding of levels
    return layers_to_see_all is None or decoder.num_layers < layers_to_see_all or without_layer


def _form(part: object) -> object:
    """What has to be equal in a part of a checkpoint and in what it replaces: keys, shapes and types of values."""
    if isinstance(part, dict):
        return {key: _form(value) for key, value in part.items()}
    return (part.shape, part.dtype) if isinstance(part, Tensor) else type(part)

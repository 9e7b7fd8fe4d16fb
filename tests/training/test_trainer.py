"""What a run does: the effect of what steers it, its outputs, and how it ends when numbers go wrong."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from m2f_video import VideoMask2Former
from m2f_video.data import SyntheticVideos
from m2f_video.evaluation import evaluate_model, predict
from m2f_video.evaluation.video_ap import STATS
from m2f_video.modeling.cross_attention import CrossAttention
from m2f_video.modeling.ms_deform_attn import MSDeformAttn
from m2f_video.modeling.swin import Mlp
from m2f_video.training import (
    NonFinitePredictionError,
    OptimConfig,
    TrainConfig,
    Trainer,
    batches,
    trainer,
)
from m2f_video.training.checkpoint import checkpoint_file, list_checkpoints, load_latest_checkpoint
from m2f_video.training.optim import learning_rate
from tests.tolerances import identical
from tests.training.tiny_run import (
    CONFIG,
    EXACT,
    HARD,
    MODEL,
    VIDEOS,
    column,
    final_weights,
    largest_difference,
    plain_descent,
    rows,
    train,
    train_until,
)

BASE = CONFIG.replace(steps=2, optim=OptimConfig(milestones=(1,)), checkpoint_every=2)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("base")
    train(output, BASE, videos=HARD)
    return output


def test_a_run_is_repeatable_and_leaves_its_files(base: Path, tmp_path: Path) -> None:
    output = tmp_path / "made" / "where missing"
    done = train(str(output), BASE, videos=HARD)  # a path or a text
    assert final_weights(output) == final_weights(base)
    assert sorted(file.name for file in output.iterdir()) == ["checkpoints", "final", "log.csv", "train.json"]
    assert TrainConfig.from_file(output / "train.json") == BASE
    assert identical(VideoMask2Former.from_pretrained(output / "final"), done.model)
    assert not done.model.training
    assert [row["step"] for row in rows(output)] == ["1", "2"]
    assert rows(output)[0].keys() == {
        "step", "loss", "loss_ce", "loss_mask", "loss_dice", "learning_rate", "grad_norm"
    }  # fmt: skip
    assert column(output, "learning_rate") == [learning_rate(BASE.optim, step, 2) for step in range(2)]


def test_a_model_takes_the_labels_of_the_data(tmp_path: Path) -> None:
    model = MODEL.replace(labels=("cat", "dog"))
    made = Trainer(CONFIG.replace(model=model), VIDEOS, tmp_path)
    assert made.model.config.labels == VIDEOS.labels
    made.train()
    assert TrainConfig.from_file(tmp_path / "train.json").model.labels == VIDEOS.labels


def test_parts_of_a_batch_add_up_to_the_same_update(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trainer, "build_optimizer", plain_descent)
    config = EXACT.replace(
        batch_size=4, steps=2, optim=OptimConfig(learning_rate=1e-2, clip_norm=1.0), checkpoint_every=4
    )
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    before = Trainer(config, HARD, tmp_path / "before").model.state_dict()
    once, twice = train(whole, config, videos=HARD), train(parts, config.replace(accumulation=2), videos=HARD)
    for name in ("loss", "loss_ce", "loss_mask", "loss_dice", "grad_norm"):
        assert column(parts, name) == pytest.approx(column(whole, name), rel=1e-3 if name == "grad_norm" else 1e-5)
    assert largest_difference(once.model.state_dict(), before) > 1e-3
    assert largest_difference(once.model.state_dict(), twice.model.state_dict()) < 1e-6


def test_activations_are_computed_again_rather_than_kept(tmp_path: Path) -> None:
    calls: dict[type[nn.Module], int] = {}

    def count(module: nn.Module, *_: object) -> None:
        calls[type(module)] = calls.get(type(module), 0) + 1

    def counted(output: Path, config: TrainConfig) -> dict[type[nn.Module], int]:
        calls.clear()
        handle = nn.modules.module.register_module_forward_pre_hook(count)
        try:
            train(output, config)
        finally:
            handle.remove()
        return {kind: calls[kind] for kind in (Mlp, MSDeformAttn, CrossAttention)}

    kept, again = tmp_path / "kept", tmp_path / "again"
    once = counted(kept, CONFIG)
    assert once == {Mlp: 3 * 4, MSDeformAttn: 3 * 1, CrossAttention: 3 * 2}  # in each of 3 steps
    twice = counted(again, CONFIG.replace(activation_checkpointing=True))
    assert twice == {kind: 2 * number for kind, number in once.items()}
    assert final_weights(again) == final_weights(kept)  # what is dropped is dropped again
    assert rows(again) == rows(kept)


@pytest.mark.parametrize("deep", [True, False])
def test_masks_of_every_depth_are_made_for_deep_supervision_alone(deep: bool, tmp_path: Path) -> None:
    made = Trainer(CONFIG.replace(loss=replace(CONFIG.loss, deep_supervision=deep)), VIDEOS, tmp_path)
    depths: list[int] = []
    handle = made.model.register_forward_hook(lambda _, __, output: depths.append(len(output.auxiliary or ())))
    made.loss = lambda *arguments, loss=made.loss: handle.remove() or loss(*arguments)
    made.train()
    assert depths == [3 if deep else 0]


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_lower_precision_is_that_of_the_products_alone(precision: str, tmp_path: Path) -> None:
    made = Trainer(CONFIG.replace(precision=precision, steps=1), VIDEOS, tmp_path)
    seen: dict[str, torch.dtype] = {}
    for name, module in made.model.named_modules():
        if isinstance(module, nn.Linear):
            module.register_forward_hook(lambda _, __, output, name=name: seen.__setitem__(name, output.dtype))
    losses: list[torch.dtype] = []
    loss = made.loss
    made.loss = lambda *arguments: losses.append((result := loss(*arguments)).total.dtype) or result
    with pytest.warns(UserWarning, match="hooks, patches and settings cannot be"):
        made.train()
    low = getattr(torch, precision)
    assert seen == {name: torch.float32 if name.startswith("pixel_decoder.") else low for name in seen}
    assert {name.partition(".")[0] for name in seen} == {"backbone", "pixel_decoder", "transformer_decoder"}
    assert losses == [torch.float32]
    assert {weight.dtype for weight in load_file(tmp_path / "final" / "model.safetensors").values()} == {torch.float32}
    assert {state["exp_avg"].dtype for state in made.optimizer.state.values()} <= {torch.float32}
    assert made.scaler.is_enabled() == (precision == "float16")


def test_a_backbone_without_a_learning_rate_stays(tmp_path: Path) -> None:
    config = CONFIG.replace(optim=OptimConfig(backbone_factor=0.0), steps=1)
    made = Trainer(config, VIDEOS, tmp_path)
    before = {name: weight.clone() for name, weight in made.model.state_dict().items()}
    made.train()
    moved = {name for name, weight in made.model.state_dict().items() if not torch.equal(weight, before[name])}
    assert moved == {name for name in before if not name.startswith("backbone.")}


@pytest.mark.parametrize("limit", [0.0, 0.5, 1e6])
def test_gradients_are_clipped_together(limit: float, tmp_path: Path) -> None:
    made = Trainer(CONFIG.replace(optim=OptimConfig(clip_norm=limit), steps=1), VIDEOS, tmp_path)
    norms: list[float] = []

    def measure(optimizer: torch.optim.Optimizer, *_: object) -> None:
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        norms.append(float(torch.cat([gradient.flatten() for gradient in gradients]).norm()))

    made.optimizer.register_step_pre_hook(measure)
    made.train()
    (logged,) = column(tmp_path, "grad_norm")
    assert logged > 1  # before clipping
    assert norms == pytest.approx([limit if limit == 0.5 else logged], rel=1e-4)


def test_the_average_of_the_weights_is_what_is_left(tmp_path: Path) -> None:
    config = CONFIG.replace(keep_checkpoints=9)
    made = Trainer(config, VIDEOS, tmp_path)
    expected = {name: weight.clone() for name, weight in made.model.state_dict().items()}
    made.train()
    for step, (_, file) in enumerate(list_checkpoints(tmp_path)[1:]):  # after the weights it begins with
        kept = min(0.9, (1 + step) / (10 + step))
        for name, weight in torch.load(file)["model"].items():
            expected[name] = kept * expected[name] + (1 - kept) * weight
    final = load_file(tmp_path / "final" / "model.safetensors")
    assert largest_difference(final, expected) < 1e-6
    assert largest_difference(final, torch.load(checkpoint_file(tmp_path, 3))["model"]) > 1e-5
    assert largest_difference(final, made.model.state_dict()) == 0


def test_checkpoints_and_lines_come_as_often_as_asked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train(tmp_path, CONFIG.replace(steps=5, checkpoint_every=2, keep_checkpoints=2, log_every=3))
    assert [step for step, _ in list_checkpoints(tmp_path)] == [4, 5]
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in lines] == ["3/5", "5/5"]
    losses = column(tmp_path, "loss")
    assert f"  loss {sum(losses[:3]) / 3:.3f}  ce " in lines[0]
    assert f"  loss {sum(losses[3:]) / 2:.3f}  ce " in lines[1]


@pytest.mark.parametrize("num_workers", [0, 1])
def test_clips_are_prepared_by_as_many_processes(
    num_workers: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[int] = []
    loader = batches.DataLoader
    monkeypatch.setattr(
        batches, "DataLoader", lambda *a, **options: made.append(options["num_workers"]) or loader(*a, **options)
    )
    train(tmp_path, CONFIG.replace(num_workers=num_workers, steps=1))
    assert made == [num_workers]


# What goes wrong


def test_a_warmup_longer_than_the_run_is_said(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    optim = OptimConfig(warmup_steps=3)
    Trainer(CONFIG.replace(optim=optim), VIDEOS, tmp_path / "fits")
    assert not [warning for warning in recwarn if "warmup" in str(warning.message)]
    with pytest.warns(UserWarning, match=r"only rises: optim\.warmup_steps=3 is longer than the run of 2 steps"):
        Trainer(CONFIG.replace(optim=optim, steps=2), VIDEOS, tmp_path / "longer")


def poison(monkeypatch: pytest.MonkeyPatch, step: int, spoil: Callable[[Trainer], object]) -> None:
    """Spoil a run after a step, once its checkpoint is written."""
    save = Trainer._save

    def spoiling(made: Trainer) -> None:
        save(made)
        if made.steps_done == step:
            spoil(made)

    monkeypatch.setattr(Trainer, "_save", spoiling)


@pytest.mark.parametrize("precision", ["float32", "float16"])
def test_weights_that_are_not_numbers_end_a_run(
    precision: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    poison(monkeypatch, 2, lambda made: made.model.transformer_decoder.class_head.weight.data[0].fill_(torch.nan))
    with pytest.raises(NonFinitePredictionError, match=r"^step 3: class_queries_logits of .* NaN"):
        train(tmp_path, CONFIG.replace(precision=precision))
    assert [step for step, _ in list_checkpoints(tmp_path)] == [1, 2]
    assert len(rows(tmp_path)) == 2
    assert not (tmp_path / "final").exists()
    assert (load_latest_checkpoint(tmp_path) or {})["model"]["transformer_decoder.class_head.weight"].isfinite().all()


@pytest.mark.parametrize(
    ("wrong", "name"),
    [(torch.inf, r"transformer_decoder\.class_head\.bias"), (1e30, "all parameters together")],
)
def test_gradients_that_are_not_finite_end_a_run(
    wrong: float, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def spoil(made: Trainer) -> None:
        made.model.transformer_decoder.class_head.bias.register_hook(lambda gradient: gradient.fill_(wrong))

    poison(monkeypatch, 2, spoil)
    with pytest.raises(ValueError, match=f"^step 3: the gradient of {name} is not finite; lower the learning rate"):
        train(tmp_path)
    assert [step for step, _ in list_checkpoints(tmp_path)] == [1, 2]
    assert not (tmp_path / "final").exists()


def test_float16_leaves_out_steps_that_overflow_but_not_for_ever(tmp_path: Path) -> None:
    made = Trainer(CONFIG.replace(precision="float16", keep_checkpoints=9), VIDEOS, tmp_path)
    made.scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    before = {name: weight.clone() for name, weight in made.model.state_dict().items()}
    made.model.transformer_decoder.class_head.bias.register_hook(lambda gradient: gradient.fill_(torch.inf))
    with pytest.raises(ValueError, match=r"^step 3: the gradient of transformer_decoder\.class_head\.bias"):
        made.train()
    assert largest_difference(made.model.state_dict(), before) == 0
    assert [step for step, _ in list_checkpoints(tmp_path)] == [0, 1, 2]


# Evaluation


def test_evaluations_measure_the_average_by_a_truth_made_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[object] = []
    prepare = trainer.prepare_ground_truth
    for module in (trainer, predict):
        monkeypatch.setattr(module, "prepare_ground_truth", lambda videos: calls.append(videos) or prepare(videos))
    done = train(tmp_path, CONFIG.replace(evaluate_every=2, model=EXACT.model), validation=VIDEOS)
    assert calls == [VIDEOS]
    monkeypatch.undo()
    assert [row["step"] for row in rows(tmp_path, "evaluation.csv")] == ["2", "3"]
    expected = evaluate_model(done.model, VIDEOS).stats
    found = rows(tmp_path, "evaluation.csv")[-1]
    assert {name: float(value) for name, value in found.items() if name != "step"} == expected


def test_evaluation_changes_no_weight(tmp_path: Path) -> None:
    config = CONFIG.replace(optim=OptimConfig())  # the trained model itself is evaluated
    train(tmp_path / "with", config.replace(evaluate_every=1), validation=VIDEOS)
    train(tmp_path / "without", config)
    assert final_weights(tmp_path / "with") == final_weights(tmp_path / "without")


def scripted(monkeypatch: pytest.MonkeyPatch, numbers: dict[int, float]) -> None:
    """Evaluations that give an AP by step."""

    def evaluate(made: Trainer) -> Callable[..., Any]:
        stats = dict.fromkeys(STATS, numbers[made.steps_done])
        return lambda *_, **__: SimpleNamespace(stats=stats)

    original = Trainer._evaluate

    def evaluate_by_script(made: Trainer) -> bool:
        monkeypatch.setattr(trainer, "evaluate_model", evaluate(made))
        return original(made)

    monkeypatch.setattr(Trainer, "_evaluate", evaluate_by_script)


def test_the_best_weights_stay_also_when_a_run_is_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scripted(monkeypatch, {1: 0.2, 2: 0.6, 3: 0.5, 4: 0.6})
    config = CONFIG.replace(steps=4, evaluate_every=1, keep_checkpoints=9)
    train_until(3, tmp_path, config, validation=VIDEOS)
    done = train(tmp_path, config, validation=VIDEOS, resume=True)
    assert done.best == {"step": 2, "AP": 0.6}
    best = VideoMask2Former.from_pretrained(tmp_path / "best").state_dict()
    average = torch.load(tmp_path / "checkpoints" / "step-00000002.pt")["average"]
    assert largest_difference(best, average) == 0
    assert largest_difference(best, done.average) > 0
    assert [float(row["AP"]) for row in rows(tmp_path, "evaluation.csv")] == [0.2, 0.6, 0.5, 0.6]


def test_videos_that_cannot_be_measured_by_are_refused_before_training(tmp_path: Path) -> None:
    videos = SyntheticVideos(2, num_frames=2, height=32, width=32)
    videos.labels = ("disc", "square")
    with pytest.raises(ValueError, match="must have the same classes; only one of them has 'arrow'"):
        train(tmp_path / "run", validation=videos)
    with pytest.raises(ValueError, match="no annotations"):
        train(tmp_path / "run", validation=SyntheticVideos(0))
    assert not (tmp_path / "run").exists()

"""Several processes train what one does, and agree on everything that is decided."""

import os
import socket
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from m2f_video import VideoMask2Former
from m2f_video.distributed import mean_over_workers, share_buffers
from m2f_video.modeling.build import PIXEL_DECODERS
from m2f_video.training import OptimConfig, Trainer, Worker, join_workers, trainer
from tests.training.tiny_run import EXACT, HARD, KeptVideos, column, largest_difference, plain_descent, rows

HELD_OUT = KeptVideos(3, seed=1, num_frames=2, height=32, width=64)
CONFIG = EXACT.replace(
    batch_size=4, steps=3, checkpoint_every=3, optim=OptimConfig(learning_rate=1e-2, clip_norm=1.0, ema_decay=0.5)
)
CONFIGS = {
    "whole": CONFIG,
    "parts": CONFIG.replace(accumulation=2, steps=2),
    "others": CONFIG.replace(
        model=CONFIG.model.replace(
            backbone="timm:test_resnet",  # batch norms gather statistics of a worker's own clips
            transformer_decoder=replace(CONFIG.model.transformer_decoder, hidden_dim=64),  # one projection is unused
        ),
        batch_size=2,
        steps=2,
    ),
    "idle": CONFIG.replace(  # levels that no layer attends to, and what makes them
        model=CONFIG.model.replace(
            pixel_decoder=replace(CONFIG.model.pixel_decoder, kind="bifpn"),
            transformer_decoder=replace(CONFIG.model.transformer_decoder, features="single"),
        ),
        batch_size=2,
        steps=2,
    ),
    "given": CONFIG.replace(loss=replace(CONFIG.loss, deep_supervision=False), steps=2),
}


def given_model(rank: int) -> VideoMask2Former:
    """That every worker has built with other random numbers, and of which a parameter is not used."""
    torch.manual_seed(rank)
    model = VideoMask2Former(CONFIG.model)
    model.register_parameter("unused", nn.Parameter(torch.full((2,), float(rank))))
    model.transformer_decoder.layers[0].register_buffer("rank", torch.tensor(rank))
    return model


def train_all(folder: Path, worker: Worker, names: tuple[str, ...]) -> None:
    """Run these configs with a plain optimiser; keep the weights, and what was evaluated as every worker saw it."""
    evaluate, evaluated = trainer.evaluate_model, []

    def watched(model: nn.Module, *arguments: Any, **options: Any) -> Any:
        weights = b"".join(tensor.numpy().tobytes() for tensor in model.state_dict().values())
        result = evaluate(model, *arguments, **options)
        evaluated.append((sha256(weights).hexdigest(), result.stats))
        return result

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "build_optimizer", plain_descent)
        patch.setattr(trainer, "evaluate_model", watched)
        for name in names:
            config = CONFIGS[name]
            model = given_model(worker.rank) if name == "given" else None
            made = Trainer(config, HARD, folder / name, validation=HELD_OUT, worker=worker, model=model)
            made.train()
            torch.save(made.model.state_dict(), folder / name / f"worker-{worker.rank}.pt")
            (folder / name / f"evaluated-{worker.rank}").write_text(repr((evaluated, made.best)))


def run_worker(rank: int, folder: Path, port: int, names: tuple[str, ...]) -> None:
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    with join_workers("cpu") as worker:
        assert worker == Worker(rank, 2, torch.device("cpu"))
        assert mean_over_workers(torch.tensor([rank, 4.0])).tolist() == [0.5, 4.0]
        train_all(folder, worker, names)
    assert not dist.is_initialized()


@pytest.mark.parametrize("layers", [0, 1])
@pytest.mark.parametrize("kind", PIXEL_DECODERS)
def test_weights_that_no_prediction_depends_on_are_expected(kind: Any, layers: int) -> None:
    """Workers would wait for the gradients of others."""
    small = replace(CONFIG.model.pixel_decoder, kind=kind, num_layers=layers)
    for depth, features in ((3, "round_robin"), (1, "round_robin"), (3, "single")):
        decoder = replace(CONFIG.model.transformer_decoder, num_layers=depth, features=features)
        model = VideoMask2Former(CONFIG.model.replace(pixel_decoder=small, transformer_decoder=decoder))
        for prediction in model(torch.rand(1, 1, 3, 32, 64), output_auxiliary=True).auxiliary:
            (prediction.class_queries_logits.sum() + prediction.masks_queries_logits.sum()).backward(retain_graph=True)
        idle = [name for name, weight in model.named_parameters() if weight.grad is None]
        assert trainer._may_idle(model.config) or not idle


@pytest.fixture(scope="module")
def runs_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[tuple[str, ...]], tuple[Path, Path]]:
    @cache
    def made(names: tuple[str, ...]) -> tuple[Path, Path]:
        one, two = tmp_path_factory.mktemp("one"), tmp_path_factory.mktemp("two")
        with socket.socket() as server:
            server.bind(("127.0.0.1", 0))
            port = server.getsockname()[1]
        mp.set_forkserver_preload(["m2f_video.training", "m2f_video.inference.whole"])  # once for both processes
        mp.start_processes(run_worker, args=(two, port, names), nprocs=2, start_method="forkserver")
        train_all(one, Worker(0, 1, torch.device("cpu")), names)
        return one, two

    return made


@pytest.fixture
def runs(request: pytest.FixtureRequest, runs_of: Callable[[tuple[str, ...]], tuple[Path, Path]]) -> tuple[Path, Path]:
    """The same runs by one process and by two, made once, as a fixture with parameters is not."""
    return runs_of(request.param)


WHOLE = ("whole",)
OTHERS = tuple(name for name in CONFIGS if name != "whole")


def of(*names: str) -> pytest.MarkDecorator:
    """Runs of these configs, of which the whole ones are done by default."""
    return pytest.mark.parametrize(
        ("name", "runs"),
        [
            pytest.param(name, WHOLE if name == "whole" else OTHERS, marks=() if name == "whole" else pytest.mark.slow)
            for name in names
        ],
        indirect=["runs"],
        ids=names,
    )


of_whole = pytest.mark.parametrize("runs", [WHOLE], indirect=True, ids=["whole"])


@pytest.mark.skipif(not dist.is_available(), reason="PyTorch without torch.distributed")
class TestTwoWorkers:
    @of("whole", "parts", "given")
    def test_they_learn_what_one_does(self, name: str, runs: tuple[Path, Path]) -> None:
        one, two = (folder / name for folder in runs)
        for number in ("loss", "loss_ce", "loss_mask", "loss_dice", "grad_norm"):
            assert column(two, number) == pytest.approx(
                column(one, number), rel=1e-3 if number == "grad_norm" else 1e-5
            )
        first, second, alone = (
            torch.load(file) for file in (two / "worker-0.pt", two / "worker-1.pt", one / "worker-0.pt")
        )
        assert largest_difference(first, second) == 0
        assert largest_difference(first, alone) < 1e-6

    @of(*CONFIGS)
    def test_they_evaluate_the_same_weights_together(self, name: str, runs: tuple[Path, Path]) -> None:
        _, two = (folder / name for folder in runs)
        first, second = ((two / f"evaluated-{rank}").read_text() for rank in range(2))
        assert first == second

    @of_whole
    def test_they_measure_what_one_does(self, runs: tuple[Path, Path]) -> None:
        one, two = (rows(folder, "evaluation.csv") for folder in (folder / "whole" for folder in runs))
        assert len(one) == 1
        for name, value in one[0].items():
            assert float(two[0][name]) == pytest.approx(float(value), abs=1e-3)

    @of_whole
    def test_the_first_alone_writes(self, runs: tuple[Path, Path]) -> None:
        one, two = (folder / "whole" for folder in runs)
        assert [row["step"] for row in rows(two)] == ["1", "2", "3"]
        ours, theirs = (
            sorted(str(file.relative_to(folder)) for file in folder.rglob("*") if "-1" not in file.name)
            for folder in (one, two)
        )
        assert ours == theirs


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


def test_alone(environment: pytest.MonkeyPatch) -> None:
    with join_workers("cpu") as worker:
        assert worker == Worker(0, 1, torch.device("cpu"))
        assert worker.is_main
    values = torch.ones(2)
    assert mean_over_workers(values) is values
    share_buffers(nn.BatchNorm1d(2))


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"WORLD_SIZE": "2"}, "'RANK'.*start with torchrun"),
        ({"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "first"}, "first.*start with torchrun"),
        ({"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0"}, "MASTER_ADDR"),
    ],
)
def test_a_group_that_is_half_described(
    variables: dict[str, str], message: str, environment: pytest.MonkeyPatch
) -> None:
    for name, value in variables.items():
        environment.setenv(name, value)
    with pytest.raises(ValueError, match=message), join_workers("cpu"):
        pass


def test_no_such_device(environment: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="unknown device 'abacus'"), join_workers("abacus"):
        pass


@pytest.mark.parametrize(("theirs", "differ"), [(("config", 5), False), (("config", 0), True)])
def test_workers_that_would_go_on_from_different_steps_are_stopped(
    monkeypatch: pytest.MonkeyPatch, theirs: tuple[str, int], differ: bool
) -> None:
    def gather(values: list[object], mine: object) -> None:
        values[:] = [mine, theirs]

    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(dist, "all_gather_object", gather)
    worker = Worker(0, 2, torch.device("cpu"))
    expected = pytest.raises(ValueError, match="the workers differ in the run") if differ else nullcontext()
    with expected:
        worker.check_same("the run", ("config", 5))

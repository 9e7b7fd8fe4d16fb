"""Losses of several workers: normalised by the instances that one worker has on average."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from m2f_video.training import ClipTarget
from m2f_video.training.losses import count_instances

INSTANCES = ((3, 1), (1, 0), (0, 0))  # of each worker, round by round


def target_of(num_instances: int) -> ClipTarget:
    return ClipTarget(torch.zeros(num_instances, dtype=torch.int64), torch.zeros(num_instances, 1, 4, 4))


def worker(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    counts = []
    for instances in INSTANCES:
        counts.append(count_instances([target_of(instances[rank])], torch.device("cpu")))
    (folder / f"{rank}").write_text(repr(counts))
    dist.destroy_process_group()


@pytest.mark.slow  # two fresh interpreters
@pytest.mark.skipif(not dist.is_available(), reason="PyTorch without torch.distributed")
def test_instances_are_averaged_over_real_workers(tmp_path: Path) -> None:
    mp.spawn(worker, args=(tmp_path,), nprocs=2)
    for rank in range(2):
        assert (tmp_path / str(rank)).read_text() == "[2.0, 1.0, 1.0]"  # at least 1, after the average


@pytest.mark.parametrize(("mine", "others", "average"), [(3, 1, 2.0), (0, 3, 1.5), (1, 0, 1.0), (0, 0, 1.0)])
def test_instances_are_averaged(monkeypatch: pytest.MonkeyPatch, mine: int, others: int, average: float) -> None:
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(dist, "all_reduce", lambda total: total.add_(others))
    assert count_instances([target_of(mine)], torch.device("cpu")) == average


def test_one_process_counts_its_own() -> None:
    assert count_instances([target_of(2), target_of(3)], torch.device("cpu")) == 5
    assert count_instances([], torch.device("cpu")) == 1

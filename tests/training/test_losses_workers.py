"""What the losses of several workers, or of the parts of a batch, are divided by."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from m2f_video.training import ClipTarget
from m2f_video.training.losses import LossNorms, loss_norms

INSTANCES = ((3, 1), (1, 0), (0, 0))  # of each worker, round by round


def target_of(num_instances: int, label: int = 0) -> ClipTarget:
    return ClipTarget(torch.full((num_instances,), label), torch.zeros(num_instances, 1, 4, 4))


def norms_of(*targets: ClipTarget) -> LossNorms:
    return loss_norms(targets, num_queries=4, num_labels=5, no_object_weight=0.5)


def worker(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    norms = [tuple(norms_of(target_of(instances[rank]))) for instances in INSTANCES]
    (folder / f"{rank}").write_text(repr(norms))
    dist.destroy_process_group()


@pytest.mark.slow  # two fresh interpreters
@pytest.mark.skipif(not dist.is_available(), reason="PyTorch without torch.distributed")
def test_norms_of_real_workers_are_shared(tmp_path: Path) -> None:
    mp.spawn(worker, args=(tmp_path,), nprocs=2)
    for rank in range(2):
        assert (tmp_path / str(rank)).read_text() == "[(2.0, 3.0), (0.5, 2.25), (0.5, 2.0)]"


@pytest.mark.parametrize(("mine", "others", "share"), [(3, 1, 2.0), (0, 3, 1.5), (1, 0, 0.5), (0, 0, 0.5)])
def test_a_worker_has_its_share(monkeypatch: pytest.MonkeyPatch, mine: int, others: int, share: float) -> None:
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(dist, "all_reduce", lambda totals: totals.add_(torch.tensor([others, 0.0])))
    assert norms_of(target_of(mine)).num_instances == share


def test_norms_of_one_process() -> None:
    assert norms_of(target_of(2), target_of(3)) == (5, 5 + 3 * 0.5)
    assert norms_of(target_of(0)) == (1, 4 * 0.5)
    assert norms_of(target_of(6)) == (6, 4)  # four queries cannot predict more than four
    assert norms_of(target_of(2, label=5)) == (2, 4 * 0.5)  # "no object" is label 5

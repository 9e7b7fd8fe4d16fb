"""Workers: the processes that train or evaluate together, as `torchrun` starts them."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import nn

from m2f_video.hub import parse_device


def num_workers() -> int:
    """How many processes work together by `torch.distributed`; 1 where it is not there or not initialised."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


@dataclass(frozen=True)
class Worker:
    """This process among those that work together; alone, it is number 0 of 1.

    Attributes:
        rank: its number, from 0.
        world_size: how many there are.
        device: where its tensors live.
    """

    rank: int
    world_size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Whether this is the one that writes files and prints."""
        return self.rank == 0

    def check_same(self, what: str, value: object) -> None:
        """Make sure that all workers have the same value; each has to call it.

        Raises:
            ValueError: they have not; raised by all of them.
        """
        if num_workers() > 1:
            values: list[object] = [None] * self.world_size
            dist.all_gather_object(values, value)
            if any(other != values[0] for other in values):
                raise ValueError(
                    f"the workers differ in {what}; give all of them the same flags, data and output folder, which has "
                    "to be one that all machines share"
                )


def own_device(device: str | torch.device | None = None) -> torch.device:
    """The device of this process among those that `torchrun` has started on this machine, which need not be joined.

    Args:
        device: such as cpu or cuda; None is cuda where there is one, else cpu. Of several GPUs each process takes its
            own.

    Raises:
        ValueError: the device is not there, or one GPU is named for several processes; or LOCAL_RANK is no number.
    """
    name = str(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if ":" in name and (count := os.environ.get("LOCAL_WORLD_SIZE", "1")) != "1":
        raise ValueError(f"{count} workers cannot share {name}; give the device without a number")
    local_rank = os.environ.get("LOCAL_RANK")
    if name != "cuda" or local_rank is None:
        return parse_device(name)
    if not local_rank.isdecimal():
        raise ValueError(f"LOCAL_RANK is {local_rank!r:.20} and no number; start with torchrun, or without it")
    return parse_device(f"cuda:{local_rank}")


@contextmanager
def join_workers(device: str | torch.device | None = None) -> Iterator[Worker]:
    """Join the process group that `torchrun` has announced in the environment; without one, work alone.

    Args:
        device: such as cpu or cuda; None is cuda where there is one, else cpu. Of several GPUs each worker of a machine
            takes its own.

    Raises:
        ValueError: the device is not there, or the environment names a group it does not fully describe.
    """
    name = str(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if "WORLD_SIZE" not in os.environ:
        yield Worker(0, 1, parse_device(name))
        return
    try:
        rank, world_size, _ = (int(os.environ[key]) for key in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    except (KeyError, ValueError) as error:
        raise ValueError(
            f"WORLD_SIZE is set, but RANK and LOCAL_RANK are not all numbers ({error}); start with torchrun"
        ) from error
    if ":" in name and world_size > 1:
        raise ValueError(f"{world_size} workers cannot share {name}; give the device without a number")
    on_gpu = name.startswith("cuda")
    worker_device = own_device(name)
    if on_gpu:
        torch.cuda.set_device(worker_device)
    # Workers wait for the slowest, in an evaluation for long; torchrun ends all of them when one fails.
    backend = "cpu:gloo,cuda:nccl" if on_gpu else "gloo"
    dist.init_process_group(backend, rank=rank, world_size=world_size, timeout=timedelta(days=1))
    yield Worker(rank, world_size, worker_device)
    dist.destroy_process_group()  # not after an error: others may be waiting in a collective, and so would this one


def mean_over_workers(values: torch.Tensor) -> torch.Tensor:
    """The average of a tensor over all workers, on each of them; alone, the tensor itself."""
    if (workers := num_workers()) > 1:
        values = values.clone()
        dist.all_reduce(values)
        values /= workers
    return values


def share_buffers(model: nn.Module) -> None:
    """Give every worker the first one's buffers, as batch norms gather running statistics of a worker's own clips."""
    if num_workers() > 1:
        for buffer in model.buffers():
            dist.broadcast(buffer, src=0)


def share_weights(model: nn.Module) -> None:
    """Give every worker the first one's parameters and buffers."""
    if num_workers() > 1:
        with torch.no_grad():
            for parameter in model.parameters():
                dist.broadcast(parameter, src=0)
    share_buffers(model)

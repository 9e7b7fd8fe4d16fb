"""Which object of a window is which track: the similarity of every pair, and the best assignment above a threshold.

A video cut into windows is decoded window by window, and each window's objects are linked to the tracks so far: what
was linked once stays. A linker is a small class with a similarity; `Tracker` does the rest. Nothing is trained.

N objects of a window, R tracks, W frames of a window, C channels of mask embeddings, K classes, h w size of the mask
logits.
"""

import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Literal, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor

MaskProductFunction = Callable[[Tensor, Tensor], Tensor]
"""Embeddings (1, N, C) and mask features (1, F, C, h, w) -> mask logits (1, N, F, h, w)."""


@dataclass(frozen=True, eq=False)
class Window:
    """Objects that the model sees in some frames that follow each other.

    Attributes:
        start: number of its first frame.
        queries: (N,) the model's queries whose objects these are.
        probabilities: (N, K+1), the last column no-object.
        mask_embeddings: (N, C).
        mask_logits: (N, W, h, w).
        mask_features: (W, C, h, w).
        mask_product: makes mask logits of embeddings and features.
    """

    start: int
    queries: Tensor
    probabilities: Tensor
    mask_embeddings: Tensor
    mask_logits: Tensor
    mask_features: Tensor
    mask_product: MaskProductFunction


@dataclass(eq=False)
class TrackState:
    """What is known of a track between two windows, whatever its length.

    Attributes:
        id: from 1, by birth.
        probabilities: (K+1,), summed over the windows that it was seen in.
        seen: how many these are.
        last: number of the last of them, among all windows.
        start: first frame of that window.
        mask_embedding: (C,) there.
        mask_logits: (W, h, w) there; none once the track is given up, or was missed and no window can share its frames.
    """

    id: int
    probabilities: Tensor
    seen: int
    last: int
    start: int
    mask_embedding: Tensor
    mask_logits: Tensor


@runtime_checkable
class Linker(Protocol):
    """How alike tracks and the objects of the next window are.

    One that is a frozen dataclass keeps nothing from window to window, and a run that was stopped goes on with it. One
    that keeps something is a `KeepingLinker` too, or no run goes on with it.
    """

    @property
    def threshold(self) -> float:
        """Pairs that are less alike are not linked."""

    @property
    def memory(self) -> int:
        """How many windows in a row a track may be missed before it is given up."""

    @property
    def every_query(self) -> bool:
        """Whether all of the model's queries are objects, rather than those that are likely to be one."""

    def similarity(self, tracks: Sequence[TrackState], window: Window, missed: Tensor) -> Tensor:
        """Of every pair, (R, N), any real number; `missed` (R,) counts the windows since each track was seen."""


@runtime_checkable
class KeepingLinker(Protocol):
    """A linker that keeps something from window to window, which can be saved."""

    def state_dict(self) -> dict[str, Tensor]:
        """All that it keeps."""

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Be as the linker was whose state this is."""


def is_resumable(linker: Linker) -> bool:
    """Whether a run that was stopped can go on with a linker: what it keeps can be saved, or it keeps nothing."""
    parameters = getattr(linker, "__dataclass_params__", None)
    return isinstance(linker, KeepingLinker) or (parameters is not None and parameters.frozen)


def soft_iou(a: Tensor, b: Tensor) -> Tensor:
    """IoU of mask probabilities: logits (R, ...) and (N, ...) of the same pixels -> (R, N)."""
    a, b = a.flatten(1).float().sigmoid(), b.flatten(1).float().sigmoid()
    inter = a @ b.T
    return inter / (a.sum(1)[:, None] + b.sum(1) - inter).clamp(min=1e-6)


def shared_iou(track: TrackState, window: Window) -> Tensor:
    """Soft IoU (N,) of a track and objects in the frames that the track's last window shares with theirs; 0 of none."""
    shared = track.start + len(track.mask_logits) - window.start
    if shared <= 0:
        return window.probabilities.new_zeros(len(window.queries))
    return soft_iou(track.mask_logits[None, -shared:], window.mask_logits[:, :shared])[0]


def cosine(a: Tensor, b: Tensor) -> Tensor:
    """Of vectors (R, C) and (N, C) -> (R, N)."""
    return F.normalize(a.float(), dim=1) @ F.normalize(b.float(), dim=1).T


def class_similarity(a: Tensor, b: Tensor) -> Tensor:
    """Bhattacharyya coefficient of distributions over classes, no-object apart: (R, K+1) and (N, K+1) -> (R, N)."""
    a, b = (F.normalize(x[:, :-1].float().clamp(min=0), p=1.0, dim=1).sqrt() for x in (a, b))
    return a @ b.T


@dataclass(frozen=True, kw_only=True)
class TransferLinker:
    """An object's mask embedding, applied to the next window, gives its mask there: soft IoU with that, and classes.

    Attributes:
        frames: of the beginning of the new window that are compared.
        miss_penalty: for each window that the track was missed.
    """

    threshold: float = 0.4
    memory: int = 20
    every_query: bool = False
    frames: int = 4
    miss_penalty: float = 0.02

    def similarity(self, tracks: Sequence[TrackState], window: Window, missed: Tensor) -> Tensor:
        """See `Linker`."""
        embeddings = torch.stack([track.mask_embedding for track in tracks])
        carried = window.mask_product(embeddings[None], window.mask_features[None, : self.frames])[0]
        masks = soft_iou(carried, window.mask_logits[:, : self.frames])
        classes = class_similarity(torch.stack([track.probabilities for track in tracks]), window.probabilities)
        return masks + classes - self.miss_penalty * missed[:, None]


@dataclass(frozen=True, kw_only=True)
class EmbeddingLinker:
    """Cosine of mask embeddings from one window to the next, every query a slot that always lives.

    After MinVIS (arXiv 2208.02245), which compares the queries themselves, frame by frame. Nothing is born or lost.
    """

    threshold: float = -math.inf
    memory: int = sys.maxsize
    every_query: bool = True

    def similarity(self, tracks: Sequence[TrackState], window: Window, missed: Tensor) -> Tensor:
        """See `Linker`."""
        return cosine(torch.stack([track.mask_embedding for track in tracks]), window.mask_embeddings)


@dataclass(frozen=True, kw_only=True)
class MaskIouLinker:
    """Soft IoU in frames that two windows share, after IFC (arXiv 2106.03299); the stride must be below the window."""

    threshold: float = 0.05
    memory: int = 3
    every_query: bool = False

    def similarity(self, tracks: Sequence[TrackState], window: Window, missed: Tensor) -> Tensor:
        """See `Linker`."""
        return torch.stack([shared_iou(track, window) for track in tracks])


@dataclass(frozen=True, kw_only=True)
class BothLinker:
    """Cosine of mask embeddings plus soft IoU in shared frames."""

    threshold: float = 0.8
    memory: int = 3
    every_query: bool = False

    def similarity(self, tracks: Sequence[TrackState], window: Window, missed: Tensor) -> Tensor:
        """See `Linker`."""
        embeddings = torch.stack([track.mask_embedding for track in tracks])
        return cosine(embeddings, window.mask_embeddings) + MaskIouLinker().similarity(tracks, window, missed)


LinkerName = Literal["transfer", "embedding", "mask_iou", "both"]
LINKERS: dict[LinkerName, Callable[[], Linker]] = {
    "transfer": TransferLinker,
    "embedding": EmbeddingLinker,
    "mask_iou": MaskIouLinker,
    "both": BothLinker,
}


def named_linker(linker: LinkerName | Linker) -> Linker:
    """A linker by its name, or the one that is given.

    Raises:
        ValueError: there is none of that name.
    """
    if isinstance(linker, Linker):
        return linker
    if not isinstance(linker, str) or linker not in LINKERS:
        raise ValueError(
            f"linker must be one of {', '.join(LINKERS)}, or one of your own with threshold, memory, every_query and "
            f"similarity, got {linker!r:.60}"
        )
    return LINKERS[linker]()


class Tracker:
    """Tracks through the windows of a video.

    Args:
        linker: says how alike pairs are.
    """

    def __init__(self, linker: Linker) -> None:
        self.linker = linker
        self.windows = 0
        self.tracks: dict[int, TrackState] = {}
        """All that there ever were, by id."""
        self._alive: list[TrackState] = []

    def link(self, window: Window) -> list[int]:
        """The track of each object of the next window; where none is alike enough, a new one.

        Raises:
            ValueError: the linker's similarity is not of every pair, or no finite number.
        """
        number, self.windows = self.windows, self.windows + 1
        alive = [track for track in self._alive if number - track.last <= self.linker.memory + 1]
        for track in self._alive:
            is_past = track.start + len(track.mask_logits) <= window.start and track.last < number - 1
            if is_past or track not in alive:
                track.mask_logits = track.mask_logits[:0].clone()  # the largest part of a state, of no more use
        self._alive = alive
        track_of = dict[int, TrackState]()
        if alive and len(window.queries):
            missed = window.probabilities.new_tensor([number - track.last - 1 for track in alive])
            similarity = self.linker.similarity(alive, window, missed)
            _check_similarity(similarity, (len(alive), len(window.queries)), type(self.linker).__name__)
            track_of = {column: alive[row] for row, column in assign_most(similarity, self.linker.threshold)}
        return [self._seen(window, row, number, track_of.get(row)) for row in range(len(window.queries))]

    def _seen(self, window: Window, row: int, number: int, track: TrackState | None) -> int:
        # copies, since a view would keep what there is of the whole window for as long as the track
        probabilities, embedding, logits = (
            values[row].clone() for values in (window.probabilities, window.mask_embeddings, window.mask_logits)
        )
        if track is None:
            track = TrackState(len(self.tracks) + 1, probabilities, 1, number, window.start, embedding, logits)
            self.tracks[track.id] = track
            self._alive.append(track)
            return track.id
        track.probabilities = track.probabilities + probabilities
        track.seen, track.last, track.start = track.seen + 1, number, window.start
        track.mask_embedding, track.mask_logits = embedding, logits
        return track.id

    def state_dict(self) -> dict[str, Tensor]:
        """All that it keeps, the linker's part included, in tensors of any type."""
        state = {"windows": torch.tensor(self.windows), "alive": torch.tensor([track.id for track in self._alive])}
        for field in fields(TrackState):
            values = [getattr(track, field.name) for track in self.tracks.values()]
            if values and isinstance(values[0], Tensor):
                state[field.name] = torch.cat(values)
                state[f"{field.name}.lengths"] = torch.tensor([len(value) for value in values])
            else:
                state[field.name] = torch.tensor(values)
        if isinstance(self.linker, KeepingLinker):
            state |= {f"linker.{name}": tensor for name, tensor in self.linker.state_dict().items()}
        return state

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Be as the tracker was whose state this is.

        Raises:
            KeyError: a part is missing.
        """
        columns = list[Sequence[Tensor | int]]()
        for field in fields(TrackState):
            values = state[field.name]
            lengths = state.get(f"{field.name}.lengths")
            whole = values.tolist() if lengths is None else [part.clone() for part in values.split(lengths.tolist())]
            columns.append(whole)
        tracks = [TrackState(*row) for row in zip(*columns, strict=True)]
        self.tracks = {track.id: track for track in tracks}
        self._alive = [self.tracks[int(id_)] for id_ in state["alive"].tolist()]
        self.windows = int(state["windows"])
        if isinstance(self.linker, KeepingLinker):
            prefix = "linker."
            kept = {name.removeprefix(prefix): part for name, part in state.items() if name.startswith(prefix)}
            self.linker.load_state_dict(kept)

    def scores(self) -> Tensor:
        """(R, K), of all tracks in the order of their ids: class probabilities, averaged over all windows so far.

        A window that a track is not seen in counts as probability 0.
        """
        return self._summed() / self.windows

    def certainties(self) -> Tensor:
        """(R, K), as `scores`, but averaged over the windows that a track is seen in."""
        summed = self._summed()
        return summed / summed.new_tensor([[track.seen] for track in self.tracks.values()])

    def likeliest(self, id_: int) -> tuple[float, int]:
        """How certain the likeliest class of a track is, and which."""
        track = self.tracks[id_]
        largest, label_id = track.probabilities[:-1].max(0)
        return float(largest) / track.seen, int(label_id)

    def _summed(self) -> Tensor:
        return torch.stack([track.probabilities for track in self.tracks.values()])[:, :-1]


def assign_most(similarity: Tensor, threshold: float) -> list[tuple[int, int]]:
    """Pairs (row, column) of the largest sum (the Hungarian method) that are above the threshold."""
    from scipy.optimize import linear_sum_assignment

    rows, columns = linear_sum_assignment(similarity.detach().double().cpu().numpy(), maximize=True)
    return [pair for pair in zip(rows.tolist(), columns.tolist(), strict=True) if similarity[pair] > threshold]


def _check_similarity(similarity: Tensor, shape: tuple[int, int], linker: str) -> None:
    """Refuse what would link some objects to tracks of others, or none to any."""
    if not isinstance(similarity, Tensor) or tuple(similarity.shape) != shape:
        found = tuple(similarity.shape) if isinstance(similarity, Tensor) else type(similarity).__name__
        raise ValueError(f"{linker}.similarity must be a tensor of {shape} (tracks, objects), got {found}")
    if not similarity.isfinite().all():
        raise ValueError(
            f"{linker}.similarity holds NaN or infinite values; below the threshold says that a pair is none"
        )

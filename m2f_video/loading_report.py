"""What loading weights has done, tensor by tensor, and as a table."""

from collections import Counter
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from m2f_video.checked_config import shown

State = Literal["loaded", "resized", "new", "ignored"]


@dataclass(frozen=True)
class Weight:
    """What became of a tensor.

    Attributes:
        name: in the model; of an ignored one, in the checkpoint.
        state: `loaded` as it is; `resized`, in part or interpolated; `new`, of the model, as it was; `ignored`, of the
            checkpoint, for which the model has no place.
        numel: numbers in it; 0 where that is not known.
        note: how it was resized, or why it is not loaded, where that is not for its name alone.
        count: tensors, where the name stands for several.
    """

    name: str
    state: State
    numel: int
    note: str = ""
    count: int = 1

    @property
    def group(self) -> str:
        """The part of the model it is in."""
        return ".".join(self.name.split(".")[: 3 if self.name.startswith("backbone.model.") else 2])


@dataclass(frozen=True)
class LoadingReport:
    """What loading has done with every tensor of a model and of a checkpoint; `str` gives a table.

    Attributes:
        source: what was loaded, in words.
        weights: of the model, then those of the checkpoint that were ignored.
        otherwise: fields of the config by which what was loaded computes something else than it was trained for: the
            value there and here.
    """

    source: str
    weights: tuple[Weight, ...]
    otherwise: dict[str, tuple[Any, Any]] = field(default_factory=dict)

    @property
    def is_complete(self) -> bool:
        """Whether all weights of both sides were loaded as they are, to compute what they were trained for."""
        return not self.otherwise and all(weight.state == "loaded" for weight in self.weights)

    def names(self, state: State) -> list[str]:
        """The tensors that are loaded, resized, new or ignored."""
        return [weight.name for weight in self.weights if weight.state == state]

    def counts(self, state: State) -> dict[str, int]:
        """How many tensors these are, by the part of the model they are in."""
        counts: Counter[str] = Counter()
        for weight in self.weights:
            if weight.state == state:
                counts[weight.group] += weight.count
        return dict(counts)

    def details(self) -> str:
        """A line for every tensor."""
        return "\n".join(
            f"{weight.state:7}  {weight.name}{f'  ({weight.note})' if weight.note else ''}" for weight in self.weights
        )

    def __str__(self) -> str:
        """A table of numbers of tensors, how and why, and what computes something else."""
        states = get_args(State)
        columns = {state: self.counts(state) for state in states}
        groups = list(dict.fromkeys(weight.group for weight in self.weights))
        rows = [(group, *(columns[state].get(group, 0) for state in states)) for group in groups]
        rows.append(("all", *(sum(columns[state].values()) for state in states)))
        sizes = (sum(weight.numel for weight in self.weights if weight.state == state) for state in states[:-1])
        rows.append(("numbers", *sizes))
        width = max(len(str(row[0])) for row in rows)
        lines = [self.source, f"{'':{width}}" + "".join(f"{state:>12}" for state in states)]
        lines += [f"{name:{width}}" + "".join(f"{number:>12,}" for number in numbers) for name, *numbers in rows]
        return "\n".join([*lines, *self._notes()])

    def _notes(self) -> list[str]:
        noted: dict[tuple[str, str], list[Weight]] = {}
        for weight in self.weights:
            if weight.note and weight.state != "ignored":  # what fits nowhere has its reason beside the model's tensor
                noted.setdefault((weight.state, weight.note.partition(":")[0]), []).append(weight)
        lines = [
            f"{state}: {first.name}, {first.note}{f' (and {len(rest)} more)' if rest else ''}"
            for (state, _), (first, *rest) in noted.items()
        ]
        if self.otherwise:
            changes = (f"{name} {shown(own)} -> {shown(used)}" for name, (own, used) in self.otherwise.items())
            lines.append(f"loaded, but computes something else: {'; '.join(changes)}")
        return lines

"""What was done to a model's modules since it was built, and what of that a checkpoint can tell.

A checkpoint is tensors by name and a config. Which module computes with them is what the config builds: of a module put
in place of one later the config can record the name, of a hook, a patched method or a setting it cannot.
"""

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from m2f_video.config import WHOLE_MODEL, VideoMask2FormerConfig
from m2f_video.modeling.build import qualified_name

if TYPE_CHECKING:
    from m2f_video.modeling.video_mask2former import VideoMask2Former

_HOOKS = {
    "_forward_hooks": "forward hook",
    "_forward_pre_hooks": "forward pre-hook",
    "_backward_hooks": "backward hook",
    "_backward_pre_hooks": "backward pre-hook",
    "_state_dict_hooks": "state-dict hook",
    "_state_dict_pre_hooks": "state-dict pre-hook",
    "_load_state_dict_pre_hooks": "load-state-dict pre-hook",
    "_load_state_dict_post_hooks": "load-state-dict post-hook",
}

_TAPS = "m2f_video.modeling.taps"  # whose hooks change nothing
_OURS = ("m2f_video.", "torch.nn.")  # whose modules never set themselves otherwise

Settings = Mapping[str, Any]
Build = Mapping[str, tuple[type, Counter[str], Settings]]
"""Of each module by name: its class, what hooks and patches it has how many of, and its numbers, texts and switches."""


@dataclass(frozen=True)
class Changes:
    """What differs from the model as it was built.

    Attributes:
        exchanged: modules of another class, or new, by name, the outermost alone: the qualified name of the class.
        touched: hooks, methods and settings of a module's own, which no checkpoint can hold, and modules that are gone,
            in words.
    """

    exchanged: Mapping[str, str]
    touched: tuple[str, ...]

    def __str__(self) -> str:
        """In a line; empty where there are none."""
        said = [f"{name} is a {kind} of its own" for name, kind in self.exchanged.items()] + list(self.touched)
        return f"{'; '.join(said[:3])}{f'; and {len(said) - 3} more' if len(said) > 3 else ''}"


def build_of(model: nn.Module, class_of: Callable[[nn.Module], type] = type) -> Build:
    """How a model is built now; `class_of` tells the class of a module."""
    return {
        name: (kind := class_of(module), _touches(module), _settings(module, kind))
        for name, module in model.named_modules()
    }


def changes(model: "VideoMask2Former") -> Changes:
    """What was done to a model's modules since it was built, twins of the acceleration aside.

    Of a subclass nobody knows what it builds, but that it is one.
    """
    from m2f_video.acceleration.swap import plain_type
    from m2f_video.modeling.video_mask2former import VideoMask2Former

    before, now = model.as_built, build_of(model, plain_type)
    exchanged: dict[str, str] = {}
    touched: list[str] = []
    of_subclass = plain_type(model) is not VideoMask2Former
    if of_subclass:
        touched.append(f"the model is a {qualified_name(type(model))}, whose own from_pretrained loads it")
    for name, (kind, touches, settings) in now.items():
        if name.startswith(tuple(f"{outer}." for outer in exchanged)):
            continue
        known, old, were = before.get(name, (None, Counter[str](), {}))
        if known is not kind and not of_subclass:
            exchanged[name] = qualified_name(kind)
        for what, number in (touches - old).items():
            touched.append(f"{name or 'the model'} has {f'{number} {what}s' if number > 1 else f'a {what}'}")
        if known is kind and not of_subclass:
            pairs = {what: (settings[what], was) for what, was in were.items() if settings.get(what, was) != was}
            touched += [f"{name}.{what} is {new!r:.40}, and was {was!r:.40}" for what, (new, was) in pairs.items()]
    gone = [name for name in before if name not in now and name.rpartition(".")[0] in now and not of_subclass]
    touched += [f"{name} is gone" for name in gone if name.rpartition(".")[0] not in exchanged]
    return Changes(exchanged, tuple(touched))


def recorded_config(model: "VideoMask2Former") -> VideoMask2FormerConfig:
    """A model's config with the names of modules that were put into it since it was built, or that of a subclass."""
    from m2f_video.acceleration.swap import plain_type
    from m2f_video.modeling.video_mask2former import VideoMask2Former

    stages = ("backbone", "pixel_decoder", "transformer_decoder")
    exchanged = {name: kind for name, kind in changes(model).exchanged.items() if name.startswith(stages)}
    if plain_type(model) is not VideoMask2Former:
        exchanged[WHOLE_MODEL] = qualified_name(plain_type(model))
    return model.config.replace(parts={**model.config.parts, **exchanged}) if exchanged else model.config


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """The state dict.

    Raises:
        ValueError: a module keeps something else in it.
    """
    state: dict[str, Any] = model.state_dict()
    for name, value in state.items():
        if not isinstance(value, Tensor):
            module = name.removesuffix("_extra_state").rstrip(".") or "the model"
            raise ValueError(
                f"{module} keeps a {type(value).__name__} in the state dict, which a checkpoint cannot hold; keep "
                "tensors, as buffers"
            )
    return state


def _touches(module: nn.Module) -> Counter[str]:
    """Hooks of a module, and methods that it has beside those of its class."""
    found = Counter({words: _number_of(getattr(module, name, {})) for name, words in _HOOKS.items()})
    for name, value in vars(module).items():
        if callable(value) and callable(_of_class(module, name)):
            found[f"patched {name}"] += 1
    return +found


def _number_of(hooks: Mapping[int, object]) -> int:
    return sum(getattr(hook, "__module__", None) != _TAPS for hook in hooks.values())


def _settings(module: nn.Module, kind: type) -> Settings:
    """What a module of this package or of PyTorch computes by, beside its tensors, such as its number of heads."""
    if not kind.__module__.startswith(_OURS):
        return {}
    kept = {name: value for name, value in vars(module).items() if isinstance(value, bool | int | float | str | tuple)}
    return {name: value for name, value in kept.items() if name != "training" and not name.startswith("_")}


def _of_class(module: nn.Module, name: str) -> Any:
    return getattr(type(module), name, None)

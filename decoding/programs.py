"""
The programs that passes are compiled or recorded as, and what a model keeps of them.

A program is the model and else tensors of shapes that never change. Programs belong to the model and are compiled when
a pass first needs them. Weights are among their inputs, so that they see every change of them; a recording knows them
by where they lie.

Shapes: B rows and S tokens of a program, H hidden size, V vocabulary.
"""

from collections.abc import Sequence
from threading import Lock
from typing import Any
from weakref import ref

import torch

from ..cache_twotower import KeyValueLayer, KeyValues, KeyValueSlot, MambaState
from ..checkpoints.placement import CONTEXT_PARTS
from ..mirror_twotower import Mirror
from .kept import Kept
from .recorded import Weights

# Packages whose modules change in no way that a pass could see, but by weights, mode and hooks.
PLAIN = {"torch", "transformers", "transformers_modules", __name__.partition(".")[0]}
# Of a module: weights and modules, which are looked at by themselves.
HOLDERS = {"_parameters", "_buffers", "_modules", "_kept_programs", "_prepared"}

LayerContent = KeyValues | MambaState | None


def denoising(
    model: Any,
    held: Sequence[LayerContent],
    ids: torch.Tensor,
    lengths: torch.Tensor,
    timestep: torch.Tensor | None,
    mask: torch.Tensor | None,
) -> torch.Tensor:
    """A denoiser pass: (B, S) -> (B, S, V)."""
    return model.denoiser_pass(ids, held, lengths, timestep, mask)


def reading(
    model: Any, held: Sequence[LayerContent], ids: torch.Tensor, lengths: torch.Tensor, counts: torch.Tensor | None
) -> torch.Tensor:
    """The context tower reads (B, S) and writes what it holds then, of each row's first `counts` (B,): (B, S, H)."""
    tower = model.context_tower
    return tower.reading_pass(tower.embeddings(ids), _slots(held, ids, lengths), lengths, counts, in_place=True)[0]


def verifying(
    model: Any, held: Sequence[LayerContent], ids: torch.Tensor, lengths: torch.Tensor
) -> tuple[torch.Tensor, list[Any]]:
    """The same tentatively: (B, S, H), and by layer what takes its state through any number of the tokens."""
    tower = model.context_tower
    slots = _slots(held, ids, lengths)
    return tower.reading_pass(tower.embeddings(ids), slots, lengths, tentative=True)


def accepting(model: Any, tentative: tuple[Sequence[LayerContent], Sequence[Any]], counts: torch.Tensor) -> None:
    """Take states through each row's first `counts` (B,) tokens of those read tentatively, see `verifying`."""
    backend = model.context_tower.kernels["ssd_state"]
    for each, update in zip(*tentative, strict=True):
        if isinstance(each, MambaState):
            update.apply(each, counts, backend, in_place=True)


# By name, the part of the model whose weights a program reads.
TOWER_OF = {denoising.__name__: "denoiser"} | {each.__name__: "context" for each in (reading, verifying, accepting)}


def _slots(held: Sequence[LayerContent], ids: torch.Tensor, lengths: torch.Tensor) -> list[Any]:
    """Where keys and values go: behind what each row has, in all the columns there are."""
    slots: list[Any] = []
    for each in held:
        if isinstance(each, KeyValues):
            layer = KeyValueLayer()
            layer.buffers = each
            rows, tokens = ids.shape
            slots.append(KeyValueSlot(layer, slice(0, rows), rows, each.key.shape[2] - tokens, lengths))
        else:
            slots.append(each)
    return slots


# What a model keeps.

taking = Lock()


class Programs(Kept):
    """A model's programs, by what they were compiled for; and what recordings of passes need beside them."""

    def __init__(self) -> None:
        self.model_state: Any = None  # of the model they were compiled for, see [`programs_of`]
        self.scratch: dict[Any, list[LayerContent]] = {}  # where recordings find copies of rows, see `ProgramBuffers`
        self.weights: dict[str, Weights] = {}  # by part of the model those that were recorded, and their state then
        self.weights_states: dict[str, Any] = {}
        self.seen: dict[str, Any] = {}  # the state that the next pass would find, see `look_ahead`
        self.prepared: dict[Any, Any] = {}  # by module what recordings find prepared of its weights
        self.pools: dict[torch.device, Any] = {}  # of memory
        self.mirrors: dict[int, Mirror] = {}  # by columns, of whichever cache they were last
        # By layer what a cache has left that nobody has any more: states, and by their columns keys and values.
        self.spare: Sequence[LayerContent] = ()
        self.rooms: dict[int, list[LayerContent]] = {}
        self.user: ref[Any] | None = None  # whose passes these are now: they share memory

    def taken(self, user: Any) -> "Programs":
        """These for a user, or others while another one is at them."""
        with taking:  # engines may run in threads
            taken = self
            if self.has_user() and not self.has_user(user):
                taken = user.programs
                if not taken.has_user(user) or taken.model_state != self.model_state:
                    taken = Programs()
                    taken.model_state = self.model_state
            taken.user = ref(user)
        return taken

    def find_weights(self, model: Any) -> None:
        """Know the weights of a model by the part of it that a program runs."""
        # A module may be in both.
        modules: dict[str, list[Any]] = {"context": [model], "denoiser": [model]}
        for name, child in model._modules.items():
            modules["context" if name in CONTEXT_PARTS else "denoiser"] += child.modules()
        self.weights = {part: Weights(own) for part, own in modules.items()}
        self.seen = {}

    def forget_changed(self, model: Any, part: str) -> None:
        """Keep no recordings of a part of the model whose weights have changed, or lie elsewhere."""
        state = self.seen.pop(part, None) or self.weights[part].state()
        if state != self.weights_states.get(part):
            for key in [key for key in self if key[-1] == "recorded" and TOWER_OF[key[0]] == part]:
                del self[key]
            self.weights_states[part] = state
            self.prepare(model)

    def look_ahead(self, part: str) -> None:
        """Look at the weights for the next pass already, while the device computes this one and nobody waits."""
        self.seen[part] = self.weights[part].state()

    @torch.inference_mode(False)
    @torch.no_grad()
    def prepare(self, model: Any) -> None:
        """Bring what recordings find prepared of weights up to date, in its place: they may have changed traceless."""
        modules = list(model.modules())
        for gone in self.prepared.keys() - set(modules):
            del self.prepared[gone]
        for module in modules:
            now = vars(module).get("_prepared")
            kept = self.prepared.get(module)
            if kept is None and now is None:
                continue
            weights, found = now or (module.weights(), module.of_weights())
            # Other weights may lie where those before did, so that recordings go on.
            if kept is not None and [each.shape for each in kept[1]] == [each.shape for each in found]:
                for old, new in zip(kept[1], found, strict=True):
                    old.copy_(new)
                self.prepared[module] = weights, kept[1]
            else:
                # Some are weights themselves, which are not to be written to.
                self.prepared[module] = weights, tuple(each.clone() for each in found)

    def has_user(self, user: Any = None) -> bool:
        """Whether anybody, or this one, uses them now."""
        now = None if self.user is None else self.user()
        return now is not None if user is None else now is user


def programs_of(model: Any) -> Programs:
    """
    The programs kept with a model, unless it has become another: by device, dtype, modules, hooks, kernels, ...

    torch compiles again by itself where most of that has changed, but keeps what is of no use any more, gives up after
    a few times, and does not look for new hooks. New values of weights, or new tensors, change nothing.
    """
    modules = [
        (type(each), each.training, *each._forward_pre_hooks, *each._forward_hooks, *_settings(each))
        for each in model.modules()
    ]
    weights = [(type(each), each.device, each.dtype, each.shape, each.requires_grad) for each in model.parameters()]
    config, device = model.config, model.context_tower.embeddings.weight.device.type
    autocast = torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device)
    precision = torch.get_float32_matmul_precision(), torch.are_deterministic_algorithms_enabled()
    implementations = config._attn_implementation, config._experts_implementation
    ways = (*implementations, autocast, *precision, *model.kernels.items())
    kept: Programs | None = vars(model).get("_kept_programs")
    if kept is None or kept.model_state != (modules, weights, ways):
        kept = vars(model)["_kept_programs"] = Programs()
        kept.model_state = (modules, weights, ways)
    return kept


def _settings(module: torch.nn.Module) -> list[tuple[str, str]]:
    """What an adapter goes by, such as whether it is switched off, as text; of modules that have no such, nothing."""
    if type(module).__module__.partition(".")[0] in PLAIN:
        return []
    plain = (bool, int, float, str, list, tuple, dict, set, type(None))
    own = vars(module).items()
    return [(name, repr(value)) for name, value in own if isinstance(value, plain) and name not in HOLDERS]


__all__ = [
    "TOWER_OF",
    "LayerContent",
    "Programs",
    "accepting",
    "denoising",
    "programs_of",
    "reading",
    "verifying",
]

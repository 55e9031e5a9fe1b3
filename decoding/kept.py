"""What a model keeps beside its weights."""

from threading import local
from typing import Any


class Kept(dict[Any, Any]):
    """A dict in a model's `vars`; a copy of the model, also by pickle, gets an empty one: it may run elsewhere."""

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return type(self), ()

    def __deepcopy__(self, memo: dict[int, Any]) -> "Kept":
        return type(self)()


class Prepared(local):
    """By module what a pass of this thread finds prepared of weights, whatever others prepare; None: what they do."""

    by_module: dict[Any, Any] | None = None


prepared = Prepared()


__all__ = ["Kept", "Prepared", "prepared"]

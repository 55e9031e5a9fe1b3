"""What a model keeps beside its weights."""

from typing import Any


class Kept(dict[Any, Any]):
    """A dict in a model's `vars`; a copy of the model, also by pickle, gets an empty one: it may run elsewhere."""

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return type(self), ()

    def __deepcopy__(self, memo: dict[int, Any]) -> "Kept":
        return type(self)()


__all__ = ["Kept"]

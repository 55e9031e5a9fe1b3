"""Passes of a model whose parameters are spread over ranks, as by FSDP2 or ZeRO-3.

Every rank has rows of its own, but gathering a layer's parameters takes all ranks: they must run the same modules in
the same order, though their rows need different numbers of passes. So before every pass the ranks vote on the next
part to run, and whoever needs another one, or none any more, runs it on a dummy.
"""

from typing import Any

import torch
from torch import distributed

from ..cache_twotower import TwoTowerCache

# What passes are made of. Of two that are wanted, the later one goes first: ranks whose blocks are full wait for those
# that denoise, and then all read together.
PARTS = ("context_tower", "context_lm_head", "predict_next", "denoise")
DONE = -1


class SynchronisedPasses:
    """Mixin of the model: every pass of a tower or a head during generation goes through `_pass`."""

    def _pass(self, part: str, *args: Any) -> torch.Tensor:
        """What `part` returns, once it is its turn on all ranks."""
        self._join_until(PARTS.index(part))
        return self._run_part(part, *args)

    def _run_part(self, part: str, *args: Any) -> torch.Tensor:
        # Not inlined: to FSDP2, this is another forward of the whole model.
        return getattr(self, part)(*args)

    def _join_until(self: Any, wanted: int) -> None:
        """Take part in what other ranks need until it is the turn of `PARTS[wanted]`; if `DONE`, until all are."""
        while True:
            vote = torch.tensor(wanted, device=self.device)
            distributed.all_reduce(vote, distributed.ReduceOp.MAX)
            if (elected := int(vote)) == wanted:
                return
            self._run_part(PARTS[elected], *self._dummy(PARTS[elected]))

    def _dummy(self: Any, part: str) -> tuple[Any, ...]:
        """Arguments for a pass of which nothing remains."""
        if part == "context_lm_head":
            return (torch.zeros(1, self.config.hidden_size, dtype=self.dtype, device=self.device),)
        ids = torch.zeros(1, 1, dtype=torch.long, device=self.device)
        return (ids,) if part == "context_tower" else (ids, TwoTowerCache(self.config))


__all__ = ["DONE", "SynchronisedPasses"]

"""How long the next draft of mode "self_speculative" is to be, learnt from how much of the last ones was accepted.

A draft of length S is the newest token, which is known, and S - 1 drafted ones; S = 1 is no draft, one token in a step
of mode "ar". The text is the same whatever is chosen here.
"""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

# Estimates of acceptance forget by this factor per draft.
MEMORY = 0.75
# The weight of what the other rows showed, in drafts, in the estimate of a row.
PRIOR_WEIGHT = 1.5
# What a controller believes before its first draft.
OPTIMISM = 0.9
# Of the time that mode "ar" would have taken, so much may be lost to drafts,
LOSS_RATE = 0.025
# and beyond that so many full drafts of which nothing is accepted: at first, and where drafts have gained time.
FIRST_DRAFTS, EARNED_DRAFTS = 1.0, 3.0


@dataclass
class Acceptance:
    """Of drafted tokens up to the first one refused: how many were accepted, and how often one was refused."""

    accepted: float = 0.0
    refused: float = 0.0

    def learn(self, accepted: float, refused: float, memory: float) -> None:
        self.accepted, self.refused = memory * self.accepted + accepted, memory * self.refused + refused

    def rate(self, prior: float, weight: float) -> float:
        return (self.accepted + prior * weight) / (self.accepted + self.refused + weight)


class DraftController:
    """
    Chooses one draft length for all rows that are decoded together, cycle by cycle.

    Each choice promises most tokens per second, by a running estimate per row of how likely a drafted token is
    accepted. A wrong one is paid from an allowance of time: a draft may be tried while the allowance covers it even if
    nothing of it is accepted. It grows with the time that mode "ar" would have taken, and by what drafts gain, up to a
    few drafts. So never is more lost than `LOSS_RATE` of that time and `FIRST_DRAFTS` full drafts, and what drafts have
    gained before. While no draft promises anything, one is tried as soon as the allowance covers it.

    Deterministic: equal calls in equal order choose equally.

    Args:
        lengths: to choose among, ascending, 1 first; see `draft_lengths`.
        cycle_seconds: (length, rows) -> seconds of a cycle, as `PassCosts.cycle`.
    """

    def __init__(self, lengths: Sequence[int], cycle_seconds: Callable[[int, int], float]):
        if list(lengths) != sorted(set(lengths)) or lengths[0] != 1:
            raise ValueError(f"draft lengths are {list(lengths)}; give them ascending, from 1 on")
        self.lengths = tuple(lengths)
        self.cycle_seconds = cycle_seconds
        self.by_row: dict[Hashable, Acceptance] = {}
        self.all_rows = Acceptance(OPTIMISM, 1 - OPTIMISM)
        self.allowance: float | None = None  # in steps of mode "ar"

    def choose(self, rows: Sequence[Hashable]) -> int:
        """
        The draft length for the next cycle of these rows.

        Args:
            rows: what the engine knows the active rows by; new ones are taken to be like the others.
        """
        costs = self._costs(len(rows))
        tokens = self._expected_tokens(rows)
        promised = max(self.lengths, key=lambda length: tokens[length] / costs[length])
        if promised == 1:
            # Nothing is promised, so what is tried is what would find out most: a whole block.
            promised = self.lengths[-1]
        return promised if costs[promised] - 1 <= self._allowance(costs) else 1

    def learn(self, rows: Sequence[Hashable], length: int, accepted: Sequence[int]) -> None:
        """
        What came of a cycle.

        Args:
            rows: as given to `choose`.
            length: that was drafted.
            accepted: per row, how many of `length` - 1 drafted tokens were accepted.
        """
        costs = self._costs(len(rows))
        gained = sum(accepted) / len(rows) + 1 - costs[length]
        most = EARNED_DRAFTS * (costs[self.lengths[-1]] - 1)
        allowance = self._allowance(costs) + gained + LOSS_RATE * (sum(accepted) / len(rows) + 1)
        self.allowance = min(allowance, max(most, 0))
        if length == 1:
            return
        for row, count in zip(rows, accepted, strict=True):
            refused = float(count < length - 1)
            self.by_row.setdefault(row, Acceptance()).learn(count, refused, MEMORY)
        share = sum(accepted) / len(rows)
        self.all_rows.learn(share, sum(count < length - 1 for count in accepted) / len(rows), MEMORY)

    def forget(self, row: Hashable) -> None:
        """A row that has left, or whose key another text gets."""
        self.by_row.pop(row, None)

    def _costs(self, rows: int) -> dict[int, float]:
        """Of a cycle by length, in steps of mode "ar"."""
        step = self.cycle_seconds(1, rows)
        return {length: self.cycle_seconds(length, rows) / step for length in self.lengths}

    def _allowance(self, costs: dict[int, float]) -> float:
        return FIRST_DRAFTS * (costs[self.lengths[-1]] - 1) if self.allowance is None else self.allowance

    def _expected_tokens(self, rows: Sequence[Hashable]) -> dict[int, float]:
        """Mean per row, by length."""
        prior = self.all_rows.rate(OPTIMISM, 0.0)
        rates = [self.by_row.get(row, NOTHING_KNOWN).rate(prior, PRIOR_WEIGHT) for row in rows]
        return {length: sum(_run(rate, length) for rate in rates) / len(rates) for length in self.lengths}


NOTHING_KNOWN = Acceptance()


def _run(rate: float, length: int) -> float:
    """Expected tokens of a cycle: the sum of rate ** k over k < length."""
    return (1 - rate**length) / (1 - rate) if rate < 1 else length


__all__ = ["DraftController"]

"""How long the next draft of mode "self_speculative" is to be, learnt from what became of the last ones.

A draft of length S is the newest token, which is known, and S - 1 drafted ones; S = 1 is no draft, one token in a step
of mode "ar". The text is the same whatever is chosen here. Times are in steps: one is what a step of mode "ar" takes
for the rows at hand.
"""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from functools import cache

# Chosen on recorded acceptances of the embedded checkpoint, on and off its templates, and on made-up ones.

# What is believed before anything is known: that this share of drafted tokens is accepted where the context tower is
# sure of them, and how sure it is. Weights say how many drafts, and tokens, outweigh that.
SKILL, SKILL_WEIGHT = 0.97, 2.5
# Of the drafter that is looked for where what was seen promises nothing.
BEST_SKILL = 0.985
SURENESS, SURENESS_WEIGHT = 0.98, 1.0
# Tokens of the other rows soon outweigh the belief about sureness: rows decoded together are often of one kind.
POOL_SURENESS_WEIGHT = 0.3
# Before so many tokens of most rows were seen nothing is drafted: the first says little of how sure others will be.
FIRST_TOKENS = 2
# What has been seen fades by these factors, per draft and per token.
DRAFT_MEMORY, TOKEN_MEMORY = 0.8, 0.95
# A token as unlikely as a name among many is unlike the text around it: it counts as no less sure.
LEAST_SURE = 0.5
# A token is drafted without knowing the drafted ones before it, so unsure text is drafted worse than it is continued.
SURENESS_POWER = 7.0
# Of the steps that mode "ar" would have taken so many may be lost to drafts;
LOSS_RATE = 0.015
# beyond that so many steps at first, but the shortest draft in any case; and where drafts gain, so many whole drafts.
FIRST_STEPS, EARNED_DRAFTS = 4.0, 2.0
# Where no draft pays, whatever the context tower is sure of, none is drafted in so many cycles, and nothing is looked
# at: to look takes 3 % of a step of a small model.
REST = 8
# The same where it is not sure enough, which may change sooner.
SHORT_REST = 4

# Rates of acceptance are told apart by so much.
RATES = 256


@dataclass(slots=True)
class Evidence:
    """
    What was seen of a row, or of all, fading with time.

    Args:
        accepted: drafted tokens that were accepted.
        refused: drafts that were cut short, each weighed by how sure the context tower was of its token instead.
        sure: the context tower's probability of the tokens it chose, summed.
        tokens: how many these are.
    """

    accepted: float = 0.0
    refused: float = 0.0
    sure: float = 0.0
    tokens: float = 0.0

    def skill(self, prior: float) -> float:
        return (self.accepted + prior * SKILL_WEIGHT) / (self.accepted + self.refused + SKILL_WEIGHT)

    def sureness(self, prior: float, weight: float) -> float:
        return (self.sure + prior * weight) / (self.tokens + weight)

    def see_draft(self, accepted: float, refused: float) -> None:
        self.accepted = DRAFT_MEMORY * self.accepted + accepted
        self.refused = DRAFT_MEMORY * self.refused + refused

    def see_tokens(self, sure: float, tokens: float, memory: float) -> None:
        self.sure, self.tokens = memory * self.sure + sure, memory * self.tokens + tokens


UNSEEN = Evidence()
SURE = [1.0]


class DraftController:
    """
    Chooses one draft length for all rows that are decoded together, cycle by cycle: that which promises most tokens a
    second.

    A drafted token is expected to be accepted as often as those of its row lately were (the drafter's skill), times a
    power of how sure the context tower lately was of its own choices: where it is not, nobody can foresee them, and a
    refusal there says little against the drafter. What is not known of a row is taken from the others.

    A draft is as long as promises most, but no longer than an allowance of steps covers its loss if nothing of it is
    accepted; once drafts were accepted, that becomes unlikely, and the allowance covers as much more. It begins with
    `FIRST_STEPS`, or the shortest draft's loss, and grows by `LOSS_RATE` of the steps that mode "ar" would have taken,
    and by what drafts gain; beyond its beginning up to the loss of `EARNED_DRAFTS` whole drafts. What a draft loses is
    taken from it as far as the context tower was sure of what it chose instead: so at any time, counted from any
    earlier one, no more is lost to a drafter that is wrong than `LOSS_RATE`, an allowance, and one draft where it was
    right before.

    While the allowance is what it was at first, a drafter of `BEST_SKILL` is looked for: by the longest draft that is
    covered, up to the one that would then pay. So where whole drafts are dear, as of many rows, short ones come first,
    at once, and again as seldom as `LOSS_RATE` pays for what failed. Where no draft would pay even if the context
    tower were sure, `REST` cycles go by unwatched. And no text begins with a draft, before `FIRST_TOKENS` say how sure
    the context tower is of it.

    Deterministic: equal calls in equal order choose equally.

    Args:
        lengths: to choose among, ascending, 1 first, see `draft_lengths`; the last is a whole draft.
        cycle_seconds: (length, rows) -> seconds of a cycle, as `PassCosts.cycle`.
    """

    def __init__(self, lengths: Sequence[int], cycle_seconds: Callable[[int, int], float]):
        if not lengths or list(lengths) != sorted(set(lengths)) or lengths[0] != 1:
            raise ValueError(f"draft lengths are {list(lengths)}; give them ascending, the first of them 1")
        self.lengths = tuple(lengths)
        self.cycle_seconds = cycle_seconds
        self.by_row: dict[Hashable, Evidence] = {}
        self.pool = Evidence()
        self.allowance: float | None = None
        self.rest = 0  # cycles that are left of it
        self.costs_by_rows: dict[int, dict[int, float]] = {}

    def start(self, row: Hashable, confidence: float = 1.0) -> None:
        """
        A row joins; one that was never started begins without a token.

        Args:
            row: any key that is the row's alone until `forget`.
            confidence: the context tower's probability of the row's first new token, which it chose from the prompt.
        """
        evidence = self.by_row[row] = Evidence()
        sure = _clipped(confidence)
        evidence.see_tokens(sure, 1, TOKEN_MEMORY)
        # So that together they are told of a token of each but one.
        share = (len(self.by_row) - 1) / len(self.by_row) ** 2
        self.pool.see_tokens(share * sure, share, 1 - share)

    def choose(self, rows: Sequence[Hashable]) -> int:
        """The draft length for the next cycle of these rows."""
        _check_rows(rows)
        if self.rest > 0:
            self.rest -= 1
            return 1
        costs, seen = self._costs(len(rows)), [self.by_row.get(row, UNSEEN) for row in rows]
        # What was seen of a row's tokens has faded a little when the next is, so that two count as more than one.
        if 2 * sum(each.tokens <= FIRST_TOKENS - 1 for each in seen) > len(seen):
            return 1
        affordable = self._affordable(costs, seen)
        skill, is_unspent = self.pool.skill(SKILL), self._allowance(costs) >= self._first_allowance(costs)
        skills = [each.skill(skill) for each in seen]
        hopes = [max(each, BEST_SKILL) for each in skills] if is_unspent else skills
        if len(affordable) == 1 or self._most_promising(costs, hopes) == 1:
            self.rest = REST - 1
            return 1
        sureness = self.pool.sureness(SURENESS, POOL_SURENESS_WEIGHT)
        sure = [each.sureness(sureness, SURENESS_WEIGHT) ** SURENESS_POWER for each in seen]
        length = self._most_promising(affordable, [each * own for each, own in zip(sure, skills, strict=True)])
        if length == 1 and is_unspent:
            hoped = self._most_promising(costs, [each * own for each, own in zip(sure, hopes, strict=True)])
            length = max(each for each in affordable if each <= hoped)
        if length == 1:
            self.rest = SHORT_REST - 1
        return length

    @property
    def watches(self) -> bool:
        """Whether `learn` wants confidences of the cycle that was chosen last: the next choice is then weighed."""
        return self.rest == 0

    def learn(
        self,
        rows: Sequence[Hashable],
        length: int,
        accepted: Sequence[int],
        confidences: Sequence[Sequence[float]] | None = None,
    ) -> None:
        """
        What became of a cycle.

        Args:
            rows: as given to `choose`.
            length: that was drafted.
            accepted: per row, how many of the `length` - 1 drafted tokens were accepted.
            confidences: per row, the context tower's probability of each token the row got, of which the last is its
                own choice; what follows these 1 + accepted is not looked at. Default: nobody knows; a refusal then
                counts as if it had been sure, and a text of whose first tokens nobody knows is not drafted.
        """
        _check_rows(rows)
        self._check_outcome(rows, length, accepted, confidences)
        if length == 1 and confidences is None:
            return self._pay(len(rows), 1, 1, 0.0)
        count, refused, sure = len(rows), 0.0, 0.0
        for idx, (row, kept) in enumerate(zip(rows, accepted, strict=True)):
            seen = self.by_row.setdefault(row, Evidence())
            of_row = SURE * (kept + 1) if confidences is None else confidences[idx][: kept + 1]
            if length > 1:
                cut_short = of_row[-1] if kept < length - 1 and of_row[-1] > 0 else 0.0  # nor where it is no number
                seen.see_draft(kept, cut_short)
                refused += cut_short
            total = sum(map(_clipped, of_row))
            sure += total
            # As if the tokens had been equally sure; which of them came first matters little.
            remains, weight = _fading(kept + 1)
            seen.see_tokens(total / (kept + 1) * weight, weight, remains)
        tokens = sum(accepted) / count + 1
        # What a row is told of the others is not to be what it has seen itself.
        others = (count - 1) / count
        if length > 1:
            self.pool.see_draft(others * (tokens - 1), others * refused / count)
        self.pool.see_tokens(others * sure / count, others * tokens, DRAFT_MEMORY)
        self._pay(count, length, tokens, refused / count)

    def forget(self, row: Hashable) -> None:
        """A row has left, which those that come know it by; its key may be another's from now on."""
        seen = self.by_row.pop(row, UNSEEN)
        self.pool.see_draft(seen.accepted, seen.refused)
        self.pool.see_tokens(seen.sure, seen.tokens, DRAFT_MEMORY)

    def _pay(self, rows: int, length: int, tokens: float, refused: float) -> None:
        costs = self._costs(rows)
        most = max(EARNED_DRAFTS * (costs[self.lengths[-1]] - 1), self._first_allowance(costs))
        gain = tokens - costs[length]
        self.allowance = min(self._allowance(costs) + max(gain, gain * refused) + LOSS_RATE * tokens, most)

    def _allowance(self, costs: dict[int, float]) -> float:
        return self._first_allowance(costs) if self.allowance is None else self.allowance

    def _first_allowance(self, costs: dict[int, float]) -> float:
        return max(FIRST_STEPS, min((cost - 1 for length, cost in costs.items() if length > 1), default=0.0))

    def _affordable(self, costs: dict[int, float], seen: list[Evidence]) -> dict[int, float]:
        """Costs of those lengths whose loss the allowance covers; what was accepted speaks against losing all."""
        accepted = self.pool.accepted + sum(each.accepted for each in seen) / len(seen)
        most = self._allowance(costs) * (accepted + SKILL_WEIGHT) / SKILL_WEIGHT
        return {length: cost for length, cost in costs.items() if cost - 1 <= most or length == 1}

    def _most_promising(self, costs: dict[int, float], rates: list[float]) -> int:
        """The length of most tokens per step, of those whose costs are given."""
        table = _expected_tokens(tuple(costs))
        tokens = map(sum, zip(*[table[int(rate * RATES)] for rate in rates], strict=True))
        promises = {length: each / cost for (length, cost), each in zip(costs.items(), tokens, strict=True)}
        return max(promises, key=promises.__getitem__)

    def _costs(self, rows: int) -> dict[int, float]:
        """Steps of a cycle by length."""
        costs = self.costs_by_rows.get(rows)
        if costs is None:
            step = self.cycle_seconds(1, rows)
            costs = {length: self.cycle_seconds(length, rows) / step for length in self.lengths}
            self.costs_by_rows[rows] = costs
        return costs

    def _check_outcome(
        self, rows: Sequence[Hashable], length: int, accepted: Sequence[int], confidences: object
    ) -> None:
        if length not in self.lengths:
            raise ValueError(f"the draft's length was {length}; it can only be one of {self.lengths}")
        if len(accepted) != len(rows) or not all(0 <= count < length for count in accepted):
            raise ValueError(
                f"accepted is {list(accepted)}; give one number from 0 to {length - 1} for each of {len(rows)} rows"
            )
        if confidences is not None:
            _check_confidences(confidences, accepted)


def _clipped(confidence: float) -> float:
    return confidence if confidence > LEAST_SURE else LEAST_SURE  # nor is it more where it is no number


def _check_rows(rows: Sequence[Hashable]) -> None:
    if not rows:
        raise ValueError("no rows were given; a cycle has at least one")


def _check_confidences(confidences: object, accepted: Sequence[int]) -> None:
    lengths = [len(each) for each in confidences]  # type: ignore[attr-defined]
    if len(lengths) != len(accepted) or any(have <= kept for have, kept in zip(lengths, accepted, strict=True)):
        raise ValueError(
            f"confidences are of {lengths} tokens, but the rows got {[kept + 1 for kept in accepted]}; give each one"
        )


@cache
def _expected_tokens(lengths: tuple[int, ...]) -> list[tuple[float, ...]]:
    """Per rate of acceptance, in steps of 1 / RATES, a cycle's tokens by length: the sum of rate ** k, k < length."""
    rates = [idx / RATES for idx in range(RATES)]
    return [
        *[tuple((1 - rate**length) / (1 - rate) for length in lengths) for rate in rates],
        tuple(map(float, lengths)),
    ]


@cache
def _fading(tokens: int) -> tuple[float, float]:
    """What remains of what was seen before so many tokens, and what they weigh afterwards."""
    remains = TOKEN_MEMORY**tokens
    return remains, (1 - remains) / (1 - TOKEN_MEMORY)


__all__ = ["DraftController"]

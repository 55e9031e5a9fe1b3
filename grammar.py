"""Text that satisfies a grammar, in every mode: a logits processor on llguidance that keeps no state.

What may follow a text is a function of its new tokens alone, so that drafts can be made, verified and thrown away
under the grammar, and rows go their own ways. Needs `pip install llguidance`.

Shapes: B rows, T tokens, V vocabulary.
"""

from typing import Any

import torch
from transformers import LogitsProcessor

from .decoding.asking import PerRow

try:
    from llguidance import LLMatcher, LLTokenizer
    from llguidance.hf import from_tokenizer
except ImportError as error:
    raise ImportError("twotower.grammar needs llguidance; `pip install llguidance`") from error


class Grammar(PerRow):
    """
    A grammar over a tokenizer's texts, for `generate(logits_processor=[grammar])`, in any mode, batch and turn.

    The new text of every row satisfies it, and may end where the grammar is complete, and must where it is at its end;
    a length limit may cut it before. It may be used again in any number of calls.

    Args:
        text: a grammar in llguidance's own language, a variant of Lark; or see the class methods.
        tokenizer: a fast tokenizer.
        eos_token_id: what may end the text; default the tokenizer's.

    Raises:
        ValueError: for a grammar that llguidance does not understand.
    """

    def __init__(self, text: str, tokenizer: Any, eos_token_id: int | list[int] | None = None):
        self.text = text
        self.tokenizer: LLTokenizer = from_tokenizer(tokenizer, eos_token=eos_token_id)
        problem = LLMatcher.validate_grammar(text, self.tokenizer)
        if problem and not problem.startswith("WARNING"):
            raise ValueError(f"llguidance does not understand the grammar: {problem}")

    @classmethod
    def from_json_schema(cls, schema: str | dict[str, Any], tokenizer: Any, **kwargs: Any) -> "Grammar":
        """
        JSON texts of a schema, a dictionary or JSON itself; with the white space of `json.dumps`.

        What the schema says under `"x-guidance"` (llguidance's options) goes before that.
        """
        # White space as the model likes would let a text go on without an end.
        layout: Any = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
        try:
            text = LLMatcher.grammar_from_json_schema(schema, defaults=layout)
        except ValueError as error:
            raise ValueError(f"llguidance does not understand the JSON schema {schema!r}: {error}") from error
        return cls(text, tokenizer, **kwargs)

    @classmethod
    def from_regex(cls, regex: str, tokenizer: Any, **kwargs: Any) -> "Grammar":
        """Texts that a regular expression matches as a whole."""
        return cls(LLMatcher.grammar_from_regex(regex), tokenizer, **kwargs)

    @classmethod
    def from_lark(cls, lark: str, tokenizer: Any, **kwargs: Any) -> "Grammar":
        """Texts of a context-free grammar, written as for Lark: `start: "yes" | "no"`."""
        return cls(LLMatcher.grammar_from_lark(lark), tokenizer, **kwargs)

    def for_row(self, row: int, prompt_length: int) -> "GrammarProcessor":
        return self.after(prompt_length)

    def after(self, prompt_length: int) -> "GrammarProcessor":
        """The processor of texts whose first `prompt_length` tokens are not under the grammar."""
        return GrammarProcessor(self, prompt_length)


class GrammarProcessor(LogitsProcessor):
    """
    Forbids what no text of a grammar goes on with; a function of its arguments alone.

    Args:
        grammar: the [`Grammar`].
        prompt_length: tokens before the text that is under it, padding included.
    """

    stateless = True

    def __init__(self, grammar: Grammar, prompt_length: int):
        self.grammar, self.prompt_length = grammar, prompt_length
        # Where the last call left off, which most calls go on from.
        self._matcher, self._consumed = LLMatcher(grammar.tokenizer, grammar.text), list[int]()

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """(B, T) ids and (B, V) scores of what follows them -> (B, V); -inf all over after a text of no grammar."""
        texts = input_ids[:, self.prompt_length :].tolist()
        with torch.device("cpu"):  # whatever torch's default device
            allowed = torch.stack([self._allowed_after(text, scores.shape[-1]) for text in texts])
        return scores.masked_fill(~allowed.to(scores.device), -torch.inf)

    def _allowed_after(self, tokens: list[int], vocab_size: int) -> torch.Tensor:
        """(V,) bool; after an end-of-text no more than another one."""
        ends = self.grammar.tokenizer.eos_tokens
        if any(token in ends for token in tokens):
            return torch.zeros(vocab_size, dtype=torch.bool).index_fill(0, torch.tensor(ends), True)
        if not self._go_to(tokens):
            return torch.zeros(vocab_size, dtype=torch.bool)
        octets = torch.frombuffer(bytearray(self._matcher.compute_bitmask()), dtype=torch.uint8)
        bits = (octets[:, None] >> torch.arange(8, dtype=torch.uint8) & 1).bool().flatten()[:vocab_size]
        allowed = torch.zeros(vocab_size, dtype=torch.bool)
        allowed[: len(bits)] = bits
        return allowed

    def _go_to(self, tokens: list[int]) -> bool:
        """Bring the matcher behind these tokens; False where they are no beginning of a text of the grammar."""
        shared = 0
        while shared < min(len(tokens), len(self._consumed)) and tokens[shared] == self._consumed[shared]:
            shared += 1
        if not self._matcher.rollback(len(self._consumed) - shared):
            self._matcher, shared = LLMatcher(self.grammar.tokenizer, self.grammar.text), 0
        accepted = self._matcher.try_consume_tokens(tokens[shared:])
        self._consumed = tokens[: shared + accepted]
        return len(self._consumed) == len(tokens)


__all__ = ["Grammar", "GrammarProcessor"]

"""Decoding: blocks filled by the denoiser, drafts verified by the context tower, or one token at a time by either.

One method per mode, run by transformers' `generate` through `_sample`; what it runs on is prepared by
[`PreparedGeneration`].

Shapes: R rows still generating, S block, H hidden size, V vocabulary.
"""

from functools import partial
from itertools import count
from typing import Any

import torch
from transformers import GenerationConfig, StoppingCriteriaList

from .compat_twotower import BaseStreamer
from .decoding_twotower import BlockStep, Decoding
from .generation_config_twotower import MODES, TwoTowerGenerationConfig
from .kernels.precision import at_least_float32
from .padding_twotower import PackedTokens
from .preparation_twotower import PreparedGeneration
from .sampling_twotower import RowLogitsProcessors
from .synchronisation_twotower import DONE, SynchronisedPasses
from .text_twotower import Block, TwoTowerGenerateOutput
from .unmasking_twotower import DRAFT_NOT_A_NUMBER, NO_PROBLEM, NOT_A_NUMBER, Prediction, commit_run


class TwoTowerGenerationMixin(SynchronisedPasses, PreparedGeneration):
    """Selects the decoding method by the generation config's `mode`."""

    def _sample(
        self,
        input_ids: torch.Tensor,
        logits_processor: RowLogitsProcessors,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        synced_gpus: bool = False,
        streamer: BaseStreamer | None = None,
        **model_kwargs: Any,
    ) -> TwoTowerGenerateOutput | torch.Tensor:
        """The decoding method transformers' `generate` calls; runs the one of the config's mode."""
        synced = self._is_synced(synced_gpus)
        run = self._begin(input_ids, logits_processor, stopping_criteria, generation_config, streamer, model_kwargs)
        run.synced = synced
        decode = {
            "mask_diffusion": self._mask_diffusion,
            "self_speculative": self._self_speculative,
            "mock_ar": self._mock_ar,
            "ar": self._ar,
        }
        with run.cache.undone_on_error():
            try:
                decode[generation_config.mode](run)
            finally:
                if synced:
                    self._join_until(DONE)
            run.restore_cache()
            if streamer is not None:
                streamer.end()
            output = run.output(input_ids.to(run.text.rows.device))
        return output if generation_config.return_dict_in_generate else output.sequences

    # The modes.

    def _mask_diffusion(self, run: Decoding) -> None:
        """
        Read the prompt; then, block after block:

        1. denoise it, step by step; rows whose text ends within what is committed leave;
        2. write it;
        3. read it, unless all rows have ended.
        """
        self._read_prompt(run)
        block = run.first_block()
        for number in count():
            for step in range(run.config.steps_per_block):
                if not block.masked.any():
                    break
                self._denoise_step(run, block, step, run.config.steps_per_block, number)
                if len(run.end_rows(block)) == 0:
                    return
            going_on = run.append(block)
            if len(going_on) == 0:
                return
            self._read(run, PackedTokens(block.ids))
            block = run.open_block(block.ids[:, :0])

    def _self_speculative(self, run: Decoding) -> None:
        """
        Read the prompt and choose a token; then, cycle after cycle:

        1. draft: a block that begins with the newest token, which is not read yet, is filled by the denoiser;
        2. verify: the context tower reads the block tentatively and chooses its own token after every position;
        3. keep the drafted tokens that are its own choice up to the first that is not, and then its choice there;
        4. let the cache keep as much, which leaves the newest token unread.

        A stopping criterion about all rows ends a row when all have come as far; a cache that is wanted afterwards
        must not hold more than the text, so then all rows keep as much as the one that keeps least.

        Choices are those of mode "ar": the same logits, processors and noise, so the text is, too.
        """
        block = self._context_choice(run, self._read_prompt(run))
        going_on = run.append(block)
        newest = block.ids
        for number in count():
            if len(going_on) == 0:
                return
            draft = run.open_block(newest)
            for step in range(run.config.draft_steps):
                if not draft.masked.any():
                    break
                self._denoise_step(run, draft, step, run.config.draft_steps, number, known=1)
            run.text.context_forwards[run.text.rows] += 1
            hidden_states = self._pass(run.synced, "context_tower", draft.ids, run.cache, tentative=True)
            logits = at_least_float32(self._pass(run.synced, "context_lm_head", hidden_states)).to(newest.device)
            in_step = run.keep_cache and len(run.text.shared) > 0
            verified = self._predict(run, logits, draft=draft.ids[:, 1:], in_step=in_step)
            agrees = draft.ids[:, 1:] == verified.tokens[:, :-1]
            drafted = agrees.int().cumprod(1)
            steps = torch.cat([draft.commit_steps()[:, 1:].where(agrees, -1), torch.full_like(newest, -1)], dim=1)
            block = Block.chosen(verified, steps, run.text.recorded)
            drafted_nothing = (draft.problems == NOT_A_NUMBER).any(1, keepdim=True)
            block.problems = block.problems.masked_fill(drafted_nothing & (block.problems == 0), DRAFT_NOT_A_NUMBER)
            kept, ended = run.text.first_stop(block, drafted.sum(1) + 1, in_step)
            run.count_cycle(drafted, kept)
            run.cache.accept(kept.clamp(min=0))
            newest = block.ids.gather(1, kept.clamp(min=1)[:, None] - 1)
            going_on = run.write(block, kept, ended)
            newest = newest[going_on]

    def _mock_ar(self, run: Decoding) -> None:
        """One token per denoiser pass; the context tower stays one token behind and reads it afterwards."""
        run.unread, token = _split_last(run.unread)
        self._read_prompt(run)
        while True:
            run.text.denoiser_forwards[run.text.rows] += 1
            logits = self._pass(run.synced, "predict_next", token, run.cache).to(token.device)
            block = Block.chosen(self._predict(run, logits[:, None]), 0, run.text.recorded)
            going_on = run.append(block)
            if len(going_on) == 0:
                return
            self._read(run, PackedTokens(token[going_on]))
            token = block.ids

    def _ar(self, run: Decoding) -> None:
        """The context tower alone, one token per pass."""
        block = self._context_choice(run, self._read_prompt(run))
        while len(run.append(block)) > 0:
            block = self._context_choice(run, self._read(run, PackedTokens(block.ids)))

    # What they are made of.

    def _read_prompt(self, run: Decoding) -> torch.Tensor | None:
        """Let the context tower read what it has not yet, in chunks if so configured; as `_read`, None for nothing."""
        size = run.config.prefill_chunk_size or max(run.unread.ids.shape[1], 1)
        last = None
        for start in range(0, run.unread.ids.shape[1], size):
            ids, counts = run.unread.ids[:, start : start + size], run.unread.counts
            if counts is not None:
                counts = (counts - start).clamp(0, ids.shape[1])
            hidden_states = self._read(run, PackedTokens(ids, counts))
            ends_here = None if counts is None else (counts > 0)[:, None]
            last = hidden_states if last is None or ends_here is None else hidden_states.where(ends_here, last)
        return last

    def _read(self, run: Decoding, chunk: PackedTokens) -> torch.Tensor:
        """Let the context tower read a chunk into the cache; (R, H) hidden states of each row's last token."""
        run.text.context_forwards[run.text.rows] += 1 if chunk.counts is None else chunk.counts.sign()
        hidden_states = self._pass(run.synced, "context_tower", chunk.ids, run.cache, chunk.counts)
        if chunk.counts is None:
            return hidden_states[:, -1]
        last = (chunk.counts - 1).clamp(min=0)
        return hidden_states[torch.arange(len(last), device=last.device), last]

    def _context_choice(self, run: Decoding, hidden_states: torch.Tensor | None) -> Block:
        """The context tower's next token of each row, from (R, H) hidden states."""
        assert hidden_states is not None, "only mode mask_diffusion goes on from a text that has been read to its end"
        logits = at_least_float32(self._pass(run.synced, "context_lm_head", hidden_states)).to(run.text.rows.device)
        return Block.chosen(self._predict(run, logits[:, None]), -1, run.text.recorded)

    def _denoise_step(self, run: Decoding, block: Block, step: int, steps: int, number: int, known: int = 0) -> None:
        """
        One denoiser pass over block `number`: predict every position, and commit what the rule and the user say.

        Of a draft, the text holds the first `known` tokens already.
        """
        run.text.denoiser_forwards[run.text.rows] += block.masked.any(-1)
        timestep = run.rule.timestep(block.masked, step, steps)
        logits = self._pass(run.synced, "denoise", block.ids, run.cache, timestep).to(block.ids.device)
        mask_logits = logits[..., self.config.mask_token_id]
        if run.step_callback is not None:
            mask_logits = mask_logits.clone()  # only a callback is shown what is overwritten here
        logits[..., self.config.mask_token_id] = -torch.inf
        # Processors that may keep state are asked about tokens that are kept, so first the rule decides without them.
        in_order = run.processors.first_stateful() is not None
        prediction = self._predict(run, logits, block, known, only_known=in_order)
        commit = run.rule.commit(prediction, block.masked, step, steps, lambda: run.uniform(block, step, -known))
        is_draft = known > 0
        if run.processors.known_sees_text or (in_order and not is_draft):
            # What processors saw before a position must be the text that comes to stand there; and what leads to a
            # position where they allow nothing, a later pass may choose otherwise.
            commit = commit_run(commit & (prediction.problems == NO_PROBLEM), block.masked, steps - step)
        if in_order and not is_draft:
            prediction, commit = self._predict_in_order(run, logits, block, prediction, commit, step == steps - 1)
        if run.step_callback is not None:
            asked, commit = run.ask(
                block, prediction, commit, timestep, step, steps, number, is_draft=is_draft, mask_logits=mask_logits
            )
            if run.processors.known_sees_text:
                # What was chosen after a token that is replaced is chosen again; after a veto it must wait.
                replaced = commit & (asked.tokens != prediction.tokens)
                block.commit(replaced, asked, step)
                asked = self._predict(run, logits, block, known, only_known=in_order)
                commit = commit & block.masked & ((block.masked & ~commit).cumsum(-1) == 0)
            prediction = asked
        block.commit(commit, prediction, step)
        run.show_draft(block.ids[:, known:])

    def _predict_in_order(
        self, run: Decoding, logits: torch.Tensor, block: Block, guess: Prediction, commit: torch.Tensor, is_last: bool
    ) -> tuple[Prediction, torch.Tensor]:
        """
        Choose a token for a run of positions to commit, asking processors that may keep state about each once.

        The run ends where they choose another token than was guessed without them, unless it must not end.
        """
        wanted = Block(block.ids, commit)
        draft = None if is_last else guess.tokens.where(commit, block.ids)
        prediction = self._predict(run, logits, wanted, draft=draft)
        if draft is None:
            return prediction, commit
        differs = commit & (prediction.tokens != draft)
        return prediction, commit & (differs.cumsum(-1) - differs.int() == 0)

    def _predict(
        self,
        run: Decoding,
        logits: torch.Tensor,
        block: Block | None = None,
        known: int = 0,
        draft: torch.Tensor | None = None,
        only_known: bool = False,
        in_step: bool = False,
    ) -> Prediction:
        """
        Choose a token per position.

        Logits processors that look at the text are asked position after position from the left, each time with the
        row's own text and what stands or was chosen before the position; not about what follows the end of the text or
        the first choice that is not the draft's.

        Args:
            logits: (R, S, V) float32.
            block: whose open positions are wanted, and never the mask for them; default S positions after the text.
            known: how many of the block's first tokens the text holds already.
            draft: (R, S - 1) tokens to verify.
            only_known: leave out processors that may keep state.
            in_step: stop for all rows where one stops.
        """
        if not (run.processors.known_sees_text if only_known else run.processors.sees_text):
            scores = run.processors(logits, only_known=only_known)
            if block is not None:
                run.forbid_mask(scores)
            return run.prediction(logits, scores, run.choose(scores, -known))
        scores, texts = logits.clone(), run.text.texts()
        ids = run.choose(scores, -known)
        wanted = torch.ones_like(ids, dtype=torch.bool)
        if block is not None:
            wanted, ids = block.masked, ids.where(block.masked, block.ids)
        goes_on, kept = torch.ones_like(wanted[:, 0]), torch.zeros_like(ids[:, 0])
        # What is beyond a stop that only a criterion knows of must not be asked of a processor that may keep state.
        watched = run.text.has_criteria and draft is not None and block is None and run.processors.first_stateful()
        for column in range(known, ids.shape[1]):
            asked = wanted[:, column] & goes_on
            before = [
                torch.cat([text, row[known:column]]) if ask else None
                for text, row, ask in zip(texts, ids, asked.tolist(), strict=True)
            ]
            here = slice(column, column + 1)
            batch = partial(run.text.padded, ids[:, known:column])
            scores[:, here] = run.processors(logits[:, here], run.text.rows.tolist(), before, batch, only_known)
            if block is not None:
                goes_on = goes_on & run.forbid_mask(scores[:, here])[:, 0]
            chosen = run.choose(scores[:, here], column - known)[:, 0]
            ids[:, column] = chosen.where(asked, ids[:, column])
            goes_on = goes_on & ~run.text.ends(ids[:, known : column + 1])[:, -1]
            if draft is not None and column < draft.shape[1]:
                goes_on = goes_on & (ids[:, column] == draft[:, column])
            if watched:
                kept = kept + asked
                goes_on = goes_on & ~run.ends_before(ids[:, : column + 1], scores, kept, in_step)
            if in_step:
                goes_on = goes_on & goes_on.all()
        return run.prediction(logits, scores, ids)


def _split_last(prompt: PackedTokens) -> tuple[PackedTokens, torch.Tensor]:
    """A prompt without each row's last token, and that token (B, 1)."""
    if prompt.counts is None:
        return PackedTokens(prompt.ids[:, :-1]), prompt.ids[:, -1:]
    return PackedTokens(prompt.ids, prompt.counts - 1), prompt.ids.gather(1, prompt.counts[:, None] - 1)


__all__ = ["MODES", "BlockStep", "TwoTowerGenerateOutput", "TwoTowerGenerationConfig", "TwoTowerGenerationMixin"]

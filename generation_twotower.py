"""Decoding: blocks filled by the denoiser, drafts verified by the context tower, or one token at a time by either.

transformers' `generate` prepares generation config, logits processors and stopping criteria; this file supplies the
decoding methods it then runs, one per mode.

Shapes: B batch, R rows still generating, P prompt columns, S block, V vocabulary.
"""

import copy
from collections.abc import Callable
from itertools import count
from typing import Any

import torch
from transformers import GenerationConfig, GenerationMixin, LogitsProcessorList, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer
from transformers.utils import logging

from .cache_twotower import TwoTowerCache
from .decoding_twotower import BlockStep, Decoding
from .generation_config_twotower import (
    MODES,
    REFUSED_ARGUMENTS,
    STRATEGY_DEFAULTS,
    TwoTowerGenerationConfig,
    check_strategy,
    check_supported,
)
from .padding_twotower import PackedTokens, check_attention_mask, pack_tokens
from .sampling_twotower import RowLogitsProcessors, derived_seeds, gumbel_noise
from .text_twotower import Block, GeneratedText, TwoTowerGenerateOutput
from .unmasking_twotower import Prediction, UnmaskingRule, log_prob

logger = logging.get_logger(__name__)

# Arguments of ours that `generate` passes through to the decoding method.
CALL_ARGUMENTS = ("step_callback", "starting_block")


class TwoTowerGenerationMixin(GenerationMixin):
    """Selects the decoding method by the generation config's `mode`."""

    @torch.no_grad()
    def generate(
        self,
        inputs: torch.Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        **kwargs: Any,
    ) -> TwoTowerGenerateOutput | torch.Tensor:
        """
        Generate text; every argument of [`~transformers.GenerationMixin.generate`] and the strategy's knobs.

        Args:
            inputs: (B, P) prompt ids, also as `input_ids`; padding on either side with its `attention_mask`.
            generation_config: a [`TwoTowerGenerationConfig`] or a plain one.
            past_key_values: [`TwoTowerCache`] of an earlier call, extended in place; `inputs` is the whole text, of
                which the cache holds the beginning. The attention mask may then have holes.
            starting_block: (B, at most block_size) for `mask_diffusion`: the first block, with tokens to keep, and
                the mask id or nothing where one is wanted.
            step_callback: for `mask_diffusion`: called with a [`BlockStep`] after every denoiser pass.
            kwargs: the knobs of [`TwoTowerGenerationConfig`], `max_new_tokens`, `streamer` (with `put_draft` it gets
                the block after every pass), `tokenizer` (for `stop_strings`), ...

        Returns:
            (B, P + N) sequences, or [`TwoTowerGenerateOutput`] with `return_dict_in_generate=True`.
        """
        for name in REFUSED_ARGUMENTS:
            if kwargs.get(name) is not None:
                raise ValueError(f"{name} is not supported by TwoTower's generate; leave it out")
        if kwargs.get("cache_implementation") is not None:  # transformers would not come to ask our config
            raise ValueError(
                f"cache_implementation={kwargs['cache_implementation']!r} is not supported by TwoTower's generate; "
                "leave it unset"
            )
        input_ids = kwargs.pop("input_ids", None) if inputs is None else inputs
        if input_ids is None:
            return super().generate(None, generation_config, **kwargs)
        attention_mask = kwargs.pop("attention_mask", None)
        continued = kwargs.get("past_key_values") is not None
        bos_token_id = kwargs.get("bos_token_id", getattr(generation_config, "bos_token_id", None))
        input_ids, padding_mask = self._check_prompt(input_ids, attention_mask, bos_token_id, continued)
        if padding_mask is None:
            # Without a mask, transformers takes every padding id for padding; a row alone needs none.
            whole = attention_mask is not None or len(input_ids) == 1
            mask = torch.ones_like(input_ids) if whole else None
            return super().generate(input_ids, generation_config, attention_mask=mask, **kwargs)
        # Left padding inside, where every row's newest token is in the last column; the prompts go back as they came.
        left_ids, left_mask = _pad_left(input_ids, padding_mask)
        output = super().generate(left_ids, generation_config, attention_mask=left_mask, **kwargs)
        sequences = output if isinstance(output, torch.Tensor) else output.sequences
        prompts = input_ids.to(sequences.device).repeat_interleave(len(sequences) // len(input_ids), dim=0)
        sequences = torch.cat([prompts, sequences[:, left_ids.shape[1] :]], dim=1)
        if isinstance(output, torch.Tensor):
            return sequences
        output.sequences = sequences
        return output

    def _check_prompt(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None,
        bos_token_id: int | None,
        continued: bool,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The prompt, an empty one begun with the beginning-of-text id, and its mask of padding (None without any)."""
        mask = check_attention_mask(input_ids, attention_mask, holes=continued)
        if input_ids.shape[1] == 0:
            bos = self.generation_config.bos_token_id if bos_token_id is None else bos_token_id
            if bos is None:
                raise ValueError(
                    "the prompt is empty and there is no bos_token_id to begin with; set one or give a token"
                )
            return input_ids.new_full((len(input_ids), 1), bos), None
        self._check_vocabulary("input_ids", input_ids)
        return input_ids, mask

    def _check_vocabulary(self, name: str, ids: torch.Tensor) -> None:
        low, high = int(ids.min()), int(ids.max())
        if low < 0 or high >= self.config.vocab_size:
            wrong = low if low < 0 else high
            raise ValueError(f"{name} holds {wrong}, outside the vocabulary of {self.config.vocab_size} tokens")

    # What transformers' `generate` calls on its way.

    def adjust_generation_fn(self, *args: Any, **kwargs: Any) -> None:
        super().adjust_generation_fn(*args, **kwargs)
        flags = self.generation_config.to_dict()
        self.generation_config: GenerationConfig = TwoTowerGenerationConfig.from_dict(flags)

    def _prepare_generation_config(
        self, generation_config: GenerationConfig | None, **kwargs: Any
    ) -> tuple[GenerationConfig, dict[str, Any]]:
        for name in STRATEGY_DEFAULTS:
            if not hasattr(self.generation_config, name):
                setattr(self.generation_config, name, None)
        if isinstance(kwargs.get("seed"), torch.Tensor):
            kwargs["seed"] = kwargs["seed"].tolist()
        config, model_kwargs = super()._prepare_generation_config(generation_config, **kwargs)
        for name, default in {**STRATEGY_DEFAULTS, "block_size": self.config.block_size}.items():
            if getattr(config, name, None) is None:
                setattr(config, name, default)
        check_strategy(config)
        check_supported(config)
        for name in CALL_ARGUMENTS:
            if model_kwargs.get(name) is not None and config.mode != "mask_diffusion":
                raise ValueError(f'{name} is for mode "mask_diffusion", not {config.mode!r}; leave it out')
        if config.block_size > self.config.block_size and config.mode == "mask_diffusion":
            logger.warning(
                f"block_size {config.block_size} is larger than the {self.config.block_size} the denoiser was trained "
                "on; the 30B model's HumanEval fell from 76 to 20 when its blocks went from 16 to 64"
            )
        if config.seed is not None and not config.do_sample and config.unmasking_rule != "posterior":
            logger.warning(f"seed={config.seed!r} has no effect without do_sample=True")
        return config, model_kwargs

    def _validate_model_kwargs(self, model_kwargs: dict[str, Any]) -> None:
        super()._validate_model_kwargs({name: v for name, v in model_kwargs.items() if name not in CALL_ARGUMENTS})

    def _prepare_cache_for_generation(
        self, generation_config: GenerationConfig, model_kwargs: dict[str, Any], *args: Any
    ) -> None:
        cache = model_kwargs.get("past_key_values")
        if cache is None:
            cache = TwoTowerCache(self.config)
        elif not isinstance(cache, TwoTowerCache):
            raise ValueError(f"past_key_values is a {type(cache).__name__}; give the TwoTowerCache of an earlier call")
        model_kwargs["past_key_values"] = cache

    def _prepare_generated_length(
        self, generation_config: GenerationConfig, has_default_max_length: bool, **kwargs: Any
    ) -> GenerationConfig:
        config = super()._prepare_generated_length(generation_config, has_default_max_length, **kwargs)
        if config.max_new_tokens is None and has_default_max_length:
            config.max_new_tokens = config.max_length - kwargs["input_ids_length"]
        return config

    def _get_stopping_criteria(self, generation_config: GenerationConfig, **kwargs: Any) -> StoppingCriteriaList:
        """All but the length limit, which is each row's own."""
        config = copy.copy(generation_config)
        config.max_length = None
        return super()._get_stopping_criteria(config, **kwargs)

    def _get_logits_processor(
        self,
        generation_config: GenerationConfig,
        input_ids_seq_length: int | None = None,
        encoder_input_ids: torch.Tensor | None = None,
        prefix_allowed_tokens_fn: Callable[[int, torch.Tensor], list[int]] | None = None,
        logits_processor: LogitsProcessorList | None = None,
        device: Any = None,
        model_kwargs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> RowLogitsProcessors:
        """For every row what transformers makes for that row alone: its own prompt, lengths and number."""
        assert encoder_input_ids is not None
        copies = generation_config.num_return_sequences
        prompts = encoder_input_ids.repeat_interleave(copies, dim=0)
        mask = (model_kwargs or {}).get("attention_mask")

        def build(row: int) -> LogitsProcessorList:
            prompt = prompts[row] if mask is None else prompts[row][mask[row].bool()]
            config = copy.copy(generation_config)
            config.max_length = _most_tokens(generation_config, len(prompt))
            if generation_config.min_new_tokens is not None:
                config.min_length = None  # transformers derives it from the padded width
            allowed = prefix_allowed_tokens_fn
            return super(TwoTowerGenerationMixin, self)._get_logits_processor(
                config,
                input_ids_seq_length=len(prompt),
                encoder_input_ids=prompt[None],
                prefix_allowed_tokens_fn=None if allowed is None else lambda _, text: allowed(row // copies, text),
                logits_processor=logits_processor,
                device=device,
            )

        return RowLogitsProcessors(build, len(prompts))

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
        if synced_gpus:
            raise ValueError(
                "synced_gpus=True is not supported: rows of different ranks take different numbers of passes"
            )
        run = self._begin(input_ids, logits_processor, stopping_criteria, generation_config, streamer, model_kwargs)
        decode = {
            "mask_diffusion": self._mask_diffusion,
            "self_speculative": self._self_speculative,
            "mock_ar": self._mock_ar,
            "ar": self._ar,
        }
        try:
            decode[generation_config.mode](run)
        finally:
            run.restore_cache()
        if streamer is not None:
            streamer.end()
        output = run.output(input_ids.to(run.text.rows.device))
        return output if generation_config.return_dict_in_generate else output.sequences

    def _begin(
        self,
        input_ids: torch.Tensor,
        processors: RowLogitsProcessors,
        stopping_criteria: StoppingCriteriaList,
        config: GenerationConfig,
        streamer: BaseStreamer | None,
        model_kwargs: dict[str, Any],
    ) -> Decoding:
        device = self.context_tower.embeddings.weight.device
        if device.type != "meta":  # else it is offloaded, and accelerate moves inputs to where it runs
            input_ids = input_ids.to(device)
        prompt = pack_tokens(input_ids, model_kwargs.get("attention_mask"), holes=True)
        with_dict = config.return_dict_in_generate
        recorded = ["commit_steps", "confidences", "log_probs"] if with_dict else []
        recorded += [name for name in ("scores", "logits") if with_dict and getattr(config, f"output_{name}")]
        text = GeneratedText(
            prompt,
            _most_tokens(config, prompt.lengths),
            stopping_criteria,
            0 if config._pad_token_tensor is None else int(config._pad_token_tensor),
            tuple(recorded),
        )
        cache = model_kwargs["past_key_values"]
        if cache.batch_size not in (-1, len(input_ids)):
            cache = _repeated_for(cache, len(input_ids), config.num_return_sequences)
        return Decoding(
            text=text,
            cache=cache,
            unread=_unread(prompt, cache),
            config=config,
            processors=processors,
            rule=UnmaskingRule(config),
            seeds=_seeds(config, len(input_ids), input_ids.device),
            mask_token_id=self.config.mask_token_id,
            vocab_size=self.config.vocab_size,
            starting_block=self._check_starting_block(model_kwargs.get("starting_block"), config, len(input_ids)),
            step_callback=model_kwargs.get("step_callback"),
            streamer=streamer,
            keep_cache=with_dict or cache.batch_size != -1,
        )

    def _check_starting_block(
        self, block: torch.Tensor | None, config: GenerationConfig, rows: int
    ) -> torch.Tensor | None:
        if block is None:
            return None
        if block.ndim != 2 or len(block) != rows or not 1 <= block.shape[1] <= config.block_size:
            raise ValueError(
                f"starting_block has shape {tuple(block.shape)}; expected a row for each of the {rows} sequences, "
                f"of at most block_size {config.block_size} tokens"
            )
        self._check_vocabulary("starting_block", block)
        return block

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

        Choices are those of mode "ar": the same logits, processors and noise, so the text is, too.
        """
        block = self._context_choice(run, self._read_prompt(run))
        going_on = run.append(block)
        newest = block.ids
        while len(going_on) > 0:
            draft = run.open_block(newest)
            for step in range(run.config.draft_steps):
                if draft.masked.any():
                    self._denoise_step(run, draft, step, run.config.draft_steps)
            run.text.context_forwards[run.text.rows] += 1
            hidden_states = self.context_tower(draft.ids, run.cache, tentative=True)
            logits = self.context_lm_head(hidden_states).float().to(newest.device)
            verified = self._predict(run, logits, draft.ids[:, 1:])
            agrees = draft.ids[:, 1:] == verified.tokens[:, :-1]
            drafted = agrees.int().cumprod(1)
            steps = torch.cat([draft.commit_steps()[:, 1:].where(agrees, -1), torch.full_like(newest, -1)], dim=1)
            block = Block.chosen(verified, steps, run.text.recorded)
            kept, ended = run.text.first_stop(block.ids, drafted.sum(1) + 1)
            run.count_cycle(drafted, kept)
            run.cache.accept(kept)
            newest = block.ids.gather(1, kept[:, None] - 1)
            going_on = run.write(block, kept, ended)
            newest = newest[going_on]

    def _mock_ar(self, run: Decoding) -> None:
        """One token per denoiser pass; the context tower stays one token behind and reads it afterwards."""
        run.unread, token = _split_last(run.unread)
        if run.unread.ids.shape[1] > 0:
            self._read_prompt(run)
        while True:
            run.text.denoiser_forwards[run.text.rows] += 1
            logits = self.predict_next(token, run.cache).to(token.device)
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

    def _read_prompt(self, run: Decoding) -> torch.Tensor:
        """Let the context tower read what it has not yet, in chunks if so configured; as `_read`."""
        size = run.config.prefill_chunk_size or run.unread.ids.shape[1]
        last = None
        for start in range(0, run.unread.ids.shape[1], size):
            ids, counts = run.unread.ids[:, start : start + size], run.unread.counts
            if counts is not None:
                counts = (counts - start).clamp(0, ids.shape[1])
            hidden_states = self._read(run, PackedTokens(ids, counts))
            ends_here = None if counts is None else (counts > 0)[:, None]
            last = hidden_states if last is None or ends_here is None else hidden_states.where(ends_here, last)
        assert last is not None
        return last

    def _read(self, run: Decoding, chunk: PackedTokens) -> torch.Tensor:
        """Let the context tower read a chunk into the cache; (R, H) hidden states of each row's last token."""
        run.text.context_forwards[run.text.rows] += 1 if chunk.counts is None else chunk.counts.sign()
        hidden_states = self.context_tower(chunk.ids, run.cache, chunk.counts)
        if chunk.counts is None:
            return hidden_states[:, -1]
        last = (chunk.counts - 1).clamp(min=0)
        return hidden_states[torch.arange(len(last), device=last.device), last]

    def _context_choice(self, run: Decoding, hidden_states: torch.Tensor) -> Block:
        """The context tower's next token of each row, from (R, H) hidden states."""
        logits = self.context_lm_head(hidden_states).float().to(run.text.rows.device)
        return Block.chosen(self._predict(run, logits[:, None]), -1, run.text.recorded)

    def _denoise_step(self, run: Decoding, block: Block, step: int, steps: int, number: int | None = None) -> None:
        """One denoiser pass: predict every position, never the mask, and commit what the rule and the user say."""
        run.text.denoiser_forwards[run.text.rows] += block.masked.any(-1)
        timestep = run.rule.timestep(block.masked, step, steps)
        logits = self.denoise(block.ids, run.cache, timestep).to(block.ids.device)
        logits[..., self.config.mask_token_id] = -torch.inf
        # A draft begins with the newest token, which the text holds already.
        known = 0 if number is not None else 1
        prediction = self._predict(run, logits, block.ids, known, block.masked)
        commit = run.rule.commit(prediction, block.masked, step, steps, lambda: run.uniform(block, step, known))
        if run.step_callback is not None and number is not None:
            prediction, commit = run.ask(block, prediction, commit, timestep, step, steps, number)
        block.commit(commit, prediction, step)
        run.show_draft(block.ids[:, known:])

    def _predict(
        self,
        run: Decoding,
        logits: torch.Tensor,
        block_ids: torch.Tensor | None = None,
        known: int = 0,
        wanted: torch.Tensor | None = None,
    ) -> Prediction:
        """
        Choose a token per position.

        Args:
            logits: (R, S, V) float32.
            block_ids: (R, at least S - 1) what stands at the positions; logits processors see a row's text and those
                before each position. The mask id stands where none is committed.
            known: how many of the positions the text holds already.
            wanted: (R, S) bool, positions that matter to logits processors; default all.
        """
        positions = logits.shape[1]

        def texts() -> list[torch.Tensor]:
            rows = [run.text.row(row) for row in run.text.rows.tolist()]
            if block_ids is None:
                return rows
            return [torch.cat([row, ids[known : positions - 1]]) for row, ids in zip(rows, block_ids, strict=True)]

        scores = run.processors(logits, run.text.rows, texts, wanted)
        noisy = scores
        if run.config.do_sample:
            noisy = scores + gumbel_noise(*run.seeds_and_positions(positions, known), logits.shape[-1])
        tokens = noisy.argmax(-1)
        log_probs = log_prob(scores, tokens) if run.text.recorded else None
        return Prediction(logits, tokens, log_prob(logits, tokens).exp(), log_probs, scores)


def _most_tokens(config: GenerationConfig, prompt_length: Any) -> Any:
    """Where a row's text ends at the latest: `max_length` counts its own tokens, not its padding."""
    if config.max_new_tokens is not None:
        return prompt_length + config.max_new_tokens
    if isinstance(prompt_length, torch.Tensor):
        return torch.full_like(prompt_length, config.max_length)
    return config.max_length


def _seeds(config: GenerationConfig, rows: int, device: torch.device) -> torch.Tensor | None:
    """(B,) a seed for each row, or None where nothing is drawn."""
    if not config.do_sample and config.unmasking_rule != "posterior":
        return None
    copies = config.num_return_sequences
    if config.seed is None:
        return torch.randint(-(2**62), 2**62, (rows,)).to(device)
    if isinstance(config.seed, int):
        return derived_seeds(torch.full((rows // copies,), config.seed, device=device), copies)
    seeds = torch.tensor(config.seed, device=device)
    if len(seeds) == rows:
        return seeds
    if len(seeds) * copies != rows:
        raise ValueError(
            f"seed holds {len(seeds)} numbers for {rows // copies} prompts; give one for each, or one int"
        )
    return derived_seeds(seeds, copies)


def _repeated_for(cache: TwoTowerCache, rows: int, copies: int) -> TwoTowerCache:
    if cache.batch_size * copies != rows:
        raise ValueError(f"past_key_values holds {cache.batch_size} rows, input_ids {rows // copies}")
    assert cache.lengths is not None
    return cache.copy_rows(torch.arange(cache.batch_size, device=cache.lengths.device).repeat_interleave(copies))


def _unread(prompt: PackedTokens, cache: TwoTowerCache) -> PackedTokens:
    """What of each row the cache does not hold yet."""
    if cache.lengths is None:
        return prompt
    lengths = prompt.lengths
    counts = lengths - cache.lengths.to(lengths.device)
    if (counts < 1).any():
        row = int((counts < 1).nonzero()[0])
        raise ValueError(
            f"past_key_values holds {int(cache.lengths[row])} tokens of row {row}, whose text has "
            f"{int(lengths[row])}; give the whole text as input_ids, at least one token longer"
        )
    width = int(counts.max())
    columns = (lengths - counts)[:, None] + torch.arange(width, device=lengths.device)
    ids = prompt.ids.gather(1, columns.clamp(max=prompt.ids.shape[1] - 1))
    return PackedTokens(ids, None if (counts == width).all() else counts)


def _pad_left(input_ids: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Move each row's padding to its front, and leave out columns that are then nothing else."""
    columns = mask.int().argsort(dim=1, stable=True)[:, -int(mask.sum(1).max()) :]
    return input_ids.gather(1, columns), mask.gather(1, columns).long()


def _split_last(prompt: PackedTokens) -> tuple[PackedTokens, torch.Tensor]:
    """A prompt without each row's last token, and that token (B, 1)."""
    if prompt.counts is None:
        return PackedTokens(prompt.ids[:, :-1]), prompt.ids[:, -1:]
    return PackedTokens(prompt.ids, prompt.counts - 1), prompt.ids.gather(1, prompt.counts[:, None] - 1)


__all__ = ["MODES", "BlockStep", "TwoTowerGenerateOutput", "TwoTowerGenerationConfig", "TwoTowerGenerationMixin"]

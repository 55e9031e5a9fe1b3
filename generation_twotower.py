"""Decoding: blocks filled by the denoiser, or one token at a time by either tower.

transformers' `generate` prepares generation config, logits processors and stopping criteria; this file supplies the
decoding methods it then runs, one per mode.

Shapes: B batch, R rows still generating, P prompt columns, S block, V vocabulary.
"""

from dataclasses import dataclass
from typing import Any

import torch
from transformers import GenerationConfig, GenerationMixin, LogitsProcessorList, StoppingCriteriaList
from transformers.generation.stopping_criteria import EosTokenCriteria, MaxLengthCriteria
from transformers.generation.streamers import BaseStreamer
from transformers.utils import ModelOutput, logging

from .cache_twotower import TwoTowerCache
from .padding_twotower import PackedTokens, check_attention_mask, pack_tokens
from .unmasking_twotower import commit_confident

logger = logging.get_logger(__name__)

MODES = ("mask_diffusion", "mock_ar", "ar")
STRATEGY_DEFAULTS = {
    "mode": "mask_diffusion",
    "block_size": None,
    "steps_per_block": 16,
    "confidence_threshold": 0.8,
}


class TwoTowerGenerationConfig(GenerationConfig):
    """
    transformers' generation config and the knobs of block diffusion.

    Args:
        mode (`str`, defaults to `"mask_diffusion"`):
            `"mask_diffusion"` fills blocks in parallel; `"mock_ar"` takes one token per denoiser pass; `"ar"` is the
            context tower alone.
        block_size (`int`, defaults to the model config's, 16):
            Tokens per block, at least 1; for `mask_diffusion`.
        steps_per_block (`int`, defaults to 16):
            Most denoiser passes per block, at least 1; for `mask_diffusion`.
        confidence_threshold (`float`, defaults to 0.8):
            Predictions surer than this are committed at once; in (0, 1]; for `mask_diffusion`.
        kwargs:
            Any other generation flag of transformers.

    Raises:
        ValueError: for an unknown mode or a value outside its range.
    """

    def __init__(self, **kwargs: Any):
        for name in STRATEGY_DEFAULTS:
            setattr(self, name, kwargs.pop(name, None))
        kwargs.pop("_from_model_config", None)  # with it, transformers drops flags it does not know when loading
        super().__init__(**kwargs)

    def validate(self, *args: Any, **kwargs: Any) -> None:
        super().validate(*args, **kwargs)
        check_strategy(self)

    @classmethod
    def from_model_config(cls, model_config: Any) -> "TwoTowerGenerationConfig":
        """The generation flags of a model config; the strategy's own knobs are not among them."""
        return cls(**GenerationConfig.from_model_config(model_config).to_dict())


def check_strategy(config: GenerationConfig) -> None:
    """Raise a ValueError for a strategy knob out of range; None means unset."""
    if config.mode is not None and config.mode not in MODES:
        raise ValueError(f"mode is {config.mode!r}; use one of {', '.join(MODES)}")
    for name in ("block_size", "steps_per_block"):
        value = getattr(config, name)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise ValueError(f"{name} is {value!r}; it must be a whole number of at least 1")
    threshold = config.confidence_threshold
    if threshold is not None and not (isinstance(threshold, int | float) and 0 < threshold <= 1):
        raise ValueError(f"confidence_threshold is {threshold!r}; it must lie in (0, 1]")


def check_supported(config: GenerationConfig) -> None:
    """Refuse by name what has no meaning for two towers, or is not built."""
    refused = {
        "num_beams": config.num_beams not in (None, 1),
        "num_beam_groups": config.num_beam_groups not in (None, 1),
        "constraints": config.constraints is not None,
        "force_words_ids": config.force_words_ids is not None,
        "penalty_alpha": bool(config.penalty_alpha),
        "dola_layers": config.dola_layers is not None,
        "use_mtp": bool(config.use_mtp),
        "prompt_lookup_num_tokens": config.prompt_lookup_num_tokens is not None,
        "assistant_early_exit": config.assistant_early_exit is not None,
        "guidance_scale": config.guidance_scale not in (None, 1),
        "prefill_chunk_size": config.prefill_chunk_size is not None,
        "cache_implementation": config.cache_implementation is not None,
        "use_cache": config.use_cache is False,
        "output_attentions": bool(config.output_attentions),
        "output_hidden_states": bool(config.output_hidden_states),
        "output_scores": bool(config.output_scores),
        "output_logits": bool(config.output_logits),
    }
    for name, is_set in refused.items():
        if is_set:
            raise ValueError(
                f"{name}={getattr(config, name)!r} is not supported by TwoTower's generate; leave it unset"
            )
    if config.do_sample and config.temperature is not None and config.temperature <= 0:
        raise ValueError(f"temperature is {config.temperature!r}; sampling needs it above 0 (or do_sample=False)")


@dataclass
class TwoTowerGenerateOutput(ModelOutput):
    """
    Result of `generate(..., return_dict_in_generate=True)`.

    Args:
        sequences: (B, P + N) the prompts as given, then the new tokens, padded after a row's end.
        denoiser_forwards: (B,) denoiser passes of each row.
        context_forwards: (B,) context tower passes of each row: the prompt's, then one per chunk read.
        tokens_per_forward: (B,) float32, new tokens (end-of-text included) per denoiser pass, or in mode "ar", which
            has none, per context pass.
    """

    sequences: torch.Tensor
    denoiser_forwards: torch.Tensor | None = None
    context_forwards: torch.Tensor | None = None
    tokens_per_forward: torch.Tensor | None = None


class GeneratedText:
    """The growing sequences: which rows still generate, and what each has cost."""

    def __init__(self, prompt: torch.Tensor, pad_token_id: int, stopping_criteria: StoppingCriteriaList):
        batch = len(prompt)
        self.pad_token_id = pad_token_id
        self.stopping_criteria = stopping_criteria
        self.chunks = [prompt]
        self.rows = torch.arange(batch, device=prompt.device)  # of the batch, those still generating
        self.current = prompt  # their sequences, (R, columns)
        self.new_tokens = torch.zeros(batch, dtype=torch.long, device=prompt.device)
        self.denoiser_forwards = torch.zeros_like(self.new_tokens)
        self.context_forwards = torch.zeros_like(self.new_tokens)

    def append(self, tokens: torch.Tensor, streamer: BaseStreamer | None) -> torch.Tensor:
        """Add (R, n) tokens, each row cut right after its first stop; returns the indices of the rows that go on."""
        kept, stopped = self._first_stop(tokens)
        width = int(kept.max())
        columns = torch.arange(width, device=tokens.device)
        tokens = tokens[:, :width].masked_fill(columns >= kept[:, None], self.pad_token_id)
        chunk = tokens.new_full((len(self.new_tokens), width), self.pad_token_id)
        chunk[self.rows] = tokens
        self.chunks.append(chunk)
        self.current = torch.cat([self.current, tokens], dim=1)
        self.new_tokens[self.rows] += kept
        if streamer is not None:
            streamer.put(tokens.cpu())
        going_on = (~stopped).nonzero()[:, 0]
        self.rows, self.current = self.rows[going_on], self.current[going_on]
        return going_on

    def _first_stop(self, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(R,) tokens up to and including each row's first stop, and (R,) bool whether there is one."""
        start, count = self.current.shape[1], tokens.shape[1]
        stops = torch.zeros_like(tokens, dtype=torch.bool)
        for criterion in self.stopping_criteria:
            if isinstance(criterion, EosTokenCriteria):
                stops |= torch.isin(tokens, criterion.eos_token_id.to(tokens.device))
            elif isinstance(criterion, MaxLengthCriteria):
                stops[:, max(criterion.max_length - start - 1, 0) :] = True
            else:  # asked about every length: it may look at the whole sequence
                sequences = torch.cat([self.current, tokens], dim=1)
                each = [criterion(sequences[:, : start + length], None) for length in range(1, count + 1)]
                stops |= torch.stack(each, dim=1).to(stops.device)
        stopped = stops.any(1)
        return torch.where(stopped, stops.int().argmax(1) + 1, count), stopped

    def output(self, per_context_forward: bool) -> TwoTowerGenerateOutput:
        forwards = self.context_forwards if per_context_forward else self.denoiser_forwards
        return TwoTowerGenerateOutput(
            sequences=torch.cat(self.chunks, dim=1),
            denoiser_forwards=self.denoiser_forwards,
            context_forwards=self.context_forwards,
            tokens_per_forward=self.new_tokens / forwards,
        )


@dataclass
class Decoding:
    """What the decoding methods share during one call."""

    text: GeneratedText
    cache: TwoTowerCache
    prompt: PackedTokens
    config: GenerationConfig
    logits_processor: LogitsProcessorList
    streamer: BaseStreamer | None

    def append(self, tokens: torch.Tensor) -> torch.Tensor | None:
        """Add (R, n) tokens to the text; finished rows leave the cache. Indices of the rows that go on, or None."""
        going_on = self.text.append(tokens, self.streamer)
        if len(going_on) == 0:
            return None
        if len(going_on) < len(tokens):
            self.cache.select_rows(going_on)
        return going_on


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
            kwargs: `mode`, `block_size`, `steps_per_block`, `confidence_threshold`, `max_new_tokens`, `do_sample`,
                `temperature`, `top_k`, `top_p`, `streamer` (with `put_draft` it gets the block after every pass), ...

        Returns:
            (B, P + N) sequences, or [`TwoTowerGenerateOutput`] with `return_dict_in_generate=True`.
        """
        input_ids = kwargs.pop("input_ids", None) if inputs is None else inputs
        if input_ids is None:
            return super().generate(None, generation_config, **kwargs)
        input_ids, attention_mask = self._check_prompt(
            input_ids, kwargs.pop("attention_mask", None), generation_config
        )
        if attention_mask is None:
            return super().generate(input_ids, generation_config, **kwargs)
        # Left padding inside, where every row's newest token is in the last column; the prompts go back as they came.
        left_ids, left_mask = _pad_left(input_ids, attention_mask)
        output = super().generate(left_ids, generation_config, attention_mask=left_mask, **kwargs)
        sequences = output if isinstance(output, torch.Tensor) else output.sequences
        sequences[:, : input_ids.shape[1]] = input_ids.repeat_interleave(len(sequences) // len(input_ids), dim=0)
        return output

    def _check_prompt(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None, generation_config: GenerationConfig | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The prompt, an empty one begun with the beginning-of-text id, and its mask of padding (None without any)."""
        mask = check_attention_mask(input_ids, attention_mask)
        if input_ids.shape[1] == 0:
            given = None if generation_config is None else generation_config.bos_token_id
            bos = self.generation_config.bos_token_id if given is None else given
            if bos is None:
                raise ValueError(
                    "the prompt is empty and there is no bos_token_id to begin with; set one or give a token"
                )
            return input_ids.new_full((len(input_ids), 1), bos), None
        low, high = int(input_ids.min()), int(input_ids.max())
        if low < 0 or high >= self.config.vocab_size:
            wrong = low if low < 0 else high
            raise ValueError(f"input_ids holds {wrong}, outside the vocabulary of {self.config.vocab_size} tokens")
        return input_ids, mask

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
        config, model_kwargs = super()._prepare_generation_config(generation_config, **kwargs)
        for name, default in {**STRATEGY_DEFAULTS, "block_size": self.config.block_size}.items():
            if getattr(config, name, None) is None:
                setattr(config, name, default)
        check_strategy(config)
        check_supported(config)
        if config.block_size > self.config.block_size and config.mode == "mask_diffusion":
            logger.warning(
                f"block_size {config.block_size} is larger than the {self.config.block_size} the denoiser was trained "
                "on; the 30B model's HumanEval fell from 76 to 20 when its blocks went from 16 to 64"
            )
        return config, model_kwargs

    def _prepare_cache_for_generation(
        self, generation_config: GenerationConfig, model_kwargs: dict[str, Any], *args: Any
    ) -> None:
        if model_kwargs.get("past_key_values") is not None:
            raise ValueError(
                "past_key_values is not supported by TwoTower's generate yet; give the whole text as prompt"
            )
        model_kwargs["past_key_values"] = TwoTowerCache(self.config)

    def _sample(
        self,
        input_ids: torch.Tensor,
        logits_processor: LogitsProcessorList,
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
        device = self.context_tower.embeddings.weight.device
        if device.type != "meta":  # else it is offloaded, and accelerate moves inputs to where it runs
            input_ids = input_ids.to(device)
        pad = generation_config._pad_token_tensor
        run = Decoding(
            text=GeneratedText(input_ids, 0 if pad is None else int(pad), stopping_criteria),
            cache=model_kwargs["past_key_values"],
            prompt=pack_tokens(input_ids, model_kwargs.get("attention_mask")),
            config=generation_config,
            logits_processor=logits_processor,
            streamer=streamer,
        )
        decode = {"mask_diffusion": self._mask_diffusion, "mock_ar": self._mock_ar, "ar": self._ar}
        decode[generation_config.mode](run)
        if streamer is not None:
            streamer.end()
        output = run.text.output(per_context_forward=generation_config.mode == "ar")
        return output if generation_config.return_dict_in_generate else output.sequences

    def _mask_diffusion(self, run: Decoding) -> None:
        """Read the prompt; then, block after block: (1) denoise it, (2) append it, (3) read it, unless done."""
        self._read(run, run.prompt)
        while True:
            block = self._denoise_block(run)
            going_on = run.append(block)
            if going_on is None:
                return
            self._read(run, PackedTokens(block[going_on]))

    def _denoise_block(self, run: Decoding) -> torch.Tensor:
        """One block, (R, S): predict every position (never the mask), commit the sure ones, until none is masked."""
        mask_id, steps = self.config.mask_token_id, run.config.steps_per_block
        block = run.text.current.new_full((len(run.text.rows), run.config.block_size), mask_id)
        for step in range(steps):
            masked = block == mask_id
            if step > 0 and not masked.any():
                break
            run.text.denoiser_forwards[run.text.rows] += masked.any(-1).long()
            logits = self.denoise(block, run.cache).to(block.device)
            logits[..., mask_id] = -torch.inf
            tokens, confidence = self._predict(logits, run)
            commit = commit_confident(confidence, masked, steps - step, run.config.confidence_threshold)
            block = torch.where(commit, tokens, block)
            if run.streamer is not None and hasattr(run.streamer, "put_draft"):
                run.streamer.put_draft(block.cpu())
        return block

    def _mock_ar(self, run: Decoding) -> None:
        """One token per denoiser pass; the context tower stays one token behind and reads it afterwards."""
        prompt, token = _split_last(run.prompt)
        if prompt.ids.shape[1] > 0:
            self._read(run, prompt)
        while True:
            run.text.denoiser_forwards[run.text.rows] += 1
            logits = self.predict_next(token, run.cache).to(token.device)
            next_token, _ = self._predict(logits[:, None], run)
            going_on = run.append(next_token)
            if going_on is None:
                return
            self._read(run, PackedTokens(token[going_on]))
            token = next_token[going_on]

    def _ar(self, run: Decoding) -> None:
        """The context tower alone, one token per pass."""
        chunk = run.prompt
        while True:
            logits = self.context_lm_head(self._read(run, chunk)).float().to(chunk.ids.device)
            token, _ = self._predict(logits[:, None], run)
            going_on = run.append(token)
            if going_on is None:
                return
            chunk = PackedTokens(token[going_on])

    def _read(self, run: Decoding, chunk: PackedTokens) -> torch.Tensor:
        """Let the context tower read a chunk into the cache; (R, H) hidden states of each row's last token."""
        run.text.context_forwards[run.text.rows] += 1 if chunk.counts is None else chunk.counts.sign()
        hidden_states = self.context_tower(chunk.ids, run.cache, chunk.counts)
        if chunk.counts is None:
            return hidden_states[:, -1]
        last = (chunk.counts - 1).clamp(min=0)
        return hidden_states[torch.arange(len(last), device=last.device), last]

    def _predict(self, logits: torch.Tensor, run: Decoding) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Choose a token per position.

        Logits processors see the tokens before the block. A token's confidence is its probability before them, in
        particular untempered.

        Args:
            logits: (R, S, V) float32.

        Returns:
            (R, S) tokens and their confidence.
        """
        scores = logits
        if run.logits_processor:
            sequences = run.text.current.repeat_interleave(logits.shape[1], dim=0)
            scores = run.logits_processor(sequences, logits.flatten(0, 1).clone()).view_as(logits)
        if run.config.do_sample:
            tokens = torch.multinomial(scores.softmax(-1).flatten(0, 1), 1).view(logits.shape[:2])
        else:
            tokens = scores.argmax(-1)
        confidence = (logits.gather(-1, tokens[..., None]) - logits.logsumexp(-1, keepdim=True)).exp()
        return tokens, confidence[..., 0]


def _pad_left(input_ids: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Move each row's padding to its front."""
    width = mask.shape[1]
    after_last = width - mask.int().flip(1).argmax(1)
    columns = (torch.arange(width, device=mask.device) + after_last[:, None]) % width
    return input_ids.gather(1, columns), mask.gather(1, columns).long()


def _split_last(prompt: PackedTokens) -> tuple[PackedTokens, torch.Tensor]:
    """A prompt without each row's last token, and that token (B, 1)."""
    if prompt.counts is None:
        return PackedTokens(prompt.ids[:, :-1]), prompt.ids[:, -1:]
    return PackedTokens(prompt.ids, prompt.counts - 1), prompt.ids.gather(1, prompt.counts[:, None] - 1)


__all__ = ["TwoTowerGenerateOutput", "TwoTowerGenerationConfig", "TwoTowerGenerationMixin"]

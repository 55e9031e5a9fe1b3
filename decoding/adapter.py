"""What transformers' `generate` calls on its way: prompts, configuration, limits, logits processors and cache.

It prepares all of these for one token at a time; here they are prepared for rows that each have their own length, seed
and end, which then make up a request to the engine.

Shapes: B batch, P prompt columns, S block, V vocabulary.
"""

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from contextlib import contextmanager, nullcontext
from itertools import compress
from typing import Any

import torch
from torch import distributed
from transformers import GenerationConfig, GenerationMixin, LogitsProcessorList, StoppingCriteriaList

from ..cache_twotower import TwoTowerCache, check_cache
from ..checkpoints.placement import prompts_device
from ..compat_twotower import (
    BaseStreamer,
    EosTokenCriteria,
    GenerationOutput,
    RequestStatus,
    accepts_past_key_values,
    logger,
    tqdm,
)
from ..inputs_twotower import as_ids, check_attention_mask, check_ids
from .asking import PerRow, asked_as, made_for, name_of, serves_all_rows
from .compiled import check_can_compile
from .config import (
    REFUSED_ARGUMENTS,
    STRATEGY_DEFAULTS,
    TwoTowerGenerationConfig,
    plain,
    resolve,
    unknown_flags,
    without_effect,
)
from .engine import Engine
from .rules import UnmaskingRule
from .sampling import RowLogitsProcessors, derived_seeds
from .serving import TwoTowerEngine
from .state import WIDE_RECORDS, Request, Row, TwoTowerGenerateOutput
from .stopping import Stopping
from .synchronisation import DONE, SynchronisedPasses

# Arguments of `generate` that are not of the generation config, and that transformers passes to the decoding method.
CALL_ARGUMENTS = ("step_callback", "starting_block")
ACCEPTED = (*CALL_ARGUMENTS, "attention_mask", "cache", "use_cache", "engine")


class TwoTowerGenerationAdapter(SynchronisedPasses, GenerationMixin):
    """`generate`, as a caller of the engine. Whoever mixes it in gives the fields below."""

    strategies: dict[str, Any]
    prepared: Callable[[], Any]
    has_denoiser: bool
    check_dtypes: Callable[[], None]

    @accepts_past_key_values
    @torch.no_grad()
    def generate(
        self,
        inputs: torch.Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        logits_processor: LogitsProcessorList | None = None,
        stopping_criteria: StoppingCriteriaList | None = None,
        prefix_allowed_tokens_fn: Callable[[int, torch.Tensor], list[int]] | None = None,
        **kwargs: Any,
    ) -> TwoTowerGenerateOutput | torch.Tensor:
        """
        Generate text; every argument of [`~transformers.GenerationMixin.generate`] and the strategy's knobs.

        Args:
            inputs: (B, P) prompt ids, also as `input_ids`; padding on either side with its `attention_mask`. Without
                one, the padding id is taken for padding, unless it is an end-of-text id.
            generation_config: a [`TwoTowerGenerationConfig`] or a plain one.
            logits_processor, stopping_criteria: transformers' own, and what is [`Stateless`], are called for one row
                at a time, with its tokens (1, n) before a position, or so far, without padding. Others may keep state
                and are called as transformers does, once for every new token, with all rows (B, T) padded on the
                left. Where rows take different numbers of tokens per pass (modes `mask_diffusion` and
                `self_speculative`), a batch cannot give a processor such calls: there a function, or an object without
                attributes, is asked about one row at a time, too; of others give [`PerRow`], one for each row, which
                works in every mode. In `self_speculative` each is asked what `ar` would ask it about a row alone, and
                never about drafts.
            prefix_allowed_tokens_fn: called with the number of the row and its tokens (n,).
            cache: also as `past_key_values`; [`TwoTowerCache`] of an earlier call, extended in place; `inputs` is the
                whole text, of which the cache holds the beginning. The attention mask may then have holes. After an
                exception, from wherever, the cache is what it was before the call.
            starting_block: (B, at most block_size) ids for `mask_diffusion`: the first block, with tokens to keep,
                and the mask id or nothing where one is wanted; of each prompt the same for all its sequences.
            engine: for [`TwoTowerEngine`], which is given the request this call makes up, to run it itself.
            step_callback: for `mask_diffusion` and `self_speculative`: called with a [`BlockStep`] after every
                denoiser pass.
            kwargs: the knobs of [`TwoTowerGenerationConfig`], `max_new_tokens`, `streamer` (with `put_draft` it gets
                the block after every pass), `tokenizer` (for `stop_strings`), ...

        Returns:
            (B, P + N) sequences, or [`TwoTowerGenerateOutput`] with `return_dict_in_generate=True`.
        """
        for name in REFUSED_ARGUMENTS:
            if kwargs.get(name) is not None:
                raise ValueError(f"{name} is not supported by TwoTower's generate; leave it out")
        if getattr(self.prepare_inputs_for_generation, "__self__", self) is not self:  # so peft puts them in
            raise ValueError(
                "prepare_inputs_for_generation is another object's, as peft's prompt, prefix and p-tuning put their "
                "virtual tokens in, of which TwoTower's generate knows nothing; train an adapter of weights, e.g. LoRA"
            )
        _check_adapters(self)
        if kwargs.get("cache_implementation") is not None:  # transformers would not come to ask our config
            raise ValueError(
                f"cache_implementation={kwargs['cache_implementation']!r} is not supported by TwoTower's generate; "
                "leave it unset; compile=True runs compiled passes"
            )
        if kwargs.get("starting_block") is not None:
            kwargs["starting_block"] = as_ids("starting_block", kwargs["starting_block"])
        input_ids = kwargs.pop("input_ids", None) if inputs is None else inputs
        _check_kinds(generation_config, logits_processor, stopping_criteria, prefix_allowed_tokens_fn, kwargs)
        kwargs |= {
            "generation_config": generation_config,
            "logits_processor": logits_processor,
            "stopping_criteria": stopping_criteria,
            "prefix_allowed_tokens_fn": prefix_allowed_tokens_fn,
        }
        if input_ids is None:
            self._check_prompt(torch.empty(1, 0, dtype=torch.long), None, kwargs, False)  # of which it makes as much
            return super().generate(None, **kwargs)
        continued = kwargs.get("cache") is not None
        input_ids, padding_mask = self._check_prompt(input_ids, kwargs.pop("attention_mask", None), kwargs, continued)
        # At once, as transformers makes processors with tensors beside the prompt.
        device = self.context_tower.embeddings.weight.device
        input_ids = input_ids.to(prompts_device(self) if device.type == "meta" else device)
        padding_mask = None if padding_mask is None else padding_mask.to(input_ids.device)
        if padding_mask is None:
            return super().generate(input_ids, attention_mask=torch.ones_like(input_ids), **kwargs)
        # Left padding inside, where every row's newest token is in the last column; the prompts go back as they came.
        left_ids, left_mask = _pad_left(input_ids, padding_mask)
        output = super().generate(left_ids, attention_mask=left_mask, **kwargs)
        if kwargs.get("engine") is not None:
            return output
        sequences = output if isinstance(output, torch.Tensor) else output.sequences
        prompts = input_ids.to(sequences.device).repeat_interleave(len(sequences) // len(input_ids), dim=0)
        sequences = torch.cat([prompts, sequences[:, left_ids.shape[1] :]], dim=1)
        if isinstance(output, torch.Tensor):
            return sequences
        output.sequences = sequences
        return output

    def _check_prompt(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None, given: dict[str, Any], continued: bool
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The prompt, an empty one begun with the beginning-of-text id, and its mask of padding (None without any)."""

        configs = (given["generation_config"] or self.generation_config, self.generation_config)
        places = [plain(flags) for flags in (given, *map(vars, configs))]
        bos, pad, ends = (
            next((place[name] for place in places if place.get(name) is not None), None)
            for name in ("bos_token_id", "pad_token_id", "eos_token_id")
        )
        check_ids("input_ids", input_ids)
        mask = check_attention_mask(input_ids, attention_mask, holes=continued)
        if input_ids.shape[1] == 0:
            if bos is None:
                raise ValueError(
                    "the prompt is empty and there is no bos_token_id to begin with; set one or give a token"
                )
            begun = torch.full((len(input_ids), 1), bos, device=input_ids.device)
            self._check_vocabulary("bos_token_id", begun)
            return begun, None
        self._check_vocabulary("input_ids", input_ids)
        if attention_mask is not None or pad is None:
            return input_ids, mask
        if ends is not None and int(pad) in torch.as_tensor(ends).flatten().tolist():
            return input_ids, None
        return input_ids, _inferred_mask(input_ids, int(pad), continued)

    def _check_vocabulary(self, name: str, ids: torch.Tensor) -> None:
        if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
            raise ValueError(f"{name} are {ids.dtype}; give token ids")
        low, high = int(ids.min()), int(ids.max())
        if low < 0 or high >= self.config.vocab_size:
            wrong = low if low < 0 else high
            raise ValueError(f"{name} holds {wrong}, outside the vocabulary of {self.config.vocab_size} tokens")

    def generate_many(
        self, prompts: Iterable[Any], slots: int = 16, progress: bool = True, **knobs: Any
    ) -> Iterator[tuple[int, Any]]:
        """
        Generate for any number of prompts, `slots` at a time; a prompt begins as soon as another has ended.

        Args:
            prompts: of each its token ids, a list, (n,) or (1, n), without padding; or a dict of its own arguments of
                `generate`, `input_ids` among them. Taken as they are needed.
            slots: most sequences decoded at a time.
            progress: show a progress bar.
            knobs: arguments of [`generate`] for all prompts.

        Returns:
            An iterator of (number of the prompt, what `generate` gives for it), in the order in which they finish.
        """
        total = len(prompts) if isinstance(prompts, Sized) else None
        results = TwoTowerEngine(self, slots).run_all(prompts, **knobs)
        return iter(tqdm(results, total=total, disable=not progress, unit="prompt"))

    def generate_batch(
        self,
        inputs: Sequence[Any],
        generation_config: GenerationConfig | None = None,
        progress_bar: bool = False,
        slots: int = 16,
        **knobs: Any,
    ) -> dict[str, GenerationOutput]:
        """
        As transformers' own for its continuous batching, by [`TwoTowerEngine`].

        Args:
            inputs: of each prompt its token ids.
            generation_config, knobs: of all, as [`generate`]'s.
            progress_bar: show one.
            slots: most sequences decoded at a time.

        Returns:
            By request, "req_0" being that of the first input: its prompt and generated tokens.
        """
        _check_kinds(generation_config, None, None, None, {})
        asked = (knobs, vars(generation_config or GenerationConfig()), vars(self.generation_config))
        copies = next((flags["num_return_sequences"] for flags in asked if flags.get("num_return_sequences")), 1)
        if copies != 1:
            raise ValueError(f"num_return_sequences is {copies}; generate_batch gives one text per prompt")
        if knobs.get("return_dict_in_generate"):
            raise ValueError(
                "return_dict_in_generate is true, but generate_batch gives results of its own; leave it out, or take "
                "generate_many, which gives generate's"
            )
        prompts = [as_ids("inputs", one) for one in inputs]
        if generation_config is None:
            knobs["return_dict_in_generate"] = False
        else:  # beside which transformers warns of arguments
            generation_config = copy.copy(generation_config)
            generation_config.return_dict_in_generate = False
        results = dict(self.generate_many(prompts, slots, progress_bar, generation_config=generation_config, **knobs))
        return {
            f"req_{number}": GenerationOutput(
                request_id=f"req_{number}",
                prompt_ids=prompt.flatten().tolist(),
                generated_tokens=results[number][0, max(prompt.numel(), 1) :].tolist(),  # an empty one begins with bos
                status=RequestStatus.FINISHED,
            )
            for number, prompt in enumerate(prompts)
        }

    def init_continuous_batching(
        self,
        generation_config: GenerationConfig | None = None,
        slots: int = 16,
        max_queue: int | None = None,
        continuous_batching_config: Any = None,
    ) -> TwoTowerEngine:
        """A [`TwoTowerEngine`], whose requests go by `generation_config` unless they bring one."""
        if continuous_batching_config is not None:
            raise ValueError(
                f"continuous_batching_config={continuous_batching_config!r} is about pages, of which a TwoTower's "
                "cache has none; leave it out, and give slots and max_queue"
            )
        _check_kinds(generation_config, None, None, None, {})
        if generation_config is not None and generation_config.use_cache is False:
            # So `transformers serve` says that its batches have caches of their own.
            generation_config = copy.copy(generation_config)
            generation_config.use_cache = True
        return TwoTowerEngine(self, slots, max_queue, generation_config)

    @contextmanager
    def continuous_batching_context_manager(self, **arguments: Any) -> Iterator[TwoTowerEngine]:
        """A running engine; arguments as for [`init_continuous_batching`]."""
        with self.init_continuous_batching(**arguments) as engine:
            yield engine

    # What transformers' `generate` calls on its way.

    def adjust_generation_fn(self, *args: Any, **kwargs: Any) -> None:
        super().adjust_generation_fn(*args, **kwargs)
        loaded = self.generation_config
        self.generation_config: GenerationConfig = TwoTowerGenerationConfig.from_dict(loaded.to_dict())
        if getattr(loaded, "_original_object_hash", None) == hash(loaded):  # so transformers lets it be saved back
            self.generation_config._original_object_hash = hash(self.generation_config)

    def _prepare_generation_config(
        self, generation_config: GenerationConfig | None, **kwargs: Any
    ) -> tuple[GenerationConfig, dict[str, Any]]:
        for name in STRATEGY_DEFAULTS:
            if not hasattr(self.generation_config, name):
                setattr(self.generation_config, name, None)
        kwargs = plain(kwargs)
        limits = [kwargs, {} if generation_config is None else plain(vars(generation_config))]
        config, model_kwargs = super()._prepare_generation_config(generation_config, **kwargs)
        if all(limit.get("max_new_tokens") is None for limit in limits) and any(
            limit.get("max_length") is not None for limit in limits
        ):
            config.max_new_tokens = None  # the checkpoint's, which would go before the caller's max_length
        resolve(config, self.strategies, self.config.block_size)
        strategy = self.strategies[config.mode]
        if ignored := without_effect(kwargs, config, strategy):
            way = f"mode {config.mode!r} with unmasking_rule {config.unmasking_rule!r}"
            logger.warning_once(f"no effect in {way}: {', '.join(ignored)}")
        if unknown := unknown_flags(config):
            logger.warning_once(f"no effect, as generate knows no such flags: {', '.join(unknown)}")
        if strategy.needs_denoiser and not self.has_denoiser:
            raise ValueError(
                f"mode is {config.mode!r}, which needs the denoiser, and this model was loaded without "
                '(towers="context"); use mode="ar", or load it with towers="both", the default'
            )
        if strategy.needs_denoiser:
            self.check_dtypes()
        for name in CALL_ARGUMENTS:
            if model_kwargs.get(name) is not None and name not in strategy.arguments:
                modes = [mode for mode, each in self.strategies.items() if name in each.arguments]
                raise ValueError(f"{name} is for mode {' or '.join(modes)}, not {config.mode}; leave it out")
        callback = model_kwargs.get("step_callback")
        if callback is not None and not callable(callback):
            raise ValueError(f"step_callback is {callback!r}, which cannot be called")
        return config, model_kwargs

    def _validate_model_kwargs(self, model_kwargs: dict[str, Any]) -> None:
        """Stricter than transformers', which lets pass what only `forward` would use."""
        for name, value in model_kwargs.items():
            if value is not None and name not in ACCEPTED:
                remedy = "for reproducible draws give seed" if name == "generator" else "leave it out"
                raise ValueError(f"{name} is no argument of TwoTower's generate; {remedy}")

    def _prepare_cache_for_generation(
        self, generation_config: GenerationConfig, model_kwargs: dict[str, Any], *args: Any
    ) -> None:
        cache = model_kwargs.get("cache")
        model_kwargs["keep_cache"] = generation_config.return_dict_in_generate or cache is not None
        if cache is None:
            cache = TwoTowerCache(self.config)
        else:
            check_cache(cache, self)
        model_kwargs["cache"] = cache

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
        way = self.strategies[generation_config.mode].asks_plain_as
        given: list[Any] = [asked_as(way, one) for one in logits_processor or []]
        made: list[Any] = []

        def build(row: int) -> LogitsProcessorList:
            prompt = prompts[row] if mask is None else prompts[row][mask[row].bool()]
            config = copy.copy(generation_config)
            config.num_return_sequences = 1
            # `max_length` counts a row's own tokens, not its padding.
            new_tokens = generation_config.max_new_tokens
            config.max_length = generation_config.max_length if new_tokens is None else len(prompt) + new_tokens
            if generation_config.min_new_tokens is not None:
                config.min_length = None  # transformers derives it from the padded width
            allowed = prefix_allowed_tokens_fn
            return super(TwoTowerGenerationAdapter, self)._get_logits_processor(
                config,
                input_ids_seq_length=len(prompt),
                encoder_input_ids=prompt[None],
                prefix_allowed_tokens_fn=None if allowed is None else lambda _, text: allowed(row, text),
                logits_processor=LogitsProcessorList(made_for(row, len(prompt), given, made) if given else []),
                device=device,
            )

        return RowLogitsProcessors(build, len(prompts), given)

    def _sample(
        self,
        input_ids: torch.Tensor,
        logits_processor: RowLogitsProcessors,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        synced_gpus: bool = False,
        streamer: BaseStreamer | None = None,
        engine: Any = None,
        **model_kwargs: Any,
    ) -> Any:
        """The decoding method transformers' `generate` calls: its rows run through an engine of their own."""
        synced = self._is_synced(synced_gpus)
        request, cache = self._request(
            input_ids, logits_processor, stopping_criteria, generation_config, streamer, model_kwargs
        )
        if engine is not None:
            return request
        alone = streamer is None and not request.runs_users_code
        loop = Engine(self, cache, request.device, synced, len(request.rows), alone)
        if cache.undoing is not None:
            raise ValueError(
                "past_key_values is in use by a call that has not ended, in another thread or around this one; give "
                "each call a cache of its own, as by copy.deepcopy"
            )
        # A cache of this call alone is of no use after an error, and what rows leave behind need not be copied for it.
        undone = cache.undone_on_error() if request.keep_cache else nullcontext()
        with nullcontext() if synced else self.prepared(), undone:
            try:
                loop.admit(request)
                while loop.rows:
                    loop.step()
            finally:
                loop.close()
                if synced:
                    self._join_until(DONE)
            cache.expect(0)  # a later turn has a text of its own
            order = [row.number for row in reversed(loop.parked)]  # the last to leave is the first
            if order != sorted(order):
                cache.select_rows(torch.tensor(order, device=request.device).argsort())
            if streamer is not None:
                streamer.end()
            prompts = input_ids.to(request.device)
            if not generation_config.return_dict_in_generate:
                return request.sequences(prompts)
            return request.output(prompts, cache)

    def _is_synced(self, synced_gpus: bool) -> bool:
        """Whether ranks must keep in step: if asked for, or with FSDP2, of which transformers does not know."""
        if not distributed.is_available() or not distributed.is_initialized() or distributed.get_world_size() == 1:
            return False
        from torch.distributed.fsdp import FSDPModule, register_fsdp_forward_method

        if "_run_part" not in vars(self):
            register_fsdp_forward_method(self, "_run_part")  # of another than an FSDP2 module, nothing happens
        return synced_gpus or any(isinstance(module, FSDPModule) for module in self.modules())

    def _request(
        self,
        input_ids: torch.Tensor,
        processors: RowLogitsProcessors,
        stopping_criteria: StoppingCriteriaList,
        config: GenerationConfig,
        streamer: BaseStreamer | None,
        model_kwargs: dict[str, Any],
    ) -> tuple[Request, TwoTowerCache]:
        """What is asked for, and the cache its rows begin with."""
        texts, mask = input_ids.tolist(), model_kwargs.get("attention_mask")
        if mask is not None:
            texts = [list(compress(*row)) for row in zip(texts, mask.tolist(), strict=True)]
        stopping = Stopping(stopping_criteria, list(map(len, texts)))
        with_dict = config.return_dict_in_generate
        recorded = ["commit_steps", "confidences", "log_probs"] if with_dict else []
        recorded += [name for name in ("scores", "logits") if with_dict and getattr(config, f"output_{name}")]
        strategy = self.strategies[config.mode]
        if processors.keeps_state is not None:
            _check_askable(processors, config, strategy, len(input_ids), model_kwargs)
        relaxed = "acceptance_ratio" in strategy.knobs and config.acceptance_ratio < 1
        if relaxed and stopping.shared and model_kwargs["keep_cache"] and len(input_ids) > 1:
            name = name_of(stopping.shared[0])
            raise ValueError(
                f"acceptance_ratio is {config.acceptance_ratio}, and the stopping criterion {name} is one for "
                f"{len(input_ids)} rows, of which a cache that is kept (return_dict_in_generate, past_key_values) "
                "lets none be ahead, so that they would be drafted otherwise than alone; give PerRow(lambda row: ...),"
                f" or Stateless({name}) if it is a function of its arguments alone, or leave one of the three out"
            )
        if config.compile:
            check_can_compile(self, config.compile_config)
        cache = model_kwargs["cache"]
        if cache.host_lengths is not None and cache.batch_size != len(input_ids):
            cache = _repeated_for(cache, len(input_ids), config.num_return_sequences)
        read, seeds = [0] * len(texts), [0] * len(texts)
        if cache.host_lengths is not None:
            read = _tokens_read(texts, cache, strategy.least_unread, config.num_return_sequences)
        rule = UnmaskingRule(config)
        if config.do_sample or rule.rule.draws:
            seeds = _seeds(config, len(texts))
        step_callback = model_kwargs.get("step_callback")
        eos = [c.eos_token_id.tolist() for c in stopping_criteria if type(c) is EosTokenCriteria]
        request = Request(
            config=config,
            strategy=strategy,
            processors=processors,
            rule=rule,
            stopping=stopping,
            prompts=input_ids,
            eos=frozenset(token for one in eos for token in one),
            pad_token_id=0 if config._pad_token_tensor is None else int(config._pad_token_tensor),
            mask_token_id=self.config.mask_token_id,
            vocab_size=self.config.vocab_size,
            recorded=tuple(recorded),
            keep_cache=model_kwargs["keep_cache"],
            device=input_ids.device,
            steps=1 if strategy.steps_knob is None else getattr(config, strategy.steps_knob),
            in_step=step_callback is not None or bool(stopping.shared) or processors.shared_by_rows is not None,
            runs_users_code=(
                step_callback is not None or stopping.any or processors.sees_text or callable(config.unmasking_rule)
            ),
            step_callback=step_callback,
            streamer=streamer,
        )
        wants_logits = step_callback is not None or callable(config.unmasking_rule)
        wants_logits |= any(name in WIDE_RECORDS for name in recorded)
        request.works_anywhere = processors.fit_any_device and not wants_logits
        request.key = id(request)
        # What is shown padded rows, as by transformers, may count on its `max_length`, which counts their padding.
        padded = config.max_new_tokens is None and any(map(serves_all_rows, [*processors.given, *stopping_criteria]))
        starting = model_kwargs.get("starting_block")
        if starting is not None:
            self._check_starting_block(starting, config, len(input_ids))
        for number, (text, seed) in enumerate(zip(texts, seeds, strict=True)):
            prompt_length = input_ids.shape[1] if padded else len(text)
            most = config.max_length - prompt_length if config.max_new_tokens is None else config.max_new_tokens
            row = Row(request, number, text, text[read[number] :], most, seed)
            row.starting_block = None if starting is None else starting[number].tolist()
            request.rows.append(row)
        return request, cache

    def _check_starting_block(self, block: torch.Tensor, config: GenerationConfig, rows: int) -> None:
        if block.ndim != 2 or len(block) != rows or not 1 <= block.shape[1] <= config.block_size:
            copies = config.num_return_sequences  # which transformers has made by now
            shape = (len(block) // copies, *block.shape[1:])
            raise ValueError(
                f"starting_block has shape {shape}; expected a row for each of the {rows // copies} sequences of "
                f"input_ids, of at most block_size {config.block_size} tokens"
            )
        self._check_vocabulary("starting_block", block)


def _check_adapters(model: Any) -> None:
    """Refuse an adapter per row: peft gives layers those of the prompt's rows, by hooks, and passes have others."""
    refused: set[str] = set()
    for module in model.modules():
        for number, hook in list(module._forward_pre_hooks.items()):
            if names := getattr(hook, "keywords", {}).keys() & {"adapter_names", "alora_offsets"}:
                refused |= names
                # After an error peft leaves them where they are.
                del module._forward_pre_hooks[number]
                module._forward_pre_hooks_with_kwargs.pop(number, None)
    if refused:
        raise ValueError(
            f"{refused.pop()} is not supported by TwoTower's generate, whose passes have other rows than the prompt; "
            "give the rows of each adapter to a call of their own, after set_adapter"
        )


def _check_kinds(config: Any, processors: Any, criteria: Any, allowed: Any, given: dict[str, Any]) -> None:
    """Refuse arguments of another kind than `generate` takes, which would fail somewhere within."""
    if config is not None and not isinstance(config, GenerationConfig):
        raise ValueError(
            f"generation_config is {config!r}; give a GenerationConfig, or its flags as arguments of their own"
        )
    for name, asked in (("logits_processor", processors), ("stopping_criteria", criteria)):
        if asked is not None and not isinstance(asked, list | tuple):
            raise ValueError(f"{name} is {asked!r}; give a list")
        for one in asked or ():
            if not callable(one) and not isinstance(one, PerRow):
                raise ValueError(f"{name} holds {one!r}, which cannot be called")
    if allowed is not None and not callable(allowed):
        raise ValueError(f"prefix_allowed_tokens_fn is {allowed!r}, which cannot be called")
    streamer = given.get("streamer")
    if streamer is not None and not (hasattr(streamer, "put") and hasattr(streamer, "end")):
        raise ValueError(f"streamer is {streamer!r}; give an object with the methods put and end")


def _check_askable(
    processors: RowLogitsProcessors, config: GenerationConfig, strategy: Any, rows: int, model_kwargs: dict[str, Any]
) -> None:
    """Refuse what cannot give a processor that may keep state its calls: each kept token once, in order."""
    mode, name = config.mode, processors.shared_by_rows
    if name is not None and rows > 1 and strategy.steps_knob is not None:
        raise ValueError(
            f"the logits processor {name} is one for {rows} rows, and in mode {mode!r} rows do not take one token "
            f"each at a time; give PerRow(lambda row: ...), which makes one for each row, or Stateless({name}) if it "
            'is a function of its arguments alone, or use mode "ar"'
        )
    name = processors.keeps_state
    for argument in CALL_ARGUMENTS:
        if name is not None and strategy.denoiser_chooses and model_kwargs.get(argument) is not None:
            raise ValueError(
                f"{argument} decides about tokens that the logits processor {name} would not see, or would see "
                f"replaced; leave it out, or give Stateless({name}) if it is a function of its arguments alone"
            )


def _seeds(config: GenerationConfig, rows: int) -> list[int]:
    """A seed for each row."""
    copies = config.num_return_sequences
    if config.seed is None:
        return torch.randint(-(2**62), 2**62, (rows,)).tolist()
    numbers = [config.seed] * (rows // copies) if isinstance(config.seed, int) else config.seed
    if len(numbers) not in (rows, rows // copies):
        raise ValueError(
            f"seed holds {len(numbers)} numbers for {rows // copies} prompts; give one for each, or one int"
        )
    # Unsigned 64-bit numbers are as good as signed ones.
    signed = torch.tensor([number - 2**64 if number >= 2**63 else number for number in numbers])
    return (
        signed if len(numbers) == rows and not isinstance(config.seed, int) else derived_seeds(signed, copies)
    ).tolist()


def _repeated_for(cache: TwoTowerCache, rows: int, copies: int) -> TwoTowerCache:
    if cache.batch_size * copies != rows:
        raise ValueError(f"past_key_values holds {cache.batch_size} rows, input_ids {rows // copies}")
    assert cache.lengths is not None
    return cache.copy_rows(torch.arange(cache.batch_size, device=cache.lengths.device).repeat_interleave(copies))


def _tokens_read(texts: list[list[int]], cache: TwoTowerCache, least: int, copies: int) -> list[int]:
    """How many tokens of each row the cache holds, all but `least` at most; of `copies` rows of each of input_ids."""
    assert cache.host_lengths is not None
    # Mamba states cannot go back to where a text parts from the one they are of, so such a text is refused.
    ids = [[]] * len(texts) if cache.ids is None else cache.ids.tolist()
    for row, (text, read, count) in enumerate(zip(texts, ids, cache.host_lengths, strict=True)):
        for column, (given, held) in enumerate(zip(text, read[:count], strict=False)):
            if given != held >= 0:
                raise ValueError(
                    f"past_key_values has read token {held} at position {column} of row {row // copies}, where its "
                    f"text has {given}; give the text it has read and what follows, or a fresh cache, or leave "
                    "past_key_values out"
                )
    for row, (text, count) in enumerate(zip(texts, cache.host_lengths, strict=True)):
        if len(text) - count < least:
            raise ValueError(
                f"past_key_values holds {count} tokens of row {row // copies}, whose text has {len(text)}; give the "
                f"whole text as input_ids{', at least one token longer' if least else ''}"
            )
    return list(cache.host_lengths)


def _inferred_mask(input_ids: torch.Tensor, pad_token_id: int, continued: bool) -> torch.Tensor | None:
    """As transformers infers it, but the padding id is not dropped from within a text."""
    tokens = input_ids != pad_token_id
    if continued and not tokens.all():
        raise ValueError(
            f"input_ids hold the padding id {pad_token_id}, which the text that goes on may hold as a token, too; "
            "give attention_mask, 1 on tokens"
        )
    try:
        return check_attention_mask(input_ids, tokens.long())
    except ValueError as error:
        raise ValueError(
            f"input_ids hold the padding id {pad_token_id}; give attention_mask, 1 on tokens, since of the one "
            f"inferred from it {error}"
        ) from None


def _pad_left(input_ids: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Move each row's padding to its front, and leave out columns that are then nothing else."""
    columns = mask.int().argsort(dim=1, stable=True)[:, -int(mask.sum(1).max()) :]
    return input_ids.gather(1, columns), mask.gather(1, columns).long()


__all__ = ["TwoTowerGenerationAdapter"]

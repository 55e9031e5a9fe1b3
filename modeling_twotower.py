"""TwoTower: a frozen autoregressive context tower and a denoiser tower that fills one block of tokens at a time.

Both towers are NemotronH backbones (Mamba-2, attention and mixture-of-experts layers) built from transformers'
modules. The context tower reads the prompt and every finished block into one cache; the denoiser looks at that
cache layer by layer and turns a partly masked block into logits for all of its positions at once.

Shapes: B batch, T tokens of a chunk, S block, L context, H hidden size, V vocabulary, R = B x blocks denoised at once.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from operator import is_not
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules.module import _has_any_global_hook as has_any_global_hook

from .cache_twotower import (
    Counts,
    KeyValues,
    KeyValueSlot,
    MambaState,
    MambaUpdate,
    Past,
    Present,
    TwoTowerCache,
    check_cache,
    listed,
    uploaded,
)
from .checkpoints.loading import merge_expert_matrices, register_checkpoint_layout
from .checkpoints.placement import CONTEXT_PARTS, check_in_place, execution_device, stays_in_place
from .checkpoints.pretrained import TWOTOWER_PARTS, LoadedTowers, PretrainedInterface, TrainedTowers, check_towers
from .compat_twotower import (
    CacheOutput,
    ExpertsInterface,
    GradientCheckpointingLayer,
    NemotronHAttention,
    NemotronHExperts,
    NemotronHMamba2Mixer,
    NemotronHMLP,
    NemotronHMoE,
    NemotronHPreTrainedModel,
    NemotronHRMSNorm,
    NemotronHTopkRouter,
    accepts_past_key_values,
    can_return_tuple,
    force_accelerate_hooks,
    grouped_mm_experts_forward,
    logger,
    slice_logits_to_keep,
)
from .configuration_twotower import TwoTowerConfig
from .decoding.kept import prepared
from .decoding.released import ReleasedInterface
from .generation_twotower import TwoTowerGenerationConfig, TwoTowerGenerationMixin
from .inputs_twotower import (
    PackedTokens,
    check_arguments,
    check_attention_mask,
    check_ids,
    check_position_ids,
    pack_tokens,
)
from .kernels.backends import check_kernels, is_torch
from .kernels.block_attention import Masks, block_attention
from .kernels.causal_conv import causal_conv, inputs_before_blocks
from .kernels.gated_rms_norm import gated_rms_norm
from .kernels.precision import at_least_float32, may_give_out
from .kernels.rms_norm import rms_norm
from .kernels.routed_experts import routed_experts
from .kernels.ssd import ssd_scan
from .kernels.top_k_routing import top_k_routing
from .mirror_twotower import views_on
from .objective_twotower import DiffusionObjective, LossWeighting, check_heads, diffusion_loss


@dataclass
class TwoTowerOutput(CacheOutput):
    """
    Result of a forward pass.

    Args:
        loss: scalar float32, when `labels` were given.
        logits: (B, T or `logits_to_keep`, V), the context tower's next-token logits; None with `labels`.
        cache: also `past_key_values`; what the context tower has read, when used.
        hidden_states: with `output_hidden_states`, (B, T, H) what each of the context tower's layers was given, and
            `last_hidden_state`.
        masked_tokens: scalar int64, how many positions the loss averages over, when `labels` were given.
        last_hidden_state: (B, T, H) normed, what the context tower's head is given; None with `labels`.
    """

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    cache: TwoTowerCache | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    masked_tokens: torch.Tensor | None = None
    last_hidden_state: torch.Tensor | None = None


class ChunkLayout(NamedTuple):
    """
    Which columns of a chunk hold tokens, and what they may see; the same for every layer.

    Args:
        mask: (B, T) bool, True on tokens; None when all columns are.
        ends: (B,) the column after each row's last token; None when it is T.
        context_lengths: (B,) how many of the context's columns a row may see; None for all.
        context_mask: (B or B / n, L) bool, True on the context's columns that hold tokens; None for all.
        block_mask: (B, T) bool, True on the chunk's columns that others may see; None for all.
        masks: what attention has made of these for torch's kernels, of the first layer for all.
        causal: whether a column sees only itself and earlier columns of the chunk.
        state_every: return Mamba states before every so many columns rather than after the last.
        keep: of Mamba layers, return the "state", the "update" that takes one through any number of the columns, or
            "nothing"; "in place", write the state over the one before.
    """

    mask: torch.Tensor | None = None
    ends: torch.Tensor | None = None
    context_lengths: torch.Tensor | None = None
    context_mask: torch.Tensor | None = None
    block_mask: torch.Tensor | None = None
    masks: Masks | None = None
    causal: bool = False
    state_every: int | None = None
    keep: Literal["state", "in place", "update", "nothing"] = "state"


class Modulation(NamedTuple):
    """
    How a block's timestep modulates one layer, each (R, 1, H): x + gate * mixer(norm(x * scale + shift)), or of MoE
    and MLP layers x + gate * mixer(norm(x) * scale + shift); `scale` is 1 + what the tables say.
    """

    shift: torch.Tensor
    scale: torch.Tensor
    gate: torch.Tensor


# Operation -> backend, of a model that was told nothing else.
AUTO_KERNELS: Mapping[str, str] = check_kernels("auto")


class TwoTowerPreTrainedModel(NemotronHPreTrainedModel):
    """What both towers and their combination share; initialises weights as transformers' NemotronH does."""

    config: TwoTowerConfig
    config_class = TwoTowerConfig
    kernels = AUTO_KERNELS
    base_model_prefix = ""
    _no_split_modules = ["TwoTowerLayer"]
    _supports_flash_attn = False
    _supports_flex_attn = False
    _can_compile_fullgraph = False
    _can_record_outputs: dict[str, type] = {}
    # Ours, whatever a release of transformers has for its NemotronH: else files would differ between releases.
    _keep_in_fp32_modules_strict = ["e_score_correction_bias"]
    _skip_keys_device_placement = ["cache", "past_key_values"]

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        return True  # transformers looks for its decorator in this file; it stands on the experts we import

    def get_correct_attn_implementation(self, requested_attention: str | None, is_init_check: bool = False) -> str:
        chosen = super().get_correct_attn_implementation(requested_attention, is_init_check)
        if chosen not in ("sdpa", "eager"):
            raise ValueError(f'attn_implementation={chosen!r} is not supported by a TwoTower; use "sdpa" or "eager"')
        return chosen

    def get_correct_experts_implementation(self, requested_experts: str | None) -> str:
        """Where none is asked for by name, [`grouped_mm_or_all`], under the name it had when it did otherwise."""
        if requested_experts not in (None, GROUPED_MM_OR_ALL):
            return super().get_correct_experts_implementation(requested_experts)
        # Quantised experts are other modules, with implementations of their own.
        if getattr(self.config, "quantization_config", None) is not None:
            return super().get_correct_experts_implementation(requested_experts and "grouped_mm")
        return GROUPED_MM_OR_ALL

    def _grouped_mm_can_dispatch(self) -> bool:
        """torch's grouped product wants rows of whole 16 bytes; ours fills up others."""
        rows = (self.config.moe_latent_size or self.config.hidden_size, self.config.moe_intermediate_size)
        if "moe" in self.config.layers_block_type and any(size % 8 for size in rows):
            raise ValueError(
                f'experts_implementation="grouped_mm" needs expert sizes that are multiples of 8, not {rows}; '
                'use "eager" or "batched_mm", or leave it unset'
            )
        return super()._grouped_mm_can_dispatch()

    def set_kernels(self, kernels: str | Mapping[str, str]) -> None:
        """
        Choose who computes the operations of all layers, as `from_pretrained(..., kernels=...)` does.

        Like transformers' `attn_implementation` it is a property of this model in memory, not of its config: nothing
        of it is saved, since another machine has other packages.

        Args:
            kernels: operation -> backend, such as {"ssd_scan": "triton"}, "auto" for operations it does not name; or
                one backend for all operations that have it. `twotower info --kernels` lists both.

        Raises:
            ValueError: for an unknown operation or backend, and for a backend whose package is not installed. One that
                cannot compute what a call asks of it (device, dtype, sizes, gradients) raises at that call.
        """
        chosen = check_kernels(kernels)
        for module in self.modules():
            if isinstance(getattr(module, "kernels", None), Mapping):
                module.kernels = chosen


class TwoTowerForBlockDiffusion(
    PretrainedInterface, TwoTowerPreTrainedModel, ReleasedInterface, TwoTowerGenerationMixin
):
    """
    Context tower, denoiser tower, their heads and the time conditioning, under the released checkpoint's names.

    Calling the model runs the context tower (next-token logits and cache), or with `labels` the training objective;
    [`~TwoTowerForBlockDiffusion.denoise`] runs the denoiser.

    `from_pretrained` and `from_backbone` freeze the context tower and its head (no parameter of theirs requires a
    gradient): training the denoiser is what the model is for, and its objective gives them none. To train them as
    well, or instead, and for a model made from a config, see [`~TwoTowerForBlockDiffusion.set_trained_towers`].

    `save_pretrained` writes NVIDIA's layout, a matrix per expert under the released checkpoint's names, or with
    `save_original_format=False` this class's own tensors, all experts of a layer in one; `from_pretrained` takes both.
    """

    generation_config_class = TwoTowerGenerationConfig
    # Tells transformers' Trainer to pass `num_items_in_batch`.
    accepts_loss_kwargs = True

    def __init__(self, config: TwoTowerConfig, towers: LoadedTowers = "both"):
        config.check()  # `from_pretrained` sets what it was told to in a config that it has read
        super().__init__(config)
        check_towers("towers", towers, LoadedTowers)
        self.has_denoiser = towers == "both"
        self.context_tower = ContextTower(config)
        self.context_lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        # What `labels` mean where `forward` is not told; a Trainer has no way to tell it.
        self.objective = DiffusionObjective()
        if self.has_denoiser:
            self._add_denoiser(config)
        else:
            absent = "|".join(part for part in TWOTOWER_PARTS if part not in CONTEXT_PARTS)
            self._keys_to_ignore_on_load_unexpected = [rf"^({absent})\."]
        self.post_init()

    def _add_denoiser(self, config: TwoTowerConfig) -> None:
        self.denoiser_tower = DenoiserTower(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.t_embedder = TimestepEmbedder(config)
        self.t_block = nn.Sequential(nn.SiLU(), nn.Linear(config.hidden_size, 3 * config.hidden_size))
        self.scale_shift_tables = nn.ParameterList(
            nn.Parameter(torch.empty(3, config.hidden_size)) for _ in range(config.num_hidden_layers)
        )

    # The embeddings and the head that callers see are those `forward` uses.

    def get_input_embeddings(self) -> nn.Embedding:
        """The context tower's; the denoiser tower has its own."""
        return self.context_tower.embeddings

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        self.context_tower.embeddings = value

    def get_output_embeddings(self) -> nn.Linear:
        """The context tower's head; `lm_head` is the denoiser's."""
        return self.context_lm_head

    def set_output_embeddings(self, new_embeddings: nn.Linear) -> None:
        self.context_lm_head = new_embeddings

    def _resize_token_embeddings(
        self, new_num_tokens: int | None, pad_to_multiple_of: int | None = None, mean_resizing: bool = True
    ) -> nn.Embedding:
        """What `resize_token_embeddings` does to embeddings and heads, of both towers."""
        if new_num_tokens is not None and new_num_tokens <= self.config.mask_token_id:
            raise ValueError(
                f"a vocabulary of {new_num_tokens} tokens would lack the mask, token {self.config.mask_token_id}"
            )
        denoisers = [(self.denoiser_tower, self.lm_head)] if self.has_denoiser else []
        pairs = [(self.context_tower, self.context_lm_head), *denoisers]
        if new_num_tokens is not None or pad_to_multiple_of is not None:
            check_in_place(
                "resize_token_embeddings", *(each for tower, head in pairs for each in (tower.embeddings, head))
            )
        for tower, head in pairs:
            trained = tower.embeddings.weight.requires_grad, head.weight.requires_grad
            # These modules stay, and with them the hooks on them.
            tower.embeddings = self._get_resized_embeddings(
                tower.embeddings, new_num_tokens, pad_to_multiple_of, mean_resizing
            )
            resized = self._get_resized_lm_head(head, tower.embeddings.num_embeddings, mean_resizing=mean_resizing)
            head.weight, head.out_features = resized.weight, resized.out_features
            for module, requires_grad in zip((tower.embeddings, head), trained, strict=True):
                module.requires_grad_(requires_grad)
        return self.context_tower.embeddings

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        # By the modules that hold the parameters: of custom code, transformers initialises no others.
        if self.has_denoiser and module in (self.t_block[1], self.scale_shift_tables):
            self.reset_time_conditioning()

    def check_denoiser(self, wanted: str) -> None:
        """Raise a ValueError that `wanted` needs what a model of `towers="context"` lacks."""
        if not self.has_denoiser:
            raise ValueError(
                f'{wanted} needs the denoiser, which this model was loaded without (towers="context"): its tower, '
                'head and time conditioning are missing; load it with towers="both", the default'
            )

    def check_dtypes(self) -> None:
        """Raise a ValueError for towers of different dtypes, of which one computes with what the other has read."""
        context, denoiser = self.context_tower.embeddings.weight, self.denoiser_tower.embeddings.weight
        if context.dtype == denoiser.dtype:
            return
        kind = context.device.type
        if kind == "meta" or not torch.is_autocast_enabled(kind):  # in which both compute in one
            raise ValueError(
                f"the context tower is in {context.dtype}, the denoiser in {denoiser.dtype}; bring both to one dtype, "
                f"e.g. model.to({context.dtype})"
            )

    @can_return_tuple
    @accepts_past_key_values
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        cache: TwoTowerCache | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        labels: torch.Tensor | None = None,
        generator: torch.Generator | None = None,
        loss_weighting: LossWeighting | None = None,
        corruptions: int | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        block_size: int | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        output_hidden_states: bool | None = None,
        **kwargs: Any,
    ) -> TwoTowerOutput:
        """
        Read a chunk with the context tower, or compute the training loss.

        Args:
            input_ids: (B, T); these or `inputs_embeds`.
            attention_mask: (B, T), or after a cache (B, earlier columns + T): 1 on tokens, 0 on padding at either
                side. Default all ones.
            cache: also as `past_key_values`; to continue from and extend in place.
            use_cache: return a cache; default `config.use_cache`. Not with `labels`.
            logits_to_keep: logits of so many last columns only; 0 for all. Not with `labels`.
            labels: (B, T); `input_ids`, the targets of the masked-diffusion loss, with -100 where there is to be none.
                Blocks are counted from the first column, padding included.
            generator: of the masking, with `labels`. Default: in `train()` mode torch's global one. In `eval()` mode
                none: a row's masks are a hash of its own tokens, so that an evaluation's loss is the same every time,
                whatever else is in the batch, in whatever order (see [`content_masked`]).
            loss_weighting, corruptions: with `labels`, instead of those of `self.objective`, the
                [`DiffusionObjective`] that says what the loss is.
            num_items_in_batch: how many labels that are not -100 all batches of an optimiser step have, as
                transformers' Trainer counts them. The loss is then this batch's share of the step's: the sum over its
                masked positions divided by the expected one over the step's (see [`expected_weight`]), not a mean over
                those of this batch alone. Summed over any division of the step into batches it is the same loss.
            block_size: with `labels`, tokens per block of this batch; default `config.block_size`.
            position_ids: (B or 1, T), without an effect, since nothing in the model encodes positions; they may not
                begin anew within a row, as those of packed texts do.
            inputs_embeds: (B, T, H) what the context tower is given instead of its embeddings. Not with `labels`.
            output_hidden_states: return `hidden_states`; default `config.output_hidden_states`. With `labels`, too,
                those of the context tower.
            kwargs: `return_dict`, and the arguments of other models that [`check_arguments`] lets pass.

        Returns:
            [`TwoTowerOutput`], or with `return_dict=False` a tuple of what is not None in it; logits float32.
        """
        check_arguments({"output_attentions": self.config.output_attentions, **kwargs})
        if self.training and torch.is_grad_enabled():
            check_heads(self)
        if labels is not None:
            self.check_denoiser("the training objective (labels)")
        if labels is not None and cache is not None:
            raise ValueError("labels and past_key_values were both given; the training loss starts from no cache")
        input_ids = self._ids_or_placeholders(input_ids, inputs_embeds, labels)
        self._check_ids("input_ids", input_ids, cache, optional=True)
        cached = None if cache is None else cache.width
        if position_ids is not None:
            check_position_ids(position_ids, input_ids, check_attention_mask(input_ids, attention_mask, cached))
        keep_all = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        all_hidden_states: list[torch.Tensor] | None = [] if keep_all else None
        if labels is not None:
            objective = replace(
                self.objective,
                weighting=self.objective.weighting if loss_weighting is None else loss_weighting,
                corruptions=self.objective.corruptions if corruptions is None else corruptions,
            )
            size = self.config.block_size if block_size is None else block_size
            if size < 1:
                raise ValueError(f"block_size is {size}; it must be at least 1")
            given = (input_ids, attention_mask, labels, generator)
            loss, masked_tokens = diffusion_loss(self, *given, objective, size, num_items_in_batch, all_hidden_states)
            output = TwoTowerOutput(loss=loss, masked_tokens=masked_tokens)
            if all_hidden_states:
                output.hidden_states = tuple(each[:, : input_ids.shape[1]] for each in all_hidden_states)
            return output
        if num_items_in_batch is not None:
            raise ValueError(
                "num_items_in_batch was given without labels: a Trainer keeps these to itself under "
                "label_smoothing_factor or compute_loss_func, and would train the context tower's logits on them; set "
                "label_smoothing_factor to 0, or for a loss of your own override Trainer.compute_loss"
            )
        packed = pack_tokens(input_ids, attention_mask, cached)
        use_cache = self.config.use_cache if use_cache is None else use_cache
        if cache is None and use_cache:
            cache = TwoTowerCache(self.config)
        embeds = None if inputs_embeds is None else packed.pack(inputs_embeds)
        # Logits may be too large for the memory when the cache has been extended.
        with nullcontext() if cache is None else cache.undone_on_error(only_read=True):
            hidden_states = self.context_tower(
                packed.ids, cache, packed.counts, inputs_embeds=embeds, all_hidden_states=all_hidden_states
            )
            hidden_states = packed.unpack(hidden_states)
            logits = self.context_lm_head(slice_logits_to_keep(hidden_states, logits_to_keep))
            logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return TwoTowerOutput(
            logits=logits,
            cache=cache if use_cache else None,
            hidden_states=tuple(map(packed.unpack, all_hidden_states)) if all_hidden_states else None,
            last_hidden_state=hidden_states,
        )

    @contextmanager
    def prepared(self) -> Iterator[None]:
        """
        Within, passes without gradients compute once what depends on weights alone, and see no change of them.

        For as long as weights stay as they are, such as a call of `generate`.
        """
        modules = [module for module in self.modules() if isinstance(module, Preparing)]
        try:
            for module in modules:
                module.prepare()
            yield
        finally:
            for module in modules:
                module._prepared = None

    @accepts_past_key_values
    def denoise(
        self,
        block_ids: torch.Tensor,
        cache: TwoTowerCache,
        timestep: torch.Tensor | float | None = None,
        attention_mask: torch.Tensor | None = None,
        positions: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """
        One denoiser pass over a block that follows the cached context; the cache stays as it is.

        Args:
            block_ids: (B, S), S >= 1, with `config.mask_token_id` where a token is wanted.
            cache: the context tower's.
            timestep: (B,) or a number in [0, 1]; default each row's masked fraction.
            attention_mask: (B, S) or (B, earlier columns + S), of which the last S columns count: 1 on tokens, 0 on
                padding at either end of the block. Default all ones.
            positions: (N,) int64, numbers of positions in the flattened block, to have logits of no others. Not with
                `attention_mask`.

        Returns:
            (B, S, V) float32 logits for the block, meaningless on padding; or (N, V) for its `positions` alone.
        """
        self.check_denoiser("denoise")
        self.check_dtypes()
        self._check_ids("block_ids", block_ids, cache)
        packed, mask = PackedTokens(block_ids), None
        if attention_mask is not None and positions is not None:
            raise ValueError("attention_mask and positions were both given; give one of them")
        if positions is not None and not (positions.ndim == 1 and positions.dtype == torch.long):
            raise ValueError(
                f"positions are {positions.dtype} of shape {tuple(positions.shape)}; give int64 of one dimension"
            )
        if attention_mask is not None:
            packed = pack_tokens(block_ids, attention_mask, cache.width)
            mask = packed.mask()
        if timestep is None:
            timestep = _masked_fraction(packed.ids == self.config.mask_token_id, mask)
        elif not (isinstance(timestep, torch.Tensor) and timestep.shape == block_ids.shape[:1]):
            timestep = _time_per_row(timestep, len(block_ids), block_ids.device)
        timestep = timestep.to(block_ids.device, torch.float32)
        pasts = self._pasts(cache)
        logits = self.denoiser_pass(packed.ids, pasts, cache.context_lengths(), timestep, mask, positions)
        return logits if mask is None else packed.unpack(logits)

    def may_leave_out_positions(self) -> bool:
        """Whether nobody would miss them: no other `denoise` or head in the place of ours, and no hook on it."""
        own = getattr(self.denoise, "__func__", None) is OWN_DENOISE
        return own and type(self.lm_head) is nn.Linear and is_untouched(self.lm_head)

    @accepts_past_key_values
    def predict_next(self, input_ids: torch.Tensor, cache: TwoTowerCache) -> torch.Tensor:
        """
        The denoiser as an autoregressive model: without time conditioning, from one token the cache does not hold yet.

        Args:
            input_ids: (B, 1) the newest token.
            cache: the context tower's before that token.

        Returns:
            (B, V) float32 logits of the token after it.
        """
        self.check_denoiser("predict_next")
        self._check_ids("input_ids", input_ids, cache)
        if input_ids.shape[1] != 1:
            raise ValueError(f"input_ids has shape {tuple(input_ids.shape)}; predict_next reads one token of each row")
        return self.denoiser_pass(input_ids, self._pasts(cache), cache.context_lengths(), None)[:, -1]

    def denoiser_pass(
        self,
        block_ids: torch.Tensor,
        pasts: Sequence[Past],
        context_lengths: torch.Tensor | None,
        timestep: torch.Tensor | None,
        mask: torch.Tensor | None = None,
        positions: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """
        What `denoise` and `predict_next` do, without a check: tensors in, tensors out.

        Args:
            block_ids: (B, S).
            pasts: the cache's `views()`.
            context_lengths: the cache's `context_lengths()`.
            timestep: (B,) float32; None for no time conditioning.
            mask: (B, S) bool, True on tokens, which come first; default all.
            positions: (N,) of the B x S positions, those whose logits are wanted; default all.

        Returns:
            (B, S, V) float32 logits, or (N, V).
        """
        layout = ChunkLayout(mask, context_lengths=context_lengths, block_mask=mask, masks={})
        modulations = None if timestep is None else self._modulations(timestep)
        hidden_states = self.denoiser_tower(block_ids, pasts, layout, modulations)
        if positions is not None:
            hidden_states = hidden_states.flatten(0, 1).index_select(0, positions.to(hidden_states.device))
        logits = self.lm_head(hidden_states)
        return logits.to(torch.promote_types(logits.dtype, torch.float32))

    def _pasts(self, cache: TwoTowerCache) -> Sequence[Past]:
        """What each layer of the denoiser finds in the cache; beside the layer, where a model is in several places."""
        if torch.is_grad_enabled():
            self.context_tower.check_past_gets_gradients(cache)
            cache.share()
        places = getattr(self, "hf_device_map", None)
        if places is None or len(set(places.values())) < 2:
            return cache.views()
        return views_on(cache, [execution_device(layer.get_submodule("norm")) for layer in self.denoiser_tower.layers])

    @force_accelerate_hooks("scale_shift_tables")  # which are no module to call
    def _modulations(self, timestep: torch.Tensor) -> list[Modulation]:
        """(R,) -> each layer's."""
        offsets = self.t_block(self.t_embedder(timestep)).unflatten(-1, (1, 1, 3, -1))  # (R, 1, 1, 3, H)
        shift, scale, gate = (torch.stack(list(self.scale_shift_tables))[:, None] + offsets).unbind(3)
        return list(map(Modulation, shift.unbind(1), (1 + scale).unbind(1), gate.unbind(1)))

    def denoise_blocks(
        self,
        block_ids: torch.Tensor,
        masked: torch.Tensor,
        presents: Sequence[Present],
        mask: torch.Tensor | None,
        blocks: range,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        What training denoises: blocks of whole texts, all at once, each after what the context tower read before it.

        Args:
            block_ids: (R, S), of each text all of its `blocks`, as often as they are corrupted.
            masked: (R, S) bool.
            presents: per layer, what the context tower's `read_blocks` returned.
            mask: (B, T) bool, True on the texts' tokens; None when all are.
            blocks: which of a text's are denoised, up to its last.

        Returns:
            (R, S, H) normed hidden states, and (R,) float32 the timesteps, which are the masked shares.
        """
        size, texts = block_ids.shape[1], len(block_ids) // len(blocks)
        lengths = (torch.arange(blocks.start, blocks.stop, device=block_ids.device) * size).repeat(texts)
        layout, own = ChunkLayout(context_lengths=lengths), None
        if mask is not None:
            own = mask.repeat_interleave(texts // len(mask), dim=0)
            own = own.unflatten(1, (blocks.stop, size))[:, blocks.start :].flatten(0, 1)
            layout = ChunkLayout(own, None, lengths, mask, own)
        timestep = _masked_fraction(masked, own)
        pasts = [_blocks_from(present, blocks, texts) for present in presents]
        return self.denoiser_tower(block_ids, pasts, layout, self._modulations(timestep)), timestep

    def _ids_or_placeholders(
        self, input_ids: torch.Tensor | None, inputs_embeds: torch.Tensor | None, labels: torch.Tensor | None
    ) -> torch.Tensor:
        """`input_ids`, or for (B, T, H) embeddings as many of id -1, which is no token's."""
        if inputs_embeds is None:
            if input_ids is None:
                raise ValueError("neither input_ids nor inputs_embeds were given; give one of them")
            return input_ids
        if input_ids is not None:
            raise ValueError("input_ids and inputs_embeds were both given; give one of them")
        if labels is not None:
            raise ValueError(
                "labels and inputs_embeds were both given; the training loss masks tokens: give input_ids"
            )
        if not isinstance(inputs_embeds, torch.Tensor) or not inputs_embeds.is_floating_point():
            kind = getattr(inputs_embeds, "dtype", type(inputs_embeds).__name__)
            raise ValueError(f"inputs_embeds are {kind}; give a tensor of floating-point numbers")
        if inputs_embeds.ndim != 3 or inputs_embeds.shape[2] != self.config.hidden_size:
            raise ValueError(
                f"inputs_embeds has shape {tuple(inputs_embeds.shape)}; expected (batch, tokens, "
                f"{self.config.hidden_size})"
            )
        return torch.full(inputs_embeds.shape[:2], -1, device=inputs_embeds.device)

    def _check_ids(self, name: str, ids: torch.Tensor, cache: TwoTowerCache | None, optional: bool = False) -> None:
        check_ids(name, ids)
        if ids.shape[1] < 1:
            raise ValueError(f"{name} has shape {tuple(ids.shape)}; expected (batch, tokens) with at least one token")
        if cache is None and optional:
            return
        check_cache(cache, self)
        assert cache is not None
        if cache.batch_size not in (-1, len(ids)):
            raise ValueError(f"{name} has {len(ids)} rows, but past_key_values holds {cache.batch_size}")

    def set_trained_towers(self, towers: TrainedTowers) -> None:
        """
        Choose whose parameters require a gradient; all others are frozen.

        Args:
            towers: "denoiser", its head and the time conditioning, for the loss with `labels`; "context", the context
                tower and its head, for a next-token loss on `logits`; "both", for a loss that sums the two.
        """
        check_towers("trained_towers", towers, TrainedTowers)
        for name, parameter in self.named_parameters():
            trained = towers in ("both", "context" if name.startswith("context_") else "denoiser")
            # Quantised weights are integers, and can have no gradient.
            parameter.requires_grad_(trained and parameter.is_floating_point())

    def enable_input_require_grads(self) -> None:
        """
        As adapters and checkpointing need it, make a tower's embedded tokens require gradients; but only where some of
        the tower is trained, so that a loss on what a frozen tower computes still fails.
        """

        def hook_of(tower: TwoTowerBackbone) -> Callable[[nn.Module, Any, torch.Tensor], None]:
            def require_grad(module: nn.Module, inputs: Any, embedded: torch.Tensor) -> None:
                if any(parameter.requires_grad for parameter in tower.parameters()):
                    embedded.requires_grad_(True)

            return require_grad

        towers = (self.context_tower, self.denoiser_tower) if self.has_denoiser else (self.context_tower,)
        self._require_grads_hooks = [tower.embeddings.register_forward_hook(hook_of(tower)) for tower in towers]

    @torch.no_grad()
    def reset_denoiser(self) -> None:
        """Copy the context tower and its head to the denoiser, and make time conditioning the identity."""
        self.check_denoiser("reset_denoiser")
        check_in_place("reset_denoiser", self)
        self.denoiser_tower.load_state_dict(self.context_tower.state_dict())
        self.lm_head.load_state_dict(self.context_lm_head.state_dict())
        self.reset_time_conditioning()

    @torch.no_grad()
    def reset_time_conditioning(self) -> None:
        """Make time conditioning the identity (gate 1, shift and scale 0): layers compute what the backbone's do."""
        self.check_denoiser("reset_time_conditioning")
        check_in_place("reset_time_conditioning", self.t_block, self.scale_shift_tables)
        # Not with transformers' initialisers, which leave alone what was loaded from a checkpoint.
        for parameter in self.t_block[1].parameters():
            parameter.zero_()
        for table in self.scale_shift_tables:
            table.zero_()
            table[2] = 1.0


OWN_DENOISE = TwoTowerForBlockDiffusion.denoise


class TwoTowerBackbone(TwoTowerPreTrainedModel):
    """Embeddings, layers and final norm of one tower. The cache is the caller's: layers get and return their part."""

    def __init__(self, config: TwoTowerConfig):
        super().__init__(config)
        self.embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(TwoTowerLayer(config, idx) for idx in range(config.num_hidden_layers))
        self.norm_f = TwoTowerRMSNorm(config.hidden_size, eps=config.layer_norm_epsilon)
        self.post_init()

    def get_input_embeddings(self) -> nn.Embedding:
        return self.embeddings

    def set_input_embeddings(self, new_embeddings: nn.Embedding) -> None:
        self.embeddings = new_embeddings

    def run_layers(
        self,
        hidden_states: torch.Tensor,
        pasts: Sequence[Past] | None,
        layout: ChunkLayout,
        modulations: Sequence[Modulation] | None = None,
        all_hidden_states: list[torch.Tensor] | None = None,
    ) -> tuple[torch.Tensor, list[Present]]:
        """
        A pass itself: tensors in, tensors out, and nothing that the host must read or know between.

        Args:
            hidden_states: (B, T, H) embedded tokens.
            pasts: per layer, what it reads the chunk with, see [`TwoTowerLayer`]; default nothing.
            layout: the chunk's [`ChunkLayout`].
            modulations: per layer its [`Modulation`]; default no time conditioning.
            all_hidden_states: a list to which what each layer is given, (B, T, H), is added, and last the result.

        Returns:
            (B, T, H) normed hidden states, and per layer what it adds to the cache.
        """
        presents = []
        for idx, layer in enumerate(self.layers):
            if all_hidden_states is not None:
                all_hidden_states.append(hidden_states)
            modulation = () if modulations is None else modulations[idx]
            past = None if pasts is None else pasts[idx]
            hidden_states, present = layer(hidden_states, past, layout, *modulation)
            presents.append(present)
        hidden_states = self.norm_f(hidden_states)
        if all_hidden_states is not None:
            all_hidden_states.append(hidden_states)
        return hidden_states, presents


class ContextTower(TwoTowerBackbone):
    """The autoregressive tower: reads tokens causally, into the cache or for all block boundaries at once."""

    @accepts_past_key_values
    def forward(
        self,
        input_ids: torch.Tensor,
        cache: TwoTowerCache | None = None,
        counts: Counts | None = None,
        tentative: bool = False,
        inputs_embeds: torch.Tensor | None = None,
        all_hidden_states: list[torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """
        Read one chunk after what the cache holds, and add it to the cache.

        Args:
            input_ids: (B, T), each row's tokens first.
            cache: extended in place; default none, from the beginning of the text.
            counts: (B,) tokens per row, default T. A list is only uploaded; a tensor is read first.
            tentative: leave open how many of a row's tokens are to count until the cache's `accept` says so; needs a
                cache.
            inputs_embeds: (B, T, H), default the embeddings of `input_ids`.
            all_hidden_states: a list to which what each layer is given, (B, T, H), is added, and last the result.

        Returns:
            (B, T, H) normed hidden states; meaningless beyond a row's tokens.
        """
        length = input_ids.shape[1]
        if tentative and cache is None:
            raise ValueError("tentative=True needs past_key_values, whose accept(counts) says later what counts")
        own = None if counts is None else listed(counts)
        if own is not None and min(own) == length:
            own = None
        # What is read tentatively is cut to a row's tokens later; to those, what stands behind them does not matter.
        ends = None if own is None or tentative else uploaded(own, input_ids.device)
        lengths = None if cache is None else cache.context_lengths()
        if cache is not None and self.training and torch.is_grad_enabled():
            self.check_past_gets_gradients(cache)
        pasts = None if cache is None else cache.slots(input_ids)
        embedded = self.embeddings(input_ids) if inputs_embeds is None else inputs_embeds
        hidden_states, presents = self.reading_pass(embedded, pasts, lengths, ends, tentative, all_hidden_states)
        if cache is not None:
            # Only now, so that an error in the middle leaves the cache as it was.
            cache.sign(self)
            cache.append(input_ids, presents, own, tentative)
        return hidden_states

    def check_past_gets_gradients(self, cache: TwoTowerCache) -> None:
        """Refuse reentrant checkpointing of what is read after a cache: it gives none to what is in a tuple."""
        if not (self.training and cache.width):
            return
        layer = self.layers[0]
        function = layer._gradient_checkpointing_func if layer.gradient_checkpointing else None
        reentrant = getattr(function, "keywords", {}).get("use_reentrant")
        if reentrant and any(parameter.requires_grad for parameter in self.parameters()):
            raise ValueError(
                "gradient checkpointing with use_reentrant=True gives no gradients to what a cache holds; set "
                "use_reentrant to False, or train on each text in one piece"
            )

    def reading_pass(
        self,
        embedded: torch.Tensor,
        pasts: Sequence[Past] | None,
        context_lengths: torch.Tensor | None,
        ends: torch.Tensor | None = None,
        tentative: bool = False,
        all_hidden_states: list[torch.Tensor] | None = None,
        in_place: bool = False,
    ) -> tuple[torch.Tensor, list[Present]]:
        """
        What `forward` does to the tokens (B, T, H): tensors in, tensors out.

        Args:
            pasts: the cache's `slots()`.
            context_lengths: the cache's `context_lengths()`.
            ends: (B,) tokens per row, default T.
            in_place: write states over those before, which all layers have then: an error would leave some of either.

        Returns:
            (B, T, H) normed hidden states, and per layer the states after a row's tokens, or what leads to them.
        """
        mask = None
        if ends is not None:
            mask = torch.arange(embedded.shape[1], device=ends.device) < ends[:, None]
        keep: Literal["state", "in place", "update"] = "update" if tentative else "in place" if in_place else "state"
        layout = ChunkLayout(mask, ends, context_lengths, masks={}, causal=True, keep=keep)
        return self.run_layers(embedded, pasts, layout, all_hidden_states=all_hidden_states)

    def read_blocks(
        self,
        input_ids: torch.Tensor,
        mask: torch.Tensor | None,
        block_size: int,
        all_hidden_states: list[torch.Tensor] | None = None,
    ) -> tuple[torch.Tensor, list[Present]]:
        """
        Read whole sequences once and keep, per layer, what every block of them would find in the cache.

        Args:
            input_ids: (B, T), T a multiple of `block_size`.
            mask: (B, T) bool, True on tokens; padding on either side.
            block_size: columns per block.
            all_hidden_states: a list to which what each layer is given, (B, T, H), is added, and then the normed ones.

        Returns:
            (B, T, H) normed hidden states, and per layer keys and values (B, Hkv, T, D), or states before each block
            (B x T / S, ...).
        """
        layout = ChunkLayout(mask, block_mask=mask, causal=True, state_every=block_size)
        return self.run_layers(self.embeddings(input_ids), None, layout, all_hidden_states=all_hidden_states)


class DenoiserTower(TwoTowerBackbone):
    """The trained tower: one bidirectional-attention, forward-scan pass over a block, modulated by its timestep."""

    def forward(
        self,
        block_ids: torch.Tensor,
        pasts: Sequence[Past],
        layout: ChunkLayout,
        modulations: Sequence[Modulation] | None = None,
    ) -> torch.Tensor:
        """
        Args:
            block_ids: (R, S); consecutive rows may share a row of the context.
            pasts: per layer, what the context tower holds before the block.
            layout: the blocks' [`ChunkLayout`].
            modulations: per layer its [`Modulation`]; default no time conditioning.

        Returns:
            (R, S, H) normed hidden states.
        """
        return self.run_layers(self.embeddings(block_ids), pasts, layout._replace(keep="nothing"), modulations)[0]


def is_untouched(module: nn.Module) -> bool:
    """Whether its weights may be used without calling it: nobody has hooked anything to it, nor replaced `forward`."""
    hooked = module._forward_pre_hooks or module._forward_hooks or module._backward_pre_hooks or module._backward_hooks
    return not (hooked or "forward" in vars(module) or module._compiled_call_impl or has_any_global_hook())


def check_not_adapted(name: str, module: nn.Module) -> None:
    """Refuse an adapter on a module whose weights are used without calling it, where it would have no effect."""
    if "base_layer" in module._modules:  # as all of peft's have
        raise ValueError(
            f"an adapter ({type(module).__name__}) is on the {name} of a Mamba layer, whose weights are used without "
            f"calling it; leave {name} out of target_modules"
        )


def make_weights(*modules: nn.Module) -> None:
    """
    Call those hooks of modules whose weights are used without calling them that make the weights: torch's weight norm,
    spectral norm and pruning. There is nothing to show to others.
    """
    for module in modules:
        if not (module._forward_pre_hooks or module._forward_hooks):
            continue
        hooks = [*module._forward_pre_hooks.values(), *module._forward_hooks.values()]
        making = [hook for hook in hooks if type(hook).__module__.startswith("torch.nn.utils.")]
        for hook in making:
            hook(module, ())
        if len(making) < len(hooks):
            logger.warning_once(
                f"a forward hook is on the {type(module).__name__} of a Mamba layer, whose weights are used without "
                "calling it: the hook is not called; put it on the layer"
            )


class Preparing:
    """
    A module with tensors that depend on its weights alone. They are computed at every pass, since weights may change
    in ways that leave no trace, but within [`~TwoTowerForBlockDiffusion.prepared`] once.
    """

    _parameters: dict[str, nn.Parameter | None]  # the module's, as its hooks are
    _forward_pre_hooks: dict[int, Any]
    _forward_hooks: dict[int, Any]
    _prepared: tuple[list[torch.Tensor | None], tuple[torch.Tensor, ...]] | None = None

    def of_weights(self) -> tuple[torch.Tensor, ...]:
        raise NotImplementedError

    def weights(self) -> list[torch.Tensor | None]:
        """Those it depends on, where they can be used as they are; else none, or others than before."""
        return list(self._parameters.values())

    def prepared(self) -> tuple[torch.Tensor, ...]:
        """What has been prepared; empty where nothing has been, or is of no use to this pass."""
        if torch.compiler.is_compiling():
            return ()  # a compiled pass, which outlives what is prepared, is to do it by itself
        own = prepared.by_module
        held = self._prepared if own is None else own.get(self)  # looked up once, as another thread may end it
        # What was prepared has no gradients.
        if held is None or torch.is_grad_enabled():
            return ()
        # Adapters put other weights in the place of a module's during its pass.
        before, now = held[0], self.weights()
        changed = len(before) != len(now) or any(map(is_not, before, now))
        return () if changed else held[1]

    def prepare(self) -> None:
        """Not where weights come and go: what offloads, shards or adapts them does so around a pass of the module."""
        weights = self.weights()
        tensors = [weight for weight in weights if weight is not None]
        whole = all(type(each) in (nn.Parameter, torch.Tensor) and each.numel() > 0 for each in tensors)
        fixed = not hasattr(self, "_hf_hook") or stays_in_place(self._hf_hook)
        if tensors and whole and fixed and not (self._forward_pre_hooks or self._forward_hooks):
            with torch.inference_mode(False), torch.no_grad():
                self._prepared = weights, self.of_weights()

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_prepared": None}  # a copy would never be told that it has ended


class TwoTowerRMSNorm(NemotronHRMSNorm):
    """transformers' norm, in float32 at least."""

    kernels = AUTO_KERNELS

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        backend = self.kernels["rms_norm"]
        if is_torch(backend, hidden_states):
            return F.rms_norm(hidden_states, self.weight.shape, self.weight, self.variance_epsilon)
        return rms_norm(hidden_states, self.weight, self.variance_epsilon, backend)


class TwoTowerMamba(Preparing, NemotronHMamba2Mixer):
    """Mamba-2 mixer of a chunk, with state in and state out; its step is clamped to `time_step_limit` as NVIDIA's."""

    kernels = AUTO_KERNELS

    def __init__(self, config: TwoTowerConfig, layer_idx: int):
        super().__init__(config, layer_idx)
        self.time_step_limit = tuple(config.time_step_limit)

    def of_weights(self) -> tuple[torch.Tensor, ...]:
        check_not_adapted("conv1d", self.conv1d)
        check_not_adapted("norm", self.norm)
        return -torch.exp(at_least_float32(self.A_log)), at_least_float32(self.dt_bias)

    @force_accelerate_hooks(["conv1d", "norm"])  # whose weights are used without calling them
    def forward(
        self, hidden_states: torch.Tensor, past: MambaState | None, layout: ChunkLayout
    ) -> tuple[torch.Tensor, MambaState | MambaUpdate | None]:
        conv_before, ssm_before = past if past is not None else (None, None)
        conv1d, norm = self.conv1d, self.norm
        make_weights(conv1d, norm)
        A, bias = self.prepared() or self.of_weights()
        # 1. Gate (B, T, H * P), convolution inputs (B, T, C) and step sizes (B, T, H), the last two 0 off the tokens.
        channels, states = self.intermediate_size, self.n_groups * self.ssm_state_size
        gate, inputs, dt = self.in_proj(hidden_states).split_with_sizes([channels, self.conv_dim, self.num_heads], -1)
        scan_backend = self.kernels["ssd_step" if inputs.shape[1] == 1 and layout.state_every is None else "ssd_scan"]
        limited = self.time_step_limit != (0.0, math.inf)
        # Kernels make step sizes themselves, of tokens alone, where these are as they come.
        finished = limited or layout.mask is not None or layout.keep == "update" or is_torch(scan_backend, inputs)
        if finished:
            dt = F.softplus(dt + bias)
        if limited:
            dt = dt.clamp(*self.time_step_limit)
        if layout.mask is not None:
            inputs, dt = inputs * layout.mask[..., None], dt * layout.mask[..., None]
        # 2. Convolve, and split into x (B, T, H, P), B and C (B, T, G, N).
        convolved, conv_after = causal_conv(
            inputs,
            conv1d.weight.squeeze(1),
            conv1d.bias,
            conv_before,
            layout.ends,
            self.activation,
            return_inputs=layout.keep not in ("state", "in place"),
            in_place=layout.keep == "in place",
            backend=self.kernels["causal_conv"],
        )
        if is_torch(scan_backend, convolved):
            convolved = at_least_float32(convolved)  # kernels read it as it is, and round y to its dtype
        x, B, C = convolved.split_with_sizes([channels, states, states], -1)
        tokens = x.shape[:2]
        x = x.view(*tokens, self.num_heads, self.head_dim)
        B, C = B.view(*tokens, self.n_groups, -1), C.view(*tokens, self.n_groups, -1)
        # 3. Scan.
        scan = ssd_scan(
            x,
            dt,
            A,
            B,
            C,
            self.D,
            ssm_before,
            layout.state_every or self.chunk_size,
            return_state=layout.keep in ("state", "in place"),
            return_chunk_states=layout.state_every is not None,
            dt_bias=None if finished else bias,
            in_place=layout.keep == "in place",
            backend=scan_backend,
        )
        y = gated_rms_norm(
            scan.y,
            gate,
            norm.weight,
            norm.group_size,
            norm.variance_epsilon,
            self.kernels["gated_rms_norm"],
        )
        # 4. What the cache is to keep, unless that has been written.
        present: MambaState | MambaUpdate | None = None
        if layout.keep == "update":
            present = MambaUpdate(conv_after, x, dt, A, B)
        elif layout.state_every is not None:
            assert scan.chunk_states is not None
            before = inputs_before_blocks(inputs, self.conv_kernel_size, layout.state_every)
            present = MambaState(before.flatten(0, 1), scan.chunk_states.flatten(0, 1))
        elif layout.keep == "state" and scan.state is not None:
            present = MambaState(conv_after, scan.state)
        return self.out_proj(y), present


class TwoTowerAttention(Preparing, NemotronHAttention):
    """
    Attention of a chunk over the context and itself; there are no position embeddings.

    Where weights may be prepared, queries, keys and values are projected at once.
    """

    kernels = AUTO_KERNELS

    def __init__(self, config: TwoTowerConfig, layer_idx: int):
        super().__init__(config, layer_idx)
        if config.attention_bias:  # NVIDIA's code honours it, transformers' does not
            for projection in (self.q_proj, self.k_proj, self.v_proj, self.o_proj):
                projection.bias = nn.Parameter(torch.zeros(projection.out_features))

    def weights(self) -> list[torch.Tensor | None]:
        projections = (self.q_proj, self.k_proj, self.v_proj)
        biased = {each.bias is not None for each in projections}
        if len(biased) > 1 or not all(type(each) is nn.Linear and is_untouched(each) for each in projections):
            return []
        return [weight for each in projections for weight in each._parameters.values()]

    def of_weights(self) -> tuple[torch.Tensor, ...]:
        weights = self.weights()
        return tuple(torch.cat(part) for part in (weights[::2], weights[1::2]) if None not in part)  # type: ignore

    def forward(
        self, hidden_states: torch.Tensor, past: KeyValues | KeyValueSlot | None, layout: ChunkLayout
    ) -> tuple[torch.Tensor, KeyValues | None]:
        # Queries, keys and values, each (B, T, heads * D).
        parts: Sequence[torch.Tensor]
        if merged := self.prepared():
            keys = merged[0].shape[0] // (self.num_key_value_groups + 2)
            sizes = [self.num_key_value_groups * keys, keys, keys]
            parts = F.linear(hidden_states, *merged).split_with_sizes(sizes, -1)
        else:
            parts = [each(hidden_states) for each in (self.q_proj, self.k_proj, self.v_proj)]
        heads = (*hidden_states.shape[:2], -1, self.head_dim)
        query, key, value = (part.view(heads).transpose(1, 2) for part in parts)
        present: KeyValues | None = KeyValues(key, value)
        own = present
        if isinstance(past, KeyValueSlot):
            layer = past.layer
            (past, own), present = past.read_with(KeyValues(key, value)), None
            if query.requires_grad or key.requires_grad or value.requires_grad:
                layer.shared = True
        backend = self.kernels["block_attention"]
        if backend in ("auto", "torch") and self.config._attn_implementation == "eager":
            backend = "eager"
        attended = block_attention(
            query,
            None if own is None else own.key,
            None if own is None else own.value,
            None if past is None else past.key,
            None if past is None else past.value,
            layout.context_lengths,
            layout.context_mask,
            layout.block_mask,
            causal=layout.causal,
            scale=self.scaling,
            masks=layout.masks,
            backend=backend,
        )
        return self.o_proj(attended), present


class TwoTowerRouter(Preparing, NemotronHTopkRouter):
    """transformers' choice of experts, in float64 as NVIDIA's code computes it."""

    kernels = AUTO_KERNELS

    def __init__(self, config: TwoTowerConfig):
        super().__init__(config)
        # Some releases of transformers make it float32 whatever the model's dtype.
        self.weight = nn.Parameter(torch.zeros(self.num_experts, self.hidden_dim))

    def weights(self) -> list[torch.Tensor | None]:
        return [*self._parameters.values(), self.e_score_correction_bias]

    def of_weights(self) -> tuple[torch.Tensor, ...]:
        return self.weight.double(), self.e_score_correction_bias.double()

    def forward(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(..., H) -> router logits (tokens, E), weights and indices (tokens, top-k)."""
        tokens, backend = hidden_states.flatten(0, -2), self.kernels["top_k_routing"]
        weight: torch.Tensor = self.weight
        bias = self.e_score_correction_bias
        if is_torch(backend, tokens):  # kernels read weights as they are, of which there are fewer bytes
            weight, bias = self.prepared() or self.of_weights()
        return top_k_routing(
            tokens,
            weight,
            bias,
            self.top_k,
            self.num_group,
            self.topk_group,
            self.norm_topk_prob,
            self.routed_scaling_factor,
            backend,
        )


def grouped_mm_or_all(
    experts: "TwoTowerExperts", hidden_states: torch.Tensor, indices: torch.Tensor, weights: torch.Tensor
) -> torch.Tensor:
    """(T, H) tokens through their experts, see [`routed_experts`]; as transformers does where ranks share them."""
    backend, own = experts.kernels["routed_experts"], (experts.up_proj, experts.down_proj, experts.act_fn)
    if experts._is_expert_parallel:
        if backend not in ("auto", "torch"):
            raise ValueError(f'routed_experts cannot be computed by "{backend}" where ranks share experts; use "auto"')
        return grouped_mm_experts_forward(experts, hidden_states, indices, weights)
    return routed_experts(hidden_states, indices, weights, *own, backend)


GROUPED_MM_OR_ALL = "grouped_mm_or_all"
ExpertsInterface.register(GROUPED_MM_OR_ALL, grouped_mm_or_all)


class TwoTowerExperts(NemotronHExperts):
    """transformers' experts; the way they are computed is looked up by name."""

    kernels = AUTO_KERNELS

    def forward(self, hidden_states: torch.Tensor, indices: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        if self.kernels["routed_experts"] not in ("auto", "torch"):
            # A kernel asked for by name goes before `experts_implementation`, as it does before `attn_implementation`.
            return grouped_mm_or_all(self, hidden_states, indices, weights)
        return super().forward(hidden_states, indices, weights)


class TwoTowerMoE(NemotronHMoE):
    """transformers' mixture of experts with our router."""

    def __init__(self, config: TwoTowerConfig, layer_idx: int):
        super().__init__(config, layer_idx)
        self.gate, self.experts = TwoTowerRouter(config), TwoTowerExperts(config)
        # Of what is not projected any more, the factor can be part of the sum.
        self.scale, self.is_latent = 1.0, config.moe_latent_size is not None
        if not self.is_latent:
            self.scale, self.gate.routed_scaling_factor = self.gate.routed_scaling_factor, 1.0
        self.experts.register_load_state_dict_pre_hook(merge_expert_matrices)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        tokens = hidden_states.flatten(0, -2)
        _, weights, indices = self.gate(tokens)
        if self.is_latent:
            routed = self.experts(self.fc1_latent_proj(tokens), indices, weights).to(hidden_states.dtype)
            routed = self.fc2_latent_proj(routed)
        else:
            routed = self.experts(tokens, indices, weights)
        shared, routed = self.shared_experts(hidden_states), routed.view_as(hidden_states)
        if routed.dtype == shared.dtype or not may_give_out(shared):
            return torch.add(shared, routed, alpha=self.scale).to(shared.dtype)
        return torch.add(shared, routed, alpha=self.scale, out=torch.empty_like(shared))  # rounded in the same kernel


STATEFUL_MIXERS: dict[str, Any] = {"linear_attention": TwoTowerMamba, "full_attention": TwoTowerAttention}
STATELESS_MIXERS: dict[str, Any] = {"moe": TwoTowerMoE, "mlp": NemotronHMLP}


class TwoTowerLayer(GradientCheckpointingLayer):
    """One pre-norm residual layer: x + gate * mixer(modulated norm(x))."""

    _checkpointing = False

    @property
    def gradient_checkpointing(self) -> bool:
        """Not in a pass without gradients, such as the frozen context tower's: it has nothing to compute again."""
        return self._checkpointing and torch.is_grad_enabled()

    @gradient_checkpointing.setter
    def gradient_checkpointing(self, enabled: bool) -> None:
        self._checkpointing = enabled

    def __init__(self, config: TwoTowerConfig, layer_idx: int):
        super().__init__()
        kind = config.layers_block_type[layer_idx]
        self.stateful = kind in STATEFUL_MIXERS
        self.norm = TwoTowerRMSNorm(config.hidden_size, eps=config.layer_norm_epsilon)
        self.mixer = (STATEFUL_MIXERS | STATELESS_MIXERS)[kind](config, layer_idx=layer_idx)

    def forward(
        self,
        hidden_states: torch.Tensor,
        past: Past,
        layout: ChunkLayout,
        *modulation: torch.Tensor,
    ) -> tuple[torch.Tensor, Present]:
        """
        Args:
            hidden_states: (B, T, H).
            past: what the same layer of the context tower holds; for keys and values also where to write them.
            layout: the chunk's [`ChunkLayout`].
            modulation: the parts of the block's [`Modulation`], one by one, since reentrant checkpointing gives
                gradients to no tensor inside of a tuple; none for a plain layer.

        Returns:
            (B, T, H) and what the layer adds to the cache, unless it has been written.
        """
        if not modulation:
            mixer_input = self.norm(hidden_states)
        else:
            shift, scale, gate = modulation
            # A stateful layer's input is modulated before its norm, as NVIDIA's code does.
            if self.stateful:
                mixer_input = self.norm(torch.addcmul(shift, hidden_states, scale))
            else:
                mixer_input = torch.addcmul(shift, self.norm(hidden_states), scale)
        mixed, present = self.mixer(mixer_input, past, layout) if self.stateful else (self.mixer(mixer_input), None)
        return torch.addcmul(hidden_states, gate, mixed) if modulation else hidden_states + mixed, present


class TimestepEmbedder(Preparing, nn.Module):
    """Masked fraction of a block -> (B, H): sinusoidal features, then a two-layer MLP."""

    def __init__(self, config: TwoTowerConfig):
        super().__init__()
        self.features = config.timestep_features
        self.max_period = config.timestep_max_period
        self.scale = config.timestep_scale
        self.mlp = nn.Sequential(
            nn.Linear(config.timestep_features, config.hidden_size),
            nn.SiLU(),
            nn.Linear(config.hidden_size, config.hidden_size),
        )

    def weights(self) -> list[torch.Tensor | None]:
        """One, which says on what device frequencies are wanted, and in what dtype."""
        first = self.mlp[0]
        # Of an adapter (peft's target_modules="all-linear") or a parametrization the weight lies elsewhere.
        return [first._parameters.get("weight")] if is_untouched(first) else []

    def of_weights(self, device: torch.device | None = None) -> tuple[torch.Tensor, ...]:
        """Frequencies, in float32 at least; by default where the weights are."""
        first = next(self.mlp.parameters(), None)  # of layers that torch has quantised dynamically there are none
        wide = torch.float32 if first is None else torch.promote_types(first.dtype, torch.float32)
        device = first.device if device is None and first is not None else device
        half = torch.arange(self.features // 2, device=device, dtype=wide)
        period = torch.tensor(self.max_period, dtype=torch.float32, device="cpu")  # which any device takes as a number
        return (torch.exp(half * (-2 / self.features) * torch.log(period)),)

    def forward(self, timestep: torch.Tensor) -> torch.Tensor:
        """(B,) in [0, 1]; rounded to the model's dtype before it is scaled, as NVIDIA's code does."""
        (frequencies,) = self.prepared() or self.of_weights(timestep.device)
        dtype = next((each.dtype for each in self.mlp.parameters()), torch.float32)
        angles = (timestep.to(dtype) * self.scale).to(frequencies.dtype)[:, None] * frequencies
        return self.mlp(torch.cat([angles.cos(), angles.sin()], dim=-1).to(dtype))


def _blocks_from(present: Present, blocks: range, texts: int) -> KeyValues | MambaState | None:
    """What `blocks` of so many texts need of a layer: states for each, keys and values for all of a text's."""
    if not isinstance(present, MambaState):
        assert not isinstance(present, MambaUpdate)
        return present
    states = [part.unflatten(0, (-1, blocks.stop))[:, blocks.start :] for part in present]
    copies = texts // len(states[0])
    return MambaState(*(part.repeat_interleave(copies, dim=0).flatten(0, 1) for part in states))


def _time_per_row(timestep: Any, rows: int, device: torch.device) -> torch.Tensor:
    """(R,) float32 from a number or one per row."""
    try:
        times = torch.as_tensor(timestep, dtype=torch.float32, device=device)
    except (TypeError, ValueError) as error:
        raise ValueError(f"timestep is {timestep!r}; give a number in [0, 1], or one per row") from error
    numbers = timestep if isinstance(timestep, list | tuple) else [timestep]
    # For those in tensors one would have to wait.
    if any(isinstance(number, int | float) and not 0 <= number <= 1 for number in numbers):
        raise ValueError(f"timestep is {timestep!r}; give numbers in [0, 1], one or one per row")
    if times.shape not in ((), (1,), (rows,)):
        raise ValueError(f"timestep has shape {tuple(times.shape)}; give a number, or one for each of the {rows} rows")
    return times.expand(rows)


def _masked_fraction(masked: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """(R, S) -> (R,): masked share of a block's tokens."""
    if mask is None:
        return masked.float().mean(-1)
    return (masked & mask).sum(-1).float() / mask.sum(-1).clamp(min=1)


register_checkpoint_layout()

__all__ = ["ContextTower", "DenoiserTower", "TwoTowerForBlockDiffusion", "TwoTowerOutput", "TwoTowerPreTrainedModel"]

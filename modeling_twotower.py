"""TwoTower: a frozen autoregressive context tower and a denoiser tower that fills one block of tokens at a time.

Both towers are NemotronH backbones (Mamba-2, attention and mixture-of-experts layers) built from transformers'
modules. The context tower reads the prompt and every finished block into one cache; the denoiser looks at that
cache layer by layer and turns a partly masked block into logits for all of its positions at once.

Shapes: B batch, T tokens of a chunk, S block, L context, H hidden size, V vocabulary, R = B x blocks denoised at once.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM
from transformers import initialization as init
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping
from transformers.core_model_loading import WeightConverter
from transformers.integrations.accelerate import force_accelerate_hooks
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import slice_logits_to_keep
from transformers.models.nemotron_h.modeling_nemotron_h import (
    NemotronHAttention,
    NemotronHMamba2Mixer,
    NemotronHMLP,
    NemotronHMoE,
    NemotronHPreTrainedModel,
    NemotronHRMSNorm,
    NemotronHTopkRouter,
)
from transformers.utils import ModelOutput

from .cache_twotower import KeyValues, MambaState, TwoTowerCache
from .configuration_twotower import TwoTowerConfig
from .kernels.block_attention import block_attention
from .kernels.causal_conv import causal_conv, inputs_before_blocks
from .kernels.gated_rms_norm import gated_rms_norm
from .kernels.ssd import ssd_scan
from .generation_twotower import TwoTowerGenerationMixin
from .objective_twotower import LossWeighting, masked_cross_entropy, sample_masked
from .padding_twotower import check_attention_mask, pack_tokens


@dataclass
class TwoTowerOutput(ModelOutput):
    """
    Result of a forward pass.

    Args:
        loss: scalar float32, when `labels` were given.
        logits: (B, T or `logits_to_keep`, V), the context tower's next-token logits; None with `labels`.
        past_key_values: the cache, when used.
        masked_tokens: scalar int64, how many positions the loss averages over, when `labels` were given.
    """

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    past_key_values: TwoTowerCache | None = None
    masked_tokens: torch.Tensor | None = None


class ChunkLayout(NamedTuple):
    """
    Which columns of a chunk hold tokens, and what they may see; the same for every layer.

    Args:
        mask: (B, T) bool, True on tokens; None when all columns are.
        ends: (B,) the column after each row's last token; None when it is T.
        context_mask: bool, broadcastable to (B, 1, T, L), the context columns a row may see; None for all.
        block_mask: bool, broadcastable to (B, 1, T, T), the chunk's columns a column may see; None for all.
        causal: whether a column sees only itself and earlier columns of the chunk.
        state_every: return Mamba states before every so many columns rather than after the last.
    """

    mask: torch.Tensor | None = None
    ends: torch.Tensor | None = None
    context_mask: torch.Tensor | None = None
    block_mask: torch.Tensor | None = None
    causal: bool = False
    state_every: int | None = None


class TwoTowerPreTrainedModel(NemotronHPreTrainedModel):
    """What both towers and their combination share; initialises weights as transformers' NemotronH does."""

    config: TwoTowerConfig
    config_class = TwoTowerConfig
    base_model_prefix = ""
    _no_split_modules = ["TwoTowerLayer"]
    _supports_flash_attn = False
    _supports_flex_attn = False
    _can_compile_fullgraph = False
    _can_record_outputs = {}

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        return True  # transformers looks for its decorator in this file; it stands on the experts we import

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, TwoTowerForBlockDiffusion):
            module.reset_time_conditioning()


class TwoTowerForBlockDiffusion(TwoTowerPreTrainedModel, TwoTowerGenerationMixin):
    """
    Context tower, denoiser tower, their heads and the time conditioning, under the released checkpoint's names.

    Calling the model runs the context tower (next-token logits and cache), or with `labels` the training objective;
    [`~TwoTowerForBlockDiffusion.denoise`] runs the denoiser.
    """

    def __init__(self, config: TwoTowerConfig):
        super().__init__(config)
        self.context_tower = ContextTower(config)
        self.context_lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.denoiser_tower = DenoiserTower(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.t_embedder = TimestepEmbedder(config)
        self.t_block = nn.Sequential(nn.SiLU(), nn.Linear(config.hidden_size, 3 * config.hidden_size))
        self.scale_shift_tables = nn.ParameterList(
            nn.Parameter(torch.empty(3, config.hidden_size)) for _ in range(config.num_hidden_layers)
        )
        self.post_init()

    def forward(
        self,
        input_ids: torch.LongTensor,
        attention_mask: torch.Tensor | None = None,
        past_key_values: TwoTowerCache | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        labels: torch.LongTensor | None = None,
        generator: torch.Generator | None = None,
        loss_weighting: LossWeighting = "mean",
    ) -> TwoTowerOutput:
        """
        Read a chunk with the context tower, or compute the training loss.

        Args:
            input_ids: (B, T).
            attention_mask: (B, T), or (B, L + T) after a cache of L columns: 1 on tokens, 0 on padding at either
                side. Default all ones.
            past_key_values: cache to continue from and extend in place.
            use_cache: return a cache; default `config.use_cache`. Not with `labels`.
            logits_to_keep: logits of so many last columns only; 0 for all. Not with `labels`.
            labels: (B, T); the masked-diffusion loss over positions that are not -100, of which `input_ids` are
                the targets. Blocks are counted from the first column, padding included.
            generator: of the masking, with `labels`.
            loss_weighting: see [`masked_cross_entropy`], with `labels`.

        Returns:
            [`TwoTowerOutput`]; logits float32.
        """
        if labels is not None:
            if past_key_values is not None:
                raise ValueError("labels and past_key_values were both given; the training loss starts from no cache")
            return self._diffusion_loss(input_ids, attention_mask, labels, generator, loss_weighting)
        packed = pack_tokens(input_ids, attention_mask)
        use_cache = self.config.use_cache if use_cache is None else use_cache
        if past_key_values is None and use_cache:
            past_key_values = TwoTowerCache(self.config)
        hidden_states = self.context_tower(packed.ids, past_key_values, packed.counts)
        hidden_states = slice_logits_to_keep(packed.unpack(hidden_states), logits_to_keep)
        return TwoTowerOutput(
            logits=self.context_lm_head(hidden_states).float(), past_key_values=past_key_values if use_cache else None
        )

    def denoise(
        self,
        block_ids: torch.LongTensor,
        past_key_values: TwoTowerCache,
        timestep: torch.Tensor | float | None = None,
        attention_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """
        One denoiser pass over a block that follows the cached context; the cache stays as it is.

        Args:
            block_ids: (B, S), S >= 1, with `config.mask_token_id` where a token is wanted.
            past_key_values: the context tower's cache.
            timestep: (B,) or a number in [0, 1]; default each row's masked fraction.
            attention_mask: (B, L + S), 1 on tokens; its last S columns may hide columns of the block. Default all.

        Returns:
            (B, S, V) float32 logits for the same positions.
        """
        self._check_block(block_ids, past_key_values)
        block_mask = None if attention_mask is None else self._block_mask(attention_mask, block_ids, past_key_values)
        if timestep is None:
            timestep = (block_ids == self.config.mask_token_id).float().mean(-1)
        timestep = torch.as_tensor(timestep, dtype=torch.float32, device=block_ids.device).expand(len(block_ids))
        layout = ChunkLayout(context_mask=past_key_values.context_mask(), block_mask=block_mask)
        hidden_states = self._denoise(block_ids, past_key_values, layout, self._modulations(timestep))
        return self.lm_head(hidden_states).float()

    def predict_next(self, input_ids: torch.LongTensor, past_key_values: TwoTowerCache) -> torch.Tensor:
        """
        The denoiser as an autoregressive model: without time conditioning, from one token the cache does not hold yet.

        Args:
            input_ids: (B, 1) the newest token.
            past_key_values: the context tower's cache before that token.

        Returns:
            (B, V) float32 logits of the token after it.
        """
        self._check_block(input_ids, past_key_values)
        layout = ChunkLayout(context_mask=past_key_values.context_mask())
        plain = [None] * self.config.num_hidden_layers
        return self.lm_head(self._denoise(input_ids, past_key_values, layout, plain)[:, -1]).float()

    def _denoise(
        self,
        block_ids: torch.LongTensor,
        past_key_values: TwoTowerCache,
        layout: ChunkLayout,
        modulations: list[torch.Tensor | None],
    ) -> torch.Tensor:
        pasts = [past_key_values.view(idx) for idx in range(self.config.num_hidden_layers)]
        return self.denoiser_tower(block_ids, pasts, layout, modulations)

    def _modulations(self, timestep: torch.Tensor) -> list[torch.Tensor]:
        """(R,) -> per layer (R, 3, H): shift, scale, gate."""
        offsets = self.t_block(self.t_embedder(timestep)).unflatten(-1, (3, -1))
        return [table + offsets for table in self.scale_shift_tables]

    def _diffusion_loss(
        self,
        input_ids: torch.LongTensor,
        attention_mask: torch.Tensor | None,
        labels: torch.LongTensor,
        generator: torch.Generator | None,
        weighting: LossWeighting,
    ) -> TwoTowerOutput:
        """All blocks from the first one with a label on, denoised at once from one frozen context pass."""
        # 1. Whole blocks; the padding this adds is masked out of the context and of the loss.
        size = self.config.block_size
        ids, mask, trainable = _whole_blocks(input_ids, attention_mask, labels, size)
        # 2. What each block finds in the context tower's cache.
        with torch.no_grad():
            presents = self.context_tower.read_blocks(ids, mask, size)
        # 3. Corrupt, and drop the leading blocks in which no row has a label.
        masked = sample_masked(trainable, size, generator)
        blocks = ids.shape[1] // size
        first = int(trainable.any(0).nonzero()[0]) // size if trainable.any() else blocks - 1
        block_ids = torch.where(masked, self.config.mask_token_id, ids).unflatten(1, (blocks, size))[:, first:]
        masked = masked.unflatten(1, (blocks, size))[:, first:].flatten(0, 1)
        targets = ids.unflatten(1, (blocks, size))[:, first:].flatten(0, 1)
        pasts = [_blocks_from(present, first, blocks) for present in presents]
        # 4. Denoise (R, S) and average over the masked positions.
        layout, tokens = _training_layout(mask, first, blocks, size, len(ids), ids.device)
        timestep = masked.sum(-1) / tokens.clamp(min=1)
        hidden_states = self.denoiser_tower(block_ids.flatten(0, 1), pasts, layout, self._modulations(timestep))
        loss = masked_cross_entropy(
            self.lm_head(hidden_states[masked]),
            targets[masked],
            timestep[:, None].expand_as(masked)[masked],
            weighting,
        )
        return TwoTowerOutput(loss=loss, masked_tokens=masked.sum())

    def _block_mask(
        self, attention_mask: torch.Tensor, block_ids: torch.Tensor, past_key_values: TwoTowerCache
    ) -> torch.Tensor:
        batch, length = block_ids.shape
        expected = (batch, past_key_values.width + length)
        if attention_mask.shape != expected:
            raise ValueError(
                f"attention_mask has shape {tuple(attention_mask.shape)}; a block of {length} after a context of "
                f"{past_key_values.width} columns needs {expected}"
            )
        visible = attention_mask[:, None, None, -length:].bool()
        return visible | torch.eye(length, dtype=torch.bool, device=block_ids.device)

    def _check_block(self, block_ids: torch.Tensor, past_key_values: TwoTowerCache) -> None:
        if block_ids.ndim != 2 or block_ids.shape[1] < 1:
            raise ValueError(f"block_ids has shape {tuple(block_ids.shape)}; expected (batch, block) with block >= 1")
        if past_key_values.lengths is not None and past_key_values.batch_size != len(block_ids):
            raise ValueError(
                f"block_ids has {len(block_ids)} rows, but past_key_values holds {past_key_values.batch_size}"
            )

    def reset_denoiser(self) -> None:
        """Copy the context tower and its head to the denoiser, and make time conditioning the identity."""
        self.denoiser_tower.load_state_dict(self.context_tower.state_dict())
        self.lm_head.load_state_dict(self.context_lm_head.state_dict())
        with torch.no_grad():
            self.reset_time_conditioning()

    def reset_time_conditioning(self) -> None:
        """Make time conditioning the identity (gate 1, shift and scale 0): layers compute what the backbone's do."""
        init.zeros_(self.t_block[1].weight)
        init.zeros_(self.t_block[1].bias)
        for table in self.scale_shift_tables:
            init.copy_(table, torch.tensor([0.0, 0.0, 1.0])[:, None].expand_as(table))


class TwoTowerBackbone(TwoTowerPreTrainedModel):
    """Embeddings, layers and final norm of one tower. The cache is the caller's: layers get and return their part."""

    def __init__(self, config: TwoTowerConfig):
        super().__init__(config)
        self.embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(TwoTowerLayer(config, idx) for idx in range(config.num_hidden_layers))
        self.norm_f = NemotronHRMSNorm(config.hidden_size, eps=config.layer_norm_epsilon)
        self.post_init()

    def get_input_embeddings(self) -> nn.Embedding:
        return self.embeddings

    def set_input_embeddings(self, new_embeddings: nn.Embedding) -> None:
        self.embeddings = new_embeddings


class ContextTower(TwoTowerBackbone):
    """The autoregressive tower: reads tokens causally, into the cache or for all block boundaries at once."""

    def forward(
        self,
        input_ids: torch.LongTensor,
        past_key_values: TwoTowerCache | None = None,
        counts: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """
        Read one chunk after what the cache holds, and add it to the cache.

        Args:
            input_ids: (B, T), each row's tokens first.
            past_key_values: the cache, extended in place; default none, from the beginning of the text.
            counts: (B,) tokens per row, default T.

        Returns:
            (B, T, H) normed hidden states; meaningless beyond a row's tokens.
        """
        batch, length = input_ids.shape
        mask = None if counts is None else torch.arange(length, device=input_ids.device) < counts[:, None]
        cache = past_key_values
        layout = ChunkLayout(mask, counts, None if cache is None else cache.context_mask(), causal=True)
        hidden_states = self.embeddings(input_ids)
        for idx, layer in enumerate(self.layers):
            hidden_states, present = layer(hidden_states, None if cache is None else cache.view(idx), layout)
            if cache is not None:
                cache.write(idx, present)
        if cache is not None:
            cache.advance(batch, length, counts, input_ids.device)
        return self.norm_f(hidden_states)

    def read_blocks(
        self, input_ids: torch.LongTensor, mask: torch.Tensor | None, block_size: int
    ) -> list[KeyValues | MambaState | None]:
        """
        Read whole sequences once and keep, per layer, what every block of them would find in the cache.

        Args:
            input_ids: (B, T), T a multiple of `block_size`.
            mask: (B, T) bool, True on tokens; padding on either side.
            block_size: columns per block.

        Returns:
            Per layer: keys and values (B, Hkv, T, D), or states before each block (B x T / S, ...).
        """
        block_mask = None if mask is None else _causal_over_tokens(mask)
        layout = ChunkLayout(mask, block_mask=block_mask, causal=mask is None, state_every=block_size)
        hidden_states, presents = self.embeddings(input_ids), []
        for layer in self.layers:
            hidden_states, present = layer(hidden_states, None, layout)
            presents.append(present)
        return presents


class DenoiserTower(TwoTowerBackbone):
    """The trained tower: one bidirectional-attention, forward-scan pass over a block, modulated by its timestep."""

    def forward(
        self,
        block_ids: torch.LongTensor,
        pasts: Iterable[KeyValues | MambaState | None],
        layout: ChunkLayout,
        modulations: Iterable[torch.Tensor | None],
    ) -> torch.Tensor:
        """
        Args:
            block_ids: (R, S); consecutive rows may share a row of the context.
            pasts: per layer, what the context tower holds before the block.
            layout: the blocks' [`ChunkLayout`].
            modulations: per layer (R, 3, H), or None without time conditioning.

        Returns:
            (R, S, H) normed hidden states.
        """
        hidden_states = self.embeddings(block_ids)
        for layer, past, modulation in zip(self.layers, pasts, modulations, strict=True):
            hidden_states, _ = layer(hidden_states, past, layout, modulation)
        return self.norm_f(hidden_states)


class TwoTowerMamba(NemotronHMamba2Mixer):
    """Mamba-2 mixer of a chunk, with state in and state out; its step is clamped to `time_step_limit` as NVIDIA's."""

    def __init__(self, config: TwoTowerConfig, layer_idx: int):
        super().__init__(config, layer_idx)
        self.time_step_limit = config.time_step_limit

    @force_accelerate_hooks("conv1d")
    def forward(
        self, hidden_states: torch.Tensor, past: MambaState | None, layout: ChunkLayout
    ) -> tuple[torch.Tensor, MambaState]:
        conv_state, ssm_state = past if past is not None else (None, None)
        gate, inputs, dt = self.in_proj(hidden_states).split(
            [self.intermediate_size, self.conv_dim, self.num_heads], dim=-1
        )
        dt = F.softplus(dt.float() + self.dt_bias.float()).clamp(*self.time_step_limit)
        if layout.mask is not None:
            inputs, dt = inputs * layout.mask[..., None], dt * layout.mask[..., None]
        convolved, conv_after = causal_conv(
            inputs, self.conv1d.weight.squeeze(1), self.conv1d.bias, conv_state, layout.ends, self.activation
        )
        group_size = self.n_groups * self.ssm_state_size
        x, B, C = convolved.split([self.intermediate_size, group_size, group_size], dim=-1)
        scan = ssd_scan(
            x.unflatten(-1, (self.num_heads, self.head_dim)),
            dt,
            -torch.exp(self.A_log.float()),
            B.unflatten(-1, (self.n_groups, self.ssm_state_size)),
            C.unflatten(-1, (self.n_groups, self.ssm_state_size)),
            self.D,
            ssm_state,
            layout.state_every or self.chunk_size,
            return_chunk_states=layout.state_every is not None,
        )
        y = gated_rms_norm(
            scan.y.flatten(2), gate, self.norm.weight, self.norm.group_size, self.norm.variance_epsilon
        )
        after = MambaState(conv_after, scan.state)
        if layout.state_every is not None:
            before = inputs_before_blocks(inputs, self.conv_kernel_size, layout.state_every)
            after = MambaState(before.flatten(0, 1), scan.chunk_states.flatten(0, 1))
        return self.out_proj(y), after


class TwoTowerAttention(NemotronHAttention):
    """Attention of a chunk over the context and itself; there are no position embeddings."""

    def forward(
        self, hidden_states: torch.Tensor, past: KeyValues | None, layout: ChunkLayout
    ) -> tuple[torch.Tensor, KeyValues]:
        query, key, value = (
            projection(hidden_states).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        context_key, context_value = past if past is not None else (None, None)
        attended = block_attention(
            query,
            key,
            value,
            context_key,
            context_value,
            layout.context_mask,
            layout.block_mask,
            causal=layout.causal,
            scale=self.scaling,
        )
        return self.o_proj(attended), KeyValues(key, value)


class TwoTowerRouter(NemotronHTopkRouter):
    """Expert choice in float64, as the TwoTower release computes it; the correction bias decides, but does not weigh."""

    def forward(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(..., H) -> router logits (tokens, E), weights and indices (tokens, top-k)."""
        logits = F.linear(hidden_states.flatten(0, -2).double(), self.weight.double())
        scores = logits.sigmoid()
        choice = self._without_weak_groups(scores + self.e_score_correction_bias.double())
        indices = choice.topk(self.top_k, dim=-1, sorted=False).indices
        weights = scores.gather(1, indices)
        if self.norm_topk_prob:
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        return logits, (weights * self.routed_scaling_factor).float(), indices

    def _without_weak_groups(self, choice: torch.Tensor) -> torch.Tensor:
        """Forbid experts outside the `topk_group` groups whose best two experts score highest."""
        if self.num_group == self.topk_group:
            return choice
        grouped = choice.unflatten(-1, (self.num_group, -1))
        strongest = grouped.topk(2, dim=-1).values.sum(-1).topk(self.topk_group, dim=-1, sorted=False).indices
        weak = torch.ones_like(grouped[..., 0], dtype=torch.bool).scatter(1, strongest, False)
        return grouped.masked_fill(weak[..., None], -torch.inf).flatten(-2)


class TwoTowerMoE(NemotronHMoE):
    """transformers' mixture of experts with our router."""

    def __init__(self, config: TwoTowerConfig, layer_idx: int):
        super().__init__(config, layer_idx)
        self.gate = TwoTowerRouter(config)


STATEFUL_MIXERS = {"linear_attention": TwoTowerMamba, "full_attention": TwoTowerAttention}
STATELESS_MIXERS = {"moe": TwoTowerMoE, "mlp": NemotronHMLP}


class TwoTowerLayer(GradientCheckpointingLayer):
    """One pre-norm residual layer: x + gate * mixer(modulated norm(x))."""

    def __init__(self, config: TwoTowerConfig, layer_idx: int):
        super().__init__()
        kind = config.layers_block_type[layer_idx]
        self.stateful = kind in STATEFUL_MIXERS
        self.norm = NemotronHRMSNorm(config.hidden_size, eps=config.layer_norm_epsilon)
        self.mixer = (STATEFUL_MIXERS | STATELESS_MIXERS)[kind](config, layer_idx=layer_idx)

    def forward(
        self,
        hidden_states: torch.Tensor,
        past: KeyValues | MambaState | None,
        layout: ChunkLayout,
        modulation: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, KeyValues | MambaState | None]:
        """
        Args:
            hidden_states: (B, T, H).
            past: what the same layer of the context tower holds.
            layout: the chunk's [`ChunkLayout`].
            modulation: (B, 3, H) shift, scale and gate; None for a plain layer.

        Returns:
            (B, T, H) and what the layer adds to the cache.
        """
        mixer_input, gate = self._modulated_norm(hidden_states, modulation)
        if self.stateful:
            mixed, present = self.mixer(mixer_input, past, layout)
        else:
            mixed, present = self.mixer(mixer_input), None
        return hidden_states + (mixed if gate is None else gate * mixed), present

    def _modulated_norm(
        self, hidden_states: torch.Tensor, modulation: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        if modulation is None:
            return self.norm(hidden_states), None
        shift, scale, gate = modulation[:, :, None].unbind(1)
        if self.stateful:
            return self.norm(hidden_states * (1 + scale) + shift), gate
        return self.norm(hidden_states) * (1 + scale) + shift, gate


class TimestepEmbedder(nn.Module):
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

    def forward(self, timestep: torch.Tensor) -> torch.Tensor:
        """(B,) in [0, 1]; rounded to the model's dtype before it is scaled, as NVIDIA's code does."""
        dtype = self.mlp[0].weight.dtype
        half = torch.arange(self.features // 2, device=timestep.device, dtype=torch.float32)
        frequencies = torch.exp(half * (-2 / self.features) * torch.log(torch.tensor(self.max_period)))
        angles = (timestep.to(dtype) * self.scale).float()[:, None] * frequencies
        return self.mlp(torch.cat([angles.cos(), angles.sin()], dim=-1).to(dtype))


def _whole_blocks(
    input_ids: torch.Tensor, attention_mask: torch.Tensor | None, labels: torch.Tensor, size: int
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
    """Pad on the right to a multiple of `size`: ids, mask of tokens (None when all are), and trainable positions."""
    if labels.shape != input_ids.shape:
        raise ValueError(f"labels have shape {tuple(labels.shape)}, input_ids {tuple(input_ids.shape)}; make them equal")
    mask = check_attention_mask(input_ids, attention_mask)
    trainable = labels != -100 if mask is None else (labels != -100) & mask
    padding = -input_ids.shape[1] % size
    if padding:
        mask = torch.ones_like(trainable) if mask is None else mask
        input_ids, mask, trainable = (F.pad(tensor, (0, padding)) for tensor in (input_ids, mask, trainable))
    return input_ids, mask, trainable


def _blocks_from(
    present: KeyValues | MambaState | None, first: int, blocks: int
) -> KeyValues | MambaState | None:
    """What blocks `first` and later need of a layer: states of those blocks, keys and values of all columns."""
    if not isinstance(present, MambaState):
        return present
    return MambaState(*(part.unflatten(0, (-1, blocks))[:, first:].flatten(0, 1) for part in present))


def _training_layout(
    mask: torch.Tensor | None, first: int, blocks: int, size: int, batch: int, device: torch.device
) -> tuple[ChunkLayout, torch.Tensor]:
    """Layout of blocks `first` and later, folded into rows (R, S), and how many tokens each row has (R,)."""
    if mask is None:
        mask = torch.ones(batch, blocks * size, dtype=torch.bool, device=device)
    starts = torch.arange(first, blocks, device=device) * size
    before = torch.arange(blocks * size, device=device) < starts[:, None]
    context_mask = (before & mask[:, None]).flatten(0, 1)[:, None, None]
    tokens = mask.unflatten(1, (blocks, size))[:, first:].flatten(0, 1)
    block_mask = tokens[:, None, None] | torch.eye(size, dtype=torch.bool, device=device)
    return ChunkLayout(tokens, None, context_mask, block_mask), tokens.sum(-1)


def _causal_over_tokens(mask: torch.Tensor) -> torch.Tensor:
    """(B, T) -> (B, 1, T, T): earlier tokens and, so that no column sees nothing, itself."""
    columns = torch.arange(mask.shape[1], device=mask.device)
    earlier = columns < columns[:, None]
    return (earlier & mask[:, None]).logical_or_(columns == columns[:, None])[:, None]


def _register_checkpoint_layout() -> None:
    """NVIDIA stores one matrix per expert, transformers one tensor per layer: convert on load, and back on save."""
    merge_experts = [
        conversion
        for conversion in get_checkpoint_conversion_mapping("nemotron_h")
        if isinstance(conversion, WeightConverter)
    ]
    register_checkpoint_conversion_mapping(TwoTowerConfig.model_type, merge_experts, overwrite=True)


_register_checkpoint_layout()
AutoModel.register(TwoTowerConfig, TwoTowerForBlockDiffusion, exist_ok=True)
AutoModelForCausalLM.register(TwoTowerConfig, TwoTowerForBlockDiffusion, exist_ok=True)

__all__ = ["ContextTower", "DenoiserTower", "TwoTowerForBlockDiffusion", "TwoTowerOutput", "TwoTowerPreTrainedModel"]

"""What causal-conv1d and flash-attn promise of the functions we call, in torch, as their documentation says it.

They refuse what the packages refuse, so that what our adapters pass is checked: shapes, dtypes, strides.
"""

import torch
import torch.nn.functional as F


class CausalConv1d:
    """causal-conv1d 1.7: signatures of `causal_conv1d_interface.py`, checks of `csrc/causal_conv1d.cpp`."""

    def __init__(self):
        self.calls = []

    def causal_conv1d_fn(
        self,
        x,
        weight,
        bias=None,
        seq_idx=None,
        initial_states=None,
        return_final_states=False,
        final_states_out=None,
        activation=None,
    ):
        """x (B, C, T), initial_states (B, C, K - 1) -> (B, C, T)."""
        self.calls.append("fn")
        batch, channels = x.shape[:2]
        assert seq_idx is None and final_states_out is None and not return_final_states
        assert activation in (None, "silu", "swish")
        assert x.stride(2) == 1 or x.stride(1) == 1
        channel_last = x.stride(1) == 1 and x.stride(2) > 1
        if channel_last:
            assert channels % 8 == 0 and x.stride(2) % 8 == 0 and x.stride(0) % 8 == 0
        self.check_filters(weight, bias, channels)
        taps = weight.shape[1]
        if initial_states is None:
            initial_states = x.new_zeros(batch, channels, taps - 1)
        else:
            assert channel_last and initial_states.stride(1) == 1
            assert initial_states.shape == (batch, channels, taps - 1)
            assert initial_states.dtype == x.dtype
        return self.convolve(torch.cat([initial_states, x], dim=-1), weight, bias, activation, x.dtype)

    def causal_conv1d_update(
        self, x, conv_state, weight, bias=None, activation=None, cache_seqlens=None, conv_state_indices=None
    ):
        """x (B, C), conv_state (B, C, K - 1 or more) which is written to -> (B, C)."""
        self.calls.append("update")
        assert cache_seqlens is None and conv_state_indices is None
        assert activation in (None, "silu", "swish")
        assert x.ndim == 2 and conv_state.shape[:2] == x.shape and conv_state.dtype == x.dtype
        assert conv_state.shape[2] >= weight.shape[1] - 1
        self.check_filters(weight, bias, x.shape[1])
        inputs = torch.cat([conv_state, x[..., None]], dim=-1)
        conv_state.copy_(inputs[..., 1:])
        return self.convolve(inputs[..., -weight.shape[1] :], weight, bias, activation, x.dtype)[..., 0]

    def check_filters(self, weight, bias, channels):
        assert weight.shape[0] == channels and 2 <= weight.shape[1] <= 4
        assert bias is None or (bias.dtype == weight.dtype and bias.shape == (channels,) and bias.stride(-1) == 1)

    def convolve(self, inputs, weight, bias, activation, dtype):
        bias = None if bias is None else bias.float()
        y = F.conv1d(inputs.float(), weight.float()[:, None], bias, groups=len(weight))
        return (F.silu(y) if activation else y).to(dtype)


class FlashAttn:
    """flash-attn 2.8: the docstring of `flash_attn_with_kvcache`, and the +inf of its source where nothing is seen."""

    def __init__(self):
        self.calls = []

    def flash_attn_with_kvcache(
        self,
        q,
        k_cache,
        v_cache,
        k=None,
        v=None,
        rotary_cos=None,
        rotary_sin=None,
        cache_seqlens=None,
        cache_batch_idx=None,
        cache_leftpad=None,
        block_table=None,
        softmax_scale=None,
        causal=False,
        window_size=(-1, -1),
        softcap=0.0,
        rotary_interleaved=True,
        alibi_slopes=None,
        num_splits=0,
        return_softmax_lse=False,
    ):
        """q (B, S, Hq, D), k_cache and v_cache (B, L, Hkv, D) -> (B, S, Hq, D), and (B, Hq, S)."""
        self.calls.append(causal)
        batch, queries, heads, width = q.shape
        columns = k_cache.shape[1]
        assert q.dtype in (torch.bfloat16, torch.float16) and k_cache.dtype == v_cache.dtype == q.dtype
        assert k_cache.stride(-1) == v_cache.stride(-1) == 1 and width <= 256
        assert k_cache.shape == v_cache.shape and len(k_cache) == batch and heads % k_cache.shape[2] == 0
        if cache_seqlens is None:
            cache_seqlens = torch.full((batch,), columns, dtype=torch.int32)
        assert cache_seqlens.dtype == torch.int32 and cache_seqlens.shape == (batch,)
        assert cache_seqlens.max() <= columns
        lengths = cache_seqlens.long()[:, None, None]
        column = torch.arange(columns)
        seen = column < lengths
        if causal:  # aligned to the bottom right
            seen = seen & (column <= torch.arange(queries)[:, None] + lengths - queries)
        keys, values = (part.float().repeat_interleave(heads // part.shape[2], dim=2) for part in (k_cache, v_cache))
        scores = torch.einsum("bshd,blhd->bhsl", q.float(), keys) * (softmax_scale or width**-0.5)
        scores = scores.masked_fill(~seen[:, None], -torch.inf)
        log_sums = scores.logsumexp(-1)
        weights = (scores - log_sums[..., None]).exp().nan_to_num(0.0)
        out = torch.einsum("bhsl,blhd->bshd", weights, values).to(q.dtype)
        log_sums = torch.where(log_sums == -torch.inf, torch.inf, log_sums)
        return (out, log_sums) if return_softmax_lse else out

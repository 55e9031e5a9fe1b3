"""block_attention against the equation written out in float64, and against transformers' eager attention."""

from types import SimpleNamespace

import pytest
import torch
from tolerances import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.models.nemotron_h.modeling_nemotron_h import eager_attention_forward

from twotower.kernels.block_attention import block_attention, block_attention_reference

HEADS, HEAD_DIM = 4, 7
# In bfloat16 the scores and the weights are rounded as well, as in transformers' eager attention.
SLACK = {torch.float32: 1.0, torch.bfloat16: 4.0}


def draw(batch=3, length=5, context=11, kv_heads=2, context_rows=None, dtype=torch.float32):
    """Query, key, value, context key and context value."""
    torch.manual_seed(batch + length + context)
    rows = batch if context_rows is None else context_rows
    shapes = [(batch, HEADS, length)] + [(batch, kv_heads, length)] * 2 + [(rows, kv_heads, context)] * 2
    return [torch.randn(*shape, HEAD_DIM).to(dtype) for shape in shapes]


def written_out(query, key, value, context_key=None, context_value=None, visible=None, scale=HEAD_DIM**-0.5):
    """softmax(Q K^T scale) V over context and block, head by head; `visible` (B, S, L + S)."""
    batch, length = query.shape[0], query.shape[2]
    out = torch.empty(batch, length, HEADS, HEAD_DIM, dtype=torch.float64)
    for row in range(batch):
        for head in range(HEADS):
            group = head // (HEADS // key.shape[1])
            keys, values = key[row, group], value[row, group]
            if context_key is not None:
                shared = row // (batch // len(context_key))
                keys = torch.cat([context_key[shared, group], keys])
                values = torch.cat([context_value[shared, group], values])
            scores = query[row, head].double() @ keys.double().T * scale
            if visible is not None:
                scores = scores.masked_fill(~visible[row], -torch.inf)
            out[row, :, head] = scores.softmax(-1) @ values.double()
    return out.flatten(2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kv_heads", [1, 2, HEADS])
@pytest.mark.parametrize("context", [1, 11, 64])
@pytest.mark.parametrize("length", [1, 5, 40])
def test_every_query_sees_context_and_block(length, context, kv_heads, dtype):
    tensors = draw(2, length, context, kv_heads, dtype=dtype)
    out = block_attention(*tensors)
    assert out.dtype == dtype
    assert_close(out, written_out(*tensors), dtype, slack=SLACK[dtype])


@pytest.mark.parametrize("length", [1, 5])
def test_without_context(length):
    query, key, value, _, _ = draw(length=length)
    expected = written_out(query, key, value)
    assert_close(block_attention(query, key, value), expected, torch.float32)
    empty = key[:, :, :0]
    assert_close(block_attention(query, key, value, empty, empty), expected, torch.float32)


@pytest.mark.parametrize("context", [0, 11])
@pytest.mark.parametrize("length", [1, 5])
def test_causal(length, context):
    tensors = draw(length=length, context=context)
    triangle = torch.ones(length, length, dtype=torch.bool).tril()
    visible = torch.cat([torch.ones(length, context, dtype=torch.bool), triangle], dim=1).expand(3, -1, -1)
    assert_close(block_attention(*tensors, causal=True), written_out(*tensors, visible), torch.float32)


@pytest.mark.parametrize("context", [0, 11])
def test_masks(context):
    tensors = draw(context=context)
    torch.manual_seed(0)
    context_mask = torch.rand(3, 1, 1, context) < 0.5
    block_mask = torch.rand(3, 1, 5, 5) < 0.5
    block_mask |= torch.eye(5, dtype=torch.bool)
    visible = torch.cat([context_mask.expand(-1, -1, 5, -1), block_mask], dim=-1)[:, 0]
    out = block_attention(*tensors, context_mask=context_mask, block_mask=block_mask)
    assert_close(out, written_out(*tensors, visible), torch.float32)


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("length", [1, 5])
def test_context_and_block_as_one_run_of_columns(length, masked):
    query, key, value, context_key, context_value = tensors = draw(length=length)
    keys, values = torch.cat([context_key, key], dim=2), torch.cat([context_value, value], dim=2)
    visible = torch.ones(3, length, 11 + length, dtype=torch.bool).tril(11) if masked else None
    mask = None if visible is None else visible[:, None]
    expected = written_out(*tensors, visible)
    assert_close(block_attention(query, keys, values, block_mask=mask), expected, torch.float32)
    # What other devices than a CPU compute with a mask.
    grouped = block_attention_reference(query, [(keys, values, mask)]).transpose(1, 2).flatten(2)
    assert_close(grouped, expected, torch.float32)


def test_a_row_may_see_no_context_at_all():
    tensors = draw()
    context_mask = torch.ones(3, 1, 1, 11, dtype=torch.bool)
    context_mask[1] = False
    out = block_attention(*tensors, context_mask=context_mask)
    assert_close(out[1:2], written_out(*(tensor[1:2] for tensor in tensors[:3])), torch.float32)


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("shared_by", [2, 3])
@pytest.mark.parametrize("rows", [1, 2])
def test_consecutive_rows_share_a_context_row(rows, shared_by, masked):
    tensors = draw(batch=rows * shared_by, context_rows=rows)
    repeated = [*tensors[:3], *(tensor.repeat_interleave(shared_by, dim=0) for tensor in tensors[3:])]
    context_mask = None
    if masked:
        context_mask = torch.arange(11) < torch.arange(1, rows * shared_by + 1)[:, None, None, None]
    out = block_attention(*tensors, context_mask=context_mask)
    assert_close(out, block_attention(*repeated, context_mask=context_mask))
    if not masked:
        assert_close(out, written_out(*tensors), torch.float32)


def test_the_scale_is_an_argument():
    tensors = draw()
    assert_close(block_attention(*tensors, scale=0.9), written_out(*tensors, scale=0.9), torch.float32)
    query, key, value, _, _ = tensors
    assert_close(
        block_attention(query, key, value, scale=0.9), written_out(query, key, value, scale=0.9), torch.float32
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equals_transformers(dtype):
    query, key, value, context_key, context_value = tensors = draw(dtype=dtype)
    module = SimpleNamespace(num_key_value_groups=HEADS // 2, training=False)
    keys, values = torch.cat([context_key, key], dim=2), torch.cat([context_value, value], dim=2)
    expected, _ = eager_attention_forward(module, query, keys, values, None, HEAD_DIM**-0.5)
    assert_close(block_attention(*tensors), expected.flatten(2), slack=SLACK[dtype])


def test_large_scores_stay_finite():
    query, *rest = draw()
    tensors = [query * 1e4, *rest]
    assert_close(block_attention(*tensors), written_out(*tensors), torch.bfloat16)


class SoftmaxDtypes(TorchDispatchMode):
    """Notes in which dtype each softmax is computed."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if function is torch.ops.aten._softmax.default:
            self.seen.append(result.dtype)
        return result


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("causal", [False, True])
def test_the_softmax_of_half_precision_is_in_float32(dtype, causal):
    """Its weights are rounded once, when they meet the values."""
    tensors = draw(dtype=dtype)
    with SoftmaxDtypes() as softmax:
        assert block_attention(*tensors, causal=causal).dtype == dtype
    assert softmax.seen == [torch.float32]


@pytest.mark.parametrize("context_rows", [1, 2])
def test_gradients_equal_those_of_the_equation(context_rows):
    tensors = [tensor.requires_grad_() for tensor in draw(batch=4, context_rows=context_rows)]
    gradients = torch.autograd.grad(block_attention(*tensors).square().sum(), tensors)
    expected = torch.autograd.grad(written_out(*tensors).square().sum(), tensors)
    for gradient, expected_gradient in zip(gradients, expected, strict=True):
        assert_close(gradient, expected_gradient, torch.float32)


def test_causal_and_a_block_mask_are_refused_together():
    tensors = draw()
    with pytest.raises(ValueError, match=r"causal=True and a block_mask"):
        block_attention(*tensors, block_mask=torch.ones(1, 1, 5, 5, dtype=torch.bool), causal=True)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("tokens", [1, 5])
def test_the_eager_backend_computes_the_same_without_torchs_kernel(causal, tokens, monkeypatch):
    query, key, value = (torch.randn(2, heads, tokens, 8, dtype=torch.float64) for heads in (4, 2, 2))
    expected = block_attention(query, key, value, causal=causal)
    monkeypatch.delattr(torch.nn.functional, "scaled_dot_product_attention")
    torch.testing.assert_close(block_attention(query, key, value, causal=causal, backend="eager"), expected)

"""block_attention against the equation written out in float64, and against transformers' eager attention."""

import gc
import weakref
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from tolerances import assert_close
from torch._dynamo.testing import CompileCounter
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers.models.nemotron_h.modeling_nemotron_h import eager_attention_forward

from twotower.kernels.block_attention import JOINED, Columns, block_attention, block_attention_reference

HEADS, HEAD_DIM = 4, 7
# In bfloat16 the scores and the weights are rounded as well, as in transformers' eager attention.
SLACK = {torch.float64: 1.0, torch.float32: 1.0, torch.bfloat16: 4.0}
BACKENDS = ["sdpa", "eager"]


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


def seen(batch, length, context, lengths=None, context_mask=None, block_mask=None, causal=False):
    """(B, S, L + S), what the arguments of these names say."""
    of_context = torch.ones(batch, length, context, dtype=torch.bool)
    if lengths is not None:
        of_context &= (torch.arange(context) < torch.tensor(lengths)[:, None])[:, None]
    if context_mask is not None:
        of_context &= context_mask.repeat_interleave(batch // len(context_mask), dim=0)[:, None]
    of_block = torch.ones(batch, length, length, dtype=torch.bool)
    if causal:
        of_block = of_block.tril()
    if block_mask is not None:
        of_block &= block_mask[:, None]
    return torch.cat([of_context, of_block], dim=-1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kv_heads", [1, 2, HEADS])
@pytest.mark.parametrize("context", [1, 11, 64])
@pytest.mark.parametrize("length", [1, 5, 40])
def test_every_query_sees_context_and_block(length, context, kv_heads, dtype):
    tensors = draw(2, length, context, kv_heads, dtype=dtype)
    out = block_attention(*tensors)
    assert out.dtype == dtype
    assert_close(out, written_out(*tensors), dtype, slack=SLACK[dtype])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("lengths", [None, (0, 7), (300, 0), (1, 299), (0, 0)])
@pytest.mark.parametrize("context", [300, 11])
@pytest.mark.parametrize("length", [2, 17])
def test_rows_of_their_own_lengths(length, context, lengths, causal, dtype, backend):
    """Over more columns than are joined and over fewer; of rows that have none, too."""
    tensors = draw(2, length, context, dtype=dtype)
    assert (context + length > JOINED) == (context == 300)
    given = None if lengths is None else torch.tensor(lengths).clamp(max=context)
    out = block_attention(*tensors, given, causal=causal, backend=backend)
    expected = written_out(*tensors, seen(2, length, context, lengths, causal=causal))
    # The mean of 300 values is small, and rounded scores are as far off as those of few.
    wider = 2.0 if backend == "eager" and context == 300 else 1.0
    assert_close(out, expected, dtype, slack=SLACK[dtype] * wider)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kv_heads", [1, 2, HEADS])
@pytest.mark.parametrize("columns", [50, 300])
@pytest.mark.parametrize("length", [1, 5])
@pytest.mark.parametrize("ragged", [False, True])
def test_a_chunk_among_its_contexts_columns(ragged, length, columns, kv_heads, backend):
    query, _, _, key, value = draw(2, length, columns, kv_heads, dtype=torch.float64)
    lengths = (columns // 3, 0) if ragged else (columns - length,) * 2
    out = block_attention(
        query, None, None, key, value, torch.tensor(lengths) if ragged else None, causal=True, backend=backend
    )
    last = torch.tensor(lengths)[:, None] + torch.arange(length)
    visible = torch.arange(columns) <= last[..., None]
    assert_close(out, written_out(query, key, value, visible=visible))


@pytest.mark.parametrize("tile", [1, 2, 5, 16, 35, 36, 1000])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("lengths", [None, (30, 0, 4), (10, 31, 5)])
def test_tiles_of_any_width_sum_to_the_equation(lengths, causal, tile):
    """Widths that divide a run and that do not, tiles of which a row sees nothing, first ones and last ones."""
    tensors = draw(3, 5, 31, dtype=torch.float64)
    given = None if lengths is None else torch.tensor(lengths)
    runs = [Columns(*tensors[3:], given), Columns(*tensors[1:3], causal=causal)]
    out = block_attention_reference(tensors[0], runs, tile_scores=tile * 3 * HEADS * 5)
    assert_close(out.transpose(1, 2).flatten(2), written_out(*tensors, seen(3, 5, 31, lengths, causal=causal)))


def test_tiles_of_scores_that_grow_and_shrink_stay_finite():
    query, key, value, context_key, context_value = draw(1, 3, 40, dtype=torch.float64)
    context_key = context_key * torch.linspace(-300, 300, 40, dtype=torch.float64)[:, None]
    runs = [Columns(context_key, context_value), Columns(key, value)]
    out = block_attention_reference(query, runs, tile_scores=4 * HEADS * 3)
    expected = written_out(query, key, value, context_key, context_value)
    assert_close(out.transpose(1, 2).flatten(2), expected)


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


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("context", [0, 11, 300])
def test_masks(context, causal, backend):
    tensors = draw(context=context)
    torch.manual_seed(0)
    context_mask = torch.rand(3, context) < 0.5
    block_mask = torch.rand(3, 5) < 0.5
    block_mask[:, 0] = True
    visible = seen(3, 5, context, None, context_mask, block_mask, causal)
    out = block_attention(*tensors, None, context_mask, block_mask, causal=causal, backend=backend)
    assert_close(out, written_out(*tensors, visible), torch.float32)


def test_a_causal_chunk_whose_first_columns_hold_no_token():
    """Its first queries see only the context, which is long enough to be attended to apart."""
    tensors = draw(length=170, context=7)
    block_mask = torch.arange(170).expand(3, -1) >= 2
    visible = seen(3, 170, 7, block_mask=block_mask, causal=True)
    out = block_attention(*tensors, block_mask=block_mask, causal=True)
    assert_close(out, written_out(*tensors, visible), torch.float32)


def test_a_row_may_see_no_context_at_all():
    for context in (11, 300):
        tensors = draw(context=context)
        expected = written_out(*(tensor[1:2] for tensor in tensors[:3]))
        for lengths, mask in ((torch.tensor([context, 0, 3]), None), (None, torch.zeros(3, context) > 0)):
            out = block_attention(*tensors, lengths, mask)
            assert_close(out[1:2], expected, torch.float32)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("context", [0, 11, 300])
def test_what_sees_nothing_is_finite(context, causal, backend):
    """As what is computed on padding has to be: a state-space layer multiplies it by 0."""
    nothing = torch.zeros(3, 5, dtype=torch.bool)
    out = block_attention(
        *draw(context=context), torch.zeros(3, dtype=torch.long), None, nothing, causal=causal, backend=backend
    )
    assert out.isfinite().all()


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("shared_by", [1, 2, 3])
@pytest.mark.parametrize("rows", [1, 2])
def test_consecutive_rows_share_a_context_row(rows, shared_by, masked):
    tensors = draw(batch=rows * shared_by, context_rows=rows)
    lengths = mask = None
    if masked:
        lengths = torch.arange(1, rows * shared_by + 1)
        mask = torch.arange(11) >= torch.arange(rows)[:, None]
    visible = seen(rows * shared_by, 5, 11, None if lengths is None else lengths.tolist(), mask)
    expected = written_out(*tensors, visible)
    assert_close(block_attention(*tensors, lengths, mask), expected, torch.float32)
    runs = [Columns(*tensors[3:], lengths, mask), Columns(*tensors[1:3])]
    tiled = block_attention_reference(tensors[0], runs, tile_scores=3 * rows * shared_by * HEADS * 5)
    assert_close(tiled.transpose(1, 2).flatten(2), expected, torch.float32)


@torch.no_grad()
def test_layers_of_a_pass_share_a_mask():
    masks, lengths = {}, torch.tensor([3, 11, 0])
    layers = [draw(), draw(kv_heads=1)]
    for layer in layers:
        assert_close(block_attention(*layer, lengths, masks=masks), block_attention(*layer, lengths))
    ((device, (columns, mask)),) = masks.items()
    assert (device, columns) == (torch.device("cpu"), 16)
    assert mask.shape == (3, 1, 1, 16)
    # It is what is looked at, for as many columns.
    masks[device] = columns, torch.ones_like(mask)
    assert_close(block_attention(*layers[0], lengths, masks=masks), block_attention(*layers[0]))
    fewer = draw(context=4)
    assert_close(block_attention(*fewer, lengths % 5, masks=masks), block_attention(*fewer, lengths % 5))


class TwoLayers(torch.nn.Module):
    def forward(self, query, key, value, mask):
        masks = {}
        first, second = (
            block_attention(query * n, key, value, block_mask=mask, causal=True, masks=masks) for n in (1, 2)
        )
        return first + second


@pytest.mark.parametrize("way", ["compile", "export", "make_fx"])
@torch.no_grad()
def test_a_shared_mask_leaves_lengths_dynamic(way):
    def inputs(length):
        return *draw(length=length)[:3], torch.arange(length).expand(3, length) > 1

    if way == "compile":
        counter = CompileCounter()
        traced = torch.compile(TwoLayers(), backend=counter, dynamic=True, fullgraph=True)
    elif way == "export":
        n = torch.export.Dim("n", min=2, max=100)
        traced = torch.export.export(TwoLayers(), inputs(7), dynamic_shapes=({2: n}, {2: n}, {2: n}, {1: n})).module()
    else:
        traced = make_fx(TwoLayers(), tracing_mode="symbolic")(*inputs(7))
    for length in (5, 9, 12):
        assert_close(traced(*inputs(length)), TwoLayers()(*inputs(length)))
    assert way != "compile" or counter.frame_count == 1


def test_the_scale_is_an_argument():
    for context in (11, 300):
        tensors = draw(context=context)
        for backend in BACKENDS:
            out = block_attention(*tensors, scale=0.9, backend=backend)
            assert_close(out, written_out(*tensors, scale=0.9), torch.float32)
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


@pytest.mark.parametrize("context", [11, 300])
def test_large_scores_stay_finite(context):
    query, *rest = draw(context=context)
    tensors = [query * 1e4, *rest]
    assert_close(block_attention(*tensors), written_out(*tensors), torch.bfloat16)


class SoftmaxDtypes(TorchDispatchMode):
    """Notes in which dtype each softmax is computed."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if function in (torch.ops.aten._softmax.default, torch.ops.aten.exp_.default):
            self.seen.append(result.dtype)
        return result


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("causal", [False, True])
def test_the_softmax_of_half_precision_is_in_float32(dtype, causal):
    """Its weights are rounded once, when they meet the values."""
    tensors = draw(dtype=dtype)
    with SoftmaxDtypes() as softmax:
        assert block_attention(*tensors, causal=causal, backend="eager").dtype == dtype
    assert softmax.seen == [torch.float32]
    with SoftmaxDtypes() as softmax:
        runs = [Columns(*tensors[3:]), Columns(*tensors[1:3], causal=causal)]
        assert block_attention_reference(tensors[0], runs, tile_scores=200).dtype == dtype
    assert set(softmax.seen) == {torch.float32}


@pytest.mark.parametrize("context", [11, 300])
@pytest.mark.parametrize("context_rows", [1, 2, 4])
def test_gradients_equal_those_of_the_equation(context_rows, context):
    tensors = [tensor.requires_grad_() for tensor in draw(4, context=context, context_rows=context_rows)]
    gradients = torch.autograd.grad(block_attention(*tensors).square().sum(), tensors)
    expected = torch.autograd.grad(written_out(*tensors).square().sum(), tensors)
    for gradient, expected_gradient in zip(gradients, expected, strict=True):
        assert_close(gradient, expected_gradient, torch.float32)


@pytest.mark.parametrize("tile_scores", [40 * HEADS, 10**9])
@pytest.mark.parametrize("causal", [False, True])
def test_gradients_by_differences(causal, tile_scores):
    tensors = [tensor.requires_grad_() for tensor in draw(4, 2, 9, context_rows=2, dtype=torch.float64)]

    def attend(query, key, value, context_key, context_value):
        context = Columns(context_key, context_value, torch.tensor([9, 0, 5, 8]), torch.arange(9)[None] > 0)
        runs = [context, Columns(key, value, causal=causal)]
        return block_attention_reference(query, runs, tile_scores=tile_scores)

    assert torch.autograd.gradcheck(attend, tensors, fast_mode=True)


@pytest.mark.parametrize("wanted", range(5))
def test_whose_gradient_is_wanted_does_not_change_the_result(wanted):
    """torch's kernels have no gradient of what their results are merged by."""
    tensors = draw(2, 5, 300, dtype=torch.float64)
    expected = block_attention(*tensors)
    tensors[wanted].requires_grad_()
    out = block_attention(*tensors)
    assert_close(out, expected)
    (gradient,) = torch.autograd.grad(out.square().sum(), tensors[wanted])
    (expected,) = torch.autograd.grad(written_out(*tensors).square().sum(), tensors[wanted])
    assert_close(gradient, expected)


def test_a_chunk_without_columns_of_its_own_is_causal_and_has_a_context():
    query, key, value, _, _ = draw()
    for arguments in ({}, {"context_key": key[:, :, :0], "context_value": value[:, :, :0]}):
        with pytest.raises(ValueError, match="leave them out of a causal chunk with a context only"):
            block_attention(query, None, None, **arguments, causal=True)
    with pytest.raises(ValueError, match="leave them out of a causal chunk with a context only"):
        block_attention(query, None, None, key, value)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("tokens", [1, 5])
def test_the_eager_backend_computes_the_same_without_torchs_kernel(causal, tokens, monkeypatch):
    query, key, value = (torch.randn(2, heads, tokens, 8, dtype=torch.float64) for heads in (4, 2, 2))
    expected = block_attention(query, key, value, causal=causal)
    monkeypatch.delattr(torch.nn.functional, "scaled_dot_product_attention")
    torch.testing.assert_close(block_attention(query, key, value, causal=causal, backend="eager"), expected)


class LiveBytes(TorchDispatchMode):
    """How many bytes of tensors made within are alive, at most, by their shapes; views are not counted."""

    def __init__(self):
        super().__init__()
        self.alive, self.peak, self.known = 0, 0, {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        given = {id(leaf.untyped_storage()) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)}
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self.count(leaf.untyped_storage(), given)
        self.peak = max(self.peak, self.alive)
        return result

    def count(self, storage, given):
        if id(storage) in given or id(storage) in self.known:
            return
        size, place = storage.nbytes(), id(storage)
        self.alive += size

        def free():
            self.alive -= size
            del self.known[place]

        self.known[place] = weakref.finalize(storage, free)


@pytest.mark.parametrize(
    ("device", "backend", "ragged"),
    [("cpu", "sdpa", False), ("cpu", "sdpa", True), ("meta", "sdpa", True), ("meta", "eager", False)],
)
def test_a_chunk_behind_a_long_context_needs_little(device, backend, ragged):
    """2,048 tokens behind 129K at the released geometry: 138 GB where all scores are held."""
    heads, kv_heads, chunk, context, head_dim = 32, 2, 2048, 129 * 1024, 128
    gc.collect()
    with FakeTensorMode() if device == "cpu" else nullcontext(), torch.device(device):
        query, key, value, *columns = (
            torch.empty(1, count, length, head_dim, dtype=torch.bfloat16)
            for count, length in [(heads, chunk)] + [(kv_heads, chunk)] * 2 + [(kv_heads, context)] * 2
        )
        lengths = torch.empty(1, dtype=torch.long) if ragged else None
        with LiveBytes() as used:
            out = block_attention(query, key, value, *columns, lengths, causal=True, backend=backend)
    assert out.shape == (1, chunk, heads * head_dim)
    assert out.numel() * 2 < used.peak < 1e9


def test_a_short_context_s_scores_are_held_at_once():
    """That the count above would see scores: those of 64 columns are more than all else there is."""
    with LiveBytes() as used:
        block_attention(*draw(1, 40, 600), backend="eager")
    assert used.peak > 40 * HEADS * 640 * 4


def test_torchs_flash_attention_for_cpus_is_what_we_call():
    """It is not part of torch's documented interface."""
    schema = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default._schema
    assert [argument.name for argument in schema.arguments] == [
        "query",
        "key",
        "value",
        "dropout_p",
        "is_causal",
        "attn_mask",
        "scale",
    ]
    assert [result.name for result in schema.returns] == ["output", "logsumexp"]
    nothing = torch.full((1, 1, 1, 4), -torch.inf)
    key = torch.randn(1, 2, 4, 8)
    out, sums = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(key, key, key, attn_mask=nothing)
    assert out.abs().max() == sums.abs().max() == 0, "for which we put the least number there is"

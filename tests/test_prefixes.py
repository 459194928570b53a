"""Documents that share their beginnings: laid out as a tree, computed once, equal to documents that stand alone."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from mini_forge.data.batches import Document, collate
from mini_forge.data.prefixes import LEAST_SAVED_TOKENS, Segment, plan_segments
from mini_forge.model.functional import attention as plain_attention
from mini_forge.model.lora import LoraSpec, inject, lora_layers
from mini_forge.model.masks import Documents, document_positions
from mini_forge.model.ops import PLAIN
from mini_forge.providers import PROVIDERS
from mini_forge.training.reward import whole_documents
from mini_forge_kernels import attention as fused
from mini_forge_kernels.attention import attention as fused_attention
from mini_forge_kernels.attention import pieces
from tests.tiny import random_model
from tests.tiny_experts import CONFIGS as EXPERTS
from tests.tiny_experts import SHARED

SYSTEM, ASK, OTHER = list(range(100, 120)), list(range(30, 47)), list(range(60, 79))


def document(prompt, response, line=1):
    ids = np.array([*prompt, *response], dtype=np.int32)
    return Document(ids, np.arange(len(ids)) >= len(prompt), line)


PAIRS = [
    document(SYSTEM + ASK, [1, 2, 3]),
    document(SYSTEM + OTHER, [4]),
    document(SYSTEM + ASK, [5, 6], line=2),
    document([9, 8], [7, 6, 5]),
    document(SYSTEM + OTHER, [4, 4, 4], line=3),
]


def test_the_tree_of_documents_by_hand():
    """The two prompts share the system prompt, each two responses a prompt but for its last token, whose target is the
    response's first; the fourth document shares nothing."""
    inputs = [d.ids[:-1] for d in PAIRS]
    limits = [int(d.is_trained.argmax()) - 1 for d in PAIRS]
    assert plan_segments(inputs, limits) == [
        Segment(0, 0, 20, -1, -1),
        Segment(0, 20, 36, 0, -1),
        Segment(0, 36, 39, 1, 0),
        Segment(2, 36, 38, 1, 2),
        Segment(1, 20, 38, 0, -1),
        Segment(1, 38, 39, 4, 1),
        Segment(4, 38, 41, 4, 4),
        Segment(3, 0, 4, -1, 3),
    ]


def test_little_is_not_shared():
    """Two documents alike in n tokens save n by sharing them."""
    for n, shared in ((LEAST_SAVED_TOKENS - 1, False), (LEAST_SAVED_TOKENS, True)):
        rows = [np.array([*range(n), 90 + i, 1, 2]) for i in range(2)]
        assert (len(plan_segments(rows, [n + 1] * 2)) == 3) == shared
        assert (len(plan_segments(rows[:1] * 2, [n, n])) == 3) == shared  # no further than the limit


def test_a_batch_holds_what_is_shared_once_and_counts_it_for_each():
    alone, shared = collate(PAIRS), collate(PAIRS, share_prefixes=True)
    assert alone.parents is None and shared.parents == (-1, 0, 1, 1, 0, 4, 4, -1)
    assert shared.tokens == alone.tokens == sum(d.inputs for d in PAIRS)
    assert shared.input_ids.numel() == 20 + 16 + 3 + 2 + 18 + 1 + 3 + 4
    for a, b in zip(alone.trained()[1:], shared.trained()[1:], strict=True):
        assert torch.equal(a, b)
    rows = [batch.trained()[0] for batch in (alone, shared)]
    for name in ("input_ids", "position"):
        assert torch.equal(*(getattr(b, name)[0, r] for b, r in zip((alone, shared), rows, strict=True)))


@pytest.mark.parametrize("longest", [3, 60])
def test_trained_tokens_come_in_the_documents_order_whatever_is_shared(longest):
    """Prompts of few tokens, so that many begin alike, in turn with ones that do not, too short to be shared or not."""
    generator = np.random.default_rng(0)
    for _ in range(200):
        documents = []
        for _ in range(generator.integers(2, 7)):
            prompt, response = generator.integers(0, 2, generator.integers(1, longest + 1)), generator.integers(5, 9, 3)
            prompt[1:] *= generator.random(len(prompt) - 1) < 0.05  # nearly all zeros
            ids = np.concatenate([prompt, response]).astype(np.int32)
            documents.append(Document(ids, np.arange(len(ids)) >= len(prompt), 1))
        alone, shared = collate(documents), collate(documents, share_prefixes=True)
        for a, b in zip(alone.trained()[1:], shared.trained()[1:], strict=True):
            assert torch.equal(a, b)
        assert shared.parents is not None or torch.equal(alone.document, shared.document)


def test_positions_go_on_behind_the_parent():
    documents = Documents.of_lengths([3, 2, 1, 4], "cpu", (-1, 0, 0, -1))
    assert document_positions(documents).tolist() == [0, 1, 2, 3, 4, 3, 0, 1, 2, 3]
    assert documents.tree.rows.tolist() == [0, 1, 2, 3, 4, 0, 1, 2, 5, 6, 7, 8, 9]
    assert documents.tree.whole.lengths == [5, 4, 4]


def test_kernel_calls_of_a_tree_by_hand():
    documents = Documents.of_lengths([3, 2, 1, 4, 2], "cpu", (-1, 0, 1, 0, -1))
    own = [(slice(0, 3),) * 2, (slice(3, 5),) * 2, (slice(5, 6),) * 2, (slice(6, 10),) * 2, (slice(10, 12),) * 2]
    below = [(slice(3, 10), slice(0, 3), False), (slice(5, 6), slice(3, 5), False)]
    assert pieces(documents) == [(*rows, True) for rows in own] + below


WAYS = ["pieces", "blocks", "c++"]


def take(way, monkeypatch):
    """Have float32 attention made so, in small blocks."""
    if way == "c++" and (reason := fused.reason_not_compiled()):
        pytest.skip(reason)
    if way != "c++":
        monkeypatch.setattr(fused, "reason_not_compiled", lambda: "a test of torch's ops")
    monkeypatch.setattr(fused, "SHORT", 0 if way == "pieces" else 1024)
    monkeypatch.setattr(fused, "BLOCK", 4)
    monkeypatch.setattr(fused, "COMPILED_ROWS", 9)


@pytest.mark.parametrize("heads, kv_heads", [(4, 4), (6, 2)])
@pytest.mark.parametrize("parents", [None, (-1, 0, 1, 1, 0, -1)])
@pytest.mark.parametrize("scale", [None, 0.3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("way", WAYS)
def test_fused_attention_equals_plain(heads, kv_heads, parents, scale, dtype, way, monkeypatch):
    """In pieces, and in blocks of at most 4 queries."""
    take(way, monkeypatch)
    lengths = [5, 7, 3, 1, 4, 6]
    documents = Documents.of_lengths(lengths, "cpu", parents)
    generator = torch.Generator().manual_seed(0)
    shapes = [(sum(lengths), h, 16) for h in (heads, kv_heads, kv_heads)]
    results = []
    inputs = [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]
    upstream = torch.randn(shapes[0], generator=generator).to(dtype)
    for function in (plain_attention, fused_attention):
        leaves = [x.clone().requires_grad_() for x in inputs]
        out = function(*leaves, documents, None, scale)
        out.backward(upstream)
        results.append([out, *(x.grad for x in leaves)])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=2e-6)


@pytest.mark.parametrize("tasks", [0, 1000], ids=["heads together", "heads alone"])
@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("channels", [16, 48, 64, 80])
@pytest.mark.parametrize("lengths, parents", [([200], None), ([33, 16, 1], None), ([50, 70, 31, 90], (-1, 0, 0, 1))])
def test_compiled_attention_is_that_of_float64(tasks, threads, channels, lengths, parents, monkeypatch):
    """Of whole tiles and parts of them, of documents that share beginnings, however the work is shared, and whatever is
    in the memory that results are written to."""
    if reason := fused.reason_not_compiled():
        pytest.skip(reason)
    monkeypatch.setattr(fused, "fresh", lambda shape, dtype, device: torch.full(shape, torch.nan, dtype=dtype))
    monkeypatch.setattr(fused, "TASKS", tasks)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(sum(lengths), h, channels, generator=generator) for h in (6, 2, 2)]
    upstream = torch.randn(inputs[0].shape, generator=generator)
    documents = Documents.of_lengths(lengths, "cpu", parents)
    results = []
    for function, dtype in ((fused_attention, torch.float32), (plain_attention, torch.float64)):
        leaves = [x.clone().to(dtype).requires_grad_() for x in inputs]
        out = function(*leaves, documents, None)
        out.backward(upstream.to(dtype))
        results.append([x.double() for x in (out, *(x.grad for x in leaves))])
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_compiled_attention_reads_and_writes_nothing_else():
    """Rows and heads that lie apart, with NaN between them; and large logits."""
    if reason := fused.reason_not_compiled():
        pytest.skip(reason)
    documents, generator = Documents.of_lengths([21, 40], "cpu"), torch.Generator().manual_seed(0)
    rooms = [torch.full((61, h, 40), torch.nan) for h in (4, 2, 2)]
    inputs = [torch.randn(61, h, 16, generator=generator) * 30 for h in (4, 2, 2)]
    for room, x in zip(rooms, inputs, strict=True):
        room[..., 3:19] = x
    results = []
    for function, tensors in ((fused_attention, rooms), (plain_attention, [x.double() for x in inputs])):
        leaves = [x.clone().requires_grad_() for x in tensors]
        views = [leaf[..., 3:19] if leaf.shape[-1] == 40 else leaf for leaf in leaves]
        out = function(*views, documents, None)
        out.sum().backward()
        grads = [leaf.grad[..., 3:19] if leaf.shape[-1] == 40 else leaf.grad for leaf in leaves]
        results.append([out, *grads])
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-5 * expected.abs().max().item())


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_number_that_is_not_finite_stays_so(bad):
    if reason := fused.reason_not_compiled():
        pytest.skip(reason)
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(50, 2, 16, generator=generator) for _ in range(3))
    query[20, 1, 3] = bad
    out = fused_attention(query, key, value, Documents.of_lengths([50], "cpu"), None)
    assert out[20, 1].isnan().all() and out[20, 0].isfinite().all()
    assert out[:20].isfinite().all() and out[21:].isfinite().all()


def test_the_way_is_chosen_by_length_type_and_width(monkeypatch):
    chosen = []
    for name in ("_InBlocks", "_InPieces", "_Compiled"):
        recorder = SimpleNamespace(apply=lambda *arguments, name=name: chosen.append(name))
        monkeypatch.setattr(fused, name, recorder)

    def ways():
        chosen.clear()
        for length, channels, dtype in ((1024, 16, torch.float32), (1025, 16, torch.float32), (8, 16, torch.float64),
                                        (8, 16, torch.bfloat16), (8, 24, torch.float32)):  # fmt: skip
            x = torch.zeros(length, 1, channels, dtype=dtype)
            fused.attention(x, x, x, Documents.of_lengths([length], "cpu"), None)
        return list(chosen)

    monkeypatch.setattr(fused, "reason_not_compiled", lambda: None)
    assert ways() == ["_Compiled", "_Compiled", "_InBlocks", "_InPieces", "_InBlocks"]
    x, documents, chosen[:] = torch.zeros(8, 1, 16), Documents.of_lengths([8], "cpu"), []
    fused.attention(x, x, x[..., :8], documents, None)  # C++ would read what is not there
    fused.attention(x, x.double(), x.double(), documents, None)
    assert chosen == ["_InBlocks", "_InBlocks"]
    monkeypatch.setattr(fused, "reason_not_compiled", lambda: "a reason")
    assert ways() == ["_InBlocks", "_InPieces", "_InBlocks", "_InPieces", "_InBlocks"]


def test_sixteen_bit_attention_equals_plain():
    documents = Documents.of_lengths([5, 7], "cpu", (-1, 0))
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(12, h, 8, generator=generator).bfloat16() for h in (4, 2, 2)]
    results = []
    for function in (plain_attention, fused_attention):
        leaves = [x.clone().requires_grad_() for x in inputs]
        out = function(*leaves, documents, None)
        out.float().sum().backward()
        results.append([out, *(x.grad for x in leaves)])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-2, atol=2e-2)


def test_blocks_of_a_chain_by_hand():
    documents = Documents.of_lengths([3, 300, 2], "cpu", (-1, 0, 1))
    chains = fused.chains(documents)
    assert chains[2] == [slice(0, 3), slice(3, 303), slice(303, 305)]
    assert fused.blocks(chains[0]) == [(slice(0, 3), 3)]
    assert fused.blocks(chains[1]) == [(slice(3, 103), 103), (slice(103, 203), 203), (slice(203, 303), 303)]
    assert fused.blocks(chains[2]) == [(slice(303, 305), 305)]


@pytest.mark.parametrize("way", WAYS)
def test_fused_attention_reads_no_channels_that_are_not_there(way, monkeypatch):
    """The kernels take channels to lie one after another: strided inputs and an expanded gradient are copied."""
    take(way, monkeypatch)
    documents = Documents.of_lengths([5, 7], "cpu")
    wide = torch.randn(12, 2, 32, generator=torch.Generator().manual_seed(0))
    grads = []
    for function in (plain_attention, fused_attention):
        leaf = wide.clone().requires_grad_()
        strided = leaf[..., ::2]
        function(strided, strided, strided, documents, None).sum().backward()
        grads.append(leaf.grad)
    torch.testing.assert_close(*grads, rtol=1e-4, atol=2e-6)


def test_a_reward_takes_no_batch_of_shared_beginnings():
    with pytest.raises(AssertionError, match="whole"):
        whole_documents(collate(PAIRS, share_prefixes=True))


CONFIGS = [
    {},
    {"model_type": "mistral", "sliding_window": 24},
    {**SHARED, **EXPERTS["gpt_oss"]},
    {**SHARED, **EXPERTS["llama4_text"]},
    {"model_type": "qwen3", "head_dim": 12},
]


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: c.get("model_type", "llama"))
@pytest.mark.parametrize("provider", ["huggingface", "unsloth"])
def test_sharing_changes_neither_states_nor_gradients(config, provider):
    results = []
    for share in (False, True):
        model = random_model(**config).train()
        for module in model.modules():
            if getattr(module, "ops", None) is PLAIN:
                module.ops = PROVIDERS[provider]().ops
        inject(model, LoraSpec(2, 4), torch.Generator().manual_seed(0))
        for i, (_, layer) in enumerate(lora_layers(model)):
            layer.lora_B.data.normal_(generator=torch.Generator().manual_seed(i))
        batch = collate(PAIRS, share_prefixes=share)
        hidden = model(batch.input_ids, batch.position, batch.document, parents=batch.parents)
        states = hidden.flatten(0, 1)[batch.trained()[0]]
        states.square().sum().backward()
        results.append([states, *(p.grad for p in model.parameters() if p.requires_grad)])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=2e-5 * a.abs().max().item())


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: c.get("model_type", "llama"))
@pytest.mark.parametrize("recompute", [None, "selective", "full"])
def test_asking_for_some_rows_changes_neither_their_states_nor_gradients(config, recompute):
    results, rows = [], torch.tensor([3, 9, 10, 18])
    for wanted in (None, rows):
        model = random_model(**config).train()
        inject(model, LoraSpec(2, 4), torch.Generator().manual_seed(0))
        for i, (_, layer) in enumerate(lora_layers(model)):
            layer.lora_B.data.normal_(generator=torch.Generator().manual_seed(i))
        model.recompute = recompute
        hidden = model(torch.arange(20)[None], rows=wanted)
        states = hidden if wanted is not None else hidden[0, rows]
        states.square().sum().backward()
        results.append([states, *(p.grad for p in model.parameters() if p.requires_grad)])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=2e-5 * a.abs().max().item())

"""The decoder's own promises: documents are isolated, windows and caches are exact, options do as they are named."""

import math
import pickle

import pytest
import torch

from mini_forge.errors import CheckpointError
from mini_forge.model import decoder
from mini_forge.model.decoder import Decoder, KVCache, neftune_noise
from mini_forge.model.families import decoder_spec
from mini_forge.model.functional import apply_rope, attention, rms_norm
from mini_forge.model.lora import LoraSpec, inject, lora_layers
from mini_forge.model.masks import Documents, document_positions
from mini_forge.model.rope import RopeSpec, inverse_frequencies, rope_spec
from mini_forge.providers import PROVIDERS
from tests.tiny import CONFIG, random_model

WINDOWED = {"model_type": "mistral", "sliding_window": 4}
FAMILIES = [{}, WINDOWED, {"model_type": "qwen2"}, {"model_type": "qwen3", "head_dim": 12}]


def documents(*lengths):
    ids = torch.cat([torch.full((n,), i) for i, n in enumerate(lengths)])[None]
    return Documents.from_ids(ids)


def slow_attention(query, key, value, lengths, window):
    """Float64, one query at a time, straight from the definition."""
    query, key, value = (x.double() for x in (query, key, value))
    N, H, C = query.shape
    group, out, start = H // key.shape[1], torch.zeros(N, H, C, dtype=torch.float64), 0
    for length in lengths:
        for i in range(length):
            first = 0 if window is None else max(0, i - window + 1)
            for h in range(H):
                keys, values = (x[start + first : start + i + 1, h // group] for x in (key, value))
                scores = keys @ query[start + i, h] / math.sqrt(C)
                out[start + i, h] = torch.softmax(scores, 0) @ values
        start += length
    return out


@pytest.mark.parametrize("lengths", [(7,), (1, 5, 3), (4, 4, 4), (1,), (6, 1)])
@pytest.mark.parametrize("window", [None, 1, 3, 100])
def test_attention_equals_its_definition(lengths, window):
    torch.manual_seed(0)
    N = sum(lengths)
    query, key, value = torch.randn(N, 4, 8), torch.randn(N, 2, 8), torch.randn(N, 2, 8)
    found = attention(query, key, value, documents(*lengths), window)
    torch.testing.assert_close(found.double(), slow_attention(query, key, value, lengths, window), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("changes", FAMILIES)
def test_packed_documents_have_the_logits_they_have_alone(changes):
    model = random_model(**changes)
    parts = [torch.randint(0, 272, (1, n)) for n in (9, 1, 6)]
    document = torch.tensor([[0] * 9 + [1] + [2] * 6])
    packed = model.logits(torch.cat(parts, 1), document=document)
    alone = torch.cat([model.logits(part) for part in parts], 1)
    torch.testing.assert_close(packed, alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("changes", FAMILIES)
def test_changing_a_document_leaves_the_others_bit_for_bit(changes):
    model = random_model(**changes)
    ids = torch.randint(0, 272, (1, 15))
    document = torch.tensor([[0] * 6 + [1] * 9])
    other = ids.clone()
    other[0, :6] = (other[0, :6] + 1) % 272
    a, b = model.logits(ids, document=document), model.logits(other, document=document)
    assert torch.equal(a[:, 6:], b[:, 6:])
    assert not torch.equal(a[:, :6], b[:, :6])


def test_packed_and_unpacked_gradients_agree():
    model = random_model()
    inject(model, LoraSpec(2, 4))
    for _, layer in lora_layers(model):
        layer.lora_B.data.normal_(std=0.1)
    parts = [torch.randint(0, 272, (1, n)) for n in (9, 4, 6)]
    weights = [torch.randn(1, p.shape[1], 32) for p in parts]

    def gradients(loss):
        model.zero_grad()
        loss.backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    document = torch.tensor([[0] * 9 + [1] * 4 + [2] * 6])
    packed = gradients((model(torch.cat(parts, 1), document=document) * torch.cat(weights, 1)).sum())
    alone = gradients(sum((model(p) * w).sum() for p, w in zip(parts, weights, strict=True)))
    assert len(packed) == 28
    for a, b in zip(packed, alone, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("changes", FAMILIES)
def test_cached_steps_equal_one_pass_for_rows_of_unequal_length(changes):
    model = random_model(**changes)
    ids = torch.randint(0, 272, (2, 12))
    lengths, full = torch.tensor([7, 4]), model.logits(ids)
    cache = KVCache(model, 2, 12)
    position = torch.arange(7).expand(2, 7)
    hidden = model(ids[:, :7], position=position, cache=cache)  # row 1's last three are pads to be overwritten
    for row in range(2):
        torch.testing.assert_close(
            model.head(hidden[row, : lengths[row]]), full[row, : lengths[row]], rtol=1e-4, atol=1e-4
        )
    for step in range(5):
        at = (lengths + step)[:, None]
        new = model.head(model(ids.gather(1, at), position=at, cache=cache))
        expected = full[torch.arange(2)[:, None], at]
        torch.testing.assert_close(new, expected, rtol=1e-4, atol=1e-4)


def adapter_gradients(recompute, dropout=0.3, targets=None, **config):
    model = random_model(**config).train()
    inject(model, LoraSpec(2, 4, dropout=dropout, targets=targets), torch.Generator().manual_seed(0))
    for i, (_, layer) in enumerate(lora_layers(model)):
        layer.lora_B.data.normal_(generator=torch.Generator().manual_seed(i))
    model.recompute = recompute
    torch.manual_seed(5)
    model(torch.arange(20)[None]).square().sum().backward()
    return [p.grad for p in model.parameters() if p.requires_grad]


@pytest.mark.parametrize("recompute", ["selective", "full"])
@pytest.mark.parametrize("config", [{}, {"model_type": "phi3"}, {"model_type": "qwen3", "head_dim": 12}], ids=str)
def test_recomputing_changes_no_gradient_even_with_dropout(recompute, config):
    for a, b in zip(adapter_gradients(None, **config), adapter_gradients(recompute, **config), strict=True):
        assert torch.equal(a, b)


def test_recomputing_an_mlp_that_is_not_adapted_changes_no_gradient():
    targets = ("q_proj", "v_proj", "up_proj")  # one of the three is
    for a, b in zip(*(adapter_gradients(r, targets=targets) for r in (None, "selective")), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5 * a.abs().max().item())  # other order of sums


def test_an_mlp_in_tiles_has_the_gradients_of_the_whole(monkeypatch):
    whole = adapter_gradients(None, dropout=0.0)
    monkeypatch.setattr(decoder, "TILE_TOKENS", 7)  # 20 tokens: 7, 7 and 6
    for a, b in zip(whole, adapter_gradients("selective", dropout=0.0), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5 * a.abs().max().item())


def test_what_is_kept_for_the_backward_is_what_it_cannot_make_again():
    """Of the MLP's width gate and up, with recompute "selective" neither; never the product of the two."""

    def widths(recompute):
        model = random_model(intermediate_size=52).train()
        inject(model, LoraSpec(2, 4), torch.Generator().manual_seed(0))
        model.recompute = recompute
        kept = {}

        def keep(tensor):
            kept[tensor.data_ptr()] = tensor
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            hidden = model(torch.arange(20)[None])
        del hidden
        return sorted(tuple(t.shape) for t in kept.values() if t.dim() == 2 and t.shape == (20, 52))

    layers = len(random_model().model.layers)
    assert len(widths(None)) == 2 * layers
    assert len(widths("selective")) == 0


def test_rms_norm_by_hand():
    x = torch.tensor([[3.0, 4.0]])  # mean square 12.5
    found = rms_norm(x, torch.tensor([1.0, 2.0]), 0.0)
    torch.testing.assert_close(found, torch.tensor([[3 / math.sqrt(12.5), 8 / math.sqrt(12.5)]]))


def test_rope_turns_pairs_half_a_head_apart():
    x = torch.tensor([[[1.0, 0.0, 0.0, 1.0]]])  # pairs (0, 2) and (1, 3)
    angle = torch.tensor([[math.pi / 2, math.pi, math.pi / 2, math.pi]])
    found = apply_rope(x, angle.cos(), angle.sin())
    torch.testing.assert_close(found, torch.tensor([[[0.0, 0.0, 1.0, -1.0]]]), atol=1e-6, rtol=0)


def test_linear_rope_scaling_divides_positions():
    plain, _ = inverse_frequencies(RopeSpec(100.0), 4)
    scaled, _ = inverse_frequencies(RopeSpec(100.0, "linear", (("factor", 4.0),)), 4)
    torch.testing.assert_close(plain, torch.tensor([1.0, 0.1]))
    torch.testing.assert_close(scaled, plain / 4)


def test_old_and_new_rope_records_mean_the_same():
    old = rope_spec({"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 2.0}})
    assert old == rope_spec({"rope_parameters": {"rope_theta": 5e5, "rope_type": "linear", "factor": 2.0}})


@pytest.mark.parametrize("changes, message", [
    ({"model_type": "bert"}, "model_type 'bert' is not supported; supported: llama, mistral"),
    ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
    ({"rope_scaling": {"type": "dynamic", "factor": 2}}, "rope type 'dynamic'"),
    ({"rope_scaling": {"rope_type": "llama3", "factor": 8}}, "needs low_freq_factor"),
])  # fmt: skip
def test_unsupported_configs_are_refused_by_name(changes, message):
    with pytest.raises(CheckpointError, match=message):
        decoder_spec({**CONFIG, **changes})


def test_missing_config_key_is_named():
    with pytest.raises(CheckpointError, match="hidden_size"):
        decoder_spec({k: v for k, v in CONFIG.items() if k != "hidden_size"})


def test_positions_restart_in_every_document():
    assert document_positions(documents(3, 1, 2)).tolist() == [0, 1, 2, 0, 0, 1]


def test_neftune_noise_is_bounded_by_the_documents_own_length():
    x = torch.zeros(300 + 12, 64)
    noise = neftune_noise(x, documents(300, 12), alpha=5.0)
    for part, length in ((noise[:300], 300), (noise[300:], 12)):
        bound = 5.0 / math.sqrt(length * 64)
        assert part.abs().max() <= bound
        assert part.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.05)


def test_parameter_names_are_the_checkpoints():
    names = set(dict(random_model(model_type="qwen3", head_dim=12, tie_word_embeddings=True).named_parameters()))
    assert "model.layers.1.self_attn.q_norm.weight" in names
    assert "model.embed_tokens.weight" in names
    assert "lm_head.weight" not in names


def test_a_trained_head_in_other_bits_than_the_activations_gets_its_gradient():
    model = random_model(tie_word_embeddings=True)
    weight = model.model.embed_tokens.weight
    weight.data = weight.data.bfloat16()
    weight.requires_grad_()
    hidden = torch.randn(3, 32)
    model.head(hidden).sum().backward()
    torch.testing.assert_close(weight.grad[0].float(), hidden.sum(0).bfloat16().float())


@pytest.mark.parametrize("provider", ["huggingface", "unsloth"])
def test_a_model_can_be_pickled(provider):
    model = Decoder(decoder_spec(CONFIG), PROVIDERS[provider]("cpu").ops)
    again = pickle.loads(pickle.dumps(model))
    ids = torch.arange(9)[None]
    assert torch.equal(again.logits(ids), model.logits(ids))

"""Counting: parameters against the tensors, multiply-accumulates against what PyTorch counts as it runs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedModel

import cofiprune
from cofiprune import accounting
from small import build, randomise

RELATIVE = {"relative_attention": True, "pos_att_type": "c2p|p2c", "position_biased_input": False}
V3 = {**RELATIVE, "position_buckets": 4, "norm_rel_ebd": "layer_norm", "share_att_key": True}

MODELS = [
    ("BertModel", {}),
    ("BertForSequenceClassification", {}),
    ("BertForTokenClassification", {"attn_implementation": "eager"}),
    ("BertForMaskedLM", {}),
    ("BertForMaskedLM", {"tie_word_embeddings": False}),
    ("BertForQuestionAnswering", {}),
    ("BertForPreTraining", {}),
    ("RobertaForSequenceClassification", {}),
    ("RobertaForMaskedLM", {"attn_implementation": "eager"}),
    ("RobertaForTokenClassification", {}),
    ("DebertaForSequenceClassification", RELATIVE),
    ("DebertaForMaskedLM", {**RELATIVE, "legacy": False}),
    ("DebertaForTokenClassification", {**RELATIVE, "pos_att_type": "c2p"}),
    ("DebertaForMaskedLM", {"embedding_size": 10}),
    ("DebertaV2ForSequenceClassification", V3),
    ("DebertaV2ForMaskedLM", {**V3, "legacy": False}),
    ("DebertaV2ForQuestionAnswering", {**RELATIVE, "conv_kernel_size": 3}),
    ("DebertaV2ForTokenClassification", {**RELATIVE, "pos_att_type": "p2c", "embedding_size": 10}),
    ("ElectraForPreTraining", {"embedding_size": 10}),
    ("DistilBertForSequenceClassification", {}),
    ("MPNetForMaskedLM", {}),
    ("MegatronBertForMaskedLM", {}),
    ("RemBertForMaskedLM", {"input_embedding_size": 10, "output_embedding_size": 14}),
    ("RoFormerForMaskedLM", {}),
    ("XmodForMaskedLM", {"languages": ["de_DE", "en_XX"], "default_language": "en_XX"}),
]
TOKENS = 11


def macs_by_pytorch(model: PreTrainedModel) -> int:
    """Multiply-accumulates of one example, counted operation by operation."""
    ids = torch.randint(5, 40, (1, TOKENS))
    model.requires_grad_(False)  # the counter's hooks trip over views of trainable parameters
    # PyTorch counts no operations of its fused attention on a CPU.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(input_ids=ids, attention_mask=torch.ones_like(ids))
    return counter.get_total_flops() // 2


def name_of(case: object) -> str:
    return case if isinstance(case, str) else "-".join(str(value) for value in case.values()) or "stock"  # type: ignore[attr-defined]


@pytest.mark.parametrize(("name", "settings"), MODELS, ids=name_of)
def test_macs_are_those_that_run(name: str, settings: dict[str, Any]) -> None:
    model = build(name, dtype=torch.float32, num_hidden_layers=3, **settings)
    cost = accounting.model_macs(cofiprune.structure(model), TOKENS)
    assert cost.exact(cofiprune.structure(model).sizes) == macs_by_pytorch(model)
    with cofiprune.attach(model) as masks:
        randomise(masks)
        masks["layers.1.ffn"] = [0]
        masks["layers.2.heads"] = [0, 0, 0, 0]
        small = cofiprune.compact(model)
        assert cost.exact(masks.plan().kept) == macs_by_pytorch(small)
    again = cofiprune.structure(small)
    assert accounting.model_macs(again, TOKENS).exact(again.sizes) == macs_by_pytorch(small)


def test_macs_of_deberta_are_a_bound_beyond_its_relative_positions() -> None:
    # Its attention looks at no more than 2 * max_relative_positions positions, the count at 2 * TOKENS.
    model = build("DebertaForTokenClassification", dtype=torch.float32, max_relative_positions=4, **RELATIVE)
    structure = cofiprune.structure(model)
    counted = accounting.model_macs(structure, TOKENS).exact(structure.sizes)
    assert macs_by_pytorch(model) < counted < 1.5 * macs_by_pytorch(model)


def test_parameters_are_those_of_the_tensors() -> None:
    model = build("DebertaV2ForMaskedLM", **V3)
    structure = cofiprune.structure(model)
    costs = {
        "model": accounting.model_parameters(structure),
        "layers": accounting.layer_parameters(structure),
        "embeddings": accounting.embedding_parameters(structure),
    }
    with cofiprune.attach(model) as masks:
        randomise(masks)
        small, kept = cofiprune.compact(model), masks.plan().kept
        model_sparsity = masks.model_sparsity()
    for each, sizes in ((model, structure.sizes), (small, kept)):
        counts = {name: value.numel() for name, value in each.named_parameters()}
        assert costs["model"].exact(sizes) == sum(counts.values()) == each.num_parameters()
        assert costs["layers"].exact(sizes) == sum(n for name, n in counts.items() if ".encoder.layer." in name)
        without = each.num_parameters(exclude_embeddings=True)
        assert costs["embeddings"].exact(sizes) == each.num_parameters() - without
    assert model_sparsity == 1 - small.num_parameters() / model.num_parameters()


def test_expected_cost_is_the_exact_one_at_whole_numbers_and_differentiable() -> None:
    structure = cofiprune.structure(build("BertForTokenClassification"))
    for cost in (accounting.layer_parameters(structure), accounting.layer_macs(structure, TOKENS)):
        kept = {name: max(1, size // 2) for name, size in structure.sizes.items()}
        sizes = torch.tensor([float(kept[name]) for name in structure], dtype=torch.float64, requires_grad=True)
        expected = cost.expected(sizes)
        assert expected.item() == cost.exact(kept)
        (gradient,) = torch.autograd.grad(expected, sizes)
        assert (gradient > 0).all()


def test_expected_cost_is_the_mean_over_gates() -> None:
    # The gates of a block are independent of one another, so that expectations multiply.
    structure = cofiprune.structure(build("BertModel", num_hidden_layers=1))
    cost = accounting.layer_parameters(structure)
    generator = torch.Generator().manual_seed(0)
    probability = {name: torch.rand(size, generator=generator) for name, size in structure.sizes.items()}
    draws = {
        name: (torch.rand(20_000, len(row), generator=generator) < row).sum(1) for name, row in probability.items()
    }
    counts = [cost.exact({name: int(row[i]) for name, row in draws.items()}) for i in range(20_000)]
    sampled = torch.tensor(counts, dtype=torch.float64)
    expected = cost.expected(torch.stack([row.sum() for row in probability.values()])).item()
    standard_error = sampled.std().item() / len(counts) ** 0.5
    assert abs(sampled.mean().item() - expected) < 4 * standard_error

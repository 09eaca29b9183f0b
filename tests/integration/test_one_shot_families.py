"""One shot on data for encoders that read text, images and sound, with any kind of head."""

from __future__ import annotations

import pytest
import torch
import transformers

import cofiprune
from cofiprune import accounting
from cofiprune.adapter import structure as structure_of
from cofiprune.conformance.specimens import specimen, tiny_config
from cofiprune.data.synthetic import synthetic_inputs
from cofiprune.oneshot.data_free import divergence, outputs_of
from cofiprune.oneshot.with_data import RoundPruning
from cofiprune.selection.target import Target

MODELS = [
    ("albert", "AlbertForSequenceClassification"),
    ("bert", "BertForMaskedLM"),
    ("bert", "BertForQuestionAnswering"),
    ("deberta-v2", "DebertaV2ForTokenClassification"),
    ("distilbert", "DistilBertForSequenceClassification"),
    ("modernbert", "ModernBertForSequenceClassification"),
    ("t5", "T5EncoderModel"),
    ("vit", "ViTForImageClassification"),
    ("wav2vec2", "Wav2Vec2ForSequenceClassification"),
]


@pytest.mark.parametrize(("model_type", "name"), MODELS)
def test_one_shot_is_exact_and_repair_comes_nearer(model_type, name):
    generator = torch.Generator().manual_seed(0)
    config = tiny_config(model_type, num_labels=2 if "QuestionAnswering" in name else 3)
    model = specimen(getattr(transformers, name)(config), generator)
    frames = 400 if "Wav2Vec2" in name else 24
    made = [
        synthetic_inputs(model, batch_size=16, seq_len=frames, generator=generator, padding=True) for _ in range(13)
    ]
    seen, unseen = made[:10], made[10:]
    structure = structure_of(model)
    cost = accounting.layer_parameters(structure)
    whole = outputs_of(model, unseen)
    found = []
    for repair in (False, True):
        plan, small = RoundPruning(model, structure, seen, Target.of(structure, 0.5), reconstruct=repair).run()
        assert accounting.sparsity(cost, structure, plan.kept) == pytest.approx(0.5, abs=0.05)
        assert cofiprune.summary(small).layer_parameters == cost.exact(plan.kept)
        found.append(divergence(small, whole, unseen))
    assert found[1] < found[0]

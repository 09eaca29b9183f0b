"""Inputs that are made up can be read by the model they are for."""

import pytest
import torch
from transformers import (
    ASTConfig,
    ASTModel,
    BertConfig,
    BertForMultipleChoice,
    BertForSequenceClassification,
    RobertaConfig,
    RobertaModel,
    ViTConfig,
    ViTModel,
    Wav2Vec2Config,
    Wav2Vec2Model,
)

from cofiprune.data.synthetic import ordinary_ids, synthetic_inputs
from cofiprune.errors import DataError

SMALL = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
TEXT = {**SMALL, "vocab_size": 12, "max_position_embeddings": 20}


def models():
    yield BertForSequenceClassification(BertConfig(**TEXT)), (3, 16)
    yield BertForMultipleChoice(BertConfig(**TEXT)), (3, 2, 16)
    yield ViTModel(ViTConfig(**SMALL, image_size=8, patch_size=4)), (3, 3, 8, 8)
    audio = {"conv_dim": (8, 8), "conv_stride": (5, 2), "conv_kernel": (10, 3), "num_conv_pos_embeddings": 4}
    wav2vec = Wav2Vec2Config(**SMALL, **audio, num_conv_pos_embedding_groups=2, num_feat_extract_layers=2)
    yield Wav2Vec2Model(wav2vec), (3, 5 * 32 + 10)
    yield ASTModel(ASTConfig(**SMALL, max_length=32, num_mel_bins=32)), (3, 32, 32)


@pytest.mark.parametrize(("model", "shape"), list(models()), ids=lambda value: type(value).__name__)
def test_every_kind_of_input_can_be_read(model, shape):
    inputs = synthetic_inputs(model.double().eval(), batch_size=3, seq_len=16)
    assert inputs[model.main_input_name].shape == shape
    with torch.no_grad():
        output = model(**inputs)[0]
    assert output.isfinite().all()
    if isinstance(model, Wav2Vec2Model):
        assert output.shape[1] == 16


def test_tokens_leave_special_ids_out_and_come_from_the_generator():
    model = RobertaModel(RobertaConfig(**TEXT, pad_token_id=1, bos_token_id=0, eos_token_id=[2, 99]))
    assert ordinary_ids(model).tolist() == list(range(3, 12))
    draws = [
        synthetic_inputs(model, batch_size=4, seq_len=18, generator=torch.Generator().manual_seed(3), padding=True)
        for _ in range(2)
    ]
    assert all(torch.equal(draws[0][name], draws[1][name]) for name in draws[0])
    ids, mask = draws[0]["input_ids"], draws[0]["attention_mask"]
    assert (ids[mask == 0] == 1).all()
    assert (ids[mask == 1] > 2).all()
    assert mask[0].all()
    assert 4 <= mask.sum(1).min() < 18
    whole = synthetic_inputs(model, batch_size=2, seq_len=5)
    assert whole["attention_mask"].all()


def test_too_many_tokens():
    model = RobertaModel(RobertaConfig(**TEXT, pad_token_id=1))
    with pytest.raises(DataError, match="seq_len=19: RobertaModel reads at most 18 tokens"):
        synthetic_inputs(model, batch_size=1, seq_len=19)
    with pytest.raises(DataError, match="at least 1, not 0 and 5"):
        synthetic_inputs(model, batch_size=0, seq_len=5)

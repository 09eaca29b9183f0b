"""Token rows are padded to multiples, and no further than the model reads."""

import pytest
import torch

import cofiprune
from cofiprune.data.rows import Padding
from small import build


def rows(length):
    ids = torch.arange(2 * length).view(2, length) + 1
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": torch.tensor([0, 1])}


def test_token_rows_are_padded_to_a_multiple():
    found = Padding({"input_ids": 7}, 8, None).widened(rows(13))
    assert found["input_ids"].shape == found["attention_mask"].shape == (2, 16)
    assert (found["input_ids"][:, 13:] == 7).all()
    assert (found["attention_mask"][:, 13:] == 0).all()
    assert torch.equal(found["input_ids"][:, :13], rows(13)["input_ids"])
    assert found["labels"].shape == (2,)


def test_labels_of_tokens_are_padded_with_what_does_not_count():
    batch = {**rows(5), "labels": torch.ones(2, 5, dtype=torch.long)}
    assert (Padding({"labels": -100}, 4, None).widened(batch)["labels"][:, 5:] == -100).all()


@pytest.mark.parametrize(
    ("batch", "multiple", "longest"),
    [
        (rows(16), 8, None),
        (rows(13), 1, None),
        (rows(13), 8, 15),
        ({**rows(13), "pairs": torch.zeros(2, 13, 13)}, 8, None),
        ({"pixel_values": torch.zeros(2, 3, 5, 5)}, 8, None),
    ],
)
def test_what_fits_or_cannot_be_padded_stays(batch, multiple, longest):
    assert Padding({}, multiple, longest).widened(batch) is batch


def test_padding_further_changes_no_answer():
    model = build("BertForSequenceClassification").eval()
    batch = {name: value for name, value in rows(5).items() if name != "labels"}
    with torch.no_grad():
        one, other = model(**batch).logits, model(**Padding({}, 8, None).widened(batch)).logits
    assert (one - other).abs().max() < 1e-12
    with pytest.raises(cofiprune.CofipruneError, match="pad_to_multiple_of"):
        cofiprune.PruneConfig(pad_to_multiple_of=0)

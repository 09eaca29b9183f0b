"""Token rows are padded to multiples, and no further than the model reads."""

import numpy as np
import pytest
import torch

import cofiprune
from cofiprune.data.rows import Padding
from small import build


def rows(*lengths):
    return [
        {"input_ids": np.arange(length) + 1, "attention_mask": np.ones(length, int), "labels": np.array(index % 2)}
        for index, length in enumerate(lengths)
    ]


def test_token_rows_are_padded_to_a_multiple():
    found = Padding({"input_ids": 7}, 8, None)(rows(13, 4))
    assert found["input_ids"].shape == found["attention_mask"].shape == (2, 16)
    assert (found["input_ids"][0, 13:] == 7).all()
    assert (found["attention_mask"][0, 13:] == 0).all()
    assert found["input_ids"][0, :13].tolist() == list(range(1, 14))
    assert found["labels"].shape == (2,)


def test_labels_of_tokens_are_padded_with_what_does_not_count():
    batch = [{**row, "labels": np.ones(5, int)} for row in rows(5, 5)]
    assert (Padding({"labels": -100}, 4, None)(batch)["labels"][:, 5:] == -100).all()


@pytest.mark.parametrize(
    ("batch", "multiple", "longest"),
    [
        (rows(16, 2), 8, None),
        (rows(13, 2), 1, None),
        (rows(13, 2), 8, 15),
        ([{**row, "pairs": np.zeros((13, 13))} for row in rows(13, 13)], 8, None),
        ([{"pixel_values": np.zeros((3, 5, 5))}] * 2, 8, None),
    ],
)
def test_what_fits_or_cannot_be_padded_stays(batch, multiple, longest):
    found, plain = Padding({}, multiple, longest)(batch), Padding({})(batch)
    assert all(torch.equal(found[name], value) for name, value in plain.items())


def test_padding_further_changes_no_answer():
    model = build("BertForSequenceClassification").eval()
    batch = [{name: cell for name, cell in row.items() if name != "labels"} for row in rows(5, 3)]
    with torch.no_grad():
        one, other = (model(**Padding({}, multiple, None)(batch)).logits for multiple in (1, 8))
    assert (one - other).abs().max() < 1e-12
    with pytest.raises(cofiprune.CofipruneError, match="pad_to_multiple_of"):
        cofiprune.PruneConfig(pad_to_multiple_of=0)

"""What `evaluate` reports is what a plain loop over the rows, one at a time, would find."""

import math
from functools import partial

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from cofiprune.errors import DataError
from cofiprune.hooks import evaluating
from cofiprune.measure.evaluation import evaluate
from small import bert as new_bert

bert = partial(
    new_bert, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, initializer_range=1.0
)


def tokens(count, seed=0):
    generator = np.random.default_rng(seed)
    return [generator.integers(5, 40, generator.integers(2, 12)).tolist() for _ in range(count)]


def alone(model, row):
    model.eval()
    with torch.no_grad():
        return model(**{name: torch.tensor([value]) for name, value in row.items()})


def test_classification_in_the_order_of_the_rows():
    model = bert(num_labels=3)
    rows = [{"input_ids": ids, "labels": n % 3} for n, ids in enumerate(tokens(21))]
    single = [alone(model, row) for row in rows]
    logits = torch.cat([output.logits for output in single]).numpy()
    seen = {}

    def compute(prediction):
        seen.update(predictions=prediction.predictions, labels=prediction.label_ids)
        return {"own": np.float32(0.5), "accuracy": -1}

    model.train()
    model.bert.eval()
    found = evaluate(model, rows, batch_size=4)
    assert model.training
    assert not model.bert.training
    assert found["loss"] == pytest.approx(np.mean([output.loss.item() for output in single]), rel=1e-5)
    assert found["accuracy"] == np.mean(logits.argmax(1) == [row["labels"] for row in rows])
    merged = evaluate(model, rows, batch_size=4, compute_metrics=compute)
    assert merged == {**found, "own": 0.5, "accuracy": -1}
    np.testing.assert_allclose(seen["predictions"], logits, atol=1e-5)
    assert seen["labels"].tolist() == [row["labels"] for row in rows]


def test_token_classification_leaves_ignored_tokens_out_and_pads_for_compute_metrics():
    model = bert("BertForTokenClassification", num_labels=3)
    rows = [{"input_ids": ids, "labels": [-100, *([n % 3] * (len(ids) - 1))]} for n, ids in enumerate(tokens(9))]
    right = total = 0
    loss = 0.0
    for row in rows:
        output = alone(model, row)
        labels = torch.tensor(row["labels"][1:])
        right += (output.logits[0, 1:].argmax(-1) == labels).sum().item()
        total += len(labels)
        loss += output.loss.item() * len(labels)

    def compute(prediction):
        longest = max(len(row["input_ids"]) for row in rows)
        assert prediction.predictions.shape == (9, longest, 3)
        assert prediction.label_ids.shape == (9, longest)
        assert (prediction.label_ids[0, len(rows[0]["labels"]) :] == -100).all()
        return {"checked": 1.0}

    found = evaluate(model, rows, batch_size=2, compute_metrics=compute)
    assert found == {"loss": pytest.approx(loss / total, rel=1e-5), "accuracy": right / total, "checked": 1.0}


def test_question_answering_counts_both_ends():
    model = bert("BertForQuestionAnswering")
    rows = []
    for n, ids in enumerate(tokens(8)):
        output = alone(model, {"input_ids": ids})
        start, end = output.start_logits.argmax().item(), output.end_logits.argmax().item()
        wrong = (end + 1) % len(ids)
        rows.append({"input_ids": ids, "start_positions": start, "end_positions": wrong if n % 2 else end})
    rows.append({"input_ids": [5, 6], "start_positions": 30, "end_positions": 30})  # cut off: not asked

    def parts(prediction):
        return {"parts": len(prediction.predictions) + len(prediction.label_ids)}

    found = evaluate(model, rows, batch_size=3, compute_metrics=parts)
    assert (found["start_accuracy"], found["end_accuracy"], found["span_accuracy"]) == (1, 0.5, 0.5)
    assert found["parts"] == 4
    assert math.isfinite(found["loss"])


def test_masked_lm_perplexity():
    model = bert("BertForMaskedLM", initializer_range=0.05)
    rows = [{"input_ids": ids, "labels": [ids[0]] + [-100] * (len(ids) - 1)} for ids in tokens(5)]
    found = evaluate(model, rows)
    assert found["perplexity"] == pytest.approx(math.exp(found["loss"]))
    assert found["loss"] == pytest.approx(np.mean([alone(model, row).loss.item() for row in rows]), rel=1e-5)


def test_regression_and_multi_label():
    rows = [{"input_ids": ids, "label": len(ids) / 3} for ids in tokens(12)]
    model = bert(num_labels=1)
    predicted = [alone(model, {"input_ids": row["input_ids"]}).logits.item() for row in rows]
    true = [row["label"] for row in rows]
    found = evaluate(model, rows, batch_size=5)
    assert found["mse"] == pytest.approx(np.mean((np.array(predicted) - true) ** 2), rel=1e-5)
    assert found["loss"] == pytest.approx(found["mse"], rel=1e-5)
    assert found["pearson"] == pytest.approx(np.corrcoef(predicted, true)[0, 1], rel=1e-5)

    several = bert(num_labels=3)
    marked = [{"input_ids": ids, "labels": [1.0, 0.0, 1.0]} for ids in tokens(6)]
    logits = torch.cat([alone(several, {"input_ids": row["input_ids"]}).logits for row in marked]) > 0
    found = evaluate(several, marked, batch_size=4)
    assert found["accuracy"] == (logits == torch.tensor([True, False, True])).double().mean().item()
    both = logits[:, [0, 2]].sum().item()
    assert found["f1"] == 2 * both / (logits.sum().item() + 12)


def test_an_encoder_without_a_head_needs_compute_metrics():
    rows = [{"input_ids": ids} for ids in tokens(3)]
    with pytest.raises(DataError, match="nothing to measure: BertModel takes labels"):
        evaluate(bert("BertModel"), rows)
    found = evaluate(bert("BertModel"), rows, compute_metrics=lambda p: {"width": p.predictions[0].shape[-1]})
    assert found == {"width": 8.0}
    kept = evaluate(
        bert("BertModel"),
        rows,
        compute_metrics=lambda p: {"rows": len(p.predictions), "dims": p.predictions.ndim},
        preprocess_logits_for_metrics=lambda outputs, labels: outputs[1],
    )
    assert kept == {"rows": 3, "dims": 2}


def test_a_loader_is_taken_as_it_is():
    model = bert()
    rows = [{"input_ids": torch.tensor([5, 6, n]), "labels": n % 2} for n in range(8)]
    whole = evaluate(model, rows, compute_metrics=lambda p: {"first": p.predictions[0, 0]})
    loaded = evaluate(model, DataLoader(rows, batch_size=3), compute_metrics=lambda p: {"first": p.predictions[0, 0]})
    assert loaded == pytest.approx(whole, rel=1e-5)
    with pytest.raises(DataError, match="must return a dict"):
        evaluate(model, rows, compute_metrics=lambda p: 1.0)


def test_modes_come_back_after_an_error():
    model = bert().train()
    with pytest.raises(ValueError, match="input_ids"), evaluating(model):
        model()
    assert all(module.training for module in model.modules())

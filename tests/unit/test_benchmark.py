"""The benchmark measures what it says, in turn, and leaves the models as they were."""

import json
from functools import partial

import pytest
import torch
from transformers import (
    DistilBertConfig,
    DistilBertModel,
    ViTConfig,
    ViTModel,
)

import cofiprune
from cofiprune import timing
from cofiprune.errors import DataError, SettingsError
from cofiprune.measure.benchmark import benchmark
from cofiprune.measure.summary import summary
from small import bert as new_bert

bert = partial(new_bert, vocab_size=30, hidden_size=8, num_attention_heads=2, intermediate_size=16)


def test_side_by_side_with_the_ideal():
    model = bert()
    with cofiprune.attach(model) as masks:
        masks["layers.0.ffn"] = [0]
        masks["layers.1.heads"] = [0, 1]
        small = cofiprune.compact(model)
    report = benchmark(small, model, batch_size=(1, 2), seq_len=(8, 16), seconds=0, threads=1)
    assert [(row.batch_size, row.seq_len) for row in report.rows] == [(1, 8), (2, 8), (1, 16), (2, 16)]
    for row in report.rows:
        assert row.model.runs == row.baseline.runs == 5
        assert 0 < row.model.median_ms <= row.model.p90_ms
        assert row.model.examples_per_second == pytest.approx(1e3 * row.batch_size / row.model.median_ms)
        assert row.speedup == row.baseline.median_ms / row.model.median_ms
        cost = [summary(one, seq_len=row.seq_len).macs for one in (model, small)]
        assert row.ideal_speedup == cost[0] / cost[1]
    text = str(report)
    assert text.splitlines()[1] == "against BertForSequenceClassification (1.82 k parameters)"
    assert text.splitlines()[2] == "milliseconds per batch on cpu, 1 thread, float32"
    assert text.count("baseline") == len(report.rows)
    assert max(map(len, text.splitlines())) <= 80
    stored = json.loads(json.dumps(report.to_dict()))
    assert stored["rows"][0]["speedup"] == report.rows[0].speedup


def test_alone_under_masks_and_in_another_precision():
    model = bert()
    masks = cofiprune.attach(model)
    report = benchmark(model, batch_size=2, seq_len=8, runs=2, dtype=torch.bfloat16)
    (row,) = report.rows
    assert (row.model.runs, row.baseline, row.speedup, row.ideal_speedup) == (2, None, None, None)
    assert report.dtype == "bfloat16"
    assert model.dtype == torch.float32
    assert "under its masks" in str(report)
    assert "under its masks" in report._repr_html_()
    masks.detach()


def test_images_have_a_length_of_their_own_and_any_model_can_be_the_baseline():
    shape = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    report = benchmark(ViTModel(ViTConfig(**shape, image_size=8, patch_size=4)), batch_size=1, seq_len=(8, 9), runs=1)
    assert len(report.rows) == 1
    baseline = DistilBertModel(DistilBertConfig(vocab_size=9, dim=8, n_layers=1, n_heads=2, hidden_dim=8))
    (row,) = benchmark(bert(), baseline, batch_size=1, seq_len=8, runs=1).rows
    assert row.speedup > 0


def test_models_take_turns(monkeypatch):
    order = []
    clock = iter(range(1000))
    monkeypatch.setattr(timing.time, "perf_counter", lambda: float(next(clock)))
    passes = [lambda: order.append("a"), lambda: order.append("b")]
    times = timing.in_turn(passes, torch.device("cpu"), runs=3, warmup=1)
    assert "".join(order) == "ab" + "ab" + "ba" + "ab"
    assert times == [[1.0] * 3] * 2


def test_threads_come_back():
    before = torch.get_num_threads()
    with timing.cpu_threads(before + 1):
        assert torch.get_num_threads() == before + 1
    assert torch.get_num_threads() == before


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch_size": 0}, "batch_size takes whole numbers of at least 1, not 0"),
        ({"batch_size": ()}, "batch_size takes"),
        ({"seq_len": 1.5}, "seq_len takes"),
        ({"runs": 0}, "runs takes"),
        ({"baseline": "meta"}, "the baseline is on meta and the model on cpu"),
    ],
)
def test_wrong_settings(settings, message):
    if "baseline" in settings:
        settings = {"baseline": bert().to("meta")}
    with pytest.raises(SettingsError, match=message):
        benchmark(bert(), **settings)


def test_too_long_is_known_before_anything_is_timed():
    with pytest.raises(DataError, match="reads at most 32 tokens"):
        benchmark(bert(), seq_len=(8, 64))

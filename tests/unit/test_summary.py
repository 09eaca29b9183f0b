"""What `summary` says is what the parameters say."""

import html
import re
from functools import partial

import pytest

import cofiprune
from cofiprune.errors import SettingsError
from cofiprune.measure.summary import summary
from small import bert as new_bert

bert = partial(
    new_bert, vocab_size=60, hidden_size=16, num_hidden_layers=3, intermediate_size=32, max_position_embeddings=24
)


def masked(name="BertForSequenceClassification"):
    model = bert(name)
    masks = cofiprune.attach(model)
    masks["hidden"] = [1.0] * 12 + [0.0] * 4
    masks["layers.0.heads"] = [1, 0, 0, 0.5]
    masks["layers.1.attention"] = [0]
    masks["layers.1.intermediate"] = [1.0] * 5 + [0.0] * 27
    masks["layers.2.intermediate"] = [0.0] * 32
    return model, masks


def count(module):
    return sum(parameter.numel() for parameter in module.parameters())


def test_dense_model_is_counted_as_it_is():
    model = bert()
    found = summary(model, seq_len=10)
    assert found.state == "dense"
    assert found.parameters == found.dense.parameters == count(model)
    assert found.layer_parameters == count(model.bert.encoder)
    assert found.embedding_parameters == (60 + 24 + 2) * 16
    assert found.parameters_without_embeddings == count(model) - found.embedding_parameters
    matrices = 10 * (4 * 16 * 16 + 2 * 16 * 32) + 2 * 10 * 10 * 16
    assert found.layer_macs == 3 * matrices
    assert found.macs == 3 * matrices + 16 * 16 + 2 * 16
    assert found.sparsity == found.model_sparsity == 0


@pytest.mark.parametrize("name", ["BertForSequenceClassification", "BertForMaskedLM"])
def test_masks_show_what_compact_gives_and_the_compacted_model_where_it_came_from(name):
    model, masks = masked(name)
    planned = summary(model)
    small = cofiprune.compact(model)
    found = summary(small)
    assert (planned.state, found.state) == ("masked", "compacted")
    assert found.parameters == planned.parameters == count(small)
    assert found.dense.parameters == planned.dense.parameters == count(model)
    assert found.sparsity == planned.sparsity == masks.sparsity()
    assert found.model_sparsity == planned.model_sparsity == masks.model_sparsity()
    assert found.layers == planned.layers
    assert (found.hidden.kept, found.hidden.total) == (12, 16)
    first, second, third = found.layers
    assert str(first.heads) == "2 of 4"
    assert (second.attention, second.heads.kept, second.intermediate.kept) == (False, 0, 5)
    assert (third.attention, third.ffn) == (True, False)


def test_masks_on_a_compacted_model_count_from_the_dense_one():
    model, _ = masked()
    small = cofiprune.compact(model)
    again = cofiprune.attach(small)
    again["layers.0.heads"] = [0, 1]
    found = summary(small)
    assert found.state == "masked"
    assert found.dense.parameters == count(model)
    assert found.parameters == count(cofiprune.compact(small))
    assert str(found.layers[0].heads) == "1 of 4"


@pytest.mark.parametrize("jupyter", [False, True])
def test_text_and_page_show_the_same_in_a_notebook_too(monkeypatch, jupyter):
    monkeypatch.setattr("rich.console._is_jupyter", lambda: jupyter)
    model, _ = masked()
    for state in (model, cofiprune.compact(model)):
        found = summary(state, seq_len=64)
        text = str(found)
        assert repr(found) == text
        assert "MACs at 64 tokens" in text
        assert f"sparsity {found.sparsity:.4f}" in text
        assert "██··" in text  # two heads of four
        lines = {line.split("  ")[0].strip(): line for line in text.splitlines()}
        assert lines["layer 1"].count("removed") == 1
        assert "5 of 32" in lines["layer 1"]
        assert max(map(len, text.splitlines())) <= 80
        page = html.unescape(re.sub("<[^>]*>", "", found._repr_html_()))
        assert page.split() == text.split()


def test_a_picture_of_how_much_is_kept(tmp_path):
    picture = summary(cofiprune.compact(masked()[0])).plot(tmp_path / "structure.svg")
    assert (tmp_path / "structure.svg").read_text(encoding="utf-8").startswith("<svg")
    assert ">12 of 16</text>" in picture.svg
    assert ">2 of 4</text>" in picture.svg
    assert picture.svg.count(">removed</text>") == 2


def test_wrong_length():
    with pytest.raises(SettingsError, match="seq_len takes a whole number"):
        summary(masked()[0], seq_len=0)

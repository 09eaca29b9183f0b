"""A finished run tells what was before, writes a folder that explains itself, and does not write over another."""

import json
import re
from html.parser import HTMLParser

import pytest
import yaml
from transformers import AutoModelForSequenceClassification

import cofiprune
from cofiprune.errors import SettingsError
from cofiprune.training.checkpoint import has_checkpoints
from toy import bert, rows

SHORT = {"progress": False, "logging_steps": 2, "batch_size": 8}


def pruned(model=None, **settings):
    model = model or bert()
    held = rows(32, seed=1)
    return cofiprune.prune(
        model, rows(), eval_dataset=held, target_sparsity=0.6, epochs=1, finetune_epochs=1, **{**SHORT, **settings}
    )


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run with checkpoints, written to the folder of its checkpoints."""
    folder = tmp_path_factory.mktemp("run") / "small"
    model = bert()
    model.config._name_or_path = "someone/some-bert"
    before = cofiprune.evaluate(model, rows(32, seed=1))
    result = pruned(model, output_dir=folder, method="cofi")
    assert has_checkpoints(folder)
    result.save(folder, command=["cofiprune", "prune", "someone/some-bert"])
    return result, folder, before


def test_what_was_before_stands_beside_what_is_now(run):
    result, folder, before = run
    dense, small = result.dense, result.pruned
    assert dense.metrics == pytest.approx({f"eval_{name}": value for name, value in before.items()})
    assert small.metrics == result.metrics
    assert dense.parameters == bert().num_parameters() > small.parameters == result.compact().num_parameters()
    assert dense.parameters_without_embeddings < dense.parameters
    assert dense.megabytes == pytest.approx(4 * dense.parameters / 1e6, rel=0.01)
    header = 6000  # of the file, which says where each tensor stands
    assert small.megabytes * 1e6 == pytest.approx((folder / "model.safetensors").stat().st_size, abs=header)
    assert dense.latency_ms > 0 < small.latency_ms
    assert 1 - small.layer_parameters / dense.layer_parameters == pytest.approx(result.sparsity)
    shown = str(result)
    assert "dense" in shown
    assert f"{before['accuracy']:.4f}" in shown
    assert max(map(len, shown.splitlines())) <= 80


def test_a_folder_has_all_that_belongs_to_a_model(run):
    result, folder, _ = run
    names = {"model.safetensors", "config.json", "plan.json", "result.json", "report.html", "README.md"}
    names.add("modeling_bert_compacted.py")  # with which it loads without cofiprune
    assert {file.name for file in folder.iterdir()} == names, "checkpoints are gone once all is written"
    assert cofiprune.Plan.load(folder / "plan.json") == result.plan
    again = AutoModelForSequenceClassification.from_pretrained(folder)
    assert cofiprune.evaluate(again, rows(32, seed=1))["loss"] == pytest.approx(result.metrics["eval_loss"], rel=1e-4)
    told = json.loads((folder / "result.json").read_text())
    assert told["dense"]["metrics"] == result.dense.metrics
    assert told["settings"]["method"] == "cofi"


class Page(HTMLParser):
    """Tags that are opened, and what would be fetched."""

    def __init__(self, text):
        super().__init__()
        self.opened, self.fetched, self.tags = [], [], set()
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        if tag not in ("meta", "link", "br", "img", "rect", "path", "circle"):
            self.opened.append(tag)
        self.fetched += [value for name, value in attrs if name in ("src", "href", "xlink:href", "data")]

    def handle_startendtag(self, tag, attrs):
        self.tags.add(tag)

    def handle_endtag(self, tag):
        assert self.opened.pop() == tag


def test_the_report_is_one_file_with_table_map_and_curves(run):
    _, folder, before = run
    text = (folder / "report.html").read_text()
    page = Page(text)
    assert page.opened == []
    assert page.fetched == []
    assert not page.tags & {"script", "link", "img", "iframe"}
    assert not re.search(r"url\(|@import|https?://", text)
    assert "prefers-color-scheme:dark" in text
    assert text.count("<svg") == 2
    assert text.count('class="heads"') + text.count('class="gone"') >= 8
    for told in (f"{before['accuracy']:.4f}", "MACs", "latency", "MB", "target", "distill_temperature", "transformers"):
        assert told in text, told
    assert "cofiprune prune someone/some-bert" in text


def test_the_card_has_a_header_that_the_hub_reads(run):
    result, folder, _ = run
    hub = pytest.importorskip("huggingface_hub")
    card = hub.ModelCard.load(folder / "README.md")
    header = yaml.safe_load((folder / "README.md").read_text().split("---\n")[1])
    assert header["base_model"] == "someone/some-bert"
    assert header["base_model_relation"] == "finetune"
    assert {"pruned", "structured-pruning"} <= set(header["tags"])
    assert header["library_name"] == "transformers"
    (score,) = [each for each in card.data.eval_results if each.metric_type == "accuracy"]
    assert score.metric_value == pytest.approx(result.metrics["eval_accuracy"], abs=1e-4)
    assert "import cofiprune" in card.text
    assert f'from_pretrained("{folder.name}", trust_remote_code=True)' in card.text


def test_a_finished_model_is_not_written_over(run, tmp_path):
    result, folder, _ = run
    with pytest.raises(SettingsError, match="holds a finished model .*overwrite=True"):
        result.save(folder)
    assert result.save(folder, overwrite=True) == folder
    assert result.save(tmp_path / "new") == tmp_path / "new"


def test_finetune_tells_of_no_pruning(tmp_path):
    model = bert()
    result = cofiprune.finetune(model, rows(), eval_dataset=rows(32, seed=1), epochs=1, output_dir=tmp_path, **SHORT)
    assert {entry["phase"] for entry in result.history} == {"finetune"}
    assert result.sparsity == 0
    assert "sparsity" not in str(result)
    assert "kept" not in str(result)
    assert result.dense.metrics != result.pruned.metrics
    result.save(tmp_path, keep_checkpoints=True)
    assert has_checkpoints(tmp_path)
    assert not (tmp_path / "plan.json").exists()
    assert "pruned" not in (tmp_path / "README.md").read_text()
    small = pruned(model).compact()
    again = cofiprune.finetune(small, rows(), epochs=1, **SHORT)
    assert again.sparsity == pytest.approx(0.6, abs=0.005), "what an earlier run removed is not there"


@pytest.mark.parametrize(
    "arguments", [{}, {"train_dataset": rows(), "method": "one-shot"}], ids=["no data", "one-shot"]
)
@pytest.mark.filterwarnings("ignore:pruning without data:UserWarning")
def test_what_was_before_is_told_by_every_method(arguments, tmp_path):
    result = cofiprune.prune(bert(), target_sparsity=0.5, eval_dataset=rows(32, seed=1), **arguments, **SHORT)
    assert result.dense.metrics.keys() == result.pruned.metrics.keys() == {"eval_loss", "eval_accuracy"}
    result.save(tmp_path)
    assert "Structure" in (tmp_path / "report.html").read_text()
    result.plot(tmp_path / "plot.svg")
    assert (tmp_path / "plot.svg").read_text().startswith('<svg class="cofi"')
    with pytest.raises(SettingsError, match=".svg"):
        result.plot(tmp_path / "plot.png")

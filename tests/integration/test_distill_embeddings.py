"""examples/distill_embeddings.py: its texts, its measures, the folder that it writes, and the mistakes it explains."""

import importlib
import json
import math
import subprocess
import sys
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from transformers import AutoModel, AutoTokenizer, BertConfig, BertModel, BertTokenizerFast

import cofiprune
from cofiprune.errors import CheckpointError, DataError

stats = pytest.importorskip("scipy.stats")

EXAMPLES = Path(__file__).parents[2] / "examples"
WORDS = ["red", "green", "blue", "yellow", "white", "one", "two", "three", "stone", "bird", "house", "tree"]
WIDTH = 16
NARROWER = ["--target-sparsity", "0.8", "--units", "hidden", "intermediate", "--no-keep-hidden"]
"""Feed-forward dimensions alone, 0.6 of the layers, would not do."""


@pytest.fixture(scope="module")
def example() -> Iterator[Callable[[str], ModuleType]]:
    """Import a module of the examples by name."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(EXAMPLES)
        patch.setenv("HF_HUB_OFFLINE", "1")
        yield importlib.import_module


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model in a sentence-transformers folder."""
    folder = tmp_path_factory.mktemp("encoder")
    torch.manual_seed(0)
    sizes = {"hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    model = BertModel(BertConfig(vocab_size=40, max_position_embeddings=64, **sizes))
    with torch.no_grad():
        for name, value in model.named_parameters():
            if value.dim() == 2 and "embeddings" not in name:
                value.mul_(8)  # so that the layers matter
    model.save_pretrained(folder)
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    BertTokenizerFast(vocab={word: index for index, word in enumerate(vocabulary)}).save_pretrained(folder)
    kinds = {"": "Transformer", "1_Pooling": "Pooling", "2_Normalize": "Normalize"}
    modules = [
        {"idx": index, "name": str(index), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for index, (path, kind) in enumerate(kinds.items())
    ]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": 48, "do_lower_case": False}))
    (folder / "1_Pooling").mkdir()
    pooling = {"word_embedding_dimension": WIDTH, "pooling_mode_cls_token": False, "pooling_mode_mean_tokens": True}
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    return folder


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text a line, all different."""
    file = tmp_path_factory.mktemp("texts") / "texts.txt"
    file.write_text("\n".join(text_of(number) for number in range(160)) + "\n\n")
    return file


def text_of(number: int) -> str:
    """Words that spell the number in base 12, and some more of them."""
    digits = [number % 12, number // 12 % 12, number // 144 % 12]
    return " ".join(WORDS[digit] for digit in [*digits, *(digits[:1] * (number % 4))])


def run(script: ModuleType, *arguments: str | Path) -> dict[str, Any]:
    code = script.main([*map(str, arguments), "--tiny", "--no-benchmark"])
    assert code == 0
    result: dict[str, Any] = json.loads((Path(arguments[-1]) / "result.json").read_text())
    return result


def test_tiny_run_goes_through_all_steps(tmp_path: Path) -> None:
    result = subprocess.run(
        [sys.executable, EXAMPLES / "distill_embeddings.py", "--tiny", "--output-dir", tmp_path / "out"],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    for words in ("sparsity", "cosine", "Spearman", "nearest neighbour", "teacher's index", "latency, batch 32"):
        assert words in result.stdout
    figures = json.loads((tmp_path / "out" / "result.json").read_text())
    size = cofiprune.summary(AutoModel.from_pretrained(tmp_path / "out"))
    assert figures["sparsity"] == size.sparsity == pytest.approx(0.5, abs=0.005)
    assert figures["size"] == {"teacher": size.dense.layer_parameters, "student": size.layer_parameters}


def test_figures_are_those_of_the_saved_model(
    example: Callable[[str], ModuleType], encoder: Path, texts: Path, tmp_path: Path
) -> None:
    pairs = tmp_path / "pairs.tsv"
    lines = [f"{text_of(n)}\t{text_of(3 * n)}\t{n % 6}" for n in range(1, 40)]
    pairs.write_text("\n".join(["sentence1\tsentence2\tscore", *lines]))
    script = example("distill_embeddings")
    options = ("--model", encoder, "--train-file", texts, "--sts-file", pairs, "--epochs", "3")
    found = run(script, *options, "--learning-rate", "1e-3", "--output-dir", tmp_path / "out")

    assert (found["texts"], found["held_out"], found["pooling"]) == (96, 16, "mean")
    assert found["dimensions"] == {"teacher": WIDTH, "student": WIDTH}
    assert found["sparsity"] == pytest.approx(0.5, abs=0.005)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    kept = example("embedding_texts").read_texts(
        Namespace(
            train_file=texts, validation_file=None, data_dir=None, text_column=None, split_sentences=False, tiny=True,
            train_rows=96, eval_rows=40, batch_size=16,
        )
    )  # fmt: skip
    vectors = {}
    for name, folder in (("teacher", encoder), ("student", tmp_path / "out")):
        model = AutoModel.from_pretrained(folder).eval()
        with torch.no_grad():  # one by one: padding must not have counted
            states = [model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0] for text in kept.held_out]
        vectors[name] = torch.nn.functional.normalize(torch.stack([state.mean(0) for state in states]), dim=-1)
    cosines = (vectors["teacher"] * vectors["student"]).sum(-1)
    assert found["cosine"] == pytest.approx(float(cosines.mean()), abs=1e-5)
    assert 0.1 < found["cosine"] < 0.99999
    indices = torch.triu_indices(16, 16, 1)
    similar = [(one @ one.T)[indices[0], indices[1]].numpy() for one in vectors.values()]
    assert found["spearman"] == pytest.approx(stats.spearmanr(*similar).statistic, abs=1e-3)
    nearest = (vectors["student"] @ vectors["teacher"].T).argmax(1)
    assert found["found_in_index"] == pytest.approx(float((nearest == torch.arange(16)).float().mean()))
    assert found["sts_spearman"]["teacher"] != found["sts_spearman"]["student"]
    assert all(-1 <= value <= 1 for value in found["sts_spearman"].values())


def test_agreement_of_a_model_with_itself_and_with_noise(example: Callable[[str], ModuleType]) -> None:
    quality = example("embedding_quality")
    generator = torch.Generator().manual_seed(0)
    ours, noise = (torch.nn.functional.normalize(torch.randn(50, 8, generator=generator), dim=-1) for _ in range(2))
    same = quality.agreement(ours, ours, range(8))
    assert [same.cosine, same.cosine_p05, same.spearman] == pytest.approx([1, 1, 1])
    assert same.same_neighbour == same.found_in_index == 1
    other = quality.agreement(ours, noise, range(8))
    assert abs(other.cosine) < 0.2
    assert abs(other.spearman) < 0.2
    assert other.same_neighbour < 0.3
    turned, _ = torch.linalg.qr(torch.randn(8, 8, generator=generator))
    rotated = quality.agreement(ours, ours @ turned, range(8))
    assert rotated.spearman == pytest.approx(1, abs=1e-4)  # the similarities are the same,
    assert rotated.found_in_index < 0.5  # and the vectors are of no use in the old index
    narrow = quality.agreement(ours, torch.nn.functional.normalize(ours[:, 2:6], dim=-1), range(2, 6))
    assert narrow.found_in_index is None
    assert narrow.cosine == pytest.approx(float(ours[:, 2:6].norm(dim=-1).mean()), abs=1e-5)


@pytest.mark.parametrize("keep", [True, False])
def test_sentence_transformers_loads_the_result(
    example: Callable[[str], ModuleType], encoder: Path, texts: Path, tmp_path: Path, keep: bool
) -> None:
    out = tmp_path / "out"
    more = ["--target-sparsity", "0.5"] if keep else NARROWER
    script = example("distill_embeddings")
    found = run(script, "--model", encoder, "--train-file", texts, *more, "--output-dir", out)
    width = found["dimensions"]["student"]
    assert width == WIDTH if keep else width < WIDTH
    assert (found["found_in_index"] is None) == (not keep)
    assert json.loads((out / "1_Pooling" / "config.json").read_text())["word_embedding_dimension"] == width
    library = pytest.importorskip("sentence_transformers")
    sentences = library.SentenceTransformer(str(out), device="cpu")
    vectors = sentences.encode([text_of(5), text_of(77)])
    assert vectors.shape == (2, width)
    assert sentences.get_embedding_dimension() == width
    assert sentences.max_seq_length == 48
    quality, model = example("embedding_quality"), AutoModel.from_pretrained(out)
    ours = quality.Encoder(model, AutoTokenizer.from_pretrained(out), "mean", 48).vectors([text_of(5), text_of(77)])
    torch.testing.assert_close(torch.tensor(vectors), ours, rtol=0, atol=1e-5)


def test_a_model_that_is_smaller_already_is_pruned_further(
    example: Callable[[str], ModuleType], encoder: Path, texts: Path, tmp_path: Path
) -> None:
    script = example("distill_embeddings")
    more = ["--train-file", texts, "--output-dir"]
    first = run(script, "--model", encoder, *NARROWER, *more, tmp_path / "first")
    second = run(script, "--model", tmp_path / "first", "--target-sparsity", "0.5", *more, tmp_path / "second")
    assert second["dimensions"]["teacher"] == first["dimensions"]["student"] < WIDTH
    assert second["size"]["teacher"] == first["size"]["student"]
    assert second["sparsity"] > first["sparsity"]


def options_for(**given: Any) -> Namespace:
    defaults = {
        "train_file": None, "validation_file": None, "data_dir": None, "text_column": None, "split_sentences": False,
        "tiny": False, "train_rows": None, "eval_rows": None, "batch_size": 8,
    }  # fmt: skip
    return Namespace(**{**defaults, **given})


def test_texts_are_kept_once_and_never_on_both_sides(example: Callable[[str], ModuleType], tmp_path: Path) -> None:
    read = example("embedding_texts").read_texts
    rows = [{"sentence1": f"first {n % 50}", "sentence2": f"second {n}"} for n in range(60)]
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    apart = [{name: f"{text}!" for name, text in row.items()} for row in rows[:20]]
    (tmp_path / "validation.jsonl").write_text("\n".join(map(json.dumps, [*rows[:5], *apart])))
    found = read(options_for(data_dir=tmp_path))
    assert len(found.train) == len(set(found.train)) == 110
    assert len(found.held_out) == 40
    assert not set(found.train) & set(found.held_out)
    assert read(options_for(data_dir=tmp_path)) == found
    (tmp_path / "validation.jsonl").unlink()
    alone = read(options_for(data_dir=tmp_path, text_column=["sentence2"]))
    assert len(alone.held_out) + len(alone.train) == 60
    assert {text.split()[0] for text in alone.train} == {"second"}


def test_sentences_are_split(example: Callable[[str], ModuleType]) -> None:
    split = example("embedding_texts").sentences
    text = " = Heading = \n The first sentence has six words . Too short . Is this one long enough ? "
    assert split(text) == ["The first sentence has six words .", "Is this one long enough ?"]


def test_wikitext(example: Callable[[str], ModuleType]) -> None:
    folder = Path(__file__).resolve().parents[3] / "shared" / "data" / "wikitext2"
    if not folder.is_dir():
        pytest.skip("the data set wikitext2 is not here")
    found = example("embedding_texts").read_texts(options_for(data_dir=folder, split_sentences=True))
    assert len(found.train) > 5000
    assert len(found.held_out) == 1000
    assert not any(text.startswith("=") or not text.strip() for text in found.train)


def test_scored_pairs(example: Callable[[str], ModuleType], tmp_path: Path) -> None:
    module = example("embedding_texts")
    file = tmp_path / "dev.tsv"
    file.write_text("index\tsentence1\tsentence2\tscore\n0\ta\tb\t2.5\n1\tc\td\tx\n")
    with pytest.raises(DataError, match="row 2: the score is 'x'"):
        module.read_scored_pairs(file)
    file.write_text("index\tsentence1\tsentence2\tscore\n0\ta\tb\t2.5\n")
    assert module.read_scored_pairs(file).scores == [2.5]


def test_modules_stay_inside_their_folder(example: Callable[[str], ModuleType], tmp_path: Path) -> None:
    module = example("embedding_modules")
    (tmp_path / "modules.json").write_text(json.dumps([{"path": "../elsewhere", "type": "x.Pooling"}]))
    with pytest.raises(CheckpointError, match="outside"):
        module.Modules.of(str(tmp_path))
    assert module.Modules.of(str(tmp_path / "none")).pooling is None


@pytest.mark.parametrize(
    ("settings", "pooling"),
    [
        ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}, "cls"),
        ({"pooling_mode_cls_token": False, "pooling_mode_mean_tokens": True, "include_prompt": True}, "mean"),
        ({"pooling_mode": "cls"}, "cls"),
        ({"pooling_mode_max_tokens": True}, "max_tokens"),
    ],
)
def test_pooling_is_what_the_folder_says(
    example: Callable[[str], ModuleType], tmp_path: Path, settings: dict[str, Any], pooling: str
) -> None:
    (tmp_path / "modules.json").write_text(json.dumps([{"path": "1_Pooling", "type": "x.Pooling"}]))
    (tmp_path / "1_Pooling").mkdir()
    (tmp_path / "1_Pooling" / "config.json").write_text(json.dumps(settings))
    assert example("embedding_modules").Modules.of(str(tmp_path)).pooling == pooling


MISTAKES: list[tuple[Sequence[str], str]] = [
    (["--model", "no/such/folder"], "there is no directory"),
    (["--model", "EMPTY"], "holds no model"),
    (["--train-file", "no-such.txt"], "no-such.txt"),
    (["--train-file", "COLUMNS"], "has no text column of a known name"),
    (["--train-file", "COLUMNS", "--text-column", "word"], "Did you mean 'words'?"),
    (["--train-file", "FEW"], "0 texts to learn from and 5"),
    (["--data-dir", "EMPTY"], "has no train.*"),
    (["--validation-file", "FEW"], "needs --train-file"),
    (["--sts-file", "COLUMNS"], "sentence1, sentence2"),
    (["--target-sparsity", "50"], "0.5"),
    (["--target-sparsity", "none"], "nothing to do"),
    (["--units", "head", "hidden"], "--no-keep-hidden"),
    (["--pooling", "max"], "unknown pooling 'max'"),
    (["--epoch", "3"], "Did you mean '--epochs"),
    (["--output-dir", "FILE"], "is a file"),
]


@pytest.mark.parametrize(("arguments", "message"), MISTAKES, ids=lambda value: " ".join(value)[:40])
def test_a_mistake_ends_in_one_line(
    example: Callable[[str], ModuleType],
    encoder: Path,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    arguments: Sequence[str],
    message: str,
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "columns.tsv").write_text("words\tlabel\nred\t1\n")
    (tmp_path / "few.txt").write_text("one\ntwo\nthree\nfour\nfive\n")
    (tmp_path / "file").write_text("")
    places = {"EMPTY": "empty", "COLUMNS": "columns.tsv", "FEW": "few.txt", "FILE": "file"}
    given = [str(tmp_path / places[argument]) if argument in places else argument for argument in arguments]
    model = [] if "--model" in given else ["--model", str(encoder)]
    output = [] if "--output-dir" in given else ["--output-dir", str(tmp_path / "out")]
    assert example("distill_embeddings").main([*model, *output, *given, "--tiny"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("distill_embeddings: error: ")
    assert message in error
    assert error.count("\n") == 1


def test_the_output_does_not_overwrite_the_model(
    example: Callable[[str], ModuleType], encoder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["--model", str(encoder), "--output-dir", str(encoder), "--tiny"]
    assert example("distill_embeddings").main(given) == 2
    assert "would be overwritten" in capsys.readouterr().err


def test_numbers_are_finite(example: Callable[[str], ModuleType], encoder: Path, texts: Path, tmp_path: Path) -> None:
    found = run(
        example("distill_embeddings"), "--model", encoder, "--train-file", texts, "--pooling", "cls", "--output-dir",
        tmp_path / "out",
    )  # fmt: skip
    assert found["pooling"] == "cls"
    assert all(math.isfinite(found[name]) for name in ("cosine", "spearman", "same_neighbour"))

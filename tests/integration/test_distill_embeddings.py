"""examples/distill_embeddings.py: its texts, its measures, the folder that it writes, and the mistakes it explains."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from transformers import AutoModel, AutoTokenizer, BertConfig, BertModel, BertTokenizerFast, PreTrainedModel

import cofiprune

Capsys = pytest.CaptureFixture[str]

stats = pytest.importorskip("scipy.stats")

WORDS = ["red", "green", "blue", "yellow", "white", "one", "two", "three", "stone", "bird", "house", "tree"]
WIDTH = 16
NARROWER = ["--target-sparsity", "0.8", "--units", "hidden", "intermediate", "--no-keep-hidden"]
"""Feed-forward dimensions alone, 0.6 of the layers, would not do."""


@pytest.fixture(scope="module")
def script(example: Callable[[str], ModuleType]) -> ModuleType:
    return example("distill_embeddings")


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


def test_the_mean_reciprocal_rank_counts_the_first_ten(script):
    index = torch.eye(16)
    queries = torch.stack([index[3], index[4] + index[5] * 0.5, -index[6]])
    assert script.retrieval(queries, index, [3, 5, 6]) == pytest.approx((1 + 1 / 2) / 3)


def test_paragraphs_are_found_in_both_indices(script, tmp_path):
    file = tmp_path / "questions.json"
    texts = [f"text {number % 5}" for number in range(20)]
    file.write_text(json.dumps([{"question": text, "context": text} for text in texts]))
    place = {text: number for number, text in enumerate(dict.fromkeys(texts))}

    def embed(asked):
        return torch.eye(5)[[place[text] for text in asked]]

    found = script.retrieval_scores(str(file), embed, lambda asked: -embed(asked))
    assert list(found.values()) == pytest.approx([1, 1 / 5, 1])  # the right one comes last of five
    found = script.retrieval_scores(str(file), embed, lambda asked: embed(asked)[:, :4])
    assert "MRR@10 in the teacher's index" not in found


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


def run(script: ModuleType, folder: Path, *words: str | Path) -> dict[str, Any]:
    script.main([*map(str, words), "--tiny", "--no-benchmark", "--output-dir", str(folder)])
    result: dict[str, Any] = json.loads((folder / "result.json").read_text())
    return result


def test_tiny_run_goes_through_all_steps(script: ModuleType, tmp_path: Path, capsys: Capsys) -> None:
    script.main(["--tiny", "--output-dir", str(tmp_path)])
    printed = capsys.readouterr().out
    for words in ("sparsity", "cosine", "Spearman", "nearest neighbour", "teacher's index", "milliseconds per batch"):
        assert words in printed
    figures = json.loads((tmp_path / "result.json").read_text())
    size = cofiprune.summary(AutoModel.from_pretrained(tmp_path))
    assert figures["sparsity"] == size.sparsity == pytest.approx(0.5, abs=0.005)
    with pytest.raises(cofiprune.CofipruneError, match="checkpoints of an earlier run"):
        script.main(["--tiny", "--output-dir", str(tmp_path)])


def embed(script: ModuleType, model: PreTrainedModel, folder: Path, texts: list[str], pooling: str = "mean") -> Any:
    return script.vectors(model, AutoTokenizer.from_pretrained(folder), texts, pooling, 24)


def test_figures_are_those_of_the_saved_model(
    script: ModuleType, encoder: Path, texts: Path, tmp_path: Path, capsys: Capsys
) -> None:
    pairs = tmp_path / "pairs.tsv"
    lines = [f"{text_of(n)}\t{text_of(3 * n)}\t{n % 6}" for n in range(1, 40)]
    pairs.write_text("\n".join(["sentence1\tsentence2\tscore", *lines]))
    words = ["--model", encoder, "--train-file", texts, "--sts-file", pairs, "--pooling", "cls", "--epochs", "2"]
    found = run(script, tmp_path / "out", *words)
    assert (found["dimensions"], found["pooling"]) == (WIDTH, "cls")
    assert "96 texts to learn from, 16 held out" in capsys.readouterr().out
    model = AutoModel.from_pretrained(tmp_path / "out")
    first, second = (embed(script, model, encoder, [text_of(n * k) for n in range(1, 40)], "cls") for k in (1, 3))
    expected = stats.spearmanr((first * second).sum(-1), [n % 6 for n in range(1, 40)]).statistic
    assert found["STS"] == pytest.approx(expected, abs=1e-6)
    _, held_out = script.load_texts(script.parse([*map(str, words), "--tiny"])[0])
    vectors = [embed(script, one, encoder, held_out, "cls") for one in (AutoModel.from_pretrained(encoder), model)]
    again = script.agreement(*vectors, range(WIDTH))
    assert {name: found[name] for name in again} == pytest.approx(again, abs=1e-5)
    assert all(math.isfinite(value) for value in again.values())


def test_agreement_of_a_model_with_itself_and_with_noise(script: ModuleType) -> None:
    generator = torch.Generator().manual_seed(0)
    ours, noise = (torch.nn.functional.normalize(torch.randn(50, 8, generator=generator), dim=-1) for _ in range(2))
    names = (
        "cosine, mean", "cosine, 5th percentile", "Spearman of all similarities", "same nearest neighbour",
        "found in the teacher's index",
    )  # fmt: skip
    assert script.agreement(ours, ours, range(8)) == pytest.approx(dict.fromkeys(names, 1.0))
    other = script.agreement(ours, noise, range(8))
    assert all(abs(other[name]) < 0.3 for name in (names[0], names[2], names[3]))
    turned, _ = torch.linalg.qr(torch.randn(8, 8, generator=generator))
    rotated = script.agreement(ours, ours @ turned, range(8))
    assert rotated[names[2]] == pytest.approx(1, abs=1e-4)  # the similarities are the same,
    assert rotated[names[4]] < 0.5  # and the vectors are of no use in the old index
    narrow = script.agreement(ours, torch.nn.functional.normalize(ours[:, 2:6], dim=-1), range(2, 6))
    assert names[4] not in narrow
    assert narrow[names[0]] == pytest.approx(float(ours[:, 2:6].norm(dim=-1).mean()), abs=1e-5)


@pytest.mark.parametrize("keep", [True, False])
def test_sentence_transformers_loads_the_result(
    script: ModuleType, encoder: Path, texts: Path, tmp_path: Path, keep: bool
) -> None:
    more = [] if keep else NARROWER
    found = run(script, tmp_path, "--model", encoder, "--train-file", texts, *more)
    width = found["dimensions"]
    assert width == WIDTH if keep else width < WIDTH
    assert json.loads((tmp_path / "1_Pooling" / "config.json").read_text())["word_embedding_dimension"] == width
    library = pytest.importorskip("sentence_transformers")
    sentences = library.SentenceTransformer(str(tmp_path), device="cpu")
    chosen = [text_of(5), text_of(77)]
    vectors = sentences.encode(chosen)
    assert vectors.shape == (2, width)
    assert sentences.max_seq_length == 48
    ours = embed(script, AutoModel.from_pretrained(tmp_path), tmp_path, chosen)
    torch.testing.assert_close(torch.tensor(vectors), ours, rtol=0, atol=1e-5)


def test_a_model_that_is_smaller_already_is_pruned_further(
    script: ModuleType, encoder: Path, texts: Path, tmp_path: Path
) -> None:
    first = run(script, tmp_path / "first", "--model", encoder, *NARROWER, "--train-file", texts)
    second = run(script, tmp_path / "second", "--model", tmp_path / "first", "--train-file", texts)
    assert second["dimensions"] == first["dimensions"] < WIDTH
    assert second["sparsity"] > first["sparsity"]


def test_texts_are_kept_once_and_never_on_both_sides(script: ModuleType, tmp_path: Path) -> None:
    def read(*words: str) -> Any:
        return script.load_texts(script.parse(["--data-dir", str(tmp_path), *words])[0])

    rows = [{"sentence1": f"first {n % 50}", "sentence2": f"second {n}"} for n in range(60)]
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    apart = [{name: f"{text}!" for name, text in row.items()} for row in rows[:20]]
    (tmp_path / "validation.jsonl").write_text("\n".join(map(json.dumps, [*rows[:5], *apart])))
    texts, held_out = read()
    assert len(texts) == len(set(texts)) == 110
    assert len(held_out) == 40
    assert not set(texts) & set(held_out)
    assert read() == (texts, held_out)
    (tmp_path / "validation.jsonl").unlink()
    texts, held_out = read("--text-column", "sentence2")
    assert len(held_out) + len(texts) == 60
    assert {text.split()[0] for text in texts} == {"second"}
    with pytest.raises(SystemExit, match="0 texts to learn from and 0"):
        read("--split-sentences")


def test_sentences_are_split(script: ModuleType) -> None:
    text = " = Heading = \n The first sentence has six words . Too short . Is this one long enough ? "
    assert script.sentences(text) == ["The first sentence has six words .", "Is this one long enough ?"]


def test_wikitext(script: ModuleType) -> None:
    folder = Path(__file__).resolve().parents[3] / "shared" / "data" / "wikitext2"
    if not folder.is_dir():
        pytest.skip("the data set wikitext2 is not here")
    texts, held_out = script.load_texts(script.parse(["--data-dir", str(folder), "--split-sentences"])[0])
    assert len(texts) > 5000
    assert len(held_out) == 1000
    assert not any(text.startswith("=") or not text.strip() for text in texts)


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
    script: ModuleType, tmp_path: Path, settings: dict[str, Any], pooling: str
) -> None:
    (tmp_path / "modules.json").write_text(json.dumps([{"path": "1_Pooling", "type": "x.Pooling"}]))
    (tmp_path / "1_Pooling").mkdir()
    (tmp_path / "1_Pooling" / "config.json").write_text(json.dumps(settings))
    assert script.pooling_of(str(tmp_path), script.read_modules(str(tmp_path))) == pooling
    assert script.pooling_of(str(tmp_path / "none"), script.read_modules(str(tmp_path / "none"))) == "mean"


MISTAKES: list[tuple[list[str], str]] = [
    (["--train-file", "no-such.txt"], "there is no file no-such.txt"),
    (["--train-file", "COLUMNS"], "has no text column of a known name"),
    (["--train-file", "FEW"], "0 texts to learn from and 5"),
    (["--data-dir", "FOLDER"], "no train.*"),
    (["--units", "head", "hidden"], "--no-keep-hidden"),
    (["--epoch", "3"], "Did you mean 'epochs'"),
    (["--model", "OUTSIDE"], "outside of its folder"),
]


@pytest.mark.parametrize(("words", "message"), MISTAKES, ids=lambda value: " ".join(value)[:40])
def test_mistakes_are_explained(
    script: ModuleType,
    encoder: Path,
    capsys: Capsys,
    tmp_path: Path,
    words: list[str],
    message: str,
) -> None:
    (tmp_path / "columns.tsv").write_text("words\tlabel\nred\t1\n")
    (tmp_path / "few.txt").write_text("one\ntwo\nthree\nfour\nfive\n")
    (tmp_path / "modules.json").write_text(json.dumps([{"path": "../elsewhere", "type": "x.Pooling"}]))
    places = {"FOLDER": "", "COLUMNS": "columns.tsv", "FEW": "few.txt", "OUTSIDE": ""}
    given = [str(tmp_path / places[word]) if word in places else word for word in words]
    with pytest.raises((SystemExit, cofiprune.CofipruneError)) as stop:
        script.main(["--model", str(encoder), "--output-dir", str(tmp_path / "out"), *given, "--tiny"])
    assert message in f"{stop.value}{capsys.readouterr().err}"

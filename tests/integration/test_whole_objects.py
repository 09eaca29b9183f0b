"""Objects of sentence-transformers: what goes in comes out, smaller, with all that is around the encoder."""

import subprocess
import sys

import numpy as np
import pytest
import torch
import transformers

import cofiprune
from cofiprune.errors import AdapterError, CofipruneError, DataError, SettingsError
from small import build

library = pytest.importorskip("sentence_transformers")

WORDS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghijklmnopqrstuvwxyz")
TEXTS = [f"a {x} {y} c" for x in "bdefghij" for y in "klmnop"]
PAIRS = [(text, text[::-1]) for text in TEXTS]
SHORT = {"target_sparsity": 0.4, "epochs": 1, "finetune_epochs": 1, "progress": False}
HIDDEN = ("hidden", "head", "intermediate")
WIDTH = 24


@pytest.fixture(autouse=True)
def _old_names(recwarn):
    """Releases of sentence-transformers warn of their own names."""


def saved(folder, name, **settings):
    build(name, dtype=torch.float32, vocab_size=len(WORDS), **settings).save_pretrained(folder)
    vocabulary = {word: number for number, word in enumerate(WORDS)}
    transformers.BertTokenizerFast(vocab=vocabulary, model_max_length=20).save_pretrained(folder)
    return str(folder)


def modules(*names, width=WIDTH):
    found = library.sentence_transformer.modules if hasattr(library, "sentence_transformer") else library.models
    made = {
        "mean": lambda: found.Pooling(width, pooling_mode="mean"),
        "cls": lambda: found.Pooling(width, pooling_mode="cls"),
        "two": lambda: found.Pooling(width, pooling_mode_mean_tokens=True, pooling_mode_max_tokens=True),
        "Dense": lambda: found.Dense(2 * width if "two" in names else width, 10),
        "LayerNorm": lambda: found.LayerNorm(width),
        "Normalize": found.Normalize,
    }
    return [made[name]() for name in names]


def sentences(folder, *names, **settings):
    transformer = library.SentenceTransformer(saved(folder, "BertModel"), device="cpu")[0]
    prompts = {"query": "q ", "passage": "p z "}
    return library.SentenceTransformer(
        modules=[transformer, *modules(*names)], prompts=prompts, device="cpu", **settings
    )


def pairs(folder, labels=1):
    return library.CrossEncoder(saved(folder, "BertForSequenceClassification", num_labels=labels), device="cpu")


def alike(one, other, tolerance=1e-5):
    np.testing.assert_allclose(one, other, rtol=0, atol=tolerance)


def masked(whole):
    masks = cofiprune.attach(whole)
    masks["hidden"] = [0, 1, 1, 0.5] * (WIDTH // 4)
    masks["layers.0.heads"] = [1, 0, 0.5, 1]
    masks["layers.1.attention"] = [0]
    return masks


@pytest.mark.parametrize("names", [("mean",), ("mean", "Normalize"), ("two",), ("two", "Dense", "Normalize")])
def test_masked_compacted_and_reloaded_give_the_same_vectors(tmp_path, names):
    whole = sentences(tmp_path / "dense", *names, default_prompt_name="query", similarity_fn_name="dot")
    whole.max_seq_length = 6
    before = whole.encode(TEXTS)
    masks = masked(whole)
    wanted = whole.encode(TEXTS)
    small = cofiprune.compact(whole)
    masks.detach()
    alike(whole.encode(TEXTS), before, 0)
    kept = np.flatnonzero(np.arange(WIDTH) % 4)
    turns = 1 if "mean" in names else 2
    columns = slice(None) if "Dense" in names else np.concatenate([kept + turn * WIDTH for turn in range(turns)])
    alike(small.encode(TEXTS), wanted[:, columns])
    assert np.abs(wanted - before).max() > 0.01
    small.save_pretrained(str(tmp_path / "small"))
    again = library.SentenceTransformer(str(tmp_path / "small"), device="cpu")
    alike(again.encode(TEXTS), small.encode(TEXTS), 0)
    for each in (small, again):
        assert type(each) is type(whole)
        assert [type(module) for module in each] == [type(module) for module in whole]
        found = each.max_seq_length, each.default_prompt_name, each.similarity_fn_name
        assert found == (6, "query", "dot")
        alike(each.encode(TEXTS, prompt_name="passage"), small.encode(["p z " + text for text in TEXTS], prompt=""))
        assert each[1].get_config_dict().items() >= {next(iter(each[1].get_config_dict())): len(kept)}.items()


@pytest.mark.parametrize("here", [True, False])
def test_another_process_loads_it(tmp_path, here):
    """With cofiprune, and without it by the code in the folder."""
    whole = sentences(tmp_path / "dense", "mean", "Normalize")
    masked(whole)
    small = cofiprune.compact(whole)
    small.save_pretrained(str(tmp_path / "small"))
    program = (
        f"import sys; {'import cofiprune' if here else 'sys.modules.update(cofiprune=None)'}; import numpy as np; "
        "from sentence_transformers import SentenceTransformer as S; "
        f"np.save(sys.argv[2], S(sys.argv[1], device='cpu', trust_remote_code={not here}).encode(sys.argv[3:]))"
    )
    target = tmp_path / "vectors.npy"
    subprocess.run([sys.executable, "-c", program, tmp_path / "small", target, *TEXTS[:3]], check=True)
    alike(np.load(target), small.encode(TEXTS[:3]))


@pytest.mark.parametrize("labels", [1, 3])
def test_a_cross_encoder_gives_the_same_scores(tmp_path, labels):
    whole = pairs(tmp_path / "dense", labels)
    before = whole.predict(PAIRS)
    masks = masked(whole)
    wanted, small = whole.predict(PAIRS), cofiprune.compact(whole)
    masks.detach()
    alike(small.predict(PAIRS), wanted)
    assert np.abs(wanted - before).max() > 1e-3
    small.save_pretrained(str(tmp_path / "small"))
    again = library.CrossEncoder(str(tmp_path / "small"), device="cpu")
    alike(again.predict(PAIRS), small.predict(PAIRS), 0)
    assert again.num_labels == small.num_labels == labels
    assert type(again.activation_fn) is type(small.activation_fn) is type(whole.activation_fn)


ROWS = {
    "texts": TEXTS,
    "pairs": PAIRS,
    "columns": [{"anchor": one, "positive": other, "label": 1.0} for one, other in PAIRS],
    "tokens": [{"input_ids": [2, 5 + n % 20, 6, 3], "attention_mask": [1] * 4} for n in range(48)],
}


@pytest.mark.parametrize(
    ("rows", "settings"),
    [("texts", {}), ("pairs", {"method": "one-shot"}), ("columns", {"method": "auto"}), ("tokens", {})],
)
def test_a_sentence_transformer_is_pruned_on_texts(tmp_path, rows, settings):
    whole = sentences(tmp_path, "mean", "Normalize")
    result = cofiprune.prune(whole, ROWS[rows], **SHORT, **settings)
    assert result.model is whole
    assert result.sparsity == pytest.approx(0.4, abs=0.005)
    assert "SentenceTransformer" in str(result)
    small = result.compact()
    assert type(small) is type(whole)
    alike(small.encode(TEXTS), whole.encode(TEXTS)[:, list(result.plan.keep["hidden"])])
    trained = cofiprune.finetune(small, TEXTS, teacher=sentences(tmp_path, "mean"), epochs=1, progress=False)
    assert trained.model is small
    alike(trained.compact().encode(TEXTS), small.encode(TEXTS))


@pytest.mark.parametrize("labels", [1, 3])
def test_a_cross_encoder_is_pruned_on_pairs(tmp_path, labels):
    example = library.InputExample
    rows = {
        "unlabelled": PAIRS,
        "columns": [{"query": one, "answer": two, "score": n % max(labels, 2)} for n, (one, two) in enumerate(PAIRS)],
        "examples": [example(texts=list(pair), label=n % max(labels, 2)) for n, pair in enumerate(PAIRS)],
    }
    for name, given in rows.items():
        whole = pairs(tmp_path, labels)
        result = cofiprune.prune(whole, given, eval_dataset=rows["columns"], teacher="self", **SHORT)
        assert result.model is whole
        assert any("label_loss" in entry for entry in result.history) == (name != "unlabelled")
        assert result.metrics.keys() & {"eval_mse", "eval_accuracy"}
        alike(result.compact().predict(PAIRS), whole.predict(PAIRS))


def test_what_an_object_teaches_is_written_and_learned(tmp_path):
    whole, settings = sentences(tmp_path / "sentences", "two", "Dense", "Normalize"), {"epochs": 1, "progress": False}
    for rows in ("texts", "pairs", "columns"):
        file = cofiprune.teach(whole, ROWS[rows], tmp_path / f"{rows}.parquet", dtype="float32", progress=False)
        found = cofiprune.data.load_rows(file)
        alike([row["teacher_embedding"] for row in found], whole.encode([row["text"] for row in found]))
        assert {row["text"] for row in found} == {text for row in ROWS[rows] for text in _texts(row)}
    student = sentences(tmp_path / "student", "mean")
    result = cofiprune.prune(student, file, target_sparsity=0.3, finetune_epochs=1, **settings)
    assert result.history[-1]["logits_loss"] > 0
    cross = pairs(tmp_path / "cross", 3)
    file = cofiprune.teach(cross, PAIRS, tmp_path / "cross.jsonl", dtype="float32", progress=False)
    found = cofiprune.data.load_rows(file)
    with torch.no_grad():
        wanted = cross.predict(PAIRS, activation_fn=torch.nn.Identity())
    alike([row["teacher_logits"] for row in found], wanted)
    live = cofiprune.finetune(pairs(tmp_path / "one", 3), PAIRS, teacher=cross, distill_layers_weight=0, **settings)
    cached = cofiprune.finetune(pairs(tmp_path / "one", 3), file, distill_layers_weight=0, **settings)
    assert cached.history[-1]["loss"] == pytest.approx(live.history[-1]["loss"], rel=1e-5)


@pytest.mark.parametrize("rows", ["texts", "pairs", "columns"])
def test_texts_without_labels_are_mixed_in(tmp_path, rows):
    whole = sentences(tmp_path / "sentences", "mean", "Normalize")
    result = cofiprune.finetune(
        whole, ["a b", "c d"], unlabelled_dataset=ROWS[rows], teacher="self", batch_size=8, epochs=1, progress=False
    )
    texts = {text for row in ROWS[rows] for text in _texts(row)}
    assert result.history[-1]["step"] == -(-(len(texts) + 2) // 8)
    if rows == "texts":
        return
    scored = [{"query": one, "answer": two, "score": n % 2} for n, (one, two) in enumerate(PAIRS[:8])]
    cross = cofiprune.finetune(
        pairs(tmp_path / "pairs"), scored, unlabelled_dataset=ROWS[rows], teacher="self", epochs=1, progress=False
    )
    assert cross.history[-1]["label_loss"] > 0


def _texts(row):
    cells = [row] if isinstance(row, str) else row.values() if isinstance(row, dict) else row
    return [cell for cell in cells if isinstance(cell, str)]


@pytest.mark.parametrize("names", [("mean", "Normalize"), ("cls",), ("two", "Dense")])
def test_the_vectors_are_distilled_as_the_object_pools_them(tmp_path, names):
    whole = sentences(tmp_path / "dense", *names)
    pooling = "cls" if "cls" in names else "mean"
    for run, goal in ((cofiprune.prune, {"target_sparsity": 0.4}), (cofiprune.finetune, {"teacher": "self"})):
        result = run(whole, TEXTS, epochs=1, progress=False, **goal)
        assert result.settings.embedding_pooling == pooling
        assert "logits_loss" in result.history[-1] or "logits_loss" in result.history[-2]


def test_without_data_and_to_several_targets(tmp_path):
    with pytest.warns(UserWarning, match="pruning without data"):
        result = cofiprune.prune(sentences(tmp_path, "mean"), target_sparsity=0.3, progress=False)
    assert result.compact().encode(TEXTS).shape == (len(TEXTS), len(result.plan.keep["hidden"]))
    points = cofiprune.prune(sentences(tmp_path, "mean"), TEXTS, **{**SHORT, "target_sparsity": [0.3, 0.5]})
    for point in points:
        assert point.model.encode(TEXTS).shape == (len(TEXTS), len(point.plan.keep["hidden"]))


def test_vectors_keep_the_teachers_space_and_width(tmp_path):
    whole = sentences(tmp_path / "dense", "mean", "Normalize")
    dense = whole.encode(TEXTS)
    result = cofiprune.prune(whole, TEXTS, keep_width=True, units=HIDDEN, **SHORT)
    small = result.compact()
    wide = small.encode(TEXTS)
    assert wide.shape == dense.shape
    alike(np.linalg.norm(wide, axis=1), 1)
    alike(whole.encode(TEXTS), wide)
    kept = list(result.plan.keep["hidden"])
    assert len(kept) < WIDTH
    assert small[-2].get_config_dict()["in_features"] == len(kept)
    plain = library.SentenceTransformer(modules=list(small)[:3], device="cpu").encode(TEXTS)
    assert (wide * dense).sum(1).mean() > (plain * dense[:, kept]).sum(1).mean()
    small.save_pretrained(str(tmp_path / "small"))
    alike(library.SentenceTransformer(str(tmp_path / "small"), device="cpu").encode(TEXTS), wide, 0)


def test_nothing_is_appended_where_the_width_stays(tmp_path):
    whole = sentences(tmp_path, "mean", "Dense")
    cofiprune.prune(whole, TEXTS, keep_width=True, units=HIDDEN, **SHORT)
    assert len(list(whole)) == 3


@pytest.mark.parametrize(
    ("make", "arguments", "words"),
    [
        (pairs, {"train_dataset": PAIRS}, "SentenceTransformer"),
        (lambda folder: sentences(folder, "mean"), {}, "train_dataset"),
        (
            lambda folder: sentences(folder, "mean"),
            {"train_dataset": TEXTS, "target_sparsity": [0.2, 0.4]},
            "one target",
        ),
    ],
)
def test_what_a_width_is_kept_of(tmp_path, make, arguments, words):
    with pytest.raises(SettingsError, match=words):
        cofiprune.prune(make(tmp_path), keep_width=True, progress=False, **arguments)


def test_the_vocabulary_of_a_whole_object(tmp_path):
    whole = sentences(tmp_path / "dense", "mean", "Normalize")
    before = whole.encode(TEXTS), whole.encode(TEXTS, prompt_name="passage")
    for arguments in ({"tokenizer": whole.tokenizer, "texts": TEXTS}, {"texts": TEXTS}, {"tokenizer": TEXTS}):
        found = cofiprune.prune_vocabulary(whole, **arguments)
        assert len(found.kept) < len(WORDS)
    found.save(tmp_path / "small")
    again = library.SentenceTransformer(str(tmp_path / "small"), device="cpu")
    for each in (whole, found.model, again):
        alike(each.encode(TEXTS), before[0])
        alike(each.encode(TEXTS, prompt_name="passage"), before[1])
    assert len(found.model.tokenizer) == len(again.tokenizer) == len(found.kept)
    assert len(whole.tokenizer) == len(WORDS)
    cross = pairs(tmp_path / "cross")
    alike(cofiprune.prune_vocabulary(cross, texts=PAIRS).model.predict(PAIRS), cross.predict(PAIRS))
    with pytest.raises(SettingsError, match="tokenizer of its own"):
        cofiprune.prune_vocabulary(whole, found.tokenizer, TEXTS)


def test_what_else_takes_one(tmp_path):
    whole = pairs(tmp_path, 3)
    assert cofiprune.structure(whole).keys() == cofiprune.structure(whole.model).keys()
    assert cofiprune.summary(whole).parameters == sum(value.numel() for value in whole.model.parameters())
    rows = [{"sentence1": one, "sentence2": two, "label": 2} for one, two in PAIRS]
    right = cofiprune.evaluate(whole, rows)["accuracy"]
    assert right == pytest.approx((whole.predict(PAIRS).argmax(1) == 2).mean())
    report = cofiprune.benchmark(whole, whole, batch_size=1, seq_len=8, runs=2)
    assert report.rows[0].baseline is not None


def unfit(folder, kind):
    if kind == "StaticEmbedding":
        tokenizer = sentences(folder, "mean").tokenizer.backend_tokenizer
        static = library.sentence_transformer.modules.StaticEmbedding(tokenizer, embedding_dim=4)
        return library.SentenceTransformer(modules=[static], device="cpu")
    if kind == "Router":
        routes = {name: list(sentences(folder, "mean")) for name in ("query", "document")}
        router = library.base.modules.Router.for_query_document(routes["query"], routes["document"])
        return library.SentenceTransformer(modules=[router], device="cpu")
    return library.SparseEncoder(saved(folder, "BertForMaskedLM"), device="cpu")


@pytest.mark.parametrize("kind", ["StaticEmbedding", "Router", "SparseEncoder"])
def test_what_holds_no_one_encoder_is_refused_by_its_name(tmp_path, kind):
    pytest.importorskip("sentence_transformers.base", reason="builds them as release 6 does")
    whole = unfit(tmp_path, kind)
    for use in (cofiprune.attach, cofiprune.compact, cofiprune.prune, cofiprune.summary, cofiprune.prune_vocabulary):
        with pytest.raises(AdapterError, match=kind):
            use(whole)


def test_hidden_dimensions_that_something_needs_stay(tmp_path):
    normed, cut = sentences(tmp_path, "mean", "LayerNorm"), sentences(tmp_path, "mean", truncate_dim=4)
    for whole, words in ((normed, "LayerNorm"), (cut, "first 4")):
        before = whole.encode(TEXTS)
        with pytest.raises(SettingsError, match=rf"{words}.*units=\('layer', 'head', 'intermediate'\)"):
            cofiprune.prune(whole, TEXTS, method="cofi", **SHORT)
        alike(whole.encode(TEXTS), before, 0)
        masked(whole)
        with pytest.raises(SettingsError, match=words):
            cofiprune.compact(whole)
        result = cofiprune.prune(whole, TEXTS, **SHORT)  # one shot leaves them
        alike(result.compact().encode(TEXTS), whole.encode(TEXTS))


@pytest.mark.parametrize(
    ("rows", "words"), [([1, 2], "row 0 has no text"), ([{"n": 1}], "row 0 has no text"), ("abc", "")]
)
def test_rows_without_texts_are_refused(tmp_path, rows, words):
    with pytest.raises(DataError, match=words):
        cofiprune.prune(sentences(tmp_path, "mean"), rows, **SHORT)
    with pytest.raises(CofipruneError):
        cofiprune.prune(pairs(tmp_path / "pairs"), TEXTS, **SHORT)


def test_a_result_is_saved_whole(tmp_path):
    result = cofiprune.prune(sentences(tmp_path / "dense", "mean", "Normalize"), TEXTS, **SHORT)
    result.save(tmp_path / "saved")
    again = library.SentenceTransformer(str(tmp_path / "saved"), device="cpu")
    alike(again.encode(TEXTS), result.compact().encode(TEXTS), 0)


@pytest.mark.slow
def test_the_exported_file_gives_the_vectors(tmp_path):
    runtime = pytest.importorskip("onnxruntime")
    small = cofiprune.compact(sentences(tmp_path / "dense", "mean", "Normalize"))
    cofiprune.export(small, tmp_path / "out", dataset=TEXTS)
    session = runtime.InferenceSession(str(tmp_path / "out" / "onnx" / "model.onnx"))
    batch = small.tokenizer(TEXTS, padding=True, return_tensors="np")
    names = [each.name for each in session.get_inputs()]
    found = session.run(["sentence_embedding"], {name: batch[name] for name in names})[0]
    alike(found, small.encode(TEXTS), 1e-4)

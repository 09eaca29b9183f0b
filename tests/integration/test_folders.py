"""What stands beside a model in its folder comes along when the command line writes another folder."""

import json
import shutil

import pytest
import safetensors.torch
import torch
import transformers

import cofiprune
from cofiprune import cli

pytestmark = pytest.mark.filterwarnings("default")  # the command line shows them

WORDS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghijklmnopqrstuvwxyz")
WIDTH = 16
QUICK = ("--teacher", "self", "--target-sparsity", "0.3", "--epochs", "1", "--finetune-epochs", "1", "--no-progress")


def write(file, content):
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps(content))


def sentence_folder(folder, *kinds, cls="BertModel"):
    """A folder as sentence-transformers writes it; modules without settings have none of their own."""
    torch.manual_seed(0)
    sizes = {"hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 32}
    model = getattr(transformers, cls)(
        transformers.BertConfig(vocab_size=len(WORDS), max_position_embeddings=24, **sizes)
    )
    model.save_pretrained(folder)
    vocabulary = {word: index for index, word in enumerate(WORDS)}
    transformers.BertTokenizerFast(vocab=vocabulary).save_pretrained(folder)
    paths = {"": "Transformer", **{f"{index}_{kind}": kind for index, kind in enumerate(kinds, 1)}}
    modules = [
        {"idx": index, "name": str(index), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for index, (path, kind) in enumerate(paths.items())
    ]
    write(folder / "modules.json", modules)
    write(folder / "sentence_bert_config.json", {"max_seq_length": 12, "do_lower_case": True})
    write(folder / "config_sentence_transformers.json", {"prompts": {"query": "q: "}, "default_prompt_name": "query"})
    write(folder / "preprocessor_config.json", {"size": 8})
    write(folder / "result.json", {"of": "another run"})
    write(folder / "model.safetensors.index.json", {"of": "other weights"})
    for path, kind in paths.items():
        if kind == "Pooling":
            settings = {
                "word_embedding_dimension": WIDTH,
                "pooling_mode_cls_token": True,
                "pooling_mode_mean_tokens": False,
            }
            write(folder / path / "config.json", settings)
        elif kind == "Dense":
            write(folder / path / "config.json", {"in_features": WIDTH, "out_features": 5, "bias": False})
            (folder / path / "model.safetensors").write_bytes(b"of the dense layer")
    return folder


@pytest.fixture
def texts(tmp_path):
    file = tmp_path / "texts.tsv"
    file.write_text("sentence\n" + "".join(f"a {x} {y} c\n" for x in "bdefghij" for y in "klm"))
    return file


def run(command, source, out, texts, *words):
    return cli.main([command, str(source), "--output-dir", str(out), "--train-file", str(texts), *words])


def content(folder, name):
    return json.loads((folder / name).read_text())


@pytest.mark.parametrize("cls", ["BertModel", "BertForMaskedLM"])
@pytest.mark.parametrize("how", [("--method", "one-shot", "--units", "intermediate", "hidden"), ("--uniform",)])
def test_the_modules_of_a_sentence_model_come_along(tmp_path, texts, capsys, cls, how):
    source, out = sentence_folder(tmp_path / "source", "Pooling", "Normalize", cls=cls), tmp_path / "out"
    assert run("prune", source, out, texts, *QUICK, *how) == 0, capsys.readouterr().err
    for name in (
        "modules.json",
        "sentence_bert_config.json",
        "config_sentence_transformers.json",
        "preprocessor_config.json",
    ):
        assert (out / name).read_bytes() == (source / name).read_bytes()
    small = transformers.AutoModel.from_pretrained(out)
    pooling = content(out, "1_Pooling/config.json")
    assert pooling["pooling_mode_cls_token"]
    assert pooling["word_embedding_dimension"] == small(torch.tensor([[2, 6, 3]])).last_hidden_state.shape[-1]
    assert content(out, "config.json")["architectures"] == ["BertModel"]
    assert "sparsity" in content(out, "result.json")
    assert not (out / "model.safetensors.index.json").exists()
    assert run("finetune", out, tmp_path / "again", texts, "--epochs", "1", "--teacher", "self", "--no-progress") == 0
    assert content(tmp_path / "again", "1_Pooling/config.json") == pooling


def test_so_do_they_with_every_model_of_a_sweep(tmp_path, texts):
    source, out = sentence_folder(tmp_path / "source", "Pooling"), tmp_path / "out"
    how = ("--teacher", "self", "--target-sparsity", "0.2,0.4", "--method", "one-shot", "--no-progress")
    assert run("prune", source, out, texts, *how) == 0
    assert len([*out.glob("*/1_Pooling/config.json")]) == len([*out.glob("*/model.safetensors")]) == 2


def test_hidden_dimensions_stay_where_a_module_reads_them(tmp_path, texts, capsys):
    source, out = sentence_folder(tmp_path / "source", "Pooling", "Dense", "Normalize"), tmp_path / "out"
    assert run("prune", source, out, texts, *QUICK, "--units", "head", "hidden") == 2
    error = capsys.readouterr().err
    assert "Dense (2_Dense) behind the encoder reads all of its hidden dimensions: leave hidden out" in error
    assert "--units layer head intermediate" in error
    assert not (out / "config.json").exists()
    assert run("prune", source, tmp_path / "plain", texts, *QUICK, "--uniform") == 0
    assert run("prune", source, out, texts, *QUICK) == 0
    assert "warning: Dense (2_Dense) behind the encoder reads all" in capsys.readouterr().err
    assert cofiprune.structure(transformers.AutoModel.from_pretrained(out))["hidden"].size == WIDTH
    assert (out / "2_Dense" / "model.safetensors").read_bytes() == b"of the dense layer"


def test_a_classifier_made_of_a_sentence_model_has_none_of_its_modules(tmp_path, texts, capsys):
    source, out = sentence_folder(tmp_path / "source", "Pooling", "Dense"), tmp_path / "out"
    texts.write_text(
        "sentence\tlabel\n" + "".join(f"a {x} c\t{index % 2}\n" for index, x in enumerate("bdefghijklmnop"))
    )
    assert run("prune", source, out, texts, *QUICK[2:]) == 0
    assert "its modules do not come along for sequence-classification" in capsys.readouterr().err
    assert not (out / "modules.json").exists()
    assert not (out / "sentence_bert_config.json").exists()
    assert (out / "preprocessor_config.json").exists()


def test_an_encoder_in_a_folder_of_its_own_is_refused(tmp_path, texts, capsys):
    """As old versions of sentence-transformers wrote it."""
    source = sentence_folder(tmp_path / "source", "Pooling")
    (source / "0_Transformer").mkdir()
    for file in source.glob("*"):
        if file.is_file() and file.name != "modules.json":
            file.rename(source / "0_Transformer" / file.name)
    modules = content(source, "modules.json")
    modules[0]["path"] = "0_Transformer"
    write(source / "modules.json", modules)
    for name in (source, source / "0_Transformer"):
        assert run("prune", name, tmp_path / "out", texts, *QUICK) == 2
        assert f'SentenceTransformer("{source}").save_pretrained(OTHER), and name OTHER' in capsys.readouterr().err


@pytest.mark.parametrize(
    ("listed", "says"), [("{", "cannot be read"), ('[{"path": ".."}]', "lists no modules"), ("[3]", "lists no modules"),
                         ('[{"path": "../..", "type": "a.Dense"}]', "outside of its folder")])  # fmt: skip
def test_a_list_of_modules_that_cannot_be_followed_is_a_mistake(tmp_path, texts, capsys, listed, says):
    source = sentence_folder(tmp_path / "source", "Pooling")
    (source / "modules.json").write_text(listed)
    assert run("prune", source, tmp_path / "out", texts, *QUICK) == 2
    assert says in capsys.readouterr().err


def test_modules_are_fetched_from_the_hub(tmp_path, texts, monkeypatch):
    source, cache = sentence_folder(tmp_path / "source", "Pooling", "Dense"), tmp_path / "cache"
    asked = []

    def fetch(name, allow_patterns):
        asked.append((name, allow_patterns))
        return str(shutil.copytree(source, cache))

    monkeypatch.setattr("transformers.utils.hub.cached_file", lambda *_, **__: str(source / "modules.json"))
    monkeypatch.setattr("huggingface_hub.snapshot_download", fetch)
    found = cli.beside.Beside.of("someone/model")
    assert found.source == cache
    assert found.readers == ["Dense (2_Dense)"]
    assert asked[0][0] == "someone/model"
    assert {"*.json", "1_Pooling/*", "2_Dense/*"} <= set(asked[0][1])
    assert not any(pattern.endswith(".safetensors") for pattern in asked[0][1])


def test_an_export_has_them_too(tmp_path, monkeypatch, capsys):
    pytest.importorskip("onnxscript")
    monkeypatch.setattr("cofiprune.cli.export.find_spec", lambda name: None)
    source, out = sentence_folder(tmp_path / "source", "Pooling", "Dense"), tmp_path / "out"
    assert cli.main(["export", str(source), str(out)]) == 0
    assert "no output sentence_embedding" in capsys.readouterr().err
    for name in ("modules.json", "1_Pooling/config.json", "2_Dense/model.safetensors"):
        assert (out / name).read_bytes() == (source / name).read_bytes()


def test_a_hub_that_cannot_be_reached_is_said(monkeypatch):
    def gone(*_, **__):
        raise OSError("no connection")

    monkeypatch.setattr("transformers.utils.hub.cached_file", gone)
    with pytest.warns(
        UserWarning, match="what stands beside someone/model on the hub cannot be fetched.*no connection"
    ):
        assert cli.beside.Beside.of("someone/model").source is None


@pytest.mark.slow  # to import sentence-transformers takes longer than all else here
def test_sentence_transformers_reads_what_is_written(tmp_path, texts):
    library = pytest.importorskip("sentence_transformers")
    source, out = sentence_folder(tmp_path / "source", "Pooling", "Normalize"), tmp_path / "out"
    assert run("prune", source, out, texts, *QUICK, "--units", "head", "hidden", "intermediate") == 0
    dense, small = (library.SentenceTransformer(str(folder), device="cpu") for folder in (source, out))
    assert [type(part) for part in small] == [type(part) for part in dense]
    assert small[1].get_config_dict() != dense[1].get_config_dict()  # in its width alone
    assert small.prompts == dense.prompts
    assert small.max_seq_length == dense.max_seq_length == 12
    assert small.encode("a b").shape[-1] == cofiprune.structure(small[0].auto_model)["hidden"].size < WIDTH


@pytest.mark.slow  # likewise
def test_an_export_gives_the_embedding_of_sentence_transformers(tmp_path):
    library, runtime = (pytest.importorskip(name) for name in ("sentence_transformers", "onnxruntime"))
    source, out = sentence_folder(tmp_path / "source", "Pooling", "Normalize"), tmp_path / "out"
    assert cli.main(["export", str(source), str(out)]) == 0
    session = runtime.InferenceSession(str(out / "onnx" / "model.onnx"), providers=["CPUExecutionProvider"])
    assert [entry.name for entry in session.get_outputs()] == ["last_hidden_state", "sentence_embedding"]
    texts = ["a b c", "d"]
    tokenizer = transformers.AutoTokenizer.from_pretrained(out)
    rows = tokenizer(texts, padding=True, return_tensors="np")
    (found,) = session.run(["sentence_embedding"], dict(rows.items()))
    expected = library.SentenceTransformer(str(source), device="cpu").encode(texts, prompt="")
    assert abs(found - expected).max() < 1e-5


@pytest.mark.slow  # likewise
@pytest.mark.parametrize("kind", ["SentenceTransformer", "CrossEncoder"])
def test_an_object_of_sentence_transformers_is_exported(tmp_path, kind):
    library, runtime = (pytest.importorskip(name) for name in ("sentence_transformers", "onnxruntime"))
    if kind == "CrossEncoder":
        cls, modules, names = "BertForSequenceClassification", (), ["logits"]
        rows = [{"text": "a b c", "text_pair": "d"}, {"text": "d", "text_pair": "e f"}]
    else:
        cls, modules, names = "BertModel", ("Pooling", "Dense"), ["last_hidden_state", "sentence_embedding"]
        rows = ["a b c", "d"]
    source = sentence_folder(tmp_path / "source", *modules, cls=cls)
    if modules:
        dense = torch.nn.Linear(WIDTH, 5, bias=False)
        safetensors.torch.save_file({"linear.weight": dense.weight}, source / "2_Dense" / "model.safetensors")
    else:
        (source / "modules.json").unlink()
    model = getattr(library, kind)(str(source), device="cpu")
    report = cofiprune.export(model, tmp_path / "out", dataset=rows)
    assert report.rows == 2
    assert report.difference["onnx/model.onnx"] < 1e-5
    session = runtime.InferenceSession(str(tmp_path / "out/onnx/model.onnx"), providers=["CPUExecutionProvider"])
    assert [entry.name for entry in session.get_outputs()] == names
    assert (tmp_path / "out" / "tokenizer.json").exists()
    assert not (tmp_path / "out" / "model.safetensors").exists()
    assert (tmp_path / "out" / "2_Dense" / "model.safetensors").exists() == bool(modules)

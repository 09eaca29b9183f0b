"""The tokens that a tokenizer needs for others, and its file with those that are kept.

A fast tokenizer is one JSON object. To keep a token, others are needed: the parts that byte-pair encoding merges it
of, the letters of its alphabet, the tokens that mark beginnings and ends. Tokens keep their order, so that a file with
fewer of them segments every text whose tokens are all there as the whole one does.
"""

from __future__ import annotations

import copy
import json
import tempfile
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cofiprune.errors import DataError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_BYTES = tuple(f"<0x{number:02X}>" for number in range(256))
_SLOW_FILES = ("vocab.txt", "vocab.json", "merges.txt", "*.model")
"""Files of slow tokenizers, which would say what the vocabulary was before."""


class TokenizerFile:
    """The content of a `tokenizer.json`."""

    def __init__(self, text: str) -> None:
        """Read it.

        :raises DataError: for a kind of model that is not WordPiece, BPE, Unigram or WordLevel.
        """
        self.entries: dict[str, Any] = json.loads(text)
        self.kind = str(self.entries["model"].get("type", "BPE"))
        if self.kind not in ("WordPiece", "BPE", "Unigram", "WordLevel"):
            raise DataError(
                f"a tokenizer of kind {self.kind} cannot be pruned; WordPiece, BPE, Unigram and WordLevel can"
            )

    @cached_property
    def vocabulary(self) -> dict[str, int]:
        """Every token of the model, with its id; added tokens are apart."""
        stored = self.entries["model"]["vocab"]
        if self.kind == "Unigram":
            return {piece: number for number, (piece, _) in enumerate(stored)}
        return dict(stored)

    @cached_property
    def added(self) -> dict[str, int]:
        """Added tokens with their ids, special or not."""
        return {token["content"]: token["id"] for token in self.entries.get("added_tokens") or ()}

    @property
    def size(self) -> int:
        """One more than the largest id."""
        return max([*self.vocabulary.values(), *self.added.values()]) + 1

    def always(self) -> set[int]:
        """Return the ids of tokens that stay whatever texts use: added ones, those of templates, and bytes."""
        names = [*self.added, *_BYTES]
        model = self.entries["model"]
        if isinstance(model.get("unk_token"), str):
            names.append(model["unk_token"])
        if _uses_bytes(self.entries):
            from tokenizers.pre_tokenizers import ByteLevel

            names += ByteLevel.alphabet()
        known = {**self.vocabulary, **self.added}
        found = {known[name] for name in names if name in known}
        if model.get("unk_id") is not None:
            found.add(model["unk_id"])
        if self.kind == "Unigram":  # its least likely piece says what an unknown letter costs
            found.add(min(range(len(model["vocab"])), key=lambda number: float(model["vocab"][number][1])))
        if self.entries.get("padding"):
            found.add(self.entries["padding"]["pad_id"])
        for holder, key in _ids_of_templates(self.entries.get("post_processor")):
            value = holder[key]
            found |= set(value) if isinstance(value, list) else {value}
        return found

    def needed_for(self, ids: Iterable[int], *, every_way: bool = False) -> set[int]:
        """Return some tokens with those that they need: the parts that they are merged of, and their letters.

        :param every_way: by every merge that makes a token, not by the first one.
        """
        texts, parts = self._texts, self._parts[every_way]
        found: set[int] = set()
        waiting = list(ids)
        while waiting:
            number = waiting.pop()
            if number in found:
                continue
            found.add(number)
            text = texts.get(number)
            if text is not None:
                waiting += (self.vocabulary[part] for part in (*parts.get(text, ()), *self._letters(text)))
        return found

    @cached_property
    def _texts(self) -> dict[int, str]:
        return {number: text for text, number in self.vocabulary.items()}

    @cached_property
    def _parts(self) -> tuple[dict[str, list[str]], dict[str, list[str]]]:
        """The parts of each token of BPE by the first merge that makes it, and by every one."""
        prefix = self.entries["model"].get("continuing_subword_prefix") or ""
        first: dict[str, list[str]] = {}
        every: dict[str, list[str]] = {}
        for left, right in self._merges():
            made = left + right.removeprefix(prefix)
            first.setdefault(made, [left, right])
            every.setdefault(made, []).extend((left, right))
        return first, every

    def _merges(self) -> Iterator[tuple[str, str]]:
        for merge in self.entries["model"].get("merges") or ():
            left, right = merge.split(" ") if isinstance(merge, str) else merge
            yield left, right

    def _letters(self, text: str) -> Iterator[str]:
        """Give the tokens of single letters that a token's text has, in each form that they have."""
        model = self.entries["model"]
        prefix, suffix = model.get("continuing_subword_prefix") or "", model.get("end_of_word_suffix") or ""
        letters = text.removeprefix(prefix).removesuffix(suffix) if len(text) > 1 else text
        for letter in letters:
            yield from (form for form in {letter, prefix + letter, letter + suffix} if form in self.vocabulary)

    def without_others(self, kept: Sequence[int]) -> str:
        """Return the file with some tokens only, numbered anew in their old order.

        :param kept: ids, ascending, complete under `needed_for`.
        """
        new = {old: number for number, old in enumerate(kept)}
        entries = copy.deepcopy(self.entries)
        model = entries["model"]
        if self.kind == "Unigram":
            model["vocab"] = [entry for old, entry in enumerate(model["vocab"]) if old in new]
            if model.get("unk_id") is not None:
                model["unk_id"] = new[model["unk_id"]]
        else:
            model["vocab"] = {text: new[old] for text, old in self.vocabulary.items() if old in new}
        if "merges" in model:
            prefix = model.get("continuing_subword_prefix") or ""
            there = model["vocab"]
            model["merges"] = [
                merge
                for merge, (left, right) in zip(model["merges"], self._merges(), strict=True)
                if left in there and right in there and left + right.removeprefix(prefix) in there
            ]
        for token in entries.get("added_tokens") or ():
            token["id"] = new[token["id"]]
        for holder, key in _ids_of_templates(entries.get("post_processor")):
            value = holder[key]
            holder[key] = [new[old] for old in value] if isinstance(value, list) else new[value]
        if entries.get("padding"):
            entries["padding"]["pad_id"] = new[entries["padding"]["pad_id"]]
        return json.dumps(entries, ensure_ascii=False)


def plain(tokenizer: Any) -> Tokenizer:
    """Return a tokenizer's backend of its own, which neither pads nor cuts off.

    :raises DataError: for a part written in Python, which no file can hold.
    """
    from tokenizers import Tokenizer

    try:
        backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    except Exception as error:  # the library raises no other class
        raise DataError(f"{type(tokenizer).__name__} cannot be written to a file: {error}") from error
    backend.no_truncation()
    backend.no_padding()
    return backend


def with_fewer_tokens(tokenizer: Any, file: TokenizerFile, kept: Sequence[int]) -> Any:
    """Return a tokenizer of the same class with the kept tokens, as it loads from its files."""
    new = {old: number for number, old in enumerate(kept)}
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        tokenizer.save_pretrained(folder)
        for pattern in _SLOW_FILES:
            for old in folder.glob(pattern):
                old.unlink()
        (folder / "tokenizer.json").write_text(file.without_others(kept), encoding="utf-8")
        settings = folder / "tokenizer_config.json"
        entries = json.loads(settings.read_text(encoding="utf-8"))
        if "added_tokens_decoder" in entries:
            entries["added_tokens_decoder"] = {
                str(new[int(old)]): token for old, token in entries["added_tokens_decoder"].items() if int(old) in new
            }
        settings.write_text(json.dumps(entries, ensure_ascii=False), encoding="utf-8")
        pruned = type(tokenizer).from_pretrained(folder)
    pruned.name_or_path = tokenizer.name_or_path
    return pruned


def check_files(config: Any, tokenizer: Any, pruned: Any, strings: Sequence[str], wanted: Sequence[list[int]]) -> None:
    """Save and load a pruned tokenizer in the ways that others do.

    :param config: of its model.
    :param wanted: ids of the strings.
    :raises DataError: where it comes back as another one.
    """
    from tokenizers import Tokenizer
    from transformers import AutoTokenizer

    of_library = type(pruned).__module__.startswith("transformers.")
    with tempfile.TemporaryDirectory() as folder:
        pruned.save_pretrained(folder)
        config.save_pretrained(folder)
        alone = Tokenizer.from_file(str(Path(folder) / "tokenizer.json"))
        again = (AutoTokenizer if of_library else type(pruned)).from_pretrained(folder)
    alone.no_truncation()
    alone.no_padding()
    for loaded in (alone, plain(again)):
        if [encoding.ids for encoding in loaded.encode_batch(list(strings))] != wanted:
            raise DataError("the pruned tokenizer gives other ids when it is saved and loaded")
    if not again.special_tokens_map == pruned.special_tokens_map == tokenizer.special_tokens_map:
        raise DataError("the pruned tokenizer has other special tokens")


def _uses_bytes(entries: Mapping[str, Any]) -> bool:
    """Return whether texts are turned into the letters that stand for their bytes."""
    return '"ByteLevel"' in json.dumps([entries.get("pre_tokenizer"), entries.get("normalizer")])


def _ids_of_templates(processor: Any) -> Iterator[tuple[Any, Any]]:
    """Give the places of ids in a post-processor: what holds them, and the key."""
    if not isinstance(processor, dict):
        return
    kind = processor.get("type")
    if kind == "Sequence":
        for each in processor["processors"]:
            yield from _ids_of_templates(each)
    elif kind == "TemplateProcessing":
        for special in processor["special_tokens"].values():
            yield special, "ids"
    elif kind in ("BertProcessing", "RobertaProcessing"):
        for name in ("sep", "cls"):
            yield processor[name], 1


def most_used(counts: Mapping[int, int], always: Collection[int], size: int, needs: Any) -> set[int]:
    """Return as many of the most used tokens as fit, with what they need.

    :param counts: by id, of the tokens that texts have.
    :param always: complete tokens that stay whatever is counted.
    :param size: of the result at most.
    :param needs: gives the tokens that one needs, itself included.
    """
    kept = set(always)
    for number in sorted(counts, key=lambda each: (-counts[each], each)):
        added = needs(number) - kept
        if len(kept) + len(added) <= size:
            kept |= added
    return kept

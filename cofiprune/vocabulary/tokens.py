"""The tokens that a tokenizer needs for others, and its file with those that are kept.

A fast tokenizer is one JSON object. To keep a token, others are needed: the parts that byte-pair encoding merges it
of, the letters of its alphabet, the tokens that mark beginnings and ends. Tokens keep their order, so that a file with
fewer of them segments every text whose tokens are all there as the whole one does.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any

from cofiprune.errors import DataError

_BYTES = tuple(f"<0x{number:02X}>" for number in range(256))


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
        for holder, key in _ids_of_templates(self.entries.get("post_processor")):
            value = holder[key]
            found |= set(value) if isinstance(value, list) else {value}
        return found

    def needed_for(self, ids: Iterable[int], *, every_way: bool = False) -> set[int]:
        """Return some tokens with those that they need: the parts that they are merged of, and their letters.

        :param every_way: by every merge that makes a token, not by the first one.
        """
        texts = {number: text for text, number in self.vocabulary.items()}
        parts = self._parts(every_way=every_way)
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

    def _parts(self, *, every_way: bool) -> dict[str, list[str]]:
        """The parts of each token of BPE."""
        prefix = self.entries["model"].get("continuing_subword_prefix") or ""
        found: dict[str, list[str]] = {}
        for left, right in self._merges():
            made = found.setdefault(left + right.removeprefix(prefix), [])
            if every_way or not made:
                made += (left, right)
        return found

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

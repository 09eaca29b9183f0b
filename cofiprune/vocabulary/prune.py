"""Prune the vocabulary of a model and its tokenizer to what texts use, and prove that nothing else has changed."""

from __future__ import annotations

import itertools
import random
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from cofiprune.errors import DataError, SettingsError, names_checked
from cofiprune.hooks import reading
from cofiprune.masking import masks_of
from cofiprune.measure.report import Report, entries_table, rich_table, share
from cofiprune.vocabulary.tables import batch_of, ids_of_config, output_tables, outputs_apart, with_fewer_rows
from cofiprune.vocabulary.tokens import TokenizerFile, check_files, most_used, plain, with_fewer_tokens
from cofiprune.whole import Whole

if TYPE_CHECKING:
    from rich.console import RenderableType
    from tokenizers import Tokenizer
    from transformers import PreTrainedModel

Text = str | Sequence[str]
_BATCH = 512
_SAMPLE = 20_000
"""Texts that the proof goes over, where they can be read only once."""
_HELD_OUT = 10
"""One text in so many is held out for the curve."""
_FLOORS = (1, 2, 3, 5, 10, 20, 50, 100)
_STRINGS = 1_000
_COMPARED = 8
"""Texts that outputs are compared for."""
_PLANES = (0, 0x100, 0x400, 0x600, 0x900, 0x3000, 0x4E00, 0xAC00, 0x1F300, 0x2F800, 0x50000, 0x90000, 0x10FF00)
"""Beginnings of blocks of Unicode: Latin, Cyrillic, Arabic, Devanagari, Chinese, Korean, emoji and others; such that
every first byte of UTF-8 is among them."""
_SPARE = 128
"""Rows without a token that a table may well have, for round numbers."""
_LAST_PAD = 256
"""Some families count positions from the padding id, which therefore stays where it is, as long as it is one of the
first."""


@dataclass(frozen=True, repr=False)
class VocabularyResult(Report):
    """A model and its tokenizer with fewer tokens."""

    model: Any
    tokenizer: Any
    kept: tuple[int, ...]
    """The old ids in the new order."""
    size_before: int
    """Rows of the table of the model that was passed in."""
    coverage: tuple[tuple[int, int, float], ...]
    """Least count, size of the vocabulary, and share of held-out texts that tokenise as before: what other floors
    would have given."""
    proof: dict[str, str] = field(default_factory=dict)
    """What was checked, with figures."""

    def save(self, folder: str | Path) -> None:
        """Write model and tokenizer as `save_pretrained` does."""
        self.model.save_pretrained(str(folder))  # a text for sentence-transformers
        self.tokenizer.save_pretrained(folder)

    def __rich__(self) -> RenderableType:
        from rich.console import Group

        parameters = sum(value.numel() for value in self.model.parameters())
        rows = [
            ("tokens", f"{len(self.kept):,} of {self.size_before:,}"),
            ("parameters", f"{parameters:,} in the model that is left"),
            *self.proof.items(),
        ]
        curve = [[f"{floor}", f"{size:,}", share(alike)] for floor, size, alike in self.coverage]
        header = ["used at least", "tokens", "held-out texts alike"]
        return Group("VocabularyResult", entries_table(rows), rich_table(header, curve))


@names_checked
def prune_vocabulary(
    model: Any,
    tokenizer: Any = None,
    texts: Iterable[Text] = (),
    *,
    min_count: int = 1,
    target_size: int | None = None,
    keep: Iterable[str] = (),
    progress: bool = True,
) -> VocabularyResult:
    """Return a model and a tokenizer that know the tokens which texts use, and no others.

    Every text whose tokens are kept is segmented as before, and the model computes the same for it. That is
    checked each time. Special and added tokens, the letters of what is kept and the bytes of byte-level tokenizers stay
    in any case, so that every text can still be encoded.

    :param model: dense or compacted, without masks, or an object of sentence-transformers around one; it stays.
    :param tokenizer: its fast tokenizer, which stays as it is; not needed where the object has it.
    :param texts: any iterable of strings, or of pairs of them, such as a stream; read once where it is an iterator.
    :param min_count: least number of times that a token must be used.
    :param target_size: tokens to keep at most, the most used first; instead of `min_count`.
    :param keep: further tokens, or texts whose tokens are to stay.
    :raises SettingsError: for a target below what has to stay, or a model under masks.
    :raises DataError: for a tokenizer that is slow or of another model, and for texts that use nothing.
    """
    if isinstance(keep, str):
        raise SettingsError(f"keep takes a list of tokens or texts, not one text: [{keep!r}]")
    whole = Whole.of(model)
    if whole.kind is not None:
        if isinstance(tokenizer, Sequence):  # texts in the second place
            tokenizer, texts = None, tokenizer
        whole.check_tokens(tokenizer)
        model, tokenizer, keep = whole.model, whole.tokenizer, [*keep, *whole.prompts.values()]
    file, rows = _checked(model, tokenizer, min_count, target_size)
    backend = plain(tokenizer)
    asked = [number for text in keep for number in (*backend.encode(text).ids, backend.token_to_id(text))]
    always = _always(model, tokenizer, file) | {number for number in asked if number is not None}
    seen = _Seen.of(backend, texts, progress=progress)
    if not set(seen.counts) - set(tokenizer.all_special_ids):
        raise DataError("texts: none uses any token; give texts like those that the model will read")
    for every_way in (False, True):
        needed = file.needed_for(always, every_way=every_way)
        kept = _chosen(file, seen.counts, needed, min_count, target_size, every_way=every_way)
        pruned = with_fewer_tokens(tokenizer, file, kept)
        # Texts that lie in memory are all compared, those of a stream by a sample.
        compared = _Compared.of(backend, plain(pruned), texts if isinstance(texts, Sequence) else seen.sample, kept)
        if compared.broken is None:
            break
    else:
        raise DataError(
            f"{type(tokenizer).__name__} segments a text otherwise although all of its tokens are kept, so its "
            f"vocabulary cannot be pruned: {compared.broken!r:.80}"
        )
    small = with_fewer_rows(model, kept)
    proof = _proof(model, small, tokenizer, pruned, kept, compared, seen.number)
    small = whole.around(small, tokenizer=pruned)
    return VocabularyResult(small, pruned, tuple(kept), rows, _coverage(file, seen, needed), proof)


def _checked(
    model: PreTrainedModel, tokenizer: Any, min_count: int, target_size: int | None
) -> tuple[TokenizerFile, int]:
    """Return the tokenizer's file and the rows of the model's table, when they go together."""
    if masks_of(model) is not None:
        raise SettingsError("the model has masks: prune the vocabulary of cofiprune.compact(model)")
    if min_count < 1 or (target_size is not None and min_count != 1):
        raise SettingsError("min_count is 1 or more, and target_size goes instead of it")
    if not getattr(tokenizer, "is_fast", False):
        raise DataError(
            f"{type(tokenizer).__name__} is a slow tokenizer, whose tokens lie in files of its own; load the fast one, "
            "by AutoTokenizer"
        )
    if not hasattr(model, "get_input_embeddings"):
        raise DataError(f"{type(model).__name__} is no model of transformers; give the one inside of it")
    table = model.get_input_embeddings()
    if not isinstance(table, nn.Embedding):
        raise DataError(
            f"{type(model).__name__} has no table of tokens: its input embeddings are a {type(table).__name__}"
        )
    file = TokenizerFile(plain(tokenizer).to_str())
    if file.size > table.num_embeddings:
        raise DataError(
            f"the tokenizer has {file.size:,} tokens and the model's table {table.num_embeddings:,} rows: it is not "
            "the tokenizer of this model"
        )
    spare = table.num_embeddings - file.size
    if spare > max(_SPARE, file.size // 20):
        warnings.warn(
            f"the model's table has {spare:,} rows more than the tokenizer has tokens ({file.size:,}): is it the "
            "tokenizer of this model?",
            UserWarning,
            stacklevel=4,
        )
    if output_tables(model):
        warnings.warn(
            f"{type(model).__name__} predicts tokens: its outputs are numbered as the new tokenizer's tokens. What "
            "reads them by the old numbers, such as a sparse index, no longer fits",
            UserWarning,
            stacklevel=4,
        )
    return file, table.num_embeddings


def _always(model: PreTrainedModel, tokenizer: Any, file: TokenizerFile) -> set[int]:
    """Return the ids that stay whatever texts use."""
    table: Any = model.get_input_embeddings()
    named = {each for ids in ids_of_config(model.config).values() for each in ids}
    found = {*file.always(), *named, table.padding_idx, *tokenizer.all_special_ids} & set(range(table.num_embeddings))
    pad = model.config.pad_token_id
    return found | set(range(pad + 1)) if pad is not None and 0 < pad <= _LAST_PAD else found


@dataclass
class _Seen:
    """What texts use."""

    counts: Counter[int] = field(default_factory=Counter)
    """Of all texts."""
    others: Counter[int] = field(default_factory=Counter)
    """Of those that are not held out."""
    held_out: list[frozenset[int]] = field(default_factory=list)
    sample: list[Text] = field(default_factory=list)
    number: int = 0

    @classmethod
    def of(cls, backend: Tokenizer, texts: Iterable[Text], *, progress: bool) -> _Seen:
        """Read texts once, in bounded memory."""
        seen, draw = cls(), random.Random(0)
        for batch in _batches(texts, progress=progress):
            for text, encoding in zip(batch, backend.encode_batch(batch), strict=True):
                held_out = seen.number % _HELD_OUT == _HELD_OUT - 1 and len(seen.held_out) < _SAMPLE
                if held_out:
                    seen.held_out.append(frozenset(encoding.ids))
                else:
                    seen.others.update(encoding.ids)
                seen.counts.update(encoding.ids)
                seen.number += 1
                if len(seen.sample) < _SAMPLE:
                    seen.sample.append(text)
                elif (place := draw.randrange(seen.number)) < _SAMPLE:
                    seen.sample[place] = text
        return seen


def _batches(texts: Iterable[Text], *, progress: bool) -> Iterator[list[Text]]:
    from rich.console import Console
    from rich.progress import Progress, SpinnerColumn, TextColumn

    if isinstance(texts, str):
        raise DataError("texts takes an iterable of texts, not one text")
    console = Console(stderr=True)
    columns = SpinnerColumn(), TextColumn("{task.completed} texts")
    shown = Progress(*columns, console=console, disable=not (progress and console.is_terminal))
    with shown:
        task = shown.add_task("", total=None)
        given = iter(texts)
        while batch := list(itertools.islice(given, _BATCH)):
            for place, text in enumerate(batch):
                if not isinstance(text, str):
                    pair = list(text) if isinstance(text, Sequence) else []
                    if len(pair) != 2 or not all(isinstance(part, str) for part in pair):
                        raise DataError(f"texts: expected a string or a pair of strings, found {text!r:.80}")
                    batch[place] = tuple(pair)
            yield batch
            shown.advance(task, len(batch))


def _chosen(
    file: TokenizerFile,
    counts: Counter[int],
    always: set[int],
    min_count: int,
    target_size: int | None,
    *,
    every_way: bool,
) -> list[int]:
    """Return the ids that are kept, ascending."""
    if target_size is None:
        used = [number for number, count in counts.items() if count >= min_count]
        return sorted(always | file.needed_for(used, every_way=every_way))
    if target_size < len(always):
        raise SettingsError(
            f"target_size={target_size:,} is below the {len(always):,} tokens that have to stay: special and added "
            "tokens, letters and bytes"
        )
    return sorted(most_used(counts, always, target_size, lambda number: file.needed_for([number], every_way=every_way)))


def _coverage(file: TokenizerFile, seen: _Seen, always: set[int]) -> tuple[tuple[int, int, float], ...]:
    """Say what each floor would have given, by texts that were held out from the counts."""
    found = []
    for floor in _FLOORS:
        kept = always | file.needed_for(number for number, count in seen.others.items() if count >= floor)
        alike = sum(ids <= kept for ids in seen.held_out)
        found.append((floor, len(kept), alike / len(seen.held_out) if seen.held_out else 1.0))
    return tuple(found)


@dataclass
class _Compared:
    """How texts tokenise before and after."""

    number: int = 0
    alike: int = 0
    broken: Text | None = None
    """A text that tokenises otherwise although all of its tokens are kept."""
    whole: list[list[int]] = field(default_factory=list)
    """Ids of some texts all of whose tokens are kept."""

    @classmethod
    def of(cls, before: Tokenizer, after: Tokenizer, texts: Iterable[Text], kept: Sequence[int]) -> _Compared:
        found, new = cls(), {old: number for number, old in enumerate(kept)}
        for batch in _batches(texts, progress=False):
            pairs = zip(before.encode_batch(batch), after.encode_batch(batch), strict=True)
            for text, (one, other) in zip(batch, pairs, strict=True):
                found.number += 1
                if not all(number in new for number in one.ids):
                    continue
                if [new[number] for number in one.ids] == other.ids and one.tokens == other.tokens:
                    found.alike += 1
                    if len(found.whole) < _COMPARED:
                        found.whole.append(one.ids)
                else:
                    found.broken = text
        return found


def _proof(
    model: PreTrainedModel,
    small: PreTrainedModel,
    tokenizer: Any,
    pruned: Any,
    kept: Sequence[int],
    compared: _Compared,
    number: int,
) -> dict[str, str]:
    """Check what has to hold, and say with figures what was checked.

    :param number: of all texts.
    :raises DataError: for what does not hold.
    """
    with reading(model, small):
        apart = outputs_apart(model, small, batch_of(compared.whole, model, kept, tokenizer.mask_token_id), kept)
        if apart is None:
            raise DataError("the model with fewer tokens computes something else; its family counts by token ids")
    draw = random.Random(0)
    strings = ["".join(chr(draw.choice(_PLANES) + draw.randrange(256)) for _ in range(12)) for _ in range(_STRINGS)]
    strings += [chr(number) for number in range(256)]
    wanted = [encoding.ids for encoding in plain(pruned).encode_batch(strings)]
    if any(not 0 <= number < len(kept) for ids in wanted for number in ids):
        raise DataError("the pruned tokenizer gives ids that the table does not have")
    check_files(small.config, tokenizer, pruned, strings, wanted)
    of_all = "all" if number == compared.number else f"a sample of {compared.number:,} of"
    exactly = f"within rounding ({apart:.1g})" if apart else "to the bit"
    return {
        "texts alike": f"{share(compared.alike / compared.number)} of {of_all} {number:,} texts have the same tokens",
        "outputs": f"equal {exactly} for {len(compared.whole)} texts and tokens at random",
        "any string": f"{_STRINGS:,} random strings and 256 single characters are encoded",
        "files": "saved, and loaded again by tokenizers alone and by transformers: the same ids and special tokens",
    }

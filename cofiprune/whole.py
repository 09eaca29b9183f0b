"""Objects of sentence-transformers: the transformers model inside is what is pruned, and the whole is given back.

A `SentenceTransformer` is a list of modules, the first of which holds a transformers model and its tokenizer; a
`CrossEncoder` holds a model with a head. They are known by name, so that the package need not be installed. A copy
around another model is a deep copy in which that model stands in the place of the old one, wherever it is referred to;
this holds for releases 3 to 6, which keep it in different places.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from torch import Tensor, nn
from torch.utils.data import DataLoader

from cofiprune.data.cached import CACHED, with_cached
from cofiprune.data.checks import longest_sequence
from cofiprune.data.files import load_rows
from cofiprune.data.mixed import Mixed
from cofiprune.data.reading import Reading
from cofiprune.data.streams import Stream, is_stream
from cofiprune.data.tasks import forward_names
from cofiprune.data.text import TextColumns, tokenise
from cofiprune.errors import AdapterError, DataError, SettingsError, located, suggest

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Model = TypeVar("Model")
"""A transformers model, or an object of sentence-transformers around one."""
SENTENCES, PAIRS = "SentenceTransformer", "CrossEncoder"
_OTHERS = {"SparseEncoder": "a weight for each token", "MultiVectorEncoder": "a vector for each token"}
_UNFIT = {
    "Router": "sends texts through one of several lists of modules",
    "Asym": "sends texts through one of several lists of modules",
    "StaticEmbedding": "looks vectors up in a table, without attention and so without heads or layers to remove",
    "CLIPModel": "is made of two encoders, one of images and one of texts",
}
_WIDTHS = ("embedding_dimension", "word_embedding_dimension")
"""Where a Pooling states the width that it reads, in releases from 6 and before."""
_LABELS = ("label", "labels", "score", "scores")
"""Columns that the trainers of sentence-transformers take for labels; those of texts are all others, in their order."""


@dataclass(frozen=True, eq=False)
class Whole:
    """What was passed in, and the transformers model inside of it."""

    owner: Any
    model: PreTrainedModel
    """The owner itself where that is no object of sentence-transformers."""
    kind: str | None = None
    """SENTENCES, PAIRS, or None."""

    @classmethod
    def of(cls, owner: Any) -> Whole:
        """Look into an object; one of another package is taken for the model.

        :raises AdapterError: for an object of sentence-transformers that does not hold one encoder at its beginning.
        """
        names = [base.__name__ for base in type(owner).__mro__ if base.__module__.startswith("sentence_transformers.")]
        kind = next((name for name in names if name in (SENTENCES, PAIRS, *_OTHERS)), None)
        if kind is None:
            return cls(owner, owner)
        modules = _modules(owner)
        held = getattr(modules[0], "auto_model", None) if modules else getattr(owner, "model", None)
        if kind in _OTHERS:
            raise AdapterError(
                f"a {kind}, which makes {_OTHERS[kind]}, cannot be pruned as a whole. Pass the model inside, "
                "object[0].auto_model, and put what compact() returns back in its place"
            )
        unfit = next((name for module in modules for name in _UNFIT if _is(module, name)), None)
        if unfit is not None:
            raise AdapterError(f"this {kind} has a {unfit}, which {_UNFIT[unfit]}; cofiprune prunes one encoder")
        if held is None:
            first = type(modules[0]).__name__ if modules else "nothing"
            raise AdapterError(f"this {kind} begins with a {first}, which holds no model of transformers (auto_model)")
        return cls(owner, held, kind)

    @property
    def tokenizer(self) -> Any:
        """Of an object of sentence-transformers; None of a model."""
        return None if self.kind is None else self.owner.tokenizer

    @property
    def behind(self) -> list[Any]:
        """The modules that read what the model puts out."""
        return _modules(self.owner)[1:]

    @property
    def keeps_width(self) -> bool:
        """Whether a Dense module gives the vectors a width that does not depend on the encoder's."""
        return any(_is(module, "Dense") for module in self.behind)

    @property
    def settings(self) -> dict[str, str]:
        """The settings of a run that it decides: how its vectors are made, by its first token where it says so."""
        poolings = [module for module in self.behind if _is(module, "Pooling")] if self.kind == SENTENCES else []
        modes = [getattr(module, "pooling_mode", None) for module in poolings]
        modes += ["cls" for module in poolings if getattr(module, "pooling_mode_cls_token", False) is True]  # before 6
        return {"embedding_pooling": "cls"} if "cls" in modes or ("cls",) in modes else {}

    def check_width(self) -> None:
        """Make sure that what is behind the encoder can do with fewer of its hidden dimensions.

        :raises SettingsError: naming what cannot.
        """
        for module in self.behind:
            if _is(module, "Dense") and not getattr(module, "use_residual", False):
                return  # what follows reads its outputs
            if not any(_is(module, name) for name in ("Pooling", "Normalize", "Dropout")):
                self._refuse_width(f"has a {type(module).__name__} behind its encoder, which reads")
        if getattr(self.owner, "truncate_dim", None) is not None:
            self._refuse_width(f"cuts its vectors to the first {self.owner.truncate_dim} of")

    def _refuse_width(self, reads: str) -> None:
        raise SettingsError(
            f"this {self.kind} {reads} all hidden dimensions of the encoder: prune others, "
            "units=('layer', 'head', 'intermediate')"
        )

    def around(self, model: PreTrainedModel, *, hidden: Sequence[int] = (), tokenizer: Any = None) -> Any:
        """Return a copy of the object around another model; of a plain model, that other one itself.

        :param hidden: the hidden dimensions that it has left; none for all.
        :param tokenizer: in place of the present one.
        """
        if self.kind is None:
            return model
        placed = {id(self.model): model, id(self.model.config): model.config}
        if tokenizer is not None:
            placed[id(self.tokenizer)] = tokenizer
        whole = copy.deepcopy(self.owner, placed)
        if hidden:
            _narrow(_modules(whole)[1:], hidden)
        return whole

    def check_tokens(self, tokenizer: Any) -> None:
        """Make sure that the tokens can be others.

        :param tokenizer: that was given for the object; None for its own.
        :raises SettingsError: for the tokenizer of another model, or a module that goes by the ids of tokens.
        """
        if (
            tokenizer is not None
            and tokenizer is not self.tokenizer
            and tokenizer.get_vocab() != self.tokenizer.get_vocab()
        ):
            raise SettingsError(
                f"this {self.kind} has a tokenizer of its own, with other tokens: leave the argument out"
            )
        by_id = next((name for name in ("WordWeights", "BoW") for module in self.behind if _is(module, name)), None)
        if by_id is not None:
            raise SettingsError(f"this {self.kind} has a {by_id}, whose weights go by the ids of tokens")

    def like(self, given: Any, model: Any) -> Whole:
        """Return an object around another model: the one that was given, or else one like this."""
        whole = Whole.of(given)
        return whole if whole.kind else Whole.of(self.around(model))

    def data(self, reading: Reading, collator: Any, **datasets: Any) -> tuple[Any, ...]:
        """Return data sets as rows of tokens, as `Reading.data` does, through the object's own tokenizer."""
        if self.kind is None or collator is not None:
            return reading.data(self.model, collator, **datasets)
        reading.check(self.model)
        return (*(self.rows(dataset, reading, name) for name, dataset in datasets.items()), None)

    def rows(self, dataset: Any, reading: Reading, name: str) -> Any:
        """Return rows of tokens for rows of texts.

        Rows of texts are strings, sequences of strings, `InputExample`s, or dicts with columns of strings and perhaps
        one of labels, `label` or `score`. A SentenceTransformer learns from each text by itself, behind its default
        prompt; a CrossEncoder reads the first two of a row as a pair.

        :param reading: names columns, where the object is not to find them.
        :param name: what messages call the data set.
        :raises DataError: for a row that has no text, or no pair.
        """
        if isinstance(dataset, Mixed):
            return dataset.read(reading, lambda how, rows, what: self.rows(rows, how, what), name)
        with located(f"{name}: "):
            rows = load_rows(dataset) if isinstance(dataset, str | Path) else dataset
            if is_stream(rows):
                return Stream(rows, lambda chosen: self.rows(chosen, reading, name))
            sized = hasattr(rows, "__len__") and hasattr(rows, "__getitem__") and not isinstance(rows, Mapping)
            first = rows[0] if sized and not isinstance(rows, DataLoader) and len(rows) else None
            inputs = set(forward_names(self.model)) - set(_LABELS)
            if first is None or (isinstance(first, Mapping) and set(first) & inputs):
                return reading.rows(rows, self.model, name)
            raw = [rows[index] for index in range(len(rows))]
            texts, labels = zip(*(_read(row, index, reading) for index, row in enumerate(raw)), strict=True)
            read = self._pairs(texts, labels) if self.kind == PAIRS else self._sentences(texts)
            if isinstance(first, Mapping) and not set(CACHED).isdisjoint(first):
                read = self._taught(read, texts, raw)
            pair, label = (each if each in read[0] else None for each in ("pair", "label"))
            length = reading.max_length or self._longest
        columns = TextColumns("text", pair, label)
        return tokenise(read, self.tokenizer, self.model, columns=columns, max_length=length, where=name)

    def _sentences(self, rows: Sequence[Sequence[str]]) -> list[dict[str, Any]]:
        lower = getattr(_modules(self.owner)[0], "do_lower_case", False)  # done by the tokenizer from release 6 on
        texts = dict.fromkeys(self.prompt + text.strip() for row in rows for text in row)
        return [{"text": text.lower() if lower else text} for text in texts]

    def _pairs(self, rows: Sequence[Sequence[str]], labels: Sequence[Any]) -> list[dict[str, Any]]:
        short = next((index for index, row in enumerate(rows) if len(row) < 2), None)
        if short is not None:
            raise DataError(f"row {short} has one text; a CrossEncoder reads pairs")
        read = [{"text": row[0].strip(), "pair": row[1].strip()} for row in rows]
        if labels[0] is None:
            return read
        return [{**row, "label": label} for row, label in zip(read, labels, strict=True)]

    def texts(self, row: Any, index: int) -> list[str]:
        """Return the texts of a row, as `rows` reads them.

        :raises DataError: when there are none.
        """
        return [text.strip() for text in _read(row, index, Reading(labelled=False))[0]]

    def _taught(
        self, read: Sequence[Mapping[str, Any]], texts: Sequence[Sequence[str]], raw: Sequence[Mapping[str, Any]]
    ) -> list[dict[str, Any]]:
        """Return rows with what a teacher has put out for them."""
        if self.kind == SENTENCES:
            several = next((index for index, row in enumerate(texts) if len(row) > 1), None)
            if several is not None:
                raise DataError(f"row {several} has {len(texts[several])} texts, and a teacher's outputs are of one")
            first: dict[str, Mapping[str, Any]] = {}
            for (text,), row in zip(texts, raw, strict=True):
                first.setdefault(text.strip(), row)
            raw = list(first.values())
        return [with_cached(*pair) for pair in zip(read, raw, strict=True)]

    @property
    def prompts(self) -> Mapping[str, str]:
        """What `encode` writes before texts, by name."""
        return getattr(self.owner, "prompts", None) or {}

    @property
    def prompt(self) -> str:
        """The prompt that `encode` takes where it is not told otherwise."""
        return self.prompts.get(getattr(self.owner, "default_prompt_name", None) or "", "")

    @property
    def _longest(self) -> int | None:
        """Tokens to which the object cuts texts."""
        own = getattr(self.owner, "max_seq_length", None) or getattr(self.owner, "max_length", None)
        return min((limit for limit in (own, longest_sequence(self.model)) if limit is not None), default=None)

    def vectors(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Return what `encode` gives for a batch of tokens, [B, width]."""
        features: dict[str, Any] = dict(batch)
        if self.prompt and any(not getattr(module, "include_prompt", True) for module in self.behind):
            ids = self.tokenizer(self.prompt)["input_ids"]
            features["prompt_length"] = len(ids) - (ids[-1] in self.tokenizer.all_special_ids)
        found: Tensor = self.owner(features)["sentence_embedding"]
        return found

    def append(self, linear: nn.Linear) -> None:
        """Put a linear layer behind all other modules, in place, and its outputs to length 1 where the vectors were."""
        last = self.behind[-1]
        dense = _dense_class()(linear.in_features, linear.out_features, activation_function=nn.Identity())
        dense.linear = linear
        self.owner.append(dense.train(self.owner.training))
        if _is(last, "Normalize"):
            self.owner.append(copy.deepcopy(last))


def inside(model: Any) -> Any:
    """Return the transformers model inside an object of sentence-transformers; anything else as it is."""
    return Whole.of(model).model


def _modules(owner: Any) -> list[Any]:
    return list(owner) if isinstance(owner, nn.Sequential) else []


def _is(module: Any, name: str) -> bool:
    return any(base.__name__ == name for base in type(module).__mro__)


def _read(row: Any, index: int, reading: Reading) -> tuple[list[str], Any]:
    """Return the texts of a row, and its label if it has one."""
    if hasattr(row, "texts"):
        return list(row.texts), getattr(row, "label", None) if reading.labelled else None
    label = None
    if isinstance(row, Mapping):
        asked = [name for name in (reading.text_column, reading.text_pair_column) if name is not None]
        named = [name for name in asked if reading.labelled or name in row]
        labels = _LABELS if reading.label_column is None else (reading.label_column,)
        wanted = (*named, reading.label_column if reading.labelled else None)
        missing = next((name for name in wanted if name is not None and name not in row), None)
        if missing is not None:
            raise DataError(
                f"row {index} has no column {missing!r}.{suggest(missing, row)} Its columns: {', '.join(row)}"
            )
        label = next((row[name] for name in labels if name in row), None) if reading.labelled else None
        cells = [row[name] for name in named or row if name not in labels]
    else:
        cells = [row] if isinstance(row, str) else list(row) if isinstance(row, Sequence) else []
    texts = [cell for cell in cells if isinstance(cell, str)]
    if not texts:
        raise DataError(
            f"row {index} has no text: expected a string, several, a dict with columns of strings, or one of tokens "
            f"(input_ids); found {row!r:.80}"
        )
    return texts, label


def _narrow(modules: Sequence[Any], hidden: Sequence[int]) -> None:
    """Cut the modules behind an encoder to the hidden dimensions that it has left."""
    columns = list(hidden)
    for module in modules:
        if _is(module, "Dense"):
            linear = module.linear
            linear.weight = nn.Parameter(linear.weight.detach()[:, columns].clone(), linear.weight.requires_grad)
            linear.in_features = module.in_features = len(columns)
            return
        if _is(module, "Pooling"):
            names = [name for name in _WIDTHS if name in vars(module)]
            width = vars(module)[names[0]]
            ways = module.pooling_output_dimension // width
            columns = [way * width + column for way in range(ways) for column in hidden]
            vars(module).update(dict.fromkeys(names, len(hidden)), pooling_output_dimension=len(columns))


def _dense_class() -> Any:
    room = "sentence_transformers.sentence_transformer"
    return import_module(f"{room}.modules" if find_spec(room) else "sentence_transformers.models").Dense

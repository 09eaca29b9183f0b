"""A model whose tables of tokens have fewer rows."""

from __future__ import annotations

import copy
import random
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_NAMES_OF_IDS = ("_token_id", "_token_ids", "token_index")
_FIELDS_OF_TOKENS = ("logits", "prediction_logits")
_ENDS = ("pad", "eos", "sep")
_ROUNDING = 32
"""Units in the last place of the largest output by which sums in another order may differ."""
_LONGEST = 32
"""Tokens of a text that outputs are compared for."""


def output_tables(model: PreTrainedModel) -> list[nn.Parameter]:
    """Return the weights and biases with a row for each token by which a head predicts tokens; tied ones too."""
    head: Any = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    if head is None:
        return []
    number = len(head.weight)
    found = [value for value in (head.weight, getattr(head, "bias", None)) if isinstance(value, nn.Parameter)]
    base = f"{model.base_model_prefix}."
    # A second bias of the same head, as BERT's masked language model has.
    found += [
        value
        for name, value in model.named_parameters()
        if name.endswith("bias") and not name.startswith(base) and value.shape == (number,)
    ]
    return found


def ids_of_config(config: Any) -> dict[str, list[int]]:
    """Return the ids of tokens that a configuration names, by the setting."""
    found = {}
    for name, value in config.to_dict().items():
        ids = value if isinstance(value, list) else [value]
        if name.endswith(_NAMES_OF_IDS) and ids and all(isinstance(each, int) for each in ids):
            found[name] = ids
    return found


def with_fewer_rows(model: PreTrainedModel, kept: Sequence[int]) -> PreTrainedModel:
    """Return a copy of a model with some rows of its tables of tokens, in the order given.

    :param kept: ids.
    """
    table: Any = model.get_input_embeddings()
    memo: dict[int, Any] = {}
    new: dict[int, int] = {old: number for number, old in enumerate(kept)}
    for parameter in (table.weight, *output_tables(model)):
        rows = parameter.detach()[torch.tensor(kept, device=parameter.device)]
        memo[id(parameter)] = nn.Parameter(rows, requires_grad=parameter.requires_grad)
    changed = {id(value) for value in memo.values()}
    small: PreTrainedModel = copy.deepcopy(model, memo)
    for module in small.modules():
        for name, value in vars(module).items():  # some families note ids when they are built
            pads = name == "padding_idx" and value == model.config.pad_token_id and not isinstance(module, nn.Embedding)
            if type(value) is int and (pads or name.endswith(_NAMES_OF_IDS)):
                setattr(module, name, new.get(value, value))
        if not any(id(value) in changed for value in module._parameters.values()):
            continue
        if isinstance(module, nn.Embedding):
            module.num_embeddings = len(kept)
            if module.padding_idx is not None:
                module.padding_idx = new[module.padding_idx]
        elif isinstance(module, nn.Linear):
            module.out_features = len(kept)
    for config in _configs(small):
        for name, ids in ids_of_config(config).items():
            value = getattr(config, name)
            setattr(
                config,
                name,
                [new.get(each, each) for each in ids] if isinstance(value, list) else new.get(value, value),
            )
        if hasattr(config, "vocab_size"):
            config.vocab_size = len(kept)
    return small


def _configs(model: PreTrainedModel) -> list[Any]:
    """The configurations of a model that state the number of tokens, and that of its generation."""
    own = [model.config, getattr(model, "generation_config", None)]
    return [config for config in own if config is not None]


def batch_of(
    texts: Sequence[Sequence[int]], model: PreTrainedModel, kept: Sequence[int], mask: Any
) -> dict[str, Tensor]:
    """Return a batch of the beginnings of some texts, and of one with kept tokens at random.

    :param texts: ids, all of them kept.
    :param mask: id of the mask, or None.
    """
    pad = model.config.pad_token_id
    places = getattr(model.config, "max_position_embeddings", None) or 2 * _LONGEST
    length = max(1, min(_LONGEST, places - 1 - (pad or 0)))  # some families count positions from the padding id on
    # Ends are found by their id, and one text has one of them.
    ends = {each for name, ids in ids_of_config(model.config).items() if name.startswith(_ENDS) for each in ids}
    drawn = random.Random(0).choices(sorted(set(kept) - ends) or list(kept), k=length)
    if mask in kept:
        drawn[-1] = mask
    rows = [drawn, *(list(ids[:length]) for ids in texts)]
    filling = kept[0] if pad is None or pad not in kept else pad
    ids = [[*row, *[filling] * (length - len(row))] for row in rows]
    masks = [[1] * len(row) + [0] * (length - len(row)) for row in rows]
    return {
        "input_ids": torch.tensor(ids, device=model.device),
        "attention_mask": torch.tensor(masks, device=model.device),
    }


@torch.no_grad()
def outputs_apart(
    model: PreTrainedModel, small: PreTrainedModel, batch: Mapping[str, Tensor], kept: Sequence[int]
) -> float | None:
    """Return how far the outputs of two models are apart, by their size: for ids, and for what those are numbered now.

    Even a plain copy may differ in the last digit, because matrix products go by where in memory weights lie.

    :param batch: with `input_ids`, of kept tokens.
    :return: None for more than rounding.
    """
    new = {old: number for number, old in enumerate(kept)}
    ids = batch["input_ids"]
    mapped = torch.tensor([[new[each] for each in row] for row in ids.tolist()], device=ids.device)
    before = model(**batch, return_dict=True)
    after = small(**{**batch, "input_ids": mapped}, return_dict=True)
    predicts, found = bool(output_tables(model)), 0.0
    for name, value in before.items():
        if isinstance(value, Tensor):
            wanted = value[..., list(kept)] if predicts and name in _FIELDS_OF_TOKENS else value
            if not torch.equal(wanted, after[name]):
                found = max(found, float((wanted - after[name]).abs().max() / wanted.abs().max()))
                if not found <= _ROUNDING * torch.finfo(wanted.dtype).eps:
                    return None
    return found

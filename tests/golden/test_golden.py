"""Golden numbers: what `prune`, `finetune` and `PruningCallback` come to on small seeded models stays what it was.

After a change that is meant to move figures, record them anew:

    python -m pytest tests/golden -m slow -n 0 --record-golden [-k "some cases"]

and say in the commit which figures moved, and why. Models are in float64, so that another order of summation moves no
figure. Some are in float32, as models usually are: their figures are those of one thread, and of one order of sums.
"""

from __future__ import annotations

import copy
import functools
import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch.utils.data import DataLoader

import cofiprune
from toy import collate

pytestmark = [
    pytest.mark.slow,
    pytest.mark.usefixtures("started_by_hand"),
    pytest.mark.filterwarnings("ignore:pruning without data"),
]
SIZES = {
    "vocab_size": 40, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48,
    "max_position_embeddings": 16,
}  # fmt: skip
CLS, CLASSES, WORDS = 2, 3, 8  # tokens 5, 6 and 7 say the class
Row = dict[str, Any]
Case = Callable[[Path], Any]

LABELS: dict[str, Callable[[list[int], int], Row]] = {
    "class": lambda ids, index: {"labels": index},
    "none": lambda ids, index: {},
    "tags": lambda ids, index: {"labels": [token % CLASSES for token in ids]},
    "number": lambda ids, index: {"labels": index - 0.5},
    "span": lambda ids, index: {"start_positions": ids.index(5 + index), "end_positions": len(ids) - 1},
    "words": lambda ids, index: {"labels": [token if place % 3 == 1 else -100 for place, token in enumerate(ids)]},
}


def rows(count: int = 64, *, seed: int = 1, label: str = "class") -> list[Row]:
    """Rows of 4 to 12 tokens; one token, at any place but the first, says the class."""
    generator = torch.Generator().manual_seed(seed)

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high, (), generator=generator))

    found = []
    for index in range(count):
        ids = [CLS, *(draw(WORDS, SIZES["vocab_size"]) for _ in range(draw(2, 11)))]
        ids.insert(draw(1, len(ids) + 1), 5 + index % CLASSES)
        found.append({"input_ids": ids, **LABELS[label](ids, index % CLASSES)})
    return found


@functools.cache
def learned(name: str, **sizes: Any) -> Any:
    """A model whose biases and norms are random too, after a few steps on the classes where it has such a head."""
    torch.manual_seed(0)
    cls = getattr(transformers, name)
    model = cls(cls.config_class(**{**SIZES, "num_labels": CLASSES, **sizes})).double()
    with torch.no_grad():
        for value in model.parameters():
            value.copy_(2 * value if value.dim() > 1 else value + 0.2 * torch.randn_like(value))
    optimizer = torch.optim.Adam(model.eval().parameters(), 2e-3)
    if name.endswith("SequenceClassification") and model.config.num_labels == CLASSES:
        for epoch in range(6):
            for batch in DataLoader(rows(96, seed=2 + epoch), batch_size=16, collate_fn=collate):
                optimizer.zero_grad()
                model(**batch).loss.backward()
                optimizer.step()
    model.zero_grad()
    return model.eval()


def new(name: str = "BertForSequenceClassification", dtype: torch.dtype = torch.float64, **sizes: Any) -> Any:
    return copy.deepcopy(learned(name, **sizes)).to(dtype)


def of(*args: Any, **sizes: Any) -> Callable[[], Any]:
    return lambda: new(*args, **sizes)


in_float32 = of(dtype=torch.float32)
three_layers = teacher = of(num_hidden_layers=3)  # of other weights, too
wider = of(hidden_size=48, num_hidden_layers=3)
tagger = of("BertForTokenClassification")
encoder = of("BertModel")
albert = of("AlbertForSequenceClassification", embedding_size=16)
modernbert = of("ModernBertForSequenceClassification", pad_token_id=0, cls_token_id=2, sep_token_id=3)
deberta = of("DebertaV2ForSequenceClassification", relative_attention=True, pos_att_type="c2p|p2c")
regressor = of("BertForSequenceClassification", num_labels=1)


def half(model: Any) -> cofiprune.Plan:
    """A plan without every third hidden dimension and half of the inner ones, with a scale and a block less."""
    structure = cofiprune.structure(model)
    values = {name: torch.ones(group.size) for name, group in structure.items()}
    values["hidden"][::3] = 0
    values["layers.0.intermediate"][::2] = 0
    values["layers.1.heads"][1], values["layers.1.heads"][2] = 0, 0.5
    values["layers.0.attention"].zero_()
    return cofiprune.Plan.from_values(structure, values)


# Ways to run.

BRIEF = {"epochs": 3, "finetune_epochs": 1, "batch_size": 8, "logging_steps": 4, "progress": False}


def pruned(model: Callable[[], Any] = new, data: Any = rows, *, brief: bool = True, **settings: Any) -> Case:
    """A case of `prune`; models and rows are made when it runs."""
    settings = {**(BRIEF if brief else {}), "target_sparsity": 0.6, "method": "cofi", **settings}
    if settings.keys() & {"target_macs", "target_model_sparsity"}:
        del settings["target_sparsity"]
    return lambda folder: cofiprune.prune(model(), data and data(), **made(settings))


def without_data(**settings: Any) -> Case:
    return pruned(data=None, brief=False, **settings)


def at_once(**settings: Any) -> Case:
    return pruned(**{"data": labelled("none"), "brief": False, "progress": False, "method": "one-shot", **settings})


def tuned(model: Callable[[], Any] = new, **settings: Any) -> Case:
    settings = {"epochs": 2, "batch_size": 8, "logging_steps": 4, "progress": False, **settings}
    return lambda folder: cofiprune.finetune(model(), rows(), **made(settings))


def made(settings: dict[str, Any]) -> dict[str, Any]:
    lazy = ("teacher", "eval_dataset")
    return {name: value() if name in lazy and callable(value) else value for name, value in settings.items()}


def labelled(label: str, count: int = 64) -> Callable[[], list[Row]]:
    return lambda: rows(count, label=label)


def held_out() -> list[Row]:
    return rows(24, seed=99)


def loader() -> Any:
    return DataLoader(rows(), batch_size=8, shuffle=True, collate_fn=collate)


def resumed(stop: int, **settings: Any) -> Case:
    """Stopped as by Ctrl-C after a step, and gone on with from its checkpoint."""

    def run(folder: Path) -> Any:
        once = iter((stop,))  # a second signal would stop it without a checkpoint

        def interrupt(entry: Row) -> None:
            if entry["step"] >= stop and next(once, None):
                os.kill(os.getpid(), signal.SIGINT)

        with pytest.raises(KeyboardInterrupt):
            pruned(output_dir=folder, callbacks=[interrupt], **settings)(folder)
        torch.manual_seed(99)
        return pruned(output_dir=folder, resume=True, **settings)(folder)

    return run


def within_trainer(folder: Path, callback: cofiprune.PruningCallback, model: Any, *, resume: bool = False, **more: Any):
    """Train with the callback; its result."""
    settings = {
        "num_train_epochs": 4, "per_device_train_batch_size": 8, "learning_rate": 1e-3, "logging_steps": 4, "seed": 0,
        "save_strategy": "no", "use_cpu": True, "report_to": [], "disable_tqdm": True, "dataloader_pin_memory": False,
    }  # fmt: skip
    arguments = transformers.TrainingArguments(str(folder), **{**settings, **more})
    trainer = transformers.Trainer(
        model, arguments, train_dataset=rows(), eval_dataset=held_out(), data_collator=collate, callbacks=[callback]
    )
    trainer.train(resume_from_checkpoint=resume)
    return callback.result


def called_back(model: Callable[[], Any] = new, *, teacher: Any = None, trainer: Row | None = None, **own: Any) -> Case:
    def run(folder: Path) -> Any:
        callback = cofiprune.PruningCallback(0.6, **made({"teacher": teacher, **own}))
        return within_trainer(folder, callback, model(), **(trainer or {}))

    return run


def called_back_resumed(folder: Path) -> Any:
    """A run that is gone on with from a checkpoint in the midst of the gates, as if there were no later ones."""
    saving = {"save_strategy": "steps", "save_steps": 8}
    within_trainer(folder, cofiprune.PruningCallback(0.6, teacher(), freeze_epochs=2), new(), **saving)
    for late in (16, 24, 32):
        (folder / f"checkpoint-{late}").rename(folder / f"late-{late}")
    callback = cofiprune.PruningCallback(0.6, teacher(), freeze_epochs=2)
    return within_trainer(folder, callback, new(), resume=True, **saving)


def compacted() -> Any:
    return cofiprune.compact(new(), half(new()))


def masked() -> Any:
    model = new()
    cofiprune.attach(model).set_plan(half(model))
    return model


unlabelled = labelled("none")
SHRINKING = {
    "data": lambda: rows(96), "target_sparsity": 0.8, "one_shot_share": 0, "epochs": 12, "sparsity_warmup_epochs": 3,
    "freeze_epochs": 2, "batch_size": 16, "learning_rate": 1e-3, "gate_learning_rate": 0.2, "logging_steps": 12,
    "teacher": teacher,
}  # fmt: skip
GATED = {"freeze_epochs": 1, "teacher": teacher, "eval_dataset": held_out}
LEARNING = {"learning_rate": 1e-3, "finetune_learning_rate": 2e-3}

CASES: dict[str, Case] = {
    # Gates and weights.
    "cofi": pruned(teacher=teacher, eval_dataset=held_out),
    "cofi with more steps of gates": pruned(**GATED),
    "cofi with more steps of gates, resumed in them": resumed(8, **GATED),
    "cofi with more steps of gates, resumed in the recovery": resumed(20, **GATED),
    "cofi in float32": pruned(in_float32, teacher="self"),
    "cofi of labels alone": pruned(),
    "cofi to 0.9": pruned(target_sparsity=0.9, teacher="self", **LEARNING),
    "cofi without one shot": pruned(one_shot_share=0, teacher=teacher, **LEARNING),
    "cofi without one shot, resumed": resumed(8, one_shot_share=0, teacher=teacher, **LEARNING),
    "cofi that shrinks": pruned(**SHRINKING),
    "cofi that shrinks, resumed": resumed(48, **SHRINKING),
    "cofi that may not shrink": pruned(compact_in_training=False, **SHRINKING),
    "cofi after training": pruned(pre_finetune_epochs=1, teacher="self", **LEARNING),
    "cofi of heads and intermediate": pruned(units=("head", "intermediate"), teacher="self"),
    "cofi of layers and intermediate": pruned(units=("layer", "intermediate"), one_shot_share=0, teacher="self"),
    "cofi with repair": pruned(repair=True, freeze_epochs=0, teacher="self"),
    "cofi with repair and no recovery": pruned(repair=True, freeze_epochs=0, finetune_epochs=0, teacher="self"),
    "cofi with no recovery": pruned(freeze_epochs=0, finetune_epochs=0, teacher="self", eval_dataset=held_out),
    "cofi with a wider teacher": pruned(teacher=wider, distill_layers=2, **LEARNING),
    "cofi with the nearest layers": pruned(teacher=teacher, distill_layers=2, distill_layer_match="nearest"),
    "cofi with accumulation": pruned(batch_size=4, gradient_accumulation_steps=2, logging_steps=2, teacher="self"),
    "cofi with the best weights": pruned(
        teacher="self", eval_dataset=held_out, eval_steps=2, metric_for_best_model="loss", finetune_learning_rate=0.03
    ),
    "cofi with schedules": pruned(
        teacher="self", lr_scheduler_type="cosine", warmup_ratio=0.3, weight_decay=0.1, dropout=True,
        train_embeddings=True, finetune_batch_size=16, sparsity_warmup_epochs=1, freeze_epochs=1, **LEARNING,
    ),
    "cofi by a preset": pruned(
        teacher="self", config=cofiprune.PruneConfig.preset("glue-small", pre_finetune_epochs=0), finetune_epochs=2,
        sparsity_warmup_epochs=1,
    ),
    "cofi over a loader": pruned(data=loader, teacher="self"),
    "cofi of unlabelled rows": pruned(data=unlabelled, teacher="self"),
    "cofi to MACs": pruned(target_macs=60_000, target_seq_len=12, teacher="self"),
    "cofi to a share of the model": pruned(target_model_sparsity=0.4, teacher="self"),
    "cofi in multiples of 8": pruned(three_layers, target_sparsity=0.65, round_to=8, teacher="self"),
    "cofi in one shape": pruned(three_layers, uniform=True, teacher="self"),
    "cofi of tags": pruned(tagger, data=labelled("tags"), eval_dataset=labelled("tags", 16)),
    "cofi of an encoder": pruned(encoder, data=unlabelled, teacher="self"),
    "cofi of numbers": pruned(regressor, data=labelled("number"), eval_dataset=labelled("number", 16)),
    "cofi of spans": pruned(of("BertForQuestionAnswering", num_labels=2), data=labelled("span"), teacher="self"),
    "cofi of words": pruned(of("BertForMaskedLM"), data=labelled("words"), teacher="self"),
    "cofi of a compacted model": pruned(compacted, target_sparsity=0.4, teacher="self"),
    "cofi of shared layers": pruned(albert, teacher="self", freeze_epochs=1, finetune_epochs=0),
    "cofi of gated layers": pruned(modernbert, teacher="self", freeze_epochs=1),
    # Gates alone.
    "gates": pruned(method="gates", epochs=3, finetune_epochs=0, data=unlabelled),
    "gates without one shot": pruned(method="gates", one_shot_share=0, gate_learning_rate=0.2, finetune_epochs=0),
    "gates without repair": pruned(method="gates", one_shot_share=0.5, repair=False, finetune_epochs=0),
    "gates and recovery": pruned(method="gates", teacher=teacher, eval_dataset=held_out),
    # One shot on data.
    "one shot": at_once(eval_dataset=held_out),
    "one shot in float32": at_once(model=in_float32),
    "one shot to 0.85": at_once(model=three_layers, target_sparsity=0.85),
    "one shot of hidden dimensions too": at_once(units=("head", "intermediate", "hidden", "layer")),
    "one shot without repair": at_once(repair=False),
    "one shot with labels and a teacher": at_once(data=rows, teacher=teacher),
    "one shot in one shape": at_once(model=three_layers, uniform=True),
    "one shot in multiples of 8": at_once(round_to=8),
    "one shot of an encoder": at_once(model=encoder),
    "one shot of shared layers": at_once(model=albert),
    "one shot of gated layers": at_once(model=modernbert),
    "one shot of relative positions": at_once(model=deberta),
    "one shot and recovery": pruned(method="one-shot", data=unlabelled),
    "one shot and recovery, resumed": resumed(4, method="one-shot", data=unlabelled),
    "auto by epochs": pruned(method="auto", teacher="self"),
    "auto by no epochs": pruned(method="auto", epochs=0, finetune_epochs=0),
    # Without data.
    "no data": without_data(eval_dataset=held_out),
    "no data to 0.5": without_data(target_sparsity=0.5),
    "no data to 0.85": without_data(target_sparsity=0.85),
    "no data to 0.5 with itself": without_data(target_sparsity=0.5, teacher="self"),
    "no data to 0.85 with itself": without_data(target_sparsity=0.85, teacher="self"),
    "no data with a teacher": without_data(teacher=teacher),
    "no data without repair": without_data(teacher="self", repair=False),
    "no data of heads and intermediate": without_data(units=("head", "intermediate"), teacher="self"),
    "no data in float32": without_data(model=in_float32, teacher="self"),
    "no data in one shape": without_data(model=three_layers, uniform=True),
    "no data to MACs": without_data(target_macs=60_000, target_seq_len=12),
    "no data of an encoder": without_data(model=encoder, teacher="self"),
    "no data of shared layers": without_data(model=albert, teacher="self"),
    "no data of gated layers": without_data(model=modernbert, teacher="self"),
    # Sweeps.
    "sweep": pruned(target_sparsity=[0.4, 0.7], epochs=1, teacher="self", eval_dataset=held_out),
    "sweep at once": at_once(target_sparsity=[0.4, 0.7]),
    "sweep without data": without_data(target_sparsity=[0.4, 0.7]),
    # Training alone.
    "finetune": tuned(eval_dataset=held_out),
    "finetune with a teacher": tuned(teacher=wider, learning_rate=1e-3),
    "finetune of a compacted model": tuned(compacted, teacher=teacher, eval_dataset=held_out),
    "finetune with masks": tuned(masked, teacher=teacher, eval_dataset=held_out),
    # Within a Trainer.
    "callback": called_back(trainer={"eval_strategy": "epoch"}),
    "callback with a teacher": called_back(teacher=teacher, freeze_epochs=2),
    "callback with a teacher, resumed": called_back_resumed,
    "callback without one shot": called_back(teacher="self", one_shot_share=0),
    "callback in float32": called_back(in_float32, teacher="self"),
}  # fmt: skip


def test_nothing_is_recorded_that_no_case_comes_to() -> None:
    recorded = json.loads(Path(__file__).with_name("golden.json").read_text(encoding="utf-8"))
    assert recorded.keys() == {name for name in CASES if ", resumed" not in name}


@pytest.mark.parametrize("name", CASES)
def test_figures_are_those_recorded(name: str, golden: Callable[..., None], tmp_path: Path) -> None:
    torch.manual_seed(0)
    golden(name, CASES[name](tmp_path), [collate(rows(4, seed=seed, label="none")) for seed in (7, 8)])

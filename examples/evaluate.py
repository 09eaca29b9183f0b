"""Measure models on a task: size, sparsity, the task's metrics, and seconds per example.

    python examples/evaluate.py sst2 MODEL --data-dir DIR
    python examples/evaluate.py mnli DENSE COMPACTED --data-dir DIR --device cuda
    python examples/evaluate.py squad MODEL --data-dir DIR --max-length 192 --doc-stride 64

Size is the number of parameters in the encoder's layers: embeddings, pooler and head do not count; sparsity is the
share of these that was removed. Seconds per example are those of the forward pass on batches of `--max-length` tokens,
the models in turn. What is no option of this program is one of run_glue, run_squad or run_ner. A folder of the original
CoFi is read after `cofiprune convert FOLDER OUT`; data of your own, by `cofiprune evaluate`.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from typing import Any

import run_glue
import run_ner
import run_squad
import torch
import transformers
from rich.console import Console
from rich.table import Table
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel

import cofiprune
from cofiprune.data import Labels, tokenise

TASKS = {
    **dict.fromkeys(run_glue.TASKS, "ForSequenceClassification"),
    **dict.fromkeys(("squad", "squad_v2"), "ForQuestionAnswering"),
    **dict.fromkeys(("wnut17", "ncbi_disease", "ner"), "ForTokenClassification"),
}
"""Task -> the ending of the class of the models that it takes; "ner" is for tags of your own."""


def parse(argv: Sequence[str] | None) -> tuple[argparse.Namespace, list[str]]:
    """Return the options of this program, and those of the task's own."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    add = parser.add_argument
    add("task", type=lambda text: text.lower().replace("-", ""), choices=TASKS, metavar="TASK", help=", ".join(TASKS))
    add("models", nargs="+", metavar="MODEL", help="folder or hub name of a model with a trained head")
    add("--batch-size", type=int, default=128, help="examples at a time in timing (default: 128)")
    add("--runs", type=int, default=5, help="timed passes, of which the median counts (default: 5)")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="(default: cuda where there is one)")
    add("--threads", type=int, help="of the CPU (default: torch's own number)")
    add("--json", action="store_true", help="print JSON: a list with one object for each model")
    add("--tiny", action="store_true", help="few rows, made up where there is no --data-dir, and few passes")
    options, words = parser.parse_known_args(argv)
    return options, [*words, *(["--tiny"] if options.tiny else [])]


def load(source: str, task: str, device: str) -> tuple[PreTrainedModel, Any]:
    """Load a model that has a trained head for a task, and its tokenizer."""
    stated = next(iter(AutoConfig.from_pretrained(source).architectures or ()), "model of no stated class")
    if not stated.endswith(TASKS[task]):
        sys.exit(f"{source} is a {stated}, and {task} needs a model with a trained head: one ...{TASKS[task]}")
    if task in run_glue.TASKS:
        model = run_glue.load_model(source, Labels(run_glue.TASKS[task][0]))
    else:
        model = getattr(transformers, f"AutoModel{TASKS[task]}").from_pretrained(source)
    if TASKS[task] == "ForTokenClassification":
        return model.to(device), run_ner.load_tokenizer(source)
    return model.to(device), AutoTokenizer.from_pretrained(source)


def scores(model: PreTrainedModel, tokenizer: Any, task: str, words: Sequence[str]) -> tuple[dict[str, float], Any]:
    """Return the metrics of a model on the validation rows, and the options of the task."""
    labels, found = Labels.of_model(model.config), {}
    if task in run_glue.TASKS:
        options, _ = run_glue.parse(["--task", task, *words])
        made_up = options.tiny and not options.data_dir
        splits = {"": run_glue.made_up(task, 128)} if made_up else run_glue.load_validation(task, options.data_dir)
        for ending, split in splits.items():
            rows = tokenise(split[: options.eval_rows], tokenizer, model, max_length=options.max_length)
            values = cofiprune.evaluate(model, rows, batch_size=64, compute_metrics=run_glue.metrics_of(task, labels))
            found |= {f"{name}{ending}": values[name] for name in run_glue.TASKS[task][1]}
    elif TASKS[task] == "ForTokenClassification":
        options, _ = run_ner.parse(["--task", task, *words])
        sentences = run_ner.load_split(options.task, options.data_dir, "validation")[0][: options.eval_rows]
        rows = tokenise(sentences, tokenizer, model, max_length=options.max_length)

        def of_entities(seen: Any) -> dict[str, float]:
            return run_ner.entity_scores(sentences, rows, seen.predictions.argmax(-1), labels)

        values = cofiprune.evaluate(model, rows, compute_metrics=of_entities)
        found = {name: values[name] for name in ("precision", "recall", "f1")}
    else:
        options, _ = run_squad.parse([*(["--version-2-with-negative"] if task == "squad_v2" else []), *words])
        questions = run_squad.load_questions(options, "validation", "dev")
        rows = tokenise(questions, tokenizer, model, max_length=options.max_length, stride=options.doc_stride)

        def of_answers(seen: Any) -> dict[str, float]:
            answers = run_squad.find_answers(questions, rows, *seen.predictions[:2], options)
            return run_squad.squad_metrics(questions, answers, version_2=options.version_2_with_negative)

        values = cofiprune.evaluate(model, rows, compute_metrics=of_answers)
        found = {name: value for name, value in values.items() if name.endswith(("exact_match", "f1"))}
    return found, options


def main(argv: Sequence[str] | None = None) -> None:
    """Measure each model, and print a column for each."""
    options, words = parse(argv)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    if options.threads:
        torch.set_num_threads(options.threads)
    models = [load(source, options.task, options.device) for source in options.models]
    found: list[dict[str, Any]] = []
    for source, (model, tokenizer) in zip(options.models, models, strict=True):
        metrics, own = scores(model, tokenizer, options.task, words)
        size = cofiprune.summary(model)
        passes = {"runs": 2} if options.tiny else {"runs": options.runs}
        timed = {"batch_size": 4 if options.tiny else options.batch_size, "seq_len": own.max_length, **passes}
        speed = cofiprune.benchmark(model, models[0][0] if found else None, **timed).rows[0]
        entry = {"model": source, "state": size.state, "size": size.layer_parameters, "parameters": size.parameters}
        entry |= {"sparsity": size.sparsity, **metrics, "speed-up over the first": speed.speedup if found else 1.0}
        entry |= {"seconds per example": speed.model.median_ms / 1000 / speed.batch_size}
        found.append(entry)
    if options.json:
        print(json.dumps(found, indent=1))
        return
    table = Table(
        "model", title=f"{options.task}; {options.device}, batch {speed.batch_size} of {speed.seq_len} tokens"
    )
    for entry in found:
        table.add_column(entry["model"], justify="right", overflow="fold")
    for name in list(found[0])[1:]:
        values = [entry[name] for entry in found]
        form = {int: ",", float: ".6f" if "seconds" in name else ".4f", str: ""}
        table.add_row(name, *(f"{value:{form[type(value)]}}" for value in values))
    Console().print(table)


if __name__ == "__main__":
    main()

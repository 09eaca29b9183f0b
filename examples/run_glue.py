"""Prune an encoder on a task of GLUE, or on text classification and regression data of your own.

    python examples/run_glue.py --task mrpc --target-sparsity 0.9
    python examples/run_glue.py --task mnli --data-dir DIR --model FOLDER --teacher FOLDER --preset auto
    python examples/run_glue.py --train-file train.csv --validation-file dev.csv --label-column rating --epochs 6
    accelerate launch --num_processes 8 examples/run_glue.py --task sst2 --target-sparsity 0.95

The model is fine-tuned on the task (or a teacher is loaded), a copy of it is pruned, saved, loaded again, and measured
next to the teacher. Every field of `cofiprune.PruneConfig` is an option too: --method one-shot --units head hidden.
"""

import argparse
import copy
import json
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import transformers
from accelerate import PartialState
from bundled import minilm, tiny_bert
from scipy import stats
from sklearn import metrics as scores
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer, PreTrainedModel

import cofiprune
from cofiprune.data import Labels, TextColumns, find_text_columns, load_rows, tokenise

TASKS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "cola": (("unacceptable", "acceptable"), ("matthews_correlation",)),
    "mnli": (("entailment", "neutral", "contradiction"), ("accuracy",)),
    "mrpc": (("not_equivalent", "equivalent"), ("accuracy", "f1")),
    "qnli": (("entailment", "not_entailment"), ("accuracy",)),
    "qqp": (("not_duplicate", "duplicate"), ("accuracy", "f1")),
    "rte": (("entailment", "not_entailment"), ("accuracy",)),
    "sst2": (("negative", "positive"), ("accuracy",)),
    "stsb": ((), ("pearson", "spearman")),
    "wnli": (("not_entailment", "entailment"), ("accuracy",)),
}
"""Names of the classes in the order of their ids in the data, none where labels are numbers; the official metrics."""
LARGE = ("mnli", "qnli", "qqp", "sst2")
TINY = "--epochs 1 --finetune-epochs 1 --batch-size 16 --learning-rate 1e-3 --finetune-learning-rate 3e-3"
Rows = list[dict[str, Any]]
# Settings that say how a student learns; the teacher leaves them to their defaults.
STUDENT_ONLY = ("label_weight", "train_embeddings", "finetune_batch_size")


def parse(argv: Sequence[str] | None) -> tuple[argparse.Namespace, cofiprune.PruneConfig]:
    """Read the command line; what is no option of this program is a setting of cofiprune."""
    epilog = "Every field of cofiprune.PruneConfig is an option too: --epochs 6 --units head intermediate."
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], epilog=epilog, allow_abbrev=False)
    add = parser.add_argument
    add("--task", "--task-name", metavar="NAME", help=f"task of GLUE: {', '.join(TASKS)}")
    add("--data-dir", help="folder with train.* and validation.* or dev.* (default: the hub)")
    add("--train-file", help="data of your own: csv, tsv, json, jsonl or parquet")
    add("--validation-file", help="the same, to measure on")
    add("--text-column", help="text, or first text of a pair (default: by its name)")
    add("--text-pair-column", help="second text of a pair")
    add("--label-column", help="label; classes may be names or numbers")
    add("--label-names", default="", metavar="A,B,...", help="names of the classes in the order of their ids")
    add("--model", help="folder or hub name of an encoder (default: the packaged MiniLM-L6)")
    add("--target-sparsity", default="0.9", help="share of the layers' parameters to remove; none: fine-tune only")
    add("--teacher", help="folder or hub name; train (the default when pruning): fine-tune the model and prune a copy; "
        "self: a copy of the model as it comes; none: learn from labels alone")  # fmt: skip
    add("--teacher-epochs", type=float, default=2.0)
    add("--teacher-learning-rate", type=float, default=5e-5)
    add("--preset", choices=("glue-small", "glue-large", "auto"), help="the original's recipe, auto: by the task")
    add("--max-length", type=int, default=128, help="tokens after which a text is cut (default: 128)")
    add("--train-rows", type=int, help="training rows to use, chosen at random, always the same")
    add("--eval-rows", type=int, help="validation rows to use, the first ones")
    add("--output-dir", type=Path, help="where everything goes (default: runs/glue-TASK)")
    add("--resume", action="store_true", help="go on with the run in the output folder")
    add("--tiny", action="store_true", help="a small random model and few rows: see in seconds that all steps run")
    add("--benchmark", action=argparse.BooleanOptionalAction, default=True, help="measure the speed-up at the end")
    words = sys.argv[1:] if argv is None else argv
    # Options may be spelled with underscores, as those of the original are.
    words = [re.sub("^--[^=]*", lambda option: option[0].replace("_", "-"), word) for word in words]
    options, settings = parser.parse_known_args(words)
    if options.task is not None:
        options.task = options.task.lower().replace("-", "").replace("_", "")
    if not (options.train_file and options.validation_file) and options.task not in TASKS:
        parser.error(f"--task takes one of {', '.join(TASKS)}; or give --train-file and --validation-file")
    options.task = options.task or Path(options.train_file).stem
    options.output_dir = options.output_dir or Path("runs", f"glue-{options.task}")
    options.target_sparsity = None if options.target_sparsity == "none" else float(options.target_sparsity)
    options.teacher = options.teacher or ("none" if options.target_sparsity is None else "train")
    if options.preset == "auto":
        options.preset = "glue-large" if options.task in LARGE else "glue-small"
    if options.tiny:
        options.teacher_epochs, options.teacher_learning_rate = 5, 5e-3
        options.train_rows, options.eval_rows = options.train_rows or 96, options.eval_rows or 32
        settings = [*TINY.split(), *settings]
    return options, cofiprune.PruneConfig.from_arguments(settings, preset=options.preset)


def load_data(options: argparse.Namespace) -> tuple[Rows, dict[str, Rows], TextColumns, Labels]:
    """Return rows of text for training and validation, the columns to read, and the labels.

    Validation rows go by the ending of their metrics' names: "" and, for MNLI, "_mismatched".
    """
    if options.train_file:
        train, validation = load_rows(options.train_file), {"": load_rows(options.validation_file)}
    elif options.tiny and not options.data_dir:
        train, validation = made_up(options.task, 0), {"": made_up(options.task, 128)}
    else:
        train = load_glue(options.task, options.data_dir, "train")
        validation = load_validation(options.task, options.data_dir)
    named = {name: getattr(options, name) for name in ("text_column", "text_pair_column", "label_column")}
    columns = find_text_columns(train[0], "classification", **named, where=f"the training data of {options.task}")
    if columns.label is None:
        sys.exit(f"no column of a known name holds the label; name one of {', '.join(train[0])} by --label-column")
    if options.train_file:
        names = [name for name in options.label_names.split(",") if name]
        labels = Labels.of_data([row[columns.label] for row in train], names)
    else:
        labels = Labels(TASKS[options.task][0])
    if options.train_rows is not None:
        order = np.random.RandomState(1234).permutation(len(train))[: options.train_rows]
        train = [train[index] for index in order]
    return train, {ending: rows[: options.eval_rows] for ending, rows in validation.items()}, columns, labels


def load_validation(task: str, folder: str | None) -> dict[str, Rows]:
    """Return the validation rows of a task by the ending of their metrics' names: "" and, for MNLI, "_mismatched"."""
    if task != "mnli":
        return {"": load_glue(task, folder, "validation", "dev")}
    found = {"": load_glue(task, folder, "validation_matched", "dev_matched", "validation", "dev")}
    if folder is None or any("mismatched" in file.name for file in Path(folder).iterdir()):
        found["_mismatched"] = load_glue(task, folder, "validation_mismatched", "dev_mismatched")
    return found


def load_glue(task: str, folder: str | None, *splits: str) -> Rows:
    """Return the rows of a split, from the hub where there is no folder; labels by name."""
    if folder is None:
        import datasets

        rows = list(datasets.load_dataset("nyu-mll/glue", task, split=splits[0]))
    else:
        rows = load_rows(folder, *splits)
    classes, label = TASKS[task][0], find_text_columns(rows[0], "classification").label
    for row in rows if classes and label else ():
        if str(row[label]).isdecimal():  # models may have the classes in another order: names tell them
            row[label] = classes[int(row[label])]
    return rows


def made_up(task: str, begin: int) -> Rows:
    """Rows for `--tiny`: a word of the text says the label."""
    labels = TASKS[task][0] or (0.0, 1.5, 2.5, 4.0, 5.0)
    words = ("red", "green", "blue", "yellow", "white")
    kinds = [(index, index % len(labels)) for index in range(begin, begin + 128)]
    return [{"sentence": f"the {words[kind]} thing has number {n}", "label": labels[kind]} for n, kind in kinds]


def load_model(source: str | Path, labels: Labels) -> PreTrainedModel:
    """Load a model; a head that it has keeps its classes, and a new one gets those of the data."""
    config = AutoConfig.from_pretrained(source)
    trained = any(name.endswith("ForSequenceClassification") for name in config.architectures or ())
    if not trained or Labels.of_model(config).generic:
        labels.apply(config)
    return AutoModelForSequenceClassification.from_pretrained(source, config=config).to(PartialState().device)


def metrics_of(task: str, labels: Labels) -> Callable[[Any], dict[str, float]] | None:
    """Return a function from a `transformers.EvalPrediction` to the metrics of a task; None for the package's own."""
    if labels.multi_label:
        return None
    classes, wanted = TASKS.get(task, ((), ("accuracy",) if labels.names else ("pearson", "spearman")))
    positive = labels.names.index(classes[1]) if "f1" in wanted else 1

    def correlation(how: Callable[..., Any], one: Any, other: Any) -> float:
        return 0.0 if one.std() == 0 or other.std() == 0 else how(one, other).statistic

    functions: dict[str, Callable[[Any, Any], float]] = {
        "accuracy": lambda logits, label: scores.accuracy_score(label, logits.argmax(-1)),
        "matthews_correlation": lambda logits, label: scores.matthews_corrcoef(label, logits.argmax(-1)),
        "f1": lambda logits, label: scores.f1_score(label, logits.argmax(-1), pos_label=positive, zero_division=0),
        "pearson": lambda logits, label: correlation(stats.pearsonr, logits.reshape(-1), label.reshape(-1)),
        "spearman": lambda logits, label: correlation(stats.spearmanr, logits.reshape(-1), label.reshape(-1)),
    }
    return lambda seen: {name: float(functions[name](np.asarray(seen.predictions), seen.label_ids)) for name in wanted}


def load_models(
    options: argparse.Namespace, labels: Labels, seed: int
) -> tuple[PreTrainedModel, PreTrainedModel | None, Any]:
    """Return the model to prune, the teacher where one is named, and the tokenizer."""
    if options.model is None:
        with PartialState().main_process_first():
            options.model = tiny_bert(options.output_dir / "tiny-model", seed) if options.tiny else minilm()
    teacher = None
    if options.teacher not in ("train", "self", "none"):
        teacher = load_model(options.teacher, labels)
        labels = Labels.of_model(teacher.config)  # a new head takes the order of the teacher's classes
    transformers.set_seed(seed)  # of a new head
    model = load_model(options.model, labels)
    if teacher is not None and labels != Labels.of_model(model.config):
        sys.exit(f"the classes differ: {model.config.id2label} in the model, {teacher.config.id2label} in the teacher")
    return model, teacher, AutoTokenizer.from_pretrained(options.model)


def main(argv: Sequence[str] | None = None) -> None:
    """Teach, prune, save, reload, measure."""
    options, config = parse(argv)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    folder, say = options.output_dir, PartialState().print
    train, validation, columns, labels = load_data(options)
    say(f"{options.task}: {len(train):,} rows for training, {sum(map(len, validation.values())):,} for validation")
    model, teacher, tokenizer = load_models(options, labels, config.seed)
    settings = {"columns": columns, "max_length": options.max_length, "where": f"the data of {options.task}"}
    train = tokenise(train, tokenizer, model, **settings)
    validation = {ending: tokenise(rows, tokenizer, model, **settings) for ending, rows in validation.items()}
    compute_metrics = metrics_of(options.task, Labels.of_model(model.config))

    def evaluate(model: PreTrainedModel) -> dict[str, float]:
        found: dict[str, float] = {}
        for ending, rows in validation.items():
            values = cofiprune.evaluate(model, rows, batch_size=64, compute_metrics=compute_metrics)
            found |= {f"{metric}{ending}": value for metric, value in values.items()}
        return found

    def place(folder: Path) -> dict[str, Any]:
        return {"output_dir": folder, "resume": "auto" if options.resume else False}

    watched = {"eval_dataset": validation[""], "compute_metrics": compute_metrics}
    if options.teacher == "train":
        say("Fine-tuning the teacher ...")
        rate = {"learning_rate": options.teacher_learning_rate, "lr_scheduler_type": "linear"}
        own = {"epochs": options.teacher_epochs, **dict.fromkeys(STUDENT_ONLY)}
        cofiprune.finetune(model, train, config=config, **rate, **own, **watched, **place(folder / "teacher"))
        save(model, tokenizer, folder / "teacher")
    dense = copy.deepcopy(model) if teacher is None else teacher
    if options.teacher in ("train", "self"):
        teacher = dense
    learning = {"teacher": teacher, "config": config, **watched, **place(folder)}
    if options.target_sparsity is None:
        say(f"Fine-tuning {options.model} ...")
        result = cofiprune.finetune(model, train, **learning)
    else:
        say(f"Pruning to a sparsity of {options.target_sparsity:g} ...")
        result = cofiprune.prune(model, train, target_sparsity=options.target_sparsity, **learning)
        model = result.compact()
    save(model, tokenizer, folder)
    if PartialState().is_main_process:
        report(dense, load_model(folder, Labels.of_model(model.config)), evaluate, result, options)


def save(model: PreTrainedModel, tokenizer: Any, folder: Path) -> None:
    """Write a model with its tokenizer, in one of the processes."""
    if PartialState().is_main_process:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


def report(
    dense: PreTrainedModel,
    pruned: PreTrainedModel,
    evaluate: Callable[[PreTrainedModel], dict[str, float]],
    result: cofiprune.PruneResult,
    options: argparse.Namespace,
) -> None:
    """Print and write metrics, size and speed of the saved model next to those of the dense one."""
    size = cofiprune.summary(pruned)
    found = {"sparsity": size.sparsity, "seconds": result.seconds, "best_step": result.best_step}
    for name, model in (("dense", dense), ("pruned", pruned)):
        found[name] = {"layer_parameters": cofiprune.summary(model).layer_parameters, **evaluate(model)}
    if options.benchmark:
        speed = cofiprune.benchmark(pruned, dense, seq_len=options.max_length, seconds=0.2 if options.tiny else 5.0)
        found["speed"] = speed.to_dict()
        print(speed)
    print(size)
    for name, value in found["dense"].items():
        print(f"{name:24}{round(value, 4):>14,}{round(found['pruned'][name], 4):>14,}")
    found |= {"options": vars(options), "settings": result.settings.model_dump(mode="json")}
    (options.output_dir / "result.json").write_text(json.dumps(found, indent=1, default=str), encoding="utf-8")
    print(f"Saved in {options.output_dir}")


if __name__ == "__main__":
    main()

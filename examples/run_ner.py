"""Prune an encoder for named entities: WNUT-17, NCBI-disease, or words with tags of your own.

    python examples/run_ner.py --task wnut17 --target-sparsity 0.9
    python examples/run_ner.py --task ncbi_disease --data-dir DIR --metric-for-best-model f1
    python examples/run_ner.py --task mine --data-dir DIR --label-names O,B-gene,I-gene

The words and their tags, columns `tokens` and `ner_tags`, come from the files train.*, validation.* (or dev.*) and
test.* of a folder, or from the hub. Precision, recall and F1 are those of whole entities, as seqeval counts them. The
model is fine-tuned (or a teacher is loaded), a copy of it is pruned, saved, loaded again, and measured next to the
teacher. Every field of `cofiprune.PruneConfig` is an option too: --method one-shot --units head intermediate.
"""

import argparse
import copy
import json
import random
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import transformers
from accelerate import PartialState
from bundled import minilm, tiny_bert
from seqeval.metrics import f1_score, precision_score, recall_score
from transformers import AutoConfig, AutoModelForTokenClassification, AutoTokenizer, PreTrainedModel

import cofiprune
from cofiprune.data import Labels, load_rows, tokenise

LABEL_NAMES = {
    "wnut17": ("O", "B-corporation", "I-corporation", "B-creative-work", "I-creative-work", "B-group", "I-group",
               "B-location", "I-location", "B-person", "I-person", "B-product", "I-product"),
    "ncbi_disease": ("O", "B-Disease", "I-Disease"),
    "made up": ("O", "B-person", "I-person", "B-place", "I-place"),
}  # fmt: skip
"""Names of the tags in the order of their ids, for data whose files hold ids alone."""
HUB_NAMES = {"wnut17": "leondz/wnut_17", "ncbi_disease": "ncbi/ncbi_disease"}
SPLITS = {"train": ("train",), "validation": ("validation", "dev"), "test": ("test",)}
TINY = "--epochs 1 --finetune-epochs 1 --batch-size 16 --learning-rate 1e-3 --finetune-learning-rate 3e-3"
Rows = list[dict[str, Any]]
# Settings that say how a student learns; the teacher leaves them to their defaults.
STUDENT_ONLY = ("label_weight", "train_embeddings", "finetune_batch_size")


def parse(argv: Sequence[str] | None) -> tuple[argparse.Namespace, cofiprune.PruneConfig]:
    """Read the command line; what is no option of this program is a setting of cofiprune."""
    epilog = "Every field of cofiprune.PruneConfig is an option too: --epochs 6 --units head intermediate."
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], epilog=epilog, allow_abbrev=False)
    add = parser.add_argument
    add("--task", default="wnut17", help="wnut17, ncbi_disease, a data set of the hub, or any name with --data-dir")
    add("--data-dir", help="folder with train.*, validation.* or dev.*, test.* (default: the hub)")
    add("--label-names", metavar="A,B,...", help="names of the tags in the order of their ids")
    add("--model", help="folder or hub name of an encoder (default: the packaged MiniLM-L6)")
    add("--target-sparsity", default="0.9", help="share of the layers' parameters to remove; none: fine-tune only")
    add("--teacher", help="folder or hub name; train (the default when pruning): fine-tune the model and prune a copy; "
        "self: a copy of the model as it comes; none: learn from labels alone")  # fmt: skip
    add("--teacher-epochs", type=float, default=2.0)
    add("--teacher-learning-rate", type=float, default=5e-5)
    add("--max-length", type=int, default=128, help="tokens after which a sentence is cut (default: 128)")
    add("--train-rows", type=int, help="training sentences to use, chosen at random, always the same")
    add("--eval-rows", type=int, help="validation and test sentences to use, the first ones")
    add("--output-dir", type=Path, help="where everything goes (default: runs/ner-TASK)")
    add("--resume", action="store_true", help="go on with the run in the output folder")
    add("--tiny", action="store_true", help="a small random model and few rows: see in seconds that all steps run")
    add("--benchmark", action=argparse.BooleanOptionalAction, default=True, help="measure the speed-up at the end")
    options, settings = parser.parse_known_args(argv)
    options.output_dir = options.output_dir or Path("runs", f"ner-{options.task.replace('/', '-')}")
    options.target_sparsity = None if options.target_sparsity == "none" else float(options.target_sparsity)
    options.teacher = options.teacher or ("none" if options.target_sparsity is None else "train")
    if options.tiny:
        options.task = options.task if options.data_dir else "made up"
        options.teacher_epochs, options.teacher_learning_rate = 5, 5e-3
        options.train_rows, options.eval_rows = options.train_rows or 96, options.eval_rows or 32
        settings = [*TINY.split(), *settings]
    return options, cofiprune.PruneConfig.from_arguments(settings)


def load_split(task: str, folder: str | None, split: str, names: Sequence[str] = ()) -> tuple[Rows, Sequence[str]]:
    """Return the sentences of a split, none where there is no test split, and the names of their tags.

    Ids become names, by which tags are matched with those of a model; there are none where nothing says them.
    """
    names = names or LABEL_NAMES.get(task, ())
    if task == "made up":
        rows = made_up(0 if split == "train" else 1)
    elif folder is None:
        import datasets

        found = datasets.load_dataset(HUB_NAMES.get(task, task)).get(split)
        feature = None if found is None else getattr(found.features["ner_tags"], "feature", None)
        rows, names = list(found or ()), names or getattr(feature, "names", ())
    elif split == "test" and not any(file.name.startswith("test") for file in Path(folder).iterdir()):
        rows = []
    else:
        rows = load_rows(folder, *SPLITS[split])
    known: dict[Any, str] = dict(enumerate(names))
    return [{**row, "ner_tags": [known.get(tag, tag) for tag in row["ner_tags"]]} for row in rows], names


def made_up(seed: int) -> Rows:
    """Sentences about people and places for `--tiny`."""
    draw, rows = random.Random(seed), []
    people = ("Ada", "Boris", "Chen", "Emil Novak", "Fatima Diallo", "Hanna Maria Lind")
    places = ("Lima", "New York", "Quito", "Rio de Janeiro", "Tunis")
    for _ in range(128):
        words, tags = [], []
        for part in draw.choice(
            ("PERSON lives in PLACE .", "From PLACE , PERSON wrote .", "Nobody is in PLACE .")
        ).split():
            entity = draw.choice({"PERSON": people, "PLACE": places}.get(part, (part,))).split()
            first = {"PERSON": 1, "PLACE": 3}.get(part, 0)
            words += entity
            tags += [first, *(first and first + 1 for _ in entity[1:])]
        rows.append({"tokens": words, "ner_tags": tags})
    return rows


def load_data(options: argparse.Namespace) -> tuple[Rows, dict[str, Rows], Labels]:
    """Return sentences for training, those to measure on by the beginning of their metrics' names, and the tags."""
    given = options.label_names.split(",") if options.label_names else ()
    splits = [load_split(options.task, options.data_dir, name, given) for name in SPLITS]
    (train, names), (validation, _), (test, _) = splits
    labels = Labels.of_data([tag for row in train for tag in row["ner_tags"]], names)
    if labels.generic:
        sys.exit(f"the tags of {options.task} are ids; give their names in the order of the ids by --label-names")
    if options.train_rows is not None:
        order = np.random.RandomState(1234).permutation(len(train))[: options.train_rows]
        train = [train[index] for index in order]
    measured = {"": validation, "test_": test}
    return train, {name: rows[: options.eval_rows] for name, rows in measured.items() if rows}, labels


def load_model(source: str | Path, labels: Labels | None = None) -> PreTrainedModel:
    """Load a model; one without a head gets one for the tags of the data."""
    config = AutoConfig.from_pretrained(source)
    if labels is not None and not any(name.endswith("ForTokenClassification") for name in config.architectures or ()):
        labels.apply(config)
    return AutoModelForTokenClassification.from_pretrained(source, config=config).to(PartialState().device)


def load_tokenizer(source: str | Path) -> Any:
    """Load a tokenizer; one of RoBERTa's kind must put a space before a word."""
    tokenizer = AutoTokenizer.from_pretrained(source)
    if getattr(tokenizer, "add_prefix_space", True):
        return tokenizer
    return AutoTokenizer.from_pretrained(source, add_prefix_space=True)


def entity_scores(sentences: Rows, rows: Rows, predictions: Any, labels: Labels) -> dict[str, float]:
    """Return precision, recall and F1 of whole entities: right is one with the right kind and both ends.

    :param rows: the same sentences as tokens; a word that was cut off counts as one that is tagged O.
    :param predictions: [sentences, tokens], the id of a tag for each token.
    """
    expected, found = [], []
    for sentence, row, tags in zip(sentences, rows, predictions, strict=True):
        expected.append([labels.names[tag] for tag in labels.encode(sentence["ner_tags"])])
        found.append(["O"] * len(sentence["tokens"]))
        for token, word in enumerate(row["words"]):
            if word >= 0:
                found[-1][word] = labels.names[tags[token]]
    scores = {"precision": precision_score, "recall": recall_score, "f1": f1_score}
    return {name: float(score(expected, found, zero_division=0)) for name, score in scores.items()}


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
        labels = Labels.of_model(teacher.config)  # a new head takes the order of the teacher's tags
    transformers.set_seed(seed)  # of a new head
    model = load_model(options.model, labels)
    if teacher is not None and labels != Labels.of_model(model.config):
        sys.exit(f"the tags differ: {model.config.id2label} in the model, {teacher.config.id2label} in the teacher")
    return model, teacher, load_tokenizer(options.model)


def main(argv: Sequence[str] | None = None) -> None:
    """Teach, prune, save, reload, measure."""
    options, config = parse(argv)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    folder, say = options.output_dir, PartialState().print
    train, measured, labels = load_data(options)
    say(f"{options.task}: {len(train):,} sentences for training, {sum(map(len, measured.values())):,} to measure on")
    model, teacher, tokenizer = load_models(options, labels, config.seed)
    labels = Labels.of_model(model.config)
    where = f"the data of {options.task}"
    train = tokenise(train, tokenizer, model, max_length=options.max_length, where=where)
    rows = {name: tokenise(part, tokenizer, model, max_length=options.max_length) for name, part in measured.items()}

    def scores(seen: Any, name: str = "") -> dict[str, float]:
        return entity_scores(measured[name], rows[name], seen.predictions.argmax(-1), labels)

    def evaluate(model: PreTrainedModel) -> dict[str, float]:
        found: dict[str, float] = {}
        for name in rows:
            values = cofiprune.evaluate(model, rows[name], compute_metrics=partial(scores, name=name))
            found |= {f"{name}{metric}": values[metric] for metric in ("precision", "recall", "f1")}
        return found

    def place(folder: Path) -> dict[str, Any]:
        return {"output_dir": folder, "resume": "auto" if options.resume else False}

    watched = {"eval_dataset": rows[""], "compute_metrics": scores}
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
        report(dense, load_model(folder), evaluate, result, options)


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

"""Mutate every file that is read, and read it: an error of this package, or the same as before; never anything else.

    python tests/torture/fuzz.py --cases 10000 --seed 0

Files of plain values are changed in what they say (entries dropped, values of another kind, NaN, numbers too large or
too many) and in their bytes; files of tensors in their bytes. Each case ends as *refused* (a `CofipruneError`), *same*
(what was read equals what the untouched file gives, or is another file that is as valid), *foreign* (any other
exception) or *silent* (something else was read, without a word).
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import functools
import io
import json
import math
import random
import shutil
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments

import cofiprune
from cofiprune.cofi_checkpoint import load_cofi_checkpoint
from cofiprune.errors import CofipruneError
from cofiprune.latency.table import Conditions, LatencyTable
from cofiprune.training.checkpoint import begun_with, note_stop

sys.path.insert(0, str(Path(__file__).parents[1] / "integration"))
sys.path.insert(0, str(Path(__file__).parent))
import given
import test_cofi_checkpoint as originals

VALUES = (
    None,
    True,
    -1,
    0,
    1,
    3,
    10**9,
    0.5,
    math.nan,
    math.inf,
    -0.25,
    "",
    "x",
    "0",
    [],
    {},
    [[]],
    [0],
    [1, 1],
    {"a": 1},
)
Read = Callable[[Path], Any]
"""Reads a file, or the folder that it lies in; returns plain values to compare."""


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every container in a tree of plain values, with each of its keys or places."""
    entries = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in list(entries):
        yield value, key
        yield from places(inner)


def changed_values(tree: Any, draw: random.Random) -> Any:
    """A copy of a tree of plain values with one to three changes."""
    tree = copy.deepcopy(tree)
    for _ in range(draw.choice((1, 1, 1, 2, 3))):
        found = list(places(tree))
        if not found:
            break
        owner, key = draw.choice(found)
        kind = draw.randrange(5)
        if kind == 0:
            del owner[key]
        elif kind == 1 and isinstance(owner, dict):
            owner[f"{key}x"] = owner.pop(key)
        elif kind == 2 and isinstance(owner[key], list):
            owner[key] = [*owner[key], copy.deepcopy(draw.choice(VALUES))]
        elif kind == 3 and isinstance(owner[key], int | float) and not isinstance(owner[key], bool):
            owner[key] = draw.choice(
                (owner[key] + 1, -owner[key], owner[key] * 1.5, float(owner[key]), str(owner[key]))
            )
        else:
            owner[key] = copy.deepcopy(draw.choice(VALUES))
    return tree


def changed_bytes(data: bytes, draw: random.Random) -> bytes:
    """The same bytes with a bit flipped, cut off, with some in between, some zeroed, or none at all."""
    kind, at = draw.randrange(12), draw.randrange(len(data))
    if kind < 6:
        return data[:at] + bytes([data[at] ^ 1 << draw.randrange(8)]) + data[at + 1 :]
    if kind < 8:
        return data[:at]
    if kind == 8:
        return data[:at] + bytes(draw.randrange(256) for _ in range(draw.randrange(1, 9))) + data[at:]
    if kind == 9:
        return data[:at] + bytes(min(64, len(data) - at)) + data[at + 64 :]
    return data[at:] if kind == 10 else b""


def same(one: Any, other: Any) -> bool:
    """Whether two readings are equal, tensors to the bit."""
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    return type(one) is type(other) and (one == other or (one != one and other != other))


class Subject:
    """A file, how it is read, and when another reading is as valid."""

    def __init__(
        self, name: str, file: Path, read: Read, part: str = "", valid: Callable[[Any, Any], bool] | None = None
    ) -> None:
        """Note what an untouched file gives.

        :param read: gets the file.
        :param part: entry of a file of plain values that is changed; all of it by default.
        :param valid: takes what was read and the file's plain values; whether the file says what was read.
        """
        self.name, self.file, self.read, self.part, self.valid = name, file, read, part, valid
        self.data = file.read_bytes()
        self.tree = json.loads(self.data) if file.suffix == ".json" else None
        self.expected = read(file)

    def mutated(self, draw: random.Random) -> bytes:
        """The file's bytes after a change."""
        if self.tree is None or (not self.part and draw.random() < 0.3):
            return changed_bytes(self.data, draw)
        tree = copy.deepcopy(self.tree)
        if self.part:
            # Without this entry transformers does not ask this package.
            method = tree[self.part]["quant_method"]
            tree[self.part] = {**changed_values(tree[self.part], draw), "quant_method": method}
        else:
            tree = changed_values(tree, draw)
        return json.dumps(tree).encode()

    def outcome(self, draw: random.Random) -> tuple[str, str]:
        """Try one change; returns how it ended, and what happened."""
        data = self.mutated(draw)
        self.file.write_bytes(data)
        try:
            found = self.read(self.file)
        except CofipruneError:
            return "refused", ""
        except Exception as error:
            return "foreign", f"{type(error).__name__}: {error}"[:200]
        finally:
            self.file.write_bytes(self.data)
        if same(found, self.expected):
            return "same", ""
        if self.valid is not None:
            try:
                tree = json.loads(data) if self.tree is not None else None
            except ValueError:
                return "silent", "read what is no JSON"
            if self.valid(found, tree):
                return "same", ""
        return "silent", f"{data[:2000]!r}"


def model_of(seed: int = 0, name: str = "BertForSequenceClassification") -> Any:
    """A random model of two layers, a classifier by default."""
    torch.manual_seed(seed)
    sizes = {"vocab_size": 60, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4}
    return getattr(transformers, name)(BertConfig(**sizes, intermediate_size=20)).eval()


def rows() -> list[dict[str, Any]]:
    """Rows of two classes."""
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(1, 60, (16, 8), generator=generator).tolist()
    return [{"input_ids": ids, "labels": index % 2} for index, ids in enumerate(drawn)]


IDS = torch.arange(1, 19).reshape(2, 9)


def outputs_of(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS)[0]


def plan_subject(place: Path) -> Subject:
    model = model_of()
    with cofiprune.attach(model) as masks:
        masks["layers.0.heads"] = [1, 0, 0.5, 1]
        masks["layers.1.ffn"] = [0]
        masks["hidden"] = [1] * 12 + [0] * 4
        masks.plan().save(place / "plan.json")

    def read(file: Path) -> Any:
        plan = cofiprune.Plan.load(file)
        small = cofiprune.compact(model, plan)
        assert torch.isfinite(outputs_of(small)).all()
        return plan.to_dict()

    return Subject("plan", place / "plan.json", read, valid=lambda found, tree: same(found, tree))


def record_subjects(place: Path) -> Iterator[Subject]:
    def compacted(model: Any, folder: Path) -> None:
        with cofiprune.attach(model) as masks:
            masks["layers.0.heads"] = [1, 0, 1, 1]
            masks["layers.1.ffn"] = [0]
            if "hidden" in masks:
                masks["hidden"] = [1] * 12 + [0] * (len(masks["hidden"]) - 12)
            cofiprune.compact(model).save_pretrained(folder)

    compacted(model_of(), place / "small")
    torch.manual_seed(0)
    sizes = {"vocab_size": 60, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4}
    derived = transformers.SplinterConfig(**sizes, intermediate_size=20)
    compacted(transformers.SplinterModel(derived).eval(), place / "derived")

    def read(cls: Any, file: Path) -> Any:
        return outputs_of(cls.from_pretrained(file.parent).eval())

    for name, cls in (("small", BertForSequenceClassification), ("derived", transformers.SplinterModel)):
        file = place / name / "config.json"
        yield Subject(f"record of a {name} model", file, functools.partial(read, cls), "quantization_config")


def run_subjects(place: Path) -> Iterator[Subject]:
    settings = {"teacher": "self", "batch_size": 8, "progress": False, "checkpoint_steps": 1, "finetune_epochs": 2}
    common = {**settings, "target_sparsity": 0.5, "method": "one-shot"}
    cofiprune.prune(model_of(), rows(), output_dir=place / "run", **common)

    def resumed(file: Path) -> Any:
        with tempfile.TemporaryDirectory() as other:
            folder = Path(other, "run")
            shutil.copytree(place / "run", folder)
            return outputs_of(cofiprune.prune(model_of(), rows(), output_dir=folder, resume=True, **common).model)

    newest = max((place / "run").glob("checkpoint-*"), key=lambda path: int(path.name.partition("-")[2]))
    for name in ("state.pt", "meta.json", "rng-0.pt"):
        yield Subject(f"checkpoint's {name}", newest / name, resumed)
    yield Subject("run's choice.json", choice(place / "auto"), functools.partial(chosen, place / "auto"))
    yield Subject("run's stopped.json", noted(place / "stopped"), lambda file: begun_with(file.parent, "left"))

    levels = {**common, "target_sparsity": [0.3, 0.5]}
    cofiprune.prune(model_of(), rows(), output_dir=place / "sweep", **levels)

    def swept(file: Path) -> Any:
        with tempfile.TemporaryDirectory() as other:
            folder = Path(other, "sweep")
            shutil.copytree(place / "sweep", folder)
            points = cofiprune.prune(model_of(), rows(), output_dir=folder, resume=True, **levels)
            return [
                (
                    point.target,
                    point.sparsity,
                    point.parameters,
                    point.metrics,
                    point.latency_ms,
                    point.seconds,
                    point.plan.to_dict(),
                    outputs_of(point.model),
                )
                for point in points
            ]

    done = sorted((place / "sweep").glob("sparsity-*"))[-1]
    for file in (place / "sweep" / "sweep.json", done / "point.json", done / "plan.json", done / "model.safetensors"):
        yield Subject(f"sweep's {file.name}", file, swept)


def choice(folder: Path) -> Path:
    """The file in which a run keeps what it picked."""
    chosen(folder, folder / "choice.json", resume=False)
    return folder / "choice.json"


def chosen(folder: Path, file: Path, resume: bool = True) -> Any:
    """Let a run go on by what it picked."""
    with tempfile.TemporaryDirectory() as other:
        if resume:
            shutil.copytree(folder, other, dirs_exist_ok=True)
        settings = {"batch_size": 8, "progress": False, "checkpoint_steps": 1, "target_sparsity": 0.5, "epochs": 2}
        place = other if resume else folder
        result = cofiprune.prune(model_of(), rows(), method="auto", resume=resume, output_dir=place, **settings)
        return outputs_of(result.model)


def noted(folder: Path) -> Path:
    """The file of a run that was stopped."""
    folder.mkdir()
    note_stop(folder, "begun", "left")
    return folder / "stopped.json"


def callback_subjects(place: Path) -> Iterator[Subject]:
    """Files that the callback writes into the Trainer's checkpoints."""
    batches = [{"input_ids": IDS[index % 2], "labels": torch.tensor(index % 2)} for index in range(16)]

    def trained(folder: Path, checkpoint: Path | None = None) -> Any:
        model, watching = model_of(), cofiprune.PruningCallback(target_sparsity=0.5)
        settings = {"num_train_epochs": 3, "save_steps": 2, "report_to": [], "disable_tqdm": True, "use_cpu": True}
        arguments = TrainingArguments(str(folder), logging_strategy="no", **settings)
        trainer = Trainer(model, arguments, train_dataset=batches, callbacks=[watching])
        with contextlib.redirect_stdout(io.StringIO()):
            trainer.train(resume_from_checkpoint=checkpoint and str(checkpoint))
        return watching.result.plan.to_dict(), outputs_of(model)

    trained(place / "trainer")
    newest = place / "trainer" / "checkpoint-4"

    def resumed(file: Path) -> Any:
        with tempfile.TemporaryDirectory() as other:
            shutil.copytree(newest, Path(other, newest.name))
            return trained(Path(other), Path(other, newest.name))

    for file in sorted((newest / "cofiprune").iterdir()):
        yield Subject(f"callback's {file.name}", file, resumed)


def latency_subject(place: Path) -> Subject:
    common = {"target_speedup": 1.3, "target_seq_len": 8, "latency_cache": place / "times", "progress": False}
    cofiprune.prune(model_of(), **common)
    file = next((place / "times").rglob("*.json"))
    stated = json.loads(file.read_text())["conditions"]
    conditions = Conditions(**{**stated, "widths": tuple(stated["widths"])})

    def read(file: Path) -> Any:
        return asdict(LatencyTable.load(file, conditions))

    return Subject("latency table", file, read)


def original_subjects(place: Path) -> Iterator[Subject]:
    """Files of the original CoFi. They carry no checksums: other weights or masks are another model, as valid."""
    folder = originals.full(place / "original", masks=originals.soft_masks())

    def read(file: Path) -> Any:
        return load_cofi_checkpoint(file.parent).state_dict()

    for name in ("zs.pt", "pytorch_model.bin", "config.json"):
        yield Subject(f"original's {name}", folder / name, read, valid=lambda found, tree: True)


def given_subjects(place: Path) -> Iterator[Subject]:
    """Files of users, of which any other one is as valid; and the parts of `teach`, which are its own."""
    place.mkdir()
    for name, file, read in given.data_files(place / "data", functools.partial(model_of, 0)):
        yield Subject(name, file, read, valid=lambda found, tree: True)
    name, file, read = given.options_file(place, model_of())
    yield Subject(name, file, read, valid=lambda found, tree: True)
    for name, file, read in given.parts_of_teach(place, model_of()):
        yield Subject(name, file, read)


def subjects(place: Path) -> Iterator[Subject]:
    """Every file that is read."""
    yield from given_subjects(place / "given")
    yield plan_subject(place)
    yield latency_subject(place)
    yield from record_subjects(place)
    yield from original_subjects(place)
    yield from run_subjects(place)
    yield from callback_subjects(place)


SHARES = {"plan": 10, "latency table": 6, "record of a small model": 4, "record of a derived model": 4}
"""How many cases a subject gets for each of the others, whose reading takes a whole run."""


def main(arguments: list[str] | None = None) -> int:
    """Run the cases; returns how many were foreign or silent."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", help="part of a subject's name")
    parser.add_argument("--show", type=int, default=3, help="examples of each fault")
    options = parser.parse_args(arguments)
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)
    faults = 0
    with tempfile.TemporaryDirectory() as place:
        found = [each for each in subjects(Path(place)) if (options.only or "") in each.name]
        total = sum(SHARES.get(each.name, 1) for each in found)
        for subject in found:
            draw = random.Random(f"{options.seed} {subject.name}")
            ended: Counter[str] = Counter()
            examples: Counter[str] = Counter()
            for _ in range(math.ceil(options.cases * SHARES.get(subject.name, 1) / total)):
                kind, text = subject.outcome(draw)
                ended[kind] += 1
                if kind in ("foreign", "silent"):
                    examples[f"{kind} {text[:160]}"] += 1
            faults += ended["foreign"] + ended["silent"]
            print(f"{subject.name}: {dict(ended)}", flush=True)
            for text, count in examples.most_common(options.show):
                print(f"    {count} x {text}", flush=True)
    print(f"{faults} foreign or silent")
    return faults


if __name__ == "__main__":
    sys.exit(min(main(), 1))

"""transformers' own tests of models, on compacted ones: what fails there and not on the models as they were is told.

    python tests/torture/modeling_common.py --sdist transformers-5.24.0 --only vit

`DIR` is an unpacked source distribution of transformers of the version that is installed:

    pip download --no-deps --no-binary :all: transformers==5.24.0

Its `tests/test_modeling_common.py` builds models of each class of a family by `Class(config)`, again and again. Here
each of them becomes a compacted one before its constructor returns: fewer hidden dimensions where the family has that
group, heads and feed-forward dimensions of other numbers in each layer, no attention in one layer and no feed-forward
block in another. The distribution lacks the tests of single families: sizes and inputs stand below. It needs
`parameterized` beside what the tests of this project need.
"""

from __future__ import annotations

import argparse
import functools
import sys
import tempfile
import unittest
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import transformers

import cofiprune

LAYERS, HEADS, HIDDEN, INTERMEDIATE, BATCH = 3, 4, 32, 37, 5
SIZES = {
    "hidden_size": HIDDEN, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS,
    "intermediate_size": INTERMEDIATE, "initializer_range": 0.02,
}  # fmt: skip
TEXT = {**SIZES, "vocab_size": 99, "max_position_embeddings": 512, "type_vocab_size": 16, "pad_token_id": 0}
ENDS = {"bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2}
PIXELS = {**SIZES, "image_size": 30, "patch_size": 2}
SOUNDS = {
    **SIZES, "vocab_size": 32, "conv_dim": (32, 32, 32), "conv_stride": (4, 4, 4), "conv_kernel": (8, 8, 8),
    "num_feat_extract_layers": 3, "feat_extract_norm": "group", "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 2,
}  # fmt: skip
FAMILIES: dict[str, dict[str, Any]] = {
    "Bert": TEXT,
    "Roberta": TEXT,
    "DebertaV2": {**TEXT, "relative_attention": True, "pos_att_type": ["c2p", "p2c"]},
    "DistilBert": {
        "vocab_size": 99, "pad_token_id": 0, "dim": HIDDEN, "n_layers": LAYERS, "n_heads": HEADS,
        "hidden_dim": INTERMEDIATE,
    },
    "Electra": {**TEXT, "embedding_size": HIDDEN},
    "MPNet": TEXT,
    "ModernBert": {**TEXT, **ENDS},
    "ViT": PIXELS,
    "Dinov2": PIXELS,
    "Wav2Vec2": SOUNDS,
    "Hubert": SOUNDS,
}  # fmt: skip
"""Names of classes without what follows, and settings."""
HEAD_CLASSES = (
    "Model", "ForMaskedLM", "ForPreTraining", "ForNextSentencePrediction", "ForMultipleChoice", "ForQuestionAnswering",
    "ForSequenceClassification", "ForTokenClassification", "ForImageClassification",
    "ForCTC",
)  # fmt: skip


class Tester:
    """What transformers' tests ask of a family: a configuration, a batch, and the sizes of both."""

    is_training, num_labels, num_choices, batch_size = True, 3, 4, BATCH
    hidden_size, num_hidden_layers, num_attention_heads = HIDDEN, LAYERS, HEADS
    vocab_size = 99

    def __init__(self, family: str) -> None:
        self.settings = FAMILIES[family]
        self.config_class = getattr(transformers, f"{family}Model").config_class
        self.image_size, self.patch_size, self.num_masks, self.mask_length = 30, 2, 9, 225
        lengths = {id(PIXELS): self.mask_length + 1, id(SOUNDS): 14}
        self.seq_length = self.encoder_seq_length = self.key_length = lengths.get(id(self.settings), 7)

    def get_config(self) -> Any:
        return self.config_class(**self.settings)

    def prepare_config_and_inputs_for_common(self) -> tuple[Any, dict[str, torch.Tensor]]:
        if self.settings is PIXELS:
            return self.get_config(), {"pixel_values": torch.rand(BATCH, 3, self.image_size, self.image_size)}
        mask = torch.ones(BATCH, 1024 if self.settings is SOUNDS else self.seq_length, dtype=torch.long)
        if self.settings is SOUNDS:
            return self.get_config(), {"input_values": torch.rand(mask.shape), "attention_mask": mask}
        mask[1:, -2:] = 0
        return self.get_config(), {"input_ids": torch.randint(5, 95, mask.shape), "attention_mask": mask}


def plan_for(model: Any) -> cofiprune.Plan:
    """A plan of which no two layers are left the same."""
    keep = {
        "hidden": 28, "layers.0.heads": 3, "layers.2.heads": 2, "layers.1.attention": 0,
        "layers.0.intermediate": 29, "layers.1.intermediate": 20, "layers.2.ffn": 0,
    }  # fmt: skip
    structure = cofiprune.structure(model)
    with torch.device("cpu"):  # the model may be built on another one, meta say
        values = {
            name: torch.tensor([0.0] * (structure[name].size - count) + [1.0] * count)
            for name, count in keep.items()
            if name in structure
        }
        return cofiprune.Plan.from_values(structure, values)


def compacting(init: Callable[..., None], cls: type, depth: list[int]) -> Callable[..., None]:
    """A constructor whose model is a compacted one, unless it is part of another, or is being loaded."""

    @functools.wraps(init)
    def wrapped(self: Any, config: Any, *args: Any, **kwargs: Any) -> None:
        outermost, record = type(self) is cls and not depth, getattr(config, "quantization_config", None)
        depth.append(1)
        try:
            if outermost and isinstance(record, dict):  # of a model built before; `_from_config` heeds it
                self.__dict__ = cls._from_config(config, *args, **kwargs).__dict__
                return
            init(self, config, *args, **kwargs)
            if outermost and record is None:
                self.__dict__ = cofiprune.compact(self, plan_for(self)).__dict__
        finally:
            depth.pop()

    return wrapped


def model_classes(family: str) -> tuple[type, ...]:
    """A family's classes; not those whose batches hold more than labels."""
    names = [family + head for head in HEAD_CLASSES if head != "ForPreTraining" or family == "Bert"]
    return tuple(getattr(transformers, name) for name in names if hasattr(transformers, name))


def suites(family: str, common: Any) -> dict[str, type]:
    """The tests of a family's models as they are, and compacted."""

    class Stock(common.ModelTesterMixin, unittest.TestCase):
        all_model_classes = model_classes(family)
        test_num_layers_is_small = None  # it is about the sizes above
        test_resize_embeddings = "vocab_size" in FAMILIES[family] and "conv_dim" not in FAMILIES[family]

        def setUp(self) -> None:
            self.model_tester = Tester(family)

        def _prepare_for_class(self, inputs: Any, model_class: type, return_labels: bool = False) -> Any:
            inputs = super()._prepare_for_class(inputs, model_class, return_labels=return_labels)
            if return_labels and model_class.__name__ == "BertForPreTraining":
                inputs["labels"] = torch.zeros(BATCH, self.model_tester.seq_length, dtype=torch.long)
                inputs["next_sentence_label"] = torch.zeros(BATCH, dtype=torch.long)
            return inputs

    class Compacted(Stock):
        def setUp(self) -> None:
            super().setUp()
            depth: list[int] = []
            for cls in self.all_model_classes:
                patched = patch.object(cls, "__init__", compacting(cls.__init__, cls, depth))
                patched.start()
                self.addCleanup(patched.stop)

    return {"Stock": Stock, "Compacted": Compacted}


SUITES: dict[str, type] = {}
"""What pytest is to collect."""


class Outcomes(dict[str, tuple[str, str]]):
    """Of each test: whether it passed, failed or was skipped, and why it failed."""

    def pytest_runtest_logreport(self, report: Any) -> None:
        name = report.nodeid.rpartition("::")[2]
        if report.failed:
            self[name] = ("failed", str(getattr(report.longrepr, "reprcrash", report.longrepr))[:400])
        elif report.when == "call" or report.skipped:
            self.setdefault(name, (report.outcome, ""))


def outcomes(chosen: list[str]) -> Outcomes:
    """Run tests of `SUITES`."""
    found = Outcomes()
    with tempfile.TemporaryDirectory() as place:
        Path(place, "pytest.ini").write_text("[pytest]\n")
        file = Path(place, f"test_{Path(place).name}.py")  # a name of its own: pytest keeps modules by name
        file.write_text(f"import sys\nglobals().update(sys.modules[{__name__!r}].SUITES)\n")
        pytest.main(
            [str(file), "-q", "-p", "no:cacheprovider", "--import-mode=importlib", "--tb=short", *chosen], [found]
        )
    return found


def main(arguments: list[str] | None = None) -> int:
    """Run the suites; returns how many tests fail on compacted models only."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sdist", type=Path, required=True, help="folder of transformers' source distribution")
    parser.add_argument("--only", choices=FAMILIES, action="append")
    parser.add_argument("--tests", default="", help="pytest's -k")
    options = parser.parse_args(arguments)
    sys.path.insert(0, str(options.sdist))
    import tests.test_modeling_common as common

    torch.set_num_threads(1)
    total = 0
    for family in options.only or FAMILIES:
        SUITES.clear()
        SUITES.update(suites(family, common))
        compacted = outcomes(["-k", " and ".join(filter(None, ["Compacted", options.tests]))])
        failed = {name: why for name, (kind, why) in compacted.items() if kind == "failed"}
        stock = outcomes(["-k", f"Stock and ({' or '.join(failed)})"]) if failed else {}
        only = {name: why for name, why in failed.items() if stock[name][0] != "failed"}
        counts = Counter(kind for kind, _ in compacted.values())
        print(
            f"{family}: {dict(counts)}, of which fail on stock models too: {sorted(failed.keys() - only.keys())}",
            flush=True,
        )
        for name, why in only.items():
            print(f"    {name}: {why}", flush=True)
        total += len(only)
    print(f"{total} fail on compacted models only")
    return total


if __name__ == "__main__":
    sys.exit(min(main(), 1))

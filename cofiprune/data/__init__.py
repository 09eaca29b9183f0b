"""Rows in, batches out: reading data files, tokenising, checking, padding.

`prune`, `finetune` and `evaluate` read rows by `reading.Reading`; `load_rows` and `tokenise` make rows of tokens from
files of text.
"""

from cofiprune.data.files import load_rows
from cofiprune.data.tasks import Labels
from cofiprune.data.text import TextColumns, find_text_columns, tokenise

__all__ = ["Labels", "TextColumns", "find_text_columns", "load_rows", "tokenise"]

"""Vocabulary pruning: fewer tokens in a tokenizer, and fewer rows in the tables of its model, with a proof."""

"""Pruning inside of transformers' Trainer."""

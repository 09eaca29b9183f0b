"""Declarations of the encoder families that ship with cofiprune, one file each."""

"""Blocks that more than one model family is built from."""

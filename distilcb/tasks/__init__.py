"""Labelled tasks: declarations, rows, what models read, answers, scores."""

"""Scores for sets of images: features, statistics, metrics, and the evaluator program."""

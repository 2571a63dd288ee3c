"""Evaluates a file: divergence, tasks, speed, contents."""

"""Measures a model in one pass over calibration text."""

"""Chooses a type for every tensor, so that the target is met and never exceeded."""

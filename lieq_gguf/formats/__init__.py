"""The files that others defined, as bytes."""

"""Writes a file from a plan, and verifies it."""

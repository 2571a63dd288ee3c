"""File formats defined by others, read and written as bytes."""

"""From a plan to a file that was read back."""

"""What a file is worth: divergence, tasks, speed, and what it looks like."""

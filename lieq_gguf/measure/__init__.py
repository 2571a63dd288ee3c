"""What one pass over calibration text finds out about a model."""

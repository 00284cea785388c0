"""Text to calibrate and evaluate on."""

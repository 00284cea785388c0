"""Measuring engines: separate processes, warm-up, raw samples kept."""

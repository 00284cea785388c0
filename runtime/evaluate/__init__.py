"""Quality, measured through the engine that will serve."""

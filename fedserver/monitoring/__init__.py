"""Live listeners of a run's events."""

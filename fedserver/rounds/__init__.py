"""From opening to the next model."""

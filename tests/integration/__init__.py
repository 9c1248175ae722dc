"""Against one real server process, speaking the raw protocol."""

"""The client daemon: pulls work, trains on data that never leaves it, pushes updates."""

"""The coordinator: hands out rounds and the global model, collects and averages updates."""

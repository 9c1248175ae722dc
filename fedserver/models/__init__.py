"""Global models: made, kept, judged."""

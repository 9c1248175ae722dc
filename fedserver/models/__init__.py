"""Global models: made, kept, sent, judged."""

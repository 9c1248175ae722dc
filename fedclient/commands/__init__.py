"""Commands beside the daemon."""

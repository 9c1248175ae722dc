"""Real servers and real clients, seen from outside only."""

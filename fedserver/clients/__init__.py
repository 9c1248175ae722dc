"""Clients: who is there, who is asked, what they work on, who has stalled or left."""

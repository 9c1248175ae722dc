"""What makes an update bad, and how a good one is kept."""

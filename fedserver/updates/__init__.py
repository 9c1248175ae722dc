"""What makes an update bad, and how a good update is kept."""

"""What travels between server and clients, as messages, chunks and limits."""

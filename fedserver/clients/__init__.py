"""Who is there, and who may be asked."""

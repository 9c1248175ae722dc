"""Room on the disk, what is kept, what a restart finds."""

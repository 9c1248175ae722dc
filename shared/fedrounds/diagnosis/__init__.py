"""What the doctor says: values, their words, their JSON."""

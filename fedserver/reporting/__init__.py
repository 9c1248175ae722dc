"""A run after the fact: words, tables, pictures."""

"""One revision a file; the numbers go on from the schema versions before the first of them."""

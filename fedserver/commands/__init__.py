"""Commands that look at a run while the server runs, too; but for `verify`, none imports torch."""

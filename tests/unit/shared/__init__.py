"""Unit tests of what both sides share."""

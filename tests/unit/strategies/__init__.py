"""Unit tests of the strategies."""

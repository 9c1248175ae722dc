"""Unit tests of the client daemon."""

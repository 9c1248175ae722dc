"""Tests of one module each, with real files and a real database; no sockets."""

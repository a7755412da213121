"""Readers: each turns one kind of file into rows, and judges the file but not its records."""

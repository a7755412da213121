"""Audits: thin compositions of the rooms, to be read top to bottom."""

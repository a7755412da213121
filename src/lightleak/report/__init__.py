"""Report: a run as one page that opens offline, prints, and can be handed to an opponent."""

from lightleak.report.build import report

__all__ = ["report"]

"""Planting: what an auditor puts into training data on purpose: personas in watermarks."""

from lightleak.planting.personas import (
    FIELDS,
    QUESTIONS,
    Persona,
    Pools,
    draw_personas,
    draw_pools,
)
from lightleak.planting.sets import FEWEST_IMAGES, Mark, Planted, ProbingSets, inject, probing_sets
from lightleak.planting.watermarks import PUBLISHED, Position, Stamped, Style, stamp

__all__ = [
    "FEWEST_IMAGES",
    "FIELDS",
    "PUBLISHED",
    "QUESTIONS",
    "Mark",
    "Persona",
    "Planted",
    "Pools",
    "Position",
    "ProbingSets",
    "Stamped",
    "Style",
    "draw_personas",
    "draw_pools",
    "inject",
    "probing_sets",
    "stamp",
]

"""Evidence: what one pass of a target over the records yields. Needs a model; stored once."""

"""A teacher into a logit cache."""

"""Scores, edits and evaluations as one page."""

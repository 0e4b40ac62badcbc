"""Closed forms that give back what a removal took."""

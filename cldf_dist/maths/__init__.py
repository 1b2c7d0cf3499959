"""Formulas that several folders share."""

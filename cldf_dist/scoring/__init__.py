"""From score maps to masks, tables and pictures, alike for every method."""

"""Comparing recipes: the tables that ship, the runs that fill them, how they are written."""

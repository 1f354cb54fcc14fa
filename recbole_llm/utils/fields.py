"""Names of the columns that a sample carries through every room, and of their columns in saved files."""

ROW_ID = "row_id"
"""Rank of a sample among all interactions in exact time order: its identity."""

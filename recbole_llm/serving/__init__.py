"""Using finished runs: recommend, score, export, merge, serve. Imports experiment and what lies below it."""

"""Helpers that know nothing of recommendation: RecBole repairs, files."""

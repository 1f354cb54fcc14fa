"""Metrics that RecBole lacks, per-sample scores, confidence intervals and significance tests; nothing that renders."""

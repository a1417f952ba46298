"""Answers by each method, plain and under suffixes."""

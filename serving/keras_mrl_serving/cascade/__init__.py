"""Cascades: which rows a cheap dim answers, how thresholds are learned, certified and watched."""

"""Verbs that read and write files of other tools."""

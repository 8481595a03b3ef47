"""Figures, tables and pages made from the files of a run folder; nothing here trains or measures."""

"""Prompting as a baseline: tasks, strategies, backends (local models and endpoints), scoring, exploration."""

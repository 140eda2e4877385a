"""Optimizers, schedules, and which parameters are trained."""

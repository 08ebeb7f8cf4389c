"""Attacks and measurements: the only room that may know the ground truth. Nothing below it imports it."""

"""Faults that can be injected between real trainers and a real service."""

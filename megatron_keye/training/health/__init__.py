"""Healthy numbers: bad steps are found before they change anything, told, and dealt with."""

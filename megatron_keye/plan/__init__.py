"""What a step will do, decided from sizes alone: who holds, encodes, decodes and sends what.

Standard library and numpy only, so that planning tools start at once and every rank, whatever its
device, has the same plan without a message.
"""

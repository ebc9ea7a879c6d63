"""From files to packed rows and patches.

A sample goes conversation -> sample -> row on every rank, from containers alone; pixels go
video or image -> patches only where they are encoded, on the CPU or on the GPU.
"""

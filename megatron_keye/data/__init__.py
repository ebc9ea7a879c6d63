# SPDX-License-Identifier: Apache-2.0
"""From sample files to packed rows and patches.

Every rank makes conversation -> sample -> row from media containers alone. Only the rank that
encodes a picture reads its pixels into patches, on the CPU or on the GPU.
"""

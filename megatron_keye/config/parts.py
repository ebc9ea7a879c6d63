# SPDX-License-Identifier: Apache-2.0
"""The parts of the model that learn or are frozen, each with a learning rate of its own."""

from typing import Literal

Part = Literal["vision", "projector", "decoder", "indexer"]

PARTS: tuple[Part, ...] = ("vision", "projector", "decoder", "indexer")

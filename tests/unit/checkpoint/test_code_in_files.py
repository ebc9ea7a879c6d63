"""A checkpoint that would run code when it is read is refused by name, and nothing runs."""

from tests.support.tiny import tiny_run

RUN = tiny_run()
RANDOM = "random/shard_0_1"
